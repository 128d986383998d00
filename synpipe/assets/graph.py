"""The graph of a data set: its assets in the order of the data flow, what each has made, and which are out of date.

The state of an asset follows from files alone (specs, sources, manifests). The command line, the schedule and the tests
therefore agree on it, with or without Dagster's history.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from synpipe.assets import (
    annotations,
    classifier,
    compressed,
    embedding_table,
    embeddings,
    evaluation,
    index,
    projection,
    rejects,
    rgb_tiles,
    scores,
    split,
    synapse_stacks,
    synapses,
    volume,
)
from synpipe.assets.asset import Asset, Task, facts_as_json
from synpipe.assets.file_records import find_damaged, find_lost, has_same_status, record_files
from synpipe.assets.manifest import Manifest, find_manifest, read_manifest, write_manifest
from synpipe.datasets import Dataset, record_bulk
from synpipe.embeddings.cache import LostVectors
from synpipe.embeddings.registry import branch_name
from synpipe.errors import SynpipeError
from synpipe.progress import Log
from synpipe.specs import Spec, digest
from synpipe.store.files import set_aside
from synpipe.store.objects import BulkPath
from synpipe.store.streams import read_batches
from synpipe.tiles.parts import damaged_parts

# Every kind of asset, in the order of the data flow.
ASSETS: tuple[Asset[Any], ...] = (
    volume.ASSET,
    annotations.ASSET,
    synapses.ASSET,
    synapse_stacks.ASSET,
    rgb_tiles.ASSET,
    rejects.ASSET,
    split.ASSET,
    embeddings.ASSET,
    compressed.ASSET,
    classifier.ASSET,
    projection.ASSET,
    embedding_table.ASSET,
    index.ASSET,
    scores.ASSET,
    evaluation.ASSET,
)

# The check that embeddings fail when a later asset finds one of their vectors damaged. Making them again passes it.
VECTORS_ARE_WHOLE = "vectors_are_whole"


@dataclass(frozen=True)
class Node:
    """One asset of one data set. encoder: "" for an asset that all encoders share."""

    dataset: Dataset
    asset: Asset[Any]
    encoder: str

    @property
    def name(self) -> str:
        """`rgb_tiles`, or `embeddings_em_d4`: the name in manifests and on the command line."""
        return self.asset.name_for(self.encoder)

    @property
    def key(self) -> tuple[str, ...]:
        """`demo/rgb_tiles`, or `demo/em_d4/embeddings`: the name in Dagster."""
        return tuple(filter(None, (self.dataset.name, self.encoder, self.asset.name)))

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the assets of which it reads files or facts."""
        return self.asset.reads(self.dataset, self.encoder)

    @property
    def path(self) -> Path | None:
        """The file that exists whenever the asset has been made, if it has one in the data set's folder."""
        return next(iter(self.asset.files(self.dataset, self.encoder)), None)

    @property
    def code_version(self) -> str:
        """Changes whenever the work would make something else of the same inputs."""
        return self.code_versions[0]

    @property
    def code_versions(self) -> list[str]:
        """`code_version`, then those of former code whose results are still good."""
        specs = digest(_as_json(self.asset.specs(self.dataset, self.encoder)))[:12]
        return [f"{version}-{specs}" for version in (self.asset.code_version, *self.asset.still_valid)]

    def run(self, log: Log, run_id: str | None = None, checks: Collection[str] = ()) -> Manifest:
        """Do the work and write the manifest. checks: names of the checks that the caller runs next; see `pass_checks`.

        Raises `SynpipeError` if an input has not been made, is incomplete or has changed since, and for whatever stops the work;
        the manifest is then as it was.
        """
        record_bulk(self.dataset)
        previous = find_manifest(self.dataset, self.name)
        inputs = self._read_inputs()
        if previous is not None:
            self._set_damaged_files_aside(previous, log)
        # If the process is killed from here on, the asset is out of date even if everything that changed is changed back.
        if previous is not None:
            write_manifest(self.dataset, replace(previous, interrupted=True))
        unchanged = (
            previous is not None
            and previous.inputs == inputs
            and previous.code_version in self.code_versions
            and not _incomplete(previous)
        )
        try:
            made = self.asset.make(Task(self.dataset, self.encoder, inputs, previous, unchanged, log))
            self._read_inputs()  # a source that changed while it was read is of neither version
        except SynpipeError as error:
            if previous is not None:
                self._restore(previous)
            if isinstance(error, LostVectors):
                self._disown_vectors(error.fingerprint)
            raise
        manifest = Manifest(
            asset=self.name,
            data_version=made.data_version,
            code_version=self.code_version,
            inputs=inputs,
            facts=facts_as_json(made.facts),
            figures=made.figures,
            rows=made.rows,
            notes=made.notes,
            run_id=run_id,
            unpassed=[*checks],
            files=record_files(self.dataset.folder, self.asset.files(self.dataset, self.encoder)),
        )
        write_manifest(self.dataset, manifest)
        return manifest

    def pass_checks(self, checks: Collection[str]) -> None:
        """Record which of the checks that `run` was told of have passed. Any others leave the asset out of date."""
        manifest = read_manifest(self.dataset, self.name)
        left = [check for check in manifest.unpassed if check not in checks]
        write_manifest(self.dataset, replace(manifest, unpassed=left))

    def _set_damaged_files_aside(self, previous: Manifest, log: Log) -> None:
        """Move files aside that differ from what the last complete run wrote, so that the work makes them again."""
        if previous.interrupted:
            return  # the files may be those of the next version, which are whole too
        for path in find_damaged(self.dataset.folder, previous.files, read_all=True):
            log(f"{path} is damaged: moved to {set_aside(path).name}, and made again")

    def _restore(self, previous: Manifest) -> None:
        """Write the manifest as it was before a run that failed, without the records of files that this run has replaced."""
        folder = self.dataset.folder
        files = {
            name: record
            for name, record in previous.files.items()
            if not (folder / name).is_file() or has_same_status(folder / name, record)
        }
        write_manifest(self.dataset, replace(previous, files=files))

    def _disown_vectors(self, fingerprint: str) -> None:
        """Mark the embeddings of that encoder as out of date, because some of their vectors were found to be damaged."""
        for name in self.reads:
            manifest = find_manifest(self.dataset, name)
            if manifest is not None and manifest.facts.get("encoder_fingerprint") == fingerprint:
                unpassed = [*manifest.unpassed, VECTORS_ARE_WHOLE]
                write_manifest(self.dataset, replace(manifest, unpassed=unpassed))

    def _read_inputs(self) -> dict[str, str]:
        """The data version of each asset that this one reads."""
        versions = {}
        for node in nodes(self.dataset):
            if node.name not in self.reads:
                continue
            manifest = find_manifest(self.dataset, node.name)
            if self.asset.optional_reads and (manifest is None or _incomplete(manifest)):
                continue
            manifest = manifest or read_manifest(self.dataset, node.name)
            # Work on a source that has changed would be kept under the former version.
            reasons = (
                _own_reasons(node, manifest)
                if node.asset.source_version
                else _incomplete(manifest) or _damage(node, manifest)
            )
            if reasons:
                raise SynpipeError(
                    f"{self.name} cannot be made: {self.dataset.name}/{node.name} is out of date, {reasons[0]}. Materialise it "
                    f"and everything downstream: `synpipe materialize --dataset {self.dataset.name} --stale`."
                )
            versions[node.name] = manifest.data_version
        return versions


