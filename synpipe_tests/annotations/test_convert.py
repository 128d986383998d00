"""Every row of every annotation file becomes a synapse or a reject, with exact ids and positions in nm."""

import json
import re
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synpipe.annotations import table_files
from synpipe.annotations.cremi import Cremi
from synpipe.annotations.formats import AnnotationSpec
from synpipe.annotations.schema import REJECT_SCHEMA, SYNAPSE_SCHEMA
from synpipe.annotations.synister import SynisterV3
from synpipe.annotations.tables import PlainTable
from synpipe.errors import SynpipeError
from synpipe.specs import Spec
from synpipe_tests.support.annotations import Annotations, bounds_from_origin, read_annotations

CLASSES = ("acetylcholine", "gaba", "glutamate", "dopamine", "octopamine", "serotonin")
BOUNDS = bounds_from_origin([400, 1000, 1000])
BIG = 2**63 - 1


def table(path: Path, **options) -> PlainTable:
    return PlainTable.parse({"format": "table", "path": path.name, **options}, "test")


def read(base: Path, *specs, classes=CLASSES, bounds=BOUNDS) -> Annotations:
    return read_annotations(specs, base, bounds, classes)


def read_csv(folder: Path, text: str, **options) -> Annotations:
    path = folder / "points.csv"
    path.write_text(text)
    return read(folder, table(path, **options))


def rejected(result: Annotations) -> list[tuple]:
    return [(row["source_id"], row["reason"]) for row in result.rejects.to_pylist()]


def write_table(path: Path, columns: dict) -> Path:
    content = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(content, path)
    else:
        pyarrow.feather.write_feather(content, path)
    return path


def write_cremi(path: Path, ids, types, locations, offset=None) -> Path:
    with h5py.File(path, "w") as file:
        group = file.create_group("annotations")
        group["ids"] = np.asarray(ids, dtype=np.uint64)
        group.create_dataset("types", data=types, dtype=h5py.string_dtype())
        group["locations"] = np.asarray(locations, dtype=np.float64)
        if offset is not None:
            group.attrs["offset"] = offset
    return path


def synister(folder: Path, synapses, skeletons=None, hemi_lineages=None, **options) -> SynisterV3:
    texts = {
        "synapses": synapses if isinstance(synapses, str) else json.dumps(synapses),
        "skeletons": json.dumps(skeletons or {}),
        "hemi_lineages": json.dumps(hemi_lineages or {}),
    }
    for name, text in texts.items():
        (folder / f"{name}.json").write_text(text)
    return SynisterV3(format="synister_v3", **{name: f"{name}.json" for name in texts}, **options)


# Tables.


def test_every_kind_of_bad_row_is_rejected_with_its_reason_and_line(tmp_path):
    result = read_csv(
        tmp_path,
        "synapse_id,x,y,z,neurotransmitter\n"
        "1,10,20,30,gaba\n"
        ",10,20,30,gaba\n"
        "1.5,10,20,30,gaba\n"
        "\n"
        "-4,10,20,30,gaba\n"
        "5,abc,20,30,gaba\n"
        "6,10,,30,gaba\n"
        "7,10,20,inf,gaba\n"
        "8,1000,20,30,gaba\n"
        "9,10,20,30,acetylcholin\n"
        "10,10,20\n"
        "1,11,21,31,gaba\n"
        "12, 999.9 ,0,0,\n"
        "9223372036854775808,10,20,30,gaba\n"
        "9223372036854775807,10,20,30,GABA\n",
    )
    assert result.synapses.schema == SYNAPSE_SCHEMA
    assert result.rejects.schema == REJECT_SCHEMA
    assert result.synapses["synapse_id"].to_pylist() == [1, 12, BIG]
    assert result.synapses["x_nm"].to_pylist() == [10, 999.9, 10]
    assert result.synapses["neurotransmitter"].to_pylist() == ["gaba", None, "gaba"]
    lines = {re.match(r"points.csv, line \d+", row["detail"])[0]: row["reason"] for row in result.rejects.to_pylist()}
    assert lines == {
        "points.csv, line 3": "missing_id",
        "points.csv, line 4": "bad_id",
        "points.csv, line 6": "bad_id",
        "points.csv, line 7": "missing_coordinate",
        "points.csv, line 8": "missing_coordinate",
        "points.csv, line 9": "missing_coordinate",
        "points.csv, line 10": "outside_volume",
        "points.csv, line 11": "unknown_neurotransmitter",
        "points.csv, line 12": "malformed_row",
        "points.csv, line 13": "duplicate_id",
        "points.csv, line 15": "bad_id",
    }
    details = {row["reason"]: row["detail"] for row in result.rejects.to_pylist()}
    assert "did you mean 'acetylcholine'?" in details["unknown_neurotransmitter"]
    assert "taken by points.csv, line 2" in details["duplicate_id"]
    assert "z 'inf'" in details["missing_coordinate"]
    assert "x '1000'" in details["outside_volume"]
    assert "x 0 to 1000" in details["outside_volume"]
    assert "it has 3 values, the header 5" in details["malformed_row"]


