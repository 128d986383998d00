"""What a data set holds, before anything is made of it: its volume, its annotations, some tiles, and what the rest will cost.

In: a `Dataset`. Out: a `Report`. Guarantees: nothing is written; what is wrong with the volume and what is wrong with the
annotations is said in one go; besides reading the annotations it costs some hundred cut-outs, whatever their number.
"""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from synpipe.analysis import splits
from synpipe.analysis.pictures import draw_sheet
from synpipe.annotations.bounds import VolumeBounds
from synpipe.annotations.convert import AnnotationInputs, convert_annotations
from synpipe.annotations.formats import AnnotationSpec
from synpipe.annotations.schema import OUTSIDE_VOLUME, SYNAPSE_SCHEMA, UNKNOWN_NEUROTRANSMITTER, UNLABELLED
from synpipe.datasets import Dataset
from synpipe.embeddings.encoders import has_weights_here
from synpipe.errors import SynpipeError
from synpipe.tiles.tile import SECTIONS, TILE_PX, CutOut, start_cut_out
from synpipe.volumes.chunk_plan import spatial_order
from synpipe.volumes.volume import Volume

SHOWN_TILES = 48  # from everywhere, shared by the classes
TIMED_TILES = 64  # neighbours of each other, read as the pipeline reads them
ISOTROPIC = 2.0  # sections less than this many pixels apart show nearly the same
SECTION_NM = 40.0  # the distance of sections in ssTEM
MOST = 0.5
FEW_GROUPS = 5
TILE_BYTES = SECTIONS * TILE_PX**2

T = TypeVar("T")


class _Annotations:
    """What is kept of annotations while they are read: few numbers for each synapse, and of the rejects an example each."""

    def __init__(self, groups: str) -> None:
        """groups: the column by which synapses are divided into sides."""
        self.columns = list(dict.fromkeys(("synapse_id", "z_nm", "y_nm", "x_nm", "neurotransmitter", groups)))
        self.parts = [SYNAPSE_SCHEMA.empty_table().select(self.columns)]
        self.rejects, self.examples = Counter[str](), dict[str, str]()
        self.notes: list[str] = []

    @property
    def synapses(self) -> pa.Table:
        return pa.concat_tables(self.parts)

    def add_synapses(self, synapses: pa.Table) -> None:
        self.parts.append(synapses.select(self.columns))

    def add_rejects(self, rejects: pa.Table) -> None:
        for found in rejects["reason"].value_counts().to_pylist():
            reason = found["values"]
            self.rejects[reason] += found["counts"]
            self.examples.setdefault(reason, rejects["detail"][pc.index(rejects["reason"], reason).as_py()].as_py())


