"""Measure the static site with 103,511 × 128 beside the method of SynOminous: `python -m synpipe_tests.bench.site`.

Ids, classes and positions on the map are the real ones of SynOminous if SYNPIPE_REAL_DATA has
`fafb_v3/synominous_umap.json.gz`. Vectors and all other columns are synthetic. There are no tiles, because a page loads
them only after an answer. The method of SynOminous is its own query in PGlite with pgvector, in Node; npm downloads
both into a temporary folder.
"""

import argparse
import gzip
import io
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import h5py
import numpy as np
import pyarrow as pa
from PIL import Image
from playwright.sync_api import Page

from synpipe.datasets import NEUROTRANSMITTERS, Dataset, DatasetSpec
from synpipe.explorer import site
from synpipe.explorer.tile_packs import jpeg
from synpipe.index.publish import publish
from synpipe.tiles.tile import SECTIONS, TILE_PX
from synpipe_tests.bench.bars import row
from synpipe_tests.bench.projection import vectors_like_an_encoders
from synpipe_tests.support.browser import chromium
from synpipe_tests.support.static_host import Host, host
from synpipe_tests.support.tables import embedding_table

ROWS, DIMENSIONS = 103_511, 128
QUERIES, PGLITE_QUERIES, TILES = 101, 21, 40
FIRST_MB_BAR, ANSWER_MS_BAR = 20, 100
PGLITE = {"@electric-sql/pglite": "0.5.14", "@electric-sql/pglite-pgvector": "0.0.15"}
SYNOMINOUS = Path(__file__).parents[1] / "node" / "synominous.mjs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS, help="others than the default are made up altogether")
    rows = parser.parse_args().rows
    print(f"{platform.platform()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(", ".join(f"{name} {version(name)}" for name in ("numpy", "pyarrow", "lancedb", "playwright")))
    with tempfile.TemporaryDirectory(prefix="synpipe-bench-") as temporary:
        folder = Path(temporary)
        vectors, columns, what = rows_of(rows)
        print(f"{rows:,} × {DIMENSIONS}, {what}", flush=True)
        report = export(folder, vectors, columns)
        with host(folder / "site", ranges=True) as served, chromium() as browser:
            print(f"Chromium {browser.version}", flush=True)
            context = browser.new_context()
            found = measure(context.new_page(), served, columns["synapse_id"])
        beside = synominous(folder, vectors, columns)
    show(report.recall["made_up"], found, beside)
    show_tiles()


def rows_of(count: int) -> tuple[np.ndarray, dict[str, Any], str]:
    """Return the vectors, the columns of the table, and a description of which of them are real."""
    random = np.random.default_rng(0)
    real = Path(os.environ.get("SYNPIPE_REAL_DATA", "../shared/em")) / "fafb_v3" / "synominous_umap.json.gz"
    if count == ROWS and real.exists():
        points = json.loads(gzip.decompress(real.read_bytes()))
        ids, labels = (np.array([point[key] for point in points]) for key in ("s", "neurotransmitter"))
        places = np.array([[point["x"], point["y"]] for point in points], np.float32)
        what = "ids, classes and map of SynOminous"
    else:
        ids = random.choice(2**31, count, replace=False)
        labels = random.choice(NEUROTRANSMITTERS, count, p=[0.46, 0.31, 0.07, 0.09, 0.05, 0.02])
        places, what = random.normal(size=(count, 2)).astype(np.float32), "all made up"
    columns = {
        "synapse_id": ids,
        "neurotransmitter": labels.tolist(),
        "neuron_id": random.integers(1, 10**7, 2_804)[random.integers(0, 2_804, count)],
        "hemilineage": [f"hemilineage {number}" for number in random.integers(0, 90, count)],
        "region": [f"region {number}" for number in random.integers(0, 80, count)],
        "confidence": random.random(count, np.float32),
        "source": ["table"] * count,
        **{f"{axis}_nm": random.integers(0, 200_000, count) * 4.0 for axis in "xyz"},
    }
    derived = {
        "synapse_id": ids,
        "predicted_neurotransmitter": labels.tolist(),
        "predicted_probability": random.random(count, np.float32),
        "map_x": places[:, 0],
        "map_y": places[:, 1],
    }
    return vectors_like_an_encoders(count, DIMENSIONS, seed=1), columns | {"derived": [pa.table(derived)]}, what


def export(folder: Path, vectors: np.ndarray, columns: dict[str, Any]) -> site.SiteReport:
    spec = DatasetSpec.parse(
        {
            "title": "Bench",
            "volume": {"path": "none.h5"},
            "annotations": [{"format": "cremi", "path": "none.h5"}],
            "encoders": ["made_up"],
        },
        "bench",
    )
    dataset = Dataset("bench", spec, folder / "store", folder, {}, folder)
    path = embedding_table(folder / "table.parquet", vectors, 50, **columns)
    publish(path, dataset.lancedb_folder, "made_up", "0" * 32, lambda line: None)
    began = time.perf_counter()
    with patch.object(site, "write_tiles", no_tiles):
        report = site.export_site(dataset, ["made_up"], folder / "site", lambda line: None)
    print(f"exported in {time.perf_counter() - began:.0f} s, without tiles", flush=True)
    return report


def no_tiles(files: Any, dataset: Dataset, synapses: pa.Table, *_: Any) -> dict[str, Any]:
    nothing = {name: (np.zeros(len(synapses), np.uint32), {}) for name in ("length", "pack")}
    return {"folder": "data/tiles-none", "places": files.write("places", nothing)}


def measure(page: Page, served: Host, ids: np.ndarray) -> dict[str, Any]:
    """Measure what a visitor experiences. Times are in ms; those by metric include the messages to the worker and back."""
    random = np.random.default_rng(1)
    address = f"{served.url}?id={ids[0]}"

    def open_page() -> float:
        began = time.perf_counter()
        page.goto(address)
        page.wait_for_selector(".neighbour", timeout=120_000)
        return 1000 * (time.perf_counter() - began)

    first_ms = open_page()
    first_bytes = sum(size for path, _, size in served.asked if "/tiles-" not in path)
    page.wait_for_function("() => navigator.serviceWorker.controller !== null")
    page.wait_for_timeout(1000)
    served.asked.clear()
    reload_ms = open_page()
    reload_bytes = sum(size for path, _, size in served.asked if "/tiles-" not in path)
    page.evaluate(
        """async () => {
            window.source = await (await import(new URL("js/source-static.js", location.href))).open(location.href);
        }"""
    )
    times = {
        metric: page.evaluate(
            """async ({ ids, metric }) => {
                const times = [];
                for (const id of ids) {
                    const began = performance.now();
                    await source.search({ dataset: "bench", encoder: "made_up", id, metric, perClass: 4 });
                    times.push(performance.now() - began);
                }
                return times.slice(1);
            }""",
            {"metric": metric, "ids": [str(each) for each in random.choice(ids, QUERIES)]},
        )
        for metric in ("cosine", "l2", "dot", "l1")
    }
    return {
        "first_ms": first_ms,
        "first_bytes": first_bytes,
        "reload_ms": reload_ms,
        "reload_bytes": reload_bytes,
        "times": {metric: float(np.median(each)) for metric, each in times.items()},
    }


def synominous(folder: Path, vectors: np.ndarray, columns: dict[str, Any]) -> dict[str, Any] | str:
    """Run the method of SynOminous with the same rows. Returns its figures, or the reason why there are none."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        return "npm or node is not installed"
    beside = folder / "pglite"
    beside.mkdir()
    (beside / "package.json").write_text("{}")
    names = [f"{name}@{number}" for name, number in PGLITE.items()]
    installed = subprocess.run(
        [npm, "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(beside), *names],
        capture_output=True,
        text=True,
        check=False,
    )
    if installed.returncode:
        return f"npm cannot install {names[0]}: is there a network?"
    number = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    print(f"Node {number}, {', '.join(names)}", flush=True)
    unit = np.round(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), 3)
    ids = columns["synapse_id"].tolist()
    rows = zip(ids, columns["neurotransmitter"], unit.astype(np.float64).round(3).tolist(), strict=True)
    content = {
        "embeddings": [{"s": synapse_id, "n": label, "v": vector} for synapse_id, label, vector in rows],
        "queries": [str(each) for each in np.random.default_rng(1).choice(ids, PGLITE_QUERIES)],
    }
    packed = gzip.compress(json.dumps(content, separators=(",", ":")).encode(), 6)
    (beside / "embeddings.json.gz").write_bytes(packed)
    shutil.copy(SYNOMINOUS, beside)
    command = [node, "--max-old-space-size=8192", "synominous.mjs", "embeddings.json.gz"]
    run = subprocess.run(command, cwd=beside, capture_output=True, text=True, check=False)
    if run.returncode:
        return f"PGlite failed: {run.stderr.strip().splitlines()[-1]}"
    programs = sum(file.stat().st_size for file in (beside / "node_modules").rglob("*") if file.name in PROGRAMS)
    return json.loads(run.stdout) | {"bytes": len(packed) + programs}


# The files of PGlite that a page of SynOminous loads, without modules of a few kilobytes.
PROGRAMS = ("pglite.wasm", "pglite.data", "vector.tar.gz")


def show(recall: dict[str, Any], found: dict[str, Any], beside: dict[str, Any] | str) -> None:
    there = isinstance(beside, dict)
    print(f"\n{'':<48} {'static site':>12} {'bar':>8}   {'PGlite (Node)' if there else ''}")
    first, answer = found["first_bytes"] / 1e6, found["times"]["cosine"]
    pglite = dict.fromkeys(("bytes", "ms", "load"), "")
    if isinstance(beside, dict):
        pglite = {
            "bytes": f"{beside['bytes'] / 1e6:.1f}",
            "ms": f"{np.median(beside['milliseconds']):.0f}",
            "load": f"{1000 * beside['loadSeconds']:,.0f}, {beside['gigabytes']:.1f} GB",
        }
    for what, value, bar, other in (
        ("MB before the first answer", f"{first:.1f}", f"≤ {FIRST_MB_BAR}", pglite["bytes"]),
        ("ms until the first answer, host on this machine", f"{found['first_ms']:,.0f}", "", pglite["load"]),
        ("ms, top 4 of each class, cosine, median", f"{answer:.1f}", f"≤ {ANSWER_MS_BAR}", pglite["ms"]),
        *((f"  the same, {metric}", f"{found['times'][metric]:.1f}", "", "") for metric in ("l2", "dot", "l1")),
        ("bytes of a reload", f"{found['reload_bytes']:,}", "0", ""),
        ("ms of a reload until its answer", f"{found['reload_ms']:,.0f}", "", ""),
        ("recall@4 of each class, cosine", f"{recall['overall']:.4f}", "", ""),
        *((f"  the same, {metric}", f"{recall['metrics'][metric]:.4f}", "", "") for metric in ("l2", "dot", "l1")),
        (f"  of the rarest, {recall['rarest_class']}", f"{recall['rarest']:.4f}", "", ""),
    ):
        print(f"{what:<48} {value:>12} {bar:>8}   {other}")
    if not there:
        print(f"PGlite beside it is left out: {beside}.")
    row("static site, MB before the first answer", first, FIRST_MB_BAR)
    row("static site, ms an answer", answer, ANSWER_MS_BAR)
    row("static site, bytes of a reload", found["reload_bytes"], 0)


def show_tiles() -> None:
    """Compare size, time and fidelity of real ssTEM tiles, if available, in the format of the packs and in others."""
    path = Path(os.environ.get("SYNPIPE_REAL_DATA", "../shared/em")) / "vnc_stack1.h5"
    if not path.exists():
        return
    with h5py.File(path) as file:
        volume = file["volumes/raw"][:]
    random = np.random.default_rng(0)
    starts = random.integers(0, np.array(volume.shape) - (SECTIONS - 1, TILE_PX, TILE_PX), (TILES, 3))
    tiles = [volume[z : z + SECTIONS, y : y + TILE_PX, x : x + TILE_PX] for z, y, x in starts]

    def pillow(form: str, **options: Any) -> Callable[[np.ndarray], bytes]:
        def encode(tile: np.ndarray) -> bytes:
            buffer = io.BytesIO()
            Image.fromarray(tile.transpose(1, 2, 0)).save(buffer, form, **options)
            return buffer.getvalue()

        return encode

    print(f"\n{f'{TILES} tiles of ssTEM':<48} {'kB':>12} {'CPU ms':>8}   PSNR (dB) of z−1, z, z+1")
    for name, encode in (
        ("JPEG, as in the packs", jpeg),
        ("PNG", pillow("PNG")),
        ("WebP, quality 90", pillow("WEBP", quality=90)),
        ("AVIF 4:4:4, quality 68", pillow("AVIF", quality=68, subsampling="4:4:4", speed=8)),
    ):
        began = time.process_time()
        images = [encode(tile) for tile in tiles]
        cpu_ms = 1000 * (time.process_time() - began) / TILES
        seen = [np.asarray(Image.open(io.BytesIO(image)).convert("RGB")).transpose(2, 0, 1) for image in images]
        errors = np.mean([(a - b.astype(float)) ** 2 for a, b in zip(seen, tiles, strict=True)], axis=(0, 2, 3))
        fidelity = "exact" if not errors.any() else " ".join(f"{10 * np.log10(255**2 / error):.1f}" for error in errors)
        print(f"{name:<48} {np.mean([len(image) for image in images]) / 1000:>12.1f} {cpu_ms:>8.1f}   {fidelity}")


if __name__ == "__main__":
    main()
