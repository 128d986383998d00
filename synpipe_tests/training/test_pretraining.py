"""Pretraining on unlabelled EM: it learns, it continues after a kill, and the shipped weights are good."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import ndimage

from synpipe.datasets import Project
from synpipe.embeddings.em_network import POSES, D4ResNet, pose
from synpipe.embeddings.encoder_specs import EncoderSpec
from synpipe.embeddings.encoders import open_encoder
from synpipe.embeddings.registry import load_registry
from synpipe.errors import SynpipeError
from synpipe.training import pretraining
from synpipe.training.blocks import SIDE_PX, draw_blocks, open_training_volume
from synpipe.training.pretraining import pretrain
from synpipe.training.recipe import PretrainSpec, TrainingSource, read_recipe
from synpipe_tests.conftest import REPOSITORY, Command, environment, write_project
from synpipe_tests.support.command import invoke

SMALL = {"synthetic": {"seed": 3, "shape_zyx": [10, 1024, 1280], "n_synapses": 60, "n_neurons": 15}}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One computing thread, as in the processes that the tests start: sums, and so the weights, depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def few_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that do not look at the figures of the held-out places, which take longest."""
    monkeypatch.setattr(pretraining, "HELD_OUT_PLACES", 16)


def learn(store: Path, out: Path, **settings):
    spec = PretrainSpec.parse({"sources": [SMALL], "blocks": 200, "places": 32, **settings}, "test")
    volumes = [
        open_training_volume(source, Project(store, store), store, lambda message: None) for source in spec.sources
    ]
    return pretrain(spec, volumes, out, device="cpu")


def test_every_pose_of_a_tile_has_the_same_vector():
    torch.manual_seed(0)
    network = D4ResNet().eval()
    tile = torch.rand(1, 3, 194, 194)
    with torch.inference_mode():
        vector = network(tile)
        for number in range(1, POSES):
            torch.testing.assert_close(network(pose(tile, number)), vector, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(network(torch.rand(1, 3, 194, 194)), vector, rtol=1e-2)


def test_brightness_and_contrast_of_a_section_do_not_change_the_vector():
    torch.manual_seed(0)
    network = D4ResNet().eval()
    tile = torch.rand(1, 3, 194, 194)
    other = tile * torch.tensor([0.6, 0.8, 0.7]).view(1, 3, 1, 1) + torch.tensor([0.1, 0.0, 0.2]).view(1, 3, 1, 1)
    with torch.inference_mode():
        torch.testing.assert_close(network(other), network(tile), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_short_training_finds_held_out_places_better(store: Path, tmp_path: Path):
    report = learn(store, tmp_path / "e.safetensors", steps=25)
    assert np.mean(report["loss"][-5:]) < 0.93 * report["loss"][0]
    (after,), (before,) = report["held_out"].values(), report["held_out_untrained"].values()
    assert after["recall_at_5"] > 2 * before["recall_at_5"]
    assert after["recall_at_1"] > 2 * before["recall_at_1"]

    # The result can be opened as an encoder.
    spec = EncoderSpec(model="d4resnet", weights="e.safetensors", precision="fp32")
    encoder = open_encoder(spec, tmp_path, device="cpu")
    tiles = np.random.default_rng(0).integers(0, 256, (2, 3, 256, 256), dtype=np.uint8)
    assert encoder.embed(tiles).shape == (2, encoder.dim)
    assert json.loads((tmp_path / "e.json").read_text())["held_out"] == report["held_out"]
    assert "licence: unknown" in (tmp_path / "e.md").read_text()


@pytest.mark.slow
def test_killed_and_run_again_it_ends_with_the_same_weights(tmp_path: Path, one_thread: None, few_held_out: None):
    project = write_project(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"sources": [SMALL], "blocks": 60, "places": 16, "steps": 3}))

    def arguments(out: str) -> tuple[str, ...]:
        return "pretrain", "--recipe", str(recipe), "--out", str(tmp_path / out)

    program = (
        "import synpipe.training.pretraining as p; p.CHECKPOINT_S, p.HELD_OUT_PLACES = 0, 16; "
        "from synpipe.cli import main; main()"
    )
    killed = subprocess.Popen(
        [sys.executable, "-c", program, *arguments("killed.safetensors")],
        env=environment(project),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    checkpoint = tmp_path / "killed.checkpoint"
    while not checkpoint.exists():
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed.safetensors").exists()

    again = invoke(project, *arguments("killed.safetensors"))
    assert again.exit_code == 0, again.stderr
    assert "step 1 of 3" not in again.stderr  # it carried on
    undisturbed = invoke(project, *arguments("whole.safetensors"))
    assert undisturbed.exit_code == 0 and "step 1 of 3" in undisturbed.stderr, undisturbed.stderr
    whole, carried_on = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "killed"))
    for name, value in whole.items():
        torch.testing.assert_close(carried_on[name], value, rtol=0, atol=0, msg=name)
    assert not checkpoint.exists()