def nodes(dataset: Dataset) -> list[Node]:
    """The assets of a data set: those that all encoders share, a branch per encoder, and those that gather all branches.

    Base encoders come first, because compressed encoders are fitted on their vectors.
    """
    encoders = sorted(dataset.encoders, key=lambda name: compressed.ASSET.exists(dataset, name))
    first_branch = next(place for place, asset in enumerate(ASSETS) if asset.per_encoder)
    shared = [Node(dataset, asset, "") for asset in ASSETS if not asset.per_encoder and asset.exists(dataset, "")]
    trunk = [node for node in shared if ASSETS.index(node.asset) < first_branch]
    branches = [
        Node(dataset, asset, encoder)
        for encoder in encoders
        for asset in ASSETS
        if asset.per_encoder and asset.exists(dataset, encoder)
    ]
    return [*trunk, *branches, *(node for node in shared if node not in trunk)]


def edges(dataset: Dataset) -> dict[str, tuple[str, ...]]:
    """For each asset, by name, the assets that it depends on directly.

    An asset needs no edge from something it reads if another asset it reads has a data version that covers that: the embeddings
    depend on the tiles, so the classifier, which reads both, depends on the embeddings alone.
    """
    covered: dict[str, set[str]] = {}
    direct: dict[str, tuple[str, ...]] = {}
    for node in nodes(dataset):
        reads = node.reads
        direct[node.name] = tuple(
            name for name in reads if not any(name in covered[other] for other in reads if other != name)
        )
        carried = {*reads}.union(*(covered[name] for name in reads))
        covered[node.name] = carried if node.asset.version_covers_reads else set()
    return direct


def find_node(dataset: Dataset, name: str) -> Node:
    """The asset with this name: `rgb_tiles`, `embeddings_em_d4` or `em_d4/embeddings`; `em_d4+pca32` is `em_d4_pca32`.

    Raises `SynpipeError` if the data set has no such asset.
    """
    found = nodes(dataset)
    for node in found:
        if branch_name(name) in (node.name, "/".join(node.key[1:])):
            return node
    known = ", ".join(sorted(node.name for node in found))
    raise SynpipeError(f"{dataset.name} has no asset {name!r}. Its assets: {known}.")


