"""The asset graph in Dagster: each step of `synpipe.assets.graph` is an asset that runs it, shows what it made, and checks it."""

from collections.abc import Callable

import dagster as dg

from synpipe.assets import checks
from synpipe.assets.graph import Step, steps
from synpipe.datasets import Dataset
from synpipe.defs.locks import one_step_at_a_time, register_run
from synpipe.defs.show import KINDS, SHOW, describe
from synpipe.errors import SynpipeError

Check = Callable[..., checks.Finding]

# Checks by kind of step. What lies downstream does not run on tiles or vectors that are wrong; a finding that is a warning
# stops nothing. Nothing lies downstream of the rejects: there a failed check only makes the run fail, so that nobody
# overlooks what was lost.
CHECKS: dict[str, dict[str, Check]] = {
    "synapse_stacks": {"match_synapses": checks.stacks_match_synapses},
    "rgb_tiles": {"are_there": checks.tiles_are_there},
    "rejects": {"are_few": checks.rejects_are_few},
    "split": {"sides_are_apart": checks.sides_are_apart},
    "embeddings": {"vectors_vary": checks.vectors_vary},
    "classifier": {"predictions_are_whole": checks.predictions_are_whole},
    "embedding_table": {"match_tiles": checks.table_matches_tiles, "drift": checks.vectors_have_not_drifted},
    "index": {"recall": checks.index_finds_neighbours},
}


def dataset_assets(dataset: Dataset) -> list[dg.AssetsDefinition]:
    """All assets of a data set, in the order in which the data flows."""
    return [step_asset(step) for step in steps(dataset)]


def asset_key(dataset: Dataset, asset: str) -> dg.AssetKey:
    return dg.AssetKey([dataset.name, asset])


def step_asset(step: Step) -> dg.AssetsDefinition:
    key = asset_key(step.dataset, step.asset)
    found = CHECKS.get(step.kind, {})
    which = () if step.encoder is None else (step.encoder,)

    @dg.asset(
        key=key,
        deps=[asset_key(step.dataset, dep) for dep in step.deps],
        group_name=f"{step.dataset.name}_{step.encoder}" if step.encoder else step.dataset.name,
        code_version=step.code_version,
        description=describe(step),
        kinds=KINDS[step.kind],
        check_specs=[
            dg.AssetCheckSpec(name, asset=key, blocking=True, description=check.__doc__)
            for name, check in found.items()
        ],
    )
    def made(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        store = step.dataset.folder.parent
        try:
            register_run(context.instance, store, context.run.run_id)
            with one_step_at_a_time(store, context.log.info):
                manifest = step.run(context.log.info, context.run.run_id, found)
                findings = {name: check(step.dataset, *which) for name, check in found.items()}
                for name, finding in findings.items():
                    if not finding.passed and finding.severity == "warning":
                        context.log.warning(f"{name}: {finding.description}")
                step.passed([name for name, one in findings.items() if one.passed or one.severity == "warning"])
                metadata = SHOW[step.kind](step.dataset, manifest)
        except SynpipeError as error:
            # The message is for the user; the traceback would bury it.
            raise dg.Failure(description=str(error), allow_retries=False) from None
        return dg.MaterializeResult(
            data_version=dg.DataVersion(manifest.data_version),
            metadata=metadata,
            check_results=[
                dg.AssetCheckResult(
                    check_name=name,
                    passed=finding.passed,
                    severity=dg.AssetCheckSeverity.WARN
                    if finding.severity == "warning"
                    else dg.AssetCheckSeverity.ERROR,
                    description=finding.description,
                    metadata=finding.figures,
                )
                for name, finding in findings.items()
            ],
        )

    return made
