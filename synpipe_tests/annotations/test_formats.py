"""The same synapses give the same table in every format, whatever the size of the parts in which they are read."""

import csv
import importlib
import json
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from synpipe import annotations
from synpipe.annotations import table_files
from synpipe.annotations.formats import AnnotationSpec
from synpipe.annotations.schema import SYNAPSE_SCHEMA
from synpipe.annotations.source import AnnotationSource
from synpipe.assets import synapses
from synpipe.assets.asset import Task
from synpipe.datasets import Dataset, DatasetSpec
from synpipe.errors import SynpipeError
from synpipe.store import sorting as annotation_sorting
from synpipe.store.files import read_table
from synpipe_tests.support.annotations import Annotations, bounds_from_origin, read_annotations

CLASSES = ("acetylcholine", "gaba", "glutamate", "dopamine", "octopamine", "serotonin")
BIG = 2**63 - 1
BOUNDS = bounds_from_origin([8000, 8000, 8000])


def read(folder: Path, format: str, path: str | None = None, bounds=BOUNDS, **options) -> Annotations:
    entry = {"format": format, **({"path": path} if path else {}), **options}
    spec = TypeAdapter(AnnotationSpec).validate_python(entry)
    return read_annotations([spec], folder, bounds, CLASSES)


def write(folder: Path, name: str, columns: dict) -> str:
    """Write a table in the format of the suffix. In CSV, lists become text, as in pandas."""
    path = folder / name
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(columns)
            rows.writerows(zip(*columns.values(), strict=True))
    elif path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    else:
        pyarrow.feather.write_feather(pa.table(columns), path)
    return name


# For each synapse: id, voxel (z, y, x) and neuron. The volume has 1,000 voxels of 8 nm along each axis; some synapses are
# outside it.
SYNAPSES = st.lists(
    st.tuples(
        st.integers(0, BIG) | st.integers(0, 5),
        st.tuples(*[st.integers(0, 1003)] * 3),
        st.integers(0, BIG) | st.just(7),
    ),
    min_size=1,
    max_size=12,
)


@dataclass(frozen=True)
class Synapses:
    """ids, neurons: (n,). voxels_zyx: whole numbers. positions_nm_zyx: the centres of these voxels of 8 nm."""

    ids: tuple[int, ...]
    voxels_zyx: tuple[tuple[int, int, int], ...]
    neurons: tuple[int, ...]

    @property
    def positions_nm_zyx(self) -> list[list[float]]:
        return ((np.array(self.voxels_zyx) + 0.5) * 8).tolist()


def write_plain_table(folder: Path, suffix: str, synapses: Synapses) -> dict:
    z, y, x = zip(*synapses.positions_nm_zyx, strict=True)
    columns = {"synapse_id": synapses.ids, "neuron_id": synapses.neurons, "x": x, "y": y, "z": z}
    return {"path": write(folder, f"table.{suffix}", columns)}


def write_flywire(folder: Path, suffix: str, synapses: Synapses) -> dict:
    z, y, x = zip(*synapses.positions_nm_zyx, strict=True)
    positions = {"pre_pt_position_x": x, "pre_pt_position_y": y, "pre_pt_position_z": z}
    return {"path": write(folder, f"flywire.{suffix}", _partners(synapses) | positions)}


def write_cave(folder: Path, suffix: str, synapses: Synapses) -> dict:
    positions = {
        "pre_pt_position": [list(voxel[::-1]) for voxel in synapses.voxels_zyx],
        "ctr_pt_position": [[0, 0, 0]] * len(synapses.ids),
    }
    return {
        "path": write(folder, f"cave.{suffix}", _partners(synapses) | positions),
        "voxel_size_nm_zyx": [8, 8, 8],
    }


def _partners(synapses: Synapses) -> dict:
    return {"id": synapses.ids, "pre_pt_root_id": synapses.neurons, "post_pt_root_id": [1] * len(synapses.ids)}


