"""Exports the explorer as a folder that any static host can publish. The site needs no server, no database and no other host.

Input: the published indexes of some encoders of a data set, and its tiles. Output: the pages of the explorer, the columns of the
synapses, the quantised vectors that a worker in the browser searches, and packs of tiles.

Guarantees:

- The folder is either complete or unchanged.
- The name of each data file contains a digest of its content, so browsers may cache the file for ever.
- The recall that the quantised vectors cost is measured and recorded in `site.json`.

    index.html, style.css, js/, vendor/   the pages, as on the server
    sw.js                                 service worker: keeps the pages, so that they open without a network
    site.json                             names and describes all other files
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
from synpipe.explorer.column_files import SiteFiles, as_column, metadata_columns, narrow
from synpipe.explorer.map_file import MAP_CATEGORIES, MAP_NUMBERS
from synpipe.explorer.quantised import measure_recall, quantise
from synpipe.explorer.server import HEADERS, STATIC
from synpipe.explorer.tile_packs import FormerSite, write_tiles
from synpipe.index.distances import METRICS
from synpipe.index.publish import open_current, read_provenance
from synpipe.progress import Log
from synpipe.specs import digest
from synpipe.store.files import atomic_folder

FORMAT = 1
# Browsers ignore frame-ancestors in a <meta> element.
CONTENT_POLICY = HEADERS["Content-Security-Policy"].removesuffix("; frame-ancestors 'none'")
NO_NEURON = 2**32 - 1  # the code of a synapse without a neuron; codes are uint32

# Each column of a synapse is stored once: with the synapses, with each encoder, or with each encoder's map.
SYNAPSE_COLUMNS = ("region", "hemilineage")
ENCODER_COLUMNS = ("predicted_neurotransmitter", "predicted_probability")
MAP_COLUMNS = tuple(
    name
    for name in (*MAP_CATEGORIES, *MAP_NUMBERS)
    if name not in ("neurotransmitter", *SYNAPSE_COLUMNS, *ENCODER_COLUMNS)
)


@dataclass(frozen=True)
class SiteReport:
    """What an export wrote.

    rows: synapses. bytes: of all files. first_bytes: what a browser loads before the first answer of each encoder, including the
    pages. recall: by encoder, see `measure_recall`.
    """

    rows: int
    bytes: int
    first_bytes: dict[str, int]
    recall: dict[str, dict[str, Any]]


def export_site(dataset: Dataset, encoders: Sequence[str], folder: Path, log: Log) -> SiteReport:
    """Write the explorer of a data set with these encoders. An earlier site in the folder is replaced.

    Raises `SynpipeError` if an index has not been published, if the indexes were made from different synapses or tiles, or if the
    folder contains anything else.
    """
    former = _find_former(folder)
    indexes = _open_indexes(dataset, encoders)
    with atomic_folder(folder) as temporary:
        files = SiteFiles(temporary)
        entry = _describe_dataset(dataset)
        for encoder, index in indexes.items():
            synapses, vectors = _read_index(index, dataset.spec.classes)
            if encoder == encoders[0]:
                entry |= _write_synapses(files, synapses, dataset.spec.classes)
                tile_keys = synapses.select(["synapse_id", "content_hash"])
            log(
                f"{encoder}: quantising {len(synapses):,} × {vectors.shape[1]} values and comparing with an exact search"
            )
            entry["encoders"][encoder] = _write_encoder(files, synapses, vectors, entry) | {
                "version": index.version,
                "fingerprint": read_provenance(index.schema)["encoder_fingerprint"],
            }
        entry["tiles"] = write_tiles(files, dataset, tile_keys, former, log)
        site = {"format": FORMAT, "synpipe_version": __version__, "metrics": METRICS, "datasets": [entry]}
        (temporary / "site.json").write_text(json.dumps(site))
        page_bytes = _write_pages(temporary)
        total_bytes = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file())
    described = entry["encoders"]
    first_bytes = {
        encoder: page_bytes + sum(file["bytes"] for file in (entry["synapses"], parts["columns"], parts["vectors"]))
        for encoder, parts in described.items()
    }
    recall = {encoder: described[encoder]["recall"] for encoder in described}
    return SiteReport(len(tile_keys), total_bytes, first_bytes, recall)


def _find_former(folder: Path) -> FormerSite | None:
    """An earlier site in the folder; None if there is none, or if it has another format.

    Raises `SynpipeError` if the folder contains anything else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        site = json.loads((folder / "site.json").read_text())
        if "synpipe_version" in site:
            return FormerSite(folder, site) if site["format"] == FORMAT else None
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise SynpipeError(f"{folder} contains files that are not an earlier export. Name another folder.")