def test_line_numbers_are_right_across_the_blocks_of_a_large_csv(tmp_path, monkeypatch):
    monkeypatch.setattr(table_files, "CSV_BLOCK_BYTES", 500)
    lines = ["synapse_id,x,y,z"]
    for number in range(2, 602):
        short, bad = number % 7 == 0, number % 11 == 0
        lines.append(f"{number},1" if short else f"{number},{'?' if bad else 1},2,3")
    result = read_csv(tmp_path, "\n".join(lines))
    assert len(result.synapses) + len(result.rejects) == 600
    reasons = Counter()
    for row in result.rejects.to_pylist():
        line = int(re.search(r"line (\d+)", row["detail"])[1])
        reasons[row["reason"]] += 1
        assert line % 7 == 0 if row["reason"] == "malformed_row" else int(row["source_id"]) == line
    assert reasons == {"malformed_row": 85, "missing_coordinate": 47}


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "feather"])
def test_mapped_columns_become_the_schema_in_every_table_format(tmp_path, suffix):
    columns = {
        "id": [3, 2**60 + 1],
        "x_nm": [10.5, 20.0],
        "y_nm": [1, 2],
        "z_nm": [5.0, 6.0],
        "body": [2**62 + 1, 8],
        "nt": ["ACh", "5-HT"],
        "score": [0.5, 1.0],
        "region": ["LH", "AL"],
    }
    path = tmp_path / f"MANC.{suffix}"
    if suffix in ("parquet", "feather"):
        write_table(path, columns)
    else:
        rows = [columns, *zip(*columns.values(), strict=True)]
        path.write_text("\n".join({"csv": ",", "tsv": "\t"}[suffix].join(map(str, row)) for row in rows))
    mapping = {"synapse_id": "id", "x": "x_nm", "y": "y_nm", "z": "z_nm"}
    mapping |= {"neuron_id": "body", "neurotransmitter": "nt", "confidence": "score"}
    result = read(tmp_path, table(path, columns=mapping, id_offset=100))
    shared = {"hemilineage": None, "source": "MANC"}
    first = {"synapse_id": 103, "x_nm": 10.5, "y_nm": 1.0, "z_nm": 5.0, "neuron_id": 2**62 + 1, "region": "LH"}
    second = {"synapse_id": 2**60 + 101, "x_nm": 20.0, "y_nm": 2.0, "z_nm": 6.0, "neuron_id": 8, "region": "AL"}
    assert result.synapses.to_pylist() == [
        {**first, **shared, "neurotransmitter": "acetylcholine", "confidence": 0.5, "source_id": "3"},
        {**second, **shared, "neurotransmitter": "serotonin", "confidence": 1.0, "source_id": str(2**60 + 1)},
    ]
    assert not len(result.rejects)


@pytest.mark.parametrize(
    ("ids", "kept"),
    [
        (pa.array([2**64 - 1, 2**63, BIG, None], pa.uint64()), [BIG]),
        (pa.array([-1, 0, BIG], pa.int64()), [0, BIG]),
        # A float of this size may have been a different id, so it is not trusted.
        (pa.array([2.0**53, 2.0**53 - 1, 1.5, float("nan"), float("inf"), -1.0]), [2**53 - 1]),
        (pa.array(["9007199254740993.0", "9007199254740991.0", "007", "1e3", "٣", "0x1"]), [7, 2**53 - 1]),
        (pa.array(["12", "13"]).dictionary_encode(), [12, 13]),
    ],
)
def test_ids_are_exact_or_rejected(tmp_path, ids, kept):
    path = write_table(tmp_path / "a.parquet", {"synapse_id": ids, **{axis: np.ones(len(ids)) for axis in "xyz"}})
    result = read(tmp_path, table(path))
    assert result.synapses["synapse_id"].to_pylist() == kept
    assert set(result.rejects["reason"].to_pylist()) <= {"missing_id", "bad_id"}
    assert len(result.synapses) + len(result.rejects) == len(ids)


