"""Every kind of volume gives the same tiles. Volumes that lack data, or contradict their spec, are refused with a reason."""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from synpipe.assets.graph import nodes, states
from synpipe.assets.volume import status_of_files
from synpipe.defs.loading import explain_absence
from synpipe.errors import SynpipeError
from synpipe.store.files import read_table
from synpipe.synthetic.demo import SyntheticSpec, make_demo
from synpipe.tiles.tile import TileSpec
from synpipe.volumes.volume import Volume, VolumeSpec, to_uint8
from synpipe_tests.conftest import REPOSITORY, SMALL_DEMO, write_project
from synpipe_tests.support.command import invoke
from synpipe_tests.support.extraction import cut_out

SIZE_NM, OFFSET_NM = (50.0, 4.6, 4.6), (100.0, -46.0, 9.2)
OFFSET_VOXELS_XYZ = [2, -10, 2]
SHAPE = (6, 320, 330)
CHUNK = (4, 64, 64)
STATED = {"voxel_size_nm_zyx": SIZE_NM, "offset_nm_zyx": OFFSET_NM}
CHUNKED = ("precomputed", "n5", "zarr2", "zarr3")
KINDS = ("hdf5", *CHUNKED, "png", "tiff")


# Volumes of every kind, written by common libraries


def create(folder: Path, data: np.ndarray, **spec: Any) -> None:
    spec["kvstore"] = {"driver": "file", "path": f"{folder}/"}
    ts.open(spec, create=True, open=True).result()[...].write(data).result()


def write_hdf5(folder: Path, data: np.ndarray) -> None:
    folder.mkdir()
    with h5py.File(folder / "volume.h5", "w") as file:
        written = file.create_dataset("volumes/raw", data=data)
        written.attrs["resolution"], written.attrs["offset"] = SIZE_NM, OFFSET_NM


def write_precomputed(folder: Path, data: np.ndarray, size_nm=SIZE_NM, encoding: str = "raw", **scale: Any) -> None:
    """Writing to the same folder twice, with different voxel sizes, makes a volume with two scales."""
    create(
        folder,
        data.T[..., None],
        driver="neuroglancer_precomputed",
        multiscale_metadata={"type": "image", "data_type": str(data.dtype), "num_channels": 1},
        scale_metadata={
            "size": data.shape[::-1],
            "resolution": size_nm[::-1],
            "voxel_offset": OFFSET_VOXELS_XYZ,
            "chunk_size": CHUNK[::-1],
            "encoding": encoding,
            **scale,
        },
    )


def write_n5(folder: Path, data: np.ndarray, **attributes: Any) -> None:
    said = {"resolution": SIZE_NM[::-1], "offset": OFFSET_NM[::-1], "units": ["nm"] * 3, **attributes}
    layout = {"dataType": str(data.dtype), "dimensions": data.shape[::-1], "blockSize": CHUNK[::-1]}
    create(folder, data.T, driver="n5", metadata={**layout, "compression": {"type": "gzip"}})
    amend(folder / "attributes.json", **said)


def write_zarr2(folder: Path, data: np.ndarray, **attributes: Any) -> None:
    layout = {"shape": data.shape, "chunks": CHUNK, "dtype": data.dtype.str}
    create(folder, data, driver="zarr", metadata={**layout, "compressor": {"id": "zlib", "level": 1}})
    said = {"resolution": SIZE_NM, "offset": OFFSET_NM, "units": ["nm"] * 3, **attributes}
    (folder / ".zattrs").write_text(json.dumps(said))


def write_zarr3(folder: Path, data: np.ndarray, **attributes: Any) -> None:
    grid = {"name": "regular", "configuration": {"chunk_shape": CHUNK}}
    layout = {"shape": data.shape, "data_type": str(data.dtype), "chunk_grid": grid}
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    said = {"resolution": SIZE_NM, "offset": OFFSET_NM, "units": ["nm"] * 3, **attributes}
    create(folder, data, driver="zarr3", metadata={**layout, "codecs": codecs, "attributes": said})


def write_sections(folder: Path, data: np.ndarray, suffix: str) -> None:
    folder.mkdir()
    for index, section in enumerate(data):
        Image.fromarray(section).save(
            folder / f"larva_4.6nm_{index + 7}{suffix}"
        )  # 7 … 12, so alphabetical order is wrong


WRITERS: dict[str, Callable[[Path, np.ndarray], None]] = {
    "hdf5": write_hdf5,
    "precomputed": write_precomputed,
    "n5": write_n5,
    "zarr2": write_zarr2,
    "zarr3": write_zarr3,
    "png": partial(write_sections, suffix=".png"),
    "tiff": partial(write_sections, suffix=".tif"),
}
PATHS = {"hdf5": "{}/volume.h5", "png": "{}", "tiff": "{}", "zarr2": "zarr://{}", "zarr3": "zarr://{}"}