def _open_indexes(dataset: Dataset, encoders: Sequence[str]) -> dict[str, Any]:
    """The current LanceDB table of each encoder. Raises `SynpipeError` if they were made from different synapses."""
    indexes = {encoder: open_current(dataset.lancedb_folder, encoder) for encoder in encoders}
    versions = {read_provenance(index.schema)["dataset_version"] for index in indexes.values()}
    if len(versions) > 1:
        raise SynpipeError(
            f"The indexes of {', '.join(encoders)} were made from different versions of the synapses and cannot share a site. Run "
            f"`synpipe materialize --dataset {dataset.name} --stale`."
        )
    return indexes


def _describe_dataset(dataset: Dataset) -> dict[str, Any]:
    """The entry of the data set in `site.json`, without its files."""
    viewer = find_viewer(dataset)
    return {
        "name": dataset.name,
        "title": dataset.spec.title,
        "classes": [*dataset.spec.classes, UNLABELLED],
        "neuroglancer": None if viewer is None else viewer.template(),
        "voxel_size_nm": None if viewer is None else viewer.voxel_size_nm_zyx[::-1],
        "encoders": {},
    }


def _read_index(index: Any, classes: Sequence[str]) -> tuple[pa.Table, np.ndarray]:
    """All rows without their vectors, and the vectors, float32 (n, d).

    Rows are ordered by class, with unlabelled rows last, then by id.
    """
    columns = ["synapse_id", "neurotransmitter", "neuron_id", "x_nm", "y_nm", "z_nm", "content_hash", "norm"]
    columns += [*SYNAPSE_COLUMNS, *ENCODER_COLUMNS, *MAP_COLUMNS, "map_x", "map_y", "vector"]
    rows = index.search().select(columns).to_arrow()
    order = np.lexsort((rows["synapse_id"].to_numpy(), _class_numbers(rows, classes)))
    return rows.drop_columns(["vector"]).take(order), read_vectors(rows)[order]


def _class_numbers(rows: pa.Table, classes: Sequence[str]) -> np.ndarray:
    """The position of each row's class in `classes`, (n,); unlabelled rows get the number of classes."""
    numbers = pc.index_in(rows["neurotransmitter"], pa.array(classes, pa.string()))
    return pc.fill_null(numbers, len(classes)).to_numpy()


def _write_synapses(files: SiteFiles, synapses: pa.Table, classes: Sequence[str]) -> dict[str, Any]:
    """Write the columns that all encoders share, and return their entries in `site.json`.

    starts: the first row of each class, followed by the number of rows.
    """
    starts = np.searchsorted(_class_numbers(synapses, classes), np.arange(len(classes) + 2))
    neurons = synapses["neuron_id"].combine_chunks().dictionary_encode()
    columns = {
        "synapse_id": as_column(synapses["synapse_id"].to_numpy()),
        "neurons": as_column(neurons.dictionary.to_numpy()),
        "neuron": as_column(pc.fill_null(neurons.indices.cast(pa.uint32()), NO_NEURON).to_numpy()),
        **{f"{axis}_nm": as_column(narrow(synapses[f"{axis}_nm"].to_numpy())) for axis in "xyz"},
        **metadata_columns(synapses, SYNAPSE_COLUMNS),
    }
    return {"starts": starts.tolist(), "synapses": files.write("synapses", columns)}


def _write_encoder(
    files: SiteFiles, synapses: pa.Table, vectors: np.ndarray, shared: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the vectors, predictions and map of an encoder, and return its entry in `site.json`.

    shared: the entry of the data set, with `starts` and `classes`.
    """
    quantised, norms = quantise(vectors), synapses["norm"].to_numpy()
    columns = {name: as_column(getattr(quantised, name)) for name in ("mean", "scale", "centre")}
    columns |= {"norm": as_column(norms), **metadata_columns(synapses, ENCODER_COLUMNS)}
    map_columns = {axis: as_column(synapses[f"map_{axis}"].to_numpy()) for axis in "xy"}
    map_columns |= metadata_columns(synapses, MAP_COLUMNS)
    has_map = not np.isnan(map_columns["x"][0]).all()
    return {
        "dimensions": vectors.shape[1],
        "columns": files.write("encoder", columns),
        "vectors": files.write("vectors", {"codes": as_column(quantised.codes.reshape(-1))}),
        "map": files.write("map", map_columns) if has_map else None,
        "recall": measure_recall(vectors, norms, quantised, shared["starts"], shared["classes"]),
    }


def _write_pages(folder: Path) -> int:
    """Copy the pages, adapt them to answer from this folder, and add the service worker. Returns the bytes of the pages."""
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
    # Some hosts redirect index.html to the folder, so the worker keeps the page under the name of the folder.
    kept = {
        "version": digest(contents),
        "pages": ["./", *(page for page in pages if page != "index.html")],
        "data": data,
    }
    worker = (STATIC / "js" / "offline.js").read_text(encoding="utf-8")
    (folder / "sw.js").write_text(f"const SITE = {json.dumps(kept)};\n\n{worker}", encoding="utf-8")
    return sum((folder / page).stat().st_size for page in pages)
