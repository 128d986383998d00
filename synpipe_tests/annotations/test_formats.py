"""The exports that users have lead to the same table, whatever the format, in parts of any size."""

import csv
import json
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from synpipe.annotations import files as annotation_files
from synpipe.annotations.convert import SYNAPSE_SCHEMA, Annotations, AnnotationSpec, read_annotations
from synpipe.assets.pipeline import make_synapses
from synpipe.datasets import Dataset, DatasetSpec
from synpipe.errors import SynpipeError
from synpipe.store import sorting as annotation_sorting
from synpipe.store.files import read_table

CLASSES = ("acetylcholine", "gaba", "glutamate", "dopamine", "octopamine", "serotonin")
BIG = 2**63 - 1
BOUNDS = (np.zeros(3), np.full(3, 8000.0))


def read(folder: Path, format: str, path: str, bounds=BOUNDS, **options) -> Annotations:
    spec = TypeAdapter(AnnotationSpec).validate_python({"format": format, "path": path, **options})
    return read_annotations([spec], folder, bounds_nm_zyx=bounds, classes=CLASSES)


def write(folder: Path, name: str, columns: dict) -> str:
    """A table of any format; lists in CSV are text, as pandas writes them."""
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


# One synapse: id, voxel z y x in a volume of 1,000 voxels of 8 nm a side, some beyond its end, and neuron.
SYNAPSES = st.lists(
    st.tuples(
        st.integers(0, BIG) | st.integers(0, 5),
        st.tuples(*[st.integers(0, 1003)] * 3),
        st.integers(0, BIG) | st.just(7),
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=25)
@given(synapses=SYNAPSES, suffix=st.sampled_from(["csv", "parquet", "feather"]))
def test_the_same_synapses_through_every_format_give_the_same_table(tmp_path_factory, synapses, suffix):
    folder = tmp_path_factory.mktemp("formats")
    ids, voxels, neurons = zip(*synapses, strict=True)
    zyx = (np.array(voxels) + 0.5) * 8
    z, y, x = zyx.T.tolist()
    nm = {"x": x, "y": y, "z": z}
    voxel = {axis: [point["zyx".index(axis)] for point in voxels] for axis in "xyz"}
    listed = [list(point[::-1]) for point in voxels]
    partners = {"id": ids, "pre_pt_root_id": neurons, "post_pt_root_id": [1] * len(ids)}
    exports = {
        "table": {"synapse_id": ids, "neuron_id": neurons, **nm},
        "flywire": {**partners, **{f"pre_pt_position_{axis}": nm[axis] for axis in "xyz"}},
        "cave": {**partners, "pre_pt_position": listed, "ctr_pt_position": [[0, 0, 0]] * len(ids)},
        "neuprint": {"bodyid": neurons, "connector_id": ids, **voxel},
    }
    found = {
        format: read(
            folder,
            format,
            write(folder, f"{format}.{suffix}", columns),
            min_inside=0,
            source="s",
            **({"voxel_size_nm_zyx": [8, 8, 8]} if format == "cave" else {}),
        )
        for format, columns in exports.items()
    }
    entries = [
        {"id": id, "id_skel_pre": neuron, "location_pre": list(point), "location_post": [0, 0, 0]}
        for id, neuron, point in zip(ids, neurons, zyx.tolist(), strict=True)
    ]
    (folder / "synful.json").write_text(json.dumps(entries))
    found["synful"] = read(folder, "synful", "synful.json", min_inside=0, source="s")
    for name in ("skeletons", "hemi_lineages"):
        (folder / f"{name}.json").write_text("{}")
    pairs = [
        f'"{id}": ' + json.dumps({"x": x, "y": y, "z": z, "skeleton_id": neuron})
        for id, neuron, (z, y, x) in zip(ids, neurons, zyx.tolist(), strict=True)
    ]
    (folder / "synapses.json").write_text(f"{{{', '.join(pairs)}}}")
    spec = {"format": "synister_v3", "min_inside": 0, "source": "s"}
    spec |= {name: f"{name}.json" for name in ("synapses", "skeletons", "hemi_lineages")}
    found["synister_v3"] = read_annotations(
        [TypeAdapter(AnnotationSpec).validate_python(spec)], folder, bounds_nm_zyx=BOUNDS, classes=CLASSES
    )
    with h5py.File(folder / "cremi.h5", "w") as file:
        file["annotations/ids"] = np.array(ids, np.uint64)
        file.create_dataset("annotations/types", data=["presynaptic_site"] * len(ids), dtype=h5py.string_dtype())
        file["annotations/locations"] = zyx
    cremi = read(folder, "cremi", "cremi.h5", min_inside=0, source="s")

    expected = {}
    for id, point, neuron in zip(ids, zyx.tolist(), neurons, strict=True):
        if max(point) < 8000:
            expected.setdefault(id, (id, *point, neuron))
    columns = ["synapse_id", "z_nm", "y_nm", "x_nm", "neuron_id"]
    for format, result in found.items():
        assert list(zip(*result.synapses.select(columns).to_pydict().values(), strict=True)) == [
            expected[id] for id in sorted(expected)
        ], format
        assert len(result.synapses) + len(result.rejects) == len(ids), format
        assert result.rejects["reason"].to_pylist() == found["table"].rejects["reason"].to_pylist(), format
    assert cremi.synapses.drop_columns("neuron_id") == found["table"].synapses.drop_columns("neuron_id")


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
def test_without_ids_each_row_has_its_number_whatever_the_rows_before_it(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(annotation_files, "BATCH_ROWS", 3)
    monkeypatch.setattr(annotation_files, "CSV_BLOCK_BYTES", 60)
    columns = {f"pre_pt_position_{axis}": [float(10 * row) for row in range(1, 11)] for axis in "xyz"}
    columns["pre_pt_position_y"][4] = None if suffix in ("parquet", "feather") else ""
    if suffix == "tsv":
        rows = ["\t".join(columns), *("\t".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
        rows.insert(3, "")  # a blank line is no row
        (tmp_path / "a.tsv").write_text("\n".join(rows))
    else:
        write(tmp_path, f"a.{suffix}", columns)
    result = read(tmp_path, "flywire", f"a.{suffix}")
    assert result.synapses["synapse_id"].to_pylist() == [1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert result.synapses["x_nm"].to_pylist() == [10 * id for id in result.synapses["synapse_id"].to_pylist()]
    assert result.rejects.select(["synapse_id", "reason"]).to_pylist() == [
        {"synapse_id": 5, "reason": "missing_coordinate"}
    ]
    assert result.notes[0] == f"a.{suffix} has no column of ids: each row has its number, from 1."
    assert sum("no column of ids" in note for note in result.notes) == 1


def test_cave_is_in_voxels_of_4_4_40_nm_unless_declared(tmp_path):
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


def test_any_table_may_have_its_position_in_one_column_and_its_axes_in_another_order(tmp_path):
    path = write(tmp_path, "a.csv", {"synapse_id": [1], "point": [[1, 2, 3]], "x": [9], "y": [8], "z": [7]})
    (row,) = read(tmp_path, "table", path, columns={"position": "point"}).synapses.to_pylist()
    assert (row["x_nm"], row["y_nm"], row["z_nm"]) == (1, 2, 3)
    (row,) = read(tmp_path, "table", path, columns={"x": "z", "z": "x"}).synapses.to_pylist()
    assert (row["x_nm"], row["y_nm"], row["z_nm"]) == (7, 8, 9)
    (row,) = read(tmp_path, "table", path, unit="um", columns={"position": "point"}).synapses.to_pylist()
    assert (row["x_nm"], row["y_nm"], row["z_nm"]) == (1000, 2000, 3000)


# neuPrint.


def test_the_names_of_every_export_of_neuprint_are_known(tmp_path):
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


def test_synful_reads_zyx_and_rejects_entries_that_are_no_synapse(tmp_path):
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
    for text, problem in ((json.dumps(entries)[:-9], "truncated or damaged"), ("{}", "one list"), ("[]", "no synapse")):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(SynpipeError, match=rf"a\.json.*{problem}"):
            read(tmp_path, "synful", "a.json")


# Every format of table.


@pytest.mark.parametrize("format", ["flywire", "cave", "neuprint"])
@pytest.mark.parametrize("suffix", ["parquet", "feather"])
def test_a_truncated_export_says_so(tmp_path, format, suffix):
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
def test_an_export_without_its_columns_names_what_it_may_be_called(tmp_path, format):
    path = write(tmp_path, "a.csv", {"id": [1], "x_coordinate": [1]})
    with pytest.raises(SynpipeError, match=r"a\.csv has no column .*\(for `x`\).*Its columns are `id`, `x_coordinate`"):
        read(tmp_path, format, path)


def test_a_table_of_other_lines_than_its_header_is_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(annotation_files, "MAX_MALFORMED_LINES", 10)
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
        patch.setattr(annotation_files, "BATCH_ROWS", batch)
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


def test_the_pipeline_writes_what_is_read_into_memory_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(annotation_files, "BATCH_ROWS", 100)
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
    said: list[str] = []
    made = make_synapses(dataset, {"annotations": "a"}, said.append)
    in_memory = read_annotations(
        dataset.spec.annotations,
        tmp_path,
        bounds_nm_zyx=(np.zeros(3), np.array([2000.0, 1600, 1600])),
        classes=dataset.spec.classes,
    )
    written = read_table(dataset.synapses_path)
    assert written.schema.remove_metadata() == SYNAPSE_SCHEMA
    assert written.replace_schema_metadata() == in_memory.synapses
    assert read_table(dataset.synapse_rejects_path) == in_memory.rejects
    assert {path.name for path in dataset.folder.iterdir()} == {"synapses.parquet", "synapse_rejects.parquet"}
    labels = written["neurotransmitter"].to_pylist()
    assert made.counts == {
        "rows": len(written),
        "rejects": 1000 - len(written),
        "classes": {"gaba": labels.count("gaba"), "acetylcholine": labels.count("acetylcholine"), "unlabelled": labels.count(None)},
    }  # fmt: skip
    labelled = len(labels) - labels.count(None)
    assert f"{len(written):,} synapses, {labelled:,} of them labelled of 20 neurons" in made.notes
    assert f"gaba: {labels.count('gaba'):,} synapses of 20 neurons" in made.notes
    assert said[1:] == made.notes
