"""Split synapses into training, validation and test sides: by neuron, hemilineage or region, and at random.

Inputs: the class and the groups of each synapse, and the position of its tile. Output: a side per synapse and scheme. The
random scheme is there for comparison: it shows how much a split that ignores neurons leaks.

Guarantees for every scheme but `random`:
- All synapses of a group are on the same side.
- No tile overlaps a tile of another side; `SplitSpec.guard` can demand more or less distance. Synapses that would violate
  this are set aside as `guard`.
- The sides depend on the seed and on the existing groups, not on the order of rows. A new synapse of a known group moves no
  other group, and a new group moves few.

Method: each group belongs to the stratum of the rarest class that it contains, and groups are ranked by a hash within their
stratum. The first `test_share` of the groups become the test side, the next `validation_share` the validation side.
Scikit-learn's `StratifiedGroupKFold` was not used because it balances numbers of synapses, so that one new synapse can move
every group.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from synpipe.specs import Spec

Scheme = Literal["neuron", "hemilineage", "region", "random"]
SCHEMES: tuple[str, ...] = get_args(Scheme)
GROUP_COLUMNS = {"neuron": "neuron_id", "hemilineage": "hemilineage", "region": "region", "random": "synapse_id"}
"""The column of the synapses that holds the groups of each scheme. `random` splits synapse by synapse."""

TRAIN, VALIDATION, TEST, GUARD = "train", "validation", "test", "guard"
SIDES = (TRAIN, VALIDATION, TEST)

# Groups that a class needs so that each side gets one.
MIN_GROUPS = len(SIDES)
# A group with more than this multiple of `test_share` of its stratum goes to training as long as there are other groups.
LARGE = 2.0
SLAB_ROWS = 2**15  # rows whose neighbours are searched at a time


class SplitSpec(Spec):
    """How a data set is split.

    by: the scheme that the classifier uses; the other schemes are computed too. test_share, validation_share: shares of the
    groups of a class. guard: smallest distance between the tiles of different sides along at least one axis, in tile sizes.
    At 1 the tiles do not overlap; at 0.5 their central halves do not, and some encoders see no more than those.
    """

    by: Scheme = "neuron"
    seed: int = Field(0, ge=0)
    test_share: float = Field(0.2, gt=0, lt=1)
    validation_share: float = Field(0.1, gt=0, lt=1)
    guard: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _leaves_something_to_train_on(self) -> "SplitSpec":
        if self.test_share + self.validation_share >= 1:
            raise ValueError("test_share and validation_share must leave a share for training: keep their sum below 1")
        return self


def split(
    spec: SplitSpec,
    scheme: str,
    labels: np.ndarray,
    groups: np.ndarray,
    starts_zyx: np.ndarray,
    window_zyx: Sequence[int],
) -> np.ndarray:
    """Return the side of each synapse under a scheme: object (n,), one of `SIDES`, `GUARD`, or None.

    labels, groups: object (n,), None where unknown; groups may also be an array of numbers, all of them known. starts_zyx:
    int64 (n, 3), first voxels of the tiles. window_zyx: size of a tile in voxels. A synapse without a class or a group has no
    side: without a class it can neither train nor test, and without a group it could belong to any.
    """
    sides = np.full(len(labels), None, dtype=object)
    placed = np.flatnonzero(known(labels) & known(groups))
    if len(placed):
        sides[placed] = _sides_of(spec, scheme, labels[placed], groups[placed])
    if scheme != "random":
        _set_aside(sides, starts_zyx / np.array(window_zyx), spec.guard)
    return sides


def _sides_of(spec: SplitSpec, scheme: str, labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The side of each row before the guard: object (n,). labels, groups: (n,), all known."""
    classes, label_codes = _coded(labels)
    names, group_codes = _coded(groups)
    synapses = np.zeros((len(names), len(classes)), dtype=np.int32)
    np.add.at(synapses, (group_codes, label_codes), 1)
    groups_of_class = (synapses > 0).sum(axis=0)
    # The rarest class comes last and so decides the stratum, because it is hardest to divide (as in the iterative
    # stratification of Sechidis et al. 2011).
    stratum = np.zeros(len(names), dtype=np.int32)
    for code in sorted(range(len(classes)), key=lambda code: (-groups_of_class[code], -code)):
        stratum[synapses[:, code] > 0] = code
    sizes = synapses.sum(axis=1)
    # Eight bytes of the hash decide. Groups with the same eight bytes keep the order of their names.
    hashes = (hashlib.sha256(f"{spec.seed}/{scheme}/{name}".encode()).digest()[:8] for name in names)
    ranks = np.fromiter((int.from_bytes(each, "big") for each in hashes), np.uint64, len(names))
    side_of = np.full(len(names), TRAIN, dtype=object)
    for number in np.unique(stratum):
        members = np.flatnonzero(stratum == number)
        limit = LARGE * spec.test_share * sizes[members].sum()
        large = np.where(sizes[members] > limit, sizes[members], 0)
        order = members[np.lexsort((ranks[members], large))]
        test, validation = _numbers(len(order), spec)
        side_of[order[:test]] = TEST
        side_of[order[test : test + validation]] = VALIDATION
    return side_of[group_codes]


