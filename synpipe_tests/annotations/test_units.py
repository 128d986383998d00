"""A wrong unit is reported with the one that fits. A correct unit is never an error, wherever the synapses lie."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synpipe.annotations import units
from synpipe.annotations.bounds import VolumeBounds
from synpipe.annotations.synister import SynisterV3
from synpipe.annotations.tables import PlainTable
from synpipe.annotations.units import UnitCheck
from synpipe.errors import SynpipeError
from synpipe_tests.support.annotations import Annotations, bounds_from_origin, read_annotations

FAFB = bounds_from_origin([7063 * 40, 134144 * 4, 248832 * 4], [40, 4, 4])
HEMIBRAIN = bounds_from_origin(np.array([41408, 39552, 34432]) * 8, [8, 8, 8])
# A volume of 125 sections that begins somewhere in the brain, like those of CREMI.
CUT_OUT = VolumeBounds(
    np.array([40_000.0, 80_000, 120_000]), np.array([45_000.0, 85_000, 125_000]), np.array([40.0, 4, 4])
)


def voxels(bounds: VolumeBounds, count: int, low=0.2, high=0.8) -> np.ndarray:
    """Draw whole voxels (n, 3), counted from the volume's own corner, evenly between two shares of every axis."""
    shape = (bounds.high_nm_zyx - bounds.low_nm_zyx) / bounds.voxel_size_nm_zyx
    return np.floor(np.random.default_rng(0).uniform(low, high, (count, 3)) * shape)


def check(points: np.ndarray, bounds: VolumeBounds, **options) -> list[str]:
    source = PlainTable.parse({"format": "table", "path": "points.csv", **options}, "test")
    assert source.to_nm(points).shape == points.shape
    unit_check = UnitCheck(source, bounds)
    for part in np.array_split(points, 7):
        unit_check.add(part, bounds.contain(source.to_nm(part) + np.array(source.shift_nm_zyx)))
    return unit_check.conclude()


VOXEL_40_4_4 = {"unit": "voxel", "voxel_size_nm_zyx": [40, 4, 4]}
VOXEL_8 = {"unit": "voxel", "voxel_size_nm_zyx": [8, 8, 8]}


@pytest.mark.parametrize(
    ("points", "bounds", "declared", "expected"),
    [
        (voxels(FAFB, 50) * FAFB.voxel_size_nm_zyx, FAFB, VOXEL_40_4_4, "`unit: nm` (100.0% inside)"),
        (voxels(HEMIBRAIN, 50) * 8 / 1000, HEMIBRAIN, VOXEL_8 | {"min_inside": 1, "shift_nm_zyx": [-3000] * 3}, "unit: um"),
        (voxels(HEMIBRAIN, 50) * 8, HEMIBRAIN, {"unit": "um"}, "`unit: nm` (100.0% inside)"),
        (voxels(CUT_OUT, 50), CUT_OUT, {}, "`unit: voxel` with `voxel_size_nm_zyx: [40, 4, 4]`, with `shift_nm_zyx: [40000,"),
        (voxels(CUT_OUT, 50) * CUT_OUT.voxel_size_nm_zyx, CUT_OUT, {}, "`unit: nm`, with `shift_nm_zyx: [40000, 80000, 120000]`"),
        (voxels(FAFB, 50)[:, ::-1], FAFB, VOXEL_40_4_4, "[40, 4, 4]`, with z, y, x taken from the current x, y, z (100.0% inside)"),
        (np.full((50, 3), 1e12), FAFB, {}, "may belong to another volume"),
    ],
    ids=["nm", "um", "not um", "voxels from the corner", "nm from the corner", "x and z exchanged", "nothing"],
)  # fmt: skip
def test_positions_outside_the_volume_are_reported_with_the_unit_that_would_fit(points, bounds, declared, expected):
    with pytest.raises(
        SynpipeError, match=r"points: only \d+ of 50 positions lie in the volume .* as declared"
    ) as error:
        check(points, bounds, **declared)
    assert expected in str(error.value)
    check(points, bounds, **declared | {"min_inside": 0, "unit_checked": True})


def test_the_source_sets_the_share_that_must_be_inside():
    points = voxels(FAFB, 100) * FAFB.voxel_size_nm_zyx
    points[:6] += 10e6
    with pytest.raises(SynpipeError, match="only 94 of 100 positions"):
        check(points, FAFB)
    assert check(points, FAFB, min_inside=0.94) == []
    assert check(points[1:], FAFB, min_inside=0.94) == check(points[2:], FAFB) == []


def test_a_few_synapses_outside_are_no_error(tmp_path):
    points = voxels(FAFB, 19) * FAFB.voxel_size_nm_zyx
    points[:18] += 10e6
    assert check(points, FAFB) == []
    points += 10e6
    (note,) = check(points, FAFB)
    assert "only 0 of 19 positions" in note