def test_an_id_that_the_offset_pushes_past_int64_is_rejected(tmp_path):
    result = read_csv(tmp_path, f"synapse_id,x,y,z\n{BIG - 1},1,1,1\n{BIG},1,1,1\n", id_offset=1)
    assert result.synapses["synapse_id"].to_pylist() == [BIG]
    assert rejected(result) == [(str(BIG), "bad_id")]


def test_a_neuron_id_that_was_a_float_is_left_empty_and_counted(tmp_path):
    text = "synapse_id,x,y,z,neuron_id\n1,1,1,1,720575940628857210.0\n2,1,1,1,42.0\n3,1,1,1,\n"
    result = read_csv(tmp_path, text)
    assert result.synapses["neuron_id"].to_pylist() == [None, 42, None]
    assert any("points: 1 synapses have a neuron_id" in note for note in result.notes)


def test_a_voxel_coordinate_means_the_centre_of_the_voxel(tmp_path):
    options = {"unit": "voxel", "voxel_size_nm_zyx": [40, 4, 4], "shift_nm_zyx": [-20, 0, 1]}
    result = read_csv(tmp_path, "synapse_id,x,y,z\n1,0,10,9\n2,0.5,0,0\n3,0,0,10\n4,0,0,1e308\n", **options)
    positions = [[row["z_nm"], row["y_nm"], row["x_nm"]] for row in result.synapses.to_pylist()]
    assert positions == [[360, 42, 3], [0, 2, 5]]
    assert rejected(result) == [("4", "missing_coordinate"), ("3", "outside_volume")]  # the volume ends before 400 nm


def test_bounds_are_half_open_and_without_bounds_no_position_is_checked(tmp_path):
    text = "synapse_id,x,y,z\n1,0,0,0\n2,999.999,999.999,399.999\n3,0,0,400\n4,0,-0.001,0\n"
    assert rejected(read_csv(tmp_path, text)) == [("3", "outside_volume"), ("4", "outside_volume")]
    assert len(read(tmp_path, table(tmp_path / "points.csv"), bounds=None).synapses) == 4


@pytest.mark.parametrize(
    ("written", "label"),
    [
        (" Acetylcholine ", "acetylcholine"),
        ("ach", "acetylcholine"),
        ("Glut", "glutamate"),
        ("DA", "dopamine"),
        ("5ht", "serotonin"),
        ("OA", "octopamine"),
        ("", None),
        ("NA", None),
        ("unknown", None),
    ],
)
def test_common_names_of_transmitters_are_recognised(tmp_path, written, label):
    assert read_csv(tmp_path, f"synapse_id,x,y,z,neurotransmitter\n1,1,1,1,{written}\n").synapses[
        "neurotransmitter"
    ].to_pylist() == [label]


