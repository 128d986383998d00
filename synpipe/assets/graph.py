"""The graph of a data set: its steps, what depends on what, what each has made, and which are out of date.

In: a `Dataset`. Out: its `Step`s in the order in which the data flows; a `Manifest` per asset, written when the step has
finished; the `State` of each asset. Guarantee: the state follows from files alone (specs, sources, manifests), so that
command line, schedule and tests agree on it, with or without Dagster's history.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from synpipe.assets import classifier_steps, derived_steps, learning_steps, pipeline
from synpipe.assets.manifest import Manifest, find_manifest, read_manifest, write_manifest
from synpipe.assets.pipeline import Made
from synpipe.datasets import Dataset, record_bulk
from synpipe.embeddings.cache import LostVectors
from synpipe.errors import SynpipeError
from synpipe.progress import Log
from synpipe.specs import Spec, digest
from synpipe.store.objects import BulkPath
from synpipe.tiles.parts import damaged_parts
from synpipe.tiles.tile import CUT_OUT_VERSION

# The check that embeddings fail of which a later step has found a vector damaged; made again, they have passed it.
VECTORS_ARE_WHOLE = "vectors_are_whole"


@dataclass(frozen=True)
class Step:
    """One asset of a data set. kind: the asset's name without the encoder. described: all of the specs that decide what
    the step makes of its inputs. path: the file that other steps and tools read, where there is one. gathers: it takes those
    of its inputs that are there, and is out of date until all are."""

    dataset: Dataset
    kind: str
    encoder: str | None
    deps: tuple[str, ...]
    described: Any
    make: Callable[..., Made]
    path: Path | None = None
    gathers: bool = False

    @property
    def asset(self) -> str:
        return f"{self.kind}_{self.encoder}" if self.encoder else self.kind

    @property
    def code_version(self) -> str:
        """Changes whenever the step would make something else of the same inputs."""
        return f"{pipeline.CODE_VERSIONS[self.kind]}-{digest(_plain(self.described))[:12]}"

    def run(self, log: Log, run_id: str | None = None, checks: Collection[str] = ()) -> Manifest:
        """Do the work and write the manifest. checks: names of those that the caller makes next, see `passed`.

        Raises `SynpipeError` where an input has not been made, is not whole or has changed since, and for whatever stops
        the work; the manifest is then as it was.
        """
        record_bulk(self.dataset)
        before = find_manifest(self.dataset, self.asset)
        inputs = self._inputs()
        which = () if self.encoder is None else (self.encoder,)
        # Killed from here on, the asset is out of date even where everything that changed is changed back.
        if before is not None:
            write_manifest(self.dataset, replace(before, interrupted=True))
        try:
            made = self.make(self.dataset, *which, inputs, log)
            self._inputs()  # a source that is changed while it is read is of neither version
        except SynpipeError as error:
            if before is not None:
                write_manifest(self.dataset, before)
            if isinstance(error, LostVectors):
                self._disown(error.fingerprint)
            raise
        manifest = Manifest(
            self.asset, made.data_version, self.code_version, inputs, made.counts, made.notes, run_id, [*checks]
        )
        write_manifest(self.dataset, manifest)
        return manifest

    def _disown(self, fingerprint: str) -> None:
        """Let the embeddings of that encoder be out of date: vectors that they had were found to be damaged."""
        for asset in self.deps:
            made = find_manifest(self.dataset, asset)
            if made is not None and made.counts.get("encoder_fingerprint") == fingerprint:
                write_manifest(self.dataset, replace(made, unpassed=[*made.unpassed, VECTORS_ARE_WHOLE]))

    def _inputs(self) -> dict[str, str]:
        """Data version by input."""
        found = {}
        for step in steps(self.dataset):
            if step.asset not in self.deps:
                continue
            there = find_manifest(self.dataset, step.asset)
            if self.gathers and (there is None or _not_whole(there)):
                continue
            manifest = there or read_manifest(self.dataset, step.asset)
            # What is made of a source that has changed would stand, and its cut-outs be kept, under the former version.
            reasons = _own_reasons(step, manifest) if step.kind in SOURCES else _not_whole(manifest)
            if reasons:
                raise SynpipeError(
                    f"{self.asset} cannot be made: {self.dataset.name}/{step.asset} is out of date, {reasons[0]}. Materialise "
                    f"that and all downstream of it: `synpipe materialize --dataset {self.dataset.name} --stale`."
                )
            found[step.asset] = manifest.data_version
        return found

    def passed(self, checks: Collection[str]) -> None:
        """Note which of the checks that `run` was told of have passed: with others left the asset stays out of date."""
        manifest = read_manifest(self.dataset, self.asset)
        left = [check for check in manifest.unpassed if check not in checks]
        write_manifest(self.dataset, replace(manifest, unpassed=left))


# Assets whose version can change with nobody telling: the version of their files as they are now.
SOURCES = {"volume": pipeline.volume_version, "annotations": pipeline.annotations_version}


def steps(dataset: Dataset) -> list[Step]:
    """A trunk, a branch of assets per encoder, and the evaluation that gathers their figures, unless it is switched off.

    The branch of a compressed encoder grows out of that of its base. The identity of an encoder describes all of its branch:
    Dagster's staleness looks one hop up only.
    """
    spec = dataset.spec
    made_here = ("volume",) if spec.synthetic else ()
    cutting = [CUT_OUT_VERSION, spec.tiles.model_dump(mode="json", exclude={"stacking"})]
    trunk: list[tuple[str, tuple[str, ...], Any, Callable[..., Made], Path | None]] = [
        ("volume", (), [spec.volume, spec.synthetic], pipeline.make_volume, None),
        ("annotations", made_here, spec.annotations, pipeline.make_annotations, None),
        ("synapses", ("volume", "annotations"), spec.classes, pipeline.make_synapses, dataset.synapses_path),
        ("synapse_stacks", ("volume", "synapses"), cutting, pipeline.make_synapse_stacks, dataset.stacks_path),
        ("rgb_tiles", ("synapse_stacks",), spec.tiles.stacking, pipeline.make_rgb_tiles, dataset.tiles_path),
        # Their links depend on where the volume is and on what it says of its place.
        (
            "rejects",
            ("volume", "synapses", "synapse_stacks"),
            [spec.volume, spec.neuroglancer, spec.max_reject_share],
            pipeline.make_rejects,
            dataset.rejects_path,
        ),
        ("split", ("synapses", "rgb_tiles"), spec.split, learning_steps.make_split, dataset.split_path),
    ]
    found = [Step(dataset, kind, None, deps, described, make, path) for kind, deps, described, make, path in trunk]
    # Bases first: what is compressed is made of theirs.
    for encoder, entry in sorted(dataset.encoders.items(), key=lambda item: item[1].base is not None):
        who = dataset.identity(encoder)
        embeddings, table = f"embeddings_{encoder}", f"embedding_table_{encoder}"
        of_table: tuple[str, ...] = ("synapses", "rgb_tiles", embeddings)
        if entry.base is not None:
            of_vectors = ("rgb_tiles", f"embeddings_{entry.base}")
            found.append(
                Step(dataset, "embeddings", encoder, of_vectors, who, derived_steps.make_compressed_embeddings)
            )
        else:
            found.append(Step(dataset, "embeddings", encoder, ("rgb_tiles",), who, pipeline.make_embeddings))
        if spec.classifier is not None:
            found.append(
                Step(
                    dataset,
                    "classifier",
                    encoder,
                    ("synapses", "rgb_tiles", "split", embeddings),
                    [who, spec.classifier, spec.split.by, spec.classes],
                    classifier_steps.make_classifier,
                    dataset.predictions_path(encoder),
                )
            )
            of_table = (*of_table, f"classifier_{encoder}")
        if spec.projection is not None:
            # Of the synapses it shows the classes; see `make_projection`.
            found.append(
                Step(
                    dataset,
                    "projection",
                    encoder,
                    ("synapses", "rgb_tiles", embeddings),
                    [who, spec.projection],
                    derived_steps.make_projection,
                    dataset.projection_path(encoder),
                )
            )
            of_table = (*of_table, f"projection_{encoder}")
        found += [
            Step(
                dataset,
                "embedding_table",
                encoder,
                of_table,
                [who, pipeline.TABLE_SCHEMA_VERSION],
                pipeline.make_embedding_table,
                dataset.table_path(encoder),
            ),
            Step(dataset, "index", encoder, (table,), who, pipeline.make_index),
        ]
        if spec.evaluation is not None:
            found.append(
                Step(
                    dataset,
                    "scores",
                    encoder,
                    ("volume", "rgb_tiles", "split", table, f"index_{encoder}"),
                    [who, spec.evaluation],
                    learning_steps.make_scores,
                    dataset.scores_path(encoder),
                )
            )
    if spec.evaluation is None:
        return found
    judged = tuple(f"scores_{encoder}" for encoder in dataset.encoders)
    make = learning_steps.make_evaluation
    everyone = [dataset.identity(encoder) for encoder in dataset.encoders]
    return [*found, Step(dataset, "evaluation", None, judged, everyone, make, dataset.evaluation_path, gathers=True)]


@dataclass(frozen=True)
class State:
    """Whether an asset is up to date, and if not, why: a sentence per reason."""

    asset: str
    state: Literal["fresh", "stale", "missing"]
    reasons: tuple[str, ...] = ()


def states(dataset: Dataset) -> list[State]:
    """The state of every asset, in the order of the steps.

    An asset is stale when its spec or code changed, when an input has another version than the one it was made of, when
    its source changed, when a run of it was interrupted, when a check of it has not passed, when its file is gone, when
    tiles that it names were found to be damaged, or when something upstream is stale or missing.
    """

    @cache  # both assets that name tiles ask, and an object store that is out of reach lets one wait
    def damaged() -> list[BulkPath] | SynpipeError:
        try:
            return damaged_parts(dataset.cut_outs_folder)
        except SynpipeError as error:
            return error

    found: list[State] = []
    outdated: set[str] = set()
    versions: dict[str, str] = {}
    for step in steps(dataset):
        manifest = find_manifest(dataset, step.asset)
        if manifest is None:
            found.append(State(step.asset, "missing"))
            outdated.add(step.asset)
            continue
        versions[step.asset] = manifest.data_version
        own = _own_reasons(step, manifest) or _lost_tiles(step, damaged)
        reasons = [*own, *_input_reasons(step, manifest, versions, outdated)]
        if reasons:
            outdated.add(step.asset)
        found.append(State(step.asset, "stale" if reasons else "fresh", tuple(reasons)))
    return found


def _own_reasons(step: Step, manifest: Manifest) -> list[str]:
    if manifest.code_version != step.code_version:
        what = f"encoder {step.encoder}" if step.encoder else "its spec or code"
        return [f"{what} changed ({manifest.code_version} → {step.code_version})"]
    if not_whole := _not_whole(manifest):
        return not_whole
    if step.path is not None and not step.path.exists():
        return [f"its file {step.path.name} is not there"]
    if step.kind in SOURCES:
        try:
            now = SOURCES[step.kind](step.dataset, manifest.counts)
        except SynpipeError as error:
            return [f"its source cannot be read: {error}"]
        if now not in (None, manifest.data_version):
            return [f"its source changed ({manifest.data_version[:12]} → {now[:12]})"]
    return []


def _lost_tiles(step: Step, damaged: Callable[[], list[BulkPath] | SynpipeError]) -> list[str]:
    if step.kind not in ("synapse_stacks", "rgb_tiles") or step.path is None:
        return []
    try:
        if isinstance(found := damaged(), SynpipeError):
            raise found
        lost = pipeline.lost_tiles(step.dataset, step.path, found)
    except SynpipeError as error:
        return [f"its tiles cannot be looked at: {error}"]
    return [f"its tiles {lost.name} were damaged"] if lost else []


def _not_whole(manifest: Manifest) -> list[str]:
    if manifest.interrupted:
        return ["its last run was interrupted"]
    return [f"its check {' and '.join(manifest.unpassed)} has not passed"] if manifest.unpassed else []


def _input_reasons(step: Step, manifest: Manifest, versions: dict[str, str], outdated: Collection[str]) -> list[str]:
    reasons = []
    for dep in step.deps:
        if dep in outdated:
            reasons.append(f"{dep} is out of date")
        elif manifest.inputs.get(dep) != versions[dep]:
            reasons.append(f"{dep} changed ({(manifest.inputs.get(dep) or 'none')[:12]} → {versions[dep][:12]})")
    return reasons + [f"it was made with {asset} too" for asset in manifest.inputs if asset not in step.deps]


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.model_dump(mode="json") if isinstance(value, Spec) else value