@dataclass(frozen=True)
class State:
    """Whether an asset is up to date and, if not, why: a phrase per reason."""

    asset: str
    state: Literal["fresh", "stale", "missing"]
    reasons: tuple[str, ...] = ()


def states(dataset: Dataset) -> list[State]:
    """The state of every asset, in the order of `nodes`.

    An asset is stale when its spec or code changed, when an input has another version than the one it was made of, when its source
    changed, when a run of it was interrupted, when one of its checks has not passed, when a file of it is gone or damaged, when
    tiles that it names were found to be damaged, or when something upstream is stale or missing.
    """

    @cache  # two assets ask, and an object store out of reach makes each question slow
    def list_damaged_parts() -> list[BulkPath] | SynpipeError:
        try:
            return damaged_parts(dataset.cut_outs_folder)
        except SynpipeError as error:
            return error

    result: list[State] = []
    outdated: set[str] = set()
    versions: dict[str, str] = {}
    found = nodes(dataset)
    names = {node.name for node in found}
    for node in found:
        manifest = find_manifest(dataset, node.name)
        if manifest is None:
            result.append(State(node.name, "missing"))
            outdated.add(node.name)
            continue
        versions[node.name] = manifest.data_version
        own = _own_reasons(node, manifest) or _lost_tiles(node, list_damaged_parts)
        gone = [f"it was made with {name} too" for name in manifest.inputs if name not in names]
        reasons = [*own, *_input_reasons(node, manifest, versions, outdated), *gone]
        if reasons:
            outdated.add(node.name)
        result.append(State(node.name, "stale" if reasons else "fresh", tuple(reasons)))
    return result


def _own_reasons(node: Node, manifest: Manifest) -> list[str]:
    if manifest.code_version not in node.code_versions:
        what = f"encoder {node.encoder}" if node.encoder else "its spec or code"
        return [f"{what} changed ({manifest.code_version} → {node.code_version})"]
    if reasons := _incomplete(manifest):
        return reasons
    if node.path is not None and not node.path.exists():
        return [f"its file {node.path.name} is not there"]
    if reasons := _damage(node, manifest):
        return reasons
    if not node.dataset.lineage_path(node.name, manifest.data_version).exists():
        return [f"the record of its version {manifest.data_version[:12]} is not there"]
    if node.asset.source_version is None:
        return []
    try:
        version = node.asset.source_version(node.dataset, node.asset.parse(manifest))
    except SynpipeError as error:
        return [f"its source cannot be read: {error}"]
    if version is not None and version != manifest.data_version:
        return [f"its source changed ({manifest.data_version[:12]} → {version[:12]})"]
    return []


def _damage(node: Node, manifest: Manifest) -> list[str]:
    """Which of its files are gone or damaged. Files whose size and time are those of the manifest are not read."""
    folder = node.dataset.folder
    lost = [f"its file {path.name} is not there" for path in find_lost(folder, manifest.files)]
    return lost + [f"its file {path.name} is damaged" for path in find_damaged(folder, manifest.files)]


def _lost_tiles(node: Node, list_damaged_parts: Callable[[], list[BulkPath] | SynpipeError]) -> list[str]:
    if not node.asset.names_tiles or node.path is None:
        return []
    try:
        if isinstance(damaged := list_damaged_parts(), SynpipeError):
            raise damaged
        lost = find_lost_part(node.dataset, node.path, damaged)
    except SynpipeError as error:
        return [f"its tiles cannot be looked at: {error}"]
    return [f"its tiles {lost.name} were damaged"] if lost else []


def find_lost_part(dataset: Dataset, path: Path, damaged: Collection[BulkPath]) -> BulkPath | None:
    """The first of these damaged parts that a Parquet file with a column `file` names, or None."""
    if not damaged:
        return None
    named = {name for part in read_batches(path, ["file"]) for name in part["file"].unique().to_pylist()}
    return next((part for part in damaged if str(part).removeprefix(f"{dataset.bulk_folder}/") in named), None)


def _incomplete(manifest: Manifest) -> list[str]:
    if manifest.interrupted:
        return ["its last run was interrupted"]
    return [f"its check {' and '.join(manifest.unpassed)} has not passed"] if manifest.unpassed else []


def _input_reasons(node: Node, manifest: Manifest, versions: dict[str, str], outdated: Collection[str]) -> list[str]:
    reasons = []
    for name in node.reads:
        if name in outdated:
            reasons.append(f"{name} is out of date")
        elif manifest.inputs.get(name) != versions[name]:
            reasons.append(f"{name} changed ({(manifest.inputs.get(name) or 'none')[:12]} → {versions[name][:12]})")
    return reasons


def _as_json(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return value.model_dump(mode="json") if isinstance(value, Spec) else value