def test_a_synonym_is_used_only_for_a_class_of_the_data_set(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("synapse_id,x,y,z,neurotransmitter\n1,1,1,1,DA\n2,1,1,1,acetylcholine\n")
    result = read(tmp_path, table(path), classes=["ACh", "gaba"])
    assert result.synapses["neurotransmitter"].to_pylist() == ["ACh"]
    assert rejected(result) == [("1", "unknown_neurotransmitter")]


def test_a_label_is_the_class_of_every_synapse_and_must_be_a_class(tmp_path):
    text = "synapse_id,x,y,z,neurotransmitter\n1,1,1,1,nonsense\n2,1,1,1,\n"
    assert read_csv(tmp_path, text, label="gaba").synapses["neurotransmitter"].to_pylist() == ["gaba", "gaba"]
    with pytest.raises(SynpipeError, match="label 'gabba' is none of the classes"):
        read_csv(tmp_path, text, label="gabba")


def test_the_first_usable_row_keeps_an_id_across_sources(tmp_path):
    (tmp_path / "a.csv").write_text("synapse_id,x,y,z\n5,1,1,1\n6,?,1,1\n")
    (tmp_path / "b.csv").write_text("synapse_id,x,y,z\n6,2,2,2\n5,2,2,2\n5,3,3,3\n")
    first, second = table(tmp_path / "a.csv"), table(tmp_path / "b.csv")
    result = read(tmp_path, first, second)
    assert list(zip(*result.synapses.select(["synapse_id", "source"]).to_pydict().values(), strict=True)) == [
        (5, "a"),
        (6, "b"),
    ]
    assert [row["detail"] for row in result.rejects.to_pylist() if row["reason"] == "duplicate_id"] == [
        "b.csv, line 3 (id '5'): id 5 is taken by a.csv, line 2.",
        "b.csv, line 4 (id '5'): id 5 is taken by a.csv, line 2.",
    ]
    shifted = read(tmp_path, first, second.model_copy(update={"id_offset": 10}))
    assert shifted.synapses["synapse_id"].to_pylist() == [5, 15, 16]
    assert shifted.synapses["source_id"].to_pylist() == ["5", "5", "6"]


def test_first_rows_and_row_numbers_are_right_across_the_batches_of_a_large_parquet_file(tmp_path, monkeypatch):
    monkeypatch.setattr(table_files, "BATCH_ROWS", 300)
    ids = np.random.default_rng(0).integers(0, 50, 1000)
    rows = np.arange(1.0, 1001.0)
    path = write_table(tmp_path / "a.parquet", {"synapse_id": ids, "x": rows, "y": rows, "z": rows})
    result = read(tmp_path, table(path), bounds=None)
    unique, first = np.unique(ids, return_index=True)
    assert result.synapses["synapse_id"].to_pylist() == unique.tolist()
    assert result.synapses["x_nm"].to_pylist() == rows[first].tolist()
    for row in result.rejects.to_pylist():
        own, kept = f"a.parquet, row {row['x_nm']:.0f}", f"a.parquet, row {first[row['synapse_id']] + 1}"
        assert row["detail"] == f"{own} (id '{row['source_id']}'): id {row['source_id']} is taken by {kept}."


# One value of a hostile file, as text. Commas, quotes and line breaks are left out: they would only test this test's writer.
VALUES = st.one_of(
    st.integers(-3, 30).map(str),
    st.floats().map(str),
    st.sampled_from(["", " ", "abc", "1e400", "+5", "5.", ".5", "-0", "NaN", "1_0", "0x10", "gaba", "GABBA", "9" * 25]),
    st.text(st.characters(codec="utf-8", exclude_characters=',"\n\r\0'), max_size=4),
)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.lists(VALUES, min_size=5, max_size=5) | st.lists(VALUES, min_size=2, max_size=7), min_size=1),
    bounded=st.booleans(),
)
def test_no_row_of_a_csv_file_is_lost(tmp_path_factory, rows, bounded):
    path = tmp_path_factory.mktemp("rows") / "points.csv"
    lines = ["synapse_id,x,y,z,neurotransmitter", *(",".join(row) for row in rows)]
    path.write_text("\n".join(lines), newline="")
    result = read(path.parent, table(path, min_inside=0), bounds=BOUNDS if bounded else None)
    assert len(result.synapses) + len(result.rejects) == len(rows)
    ids = result.synapses["synapse_id"].to_pylist()
    assert ids == sorted(set(ids))
    for row in result.synapses.to_pylist():
        assert any(line[0].strip() == row["source_id"] for line in rows)
        assert np.isfinite([row["x_nm"], row["y_nm"], row["z_nm"]]).all()
    assert not pc.any(pc.is_null(result.rejects["detail"])).as_py()


@settings(deadline=None, max_examples=40)
@given(
    rows=st.lists(
        st.tuples(
            st.none() | st.integers(0, 2**64 - 1) | st.integers(0, 9),
            *[st.none() | st.floats(-1500, 1500) | st.floats()] * 3,
            st.none() | st.sampled_from([*CLASSES, "gabba"]),
        ),
        min_size=1,
    )
)
def test_no_row_of_a_parquet_file_is_lost(tmp_path_factory, rows):
    ids, x, y, z, names = zip(*rows, strict=True)
    columns = {"synapse_id": pa.array(ids, pa.uint64()), "x": x, "y": y, "z": z, "neurotransmitter": names}
    path = write_table(tmp_path_factory.mktemp("rows") / "points.parquet", columns)
    result = read(path.parent, table(path, min_inside=0))
    assert len(result.synapses) + len(result.rejects) == len(rows)
    usable = {
        row[0]
        for row in rows
        if row[0] is not None
        and row[0] <= BIG
        and all(v is not None and 0 <= v < high for v, high in zip(row[1:4], (1000, 1000, 400), strict=True))
        and row[4] != "gabba"
    }
    assert result.synapses["synapse_id"].to_pylist() == sorted(usable)


