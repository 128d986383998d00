"""Neuroglancer links and the layer of synapses, read back with Neuroglancer's own parser, reader and client."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import neuroglancer
import numpy as np
import pyarrow as pa
import pytest
import yaml
from neuroglancer.read_precomputed_annotations import AnnotationReader

from synpipe.annotations.schema import SYNAPSE_SCHEMA, UNLABELLED
from synpipe.assets.graph import nodes, states
from synpipe.assets.manifest import read_manifest, write_manifest
from synpipe.assets.rejects import SHOWN_LINKS, show
from synpipe.assets.volume import find_viewer
from synpipe.datasets import NEUROTRANSMITTERS, Dataset, DatasetSpec
from synpipe.defs.show import as_metadata
from synpipe.errors import SynpipeError
from synpipe.reports.annotation_layer import CELL_SYNAPSES, UNKNOWN, annotation_layer, write_layer
from synpipe.store.files import read_table
from synpipe.volumes.neuroglancer import Viewer, image_layer
from synpipe.volumes.volume import Volume, VolumeSpec
from synpipe_tests.conftest import project_of, write_project
from synpipe_tests.support import web
from synpipe_tests.support.browser import CHROMIUM
from synpipe_tests.support.command import answer, files, invoke, refusal
from synpipe_tests.volumes.test_sources import (
    CHUNKED,
    OFFSET_NM,
    SHAPE,
    SIZE_NM,
    WRITERS,
    write_n5,
    write_zarr2,
)

SITE = "https://neuroglancer.example.org/app"
VOXEL = (3, 170, 200)
MIDDLE_NM = [offset + (index + 0.5) * size for offset, index, size in zip(OFFSET_NM, VOXEL, SIZE_NM, strict=True)]


def viewer_of(path: str, site: str = SITE, **spec: Any) -> Viewer:
    described = VolumeSpec.parse({"path": path, **spec}, "test")
    with Volume(described, Path("/nowhere")) as volume:
        return Viewer(site, image_layer(described, volume), tuple(volume.voxel_size_nm_zyx.tolist()))


# Links


def test_a_link_is_what_neuroglancer_reads():
    image = {"type": "image", "name": "em", "source": "precomputed://gs://bucket/a (b)/em"}
    link = Viewer(SITE, image, (40.0, 4.0, 4.0)).link((100.0, 50.0, 402.0), "9223372036854775807")
    assert link.startswith(f"{SITE}/#!%7B") and not set(link) & set(" ()[]<>'\"|{}")
    state = neuroglancer.parse_url(link)
    assert (list(state.dimensions.names), list(state.dimensions.units)) == (["x", "y", "z"], ["m"] * 3)
    assert state.dimensions.scales.tolist() == [4e-9, 4e-9, 40e-9]
    assert state.position.tolist() == [100.5, 12.5, 2.5]
    assert state.cross_section_scale * 640 == 256  # voxels of x and y on 640 pixels: a tile
    assert [layer.name for layer in state.layers] == ["em", "position"]
    assert state.layers["em"].source[0].url == image["source"]
    (point,) = state.layers["position"].layer.annotations
    assert (point.id, point.point.tolist()) == ("9223372036854775807", [100.5, 12.5, 2.5])
    # Python's writer and this one say the same state.
    assert neuroglancer.parse_url(neuroglancer.to_url(state)).to_json() == state.to_json()


def test_the_scale_is_of_the_smallest_side_of_a_voxel():
    link = Viewer(SITE, None, (4.0, 8.0, 8.0)).link((0, 0, 0), "1")
    assert neuroglancer.parse_url(link).cross_section_scale == pytest.approx(2 * 256 / 640)


def test_a_position_on_the_edge_of_a_section_stays_in_its_section():
    viewer = Viewer(SITE, None, (0.1, 4.6, 4.6))
    for section in range(1, 200):  # 3 × 0.1 is not 0.3
        assert neuroglancer.parse_url(viewer.link((section * 0.1, 0, 0), "1")).position[2] == section


def test_a_table_of_links_has_one_for_each_position():
    rows = pa.table(
        {"synapse_id": [2**63 - 1, None, 3], "x_nm": [4.0, 8.0, None], "y_nm": [4.0] * 3, "z_nm": [40.0] * 3}
    )
    first, second, third = Viewer(SITE, None, (40.0, 4.0, 4.0)).links(rows).to_pylist()
    assert neuroglancer.parse_url(first).layers[0].layer.annotations[0].id == str(2**63 - 1)
    assert neuroglancer.parse_url(second).position.tolist() == [2, 1, 1]
    assert third is None


@pytest.mark.parametrize(
    "site", ["neuroglancer.example.org", "ftp://host/", "https://", "https://host/#!{}", "javascript:1"]
)
def test_a_site_that_is_no_address_is_refused(site):
    spec = {"title": "t", "volume": {"path": "v.h5"}, "annotations": [{"format": "cremi", "path": "v.h5"}]}
    with pytest.raises(SynpipeError, match=r"neuroglancer.*address"):
        DatasetSpec.parse({**spec, "encoders": ["a"], "neuroglancer": site}, "x.yaml")
    assert DatasetSpec.parse({**spec, "encoders": ["a"], "neuroglancer": SITE + "/"}, "x.yaml").neuroglancer == SITE


def test_local_volumes_have_no_link(tmp_path):
    for kind in CHUNKED:
        WRITERS[kind](tmp_path / kind, np.ones(SHAPE, np.uint8))
        assert viewer_of(f"{kind.rstrip('23')}://{tmp_path / kind}").image is None


def test_an_intensity_window_is_that_of_the_layer(tmp_path):
    write_zarr2(tmp_path / "zarr", np.ones(SHAPE, np.uint16))
    with web.serve_folder(tmp_path) as address:
        image = viewer_of(f"zarr://{address}/zarr", intensity_window=[10, 900]).image
    assert image and image["shaderControls"] == {"normalized": {"range": [10, 900]}}


def write_ome(folder: Path, data: np.ndarray) -> None:
    """Two scales, of which the second is the volume; its first voxel begins where that of the first does."""
    fine = data.repeat(2, axis=1).repeat(2, axis=2)
    scales = {"0": (fine, [50, 2.3, 2.3], list(OFFSET_NM)), "1": (data, list(SIZE_NM), [100, -44.85, 10.35])}
    entries = []
    for name, (voxels, size, place) in scales.items():
        write_zarr2(folder / name, voxels)
        steps = [{"type": "scale", "scale": size}, {"type": "translation", "translation": place}]
        entries.append({"path": name, "coordinateTransformations": steps})
    axes = [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"]
    image = {"version": "0.4", "axes": axes, "datasets": entries}
    (folder / ".zattrs").write_text(
        json.dumps({"multiscales": [{**image, "coordinateTransformations": [{"type": "scale", "scale": [1, 1, 1]}]}]})
    )
    (folder / ".zgroup").write_text('{"zarr_format": 2}')


def write_everything(folder: Path, data: np.ndarray) -> dict[str, tuple[str, dict[str, Any]]]:
    """Volumes whose voxels and places are the same. Returns path, with {} for the server, and spec by name."""
    for kind in ("precomputed", "zarr3"):
        WRITERS[kind](folder / kind, data)
    write_n5(folder / "scales" / "s0", data.repeat(2, axis=1).repeat(2, axis=2), resolution=[2.3, 2.3, 50])
    write_n5(folder / "scales" / "s1", data, downsamplingFactors=[2, 2, 1])
    write_zarr2(folder / "bare", data)
    (folder / "bare" / ".zattrs").unlink()
    write_ome(folder / "ome", data)
    wanted = {"voxel_size_nm_zyx": SIZE_NM}
    return {
        "precomputed": ("precomputed://{}/precomputed", {}),
        "zarr3": ("zarr://{}/zarr3", {}),
        "scales": ("n5://{}/scales", wanted),
        "bare": ("zarr://{}/bare", {**wanted, "offset_nm_zyx": OFFSET_NM}),
        "ome": ("zarr://{}/ome", wanted),
    }


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_neuroglancer_shows_the_voxel_of_the_position_whatever_holds_it(tmp_path):
    """The client reads the volume through the link; what it shows at the middle is the voxel that is meant, and no other."""
    data = np.random.default_rng(0).integers(1, 256, SHAPE, dtype=np.uint8)
    volumes = write_everything(tmp_path, data)
    site = web.add_client(tmp_path)
    with web.serve_folder(tmp_path) as address, web.neuroglancer_page() as page:
        for name, (path, spec) in volumes.items():
            viewer = viewer_of(path.format(address), f"{address}/{site}", **spec)
            web.open_link(page, viewer.link(MIDDLE_NM, "1"), layers=2)
            assert web.value_at_middle(page, 0) == str(data[VOXEL]), name
            bounds = page.evaluate(
                "[viewer.coordinateSpace.value.bounds].map(b => [[...b.lowerBounds], [...b.upperBounds]])[0]"
            )
            assert bounds == [[2, -10, 2], [332, 310, 8]], name  # x, y, z, in voxels of the volume


# In the pipeline


def make(dataset: Dataset, *assets: str) -> None:
    for node in nodes(dataset):
        if node.name in assets:
            node.run(print)


@pytest.fixture(scope="module")
def remote(made: Dataset, tmp_path_factory) -> Any:
    """The small demo's volume as N5 behind a server, with some synapses that are rejected; up to `rejects`."""
    folder = tmp_path_factory.mktemp("remote")
    with Volume(made.spec.volume, made.base) as volume:
        voxels = volume.read(np.zeros(3), volume.shape_zyx)
        size = volume.voxel_size_nm_zyx.tolist()
    (folder / "served").mkdir()
    write_n5(folder / "served" / "n5", voxels, resolution=size[::-1], offset=[400.0, 0.0, 80.0])
    rows = (made.base / "synapses.csv").read_text().splitlines()
    datasets = folder / "data" / "datasets"
    with web.serve_folder(folder / "served") as address:
        project = write_project(folder, synthetic=None, volume={"path": f"n5://{address}/n5"}, neuroglancer=SITE)
        text = yaml.safe_load((datasets / "demo.yaml").read_text())
        text.pop("synthetic")
        text["annotations"][0]["min_inside"] = 0  # the volume's offset leaves a third of them outside
        (datasets / "demo.yaml").write_text(yaml.safe_dump(text))
        (datasets / "synapses.csv").write_text("\n".join([*rows, rows[1], "77,-9000,0,0"]) + "\n")
        make(project.dataset("demo"), "volume", "annotations", "synapses", "synapse_stacks", "rejects")
        yield project


