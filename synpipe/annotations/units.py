"""Check that the coordinates of a source are in the declared unit, from where they lie in the volume.

Input: the coordinates of one source, as the file has them, and whether each lies in the volume. Output: notes, or a
`SynpipeError` that names the unit that would fit. Memory does not grow with the number of points: all points are
counted, but other units are tried on an even sample of at most `2 * SAMPLE_SIZE` points.

- Outside the volume: fewer than `min_inside` of the points lie in it. This share alone is an error.
- Inside the volume, but in the wrong unit: voxels that are declared as nm stay in the volume, in the corner at its
  origin. Two signs together are an error.
  - The lattice: the coordinates are whole numbers, but not multiples of the voxel size. Positions in nm that were
    converted from voxels are multiples of it, and other positions in nm are not whole numbers.
  - The spread: if they are read as voxels, the points lie in the volume and fill it from end to end; if they are read
    as nm, they stay within a 4th or 40th of every axis.
  Either sign alone can be legitimate (rounded nm, or a small region) and leads to a note.
- Micrometres that are declared as nm: the spread alone is an error, because the points stay within a 1000th of every axis.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from synpipe.annotations.bounds import VolumeBounds
from synpipe.annotations.source import AnnotationSource
from synpipe.errors import SynpipeError

SAMPLE_SIZE = 100_000  # the sample holds up to twice as many points
MIN_POINTS = 20  # with fewer points, one bad row would look like a wrong unit, and a few whole numbers like a lattice
FITTING_SHARE = 0.95  # a unit fits if at least this share of the points lies inside
WHOLE_SHARE = 0.99  # from this share of whole numbers on, coordinates are considered voxel indices or rounded values
LATTICE_SHARE = 0.5  # if fewer coordinates are multiples of the voxel size, they contradict the lattice
# Voxels fill the volume if they span at least this share of every axis, from the 1st to the 99th percentile. FAFB's
# labelled synapses span 0.6.
FILLING_SHARE = 0.3
# Voxel sizes of fly tables: FAFB and FlyWire, then hemibrain and MANC.
COMMON_VOXEL_SIZES_NM_ZYX = ((40.0, 4.0, 4.0), (8.0, 8.0, 8.0))


class UnitCheck:
    """Takes the coordinates of one source, block by block, and judges the unit at the end."""

    def __init__(self, source: AnnotationSource, bounds: VolumeBounds):
        self._source, self._bounds = source, bounds
        self._shift = np.array(source.shift_nm_zyx)
        self._count = self._inside = 0
        self._step = 1
        self._sample: list[np.ndarray] = []

    def add(self, coordinates_zyx: np.ndarray, inside: np.ndarray) -> None:
        """Add finite coordinates (n, 3), as in the file, and whether each lies in the volume, bool (n,)."""
        self._sample.append(coordinates_zyx[-self._count % self._step :: self._step])
        self._count += len(inside)
        self._inside += int(inside.sum())
        while sum(map(len, self._sample)) > 2 * SAMPLE_SIZE:
            self._sample = [np.concatenate(self._sample)[::2]]
            self._step *= 2

    def conclude(self) -> list[str]:
        """Return notes for the user. Raises `SynpipeError` if the unit is wrong."""
        if not self._count:
            return []
        points = np.concatenate(self._sample)
        few_inside = self._inside < self._source.min_inside * self._count
        if self._count < MIN_POINTS:
            return [self._describe_outside(points)] if few_inside and not self._inside else []
        if few_inside:
            raise SynpipeError(self._describe_outside(points))
        return self._check_nm(points) if self._source.declared_unit == "nm" else []

    def _describe_outside(self, points: np.ndarray) -> str:
        fitting = [f"{interpretation} ({share:.1%} inside)" for interpretation, share in self._find_fitting(points)]
        advice = (
            f"They would fit as {', or as '.join(fitting[:3])}."
            if fitting
            else "No other unit (nm, µm or voxels of common sizes) and no other order of axes would fit, so they may belong "
            "to another volume."
        )
        return (
            f"{self._source.name}: only {self._inside:,} of {self._count:,} positions lie in the volume ({self._bounds} nm) "
            f"if they are read as {self._source.declared_unit}, as declared. {advice} Correct the entry under "
            "`annotations`. If so many positions really are outside the volume, lower `min_inside` "
            f"({self._source.min_inside:g})."
        )

    def _find_fitting(self, points: np.ndarray) -> list[tuple[str, float]]:
        """Other interpretations that put the points into the volume and fill most of it, the simplest first.

        Returns the text of each interpretation and the share of points inside.
        """
        fitting = []
        for interpretation in _interpretations(self._bounds, self._shift):
            positions = interpretation.positions(points)
            share = float(self._bounds.contain(positions).mean())
            if share >= FITTING_SHARE:
                filled = float(self._bounds.spanned_share(positions).prod() ** (1 / 3))
                fitting.append((filled, interpretation.text, share))
        most = max((filled for filled, _, _ in fitting), default=0.0)
        return [(text, share) for filled, text, share in fitting if filled >= most / 2]

    def _check_nm(self, points: np.ndarray) -> list[str]:
        """Look for signs that points declared in nm are voxels or micrometres. Raises `SynpipeError` if there are enough."""
        whole = (points == np.round(points)).mean() >= WHOLE_SHARE
        off_lattice = whole and min(map(_lattice_share, points.T, self._bounds.voxel_size_nm_zyx)) < LATTICE_SHARE
        lattice_signs = ["they are whole numbers, but not multiples of its voxel size"] if off_lattice else []
        notes = []
        for interpretation, signs, needed in (
            (_voxels(self._bounds.voxel_size_nm_zyx), lattice_signs, 2),
            # A billionth of the volume that is filled from end to end needs no second sign.
            (MICROMETRES, [], 1),
        ):
            filled = self._filled_share(points, interpretation)
            if filled is None:
                continue
            as_nm = self._bounds.spanned_share(points)
            # The second condition holds back for voxels of 1 or 2 nm, whose spread is nearly the same as that of nm.
            if (filled >= FILLING_SHARE).all() and (as_nm < filled / 2).all():
                span = f"they span {_percent(filled)} of its axes z, y, x if read this way, but {_percent(as_nm)} if read as nm"
                signs = [*signs, span]
            text = (
                f"{self._source.name}: coordinates are declared in nm, but look like {interpretation.text}: "
                f"{'; '.join(signs)}."
            )
            if len(signs) >= needed and not self._source.unit_checked:
                raise SynpipeError(
                    f"{text} Correct `unit` in the entry under `annotations`. A `format` without the key `unit` always reads "
                    "nm: convert the file. If the coordinates really are in nm, set `unit_checked: true`."
                )
            notes += [f"{text} Look at some tiles."] if signs else []
        return notes

    def _filled_share(self, points: np.ndarray, interpretation: "Interpretation") -> np.ndarray | None:
        """The share of each axis, (3,), that the points fill if read this way; None if they do not lie in the volume."""
        positions = interpretation.positions(points) + self._shift
        for origin in (np.zeros(3), self._bounds.low_nm_zyx):
            if self._bounds.contain(positions + origin).mean() >= FITTING_SHARE:
                return self._bounds.spanned_share(positions)
        return None


@dataclass(frozen=True)
class Interpretation:
    """One way to read coordinates: columns in the given order, then (coordinate + half) · size_nm + shift_nm."""

    text: str
    size_nm: np.ndarray
    half: float = 0.0
    order: tuple[int, ...] = (0, 1, 2)
    shift_nm: np.ndarray | float = 0.0

    def positions(self, points: np.ndarray) -> np.ndarray:
        """Positions in nm, zyx, of the points (n, 3)."""
        with np.errstate(over="ignore"):  # a value that overflows becomes infinite, which is outside every volume
            return (points[:, list(self.order)] + self.half) * self.size_nm + self.shift_nm


NANOMETRES = Interpretation("`unit: nm`", np.full(3, 1.0))
MICROMETRES = Interpretation("`unit: um`", np.full(3, 1000.0))


def _voxels(size_nm_zyx: np.ndarray) -> Interpretation:
    return Interpretation(f"`unit: voxel` with `voxel_size_nm_zyx: {_numbers(size_nm_zyx)}`", size_nm_zyx, 0.5)


def _interpretations(bounds: VolumeBounds, shift_nm: np.ndarray) -> Iterator[Interpretation]:
    """Yield other units, then other origins, then other orders of the axes."""
    sizes = dict.fromkeys([tuple(bounds.voxel_size_nm_zyx.tolist()), *COMMON_VOXEL_SIZES_NM_ZYX])
    voxels = [_voxels(np.array(size)) for size in sizes]
    units = [replace(unit, shift_nm=shift_nm) for unit in (NANOMETRES, MICROMETRES, *voxels)]
    yield from units
    if bounds.low_nm_zyx.any():
        shift_nm = shift_nm + bounds.low_nm_zyx
        origin = f"with `shift_nm_zyx: {_numbers(shift_nm)}`, counted from the corner of the volume"
        yield from (replace(unit, text=f"{unit.text}, {origin}", shift_nm=shift_nm) for unit in units)
    for order in ((2, 1, 0), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1)):
        columns = ", ".join("zyx"[axis] for axis in order)
        text = f"with z, y, x taken from the current {columns}"
        yield from (replace(unit, text=f"{unit.text}, {text}", order=order) for unit in units)


def _lattice_share(values: np.ndarray, size: float) -> float:
    """The share of the most common remainder modulo `size`.

    Positions in nm that were converted from voxels all have the same remainder, whether they are corners or centres.
    """
    _, counts = np.unique(np.round(np.mod(values, size), 3), return_counts=True)
    return float(counts.max() / len(values))


def _numbers(values: np.ndarray) -> str:
    return f"[{', '.join(f'{value:g}' for value in values)}]"


def _percent(shares: np.ndarray) -> str:
    return f"{', '.join(f'{100 * share:.2g}' for share in shares)} %"
