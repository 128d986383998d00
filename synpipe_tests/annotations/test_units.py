"""A wrong unit is told, with the one that fits; a right one never is, wherever the synapses lie."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synpipe.annotations import units as annotation_units
from synpipe.annotations.convert import Annotations, read_annotations
from synpipe.annotations.formats import SynisterV3, Table
from synpipe.annotations.units import Box, UnitCheck
from synpipe.errors import SynpipeError

FAFB = Box(np.zeros(3), np.array([7063 * 40, 134144 * 4, 248832 * 4.0]), np.array([40.0, 4, 4]))
HEMIBRAIN = Box(np.zeros(3), np.array([41408, 39552, 34432]) * 8.0, np.full(3, 8.0))
# A cut-out of 125 sections that begins somewhere in the brain, as CREMI's.
CUT_OUT = Box(np.array([40_000.0, 80_000, 120_000]), np.array([45_000.0, 85_000, 125_000]), np.array([40.0, 4, 4]))


def voxels(box: Box, count: int, low=0.2, high=0.8) -> np.ndarray:
    """Whole voxels (n, 3) from the volume's own corner, evenly in the middle of every axis."""
    shape = (box.high - box.low) / box.voxel_size
    return np.floor(np.random.default_rng(0).uniform(low, high, (count, 3)) * shape)


def check(points: np.ndarray, box: Box, **options) -> list[str]:
    spec = Table.parse({"format": "table", "path": "points.csv", **options}, "test")
    positions = spec.to_nm(points) + np.array(spec.shift_nm_zyx)
    units = UnitCheck(spec, box)
    for part in np.array_split(points, 7):
        units.add(part, box.contains(spec.to_nm(part) + np.array(spec.shift_nm_zyx)))
    assert len(positions) == len(points)
    return units.notes()


VOXEL_40_4_4 = {"unit": "voxel", "voxel_size_nm_zyx": [40, 4, 4]}
VOXEL_8 = {"unit": "voxel", "voxel_size_nm_zyx": [8, 8, 8]}


@pytest.mark.parametrize(
    ("points", "box", "declared", "said"),
    [
        (voxels(FAFB, 50) * FAFB.voxel_size, FAFB, VOXEL_40_4_4, "`unit: nm` (100.0% inside)"),
        (voxels(HEMIBRAIN, 50) * 8 / 1000, HEMIBRAIN, VOXEL_8 | {"min_inside": 1, "shift_nm_zyx": [-3000] * 3}, "unit: um"),
        (voxels(HEMIBRAIN, 50) * 8, HEMIBRAIN, {"unit": "um"}, "`unit: nm` (100.0% inside)"),
        (voxels(CUT_OUT, 50), CUT_OUT, {}, "`unit: voxel` with `voxel_size_nm_zyx: [40, 4, 4]`, with `shift_nm_zyx: [40000,"),
        (voxels(CUT_OUT, 50) * CUT_OUT.voxel_size, CUT_OUT, {}, "`unit: nm`, with `shift_nm_zyx: [40000, 80000, 120000]`"),
        (voxels(FAFB, 50)[:, ::-1], FAFB, VOXEL_40_4_4, "[40, 4, 4]`, with z, y, x from what is now x, y, z (100.0% inside)"),
        (np.full((50, 3), 1e12), FAFB, {}, "may be of another volume"),
    ],
    ids=["nm", "um", "not um", "voxels from the corner", "nm from the corner", "x and z exchanged", "nothing"],
)  # fmt: skip
def test_outside_says_which_unit_would_fit(points, box, declared, said):
    with pytest.raises(SynpipeError, match=r"points: only \d+ of 50 positions, declared in") as error:
        check(points, box, **declared)
    assert said in str(error.value)
    check(points, box, **declared | {"min_inside": 0, "unit_checked": True})


def test_the_share_that_must_be_inside_is_a_matter_of_the_spec():
    points = voxels(FAFB, 100) * FAFB.voxel_size
    points[:6] += 10e6
    with pytest.raises(SynpipeError, match="only 94 of 100 positions"):
        check(points, FAFB)
    assert check(points, FAFB, min_inside=0.94) == []
    assert check(points[1:], FAFB, min_inside=0.94) == check(points[2:], FAFB) == []


def test_a_few_synapses_outside_stop_no_other(tmp_path):
    points = voxels(FAFB, 19) * FAFB.voxel_size
    points[:18] += 10e6
    assert check(points, FAFB) == []
    points += 10e6
    (note,) = check(points, FAFB)
    assert "only 0 of 19 positions" in note


@pytest.mark.parametrize("count", [20, 1000])
@pytest.mark.parametrize("box", [FAFB, HEMIBRAIN], ids=["FAFB", "hemibrain"])
def test_voxels_declared_as_nm_are_told_though_they_stay_inside(box, count):
    with pytest.raises(SynpipeError, match="declared in nm, but look like `unit: voxel`") as error:
        check(voxels(box, count), box)
    assert "no multiples of its voxel size; so read they span" in str(error.value)
    assert annotation_units._numbers(box.voxel_size) in str(error.value)
    (note,) = check(voxels(box, count), box, unit_checked=True)
    assert "look like `unit: voxel`" in note
    assert check(voxels(box, count), box, unit="voxel", voxel_size_nm_zyx=box.voxel_size.tolist()) == []


