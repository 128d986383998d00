"""Measures how close embedding comes to the limit of the device: `python -m synpipe_tests.bench.device [--model NAME …]`.

For each network, three loops take turns in one process, on the same tiles: the bare forward pass on a batch that already lies on
the device, our loop from tiles on disk to vectors on disk, and SynOminous' loop (a PNG file per tile, torchvision's transforms,
batches of 32, a file per embedding). Tiles are synthetic and networks have random weights, neither of which affects the speed.
The bench needs neither Dagster nor LanceDB, so it can run on a bare GPU machine.
"""

import argparse
import os
import platform
import tempfile
import time
import zlib
from importlib.metadata import version
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from synpipe.embeddings.encoder_specs import EncoderSpec
from synpipe.embeddings.encoders import find_device, open_encoder, open_network
from synpipe.embeddings.profiling import profile, report
from synpipe.tiles.tile import TILE_PX, TileReader
from synpipe_tests.bench.bars import row

TILES_PER_PART = 512
BARS = {
    "cpu": {"xcit_nano_12_p16_224": 0.95, "resnet10t": 0.95},
    "cuda": {"deit3_base_patch16_224": 0.9, "xcit_nano_12_p16_224": 0.7},
}
# The bar is for a small encoder. On a CPU, even the bare forward pass of xcit_nano is less than this many times as fast as
# SynOminous' whole loop, so its figure is printed without a bar.
SYNOMINOUS_BAR = {"resnet10t": 2.5, "deit3_base_patch16_224": None, "xcit_nano_12_p16_224": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    on_gpu = torch.cuda.is_available()
    kind = "cuda" if on_gpu else "cpu"
    parser.add_argument("--model", nargs="*", default=list(BARS[kind]), choices=list(BARS[kind]))
    # On a CPU, many short turns: the speed of a shared machine varies by a tenth, for seconds at a time.
    parser.add_argument("--tiles", type=int, default=50_000 if on_gpu else 256)
    parser.add_argument("--turns", type=int, default=3 if on_gpu else 9)
    parser.add_argument("--compile", action="store_true", default=on_gpu, help="the default on a GPU")
    chosen = parser.parse_args()
    name = torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{platform.platform()}, {name}")
    print(", ".join(f"{package} {version(package)}" for package in ("torch", "timm", "numpy", "pyarrow")))
    with tempfile.TemporaryDirectory() as folder:
        reader = write_tiles(Path(folder) / "tiles", chosen.tiles)
        for model in chosen.model:
            spec = EncoderSpec(model=model, weights="random", seed=0, compile=chosen.compile)
            measure(spec, reader, chosen.tiles, chosen.turns, Path(folder), kind)


def write_tiles(folder: Path, count: int) -> TileReader:
    """Write tiles as `extraction` does, and open a reader for them."""
    folder.mkdir()
    random = np.random.default_rng(0)
    rows: dict[str, list] = {"synapse_id": list(range(count)), "file": [], "row": [], "crc32": []}
    for first in range(0, count, TILES_PER_PART):
        name, size = f"{first:08d}.h5", min(TILES_PER_PART, count - first)
        # As smooth as tissue, so that PNG compresses it like tissue and not like noise.
        coarse = random.integers(40, 220, (size, 3, TILE_PX // 8, TILE_PX // 8), np.uint8).repeat(8, 2).repeat(8, 3)
        tiles = coarse + random.integers(0, 16, coarse.shape, np.uint8)
        with h5py.File(folder / name, "w") as file:
            file["tiles"] = tiles
        rows["file"] += [name] * size
        rows["row"] += range(size)
        rows["crc32"] += [zlib.crc32(tile.data) for tile in tiles]
    table = pa.table(
        {name: pa.array(values, pa.uint32() if name == "crc32" else None) for name, values in rows.items()}
    )
    return TileReader(table, folder, "colour")


def measure(spec: EncoderSpec, reader: TileReader, count: int, turns: int, folder: Path, kind: str) -> None:
    encoder = open_encoder(spec, folder)
    synominous = SynOminous(spec, reader, folder / f"{spec.model}-synominous", min(count, 128))
    loops, rates = [], []
    for _ in range(turns):
        loops.append(profile([encoder], reader.read, count, folder))
        rates.append(synominous.rate())
    shares = [loop.utilisation or 0 for loop in loops]
    middle = sorted(loops, key=lambda loop: loop.utilisation or 0)[turns // 2]
    print(f"\n{spec.model}{', compiled' if spec.compile else ''}, {turns} turns, the middle one:")
    print(f"  {report([encoder], middle)}")
    print("  share of the bare forward pass, turn by turn: " + " ".join(f"{share:.2f}" for share in shares))
    row(f"{spec.model}: the loop ÷ its bare forward pass", np.median(shares), BARS[kind][spec.model], at_most=False)
    ratio = np.median([loop.tiles_per_second / rate for loop, rate in zip(loops, rates, strict=True)])
    print(f"  {np.median(rates):,.1f} tiles per second with SynOminous' loop; ours is {ratio:.2f} times as fast")
    if bar := SYNOMINOUS_BAR[spec.model]:
        row(f"{spec.model}: the loop ÷ SynOminous' loop", ratio, bar, at_most=False)


class SynOminous:
    """SynOminous' loop: a PNG file per tile, torchvision's transforms, batches of 32, fp32, a file per embedding."""

    BATCH = 32

    def __init__(self, spec: EncoderSpec, reader: TileReader, folder: Path, count: int) -> None:
        from torchvision import transforms

        folder.mkdir()
        self._model, _, seen = open_network(spec, folder)
        self._model.eval()
        self._device = find_device()
        self._model.to(self._device)
        self._folder, self._files = folder, [folder / f"{number}.png" for number in range(count)]
        for number, file in enumerate(self._files):
            Image.fromarray(reader.read(np.array([number]))[0].transpose(1, 2, 0)).save(file)
        size = transforms.Resize((seen["crop_px"], seen["crop_px"]))
        self._transform = transforms.Compose([size, transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])

    def rate(self) -> float:
        """Tiles per second."""
        started = time.perf_counter()
        for first in range(0, len(self._files), self.BATCH):
            files = self._files[first : first + self.BATCH]
            batch = torch.stack([self._transform(Image.open(file).convert("RGB")) for file in files])
            with torch.no_grad():
                vectors = self._model(batch.to(self._device)).cpu()
            for file, vector in zip(files, vectors, strict=True):
                torch.save(vector, file.with_suffix(".pt"))
        return len(self._files) / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
