"""The asset graph in Dagster: every `Node` becomes a Dagster asset that does its work, checks it, and shows it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import dagster as dg

from synpipe.assets.asset import Finding
from synpipe.assets.graph import ASSETS, Node, edges, nodes
from synpipe.assets.manifest import Manifest, find_manifest
from synpipe.datasets import Dataset
from synpipe.defs.executor import GATHERS
from synpipe.defs.loading import explain_absence
from synpipe.defs.locks import register_run
from synpipe.defs.recorded import SHOWS, is_unchanged, recorded_view, versions_shown
from synpipe.defs.show import as_metadata
from synpipe.errors import SynpipeError
from synpipe.store.locks import one_step_at_a_time


def dataset_assets(dataset: Dataset) -> list[dg.AssetsDefinition]:
    """All assets of a data set, in the order of the data flow."""
    found = nodes(dataset)
    key_by_name = {node.name: asset_key(node) for node in found}
    direct = edges(dataset)
    return [build_asset(node, [key_by_name[name] for name in direct[node.name]]) for node in found]


def asset_key(node: Node) -> dg.AssetKey:
    return dg.AssetKey(list(node.key))


def build_asset(node: Node, deps: list[dg.AssetKey]) -> dg.AssetsDefinition:
    """The Dagster asset that makes a node. deps: keys of the assets that it depends on directly."""
    key = asset_key(node)
    checks = node.asset.checks

    @dg.asset(
        key=key,
        deps=deps,
        group_name=_group(node),
        code_version=node.code_version,
        description=_describe(node),
        kinds=set(node.asset.storage),
        op_tags={GATHERS: "true"} if node.asset.optional_reads else None,
        check_specs=[
            dg.AssetCheckSpec(name, asset=key, blocking=True, description=check.__doc__)
            for name, check in checks.items()
        ],
    )
    def materialize(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        store = node.dataset.folder.parent
        try:
            register_run(context.instance, store, context.run.run_id)
            with one_step_at_a_time(store, context.log.info):
                previous = find_manifest(node.dataset, node.name)
                manifest = node.run(context.log.info, context.run.run_id, checks)
                findings = {name: check(node.dataset, node.encoder) for name, check in checks.items()}
                for name, finding in findings.items():
                    if not finding.passed and not finding.stops:
                        context.log.warning(f"{name}: {finding.description}")
                node.pass_checks([name for name, finding in findings.items() if not finding.stops])
                metadata = _show(context, node, previous, manifest)
        except SynpipeError as error:
            # The message is for the user; a traceback would bury it.
            raise dg.Failure(description=str(error), allow_retries=False) from None
        return dg.MaterializeResult(
            data_version=dg.DataVersion(manifest.data_version),
            metadata=metadata,
            tags={SHOWS: versions_shown(node)},
            check_results=[_check_result(name, finding) for name, finding in findings.items()],
        )

    return materialize


def _show(
    context: dg.AssetExecutionContext, node: Node, previous: Manifest | None, manifest: Manifest
) -> Mapping[str, Any]:
    """What to show of the asset; what the history shows already, if it has not changed."""
    if previous is not None and is_unchanged(previous, manifest):
        context.log.info("nothing has changed")
        recorded = recorded_view(context.instance, node, previous)
        if recorded is not None:
            return recorded
    view = node.asset.show(node.dataset, node.encoder, manifest)
    return as_metadata(view, manifest.rows, node.asset.columns)


def _group(node: Node) -> str:
    """A group per encoder, one for what all encoders share, and one for what gathers them, which lies downstream of both."""
    last = node.encoder or (node.asset.name if node.asset.optional_reads else "")
    return f"{node.dataset.name}_{last}" if last else node.dataset.name


def _describe(node: Node) -> str:
    """What the asset is and, for an encoder's asset, what the registry says of the encoder. Absent files come first."""
    encoder = node.dataset.encoders[node.encoder].description if node.encoder else ""
    return " ".join(filter(None, [explain_absence(node.dataset), node.asset.description, encoder]))


@dataclass(frozen=True)
class FailingAsset:
    """An asset that cannot be made, and why. checks: names of its checks."""

    key: dg.AssetKey
    problem: str
    deps: tuple[dg.AssetKey, ...] = ()
    checks: tuple[str, ...] = ()


def first_asset_key(name: str) -> dg.AssetKey:
    """The key of the first asset of a data set that cannot be read. Its name may contain characters that Dagster refuses."""
    return dg.AssetKey([re.sub(r"\W", "_", name, flags=re.ASCII), ASSETS[0].name])


def build_failing_asset(failing: FailingAsset) -> dg.AssetsDefinition:
    """The Dagster asset that says what is wrong, and fails with it."""
    checks = [dg.AssetCheckSpec(name, asset=failing.key, blocking=True) for name in failing.checks]

    @dg.asset(
        key=failing.key,
        deps=failing.deps,
        group_name=failing.key.path[0],
        description=failing.problem,
        check_specs=checks,
    )
    def fail() -> dg.MaterializeResult:
        raise dg.Failure(description=failing.problem, allow_retries=False)

    return fail


def _check_result(name: str, finding: Finding) -> dg.AssetCheckResult:
    severity = dg.AssetCheckSeverity.WARN if finding.severity == "warning" else dg.AssetCheckSeverity.ERROR
    return dg.AssetCheckResult(
        check_name=name,
        passed=finding.passed,
        severity=severity,
        description=finding.description,
        metadata=finding.figures,
    )
