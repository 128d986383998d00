"""The asset graph: a trunk per data set, and a branch of three assets per encoder.

An asset calls one step of `synpipe.pipeline`, shows what it made, and checks it. The code version of a branch holds the
identity of its encoder in every asset: Dagster's staleness looks one hop up only.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dagster as dg

from synpipe import checks, pipeline
from synpipe.datasets import Dataset
from synpipe.defs import show
from synpipe.encoders import identity
from synpipe.errors import SynpipeError
from synpipe.specs import digest

Make = Callable[[Dataset, pipeline.Log], pipeline.Manifest]
Show = Callable[[Dataset, pipeline.Manifest], dict[str, Any]]
Check = Callable[[Dataset], checks.Finding]

# Two embeddings at once on one GPU gain nothing and may not fit.
GPU_POOL = "gpu"


def dataset_assets(dataset: Dataset) -> list[dg.AssetsDefinition]:
    """All assets of a data set, in the order in which the data flows."""
    spec = dataset.spec

    def trunk(
        name: str, make: Make, deps: Sequence[str], shows: Show, described: Any, **options: Any
    ) -> dg.AssetsDefinition:
        version = _code_version(name, described)
        return _asset(dataset, name, make, deps, shows, version, group=dataset.name, **options)

    volume = [spec.volume, spec.synthetic]
    assets = [
        trunk("volume", pipeline.make_volume, [], show.volume, volume),
        trunk(
            "annotations", pipeline.make_annotations, ["volume"] if spec.synthetic else [], show.files, spec.annotations
        ),
        trunk("synapses", pipeline.make_synapses, ["volume", "annotations"], show.synapses, spec.classes),
        trunk(
            "synapse_stacks",
            pipeline.make_synapse_stacks,
            ["volume", "synapses"],
            show.stacks,
            spec.tiles.model_dump(mode="json", exclude={"stacking"}),
            blocking={"match_synapses": checks.stacks_match_synapses},
        ),
        trunk(
            "rgb_tiles",
            pipeline.make_rgb_tiles,
            ["synapse_stacks"],
            show.tiles,
            spec.tiles.stacking,
            blocking={"are_there": checks.tiles_are_there},
        ),
        trunk("rejects", pipeline.make_rejects, ["synapses", "synapse_stacks"], show.rejects, None),
    ]
    return [*assets, *(asset for encoder in dataset.encoders for asset in _branch(dataset, encoder))]


def _branch(dataset: Dataset, encoder: str) -> list[dg.AssetsDefinition]:
    who = identity(dataset.encoders[encoder], dataset.weights_base)

    def branch(
        step: str, make: Callable, deps: Sequence[str], shows: Show, checked: Mapping[str, Callable], **options: Any
    ):
        bound = {name: lambda dataset, check=check: check(dataset, encoder) for name, check in checked.items()}
        return _asset(
            dataset,
            f"{step}_{encoder}",
            lambda dataset, log: make(dataset, encoder, log),
            deps,
            shows,
            _code_version(step, who),
            group=f"{dataset.name}_{encoder}",
            blocking=bound,
            doc=make.__doc__,
            **options,
        )

    return [
        branch(
            "embeddings",
            pipeline.make_embeddings,
            ["rgb_tiles"],
            show.embeddings,
            {"vectors_vary": checks.vectors_vary},
            pool=GPU_POOL,
        ),
        branch(
            "embedding_table",
            pipeline.make_embedding_table,
            ["synapses", "rgb_tiles", f"embeddings_{encoder}"],
            show.embedding_table,
            {"match_tiles": checks.table_matches_tiles},
        ),
        branch(
            "index",
            pipeline.make_index,
            [f"embedding_table_{encoder}"],
            show.index,
            {"recall": checks.index_finds_neighbours},
        ),
    ]


def _asset(
    dataset: Dataset,
    name: str,
    make: Make,
    deps: Sequence[str],
    shows: Show,
    code_version: str,
    *,
    group: str,
    blocking: Mapping[str, Check] | None = None,
    pool: str | None = None,
    doc: str | None = None,
) -> dg.AssetsDefinition:
    key = dg.AssetKey([dataset.name, name])
    blocking = blocking or {}

    @dg.asset(
        key=key,
        deps=[dg.AssetKey([dataset.name, dep]) for dep in deps],
        group_name=group,
        code_version=code_version,
        description=doc or make.__doc__,
        pool=pool,
        kinds=show.KINDS.get(name.split("_")[0], set()),
        check_specs=[
            dg.AssetCheckSpec(check, asset=key, blocking=True, description=found.__doc__)
            for check, found in blocking.items()
        ],
    )
    def made(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        try:
            manifest = make(dataset, context.log.info)
            findings = {check: find(dataset) for check, find in blocking.items()}
        except SynpipeError as error:
            # The message is for the user; the traceback would bury it.
            raise dg.Failure(description=str(error), allow_retries=False) from None
        return dg.MaterializeResult(
            data_version=dg.DataVersion(manifest.data_version),
            metadata=shows(dataset, manifest),
            check_results=[
                dg.AssetCheckResult(
                    check_name=check, passed=finding.passed, description=finding.description, metadata=finding.figures
                )
                for check, finding in findings.items()
            ],
        )

    return made


def _code_version(step: str, described: Any) -> str:
    """Changes whenever the step would make something else of the same inputs."""
    return f"{pipeline.CODE_VERSIONS[step]}-{digest(_plain(described))[:12]}"


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value
