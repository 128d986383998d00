"""How near the device loop comes to the device: `python -m synpipe_tests.bench.device [--model NAME …] [--compile]`.

For each network, by turns in one process, on the same tiles: its bare forward pass on a batch that lies ready on the device, the
loop from tiles on disk to vectors on disk, and SynOminous' loop (a PNG file a tile, torchvision's transforms, batches of
32, a file an embedding). Tiles are made up, networks have random weights: neither changes the speed. Knows nothing of Dagster and
LanceDB, so it runs where only torch, timm, numpy, pyarrow, h5py and pillow are, as on a machine with a GPU.
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
# Of a small encoder. On a CPU the forward pass of xcit_nano alone is less than that times faster than the whole of that loop,
# whatever is done around it; its figure is printed without a bar.
SYNOMINOUS_BAR = {"resnet10t": 2.5, "deit3_base_patch16_224": None, "xcit_nano_12_p16_224": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    on_gpu = torch.cuda.is_available()
    kind = "cuda" if on_gpu else "cpu"
    parser.add_argument("--model", nargs="*", default=list(BARS[kind]), choices=list(BARS[kind]))
    # On a CPU many short turns: a machine that others share is now faster, now slower, by a tenth and for seconds.
    parser.add_argument("--tiles", type=int, default=50_000 if on_gpu else 256)
    parser.add_argument("--turns", type=int, default=3 if on_gpu else 9)
    parser.add_argument("--compile", action="store_true", default=on_gpu, help="as a matter of course on a GPU")
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
    """Tiles as `extraction` writes them, and what reads them."""
    folder.mkdir()
    random = np.random.default_rng(0)
    rows: dict[str, list] = {"synapse_id": list(range(count)), "file": [], "row": [], "crc32": []}
    for first in range(0, count, TILES_PER_PART):
        name, size = f"{first:08d}.h5", min(TILES_PER_PART, count - first)
        # As smooth as tissue: PNG packs and unpacks it as it does tissue, not as it does noise.
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
    before = SynOminous(spec, reader, folder / f"{spec.model}-synominous", min(count, 128))
    loops, rates = [], []
    for _ in range(turns):
        loops.append(profile([encoder], reader.read, count, folder))
        rates.append(before.rate())
    shares = [loop.utilisation or 0 for loop in loops]
    middle = sorted(loops, key=lambda loop: loop.utilisation or 0)[turns // 2]
    print(f"\n{spec.model}{', compiled' if spec.compile else ''}, {turns} turns, the middle one:")
    print(f"  {report([encoder], middle)}")
    print("  of the bare forward pass, turn by turn: " + " ".join(f"{share:.2f}" for share in shares))
    row(f"{spec.model}: the loop ÷ its bare forward pass", np.median(shares), BARS[kind][spec.model], at_most=False)
    ratio = np.median([loop.tiles_per_second / rate for loop, rate in zip(loops, rates, strict=True)])
    print(f"  {np.median(rates):,.1f} tiles a second by SynOminous' loop: {ratio:.2f} times as fast")
    if bar := SYNOMINOUS_BAR[spec.model]:
        row(f"{spec.model}: the loop ÷ SynOminous' loop", ratio, bar, at_most=False)


class SynOminous:
    """Its loop: a PNG file a tile, torchvision's transforms, batches of 32, in fp32, a file an embedding."""

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
        """Tiles a second."""
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