@dataclass(frozen=True)
class Report:
    """found: lines for people by heading. problems: a paragraph each; with any of them the data set cannot be used as it is.
    warnings: a paragraph each on what may fail or mislead later. picture: tiles by class; None where there are none."""

    found: dict[str, list[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    picture: Image.Image | None = None


def check(dataset: Dataset) -> Report:
    """Open and read everything that the data set names, as far as that is needed to tell what it holds."""
    if dataset.spec.synthetic and not all(path.exists() for path in dataset.source_files()):
        made = f"`synpipe materialize --dataset {dataset.name} --select volume`"
        return Report(problems=[f"{dataset.name} makes its own volume and synapses, and has not done so yet: {made}."])
    report = Report()
    volume = _attempt(lambda: Volume(dataset.spec.volume, dataset.base), report.problems)
    if volume is not None:
        report.found["volume"] = _describe_volume(dataset, volume)
        report.warnings.extend(_warn_of_scale(dataset, volume.voxel_size_nm_zyx))
    report.warnings.extend(_look_for_weights(dataset, report.problems))
    annotations = _read_annotations(dataset, volume, report.problems)
    if annotations is not None:
        report.found["annotations"] = _describe_annotations(dataset, annotations, report.problems)
    if volume is None or annotations is None or not len(annotations.synapses):
        return report
    with volume:
        sampled = _attempt(lambda: _sample(dataset, volume, annotations.synapses), report.problems)
        if sampled is None:
            return report
        report.warnings.extend(_warn_of_split(dataset, volume, annotations.synapses))
    report.found.update(tiles=sampled.lines, cost=[sampled.cost])
    report.problems.extend([*sampled.problems, *_lack_of_space(dataset, len(annotations.synapses))])
    return replace(report, picture=sampled.picture)


def _attempt(action: Callable[[], T], problems: list[str]) -> T | None:
    try:
        return action()
    except SynpipeError as error:
        problems.append(str(error))
        return None


def _describe_volume(dataset: Dataset, volume: Volume) -> list[str]:
    kind = dataset.spec.volume.kind or ("sections" if Path(volume.path).is_dir() else "HDF5")
    low, high = volume.bounds_nm_zyx
    bounds = (f"{axis} {a:,.10g} – {b:,.10g}" for axis, a, b in zip("zyx", low.tolist(), high.tolist(), strict=True))
    scale = f", scale {volume.scale_name}" if volume.scale_name else ""
    return [
        f"{volume.path} ({kind}{scale})",
        f"{_times(volume.shape_zyx)} voxels z y x, {volume.dtype}, read in chunks of {_times(volume.chunking.shape_zyx)}",
        f"voxel size {_times(volume.voxel_size_nm_zyx)} nm, offset {', '.join(f'{at:,.10g}' for at in low.tolist())} nm",
        f"bounds {', '.join(bounds)} nm",
    ]


def _times(numbers: np.ndarray | tuple[int, ...]) -> str:
    return " × ".join(f"{number:,.10g}" for number in np.asarray(numbers).tolist())


def _warn_of_scale(dataset: Dataset, voxel_size_nm_zyx: np.ndarray) -> list[str]:
    """Warnings of pixels that an encoder was not made for, and of sections that are too thin to differ."""
    depth_nm, *sizes_nm = voxel_size_nm_zyx.tolist()
    warnings = []
    for name, spec in dataset.encoders.items():
        if (
            spec.is_network
            and spec.pixel_nm is not None
            and not all(spec.pixel_nm[0] <= size <= spec.pixel_nm[1] for size in sizes_nm)
        ):
            low, high = spec.pixel_nm
            warnings.append(
                f"The encoder {name} was made for pixels of {low:g} to {high:g} nm (`pixel_nm` in encoders.yaml), and the pixels "
                f"of this volume have {_times(tuple(sizes_nm))} nm: tiles are never resized, so structures have sizes that it does "
                "not know. Choose another scale of the volume (`volume.voxel_size_nm_zyx`) or another encoder."
            )
    tiles = dataset.spec.tiles
    if tiles.stacking == "colour" and tiles.section_step_nm is None and depth_nm < ISOTROPIC * min(sizes_nm):
        step_nm = max(1, round(SECTION_NM / depth_nm)) * depth_nm
        warnings.append(
            f"Sections are {depth_nm:g} nm apart, hardly more than a pixel, so the three channels of a tile would show nearly "
            f"the same: set `tiles.section_step_nm`, for example to {step_nm:g}."
        )
    return warnings


def _look_for_weights(dataset: Dataset, problems: list[str]) -> list[str]:
    """Warnings of weights that must be downloaded. Weights that are nowhere are added to `problems`."""
    warnings = []
    for name, spec in dataset.encoders.items():
        if spec.base is not None:
            continue
        here = _attempt(partial(has_weights_here, spec, dataset.weights_base), problems)
        if here is not False or not spec.is_network:
            continue
        if spec.weights == "hub":
            warnings.append(
                f"The weights of the encoder {name} are not on this machine yet. They are downloaded from the Hugging Face hub "
                f"when embeddings_{name} is made, which fails without a network: copy the cache of a machine that has them, or "
                "choose an encoder that needs no download."
            )
        else:
            problems.append(
                f"The weights file {dataset.weights_base / spec.weights} of the encoder {name} does not exist: correct `weights` "
                "in encoders.yaml."
            )
    return warnings


def _warn_of_split(dataset: Dataset, volume: Volume, synapses: pa.Table) -> list[str]:
    """Warnings of a split that leaves too little to train with or to test on."""
    spec, by = dataset.spec.split, dataset.spec.split.by
    if dataset.spec.classifier is None and dataset.spec.evaluation is None:
        return []
    window = dataset.spec.tiles.window_zyx(volume.voxel_size_nm_zyx)
    starts = volume.window_starts(_positions(synapses), window)
    labels, groups = (_as_objects(synapses[name]) for name in ("neurotransmitter", splits.GROUP_COLUMNS[by]))
    sides = splits.split(spec, by, labels, groups, starts, window)
    labelled, placed = int(splits.known(labels).sum()), int(splits.known(sides).sum())
    if not labelled:
        return []
    if not placed:
        return [
            f"None of the {labelled:,} synapses with a class has a known {by}, so there is no split by {by} and no classifier: set "
            "`split.by` to another scheme, or add that column to the annotations."
        ]
    warnings = []
    if (share := (sides == splits.GUARD).sum() / placed) > MOST:
        warnings.append(
            f"The split by {by} sets aside {share:.0%} of its synapses as `guard`, because their tiles are too near to tiles of "
            "another side: lower `split.guard`, or set `split.by` to another scheme."
        )
    tested = {
        name: len(set(groups[(labels == name) & (sides == splits.TEST)].tolist())) for name in dataset.spec.classes
    }
    few = [f"{name} ({count})" for name, count in tested.items() if count < FEW_GROUPS and (labels == name).any()]
    if few:
        units = "synapses" if by == "random" else f"{by}s"
        warnings.append(
            f"The test side has fewer than {FEW_GROUPS} {units} of {', '.join(few)}, so figures of these classes say little: label "
            "more, or raise `split.test_share`."
        )
    return warnings


def _positions(synapses: pa.Table) -> np.ndarray:
    """float64 (n, 3), z y x in nm."""
    return np.stack([synapses[column].to_numpy() for column in ("z_nm", "y_nm", "x_nm")], axis=1)


def _as_objects(column: pa.ChunkedArray) -> np.ndarray:
    """object (n,), None for null. Equal values are the same object, so a row takes eight bytes."""
    encoded = column.combine_chunks().dictionary_encode()
    values = np.array([*encoded.dictionary.to_pylist(), None], dtype=object)
    return values[pc.fill_null(encoded.indices, len(values) - 1).to_numpy()]


def _read_annotations(dataset: Dataset, volume: Volume | None, problems: list[str]) -> _Annotations | None:
    bounds = None if volume is None else VolumeBounds(*volume.bounds_nm_zyx, volume.voxel_size_nm_zyx)

    def read(specs: Sequence[AnnotationSpec]) -> _Annotations:
        found = _Annotations(splits.GROUP_COLUMNS[dataset.spec.split.by])
        summary = convert_annotations(
            AnnotationInputs(specs, dataset.base, dataset.spec.classes, bounds),
            found.add_synapses,
            found.add_rejects,
        )
        found.notes = summary.notes
        return found

    found = _attempt(lambda: read(dataset.spec.annotations), mine := list[str]())
    if found is None:
        # The first source that is wrong has hidden what is wrong with the others.
        for spec in dataset.spec.annotations:
            _attempt(partial(read, [spec]), mine)
    problems += dict.fromkeys(mine)
    return found


def _describe_annotations(dataset: Dataset, found: _Annotations, problems: list[str]) -> list[str]:
    usable, rejected = len(found.synapses), found.rejects.total()
    share, allowed = rejected / max(1, usable + rejected), dataset.spec.max_reject_share
    inside = 1 - found.rejects[OUTSIDE_VOLUME] / max(1, usable + rejected)
    reasons = [
        f"rejected as {reason}: {count:,}, such as {found.examples[reason]}"
        for reason, count in found.rejects.most_common()
    ]
    if not usable:
        problems.append(f"{dataset.name} has no usable synapse: all {rejected:,} are rejected. {reasons[0]}")
    elif share > allowed:
        problems.append(
            f"{dataset.name}: {share:.2%} of the synapses are rejected, where {allowed:.2%} are allowed; {reasons[0]} Mend that, "
            "or raise `max_reject_share` in the YAML file if they are rightly rejected."
        )
    if found.rejects[UNKNOWN_NEUROTRANSMITTER]:
        reasons.append(
            "to keep synapses of an unknown class, leave their neurotransmitter empty in the file, and they are unlabelled; or add "
            "the class to `classes`"
        )
    summary = f"{usable:,} usable, {rejected:,} rejected ({share:.2%}); {inside:.2%} are not outside the volume"
    return [summary, *reasons, *found.notes]


@dataclass(frozen=True)
class _Sample:
    """lines, problems: about tiles from everywhere. cost: a line on that of all tiles. picture: a sheet of the tiles."""

    lines: list[str]
    problems: list[str]
    cost: str
    picture: Image.Image | None


def _sample(dataset: Dataset, volume: Volume, synapses: pa.Table) -> _Sample:
    """Cut out some tiles."""
    spec = dataset.spec.tiles
    window = spec.window_zyx(volume.voxel_size_nm_zyx)
    positions = _positions(synapses)

    def read(rows: np.ndarray) -> tuple[list[CutOut], float]:
        """Cut-outs of these synapses, all asked for at once, and the seconds that took."""
        began = time.monotonic()
        begun = [start_cut_out(volume, start, spec) for start in volume.window_starts(positions[rows], window)]
        return [finish() for finish in begun], time.monotonic() - began

    chosen = _by_class(synapses, dataset.spec.classes)
    cut_outs, seconds = read(np.concatenate(list(chosen.values())))
    rows = [row for _, row in cut_outs]
    good = [row for tile, row in cut_outs if tile is not None]
    lines = [
        f"{len(good)} of {len(rows)} from everywhere could be cut out, in {seconds:.2g} s: "
        f"{sum(row['pad_fraction'] > 0 for row in good)} padded, {sum(row['missing_sections'] > 0 for row in good)} with "
        "missing sections",
        *(rejects := _count_by_reason(rows)),
    ]
    problems = []
    if not good:
        problems.append(
            f"{dataset.name}: none of {len(rows)} tiles could be cut out; {rejects[0]} Mend the volume, or correct `volume` or "
            "`tiles` in the YAML file."
        )

    neighbours = _neighbours(positions, len(positions) // 2)
    starts = volume.window_starts(positions[neighbours], window)
    low, high = (np.clip(starts + shift, 0, volume.shape_zyx) for shift in (0, window))
    rate = len(neighbours) / read(neighbours[spatial_order(low, high, volume.chunking)])[1]
    cost = (
        f"{len(positions):,} tiles of {TILE_BYTES:,} bytes, {len(positions) * TILE_BYTES / 1e9:,.2f} GB; about "
        f"{_duration(len(positions) / rate)} to cut out, at the {rate:,.0f} tiles/s of {len(neighbours)} neighbours"
    )

    finished, sheet_rows = iter(cut_outs), {}
    for name, of_class in chosen.items():
        captions = map(str, synapses["synapse_id"].take(of_class).to_pylist())
        cells = [(tile, caption) for caption, (tile, _) in zip(captions, finished, strict=False) if tile is not None]
        if cells:
            sheet_rows[name] = cells
    return _Sample(lines, problems, cost, draw_sheet(sheet_rows, tile_px=96) if sheet_rows else None)


def _count_by_reason(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line on each reason for which tiles were rejected, the most frequent first, with an example."""
    counts = Counter(row["reason"] for row in rows if "reason" in row)
    examples = {row["reason"]: row["detail"] for row in reversed(rows) if "reason" in row}
    return [f"rejected as {reason}: {count:,}, such as {examples[reason]}" for reason, count in counts.most_common()]


def _neighbours(positions: np.ndarray, row: int) -> np.ndarray:
    """Rows of the synapses that are nearest to one of them, itself included: it tells the density where synapses are."""
    distances = np.abs(positions - positions[row]).max(axis=1)
    nearest = min(TIMED_TILES, len(positions))
    return np.argpartition(distances, nearest - 1)[:nearest]


def _by_class(synapses: pa.Table, classes: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Rows of some synapses of each class, at even distances in the table, by the name of the class."""
    labels = pc.fill_null(synapses["neurotransmitter"], UNLABELLED)
    rows = {name: np.flatnonzero(pc.equal(labels, name).to_numpy()) for name in (*classes, UNLABELLED)}
    rows = {name: found for name, found in rows.items() if len(found)}
    each = max(1, SHOWN_TILES // len(rows))
    return {
        name: found[np.linspace(0, len(found) - 1, min(each, len(found))).astype(int)]
        for name, found in list(rows.items())[:SHOWN_TILES]
    }


def _duration(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.2g} s"


def _lack_of_space(dataset: Dataset, count: int) -> list[str]:
    place = next(path for path in (dataset.folder, *dataset.folder.parents) if path.exists())
    free, needed = shutil.disk_usage(place).free, count * TILE_BYTES
    if needed <= free:
        return []
    return [f"The tiles need {needed / 1e9:,.1f} GB, and {place} has {free / 1e9:,.1f} GB: choose another --store."]
