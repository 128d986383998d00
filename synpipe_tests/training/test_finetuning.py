"""Fine-tuning: augmented tiles, learning, recovery from a kill, and the resulting encoder."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from synpipe.assets.manifest import read_manifest
from synpipe.datasets import Project
from synpipe.embeddings.encoder_specs import EncoderSpec
from synpipe.embeddings.registry import load_registry
from synpipe.errors import SynpipeError
from synpipe.reports.housekeeping import find_leftovers
from synpipe.store.files import read_table
from synpipe.training import augmentation, finetuning
from synpipe.training.augmentation import augment
from synpipe.training.registration import register
from synpipe_tests.conftest import REPOSITORY
from synpipe_tests.support import finetune_once
from synpipe_tests.support.command import answer, invoke, refusal
from synpipe_tests.support.finetune_once import run
from synpipe_tests.support.textures import CLASSES, change_spec, make_outdated, write_textures

# Augmentation.


def test_augmentation_moves_and_turns_and_keeps_the_scale(monkeypatch: pytest.MonkeyPatch):
    for name in ("CONTRAST", "BRIGHTNESS", "NOISE"):
        monkeypatch.setattr(augmentation, name, 0.0)
    rows, columns = np.mgrid[:256, :256].astype(np.uint8)
    tiles = torch.from_numpy(np.stack([rows, columns, rows]))[None].repeat(64, 1, 1, 1)
    seen = augment(tiles, 128, [0]).numpy()
    assert seen.shape == (64, 3, 128, 128)
    shown = set()
    for outer, middle, _ in seen:
        # From pixel to pixel, the row changes by one or not at all, and so does the column. So nothing was resized.
        steps = [np.unique(np.diff(outer, axis=axis)).tolist() for axis in (0, 1)]
        others = [np.unique(np.diff(middle, axis=axis)).tolist() for axis in (0, 1)]
        assert sorted(map(abs, steps[0] + steps[1])) == [0, 1]
        assert sorted(map(abs, others[0] + others[1])) == [0, 1]
        centre = (float(outer[63:65, 63:65].mean()), float(middle[63:65, 63:65].mean()))
        assert max(abs(place - 127.5) for place in centre) <= augmentation.MAX_SHIFT_PX
        shown.add((*steps[0], *steps[1], *others[0], *others[1]))
    assert len(shown) == 8  # all symmetries of the square


def test_augmentation_reverses_sections_and_depends_on_its_seed_alone():
    tiles = torch.zeros(32, 3, 256, 256, dtype=torch.uint8) + torch.tensor([40, 120, 200]).view(1, 3, 1, 1).byte()
    first = augment(tiles, 64, [1, 2])
    means = first.mean(dim=(2, 3))
    rising = means[:, 0] < means[:, 2]
    assert 0 < rising.sum() < 32
    assert (means[:, 0] - means[:, 1]).sign().tolist() == (means[:, 1] - means[:, 2]).sign().tolist()
    assert means[:, 1].std() > 3  # brightness
    torch.testing.assert_close(augment(tiles, 64, [1, 2]), first, rtol=0, atol=0)
    assert (augment(tiles, 64, [1, 3]) - first).abs().max() > 1


# Training.


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(folder)
    return folder


# Checkpoints five to seven are of the steps of the second epoch, the eighth is of its end.
@pytest.mark.slow
@pytest.mark.parametrize(("number", "epoch", "step"), [(6, 1, 1), (8, 1, 3)])
def test_a_kill_in_the_middle_changes_nothing(undisturbed: Path, tmp_path: Path, number: int, epoch: int, step: int):
    """The kill leaves half of the next checkpoint. The guarantee requires the same number of threads."""
    command = [sys.executable, "-m", "synpipe_tests.support.finetune_once", str(tmp_path), str(number)]
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    assert subprocess.run(command, cwd=REPOSITORY, env=threads, check=False).returncode == -signal.SIGKILL
    checkpoint = tmp_path / "checkpoint.pt"
    said: list[str] = []
    report = run(tmp_path, said=said)
    assert f"continuing from epoch {epoch + 1}, step {step}" in said[0]
    assert not any("epoch 1 of" in line for line in said)
    assert report == json.loads((undisturbed / "report.json").read_text())
    for name in (finetuning.WEIGHTS, finetuning.HEAD):
        found, expected = load_file(tmp_path / name), load_file(undisturbed / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not checkpoint.exists()
    # Running the same command again returns the finished result.
    assert run(tmp_path, said=said) == report
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_curves_are_there_for_tensorboard(undisturbed: Path):
    events = EventAccumulator(str(undisturbed / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(9))
    report = json.loads((undisturbed / "report.json").read_text())
    scores = [entry["validation_balanced_accuracy"] for entry in report["history"]]
    assert [event.value for event in events.Scalars("validation/balanced_accuracy")] == pytest.approx(scores)


def test_training_ends_when_validation_no_longer_gets_better(tmp_path: Path):
    report = run(tmp_path, epochs=40, patience=1, learning_rate=1e-9)
    assert report["epochs"] == 2 and report["best_epoch"] == 1


def test_what_stops_training_says_so(tmp_path: Path):
    with pytest.raises(SynpipeError, match="learning_rate"):
        run(tmp_path / "diverges", learning_rate=1e30)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(SynpipeError, match="delete it"):
        run(tmp_path / "damaged")


def test_weights_and_biases_only_when_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "wandb.py").write_text(
        "class Run:\n"
        "    logged = []\n"
        "    def log(self, values, step): Run.logged.append((step, sorted(values)))\n"
        "    def finish(self): Run.logged.append('finished')\n"
        "def init(**settings): Run.logged.append(settings['id']); return Run()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    run(tmp_path / "without", epochs=1)
    assert "wandb" not in sys.modules
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    run(tmp_path / "with", epochs=1)
    logged = sys.modules.pop("wandb").Run.logged
    assert logged[0] == "with" and logged[-1] == "finished"
    assert (0, ["train/learning_rate", "train/loss"]) in logged
    (tmp_path / "wandb.py").write_text("def init(**settings): raise OSError('no network')\n")
    assert run(tmp_path / "unreachable", epochs=1)["epochs"] == 1
    del sys.modules["wandb"]


# As an asset, and as an encoder.

FINETUNE = {"method": "finetune", "epochs": 10, "batch_size": 12, "learning_rate": 3e-3, "patience": 10}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = write_textures(tmp_path_factory.mktemp("finetuned"), classifier=FINETUNE)
    make_outdated(project)
    return project


def test_the_trained_network_predicts_and_its_vectors_are_kept(made: Project):
    dataset = made.dataset("demo")
    counts = read_manifest(dataset, "classifier_tiny").figures
    assert counts["method"] == "finetune"
    assert counts["balanced_accuracy"] > 0.6  # chance is a third
    rows = read_table(dataset.table_path("tiny"))
    assert rows["predicted_neurotransmitter"].null_count == 0
    assert set(rows["predicted_neurotransmitter"].to_pylist()) <= set(CLASSES)
    # The table holds the vectors of the original encoder.
    assert set(rows["encoder_fingerprint"].to_pylist()) != {counts["encoder_fingerprint"]}
    assert find_leftovers(dataset) == []


def test_a_trained_network_is_an_encoder_of_its_own(made: Project):
    said = answer(made, "finetune", "--encoder", "tiny", "--name", "taught", "--register")
    assert "taught is in" in said
    registry = made.data / "encoders.yaml"
    entry = load_registry(registry)["taught"]
    assert isinstance(entry, EncoderSpec)
    assert (entry.weights, entry.crop_px, entry.precision) == ("weights/taught.safetensors", 64, "fp32")
    again = Project(made.data, made.store)
    change_spec(again, encoders=["tiny", "taught"], classifier={"method": "linear"})
    make_outdated(again)
    dataset = again.dataset("demo")
    embedded = read_manifest(dataset, "embeddings_taught").figures
    assert embedded["tiles_embedded"] == 0  # the classifier embedded them with the same network and preprocessing
    assert read_manifest(dataset, "index_taught").rows == 112
    assert read_manifest(dataset, "classifier_taught").figures["balanced_accuracy"] > 0.6
    reasons = {one.reason for one in find_leftovers(dataset)}
    assert reasons == {"of a training that no classifier uses"}
    assert "already" in refusal(invoke(again, "finetune", "--encoder", "tiny", "--name", "taught"))
    assert "cannot be the name" in refusal(invoke(again, "finetune", "--encoder", "tiny", "--name", "../taught"))


def test_a_training_whose_weights_were_replaced_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its folder is named after the former weights, so other weights would be taken for those later."""
    spec = EncoderSpec.parse({"model": "test_resnet.r160_in1k", "weights": "used.safetensors"}, "test")
    save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "used.safetensors")
    monkeypatch.setattr(finetune_once, "ENCODER", spec)
    monkeypatch.setattr(EncoderSpec, "identity", lambda *_args: "of the former weights")
    with pytest.raises(SynpipeError, match=r"used\.safetensors of encoder .* was replaced"):
        run(tmp_path)


def test_a_registry_that_is_laid_out_in_another_way_stays_as_it_is(tmp_path: Path):
    path = tmp_path / "encoders.yaml"
    entry = EncoderSpec(model="resnet18", weights="weights/new.safetensors")
    path.write_text("# mine\nencoders: {one: {model: resnet18, weights: random, seed: 0}}\n")
    before = path.read_text()
    with pytest.raises(SynpipeError, match="by hand"):
        register(path, "new", entry)
    assert path.read_text() == before
    path.write_text("# mine\nencoders:\n  one: {model: resnet18, weights: random, seed: 0}  # kept\n")
    before = path.read_text()
    register(path, "new", entry)
    assert path.read_text().startswith(before)
    assert yaml.safe_load(path.read_text())["encoders"]["new"] == {"model": "resnet18", "weights": entry.weights}
    register(path, "declared", entry.model_copy(update={"pixel_nm": (4.0, 5.0)}))
    assert load_registry(path)["declared"].pixel_nm == (4.0, 5.0)
