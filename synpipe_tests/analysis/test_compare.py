"""`synpipe compare`: all encoders of a data set, or two of them on the same queries."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from synpipe.analysis.charts import draw_figures
from synpipe.analysis.compare import SHOWN_QUERIES, encoder_table, format_figure
from synpipe.analysis.evaluation import FIGURES
from synpipe.analysis.metrics import Estimate
from synpipe.assets.graph import nodes, states
from synpipe.datasets import Dataset, Project
from synpipe.errors import SynpipeError
from synpipe.reports.comparison import read_comparison, read_encoder_rows
from synpipe.reports.housekeeping import find_leftovers, remove_leftovers
from synpipe.store.files import read_table, write_table
from synpipe.text import format_table
from synpipe_tests.conftest import QUICK_EVALUATION, project_of
from synpipe_tests.support.changes import NAME, TRUNK, Own, branch
from synpipe_tests.support.command import answer, files, invoke, refusal


def own_copy(made: Dataset, folder: Path) -> Dataset:
    shutil.copytree(made.folder, folder / made.name)
    return Project(made.weights_base, folder).dataset(made.name)


def test_all_encoders_side_by_side(made: Dataset):
    text = answer(project_of(made), "compare", "--dataset", "demo")
    for figure in (
        "instance recall@1",
        "instance recall@5",
        "kNN balanced accuracy",
        "split by random",
        "recall@10 against exact search",
        "bytes",
    ):
        assert figure in text
    rows = json.loads(answer(project_of(made), "compare", "--dataset", "demo", "--json"))
    assert [row["encoder"] for row in rows] == list(made.encoders)
    for row in rows:
        assert re.search(rf"^{row['encoder']} +{row['dimensions']} ", text, re.MULTILINE)
        figure = Estimate(*(row[f"knn_balanced_accuracy{end}"] for end in ("", "_low", "_high")))
        assert format_figure(figure) in text


def test_two_encoders_on_the_same_queries(made: Dataset):
    text = answer(project_of(made), "compare", "tiny", "other", "--dataset", "demo")
    found = json.loads(answer(project_of(made), "compare", "tiny", "other", "--dataset", "demo", "--json"))
    rows = {row["encoder"]: row for row in read_table(made.evaluation_path).to_pylist()}
    for name, pair in found["figures"].items():
        assert pair["a"]["value"] == rows["tiny"][name]
        assert pair["difference"]["value"] == pytest.approx(rows["other"][name] - rows["tiny"][name])
        assert pair["difference"]["low"] <= pair["difference"]["value"] <= pair["difference"]["high"]
        assert FIGURES[name].title in text
    assert 0 <= found["jaccard"] <= found["overlap"] <= 1
    labels = dict(
        zip(
            *(read_table(made.synapses_path)[key].to_pylist() for key in ("synapse_id", "neurotransmitter")),
            strict=True,
        )
    )
    gaps = []
    for query in found["differ_most"]:
        assert labels[int(query["synapse_id"])] == query["label"]
        assert all(isinstance(each, str) and int(each) in labels for each in query["nearest_a"] + query["nearest_b"])
        gaps.append(abs(query["average_precision_a"] - query["average_precision_b"]))
    assert len(gaps) == SHOWN_QUERIES
    assert gaps == sorted(gaps, reverse=True)
    with Image.open(found["picture"]) as picture:
        assert picture.width > picture.height > 128 * len(gaps)


def test_an_encoder_that_is_better_by_a_little_everywhere_is_seen_to_be(made: Dataset, tmp_path: Path):
    """The paired difference is significant although the two intervals overlap."""
    dataset = own_copy(made, tmp_path)
    table = read_table(dataset.queries_path("tiny"))
    better = np.minimum(table["average_precision"].to_numpy() + 0.01, 1)
    place = table.column_names.index("average_precision")
    write_table(
        dataset.queries_path("other"), table.set_column(place, "average_precision", pa.array(better, from_pandas=True))
    )
    pair = read_comparison(dataset, "tiny", "other").figures["map"]
    assert pair.difference.low > 0.005
    assert pair.difference.high < 0.011
    assert pair.a.high - pair.a.low > 4 * (pair.difference.high - pair.difference.low)
    same = read_comparison(dataset, "tiny", "other")
    assert same.overlap == same.jaccard == 1


def test_what_cannot_be_compared(made: Dataset, project: Project):
    with pytest.raises(SynpipeError, match="with itself"):
        read_comparison(made, "tiny", "tiny")
    assert "Name two encoders" in refusal(invoke(project_of(made), "compare", "tiny", "--dataset", "demo"))
    assert "'nope'" in refusal(invoke(project_of(made), "compare", "tiny", "nope", "--dataset", "demo"))
    assert "materialise" in refusal(invoke(project, "compare", "--dataset", "demo"))


def test_one_encoder_alone_can_be_judged_and_the_evaluation_waits_for_the_other(made: Dataset, tmp_path: Path):
    dataset = own_copy(made, tmp_path)
    dataset.manifest_path("scores_other").unlink()
    last = nodes(dataset)[-1]
    assert last.name == "evaluation"
    last.run(lambda line: None)
    assert [row["encoder"] for row in read_encoder_rows(dataset)] == ["tiny"]
    (state,) = (each for each in states(dataset) if each.asset == "evaluation")
    assert (state.state, state.reasons) == ("stale", ("scores_other is out of date",))


def test_switched_off_nothing_is_judged_and_the_figures_may_go(own: Own):
    own.edit_dataset(lambda content: content.update(evaluation=None))
    scores = {f"scores_{encoder}" for encoder in own.dataset.encoders}
    assert {node.name for node in nodes(own.dataset)} == TRUNK | branch("tiny", "other") - scores - {"evaluation"}
    assert own.outdated() == {}
    for names in ((), ("tiny", "other")):
        assert "`evaluation: null`" in refusal(invoke(own.project, "compare", *names, "--dataset", NAME))

    before = files(own.dataset.folder)
    remove_leftovers(find_leftovers(own.dataset))
    gone = before.keys() - files(own.dataset.folder).keys()
    figures = {f"evaluation/{encoder}.{kind}" for encoder in own.dataset.encoders for kind in ("json", "parquet")}
    judged = scores | {"evaluation"}
    lineage = {path for path in gone if path.split("/")[0] == "lineage"}
    assert {path.split("/")[1] for path in lineage} == judged
    assert gone - lineage == figures | {"evaluation.parquet", *(f"manifests/{asset}.json" for asset in judged)}
    assert own.outdated() == {} and find_leftovers(own.dataset) == []

    own.edit_dataset(lambda content: content.update(evaluation=QUICK_EVALUATION))
    assert own.outdated() == dict.fromkeys(scores | {"evaluation"}, "missing")


def test_figures_are_written_as_in_papers():
    assert format_figure(Estimate(0.64, 0.61, 0.6714)) == ".640 [.610, .671]"
    assert format_figure(Estimate(-0.05, -0.1, 1.0), "+") == "-.050 [-.100, +1.000]"
    assert format_figure(Estimate(0.5)) == ".500"
    assert format_figure(Estimate(None)) == "–"


def test_the_chart_and_the_table_of_the_report(made: Dataset):
    rows = read_encoder_rows(made)
    picture = draw_figures(rows)
    assert picture.width > 400
    assert np.asarray(picture).std() > 5
    table = format_table(*encoder_table(rows), markdown=True)
    assert len(table.splitlines()) == 2 + len(rows)
    assert "linear probe, split by neuron" in table or all(row["probe_neuron"] is None for row in rows)
