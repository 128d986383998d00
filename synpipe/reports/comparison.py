"""Read the judged encoders of a data set and compare them.

Input: a `Dataset` whose assets `scores_<encoder>` and `evaluation` have been materialised. Outputs: a row per encoder, an
`EncoderComparison` of two encoders, and a picture of the queries that they answer most differently.
"""

from typing import Any

from PIL import Image

from synpipe.analysis.compare import EncoderComparison, JudgedEncoder, compare_encoders
from synpipe.analysis.evaluation import EvaluationSpec
from synpipe.analysis.metrics import Estimate
from synpipe.annotations.schema import UNLABELLED
from synpipe.assets import evaluation
from synpipe.assets.rgb_tiles import class_by_synapse, draw_tiles, open_tiles
from synpipe.datasets import Dataset
from synpipe.errors import SynpipeError
from synpipe.store.files import read_json, read_table

SHOWN_NEIGHBOURS = 4


def read_encoder_rows(dataset: Dataset) -> list[dict[str, Any]]:
    """Return a row per judged encoder, in the order of the data set, as `compare.encoder_table` takes them.

    Raises `SynpipeError` if no encoder was judged.
    """
    _evaluation_spec(dataset)
    return evaluation.read_rows(dataset)


def read_comparison(dataset: Dataset, a: str, b: str) -> EncoderComparison:
    """Compare two encoders of a data set. Raises `SynpipeError` if one was not judged, or if both are the same."""
    if a == b:
        raise SynpipeError(f"{a} cannot be compared with itself: name two of {', '.join(dataset.encoders)}.")
    seed = _evaluation_spec(dataset).seed
    return compare_encoders(_read_judged(dataset, a), _read_judged(dataset, b), seed)


def _read_judged(dataset: Dataset, encoder: str) -> JudgedEncoder:
    report = read_json(dataset.scores_path(encoder))
    figures = {name: Estimate(**figure) for name, figure in report["figures"].items()}
    return JudgedEncoder(encoder, figures, read_table(dataset.queries_path(encoder)))


def _evaluation_spec(dataset: Dataset) -> EvaluationSpec:
    if dataset.spec.evaluation is None:
        raise SynpipeError(
            f"{dataset.name}.yaml has `evaluation: null`, so no encoder is judged. Remove that line and materialise."
        )
    return dataset.spec.evaluation


def comparison_picture(dataset: Dataset, comparison: EncoderComparison, tile_px: int = 96) -> Image.Image | None:
    """Draw a row per query of `differ_most`: its tile, the neighbours that a finds, and those that b finds.

    Returns None if there is no query.
    """
    nearest = {
        query.synapse_id: [
            (comparison.a, query.nearest_a[:SHOWN_NEIGHBOURS]),
            (comparison.b, query.nearest_b[:SHOWN_NEIGHBOURS]),
        ]
        for query in comparison.differ_most
    }
    labels = class_by_synapse(dataset, [one for answers in nearest.values() for _, ids in answers for one in ids])
    rows = {
        f"{query.label or UNLABELLED}\n{query.synapse_id}": [
            (query.synapse_id, "query"),
            *((one, f"{name[:8]}: {labels[one]}") for name, ids in nearest[query.synapse_id] for one in ids),
        ]
        for query in comparison.differ_most
    }
    shown = [synapse_id for row in rows.values() for synapse_id, _ in row]
    return draw_tiles(open_tiles(dataset, shown), rows, tile_px) if rows else None