def test_rejects_and_synapses_have_links(remote):
    dataset = remote.dataset("demo")
    rejects = read_table(dataset.rejects_path).to_pylist()
    assert rejects
    for row in rejects:
        nm = [row["x_nm"], row["y_nm"], row["z_nm"]]
        if None in nm:
            assert row["neuroglancer"] is None
            continue
        state = neuroglancer.parse_url(row["neuroglancer"])
        size = read_manifest(dataset, "volume").figures["voxel_size_nm_zyx"][::-1]
        np.testing.assert_allclose(state.position, np.array(nm) / size, atol=1e-6)
    synapse = read_table(dataset.synapses_path).slice(0, 1)
    link = answer(remote, "link", str(synapse["synapse_id"][0])).strip()
    assert link.startswith(SITE + "/#!")
    viewer = find_viewer(dataset)
    assert viewer and viewer.links(synapse).to_pylist() == [link]
    view = show(dataset, "", read_manifest(dataset, "rejects"))
    linked = [row["neuroglancer"] for row in rejects[:SHOWN_LINKS] if row["neuroglancer"]]
    shown = as_metadata(view, len(rejects), {})["neuroglancer"].value
    assert linked and all(f"]({one})" in shown for one in linked)
    assert "no synapse 12345678" in refusal(invoke(remote, "link", "12345678"))


