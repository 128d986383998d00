"""The explorer as a folder that any static host can publish: no server, no database, no other host.

In: the published indexes of some encoders of a data set, and its tiles. Out: the pages of the explorer, the columns of the
synapses and the quantised vectors that a worker in the browser searches, and the tiles in packs. Guarantees: the folder
is whole or absent; the name of every data file has a digest of its content, so that it may be cached for ever; what the
smaller vectors cost in recall is measured, and the folder says so.

    index.html, style.css, js/, vendor/   the pages, as the server has them
    sw.js                                 keeps the pages, so that they open without a network
    site.json                             names and describes everything else
    data/<kind>-<digest>.bin              columns, see `column_files`
    data/tiles-<digest>/<number>.bin      tiles, see `tile_packs`
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synpipe import __version__
from synpipe.annotations.schema import UNLABELLED
from synpipe.assets.volume import find_viewer
from synpipe.datasets import Dataset
from synpipe.embeddings.vectors import read_vectors
from synpipe.errors import SynpipeError
from synpipe.explorer.answers import MAP_CATEGORIES, MAP_NUMBERS
from synpipe.explorer.app import HEADERS, STATIC
from synpipe.explorer.column_files import Files, as_column, metadata_columns, narrow
from synpipe.explorer.quantised import measure_recall, quantise
from synpipe.explorer.tile_packs import write_tiles
from synpipe.index.distances import METRICS
from synpipe.index.publish import open_current, read_provenance
from synpipe.progress import Log
from synpipe.specs import digest
from synpipe.store.files import atomic_folder

FORMAT = 1
# What a page says of itself has no frame-ancestors.
CONTENT_POLICY = HEADERS["Content-Security-Policy"].removesuffix("; frame-ancestors 'none'")
NONE32 = 2**32 - 1  # of codes of neurons

OF_SYNAPSES = ("region", "hemilineage")
OF_ENCODER = ("predicted_neurotransmitter", "predicted_probability")
OF_MAP = tuple(
    name for name in (*MAP_CATEGORIES, *MAP_NUMBERS) if name not in ("neurotransmitter", *OF_SYNAPSES, *OF_ENCODER)
)


@dataclass(frozen=True)
class Report:
    """What was written. first_bytes: that an encoder's first answer needs, with the pages. recall: see `measure_recall`."""

    rows: int
    bytes: int
    first_bytes: dict[str, int]
    recall: dict[str, dict[str, Any]]


def export_site(dataset: Dataset, encoders: Sequence[str], folder: Path, log: Log) -> Report:
    """Write the explorer of a data set with these encoders, in place of an earlier site.

    Raises `SynpipeError` where an index has not been published, the indexes are of different synapses or tiles, or the
    folder holds something else.
    """
    former = _former(folder)
    opened = {encoder: open_current(dataset.lancedb_folder, encoder) for encoder in encoders}
    of_synapses = {encoder: read_provenance(table.schema)["dataset_version"] for encoder, table in opened.items()}
    if len(set(of_synapses.values())) > 1:
        raise SynpipeError(
            f"The indexes of {', '.join(encoders)} are of different versions of the synapses and cannot share a site: "
            f"`synpipe materialize --dataset {dataset.name} --stale`."
        )
    viewer = find_viewer(dataset)
    with atomic_folder(folder) as temporary:
        files = Files(temporary)
        entry: dict[str, Any] = {
            "name": dataset.name,
            "title": dataset.spec.title,
            "classes": [*dataset.spec.classes, UNLABELLED],
            "neuroglancer": None if viewer is None else viewer.template(),
            "voxel_size_nm": None if viewer is None else viewer.voxel_size_nm_zyx[::-1],
            "encoders": {},
        }
        for encoder, table in opened.items():
            synapses, vectors = _read(table, dataset.spec.classes)
            if encoder == encoders[0]:
                entry |= _synapses(files, synapses, dataset.spec.classes)
                tiles_of = synapses.select(["synapse_id", "content_hash"])
            log(f"{encoder}: {len(synapses):,} × {vectors.shape[1]}, made smaller and held against an exact search")
            entry["encoders"][encoder] = _encoder(files, synapses, vectors, entry) | {
                "version": table.version,
                "fingerprint": read_provenance(table.schema)["encoder_fingerprint"],
            }
        entry["tiles"] = write_tiles(files, dataset, tiles_of, former, log)
        site = {"format": FORMAT, "synpipe_version": __version__, "metrics": METRICS, "datasets": [entry]}
        (temporary / "site.json").write_text(json.dumps(site))
        pages = _write_pages(temporary)
        total = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file())
    made = entry["encoders"]
    first = {
        name: pages + sum(part["bytes"] for part in (entry["synapses"], one["columns"], one["vectors"]))
        for name, one in made.items()
    }
    return Report(len(tiles_of), total, first, {name: one["recall"] for name, one in made.items()})