@pytest.mark.parametrize("count", [20, 1000])
@pytest.mark.parametrize("bounds", [FAFB, HEMIBRAIN], ids=["FAFB", "hemibrain"])
def test_voxels_declared_as_nm_are_reported_though_they_stay_inside(bounds, count):
    with pytest.raises(SynpipeError, match="declared in nm, but look like `unit: voxel`") as error:
        check(voxels(bounds, count), bounds)
    assert "not multiples of its voxel size; they span" in str(error.value)
    assert units._numbers(bounds.voxel_size_nm_zyx) in str(error.value)
    (note,) = check(voxels(bounds, count), bounds, unit_checked=True)
    assert "look like `unit: voxel`" in note
    assert check(voxels(bounds, count), bounds, unit="voxel", voxel_size_nm_zyx=bounds.voxel_size_nm_zyx.tolist()) == []


def test_micrometres_declared_as_nm_are_reported():
    with pytest.raises(SynpipeError, match=r"look like `unit: um`: they span 59, 57, 60 % of its axes"):
        check(voxels(FAFB, 100) * FAFB.voxel_size_nm_zyx / 1000, FAFB)


@pytest.mark.parametrize(
    ("points", "notes"),
    [
        (voxels(FAFB, 500, 0, 0.02) * FAFB.voxel_size_nm_zyx, 0),  # on the lattice
        ((voxels(FAFB, 500, 0, 0.02) + 0.5) * FAFB.voxel_size_nm_zyx, 0),
        (voxels(FAFB, 500, 0, 0.02) * FAFB.voxel_size_nm_zyx + 0.3, 0),  # off the lattice, but not whole numbers
        (np.round(voxels(FAFB, 500, 0, 0.02) * FAFB.voxel_size_nm_zyx * 1.01), 1),  # rounded: only one sign
        (np.random.default_rng(0).integers(0, 3000, (500, 3)).astype(float), 1),
        (np.random.default_rng(0).integers(0, 30, (19, 3)).astype(float), 0),  # too few points to judge
    ],
    ids=["lattice", "centres", "off the lattice", "rounded", "whole numbers", "few"],
)
def test_a_cluster_in_the_corner_of_a_large_volume_is_no_error(points, notes):
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
def test_the_correct_unit_is_never_an_error(size, shape, offset, region, count, centred):
    """This holds in any volume, for synapses anywhere in it, in nm (corners or centres of voxels) and in voxels."""
    bounds = VolumeBounds(offset.astype(float), offset + shape * size, size)
    indices = np.minimum(np.floor(np.random.default_rng(0).uniform(*region, (count, 3)) * shape), shape - 1)
    check((indices + centred) * size + offset, bounds)
    check(indices, bounds, unit="voxel", voxel_size_nm_zyx=size.tolist(), shift_nm_zyx=offset.tolist())


def test_the_sample_is_even_and_bounded(monkeypatch):
    monkeypatch.setattr(units, "SAMPLE_SIZE", 100)
    unit_check = UnitCheck(PlainTable.parse({"format": "table", "path": "a.csv"}, "test"), FAFB)
    numbers = np.repeat(np.arange(12_345.0)[:, None], 3, axis=1)
    for part in np.split(numbers, [1, 40, 41, 900, 5000, 5001, 12_000]):
        unit_check.add(part, np.full(len(part), True))
        assert sum(map(len, unit_check._sample)) <= 200
    kept = np.concatenate(unit_check._sample)[:, 0]
    assert len(kept) >= 90
    assert len(set(np.diff(kept))) == 1


# Through the readers.


def read(folder, source) -> Annotations:
    return read_annotations([source], folder, FAFB, ["gaba"])


def test_only_rows_with_coordinates_are_counted(tmp_path):
    points = voxels(FAFB, 100) * FAFB.voxel_size_nm_zyx
    points[:50, 1] = np.nan
    points[50:52] = 1e9
    pq.write_table(
        pa.table({"synapse_id": range(100), **{axis: points[:, i] for i, axis in enumerate("zyx")}}),
        tmp_path / "a.parquet",
    )
    result = read(tmp_path, PlainTable.parse({"format": "table", "path": "a.parquet"}, "test"))
    assert len(result.synapses) == 48
    with pytest.raises(
        SynpipeError, match=r"a: only 48 of 50 positions lie in the volume .* if they are read as nm, as declared"
    ):
        read(tmp_path, PlainTable.parse({"format": "table", "path": "a.parquet", "min_inside": 0.97}, "test"))


def test_a_format_without_the_key_unit_is_checked_too(tmp_path):
    synapses = {str(i): dict(zip("zyx", point, strict=True)) for i, point in enumerate(voxels(FAFB, 50).tolist())}
    for name, content in (("synapses", synapses), ("skeletons", {}), ("hemi_lineages", {})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    files = {name: f"{name}.json" for name in ("synapses", "skeletons", "hemi_lineages")}
    with pytest.raises(SynpipeError, match="always reads nm: convert the file"):
        read(tmp_path, SynisterV3(format="synister_v3", **files))
    result = read(tmp_path, SynisterV3(format="synister_v3", unit_checked=True, **files))
    assert len(result.synapses) == 50
    assert any("declared in nm, but look like" in note for note in result.notes)