def test_links_of_another_site_are_another_version(remote):
    text = remote.data / "datasets" / "demo.yaml"
    before, versions = text.read_text(), lambda: read_manifest(remote.dataset("demo"), "rejects").data_version
    was = versions()
    try:
        text.write_text(before.replace(SITE, "https://other.example.org"))
        assert {each.asset for each in states(remote.dataset("demo")) if each.state == "stale"} == {"rejects"}
        make(remote.dataset("demo"), "rejects")
        assert versions() != was
        link = read_table(remote.dataset("demo").rejects_path)["neuroglancer"][0].as_py()
        assert link.startswith("https://other.example.org/#!")
    finally:
        text.write_text(before)
    make(remote.dataset("demo"), "rejects")
    assert versions() == was


def test_neighbours_of_local_volumes_have_no_link(made):
    project = project_of(made)
    synapse_id = read_table(made.tiles_path)["synapse_id"][0].as_py()
    found = json.loads(answer(project, "search", str(synapse_id), "--json"))["neighbours"]
    assert {each["neuroglancer"] for group in found.values() for each in group} == {None}
    assert "local files" in refusal(invoke(project, "link", str(synapse_id)))
    assert read_table(made.rejects_path)["neuroglancer"].null_count == len(read_table(made.rejects_path))