# CREMI.


def test_cremi_adds_the_offset_of_the_annotations_and_reads_the_chosen_types(tmp_path):
    path = write_cremi(
        tmp_path / "sample_A.h5",
        [7, 2**63, 3],
        ["presynaptic_site", "presynaptic_site", "postsynaptic_site"],
        [[10, 20, 30], [0, 0, 0], [1, 1, 1]],
        offset=[100.0, 200.0, 300.0],
    )
    spec = Cremi(format="cremi", path=path.name, annotation_types=("presynaptic_site",))
    result = read(tmp_path, spec)
    (synapse,) = result.synapses.to_pylist()
    assert (synapse["synapse_id"], synapse["z_nm"], synapse["y_nm"], synapse["x_nm"]) == (7, 110, 220, 330)
    assert rejected(result) == [(str(2**63), "bad_id")]
    assert "sample_A.h5: 2 of 3 annotations are of type presynaptic_site." in result.notes
    with pytest.raises(SynpipeError, match="it has postsynaptic_site, presynaptic_site"):
        read(tmp_path, spec.model_copy(update={"annotation_types": ("pre",)}))


def test_cremi_annotations_of_another_file_are_refused(tmp_path):
    """A change of the other file would go unnoticed."""
    write_cremi(tmp_path / "other.h5", [1], ["presynaptic_site"], [(1.0, 2.0, 3.0)])
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["annotations"] = h5py.ExternalLink("other.h5", "annotations")
    with pytest.raises(SynpipeError, match=r"a\.h5.* leads to `annotations` in the file other\.h5"):
        read(tmp_path, Cremi(format="cremi", path="a.h5"))


def test_real_cremi_annotations(real_em):
    bounds = bounds_from_origin(np.array([20, 1024, 1024]) * [50, 4.6, 4.6])
    result = read(real_em, Cremi(format="cremi", path="vnc_stack1.h5"), bounds=bounds)
    assert len(result.synapses) == 50
    with h5py.File(real_em / "vnc_stack1.h5") as file:
        order = np.argsort(file["annotations/ids"][()])
        locations = file["annotations/locations"][()][order]
    positions = np.stack([result.synapses[name].to_numpy() for name in ("z_nm", "y_nm", "x_nm")], axis=1)
    np.testing.assert_array_equal(positions, locations)


def test_real_labelled_points(real_em):
    spec = PlainTable.parse(
        {
            "format": "table",
            "path": "vnc_stack1_points.csv",
            "columns": {
                "synapse_id": "point_id",
                "x": "x_nm",
                "y": "y_nm",
                "z": "z_nm",
                "neurotransmitter": "structure",
            },
        },
        "test",
    )
    structures = ["synapse", "mitochondrion", "membrane", "glia", "cytoplasm"]
    bounds = bounds_from_origin(np.array([20, 1024, 1024]) * [50, 4.6, 4.6])
    result = read(real_em, spec, classes=structures, bounds=bounds)
    assert Counter(result.synapses["neurotransmitter"].to_pylist()) == dict(
        zip(structures, (184, 360, 360, 280, 360), strict=True)
    )
    assert not len(result.rejects)
    # If one class is removed from the data set, exactly its points are rejected.
    assert len(read(real_em, spec, classes=structures[:-1], bounds=bounds).rejects) == 360


# synister v3.


