"""Encoders: errors of the registry, identities, seeded weights, weights files, the hub. Models are tiny or need no download."""

import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from synpipe.embeddings.encoder_specs import EncoderSpec
from synpipe.embeddings.encoders import open_encoder
from synpipe.embeddings.registry import load_registry
from synpipe.errors import SynpipeError

ROOT = Path(__file__).parents[2]
REGISTRY = ROOT / "data" / "encoders.yaml"
TINY = "test_resnet.r160_in1k"


def make_tiles(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 3, 256, 256), dtype=np.uint8)


def spec_of(**changes: object) -> EncoderSpec:
    return EncoderSpec.parse({"model": TINY, "weights": "random", "seed": 0, "precision": "fp32", **changes}, "test")


def file_spec(name: str, **changes: object) -> EncoderSpec:
    return EncoderSpec.parse({"model": TINY, "weights": name, "precision": "fp32", **changes}, "test")


class FreshProcess:
    """Another Python process that opens encoders. Its hub is a port of this machine, on which nothing listens at first.

    It is a separate process because huggingface_hub reads HF_ENDPOINT when it is imported.
    """

    HUB_TIMEOUT_S = 2.0  # shorter than ours, so that the tests do not wait long
    CODE = """
import json, sys, time, numpy as np, timm
from pathlib import Path
from synpipe.embeddings import encoders
from synpipe.embeddings.encoder_specs import EncoderSpec
from synpipe.embeddings.encoders import open_encoder
from synpipe.errors import SynpipeError
encoders._HUB_TIMEOUT_S = float(sys.argv[1])
tile = np.random.default_rng(0).integers(0, 256, (1, 3, 256, 256), dtype=np.uint8)
for line in sys.stdin:
    start = time.monotonic()
    try:
        encoder = open_encoder(EncoderSpec.model_validate_json(line), Path())
        result = dict(fingerprint=encoder.fingerprint, vector=encoder.embed(tile)[0].tolist())
    except SynpipeError as error:
        result = dict(error=str(error))
    print(json.dumps(dict(result, seconds=time.monotonic() - start)), flush=True)
"""

    def __init__(self, cache: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        unwanted = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE")
        environment = {k: v for k, v in os.environ.items() if k not in unwanted and not k.lower().endswith("_proxy")}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{self.port}", "HF_HOME": str(cache)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.CODE, str(self.HUB_TIMEOUT_S)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, spec: EncoderSpec) -> dict[str, Any]:
        print(spec.model_dump_json(), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def fresh_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FreshProcess]:
    fresh = FreshProcess(tmp_path_factory.mktemp("huggingface"))
    yield fresh
    fresh.process.kill()
    fresh.process.communicate()


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """The weights of the tiny model with its classifier, like those on the hub."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return timm.create_model(TINY).state_dict()


# The registry


def test_shipped_registry_begins_with_an_encoder_that_needs_no_network() -> None:
    registry = load_registry(REGISTRY)
    assert next(iter(registry)) == "em_d4"
    assert {"xcit_nano", "deit3_base", "resnet18", "dinov2_small", "dinov3_small"} <= registry.keys()
    assert len({spec.identity(REGISTRY.parent, registry) for spec in registry.values()}) == len(registry)


def test_every_model_of_the_shipped_registry_is_known_to_timm_with_weights() -> None:
    import synpipe.embeddings.em_network  # noqa: F401  # registers `d4resnet` with timm

    for name, spec in load_registry(REGISTRY).items():
        if not spec.is_network:
            continue
        config = timm.models.get_pretrained_cfg(spec.model)
        assert config is not None, name
        assert spec.weights == "random" or config.hf_hub_id or (REGISTRY.parent / spec.weights).exists(), name


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("{model: resnet18, wieghts: hub}", ["wieghts", "weights", "Known keys: model, weights, seed"]),
        ("{model: resnet18, weights: random}", ["`seed` belongs to `weights: random`"]),
        ("{model: resnet18, weights: hub, seed: 1}", ["`seed` belongs to `weights: random`"]),
        ("{model: resnet18, weights: imagenet}", ["`hub`, `random` or a file"]),
        ("{model: resnet18, weights: hub, crop_px: 300}", ["crop_px", "256"]),
        ("{model: 'hf-hub:someone/model', weights: hub}", ["model"]),
        ("{model: resnet18, weights: hub, pixel_nm: [5, 4]}", ["pixel_nm", "smallest size first"]),
        ("{model: resnet18, weights: hub, pixel_nm: [0, 4]}", ["pixel_nm.0", "greater than 0"]),
        ("resnet18", ["the whole entry"]),
        *(
            (
                f"{{model: resnet18, weights: random, seed: 0, args: {{{args}}}}}",
                [args.split(": ")[0], "`weights`", "fingerprint"],
            )
            for args in (
                "checkpoint_path: w.pth",
                "pretrained: true",
                "pretrained_cfg: a1_in1k",
                "pretrained_strict: false",
                "cache_dir: weights",
                "anything: weights/w.safetensors",
                "anything: w.PTH",
            )
        ),
    ],
)
def test_wrong_entry_is_named_with_its_file(tmp_path: Path, entry: str, expected: list[str]) -> None:
    path = tmp_path / "encoders.yaml"
    path.write_text(f"encoders:\n  mine: {entry}\n")
    with pytest.raises(SynpipeError) as error:
        load_registry(path)
    for part in [str(path), "`mine`", *expected]:
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["ResNet", "a-b", "1st", "_x", "größe"])
def test_name_that_cannot_be_part_of_an_asset_key_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "encoders.yaml"
    path.write_text(f"encoders:\n  {name}: {{model: resnet18, weights: hub}}\n")
    with pytest.raises(SynpipeError, match=f"`{name}` must consist of a-z"):
        load_registry(path)


def test_registry_and_identities_are_read_without_importing_torch() -> None:
    code = (
        "import sys; from pathlib import Path; import synpipe.embeddings.encoders, synpipe.embeddings.embed\n"
        f"path = Path({str(REGISTRY)!r})\n"
        "from synpipe.embeddings.registry import load_registry\n"
        "registry = load_registry(path)\n"
        "[spec.identity(path.parent, registry) for spec in registry.values()]\n"
        "print([name for name in ('torch', 'timm', 'huggingface_hub') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


# Identities and fingerprints


def test_identity_changes_with_what_changes_vectors_and_not_with_the_description(tmp_path: Path) -> None:
    specs = [
        spec_of(),
        spec_of(seed=1),
        spec_of(crop_px=128),
        spec_of(precision="bf16"),
        spec_of(args={"global_pool": "max"}),
    ]
    specs.append(file_spec("w.safetensors"))
    assert len({spec.identity(tmp_path, {}) for spec in specs}) == len(specs)
    assert spec_of(description="another").identity(tmp_path, {}) == spec_of().identity(tmp_path, {})
    declared = spec_of(pixel_nm=[4, 5])
    assert declared.identity(tmp_path, {}) == spec_of().identity(tmp_path, {})
    assert declared.fingerprint("w", {}) == spec_of().fingerprint("w", {})
    assert declared.digest() == spec_of().digest()  # and so files of the store record the same


def test_fingerprints_differ_with_crop_and_seed_and_agree_across_defaults(tmp_path: Path) -> None:
    fingerprint = open_encoder(spec_of(), tmp_path).fingerprint
    assert open_encoder(spec_of(description="x"), tmp_path).fingerprint == fingerprint
    assert open_encoder(spec_of(crop_px=160), tmp_path).fingerprint == fingerprint  # 160 is the model's own size
    assert open_encoder(spec_of(crop_px=128), tmp_path).fingerprint != fingerprint
    other = open_encoder(spec_of(seed=1), tmp_path)
    assert other.fingerprint != fingerprint
    assert other.weights == "random:1"


def test_weights_file_counts_by_content_not_by_name(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        safetensors.torch.save_file(state, tmp_path / name)
    first, second = (open_encoder(file_spec(name), tmp_path) for name in ("a.safetensors", "b.safetensors"))
    assert first.fingerprint == second.fingerprint
    content = (tmp_path / "a.safetensors").read_bytes()
    assert first.weights == second.weights == f"sha256:{hashlib.sha256(content).hexdigest()}"
    before = file_spec("a.safetensors").identity(tmp_path, {})
    assert before == file_spec("b.safetensors").identity(tmp_path, {})
    safetensors.torch.save_file({**state, "conv1.0.weight": state["conv1.0.weight"] * 2}, tmp_path / "a.safetensors")
    assert file_spec("a.safetensors").identity(tmp_path, {}) != before
    assert open_encoder(file_spec("a.safetensors"), tmp_path).fingerprint != first.fingerprint


def test_arguments_of_the_architecture_are_allowed() -> None:
    args = {"global_pool": "max", "pretrained_window_size": 8, "weight_init": "jax"}
    assert spec_of(args=args).args == args


def test_weights_that_are_replaced_while_they_are_loaded_keep_their_own_fingerprint(
    tmp_path: Path, state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fingerprint belongs to the weights that were loaded, whenever the file changes."""
    first, second, used = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "used"))
    safetensors.torch.save_file(state, first)
    safetensors.torch.save_file({**state, "conv1.0.weight": state["conv1.0.weight"] * 2}, second)
    expected = [open_encoder(file_spec(path.name), tmp_path) for path in (first, second)]
    tiles, load = make_tiles(1), timm.models.load_state_dict

    def replace_then_load(*args: Any, **options: Any) -> Any:
        used.write_bytes(second.read_bytes())
        return load(*args, **options)

    def load_then_replace(*args: Any, **options: Any) -> Any:
        loaded = load(*args, **options)
        used.write_bytes(second.read_bytes())
        return loaded

    for patched in (replace_then_load, load_then_replace):
        used.write_bytes(first.read_bytes())
        identity = file_spec(used.name).identity(tmp_path, {})
        monkeypatch.setattr(timm.models, "load_state_dict", patched)
        opened = open_encoder(file_spec(used.name), tmp_path)
        monkeypatch.undo()
        (same,) = [one for one in expected if one.fingerprint == opened.fingerprint]
        np.testing.assert_array_equal(opened.embed(tiles), same.embed(tiles))
        file_spec(used.name).check_loaded(opened.weights, identity)  # this one was loaded before it was replaced
        with pytest.raises(SynpipeError, match="was replaced"):
            file_spec(used.name).check_loaded(expected[1].weights, identity)


