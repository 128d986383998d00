"""Estimate what a whole brain needs, from measurements of a part: `python -m synpipe_tests.bench.scale`.

Rates and sizes are measured in this run and multiplied by the number of synapses. Values that cannot be measured here
are constants in this file, with their sources, and are marked in the output: the density of synapses, the rate of a
network on a GPU where there is none, and prices.
"""

import argparse
import os
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from synpipe.assets.manifest import read_manifest
from synpipe.datasets import Project
from synpipe.defs.run import materialize
from synpipe.embeddings.encoder_specs import EncoderSpec
from synpipe.embeddings.encoders import open_encoder
from synpipe.embeddings.profiling import Profile, profile
from synpipe.embeddings.registry import load_registry
from synpipe.index.build import SAMPLE_RATE, partitions_for
from synpipe.index.publish import publish
from synpipe_tests.bench import extraction as bench_extraction
from synpipe_tests.bench import search as bench_search
from synpipe_tests.bench.device import write_tiles
from synpipe_tests.bench.explorer import write_table
from synpipe_tests.conftest import REPOSITORY

SYNAPSES = 130_000_000  # Dorkenwald et al., Nature 2024: chemical synapses of FlyWire's reconstruction of FAFB
BRAIN_UM3 = 8e7  # Zheng et al., Cell 2018: volume of the brain of an adult fly
TILES, BATCHES = 1000, 16
INDEX_ROWS, DIMENSIONS = 400_000, 128  # of xcit_nano
TILE_BYTES = 3 * 256 * 256
# timm, results/benchmark-infer-amp-nchw-pt240-cu124-rtx4090-dynamo.csv: images of 224 × 224 per second, compiled, in
# batches of 256.
PUBLISHED_GPU, PUBLISHED_RATES = "RTX 4090", {"xcit_nano": 30_600, "vit_base_patch16_224": 3_346}
GPU_SHARE = 0.7  # share of the network's own rate that the loop should reach there; see the bench `device`
DOLLARS_GPU_HOUR, DOLLARS_CORE_HOUR, DOLLARS_GB_MONTH = 3.0, 0.05, 0.023  # list prices of large clouds, rounded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--synapses", type=int, default=SYNAPSES)
    count = parser.parse_args().synapses
    print(f"{platform.platform()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "tensorstore", "lancedb", "pyarrow")))
    cut = cut_outs(count)
    with tempfile.TemporaryDirectory(prefix="synpipe-bench-") as folder:
        rates = embedding_rates(Path(folder))
        built = index_build(Path(folder) / "index", INDEX_ROWS)
    told(count, cut, rates, built, table_bytes())


def cut_outs(count: int) -> dict[str, Any]:
    """Measure cut-outs as dense as the synapses of the brain, from 64³ JPEG chunks on a server that takes 20 ms per request."""
    voxels = TILES / count * BRAIN_UM3 * 1e9 / np.prod(bench_extraction.VOXEL_NM_ZYX)
    side = round(float((voxels / 64) ** 0.5) / 64) * 64
    shape = (64, side, side)
    print(f"cut-outs: {TILES:,} in {side} × {side} × 64 voxels, as dense as {count:,} in the brain", flush=True)
    with tempfile.TemporaryDirectory(prefix="synpipe-bench-") as folder:
        texture, name = bench_extraction._texture()
        print(f"  texture: {name}")
        with bench_extraction.serving(bench_extraction._chunks(texture, Path(folder) / "written")) as server:
            starts = bench_extraction._starts(shape, TILES)
            path = f"precomputed://{server.url}/{'x'.join(map(str, shape))}"
            return server.measure("synpipe", path=path, starts=starts)


def embedding_rates(folder: Path) -> dict[str, Profile]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    registry = REPOSITORY / "data" / "encoders.yaml"
    shipped = load_registry(registry)["em_d4"]
    assert isinstance(shipped, EncoderSpec)
    xcit = EncoderSpec(model="xcit_nano_12_p16_224", weights="random", seed=0, compile=device == "cuda")
    found = {}
    for name, spec in (("em_d4", shipped), ("xcit_nano", xcit)):
        encoder = open_encoder(spec, registry.parent, device)
        tiles = BATCHES * encoder.batch_size
        found[name] = profile([encoder], write_tiles(folder / name, tiles).read, tiles, folder)
        print(f"{name}: {found[name].tiles_per_second:,.1f} tiles a second on {device}", flush=True)
    return found


def index_build(folder: Path, rows: int) -> tuple[float, float]:
    """Return the seconds to build, verify and publish an index, and its bytes per row."""
    folder.mkdir()
    write_table(folder / "table.parquet", *bench_search.made_up(rows, DIMENSIONS, spread=False))
    began = time.perf_counter()
    publish(folder / "table.parquet", folder / "db", "made_up", "0" * 32, lambda line: None)
    seconds = time.perf_counter() - began
    size = sum(file.stat().st_size for file in (folder / "db").rglob("*") if file.is_file())
    print(f"index of {rows:,} × {DIMENSIONS}: {seconds:.0f} s, {size / rows:,.0f} bytes a row", flush=True)
    return seconds, size / rows


def table_bytes() -> dict[str, float]:
    """Return the bytes per row of the demo's embedding tables in Parquet."""
    project = Project.locate()
    materialize(project, "demo")
    demo = project.dataset("demo")
    made = {name: read_manifest(demo, f"embedding_table_{name}").figures for name in demo.encoders}
    return {name: counts["bytes"] / counts["rows"] for name, counts in made.items()}


def told(
    count: int,
    cut: dict[str, Any],
    rates: dict[str, Profile],
    built: tuple[float, float],
    tables: dict[str, float],
) -> None:
    def line(what: str, each: str, all_of_them: str, note: str = "") -> None:
        print(f"  {what:<50} {each:>14} {all_of_them:>16}   {note}")

    print(f"\nFor {count:,} synapses")
    line("", "a synapse", "all of them")
    line(
        "read from the volume", f"{cut['bytes'] / TILES / 1e3:.0f} kB", f"{cut['bytes'] / TILES * count / 1e12:,.1f} TB"
    )
    line("  in requests", f"{cut['requests'] / TILES:.1f}", f"{cut['requests'] / TILES * count / 1e6:,.0f} million")
    core_hours = cut["cpu_ms"] / 1e3 * count / 3600
    line("  core hours to decode, cut out, check and write", f"{cut['cpu_ms']:.1f} ms", f"{core_hours:,.0f}")
    line("tiles in the store", f"{TILE_BYTES / 1e3:.0f} kB", f"{TILE_BYTES * count / 1e12:,.1f} TB")
    for name, rate in rates.items():
        hours = count / rate.tiles_per_second / 3600
        line(f"{name}: hours of this machine", f"{1e3 / rate.tiles_per_second:.2f} ms", f"{hours:,.0f}")
    for name, images in PUBLISHED_RATES.items():
        note = f"{GPU_SHARE:.0%} of timm's figure, an {PUBLISHED_GPU}, compiled; not measured here"
        line(
            f"{name}: GPU hours",
            f"{1e6 / images / GPU_SHARE:.0f} µs",
            f"{count / images / GPU_SHARE / 3600:,.1f}",
            note,
        )
    for name, size in tables.items():
        line(f"Parquet, {name}", f"{size:,.0f} B", f"{size * count / 1e9:,.0f} GB", "as in the demo")
    seconds, row_bytes = built
    line(
        f"LanceDB with its indexes, {DIMENSIONS} dimensions",
        f"{row_bytes:,.0f} B",
        f"{row_bytes * count / 1e9:,.0f} GB",
    )
    # Every row is compared with every partition, and the number of partitions grows with the square root of the rows.
    hours = seconds * (count / INDEX_ROWS) ** 1.5 / 3600
    note = f"{partitions_for(count):,} partitions; extrapolated by rows × √rows from {INDEX_ROWS:,}: {seconds:.0f} s"
    line("  hours of this machine to build it", "", f"{hours:,.0f}", note)
    held = SAMPLE_RATE * partitions_for(count)
    line(
        "  vectors in memory meanwhile",
        "",
        f"{4e-9 * DIMENSIONS * held:,.1f} GB",
        f"of {held:,} rows at a time, and copies",
    )
    gpu = count / PUBLISHED_RATES["xcit_nano"] / GPU_SHARE / 3600 * DOLLARS_GPU_HOUR
    line("cost: cut-outs", "", f"${core_hours * DOLLARS_CORE_HOUR:,.0f}", f"${DOLLARS_CORE_HOUR} a core hour, assumed")
    line("cost: xcit_nano on a GPU", "", f"${gpu:,.0f}", f"${DOLLARS_GPU_HOUR} a GPU hour, assumed")
    month = (TILE_BYTES + row_bytes) * count / 1e9 * DOLLARS_GB_MONTH
    line("cost: tiles and index on an object store", "", f"${month:,.0f} a month", f"${DOLLARS_GB_MONTH} a GB, assumed")


if __name__ == "__main__":
    main()