def write_neuprint(folder: Path, suffix: str, synapses: Synapses) -> dict:
    z, y, x = zip(*synapses.voxels_zyx, strict=True)
    columns = {"bodyid": synapses.neurons, "connector_id": synapses.ids, "x": x, "y": y, "z": z}
    return {"path": write(folder, f"neuprint.{suffix}", columns)}


def write_synful(folder: Path, suffix: str, synapses: Synapses) -> dict:
    entries = [
        {"id": id, "id_skel_pre": neuron, "location_pre": position, "location_post": [0, 0, 0]}
        for id, neuron, position in zip(synapses.ids, synapses.neurons, synapses.positions_nm_zyx, strict=True)
    ]
    (folder / "synful.json").write_text(json.dumps(entries))
    return {"path": "synful.json"}


def write_synister(folder: Path, suffix: str, synapses: Synapses) -> dict:
    pairs = [
        f'"{id}": ' + json.dumps({"x": x, "y": y, "z": z, "skeleton_id": neuron})
        for id, neuron, (z, y, x) in zip(synapses.ids, synapses.neurons, synapses.positions_nm_zyx, strict=True)
    ]
    (folder / "synapses.json").write_text(f"{{{', '.join(pairs)}}}")
    for name in ("skeletons", "hemi_lineages"):
        (folder / f"{name}.json").write_text("{}")
    return {name: f"{name}.json" for name in ("synapses", "skeletons", "hemi_lineages")}


def write_cremi(folder: Path, suffix: str, synapses: Synapses) -> dict:
    with h5py.File(folder / "cremi.h5", "w") as file:
        file["annotations/ids"] = np.array(synapses.ids, np.uint64)
        file.create_dataset(
            "annotations/types", data=["presynaptic_site"] * len(synapses.ids), dtype=h5py.string_dtype()
        )
        file["annotations/locations"] = synapses.positions_nm_zyx
    return {"path": "cremi.h5"}


# For each format, a function that writes synapses as files of this format (tables with the given suffix) and returns the
# other keys of their entry under `annotations:`.
WRITERS = {
    "table": write_plain_table,
    "flywire": write_flywire,
    "cave": write_cave,
    "neuprint": write_neuprint,
    "synful": write_synful,
    "synister_v3": write_synister,
    "cremi": write_cremi,
}
WITHOUT_NEURONS = {"cremi"}


def test_every_format_is_listed_and_tested():
    """A format's class must stand in `AnnotationSpec`, and its writer in `WRITERS`."""
    for module in pkgutil.iter_modules(annotations.__path__, f"{annotations.__name__}."):
        importlib.import_module(module.name)
    classes = [AnnotationSource]
    for cls in classes:
        classes += cls.__subclasses__()
    written = {
        cls for cls in classes if "format" in cls.model_fields and cls.__module__.startswith(annotations.__name__)
    }
    listed = set(get_args(get_args(AnnotationSpec)[0]))
    assert written == listed, "list the format in synpipe/annotations/formats.py"
    assert {get_args(cls.model_fields["format"].annotation)[0] for cls in listed} == set(WRITERS), "add a writer"


@settings(deadline=None, max_examples=25)
@given(synapses=SYNAPSES, suffix=st.sampled_from(["csv", "parquet", "feather"]))
def test_the_same_synapses_give_the_same_table_in_every_format(tmp_path_factory, synapses, suffix):
    folder = tmp_path_factory.mktemp("formats")
    written = Synapses(*zip(*synapses, strict=True))
    results = {
        format: read(folder, format, min_inside=0, source="s", **write_files(folder, suffix, written))
        for format, write_files in WRITERS.items()
    }
    expected = {}
    for id, position, neuron in zip(written.ids, written.positions_nm_zyx, written.neurons, strict=True):
        if max(position) < 8000:
            expected.setdefault(id, (id, *position, neuron))
    columns = ["synapse_id", "z_nm", "y_nm", "x_nm", "neuron_id"]
    for format, result in results.items():
        rows = list(zip(*result.synapses.select(columns).to_pydict().values(), strict=True))
        if format in WITHOUT_NEURONS:
            assert [row[:-1] for row in rows] == [expected[id][:-1] for id in sorted(expected)], format
            assert {row[-1] for row in rows} <= {None}
        else:
            assert rows == [expected[id] for id in sorted(expected)], format
        assert len(result.synapses) + len(result.rejects) == len(written.ids), format
        assert result.rejects["reason"].to_pylist() == results["table"].rejects["reason"].to_pylist(), format
        other_columns = result.synapses.drop_columns("neuron_id")
        assert other_columns == results["table"].synapses.drop_columns("neuron_id"), format