def known(values: np.ndarray) -> np.ndarray:
    """Tell which values are not None: bool (n,)."""
    return values != np.array(None, dtype=object)


def _coded(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values, sorted, and the position of each row's value among them: int64 (n,)."""
    if values.dtype != object:
        return np.unique(values, return_inverse=True)
    encoded = pa.array(values).dictionary_encode()  # one pass; NumPy would sort all objects
    names, places = np.unique(np.array(encoded.dictionary.to_pylist(), dtype=object), return_inverse=True)
    return names, places[encoded.indices.to_numpy()]


def _numbers(groups: int, spec: SplitSpec) -> tuple[int, int]:
    """Number of test groups and of validation groups. Training gets its first group before testing, testing before validation."""
    test = min(max(1, round(spec.test_share * groups)), groups - 1)
    validation = min(max(1, round(spec.validation_share * groups)), groups - 1 - test)
    return test, validation


def _set_aside(sides: np.ndarray, places: np.ndarray, guard: float) -> None:
    """Mark validation tiles too near to a test tile as `GUARD`, and training tiles too near to a validation or test tile."""
    for side, others in ((VALIDATION, (TEST,)), (TRAIN, (TEST, VALIDATION))):
        of_side, kept = np.flatnonzero(sides == side), np.flatnonzero(np.isin(sides, others))
        sides[of_side[_near(places[of_side], places[kept], guard)]] = GUARD


def _near(places: np.ndarray, others: np.ndarray, guard: float) -> np.ndarray:
    """Tell which of `places` are nearer than `guard` to one of `others` along every axis: bool (n,).

    places, others: float64 (n, 3) and (m, 3), in tile sizes. The tolerance is far below a voxel and above rounding errors.
    """
    from scipy.spatial import cKDTree

    near = np.zeros(len(places), dtype=bool)
    if not len(others):
        return near
    # The search goes slab by slab along the longest axis, because a tree of all rows would take 50 bytes per row.
    axis = int(np.ptp(others, axis=0).argmax())
    others = others[np.argsort(others[:, axis])]
    order = np.argsort(places[:, axis])
    for first in range(0, len(order), SLAB_ROWS):
        rows = order[first : first + SLAB_ROWS]
        low, high = places[rows[[0, -1]], axis] + (-guard, guard)
        start, end = np.searchsorted(others[:, axis], [low, high])
        if start < end:
            nearest, _ = cKDTree(others[start:end]).query(places[rows], p=np.inf, distance_upper_bound=guard)
            near[rows] = nearest < guard - 1e-6
    return near


def faults(
    sides: np.ndarray, groups: np.ndarray, starts_zyx: np.ndarray, window_zyx: Sequence[int], guard: float = 1.0
) -> tuple[list, np.ndarray]:
    """Find violations of a split: groups on two sides, and rows whose tile is nearer than `guard` to one of another side.

    sides, groups: object (n,). starts_zyx: int64 (n, 3). window_zyx: size of a tile in voxels. Returns the groups and the
    row numbers.
    """
    placed = np.flatnonzero(np.isin(sides, SIDES))
    names, codes = _coded(groups[placed]) if len(placed) else (np.zeros(0, dtype=object), placed)
    on_side = np.zeros((len(names), len(SIDES)), dtype=bool)
    for number, side in enumerate(SIDES):
        on_side[codes[sides[placed] == side], number] = True
    places = starts_zyx / np.array(window_zyx)
    overlapping = np.zeros(len(sides), dtype=bool)
    for side in SIDES:
        here, others = placed[sides[placed] == side], placed[sides[placed] != side]
        overlapping[here] = _near(places[here], places[others], guard)
    return names[on_side.sum(axis=1) > 1].tolist(), np.flatnonzero(overlapping)


def tally(labels: np.ndarray, groups: np.ndarray, sides: np.ndarray) -> dict[str, dict[str, int]]:
    """Count for each class the `groups` that contain it and its synapses on each side, in the guard, and `unplaced`."""
    counts_by_class = {}
    for name in sorted({label for label in labels.tolist() if label is not None}):
        of_class = labels == name
        counts = {side: int((sides[of_class] == side).sum()) for side in (*SIDES, GUARD)}
        holding = groups[of_class & known(groups)]
        number = len(_coded(holding)[0]) if len(holding) else 0
        counts_by_class[name] = {"groups": number, **counts, "unplaced": int(of_class.sum()) - sum(counts.values())}
    return counts_by_class


def shortcomings(scheme: str, counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return a sentence on each class that a scheme cannot divide. counts: the result of `tally`."""
    notes = []
    for name, count in counts.items():
        if scheme == "random" or not count["groups"]:
            continue
        empty = [side for side in SIDES if not count[side]]
        if count["groups"] < MIN_GROUPS or empty:
            without = f", so there is none for {' and '.join(empty)}" if empty else ""
            plural = "" if count["groups"] == 1 else "s"
            notes.append(f"split by {scheme}: {name} has {count['groups']} {scheme}{plural}{without}.")
    if counts and not any(count["groups"] for count in counts.values()):
        notes.append(f"There is no split by {scheme}: no synapse of a known class has a known {scheme}.")
    return notes