def _former(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """An earlier site of this format and what it says of itself. Raises `SynpipeError` where the folder holds something else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        site = json.loads((folder / "site.json").read_text())
        if "synpipe_version" in site:
            return (folder, site) if site["format"] == FORMAT else None
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise SynpipeError(f"{folder} holds something that is no earlier export: name another folder.")


def _read(table: Any, classes: Sequence[str]) -> tuple[pa.Table, np.ndarray]:
    """All rows but for their vectors, and these, float32 (n, d): class by class, the unlabelled last, then by id."""
    columns = ["synapse_id", "neurotransmitter", "neuron_id", "x_nm", "y_nm", "z_nm", "content_hash", "norm"]
    columns += [*OF_SYNAPSES, *OF_ENCODER, *OF_MAP, "map_x", "map_y", "vector"]
    rows = table.search().select(columns).to_arrow()
    order = np.lexsort((rows["synapse_id"].to_numpy(), _class_numbers(rows, classes)))
    return rows.drop_columns(["vector"]).take(order), read_vectors(rows)[order]


def _class_numbers(rows: pa.Table, classes: Sequence[str]) -> np.ndarray:
    known = pc.index_in(rows["neurotransmitter"], pa.array(classes, pa.string()))
    return pc.fill_null(known, len(classes)).to_numpy()


def _synapses(files: Files, synapses: pa.Table, classes: Sequence[str]) -> dict[str, Any]:
    """What all encoders share. starts: the first row of each class, and behind the last the number of rows."""
    starts = np.searchsorted(_class_numbers(synapses, classes), np.arange(len(classes) + 2))
    neurons = synapses["neuron_id"].combine_chunks().dictionary_encode()
    columns = {
        "synapse_id": as_column(synapses["synapse_id"].to_numpy()),
        "neurons": as_column(neurons.dictionary.to_numpy()),
        "neuron": as_column(pc.fill_null(neurons.indices.cast(pa.uint32()), NONE32).to_numpy()),
        **{f"{axis}_nm": as_column(narrow(synapses[f"{axis}_nm"].to_numpy())) for axis in "xyz"},
        **metadata_columns(synapses, OF_SYNAPSES),
    }
    return {"starts": starts.tolist(), "synapses": files.write("synapses", columns)}


def _encoder(files: Files, synapses: pa.Table, vectors: np.ndarray, shared: Mapping[str, Any]) -> dict[str, Any]:
    small, norms = quantise(vectors), synapses["norm"].to_numpy()
    columns = {name: as_column(getattr(small, name)) for name in ("mean", "scale", "centre")}
    columns |= {"norm": as_column(norms), **metadata_columns(synapses, OF_ENCODER)}
    map_columns = {axis: as_column(synapses[f"map_{axis}"].to_numpy()) for axis in "xy"} | metadata_columns(
        synapses, OF_MAP
    )
    return {
        "dimensions": vectors.shape[1],
        "columns": files.write("encoder", columns),
        "vectors": files.write("vectors", {"codes": as_column(small.codes.reshape(-1))}),
        "map": None if np.isnan(map_columns["x"][0]).all() else files.write("map", map_columns),
        "recall": measure_recall(vectors, norms, small, shared["starts"], shared["classes"]),
    }


def _write_pages(folder: Path) -> int:
    """Copy the pages and let them answer from this folder. Returns their bytes."""
    shutil.copytree(STATIC, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("offline.js", "README.md"))
    index = (folder / "index.html").read_text(encoding="utf-8")
    policy = f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">'
    for old, new in (("<head>", f"<head>\n{policy}"), ('data-source="server"', 'data-source="static"')):
        index = index.replace(old, new, 1)
    (folder / "index.html").write_text(index, encoding="utf-8")
    pages = sorted(
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.is_file() and file.relative_to(folder).parts[0] != "data"
    )
    contents = [hashlib.sha256((folder / page).read_bytes()).hexdigest() for page in pages]
    data = sorted(file.relative_to(folder).as_posix() for file in (folder / "data").iterdir())
    # Without index.html, which some hosts answer with a redirection to the folder.
    kept = {
        "version": digest(contents),
        "pages": ["./", *(page for page in pages if page != "index.html")],
        "data": data,
    }
    worker = (STATIC / "js" / "offline.js").read_text(encoding="utf-8")
    (folder / "sw.js").write_text(f"const SITE = {json.dumps(kept)};\n\n{worker}", encoding="utf-8")
    return sum((folder / page).stat().st_size for page in pages)