# FlyWire and CAVE.


def test_the_position_is_chosen_and_the_neuron_is_the_presynaptic_one(tmp_path):
    columns = {
        "id": [5],
        **{f"{side}_pt_position_{axis}": [100.0 * n + i] for n, side in enumerate(("pre", "post")) for i, axis in enumerate("xyz")},
        "pre_pt_root_id": [720575940628857210],
        "post_pt_root_id": [720575940628857211],
        "cleft_score": [120],
        "connection_score": [33.5],
        "neuropil": ["LH_R"],
        "gaba": [0.9],
        "ach": [0.1],
    }  # fmt: skip
    path = write(tmp_path, "synapses.feather", columns)
    (row,) = read(tmp_path, "flywire", path).synapses.to_pylist()
    assert row == {
        "synapse_id": 5,
        "x_nm": 0.0,
        "y_nm": 1.0,
        "z_nm": 2.0,
        "neuron_id": 720575940628857210,
        "hemilineage": None,
        "region": "LH_R",
        "neurotransmitter": None,  # the scores are predictions
        "confidence": 120.0,
        "source": "synapses",
        "source_id": "5",
    }
    (post,) = read(tmp_path, "flywire", path, position="post").synapses.to_pylist()
    assert (post["x_nm"], post["z_nm"], post["neuron_id"]) == (100.0, 102.0, row["neuron_id"])
    with pytest.raises(SynpipeError, match=r"no column `ctr_pt_position_x` or `ctr_x` \(for `x`\)"):
        read(tmp_path, "flywire", path, position="ctr")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "feather"])
