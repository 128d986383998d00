"""Training, validation and test sides, by neuron, hemilineage or region, and at random to show what that leaks.

In: the class and the groups of each synapse, and where its tile begins. Out: a side per synapse and scheme. Guarantees,
for every scheme but `random`: a group stands on one side, and no tile overlaps one of another side, or less as the spec
says; what would break the second is set aside as `guard`. The sides depend on the seed and on which groups there are, not
on the order of rows; an added synapse of a known group moves no other group, an added group moves few.

How: groups are ranked by a hash within their stratum, which is the rarest class that they hold; the first `test_share`
of the groups are for testing, the next `validation_share` for validation. Scikit-learn's `StratifiedGroupKFold` balances
numbers of synapses instead, so that a single new one can move every group.
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
"""Column of the synapses whose values stay together; `random` splits synapse by synapse."""

TRAIN, VALIDATION, TEST, GUARD = "train", "validation", "test", "guard"
SIDES = (TRAIN, VALIDATION, TEST)

# Groups of a class that are needed for one on each side.
MIN_GROUPS = len(SIDES)
# A group that holds more than this multiple of `test_share` of its stratum goes to training as long as others are there.
LARGE = 2.0
SLAB_ROWS = 2**15  # rows whose neighbourhood is looked at at a time


class SplitSpec(Spec):
    """How a data set is split.

    by: the scheme that classifier and probes use; the others are made beside it. test_share, validation_share: of the
    groups of a class. guard: how far apart two tiles of different sides begin at least, in extents of a tile along one of
    the axes; at 1 they do not overlap, at 0.5 their central halves do not, which is all that some encoders see.
    """

    by: Scheme = "neuron"
    seed: int = Field(0, ge=0)
    test_share: float = Field(0.2, gt=0, lt=1)
    validation_share: float = Field(0.1, gt=0, lt=1)
    guard: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _leaves_something_to_train_on(self) -> "SplitSpec":
        if self.test_share + self.validation_share >= 1:
            raise ValueError(
                "test_share and validation_share should leave a share for training: keep their sum below 1"
            )
        return self


def split(
    spec: SplitSpec,
    scheme: str,
    labels: np.ndarray,
    groups: np.ndarray,
    starts_zyx: np.ndarray,
    window_zyx: Sequence[int],
) -> np.ndarray:
    """Side of each synapse under a scheme: object (n,), one of `SIDES`, `GUARD`, or None.

    labels, groups: object (n,), None where not known; groups may be numbers, all of them known. A synapse without a class
    or without a group has no side: there is nothing to learn from it or to hold against it, and it may be anybody's.
    starts_zyx: int64 (n, 3), first voxels of the tiles; window_zyx: their extents in voxels.
    """
    sides = np.full(len(labels), None, dtype=object)
    placed = np.flatnonzero(known(labels) & known(groups))
    if len(placed):
        sides[placed] = _sides_of(spec, scheme, labels[placed], groups[placed])
    if scheme != "random":
        _set_aside(sides, starts_zyx / np.array(window_zyx), spec.guard)
    return sides


def _sides_of(spec: SplitSpec, scheme: str, labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Side of each row: object (n,)."""
    classes, label_codes = _coded(labels)
    names, group_codes = _coded(groups)
    synapses = np.zeros((len(names), len(classes)), dtype=np.int32)
    np.add.at(synapses, (group_codes, label_codes), 1)
    groups_of_class = (synapses > 0).sum(axis=0)
    # Rarest last, so that what is hardest to divide is divided (as in Sechidis et al. 2011, iterative stratification).
    stratum = np.zeros(len(names), dtype=np.int32)
    for code in sorted(range(len(classes)), key=lambda code: (-groups_of_class[code], -code)):
        stratum[synapses[:, code] > 0] = code
    sizes = synapses.sum(axis=1)
    # Eight bytes of the hash: two that are alike in them would stand in the order of their names.
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
    """Which of the values are not None: bool (n,)."""
    return values != np.array(None, dtype=object)


def _coded(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values, sorted, and the number of each row's: int64 (n,)."""
    if values.dtype != object:
        return np.unique(values, return_inverse=True)
    encoded = pa.array(values).dictionary_encode()  # in one pass; numpy would sort objects
    names, places = np.unique(np.array(encoded.dictionary.to_pylist(), dtype=object), return_inverse=True)
    return names, places[encoded.indices.to_numpy()]


def _numbers(groups: int, spec: SplitSpec) -> tuple[int, int]:
    """Groups for testing and for validation; at least one for training, then for testing, then for validation."""
    test = min(max(1, round(spec.test_share * groups)), groups - 1)
    validation = min(max(1, round(spec.validation_share * groups)), groups - 1 - test)
    return test, validation


def _set_aside(sides: np.ndarray, places: np.ndarray, guard: float) -> None:
    """Take out of validation what is too near to a test tile, and out of training what is too near to either."""
    for side, others in ((VALIDATION, (TEST,)), (TRAIN, (TEST, VALIDATION))):
        of_side, kept = np.flatnonzero(sides == side), np.flatnonzero(np.isin(sides, others))
        sides[of_side[_near(places[of_side], places[kept], guard)]] = GUARD


def _near(places: np.ndarray, others: np.ndarray, guard: float) -> np.ndarray:
    """Which of `places` are nearer than `guard` to one of `others` along every axis: bool (n,).

    places, others: float64 (n, 3) and (m, 3), in tile extents. The tolerance is far below a voxel and above the rounding.
    """
    from scipy.spatial import cKDTree

    near = np.zeros(len(places), dtype=bool)
    if not len(others):
        return near
    # Slab by slab of the longest axis: a tree of everything would take 50 bytes a row.
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
    """What a split must not have: groups on two sides, and rows whose tile is nearer than `guard` to one of another side.

    sides, groups: object (n,); starts_zyx: int64 (n, 3). Returns the groups and the numbers of the rows.
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
    """By class: `groups` that hold it, and synapses of each side, of the guard and `unplaced`; only what has a class."""
    found = {}
    for name in sorted({label for label in labels.tolist() if label is not None}):
        of_class = labels == name
        counts = {side: int((sides[of_class] == side).sum()) for side in (*SIDES, GUARD)}
        holding = groups[of_class & known(groups)]
        number = len(_coded(holding)[0]) if len(holding) else 0
        found[name] = {"groups": number, **counts, "unplaced": int(of_class.sum()) - sum(counts.values())}
    return found


def shortcomings(scheme: str, counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Sentences on the classes that a scheme cannot divide, from what `tally` counted."""
    found = []
    for name, count in counts.items():
        if scheme == "random" or not count["groups"]:
            continue
        empty = [side for side in SIDES if not count[side]]
        if count["groups"] < MIN_GROUPS or empty:
            without = f", so there is none for {' and '.join(empty)}" if empty else ""
            plural = "" if count["groups"] == 1 else "s"
            found.append(f"split by {scheme}: {name} has {count['groups']} {scheme}{plural}{without}.")
    if counts and not any(count["groups"] for count in counts.values()):
        found.append(f"There is no split by {scheme}: no synapse of a known class says its {scheme}.")
    return found
