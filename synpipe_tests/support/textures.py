"""A data set whose classes are textures: coarse, medium and fine noise. Any network learns them from a few tiles.

The tiles lie side by side without overlap, so the split sets none aside. There are 27 neurons with four synapses each, nine neurons
per class, and four synapses without a neuron or a class.
"""

import csv
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import yaml
from scipy.ndimage import gaussian_filter

from synpipe.datasets import Project
from synpipe_tests.support import outdated

CLASSES = ("coarse", "medium", "fine")
SIGMAS = dict(zip(CLASSES, (6.0, 2.5, 1.0), strict=True))
SIDE, LAYERS, TILE_PX, VOXEL_NM = 6, 4, 256, (40, 4, 4)
NEURONS_PER_CLASS, SYNAPSES_PER_NEURON = 9, 4
SPEC: dict[str, Any] = {
    "title": "Textures",
    "volume": {"path": "volume.h5"},
    "annotations": [{"format": "table", "path": "synapses.csv", "columns": {"x": "x_nm", "y": "y_nm", "z": "z_nm"}}],
    "classes": list(CLASSES),
    "tiles": {"shards": 3},
    "encoders": ["tiny"],
    "projection": None,
    "evaluation": None,
}
ENCODERS = {"tiny": {"model": "test_resnet", "weights": "random", "seed": 0, "crop_px": 64, "precision": "fp32"}}


def write_textures(folder: Path, **changes: Any) -> Project:
    """Write the project, with an empty store. `changes` replace keys of the data set's YAML file."""
    datasets = folder / "data" / "datasets"
    datasets.mkdir(parents=True)
    random = np.random.default_rng(0)
    per_class = NEURONS_PER_CLASS * SYNAPSES_PER_NEURON
    labels = [name for name in CLASSES for _ in range(per_class)] + [""] * SYNAPSES_PER_NEURON
    places = random.permutation(SIDE * SIDE * LAYERS)[: len(labels)]
    voxels = np.full((3 * LAYERS, SIDE * TILE_PX, SIDE * TILE_PX), 128, np.uint8)
    rows = []
    for number, (label, place) in enumerate(zip(labels, places.tolist(), strict=True)):
        layer, row, column = place // SIDE**2, place // SIDE % SIDE, place % SIDE
        noise = gaussian_filter(random.normal(size=(TILE_PX, TILE_PX)), SIGMAS[label or CLASSES[number % len(CLASSES)]])
        y, x = row * TILE_PX, column * TILE_PX
        texture = np.clip(128 + 40 * noise / noise.std(), 0, 255).astype(np.uint8)
        voxels[3 * layer : 3 * layer + 3, y : y + TILE_PX, x : x + TILE_PX] = texture
        centre = (3 * layer + 1.5, y + TILE_PX / 2, x + TILE_PX / 2)
        z_nm, y_nm, x_nm = (value * size for value, size in zip(centre, VOXEL_NM, strict=True))
        rows.append([1000 + number, z_nm, y_nm, x_nm, number // SYNAPSES_PER_NEURON + 1 if label else "", label])
    with h5py.File(datasets / "volume.h5", "w") as file:
        file["volumes/raw"] = voxels
        file["volumes/raw"].attrs["resolution"] = VOXEL_NM
    with (datasets / "synapses.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["synapse_id", "z_nm", "y_nm", "x_nm", "neuron_id", "neurotransmitter"])
        writer.writerows(rows)
    (datasets / "demo.yaml").write_text(yaml.safe_dump({**SPEC, **changes}))
    (folder / "data" / "encoders.yaml").write_text(yaml.safe_dump({"encoders": ENCODERS}))
    return Project(folder / "data", folder / "store")


def change_spec(project: Project, **changes: Any) -> None:
    path = project.data / "datasets" / "demo.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


def make_outdated(project: Project) -> set[str]:
    """Make every asset that is stale or missing; returns their names."""
    return outdated.make_outdated(project.dataset("demo"))