def test_without_ids_the_number_of_each_row_is_its_id(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(table_files, "BATCH_ROWS", 3)
    monkeypatch.setattr(table_files, "CSV_BLOCK_BYTES", 60)
    columns = {f"pre_pt_position_{axis}": [float(10 * row) for row in range(1, 11)] for axis in "xyz"}
    columns["pre_pt_position_y"][4] = None if suffix in ("parquet", "feather") else ""
    if suffix == "tsv":
        rows = ["\t".join(columns), *("\t".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
        rows.insert(3, "")  # a blank line is not a row
        (tmp_path / "a.tsv").write_text("\n".join(rows))
    else:
        write(tmp_path, f"a.{suffix}", columns)
    result = read(tmp_path, "flywire", f"a.{suffix}")
    assert result.synapses["synapse_id"].to_pylist() == [1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert result.synapses["x_nm"].to_pylist() == [10 * id for id in result.synapses["synapse_id"].to_pylist()]
    assert result.rejects.select(["synapse_id", "reason"]).to_pylist() == [
        {"synapse_id": 5, "reason": "missing_coordinate"}
    ]
    assert result.notes[0] == f"a.{suffix} has no column of ids, so the number of each row, from 1, is its id."
    assert sum("no column of ids" in note for note in result.notes) == 1


def test_cave_positions_are_in_voxels_of_4_4_40_nm_by_default(tmp_path):
    path = write(tmp_path, "a.parquet", {"id": [1], "pre_pt_position": [[10, 20, 30]]})
    place = ["x_nm", "y_nm", "z_nm"]
    assert read(tmp_path, "cave", path).synapses.select(place).to_pylist() == [{"x_nm": 42, "y_nm": 82, "z_nm": 1220}]
    assert read(tmp_path, "cave", path, unit="nm").synapses.select(place).to_pylist() == [
        {"x_nm": 10, "y_nm": 20, "z_nm": 30}
    ]
    declared = read(tmp_path, "cave", path, voxel_size_nm_zyx=[8, 8, 16])
    assert declared.synapses.select(place).to_pylist() == [{"x_nm": 168, "y_nm": 164, "z_nm": 244}]


@pytest.mark.parametrize(
    "positions",
    [
        pa.array([[1, 2, 3], None, [1, 2], [1, 2, 3, 4], [4, 5, None], [], [7, 8, 9]]),
        pa.array([[1, 2, 3], None, [1, 2], [1, 2, 3, 4], [4, 5, None], [], [7, 8, 9]], pa.large_list(pa.float32())),
        pa.array([[1, 2, 3], None, None, [1, 2, None], [4, None, 6], None, [7, 8, 9]], pa.list_(pa.int32(), 3)),
        pa.array([["1", "2", "3"], None, ["a", "2", "3"], ["1"], [""], [], ["7", "8", "9"]]),
        pa.array(["[1, 2, 3]", None, "[1, 2]", "[1, 2, 3, 4]", "[4, 5, None]", "", "7 8 9"]),
        pa.array(["[1 2 3]", "[ ]", "[1,, 2]", "(1, 2, 3", "[nan, 5, 6]", "[[1, 2, 3]]", "(7.0;8.0;9.0)"])[:7],
    ],
    ids=["list", "large", "fixed", "text in lists", "text", "odd text"],
)
def test_a_position_that_is_not_three_numbers_is_rejected(tmp_path, positions):
    path = write(tmp_path, "a.parquet", {"id": list(range(7)), "pre_pt_position": positions})
    result = read(tmp_path, "cave", path, unit="nm")
    kept = result.synapses.select(["synapse_id", "x_nm", "y_nm", "z_nm"]).to_pylist()
    assert kept[0] == {"synapse_id": 0, "x_nm": 1, "y_nm": 2, "z_nm": 3}
    assert kept[-1] == {"synapse_id": 6, "x_nm": 7, "y_nm": 8, "z_nm": 9}
    assert len(kept) + len(result.rejects) == 7
    assert set(result.rejects["reason"].to_pylist()) == {"missing_coordinate"}


def test_a_table_can_have_its_position_in_one_column_and_its_axes_in_another_order(tmp_path):
    path = write(tmp_path, "a.csv", {"synapse_id": [1], "point": [[1, 2, 3]], "x": [9], "y": [8], "z": [7]})
    (row,) = read(tmp_path, "table", path, columns={"position": "point"}).synapses.to_pylist()
    assert (row["x_nm"], row["y_nm"], row["z_nm"]) == (1, 2, 3)
    (row,) = read(tmp_path, "table", path, columns={"x": "z", "z": "x"}).synapses.to_pylist()
    assert (row["x_nm"], row["y_nm"], row["z_nm"]) == (7, 8, 9)
    (row,) = read(tmp_path, "table", path, unit="um", columns={"position": "point"}).synapses.to_pylist()
    assert (row["x_nm"], row["y_nm"], row["z_nm"]) == (1000, 2000, 3000)


# neuPrint.


def test_the_column_names_of_every_neuprint_export_are_known(tmp_path):
    place = {"x": [1], "y": [2], "z": [3]}
    exports = {
        "hemibrain": {"bodyid": [2**60 + 1], "connector_id": [BIG], **place},
        "manc": {"body": [2**60 + 1], **place, "conf": [0.5], "syn_id": [BIG]},
        "client": {"bodyId": [2**60 + 1], "type": ["pre"], "roi": ["LH(R)"], **place, "confidence": [0.5]},
    }
    rows = {
        name: read(tmp_path, "neuprint", write(tmp_path, f"{name}.csv", columns), label="gaba").synapses.to_pylist()[0]
        for name, columns in exports.items()
    }
    for row in rows.values():
        assert (row["x_nm"], row["y_nm"], row["z_nm"]) == (12, 20, 28)
        assert (row["neuron_id"], row["neurotransmitter"]) == (2**60 + 1, "gaba")
    assert [row["synapse_id"] for row in rows.values()] == [BIG, BIG, 1]
    assert [row["confidence"] for row in rows.values()] == [None, 0.5, 0.5]
    assert rows["client"]["region"] == "LH(R)"


# synful.


def test_synful_reads_zyx_and_rejects_entries_that_are_not_synapses(tmp_path):
    good = {
        "id": 2**62 + 1,
        "id_skel_pre": None,
        "location_pre": [40, 2, 1],
        "location_post": [80, 5, 4],
        "score": 727.5,
    }
    entries = [good, 5, {**good, "id": None}, {**good, "id": 3, "location_pre": [1, 2]}, {**good, "id": "\ud800"}, good]
    (tmp_path / "a.json").write_text(json.dumps(entries))
    result = read(tmp_path, "synful", "a.json")
    assert result.synapses.to_pylist()[0].items() >= {
        "synapse_id": 2**62 + 1, "z_nm": 40, "y_nm": 2, "x_nm": 1, "neuron_id": None, "confidence": 727.5
    }.items()  # fmt: skip
    reasons = ["malformed_row", "malformed_row", "missing_id", "missing_coordinate", "duplicate_id"]
    assert result.rejects["reason"].to_pylist() == reasons
    assert read(tmp_path, "synful", "a.json", position="post").synapses["x_nm"].to_pylist() == [4, 4]
    for text, problem in (
        (json.dumps(entries)[:-9], "truncated or damaged"),
        ("{}", "one JSON list"),
        ("[]", "no synapse"),
    ):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(SynpipeError, match=rf"a\.json.*{problem}"):
            read(tmp_path, "synful", "a.json")


# Every table format.


@pytest.mark.parametrize("format", ["flywire", "cave", "neuprint"])
@pytest.mark.parametrize("suffix", ["parquet", "feather"])
def test_a_truncated_export_is_reported(tmp_path, format, suffix):
    numbers = list(range(3000))
    path = tmp_path / write(
        tmp_path,
        f"a.{suffix}",
        {"id": numbers, **dict.fromkeys("xyz", numbers), "pre_pt_position": [[1, 2, n % 100] for n in numbers]}
        | {f"pre_pt_position_{axis}": numbers for axis in "xyz"},
    )
    assert len(read(tmp_path, format, path.name, bounds=None).synapses) == 3000
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(SynpipeError, match=rf"a\.{suffix} is truncated or damaged"):
        read(tmp_path, format, path.name)


@pytest.mark.parametrize("format", ["flywire", "cave", "neuprint"])
def test_the_error_for_a_missing_column_lists_the_names_that_it_may_have(tmp_path, format):
    path = write(tmp_path, "a.csv", {"id": [1], "x_coordinate": [1]})
    with pytest.raises(SynpipeError, match=r"a\.csv has no column .*\(for `x`\).*Its columns are `id`, `x_coordinate`"):
        read(tmp_path, format, path)


def test_a_csv_with_too_many_malformed_lines_is_reported_as_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(table_files, "MAX_MALFORMED_LINES", 10)
    (tmp_path / "a.csv").write_text("synapse_id,x,y,z\n" + "1,1,1,1,1\n" * 10 + "2,1,1,1\n")
    assert len(read(tmp_path, "table", "a.csv").rejects) == 10
    (tmp_path / "a.csv").write_text("synapse_id,x,y,z\n" + "1,1,1,1,1\n" * 11 + "2,1,1,1\n")
    with pytest.raises(SynpipeError, match=r"a\.csv is truncated or damaged.*Expected 4 columns, got 5"):
        read(tmp_path, "table", "a.csv")


# Many rows.


@settings(deadline=None, max_examples=40)
@given(
    ids=st.lists(st.integers(0, 12) | st.integers(0, BIG), min_size=1, max_size=60),
    rows=st.integers(1, 9),
    ranges=st.integers(1, 5),
    batch=st.integers(1, 20),
)
def test_synapses_are_sorted_and_unique_whatever_the_sizes_of_the_parts(tmp_path_factory, ids, rows, ranges, batch):
    folder = tmp_path_factory.mktemp("rows")
    places = [float(row) for row in range(1, len(ids) + 1)]
    path = write(folder, "a.parquet", {"synapse_id": ids, **dict.fromkeys("xyz", places)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_files, "BATCH_ROWS", batch)
        patch.setattr(annotation_sorting, "RANGE_ROWS", rows)
        patch.setattr(annotation_sorting, "MAX_RANGES", ranges)
        result = read(folder, "table", path)
    first: dict[int, int] = {}
    repeated = []
    for row, id in enumerate(ids, start=1):
        if first.setdefault(id, row) != row:
            repeated.append(f"a.parquet, row {row} (id '{id}'): id {id} is taken by a.parquet, row {first[id]}.")
    assert result.synapses["synapse_id"].to_pylist() == sorted(first)
    assert result.synapses["x_nm"].to_pylist() == [first[id] for id in sorted(first)]
    assert result.rejects["detail"].to_pylist() == repeated


def test_the_pipeline_writes_the_same_tables_and_leaves_no_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr(table_files, "BATCH_ROWS", 100)
    monkeypatch.setattr(annotation_sorting, "RANGE_ROWS", 64)
    random = np.random.default_rng(0)
    columns = {
        "id": random.integers(0, 700, 1000),
        **{f"pre_pt_position_{axis}": random.choice([*np.arange(1, 400) * 4.0, np.nan], 1000) for axis in "xyz"},
        "nt": random.choice(["gaba", "ACh", "", "gabba"], 1000, p=[0.5, 0.3, 0.1, 0.1]),
        "pre_pt_root_id": random.integers(0, 20, 1000),
    }
    entry = {"format": "flywire", "path": write(tmp_path, "a.parquet", columns), "columns": {"neurotransmitter": "nt"}}
    with h5py.File(tmp_path / "volume.h5", "w") as file:
        file.create_dataset("volumes/raw", (50, 400, 400), np.uint8).attrs["resolution"] = (40, 4, 4)
    spec = {"title": "t", "volume": {"path": "volume.h5"}, "annotations": [entry], "encoders": ["none"]}
    dataset = Dataset("d", DatasetSpec.parse(spec, "t"), tmp_path / "store", tmp_path, {}, tmp_path)
    log_lines: list[str] = []
    made = synapses.make(Task(dataset, "", {"annotations": "a"}, None, False, log_lines.append))
    in_memory = read_annotations(
        dataset.spec.annotations, tmp_path, bounds_from_origin([2000, 1600, 1600], [40, 4, 4]), dataset.spec.classes
    )
    written = read_table(dataset.synapses_path)
    assert written.schema.remove_metadata() == SYNAPSE_SCHEMA
    assert written.replace_schema_metadata() == in_memory.synapses
    assert read_table(dataset.synapse_rejects_path) == in_memory.rejects
    assert {path.name for path in dataset.folder.iterdir()} == {"synapses.parquet", "synapse_rejects.parquet"}
    labels = written["neurotransmitter"].to_pylist()
    assert made.rows == len(written)
    assert made.figures == {
        "rejects": 1000 - len(written),
        "classes": {"gaba": labels.count("gaba"), "acetylcholine": labels.count("acetylcholine"), "unlabelled": labels.count(None)},
    }  # fmt: skip
    labelled = len(labels) - labels.count(None)
    assert f"{len(written):,} synapses, {labelled:,} of them labelled (20 neurons)" in made.notes
    assert f"gaba: {labels.count('gaba'):,} synapses of 20 neurons" in made.notes
    assert log_lines[1:] == made.notes