def test_neighbours_of_remote_volumes_have_links(made, tmp_path):
    """Of a store whose volume was reached over a network: its manifest is what search looks at."""
    shutil.copytree(made.folder, tmp_path / "demo")
    dataset = dataclasses.replace(made, folder=tmp_path / "demo")
    manifest = read_manifest(dataset, "volume")
    layer = {"type": "image", "name": "em", "source": "precomputed://gs://bucket/em"}
    write_manifest(dataset, dataclasses.replace(manifest, facts=manifest.facts | {"neuroglancer": layer}))
    from synpipe.index.search import SynapseIndex

    index = SynapseIndex(dataset, "tiny", viewer=find_viewer(dataset))
    found = index.search(read_table(made.tiles_path)["synapse_id"][0].as_py())
    for one in (one for group in found.values() for one in group):
        place = np.array(one.position_nm) / manifest.facts["voxel_size_nm_zyx"][::-1]
        np.testing.assert_allclose(neuroglancer.parse_url(one.neuroglancer).position, place, atol=1e-6)


# The layer


def synapses(count: int, seed: int = 0, **columns: Any) -> pa.Table:
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.choice(2**62, count, replace=False))
    ids[-1] = 2**63 - 1
    classes = np.array([*NEUROTRANSMITTERS, None])[rng.integers(0, 7, count)]
    made_up = {
        "synapse_id": ids,
        **{f"{axis}_nm": rng.random(count) * extent for axis, extent in zip("xyz", (9e5, 5e5, 3e4), strict=True)},
        "neuron_id": pa.array(rng.integers(2**63 - 9, 2**63 - 1, count), mask=rng.random(count) < 0.2),
        "hemilineage": pa.nulls(count, pa.string()),
        "region": pa.array(np.array(["LAL", "AL", None])[rng.integers(0, 3, count)]),
        "neurotransmitter": pa.array(classes),
        "confidence": pa.array(rng.random(count), mask=rng.random(count) < 0.1),
        "source": pa.repeat("made up", count),
        "source_id": pa.nulls(count, pa.string()),
    }
    return pa.table({name: {**made_up, **columns}[name] for name in SYNAPSE_SCHEMA.names}).cast(SYNAPSE_SCHEMA)


def everything_in(reader: AnnotationReader) -> list[Any]:
    """What the spatial index holds, cell by cell, each of which must hold what lies in it."""
    found = []
    for level in reader.spatial:
        size, grid = np.array(level.metadata["chunk_size"]), level.metadata["grid_shape"]
        fullest = 0
        for cell in np.ndindex(*grid):
            if cell not in level:
                continue
            held = level[cell]
            fullest = max(fullest, len(held))
            low = np.array(reader.lower_bound) + np.array(cell) * size
            for one in held:
                assert (one.point >= low).all() and (one.point <= low + size).all()
            found += held
        assert fullest == level.metadata["limit"] <= CELL_SYNAPSES
        np.testing.assert_allclose(size * grid, np.subtract(reader.upper_bound, reader.lower_bound))
    return found


@pytest.mark.parametrize("count", [1, 6_000])
def test_every_synapse_is_in_every_index_once(tmp_path, count):
    table = synapses(count)
    write_layer(tmp_path / "layer", table, NEUROTRANSMITTERS, {"dataset": "d"}, "A title")
    reader = AnnotationReader(f"file://{tmp_path}/layer/")
    assert reader.coordinate_space.scales.tolist() == [1e-9] * 3 and reader.coordinate_space.units == ("m",) * 3
    rows = {row["synapse_id"]: row for row in table.to_pylist()}
    labels = {each.id: each.enum_labels for each in reader.properties}
    assert list(labels["neurotransmitter"]) == [*NEUROTRANSMITTERS, UNLABELLED]
    names = [each.id for each in reader.properties]
    assert "hemilineage" not in names  # nobody has one

    def assert_same(one: Any) -> dict[str, Any]:
        row, said = rows[int(one.id)], dict(zip(names, one.props, strict=True))
        np.testing.assert_allclose(one.point, [row["x_nm"], row["y_nm"], row["z_nm"]], rtol=1e-7)
        assert labels["neurotransmitter"][said["neurotransmitter"]] == (row["neurotransmitter"] or UNLABELLED)
        assert labels["source"][said["source"]] == "made up"
        if "region" in said:
            assert labels["region"][said["region"]] == (row["region"] or UNKNOWN)
        if "confidence" in said:
            np.testing.assert_equal(
                said["confidence"], np.float32(np.nan if row["confidence"] is None else row["confidence"])
            )
        return row

    found = everything_in(reader)
    assert len(reader.spatial) == (1 if count <= CELL_SYNAPSES else 2)
    assert sorted(int(one.id) for one in found) == sorted(rows)
    for one in found:
        assert_same(one)
    for synapse_id, row in rows.items():
        one = reader.by_id[synapse_id]
        assert_same(one)
        assert list(map(int, one.segments[0])) == ([] if row["neuron_id"] is None else [row["neuron_id"]])
    of_neurons = [
        (assert_same(one)["neuron_id"], neuron)
        for neuron in {row["neuron_id"] for row in rows.values()} - {None}
        for one in reader.relationships["neuron_id"][neuron]
    ]
    assert all(a == b for a, b in of_neurons)
    assert len(of_neurons) == sum(row["neuron_id"] is not None for row in rows.values())