def test_a_checkpoint_of_another_recipe_is_not_carried_on(store: Path, tmp_path: Path, few_held_out: None):
    out = tmp_path / "e.safetensors"
    torch.save({"recipe": "other"}, out.with_suffix(".checkpoint"))
    with pytest.raises(SynpipeError, match="another recipe"):
        learn(store, out, steps=1, blocks=16)


def test_blocks_depend_on_the_seed_and_leave_the_held_out_part_alone(store: Path):
    source = open_training_volume(
        TrainingSource.parse(SMALL, "test"), Project(store, store), store, lambda message: None
    )
    one, same, other = (draw_blocks([source], 20, seed) for seed in (1, 1, 2))
    assert one.pixels.shape == (20, 5, SIDE_PX, SIDE_PX)
    assert (one.pixels == same.pixels).all() and (one.pixels != other.pixels).any()
    held_out = draw_blocks([source], 20, 1, held_out=True)
    reach = source.shrink * np.array([one.pixels.shape[-1], held_out.pixels.shape[-1]]) // 2
    assert one.centre_zyx[:, 2].max() + reach[0] <= held_out.centre_zyx[:, 2].min() - reach[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-d", "demo", "-o", "e.pt"), "must end with .safetensors"),
        (("-o", "e.safetensors"), "Say what to learn from"),
        (("-d", "nowhere", "-o", "e.safetensors"), "no data set 'nowhere'"),
    ],
)
def test_a_wrong_call_is_told_in_one_paragraph(synpipe: Command, arguments: tuple[str, ...], message: str):
    result = synpipe("pretrain", *arguments)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_volume_that_is_too_small_is_named(tmp_path: Path):
    with h5py.File(tmp_path / "little.h5", "w") as file:
        raw = file.create_dataset("volumes/raw", data=np.zeros((9, 300, 300), np.uint8))
        raw.attrs["resolution"] = (40.0, 4.0, 4.0)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sources: [{volume: {path: little.h5}}]")
    spec, base = read_recipe(recipe, (), {})
    source = open_training_volume(spec.sources[0], Project(tmp_path, tmp_path), base, lambda message: None)
    with pytest.raises(SynpipeError, match=r"little.h5 is too small"):
        draw_blocks([source], 1, 0)


SHIPPED = REPOSITORY / "data" / "weights" / "em_d4.safetensors"


def test_shipped_weights_are_the_ones_of_their_card():
    assert SHIPPED.stat().st_size <= 15e6
    entry = load_registry(REPOSITORY / "data" / "encoders.yaml")["em_d4"]
    encoder = open_encoder(entry, REPOSITORY / "data", device="cpu")
    assert encoder.weights.removeprefix("sha256:") in SHIPPED.with_suffix(".md").read_text()
    D4ResNet().load_state_dict(load_file(SHIPPED), strict=True)


@pytest.mark.slow
def test_shipped_encoder_finds_places_of_an_unseen_volume_whichever_way_they_are_turned(real_em: Path):
    """150 places of ssTEM, one section off and turned by 37°, must be found among the 150 unaltered ones."""
    with h5py.File(real_em / "vnc_stack1.h5") as file:
        sections = file["volumes/raw"][8:12]
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 1024 - 364, (150, 2))
    windows = np.stack([sections[:, y : y + 364, x : x + 364] for y, x in corners])
    turned = ndimage.rotate(windows[:, 1:], 37, axes=(2, 3), order=1, reshape=False)
    middle = np.s_[:, :, 54:310, 54:310]
    plain, altered = np.ascontiguousarray(windows[:, :3][middle]), np.ascontiguousarray(turned[middle])

    registry = load_registry(REPOSITORY / "data" / "encoders.yaml")
    found = {}
    for name in ("em_d4", "resnet10t_random"):
        encoder = open_encoder(registry[name], REPOSITORY / "data", device="cpu")
        originals, queries = (
            vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
            for vectors in (encoder.embed(plain), encoder.embed(altered))
        )
        found[name] = ((queries @ originals.T).argmax(1) == np.arange(len(plain))).mean()
    assert found["em_d4"] > 0.7
    assert found["em_d4"] > 2 * found["resnet10t_random"]