def test_synister_joins_neurons_and_hemilineages_and_rejects_bad_entries(tmp_path):
    place = {"x": 10.5, "y": 20, "z": 40, "splits": {"train": []}}
    spec = synister(
        tmp_path,
        {
            "11": {**place, "skeleton_id": 1, "brain_region": ["LH", "AL"]},
            "12": {**place, "skeleton_id": 2, "brain_region": "LH"},
            "13": {**place, "skeleton_id": 3, "brain_region": None},
            "14": {**place, "skeleton_id": 99},
            "15": {**place, "x": None, "skeleton_id": 1},
            "16": None,
            "17": {**place, "y": "abc"},
            "x": place,
        },
        {
            "1": {"hemi_lineage_id": 5, "nt_known": ["gaba"]},
            "2": {"hemi_lineage_id": 6, "nt_known": ["gaba", "octopamine"]},
            "3": {"hemi_lineage_id": None, "nt_known": None},
        },
        {"5": {"hemi_lineage_name": "ALad1", "nt_guess": None}},
    )
    result = read(tmp_path, spec)
    names = ["synapse_id", "neuron_id", "hemilineage", "region", "neurotransmitter"]
    assert [tuple(row.values()) for row in result.synapses.select(names).to_pylist()] == [
        (11, 1, "ALad1", "LH+AL", "gaba"),
        (12, 2, None, "LH", None),
        (13, 3, None, None, None),
        (14, 99, None, None, None),
    ]
    assert dict(rejected(result)) == {
        "15": "missing_coordinate",
        "16": "malformed_row",
        "17": "missing_coordinate",
        "x": "bad_id",
    }
    assert any(note.startswith("Neuron 2 has several transmitters (gaba, octopamine)") for note in result.notes)
    assert any("such as 99, are not in skeletons.json" in note for note in result.notes)


def test_a_repeated_key_in_json_is_rejected_rather_than_dropped(tmp_path):
    spec = synister(tmp_path, '{"1": {"x": 1, "y": 1, "z": 1}, "1": {"x": 2, "y": 2, "z": 2}}')
    result = read(tmp_path, spec)
    assert result.synapses["x_nm"].to_pylist() == [1]
    assert result.rejects["detail"].to_pylist() == [
        "synapses.json, entry 2 (id '1'): id 1 is taken by synapses.json, entry 1."
    ]


@pytest.mark.parametrize("half", [r"\ud800", r"\udfff", "\ud800"], ids=["high", "low", "not escaped"])
def test_a_lone_surrogate_in_json_rejects_only_the_synapses_that_have_it(tmp_path, half):
    place = '"x": 1, "y": 1, "z": 1'
    entries = [
        f'"1": {{{place}, "skeleton_id": 1, "brain_region": "L\\ud83d\\ude00H"}}',  # a surrogate pair is one whole character
        f'"2": {{{place}, "brain_region": ["LH", "{half}"]}}',
        f'"3": {{{place}, "skeleton_id": "{half}"}}',
        f'"4": {{"x": "{half}", "y": 1, "z": 1}}',
        f'"5{half}": {{{place}}}',
        f'"6": {{{place}, "skeleton_id": 2}}',
        f'"7": {{{place}, "skeleton_id": 3}}',
        f'"8": {{{place}, "skeleton_id": 4}}',
        f'"9": "{half}"',
    ]
    spec = synister(
        tmp_path,
        "",
        {"1": {"nt_known": ["gaba"]}, "2": {"hemi_lineage_id": 5}, "3": {"nt_known": ["HALF"]}}
        | {"4": {"nt_known": ["gaba", "HALF"]}},
        {"5": {"hemi_lineage_name": "HALF"}},
    )
    for name in ("skeletons.json", "hemi_lineages.json"):
        content = (tmp_path / name).read_text().replace("HALF", half)
        (tmp_path / name).write_bytes(content.encode(errors="surrogatepass"))
    (tmp_path / "synapses.json").write_bytes(f"{{{', '.join(entries)}}}".encode(errors="surrogatepass"))
    result = read(tmp_path, spec)
    assert result.synapses.select(["synapse_id", "region"]).to_pylist() == [{"synapse_id": 1, "region": "L😀H"}]
    written = r"5\udfff" if half == r"\udfff" else r"5\ud800"
    assert rejected(result) == [(source_id, "malformed_row") for source_id in ["2", "3", "4", written, *"6789"]]
    assert result.rejects["detail"][0].as_py().startswith("synapses.json, entry 2 (id '2'): ")
    assert "lone surrogate" in result.rejects["detail"][0].as_py()
    assert "".join(result.notes).encode()  # the notes can be shown