def test_synapses_in_one_place_are_all_there(tmp_path):
    count = CELL_SYNAPSES * 2 + 7
    table = synapses(count, **{f"{axis}_nm": np.full(count, 100.0) for axis in "xyz"})
    write_layer(tmp_path / "layer", table, NEUROTRANSMITTERS, {}, "")
    found = everything_in(AnnotationReader(f"file://{tmp_path}/layer/"))
    assert sorted(int(one.id) for one in found) == table["synapse_id"].to_pylist()


def test_synapses_without_any_neuron_are_exported_too(tmp_path):
    table = synapses(20, neuron_id=pa.nulls(20, pa.int64()))
    write_layer(tmp_path / "layer", table, NEUROTRANSMITTERS, {}, "")
    reader = AnnotationReader(f"file://{tmp_path}/layer/")
    assert sorted(int(each.id) for each in everything_in(reader)) == table["synapse_id"].to_pylist()


def test_the_same_synapses_are_the_same_bytes_and_replace_only_an_earlier_export(tmp_path):
    table = synapses(700)
    for name in "ab":
        write_layer(tmp_path / name, table, NEUROTRANSMITTERS, {}, "")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    write_layer(tmp_path / "a", table.slice(0, 5), NEUROTRANSMITTERS, {}, "")
    assert files(tmp_path / "a") != files(tmp_path / "b")
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    with pytest.raises(SynpipeError, match="other holds something"):
        write_layer(other, table, NEUROTRANSMITTERS, {}, "")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "b", "other"]


def test_a_failed_export_leaves_the_earlier_one(tmp_path, monkeypatch):
    write_layer(tmp_path / "a", synapses(10), NEUROTRANSMITTERS, {}, "")
    before = files(tmp_path / "a")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SynpipeError, match="No space left"):
        write_layer(tmp_path / "a", synapses(20), NEUROTRANSMITTERS, {}, "")
    assert files(tmp_path / "a") == before and [each.name for each in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_neuroglancer_shows_the_layer_that_the_command_writes(made, tmp_path):
    site = web.add_client(tmp_path)
    with web.serve_folder(tmp_path) as address, web.neuroglancer_page() as page:
        folder = str(tmp_path / "layer")
        said = answer(project_of(made), "export-annotations", folder, "--url", f"{address}/layer/")
        link = said.split()[-1].replace(made.spec.neuroglancer, f"{address}/{site}")
        web.open_link(page, link, layers=2)
        layer = "viewer.layerManager.managedLayers[0].layer"
        held = f"""[...{layer}.annotationStates.states[0].source.spatiallyIndexedSources]
            .flatMap(level => [...level.chunks.values()])
            .flatMap(chunk => chunk.data?.serializedAnnotations.typeToIds.flat() ?? [])"""
        page.wait_for_function(f"({held}).length > 0")
        held = page.evaluate(held)
        ids = read_table(made.synapses_path)["synapse_id"].to_pylist()
        assert sorted(map(int, held)) == ids
        # Null once it is compiled; before, undefined; else the compiler's complaint.
        page.wait_for_function(f"{layer}.annotationDisplayState.shaderError.value === null")
    assert (
        neuroglancer.parse_url(link).layers["synapses"].layer.shader
        == annotation_layer("", made.spec.classes)["shader"]
    )
    assert "must start with" in refusal(invoke(project_of(made), "export-annotations", folder, "--url", "file:///tmp"))