def test_micrometres_declared_as_nm_are_told():
    with pytest.raises(SynpipeError, match=r"look like `unit: um`: so read they span 59, 57, 60 % of its axes"):
        check(voxels(FAFB, 100) * FAFB.voxel_size / 1000, FAFB)


@pytest.mark.parametrize(
    ("points", "notes"),
    [
        (voxels(FAFB, 500, 0, 0.02) * FAFB.voxel_size, 0),  # on the lattice
        ((voxels(FAFB, 500, 0, 0.02) + 0.5) * FAFB.voxel_size, 0),
        (voxels(FAFB, 500, 0, 0.02) * FAFB.voxel_size + 0.3, 0),  # off it, no whole numbers
        (np.round(voxels(FAFB, 500, 0, 0.02) * FAFB.voxel_size * 1.01), 1),  # rounded: one sign
        (np.random.default_rng(0).integers(0, 3000, (500, 3)).astype(float), 1),
        (np.random.default_rng(0).integers(0, 30, (19, 3)).astype(float), 0),  # too few to tell
    ],
    ids=["lattice", "centres", "off the lattice", "rounded", "whole numbers", "few"],
)
def test_a_cluster_in_the_corner_of_a_big_volume_is_legitimate(points, notes):
    assert len(check(points, FAFB)) == notes


@settings(deadline=None, max_examples=60)
@given(
    size=st.tuples(*[st.sampled_from([1.0, 4.0, 4.6, 8.0, 40.0, 50.0])] * 3).map(np.array),
    shape=st.tuples(*[st.integers(1, 100_000)] * 3).map(np.array),
    offset=st.tuples(*[st.integers(0, 10**6)] * 3).map(np.array),
    region=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    count=st.integers(1, 300),
    centred=st.sampled_from([0.0, 0.5]),
)
def test_the_right_unit_is_never_an_error(size, shape, offset, region, count, centred):
    """Wherever the synapses lie, in whatever volume: nm of voxels (corners or centres) and voxels."""
    box = Box(offset.astype(float), offset + shape * size, size)
    at = np.minimum(np.floor(np.random.default_rng(0).uniform(*region, (count, 3)) * shape), shape - 1)
    check((at + centred) * size + offset, box)
    check(at, box, unit="voxel", voxel_size_nm_zyx=size.tolist(), shift_nm_zyx=offset.tolist())


def test_the_sample_is_even_and_bounded(monkeypatch):
    monkeypatch.setattr(annotation_units, "SAMPLE", 100)
    check_units = UnitCheck(Table.parse({"format": "table", "path": "a.csv"}, "test"), FAFB)
    numbers = np.repeat(np.arange(12_345.0)[:, None], 3, axis=1)
    for part in np.split(numbers, [1, 40, 41, 900, 5000, 5001, 12_000]):
        check_units.add(part, np.full(len(part), True))
        assert sum(map(len, check_units._sample)) <= 200
    kept = np.concatenate(check_units._sample)[:, 0]
    assert len(kept) >= 90
    assert len(set(np.diff(kept))) == 1


# Through the readers.


def read(folder, spec, box: Box = FAFB) -> Annotations:
    return read_annotations(
        [spec],
        folder,
        bounds_nm_zyx=(box.low, box.high),
        classes=["gaba"],
        voxel_size_nm_zyx=box.voxel_size,
    )


def test_only_rows_with_coordinates_count_and_the_others_are_rejected(tmp_path):
    points = voxels(FAFB, 100) * FAFB.voxel_size
    points[:50, 1] = np.nan
    points[50:52] = 1e9
    pq.write_table(
        pa.table({"synapse_id": range(100), **{axis: points[:, i] for i, axis in enumerate("zyx")}}),
        tmp_path / "a.parquet",
    )
    result = read(tmp_path, Table.parse({"format": "table", "path": "a.parquet"}, "test"))
    assert len(result.synapses) == 48
    with pytest.raises(SynpipeError, match="a: only 48 of 50 positions, declared in nm, lie in the volume"):
        read(tmp_path, Table.parse({"format": "table", "path": "a.parquet", "min_inside": 0.97}, "test"))


def test_a_format_that_is_always_in_nm_is_checked_too(tmp_path):
    synapses = {str(i): dict(zip("zyx", point, strict=True)) for i, point in enumerate(voxels(FAFB, 50).tolist())}
    for name, content in (("synapses", synapses), ("skeletons", {}), ("hemi_lineages", {})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    files = {name: f"{name}.json" for name in ("synapses", "skeletons", "hemi_lineages")}
    with pytest.raises(SynpipeError, match="others are always in nm: convert the file"):
        read(tmp_path, SynisterV3(format="synister_v3", **files))
    result = read(tmp_path, SynisterV3(format="synister_v3", unit_checked=True, **files))
    assert len(result.synapses) == 50
    assert any("declared in nm, but look like" in note for note in result.notes)