# Embedding


def test_embedding_has_the_promised_shape_and_shows_the_model_the_centre_only(tmp_path: Path) -> None:
    encoder = open_encoder(spec_of(crop_px=128), tmp_path)
    tiles = make_tiles(3)
    vectors = encoder.embed(tiles)
    assert vectors.shape == (3, encoder.dim) and vectors.dtype == np.float32
    framed = tiles.copy()
    framed[:, :, :64] = framed[:, :, -64:] = framed[:, :, :, :64] = framed[:, :, :, -64:] = 0
    np.testing.assert_array_equal(encoder.embed(framed), vectors)
    framed[:, :, 64, 64] = 255 - framed[:, :, 64, 64]
    assert (encoder.embed(framed) != vectors).any(axis=1).all()


def test_preprocessing_equals_timms_own_transform(tmp_path: Path) -> None:
    """Our preprocessing gives the result of timm's evaluation transform at native scale (crop_pct 1, no resizing)."""
    from PIL import Image

    encoder = open_encoder(spec_of(crop_px=256), tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(TINY, num_classes=0).eval()
    config = {**timm.data.resolve_model_data_config(model), "input_size": (3, 256, 256), "crop_pct": 1.0}
    transform = timm.data.create_transform(**config, is_training=False)
    tiles = make_tiles(2)
    images = torch.stack([transform(Image.fromarray(tile.transpose(1, 2, 0))) for tile in tiles])
    with torch.inference_mode():
        expected = model(images).numpy()
    np.testing.assert_allclose(encoder.embed(tiles), expected, rtol=1e-4, atol=1e-5)


def test_wrong_tiles_are_refused(tmp_path: Path) -> None:
    encoder = open_encoder(spec_of(), tmp_path)
    for tiles in (make_tiles(1).astype(np.float32), make_tiles(1)[:, :, :128], make_tiles(1)[:, :1]):
        with pytest.raises(ValueError, match="uint8"):
            encoder.embed(tiles)


def test_random_weights_are_the_same_in_another_process_and_leave_the_random_state_alone(
    tmp_path: Path, fresh_process: FreshProcess
) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    vector = open_encoder(spec_of(), tmp_path).embed(make_tiles(1))[0]
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_allclose(fresh_process(spec_of())["vector"], vector, rtol=1e-6)


def test_model_larger_than_a_tile_is_built_for_224(tmp_path: Path) -> None:
    encoder = open_encoder(spec_of(model="vit_small_patch14_dinov2.lvd142m"), tmp_path)
    assert (encoder.preprocessing["crop_px"], encoder.dim) == (224, 384)
    assert np.isfinite(encoder.embed(make_tiles(1))).all()


# The first eight values for one tile of uniform noise. Only another torch or timm, or a mistake here, changes them.
GOLDEN = {
    "em_d4": [-3.47018, 13.364, -3.04717, -8.06157, 5.39944, 0.222898, 7.80847, 10.0308],
    "resnet10t_random": [0.0317521, 0.0, 0.0245435, 0.0, 0.398656, 0.0138547, 0.794996, 0.0],
    "regnety_random": [0.41393, 0.449279, 0.300327, 0.214796, 0.823902, 0.388894, 0.0593608, 0.408824],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_embeddings_of_the_offline_encoders(name: str) -> None:
    spec = load_registry(REGISTRY)[name]
    vector = open_encoder(spec, REGISTRY.parent).embed(make_tiles(1, seed=1))[0]
    np.testing.assert_allclose(vector[:8], GOLDEN[name], rtol=1e-3, atol=1e-5)
    bf16 = open_encoder(spec.model_copy(update={"precision": "bf16"}), REGISTRY.parent).embed(make_tiles(1, seed=1))[0]
    assert np.linalg.norm(bf16 - vector) < 0.02 * np.linalg.norm(vector)


# What cannot be opened


def test_unknown_model_suggests_its_neighbours(tmp_path: Path) -> None:
    with pytest.raises(SynpipeError, match=r"no model `xcit_nano_12_p16_225`. Did you mean .*xcit_nano_12_p16_224"):
        open_encoder(spec_of(model="xcit_nano_12_p16_225"), tmp_path)
    with pytest.raises(SynpipeError, match=r"no model `resnet18.a9_in1k`. Did you mean .*resnet18.a1_in1k"):
        open_encoder(spec_of(model="resnet18.a9_in1k"), tmp_path)


def test_unknown_argument_and_impossible_crop_are_named(tmp_path: Path) -> None:
    with pytest.raises(SynpipeError, match=r"colour.*correct `args`"):
        open_encoder(spec_of(args={"colour": "green"}), tmp_path)
    with pytest.raises(SynpipeError, match="crop_px"):
        open_encoder(spec_of(model="xcit_nano_12_p16_224", crop_px=100), tmp_path)


def test_unknown_device_is_named(tmp_path: Path) -> None:
    with pytest.raises(SynpipeError, match=r"Device `gpu`.*use cpu, cuda or auto"):
        open_encoder(spec_of(), tmp_path, device="gpu")


@pytest.mark.parametrize("wrapping", [None, "state_dict", "model"])
def test_torch_checkpoints_give_the_vectors_of_the_safetensors_file(
    tmp_path: Path, state: dict[str, torch.Tensor], wrapping: str | None
) -> None:
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    torch.save({wrapping: state, "epoch": 3} if wrapping else state, tmp_path / "w.pth")
    expected = open_encoder(file_spec("w.safetensors"), tmp_path).embed(make_tiles(2))
    np.testing.assert_array_equal(open_encoder(file_spec("w.pth"), tmp_path).embed(make_tiles(2)), expected)
    assert not np.allclose(open_encoder(spec_of(), tmp_path).embed(make_tiles(2)), expected)


def test_weights_without_classifier_load(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    safetensors.torch.save_file(state, tmp_path / "full.safetensors")
    backbone = {key: value for key, value in state.items() if not key.startswith("fc.")}
    assert len(backbone) < len(state)
    safetensors.torch.save_file(backbone, tmp_path / "backbone.safetensors")
    vectors = [
        open_encoder(file_spec(f"{name}.safetensors"), tmp_path).embed(make_tiles(1)) for name in ("full", "backbone")
    ]
    np.testing.assert_array_equal(*vectors)


def test_weights_file_that_does_not_fit_is_refused_with_its_keys(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    key = "layer1.0.conv1.weight"
    cases = {
        "missing": {name: value for name, value in state.items() if name != key},
        "shape": {**state, key: torch.zeros(1, 2, 3, 4)},
        "foreign": timm.create_model("test_convnext").state_dict(),
        "empty": {},
    }
    for name, weights in cases.items():
        safetensors.torch.save_file(weights, tmp_path / f"{name}.safetensors")
        with pytest.raises(SynpipeError, match=f"{name}.safetensors does not fit {TINY}") as error:
            open_encoder(file_spec(f"{name}.safetensors"), tmp_path)
        assert name not in ("missing", "shape") or key in str(error.value)
        assert len(str(error.value)) < 1000


class _Bomb:
    def __reduce__(self) -> tuple:
        return (os.mkdir, ("exploded",))


def test_unreadable_weights_are_named_and_code_in_them_never_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "noise.safetensors").write_bytes(b"not weights at all")
    torch.save({"model": _Bomb()}, tmp_path / "bomb.pth")
    for name in ("noise.safetensors", "bomb.pth"):
        with pytest.raises(SynpipeError, match=f"{name} .*cannot be read"):
            open_encoder(file_spec(name), tmp_path)
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(SynpipeError, match=r"absent.pth .*does not exist"):
        open_encoder(file_spec("absent.pth"), tmp_path)
    assert file_spec("absent.pth").identity(tmp_path, {})  # the registry can still be listed


# The hub: a server on this machine that speaks its protocol


class _Hub(http.server.BaseHTTPRequestHandler):
    path_of_weights = "/timm/test_resnet.r160_in1k/resolve/main/model.safetensors"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self.wfile.write(self._answer())

    def _answer(self) -> bytes:
        self.server.requests.append(f"{self.command} {self.path}")
        found = self.path == self.path_of_weights
        content = self.server.content if found else b""
        self.send_response(200 if found else 404)
        if not found:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", "1" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return content

    def log_message(self, *args: object) -> None:
        pass


def test_hub_without_network_then_with_it_then_from_its_cache(
    tmp_path: Path, state: dict[str, torch.Tensor], fresh_process: FreshProcess
) -> None:
    spec = EncoderSpec(model=TINY, weights="hub", precision="fp32")
    address = ("127.0.0.1", fresh_process.port)

    refused = fresh_process(spec)
    with socket.create_server(address):  # accepts and never answers, like some firewalls
        silent = fresh_process(spec)
    for result in (refused, silent):
        for part in (
            TINY,
            f"timm/{TINY}",
            f"{fresh_process.port}",
            "hf download",
            "set `weights`",
            "`weights: random`",
        ):
            assert part in result["error"]
        assert result["seconds"] < fresh_process.HUB_TIMEOUT_S + 5

    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    with http.server.ThreadingHTTPServer(address, _Hub) as server:
        server.content, server.requests = (tmp_path / "w.safetensors").read_bytes(), []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        downloaded = fresh_process(spec)
        server.shutdown()
    assert f"GET {_Hub.path_of_weights}" in server.requests
    assert {request.split()[1] for request in server.requests} == {_Hub.path_of_weights}  # no telemetry
    cached = fresh_process(spec)  # nothing listens any more

    local = open_encoder(file_spec("w.safetensors"), tmp_path)
    assert downloaded["fingerprint"] == cached["fingerprint"] == local.fingerprint  # same bytes, same encoder
    np.testing.assert_allclose(downloaded["vector"], local.embed(make_tiles(1))[0], rtol=1e-5)
