"""Is the unit of the coordinates the declared one? Evidence from where the points lie in the volume.

In: the coordinates of one source, as the file has them, and which of them lie in the volume. Out: notes, or a `SynpipeError`
that says which unit would fit. Guarantee: memory does not grow with the number of points; counts are of all points, what
would fit is tried on an even sample of up to `2 * SAMPLE` of them.

- Outside: fewer than `min_inside` of the points lie in the volume. Told from the share alone.
- Inside, but wrong: voxels that are declared as nm stay in the volume, in the corner at its origin. Two signs together
  tell: the lattice (whole numbers that are not multiples of the voxel size; positions in nm that come from voxels are, and
  others are no whole numbers) and the spread (read as voxels they lie in the volume and fill it from end to end; as nm they
  keep to a 4th or 40th of every axis). Either sign alone is legitimate, rounded nm or a small region, and makes a note.
  Micrometres that are declared as nm are told by the spread alone: they keep to a 1000th of every axis.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from synpipe.annotations.sources import Source
from synpipe.errors import SynpipeError

SAMPLE = 100_000
MIN_POINTS = 20  # with fewer, a single bad row would look like a wrong unit, and few whole numbers like a lattice
FITS = 0.95  # share inside from which another unit is said to fit
WHOLE = 0.99  # share of whole numbers from which coordinates are taken to be counts of voxels or rounded
ON_LATTICE = 0.5  # share of multiples of the voxel size below which coordinates contradict the lattice
FILLS = (
    0.3  # share of every axis that voxels fill, from the 1st to the 99th percentile: 0.6 in FAFB's labelled synapses
)
# Voxels that tables of the fly are in: FAFB's and FlyWire's, and those of hemibrain and MANC.
USUAL_VOXELS_NM_ZYX = ((40.0, 4.0, 4.0), (8.0, 8.0, 8.0))


@dataclass(frozen=True)
class Box:
    """The volume: lower (inside) and upper (outside) corner and voxel size, in nm, zyx."""

    low: np.ndarray
    high: np.ndarray
    voxel_size: np.ndarray

    def contains(self, positions: np.ndarray) -> np.ndarray:
        return np.all((positions >= self.low) & (positions < self.high), axis=1)

    def __str__(self) -> str:
        return ", ".join(f"{axis} {self.low[i]:g} to {self.high[i]:g}" for i, axis in ((2, "x"), (1, "y"), (0, "z")))

    def filled(self, positions: np.ndarray) -> np.ndarray:
        """Share of each axis from the 1st to the 99th percentile of the positions."""
        first, last = np.percentile(np.clip(positions, self.low, self.high), [1, 99], axis=0)
        return (last - first) / (self.high - self.low)


class UnitCheck:
    """Takes the coordinates of one source, block after block, and judges at the end."""

    def __init__(self, source: Source, box: Box):
        self._source, self._box = source, box
        self._count = self._inside = 0
        self._step = 1
        self._sample: list[np.ndarray] = []

    def add(self, coordinates_zyx: np.ndarray, inside: np.ndarray) -> None:
        """Finite coordinates (n, 3) as in the file, and whether each lies in the volume as declared."""
        self._sample.append(coordinates_zyx[-self._count % self._step :: self._step])
        self._count += len(inside)
        self._inside += int(inside.sum())
        while sum(map(len, self._sample)) > 2 * SAMPLE:
            self._sample = [np.concatenate(self._sample)[::2]]
            self._step *= 2

    def notes(self) -> list[str]:
        """What to tell the user. Raises `SynpipeError` where the unit is wrong."""
        if not self._count:
            return []
        points = np.concatenate(self._sample)
        few_inside = self._inside < self._source.min_inside * self._count
        if self._count < MIN_POINTS:
            return [self._outside(points)] if few_inside and not self._inside else []
        if few_inside:
            raise SynpipeError(self._outside(points))
        return self._contradictions(points) if self._source.declared_unit == "nm" else []

    def _outside(self, points: np.ndarray) -> str:
        fitting = [f"{text} ({share:.1%} inside)" for text, share in self._fitting(points)]
        advice = (
            f"They would fit as {', or as '.join(fitting[:3])}."
            if fitting
            else "Neither nm, µm nor voxels of the usual sizes would fit, in any order of axes: they may be of another volume."
        )
        return (
            f"{self._source.name}: only {self._inside:,} of {self._count:,} positions, declared in "
            f"{self._source.declared_unit}, lie in the volume ({self._box} nm). {advice} Correct the entry under `annotations`, "
            f"or, if so many are outside indeed, lower its `min_inside` ({self._source.min_inside:g})."
        )

    def _fitting(self, points: np.ndarray) -> list[tuple[str, float]]:
        """Other readings that put the points into the volume and fill most of it, the plainest first."""
        found = []
        for reading in _readings(self._box, np.array(self._source.shift_nm_zyx)):
            positions = reading.positions(points)
            share = float(self._box.contains(positions).mean())
            if share >= FITS:
                found.append((float(self._box.filled(positions).prod() ** (1 / 3)), reading.text, share))
        most = max((filled for filled, _, _ in found), default=0.0)
        return [(text, share) for filled, text, share in found if filled >= most / 2]

    def _contradictions(self, points: np.ndarray) -> list[str]:
        whole = (points == np.round(points)).mean() >= WHOLE
        off_lattice = whole and min(map(_on_lattice, points.T, self._box.voxel_size)) < ON_LATTICE
        lattice = ["they are whole numbers, but no multiples of its voxel size"] if off_lattice else []
        notes = []
        # A billionth of the volume, filled from end to end, needs no second sign.
        for reading, signs, needed in ((_voxels(self._box.voxel_size), lattice, 2), (MICROMETRES, [], 1)):
            filled = self._filled(points, reading)
            if filled is None:
                continue
            as_nm = self._box.filled(points)
            if (filled >= FILLS).all() and (as_nm < filled / 2).all():  # voxels of 1 or 2 nm are as good as nm
                signs = [*signs, f"so read they span {_percent(filled)} of its axes z, y, x, as nm {_percent(as_nm)}"]
            text = f"{self._source.name}: coordinates are declared in nm, but look like {reading.text}: {'; '.join(signs)}."
            if len(signs) >= needed and not self._source.unit_checked:
                raise SynpipeError(
                    f"{text} Correct the entry under `annotations` (a `format` with `unit` takes it; others are always in nm: "
                    "convert the file), or, if they are in nm indeed, set its `unit_checked: true`."
                )
            notes += [f"{text} Look at some tiles."] if signs else []
        return notes

    def _filled(self, points: np.ndarray, reading: "Reading") -> np.ndarray | None:
        """Share of each axis that the points fill when read so; None where they do not lie in the volume."""
        positions = reading.positions(points) + np.array(self._source.shift_nm_zyx)
        for origin in (np.zeros(3), self._box.low):
            if self._box.contains(positions + origin).mean() >= FITS:
                return self._box.filled(positions)
        return None


@dataclass(frozen=True)
class Reading:
    """One way to read coordinates: columns in another order, then (coordinate + half) · size + shift."""

    text: str
    size: np.ndarray
    half: float = 0.0
    order: tuple[int, ...] = (0, 1, 2)
    shift: np.ndarray | float = 0.0

    def positions(self, points: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # what overflows is infinite, and outside
            return (points[:, list(self.order)] + self.half) * self.size + self.shift


NANOMETRES = Reading("`unit: nm`", np.full(3, 1.0))
MICROMETRES = Reading("`unit: um`", np.full(3, 1000.0))


def _voxels(size: np.ndarray) -> Reading:
    return Reading(f"`unit: voxel` with `voxel_size_nm_zyx: {_numbers(size)}`", size, 0.5)


def _readings(box: Box, shift: np.ndarray) -> Iterator[Reading]:
    """Other units, with another origin, with other orders of the axes."""
    sizes = dict.fromkeys([tuple(box.voxel_size.tolist()), *USUAL_VOXELS_NM_ZYX])
    units = [
        replace(unit, shift=shift) for unit in (NANOMETRES, MICROMETRES, *(_voxels(np.array(size)) for size in sizes))
    ]
    yield from units
    if box.low.any():
        origin = f"with `shift_nm_zyx: {_numbers(shift + box.low)}`, counted from the corner of the volume"
        yield from (replace(unit, text=f"{unit.text}, {origin}", shift=shift + box.low) for unit in units)
    for order in ((2, 1, 0), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1)):
        columns = ", ".join("zyx"[axis] for axis in order)
        yield from (
            replace(unit, text=f"{unit.text}, with z, y, x from what is now {columns}", order=order) for unit in units
        )


def _on_lattice(values: np.ndarray, size: float) -> float:
    """Share of the most common remainder: positions in nm of voxels have all the same, be it of corners or of centres."""
    _, counts = np.unique(np.round(np.mod(values, size), 3), return_counts=True)
    return float(counts.max() / len(values))


def _numbers(values: np.ndarray) -> str:
    return f"[{', '.join(f'{value:g}' for value in values)}]"


def _percent(shares: np.ndarray) -> str:
    return f"{', '.join(f'{100 * share:.2g}' for share in shares)} %"