def test_real_fafb_labels_per_neuron(real_em, tmp_path):
    folder = real_em / "fafb_v3"
    skeletons = json.loads((folder / "skeletons_v3.json").read_text())
    synapses = {
        str(10**12 + number): {"x": 400_000.7, "y": 200_000.3, "z": 4_000, "skeleton_id": int(skeleton)}
        for number, skeleton in enumerate([*skeletons, *skeletons])
    }
    (tmp_path / "synapses_v3.json").write_text(json.dumps(synapses))
    spec = SynisterV3(
        format="synister_v3",
        synapses=str(tmp_path / "synapses_v3.json"),
        skeletons="skeletons_v3.json",
        hemi_lineages="hemi_lineages_v3.json",
    )
    result = read(folder, spec, bounds=None)
    assert not len(result.rejects)
    # Neurons of each class in Eckstein et al.'s export.
    expected = dict(zip(CLASSES, (397, 165, 32, 83, 5, 5), strict=True)) | {None: 2117}
    pairs = set(
        zip(result.synapses["neurotransmitter"].to_pylist(), result.synapses["neuron_id"].to_pylist(), strict=True)
    )
    assert Counter(label for label, _ in pairs) == expected
    assert "acetylcholine: 794 synapses of 397 neurons" in result.notes
    assert "unlabelled: 4,234 synapses of 2,117 neurons" in result.notes
    assert sum("several transmitters (gaba, octopamine)" in note for note in result.notes) == 1
    # The 118 neurons of the hemilineage "unknown" have no hemilineage.
    assert result.synapses["hemilineage"].null_count == 236


# Whole files.


def test_the_error_for_a_missing_column_lists_the_columns_of_the_file(tmp_path):
    with pytest.raises(SynpipeError) as error:
        read_csv(tmp_path, "point_id,x_nm,y,z\n1,1,1,1\n", columns={"synapse_id": "point", "neuron_id": "body"})
    message = str(error.value)
    for part in ("points.csv", "`point` (for `synapse_id`)", "`x` (for `x`)", "`body` (for `neuron_id`)", "`x_nm`"):
        assert part in message


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "Its columns are none"),
        ("synapse_id,x,y,z\n", "holds no synapse"),
        ("synapse_id,x,x,y,z\n1,2,3,4,5\n", "more than one column `x`"),
        ("synapse_id;x;y;z\n1;2;3;4\n", "no column `synapse_id`"),
        ('synapse_id,x,y,z,region\n1,1,1,1,"LH\n2,2,2,2,AL\n3,3,3,3,AL\n', "a quoted value runs over several lines"),
    ],
)
def test_the_error_for_an_unusable_csv_gives_the_reason(tmp_path, text, problem):
    with pytest.raises(SynpipeError, match=r"points\.csv.*") as error:
        read_csv(tmp_path, text)
    assert problem in str(error.value)


def test_a_csv_in_another_encoding_is_reported(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"synapse_id,x,y,z,region\n1,1,1,1,\xe9\n")
    with pytest.raises(SynpipeError, match=r"a\.csv is truncated or damaged.*UTF8"):
        read(tmp_path, table(path))


@pytest.mark.parametrize("suffix", ["parquet", "feather"])
def test_a_truncated_table_is_reported(tmp_path, suffix):
    path = write_table(tmp_path / f"a.{suffix}", {"synapse_id": range(5000), **{axis: np.ones(5000) for axis in "xyz"}})
    assert len(read(tmp_path, table(path)).synapses) == 5000
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(SynpipeError, match=rf"a\.{suffix} is truncated or damaged"):
        read(tmp_path, table(path))


def test_damaged_cremi_and_json_files_are_reported(tmp_path):
    path = write_cremi(tmp_path / "a.h5", range(500), ["presynaptic_site"] * 500, np.ones((500, 3)))
    spec = Cremi(format="cremi", path=path.name)
    assert len(read(tmp_path, spec).synapses) == 500
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(SynpipeError, match=r"a\.h5 is truncated or damaged"):
        read(tmp_path, spec)
    with pytest.raises(SynpipeError, match=r"synapses\.json is truncated or damaged"):
        read(tmp_path, synister(tmp_path, '{"1": {"x": 1, "y": 2'))
    with pytest.raises(SynpipeError, match="must hold one JSON object"):
        read(tmp_path, synister(tmp_path, "[]"))
    with pytest.raises(SynpipeError, match=r"skeletons\.json: key '4' is not an object"):
        read(tmp_path, synister(tmp_path, {"1": {"x": 1}}, {"4": 5}))