def amend(document: Path, **changes: Any) -> None:
    """Set keys of a JSON document; those that are None are removed."""
    content = {**json.loads(document.read_text()), **changes}
    document.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def opened(kind: str, place: Path | str, **spec: Any) -> Volume:
    if kind in ("png", "tiff"):
        spec = {**STATED, **spec}  # images do not state it
    path = PATHS.get(kind, kind + "://{}").format(place)
    return Volume(VolumeSpec.parse({"path": path, **spec}, "test"), Path("/nowhere"))


def refusal(action: Callable[[], Any], *words: str) -> str:
    with pytest.raises(SynpipeError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def everything(volume: Volume) -> np.ndarray:
    return volume.read(np.zeros(3), volume.shape_zyx)


@pytest.fixture(scope="module")
def grey() -> np.ndarray:
    return np.random.default_rng(0).integers(1, 256, SHAPE, dtype=np.uint8)


@pytest.fixture(scope="module")
def em(real_em: Path) -> np.ndarray:
    with h5py.File(real_em / "vnc_stack1.h5") as file:
        return file["volumes/raw"][5 : 5 + SHAPE[0], 300 : 300 + SHAPE[1], 400 : 400 + SHAPE[2]]


@pytest.fixture(scope="module")
def real_volumes(em: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same crop of real EM as every kind of volume, one folder per kind."""
    folder = tmp_path_factory.mktemp("volumes")
    for kind, write in WRITERS.items():
        write(folder / kind, em)
    write_precomputed(folder / "jpeg", em, encoding="jpeg", jpeg_quality=90)
    return folder


class Server(ThreadingHTTPServer):
    """Serves a folder over HTTP. requests: the requested paths. status: if set, the status of every answer. etag: if set, the
    ETag of every answer."""

    request_queue_size = 256  # like real servers; further connections are reset

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.requests: list[str] = []
        self.status: int | None = None
        self.etag: str | None = None
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        if self.server.status:
            self.send_error(self.server.status)
        else:
            super().do_GET()

    def end_headers(self) -> None:
        if self.server.etag:
            self.send_header("ETag", f'"{self.server.etag}"')
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@pytest.fixture
def serve() -> Iterator[Callable[[Path], Server]]:
    servers: list[Server] = []

    def start(folder: Path) -> Server:
        servers.append(Server(folder))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


# The same tiles


def tiles_of(volume: Volume) -> list[tuple[bytes, dict[str, Any]]]:
    """Tiles inside the volume, at its borders and at its corners."""
    spec = TileSpec()
    corners = np.stack(np.meshgrid([0.5, 2.5, 5.5], [0, 127.7, 319], [3, 160, 329.5], indexing="ij"), axis=-1).reshape(
        -1, 3
    )
    starts = volume.window_starts(OFFSET_NM + corners * SIZE_NM, spec.window_zyx(volume.voxel_size_nm_zyx))
    found = [cut_out(volume, start, spec) for start in starts]
    return [(b"" if tile is None else tile.tobytes(), row) for tile, row in found]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tiles_byte_for_byte(real_volumes: Path, kind: str) -> None:
    with opened("hdf5", real_volumes / "hdf5") as reference, opened(kind, real_volumes / kind, **STATED) as volume:
        np.testing.assert_allclose(volume.voxel_size_nm_zyx, SIZE_NM, rtol=1e-12)
        np.testing.assert_allclose(volume.offset_nm_zyx, OFFSET_NM, rtol=1e-12)
        assert volume.shape_zyx.tolist() == list(SHAPE)
        expected = tiles_of(reference)
        assert tiles_of(volume) == expected
    assert len({content for content, _ in expected if content}) == 27


@pytest.mark.parametrize("kind", CHUNKED)
def test_the_same_tiles_over_http(real_volumes: Path, serve: Callable[[Path], Server], kind: str) -> None:
    server = serve(real_volumes)
    with opened("hdf5", real_volumes / "hdf5") as reference, opened(kind, f"{server.url}/{kind}") as volume:
        np.testing.assert_allclose(volume.offset_nm_zyx, OFFSET_NM, rtol=1e-12)
        assert tiles_of(volume) == tiles_of(reference)
    documents = ("info", ".json", ".zarray", ".zattrs")
    chunks = [path for path in server.requests if not path.endswith(documents)]
    assert len(chunks) == len(set(chunks)) == 2 * 5 * 6  # 27 tiles fetch each chunk once


@pytest.mark.parametrize("over_http", [False, True])
def test_jpeg_within_its_loss(real_volumes: Path, serve: Callable, em: np.ndarray, over_http: bool) -> None:
    place = f"{serve(real_volumes).url}/jpeg" if over_http else real_volumes / "jpeg"
    with opened("precomputed", place) as volume:
        loss = np.abs(everything(volume).astype(int) - em)
    assert 0 < loss.mean() < 5 and loss.max() < 60


def test_relative_paths_start_at_the_folder_of_the_yaml_file(tmp_path: Path, grey: np.ndarray) -> None:
    write_n5(tmp_path / "fly #1 50%20" / "volume", grey)
    with Volume(VolumeSpec(path="n5://fly #1 50%20/volume/"), tmp_path) as volume:
        np.testing.assert_array_equal(everything(volume), grey)


@pytest.mark.slow
def test_a_data_set_over_http_end_to_end(tmp_path: Path, serve: Callable[[Path], Server]) -> None:
    """A remote volume gives the same stacks as the local file. Assets stay fresh while the server is down, and checking that
    sends no request."""
    source = tmp_path / "source"
    make_demo(source, SyntheticSpec.parse(SMALL_DEMO["synthetic"], "test"), lambda message: None)
    with h5py.File(source / "volume.h5") as file:
        data, said = file["volumes/raw"][:], dict(file["volumes/raw"].attrs)
    write_zarr3(source / "volume.zarr", data, resolution=list(said["resolution"]), offset=list(said["offset"]))
    server = serve(source)
    made = []
    for name, path in (("local", f"{source}/volume.h5"), ("remote", f"zarr://{server.url}/volume.zarr")):
        annotations = [{**SMALL_DEMO["annotations"][0], "path": f"{source}/synapses.csv"}]
        project = write_project(tmp_path / name, synthetic=None, volume={"path": path}, annotations=annotations)
        invoke(project, "materialize", "-s", "+rgb_tiles")
        columns = ["synapse_id", "start_z", "start_y", "start_x", "content_hash", "missing_sections"]
        made.append(read_table(project.dataset("demo").tiles_path, columns).sort_by("synapse_id"))
    assert made[0].equals(made[1]) and len(made[0]) > 50
    server.status, server.requests = 503, []
    found = {state.asset: state.state for state in states(project.dataset("demo"))}
    assert {found[asset] for asset in ("volume", "synapses", "synapse_stacks", "rgb_tiles")} == {"fresh"}
    assert server.requests == []


# Scales, sizes, offsets


def test_a_scale_is_chosen_by_its_voxel_size(tmp_path: Path, grey: np.ndarray) -> None:
    half = np.ascontiguousarray(grey[:, ::2, ::2])
    write_precomputed(tmp_path / "v", half, size_nm=(50.0, 9.2, 9.2), voxel_offset=[1, -5, 2])  # the coarse one first
    write_precomputed(tmp_path / "v", grey)
    for size, data, offset in ((SIZE_NM, grey, OFFSET_NM), ((50, 9.2, 9.2), half, (100, -46, 9.2))):
        with opened("precomputed", tmp_path / "v", voxel_size_nm_zyx=size) as volume:
            np.testing.assert_array_equal(everything(volume), data)
            np.testing.assert_allclose(volume.offset_nm_zyx, offset)
    several = refusal(lambda: opened("precomputed", tmp_path / "v"), "several scales", "volume.voxel_size_nm_zyx")
    assert "[50.0, 4.6, 4.6]" in several and "[50.0, 9.2, 9.2]" in several
    wrong = {"voxel_size_nm_zyx": (4.6, 4.6, 50)}
    refusal(
        lambda: opened("precomputed", tmp_path / "v", **wrong), "no scales of [4.6, 4.6, 50.0] nm", "[50.0, 4.6, 4.6]"
    )


def test_scales_of_n5(tmp_path: Path, grey: np.ndarray) -> None:
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "attributes.json").write_text('{"n5": "2.0.0"}')
    half = np.ascontiguousarray(grey[:, ::2, ::2])
    pixels = {"resolution": None, "units": None, "offset": None}
    write_n5(tmp_path / "v/s0", grey, **pixels, pixelResolution={"unit": "um", "dimensions": [0.0046, 0.0046, 0.05]})
    write_n5(tmp_path / "v/s1", half, **pixels, pixelResolution={"unit": "um", "dimensions": [0.0092, 0.0092, 0.05]})
    with opened("n5", tmp_path / "v", voxel_size_nm_zyx=(50, 9.2, 9.2)) as volume:
        np.testing.assert_array_equal(everything(volume), half)
        assert volume.offset_nm_zyx.tolist() == [0, 0, 0]
    with opened("n5", tmp_path / "v/s0") as volume:
        np.testing.assert_allclose(volume.voxel_size_nm_zyx, SIZE_NM)


@pytest.mark.parametrize("version", [2, 3])
def test_scales_of_ome_zarr(tmp_path: Path, grey: np.ndarray, version: int) -> None:
    """Five axes, micrometres, and translations that refer to centres of voxels, as ome-zarr writes them."""
    folder, half = tmp_path / "v", np.ascontiguousarray(grey[:, ::2, ::2])
    axes = [{"name": name, "type": "other"} for name in "tc"]
    axes += [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"]
    datasets = []
    for name, data, size, shift in (("0", grey, 0.0046, 0.01), ("1", half, 0.0092, 0.01 + 0.0023)):
        layout = {"shape": (1, 1, *data.shape)}
        if version == 2:
            layout |= {"chunks": (1, 1, *CHUNK), "dtype": "|u1", "compressor": None, "dimension_separator": "/"}
        else:
            grid = {"name": "regular", "configuration": {"chunk_shape": (1, 1, *CHUNK)}}
            layout |= {"data_type": "uint8", "chunk_grid": grid}
        create(folder / name, data[None, None], driver="zarr" if version == 2 else "zarr3", metadata=layout)
        steps = [
            {"type": "scale", "scale": [1, 1, 0.05, size, size]},
            {"type": "translation", "translation": [0, 0, 1, shift, shift]},
        ]
        datasets.append({"path": name, "coordinateTransformations": steps})
    image = {"multiscales": [{"axes": axes, "datasets": datasets}]}
    if version == 2:
        (folder / ".zgroup").write_text('{"zarr_format": 2}')
        (folder / ".zattrs").write_text(json.dumps(image))
    else:
        group = {"zarr_format": 3, "node_type": "group", "attributes": {"ome": {"version": "0.5", **image}}}
        (folder / "zarr.json").write_text(json.dumps(group))
    for size, data in ((4.6, grey), (9.2, half)):
        with opened("zarr2", folder, voxel_size_nm_zyx=(50, size, size)) as volume:
            np.testing.assert_array_equal(everything(volume), data)
            np.testing.assert_allclose(volume.offset_nm_zyx, (1000, 10, 10))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("png", "tiff")])
@pytest.mark.parametrize(
    ("key", "value"),
    [("voxel_size_nm_zyx", (4.6, 4.6, 50)), ("offset_nm_zyx", (100, -46, 9.3)), ("offset_nm_zyx", (0, 0, 0))],
)
def test_a_spec_that_contradicts_the_volume(
    tmp_path: Path, grey: np.ndarray, kind: str, key: str, value: tuple
) -> None:
    WRITERS[kind](tmp_path / "v", grey)
    refusal(lambda: opened(kind, tmp_path / "v", **{key: value}), key, str(value[2]), str(tmp_path / "v"))


@pytest.mark.parametrize("write", [write_n5, write_zarr2, write_zarr3])
@pytest.mark.parametrize("unsaid", [{"units": None}, {"resolution": None}, {"units": ["px"] * 3}])
def test_a_volume_without_known_units_needs_its_voxel_size_in_the_spec(tmp_path, grey, write, unsaid) -> None:
    kind, folder = write.__name__.removeprefix("write_"), tmp_path / "v"
    write(folder, grey, **unsaid)
    refusal(lambda: opened(kind, folder), "does not state its voxel size", "volume.voxel_size_nm_zyx")
    with opened(kind, folder, voxel_size_nm_zyx=(40, 4, 4)) as volume:
        assert volume.voxel_size_nm_zyx.tolist() == [40, 4, 4]


def test_axes_that_are_named_are_put_in_order(tmp_path: Path, grey: np.ndarray) -> None:
    said = {"resolution": SIZE_NM[::-1], "offset": OFFSET_NM[::-1], "_ARRAY_DIMENSIONS": ["x", "y", "z"]}
    write_zarr2(tmp_path / "v", np.ascontiguousarray(grey.T), **said)
    with opened("zarr2", tmp_path / "v", **STATED) as volume:
        np.testing.assert_array_equal(everything(volume), grey)


def test_other_axes_than_those_of_space(tmp_path: Path, grey: np.ndarray) -> None:
    create(tmp_path / "v", np.stack([grey, grey]), driver="zarr", metadata={"shape": (2, *SHAPE), "dtype": "|u1"})
    refusal(lambda: opened("zarr2", tmp_path / "v", **STATED), "axes", "z, y, x")


def test_a_step_in_nm_is_a_whole_number_of_sections() -> None:
    hemibrain, fafb = np.array([8.0, 8, 8]), np.array([40.0, 4, 4])
    spec = TileSpec(section_step_nm=40)
    assert (spec.section_step(hemibrain), spec.section_step(fafb), TileSpec().section_step(hemibrain)) == (5, 1, 1)
    assert spec.window_zyx(hemibrain) == (11, 256, 256)
    for step, size, words in ((35, hemibrain, "set it to 32"), (40, np.array([50, 4.6, 4.6]), "set it to 50")):
        refusal(
            lambda step=step, size=size: TileSpec(section_step_nm=step).section_step(size), "section_step_nm", words
        )


# Intensity windows


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 65_535), st.integers(0, 65_534), st.integers(1, 65_535))
def test_windows_round_halves_up_and_exactly(value: int, low: int, span: int) -> None:
    high = low + span
    expected = int(Fraction(255 * (min(max(value, low), high) - low), span) + Fraction(1, 2))
    for dtype in (np.uint16, ">u2", np.float32, np.float64):
        assert to_uint8(np.array([value]).astype(dtype), (low, high))[0] == expected


def test_windows_of_floats() -> None:
    values = np.array([-np.inf, -1, 0, 0.25, 0.5, 1, 7, np.inf, np.nan], np.float32)
    assert to_uint8(values, (0.0, 1.0)).tolist() == [0, 0, 0, 64, 128, 255, 255, 255, 0]


windows = st.tuples(st.integers(0, 40_000), st.integers(1, 60_000)).map(lambda window: (window[0], sum(window)))


@pytest.fixture(scope="module", params=[np.uint16, np.float32], ids=["uint16", "float32"])
def deep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, Path]:
    """16-bit values and floats in every kind of volume that supports them; PNG has no floats."""
    data = np.random.default_rng(0).integers(0, 2**16, (3, 20, 30)).astype(request.param)
    folder = tmp_path_factory.mktemp("deep")
    for kind, write in WRITERS.items():
        if (kind, data.dtype.kind) != ("png", "f"):
            write(folder / kind, data)
    return data, folder


@settings(deadline=None, derandomize=True, max_examples=15)
@given(windows)
def test_windows_are_the_same_for_all_kinds(deep: tuple[np.ndarray, Path], window: tuple[int, int]) -> None:
    data, folder = deep
    expected = to_uint8(data, window)
    for place in folder.iterdir():
        with opened(place.name, place, intensity_window=window) as volume:
            found = everything(volume)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, expected)


def test_a_window_is_required_for_deep_values_and_refused_for_uint8(deep, tmp_path: Path, grey: np.ndarray) -> None:
    data, folder = deep
    for place in folder.iterdir():
        refusal(lambda place=place: opened(place.name, place), str(data.dtype), "volume.intensity_window")
    write_zarr2(tmp_path / "v", grey)
    refusal(lambda: opened("zarr2", tmp_path / "v", intensity_window=(0, 255)), "remove `volume.intensity_window`")
    for window in ((5, 5), (9, 1), (0, float("nan"))):
        refusal(lambda window=window: opened("zarr2", tmp_path / "v", intensity_window=window), "intensity_window")


def test_the_window_is_part_of_the_fingerprint(deep: tuple[np.ndarray, Path]) -> None:
    place = deep[1] / "n5"
    prints = [opened("n5", place, intensity_window=(0, high)).fingerprint() for high in (100, 200, 100)]
    assert prints[0] == prints[2] != prints[1]


# Volumes that are absent, damaged or out of reach


def first_chunk(folder: Path) -> Path:
    """The file of the chunk that holds voxel 0, 0, 0."""
    chunks = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name[0].isdecimal()]
    return next(path for path in chunks if path.name.startswith("2-66_-10-54_2-6") or "-" not in path.name)


@pytest.mark.parametrize("kind", CHUNKED)
@pytest.mark.parametrize("over_http", [False, True])
def test_a_missing_chunk_is_not_black(tmp_path: Path, grey: np.ndarray, serve, kind: str, over_http: bool) -> None:
    WRITERS[kind](tmp_path / "v", grey)
    first_chunk(tmp_path / "v").unlink()
    place = f"{serve(tmp_path).url}/v" if over_http else tmp_path / "v"
    with opened(kind, place) as volume:
        refusal(lambda: everything(volume), "holds nothing at voxels", str(place))
        tile, row = cut_out(volume, np.array([0, 0, 0]), TileSpec())
        assert tile is None and row["reason"] == "missing_chunk" and str(place) in row["detail"]
        tile, row = cut_out(volume, np.array([2, 64, 64]), TileSpec())  # the other synapses still get their tiles
        assert tile is not None


@pytest.mark.parametrize("kind", [*CHUNKED, "jpeg"])
@pytest.mark.parametrize("over_http", [False, True])
def test_a_truncated_chunk_is_an_error(tmp_path: Path, grey: np.ndarray, serve, kind: str, over_http: bool) -> None:
    write = {**WRITERS, "jpeg": partial(write_precomputed, encoding="jpeg")}[kind]
    write(tmp_path / "v", grey)
    kind = "precomputed" if kind == "jpeg" else kind
    chunk = first_chunk(tmp_path / "v")
    chunk.write_bytes(chunk.read_bytes()[:-100])
    place = f"{serve(tmp_path).url}/v" if over_http else tmp_path / "v"
    with opened(kind, place) as volume:
        refusal(lambda: cut_out(volume, np.array([0, 0, 0]), TileSpec()), "cannot be read at voxels z 0–3", str(place))


@pytest.mark.parametrize("kind", CHUNKED)
def test_a_place_with_no_volume(tmp_path: Path, serve: Callable[[Path], Server], kind: str) -> None:
    no_metadata = f"has no {kind.rstrip('23')} metadata"
    refusal(lambda: opened(kind, f"{serve(tmp_path).url}/none"), no_metadata, "volume.path")
    refusal(lambda: opened(kind, tmp_path), no_metadata, str(tmp_path))
    refusal(lambda: opened(kind, tmp_path / "none"), "does not exist", "volume.path")


def test_a_server_that_refuses(real_volumes: Path, serve: Callable[[Path], Server]) -> None:
    server = serve(real_volumes)
    with opened("precomputed", f"{server.url}/precomputed") as volume:
        server.status = 403
        message = refusal(lambda: cut_out(volume, np.array([0, 0, 0]), TileSpec()), "permission denied", server.url)
    assert "403" in message
    refusal(lambda: opened("precomputed", f"{server.url}/precomputed"), "cannot be opened", "403")


def test_a_server_that_is_not_there_is_given_up(serve: Callable[[Path], Server], tmp_path: Path, monkeypatch) -> None:
    from synpipe.volumes import chunked as volume_chunked

    monkeypatch.setitem(volume_chunked.RETRIES, "max_retries", 2)
    server = serve(tmp_path)
    server.status = 503
    refusal(lambda: opened("precomputed", server.url), "cannot be opened", "503", "try again")
    assert len(server.requests) in (2, 3)  # whether the first attempt counts depends on the version of tensorstore


@pytest.mark.parametrize(
    ("kind", "document", "content"),
    [
        ("precomputed", "info", "{"),
        ("precomputed", "info", "{}"),
        ("precomputed", "info", "[]"),
        ("precomputed", "info", '{"scales": [{}]}'),
        ("n5", "attributes.json", '{"dimensions": 3}'),
        ("zarr3", "zarr.json", "{}"),
        ("zarr2", ".zarray", '{"shape": [1, 2, 3]}'),
        ("zarr2", ".zattrs", '{"resolution": 4, "units": ["nm"]}'),
        ("zarr2", ".zattrs", '{"resolution": [4, 4, "a"], "units": ["nm", "nm", "nm"]}'),
    ],
)
def test_documents_that_are_wrong(tmp_path: Path, grey: np.ndarray, kind: str, document: str, content: str) -> None:
    WRITERS[kind](tmp_path / "v", grey)
    (tmp_path / "v" / document).write_text(content)
    refusal(lambda: opened(kind, tmp_path / "v"), str(tmp_path / "v"))


@pytest.mark.parametrize(
    "path", ["gs://bucket/volume", "https://host/volume", "tiff://folder", "n5://ftp://host/volume", "n5://gs://a://b"]
)
def test_paths_of_no_known_kind(path: str) -> None:
    message = refusal(lambda: VolumeSpec.parse({"path": path}, "x.yaml"), "x.yaml", "precomputed://", "gs://")
    assert path in message


def test_a_data_set_name_is_for_hdf5_only() -> None:
    refusal(lambda: VolumeSpec.parse({"path": "n5://volume", "dataset": "volumes/raw"}, "x.yaml"), "HDF5")


# Sections


def test_folders_that_are_not_stacks_of_sections(tmp_path: Path, grey: np.ndarray) -> None:
    def stack(name: str) -> Path:
        write_sections(tmp_path / name, grey, ".png")
        return tmp_path / name

    (tmp_path / "empty").mkdir()
    refusal(lambda: opened("png", tmp_path / "empty"), "without PNG or TIFF")
    (stack("gap") / "larva_4.6nm_9.png").unlink()
    refusal(lambda: opened("png", tmp_path / "gap"), "leave out section 9")
    shutil.copy(stack("twice") / "larva_4.6nm_9.png", tmp_path / "twice" / "other_09.png")
    refusal(lambda: opened("png", tmp_path / "twice"), "same number")
    Image.fromarray(grey[0]).save(stack("named") / "overview.png")
    refusal(lambda: opened("png", tmp_path / "named"), "overview.png", "no number")
    Image.fromarray(grey[0]).convert("RGB").save(stack("colour") / "larva_4.6nm_7.png")
    refusal(lambda: opened("png", tmp_path / "colour"), "grey")
    write_n5(tmp_path / "n5", grey)
    refusal(lambda: opened("png", tmp_path / "n5"), "n5://")
    path = stack("unsaid")
    refusal(lambda: Volume(VolumeSpec(path=str(path)), tmp_path), "does not state its voxel size")


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sections_that_are_damaged_or_differ_from_the_others(tmp_path: Path, grey: np.ndarray, suffix: str) -> None:
    write_sections(tmp_path / "v", grey, suffix)
    short, small = tmp_path / "v" / f"larva_4.6nm_9{suffix}", tmp_path / "v" / f"larva_4.6nm_12{suffix}"
    short.write_bytes(short.read_bytes()[:20_000])
    Image.fromarray(grey[0, :-1]).save(small)
    with opened("png", tmp_path / "v") as volume:
        volume.read(np.zeros(3), np.array([2, 320, 330]))
        refusal(lambda: volume.read(np.array([2, 0, 0]), np.array([3, 320, 330])), "cannot be read at voxels z 2–3")
        refusal(lambda: volume.read(np.array([5, 0, 0]), np.array([6, 9, 9])), small.name, "must be alike")


# Fingerprints and the data set


@pytest.mark.parametrize("kind", [*CHUNKED, "png"])
def test_local_fingerprints_follow_the_content(tmp_path: Path, grey: np.ndarray, kind: str) -> None:
    WRITERS[kind](tmp_path / "a", grey)
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    other = grey.copy()
    other[0, 0, 0] ^= 1
    WRITERS[kind](tmp_path / "c", other)
    prints = [opened(kind, tmp_path / name).fingerprint() for name in "aabc"]
    assert prints[0] == prints[1] == prints[2] != prints[3]


def test_remote_fingerprints_cover_the_documents(tmp_path: Path, grey: np.ndarray, serve) -> None:
    write_zarr2(tmp_path / "v", grey)
    server = serve(tmp_path)
    place = f"{server.url}/v"

    def fingerprint() -> str:
        with opened("zarr2", place) as volume:
            return volume.fingerprint()

    first = fingerprint()
    assert not any("." not in path.rpartition("/")[2] for path in server.requests)  # no chunk was fetched
    assert fingerprint() == first
    server.etag = "second"
    second = fingerprint()
    assert second != first
    server.etag = "third"
    assert fingerprint() != second
    server.etag = None
    amend(tmp_path / "v" / ".zattrs", note="aligned anew")
    assert fingerprint() != first


def test_an_address_is_never_missing_and_a_touched_chunk_is_seen(tmp_path: Path, grey: np.ndarray) -> None:
    remote = write_project(tmp_path / "remote", synthetic=None, volume={"path": "precomputed://gs://bucket/volume"})
    dataset = remote.dataset("demo")
    assert [path.name for path in dataset.missing_sources()] == ["synapses.csv"]
    assert status_of_files(dataset.volume_files()) == []

    local = write_project(tmp_path / "local", synthetic=None, volume={"path": "n5://volume"}).dataset("demo")
    assert [path.name for path in local.missing_sources()] == ["volume", "synapses.csv"]
    write_n5(local.base / "volume", grey)
    assert [path.name for path in local.missing_sources()] == ["synapses.csv"]
    before = status_of_files(local.volume_files())
    chunk = first_chunk(local.base / "volume")
    chunk.write_bytes(chunk.read_bytes()[:-1])
    after = status_of_files(local.volume_files())
    chunk.unlink()
    assert len({json.dumps(found) for found in (before, after, status_of_files(local.volume_files()))}) == 3


@pytest.mark.parametrize("kind", CHUNKED)
def test_a_change_behind_a_symbolic_link_to_a_folder_is_noticed(tmp_path: Path, grey: np.ndarray, kind: str) -> None:
    """A linked folder has the fingerprint that it would have in its place, and its changes are changes of the volume."""
    WRITERS[kind](tmp_path / "plain", grey)
    WRITERS[kind](tmp_path / "linked", grey)
    chunk = first_chunk(tmp_path / "linked")
    if kind == "zarr2":  # its chunks lie beside its documents
        chunk.replace(tmp_path / "chunk")
        chunk.symlink_to(tmp_path / "chunk")
        chunk = tmp_path / "chunk"
    else:
        place = next(path for path in chunk.parents if path.parent == tmp_path / "linked")
        place.rename(tmp_path / "elsewhere")
        place.symlink_to(tmp_path / "elsewhere")
        chunk = tmp_path / "elsewhere" / chunk.relative_to(place)

    def found() -> tuple[str, str, np.ndarray]:
        with opened(kind, tmp_path / "linked") as volume:
            return json.dumps(status_of_files([tmp_path / "linked"])), volume.fingerprint(), everything(volume)

    before = found()
    with opened(kind, tmp_path / "plain") as volume:
        assert before[1] == volume.fingerprint()
    other = grey.copy()
    other[:4, :64, :64] ^= 1
    WRITERS[kind](tmp_path / "other", other)
    shutil.copyfile(first_chunk(tmp_path / "other"), chunk)
    after = found()
    assert before[0] != after[0] and before[1] != after[1] and (before[2] != after[2]).any()


def test_links_that_cannot_be_followed_are_named(tmp_path: Path, grey: np.ndarray) -> None:
    for name, target in (("loop", "."), ("nowhere", "none")):
        write_zarr2(tmp_path / name, grey)
        (tmp_path / name / "link").symlink_to(target)
        for action in (
            lambda name=name: status_of_files([tmp_path / name]),
            opened("zarr2", tmp_path / name).fingerprint,
        ):
            refusal(action, str(tmp_path / name / "link"), "remove")


def test_a_scale_outside_its_volume_is_refused(tmp_path: Path, grey: np.ndarray) -> None:
    write_precomputed(tmp_path / "v", grey, key="../elsewhere")
    refusal(lambda: opened("precomputed", tmp_path / "v"), "../elsewhere", "outside its folder")


def test_status_notices_a_section_that_was_replaced_by_an_older_file(tmp_path: Path, grey: np.ndarray) -> None:
    """`cp -p` keeps the old time, and here also the size. Giving a file its former time back does not hide a change either."""
    changes = {"synthetic": None, "volume": {"path": str(tmp_path / "v"), "voxel_size_nm_zyx": list(SIZE_NM)}}
    dataset = write_project(tmp_path, **changes).dataset("demo")
    write_sections(tmp_path / "v", grey, ".tif")
    section, older = tmp_path / "v" / "larva_4.6nm_9.tif", tmp_path / "older.tif"
    Image.fromarray(grey[2, ::-1].copy()).save(older)
    os.utime(older, ns=(10**18, 10**18))
    times = section.stat()
    assert older.stat().st_size == times.st_size
    for restored in (False, True):
        nodes(dataset)[0].run(lambda message: None)
        assert states(dataset)[0].state == "fresh"
        shutil.copy2(older, section)
        if restored:
            Image.fromarray(grey[2]).save(section)
            os.utime(section, ns=(times.st_atime_ns, times.st_mtime_ns))
        (reason,) = states(dataset)[0].reasons
        assert "its source changed" in reason


def test_a_section_that_changes_its_number_is_noticed(tmp_path: Path, grey: np.ndarray) -> None:
    write_sections(tmp_path / "v", grey[:1], ".png")
    before = status_of_files([tmp_path / "v"])
    (tmp_path / "v" / "larva_4.6nm_7.png").rename(tmp_path / "v" / "larva_4.6nm_8.png")
    assert status_of_files([tmp_path / "v"]) != before


@pytest.mark.parametrize("name", ["fafb_v14", "hemibrain", "manc"])
def test_shipped_data_sets_wait_for_their_annotations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from synpipe.datasets import Project

    monkeypatch.delenv(f"SYNPIPE_{name.upper()}", raising=False)
    project = Project(REPOSITORY / "data", Path("/nowhere"))
    dataset = project.dataset(name)
    assert dataset.spec.volume.address.startswith("gs://")
    assert f"do not exist: {dataset.missing_sources()[0]}" in str(explain_absence(dataset))
    window = dataset.spec.tiles.window_zyx(np.array(dataset.spec.volume.voxel_size_nm_zyx))
    assert window == ((3 if name == "fafb_v14" else 11), 256, 256)  # sections 40 nm apart in all of them