def test_the_error_for_an_hdf5_file_without_annotations_names_what_is_missing(real_em):
    with pytest.raises(SynpipeError, match=r"fibsem_medulla\.h5 has no `annotations/ids`"):
        read(real_em, Cremi(format="cremi", path="fibsem_medulla.h5"))


def test_a_column_of_lists_is_an_error(tmp_path):
    path = write_table(tmp_path / "a.parquet", {"synapse_id": [1], "x": [[1.0]], "y": [1.0], "z": [1.0]})
    with pytest.raises(SynpipeError, match="column `x` holds list"):
        read(tmp_path, table(path))


# Specs.


class DatasetEntry(Spec):
    annotations: tuple[AnnotationSpec, ...]


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"format": "vast"}, "synister_v3"),
        ({"format": "cremi"}, "path"),
        ({"format": "table", "path": "a.xlsx"}, ".feather"),
        ({"format": "table", "path": "a.csv", "unit": "voxel"}, "voxel_size_nm_zyx"),
        ({"format": "table", "path": "a.csv", "voxel_size_nm_zyx": [1, 1, 1]}, "unit: voxel"),
        ({"format": "table", "path": "a.csv", "columns": {"neuron": "body"}}, "neuron_id"),
        ({"format": "table", "path": "a.csv", "label": "gaba", "columns": {"neurotransmitter": "nt"}}, "label"),
        ({"format": "table", "path": "a.csv", "id_offset": -1}, "id_offset"),
        ({"format": "table", "path": "a.csv", "shift_nm_zyx": [0, 0, float("nan")]}, "shift_nm_zyx"),
    ],
)
def test_a_wrong_entry_of_a_data_set_is_refused(entry, problem):
    with pytest.raises(SynpipeError, match=r"d\.yaml") as error:
        DatasetEntry.parse({"annotations": [entry]}, "d.yaml")
    assert problem in str(error.value)


def test_the_format_chooses_the_spec_and_the_fingerprint_follows_content_and_spec(tmp_path):
    entry = DatasetEntry.parse({"annotations": [{"format": "table", "path": "a.csv"}]}, "d.yaml")
    (spec,) = entry.annotations
    with pytest.raises(SynpipeError, match=r"a\.csv does not exist"):
        spec.fingerprint(tmp_path)
    path = tmp_path / "a.csv"
    path.write_text("synapse_id,x,y,z\n1,1,1,1\n")
    before = spec.fingerprint(tmp_path)
    assert spec.files(tmp_path) == [path]
    assert table(path).fingerprint(tmp_path) == before
    assert table(path, id_offset=1).fingerprint(tmp_path) != before
    path.write_text("synapse_id,x,y,z\n1,1,1,12\n")
    assert spec.fingerprint(tmp_path) != before


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_confidence_that_is_too_large_is_left_empty_with_a_note(tmp_path: Path, suffix: str) -> None:
    """The columns hold 32-bit floats, in which 1e39 would become infinite."""
    values = [1e39, -1e39, 3e38, 0.5]
    path = tmp_path / f"points{suffix}"
    columns = {"synapse_id": [1, 2, 3, 4], **{axis: [10.0] * 4 for axis in "xyz"}, "confidence": values}
    if suffix == ".csv":
        rows = (",".join(map(str, row)) for row in zip(*columns.values(), strict=True))
        path.write_text("\n".join([",".join(columns), *rows]))
    else:
        write_table(path, columns)
    result = read(tmp_path, table(path))
    assert result.synapses["confidence"].to_pylist() == [None, None, pytest.approx(3e38), 0.5]
    assert [note for note in result.notes if "points: 2 synapses have a confidence" in note and "too large" in note]
    assert result.rejects.num_rows == 0


def test_an_infinite_confidence_is_left_empty_with_a_note(tmp_path: Path) -> None:
    columns = {"synapse_id": [1, 2], **{axis: [10.0] * 2 for axis in "xyz"}, "confidence": [np.inf, 0.25]}
    result = read(tmp_path, table(write_table(tmp_path / "points.parquet", columns)))
    assert result.synapses["confidence"].to_pylist() == [None, 0.25]
    assert [note for note in result.notes if "1 synapses have a confidence" in note]
