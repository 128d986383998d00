"""Place the synapses of the demo's neurons, and describe their T-bars.

Input: `Tissue` and its `SectionMap`s, the neurons and random generators. Output: `Site`s (where the synapses are), and the
`TBar`s that `texture.py` draws. A synapse lies in its section, on the wall of a neurite of its neuron. Each transmitter
gets its number of synapses. Every number is invented for the demo; `demo.py` lists the rules that follow the literature.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from synpipe.errors import SynpipeError
from synpipe.synthetic.tissue import PIXEL_NM, SECTION_NM, VOXEL_NM, SectionMap, Tissue


@dataclass(frozen=True)
class Look:
    """A transmitter: share of the labelled neurons and of their synapses, number of hemilineages, vesicles (nm; stain)."""

    neurons: float
    synapses: float
    hemilineages: int
    radius: float
    aspect: float
    lumen: float
    per_synapse: int
    dense_core_share: float
    dense_core_radius: float = 0
    dense_core_stain: float = 0
    dense_core_fill: float = 0  # radius of the core ÷ radius of the vesicle; the rest is a clear halo


# Neurons and synapses (shares as in FAFB, with larger shares for the rare classes), hemilineages; clear vesicles: radius,
# aspect, lumen, number per synapse; dense-core vesicles: share, radius, stain, fill.
LOOKS = {
    "acetylcholine": Look(0.31, 0.31, 4, 18, 1.05, -0.04, 120, 0.01, 32, 1.2, 0.6),
    "gaba": Look(0.21, 0.23, 3, 14.5, 1.75, 0.04, 140, 0.01, 32, 1.2, 0.6),
    "glutamate": Look(0.14, 0.14, 2, 22, 1.05, -0.12, 90, 0.01, 32, 1.2, 0.6),
    "dopamine": Look(0.14, 0.15, 2, 18, 1.1, -0.02, 80, 0.13, 30, 1.1, 0.6),
    "serotonin": Look(0.11, 0.10, 2, 17, 1.1, -0.02, 70, 0.17, 36, 1.6, 0.75),
    "octopamine": Look(0.09, 0.07, 2, 17, 1.2, -0.02, 60, 0.18, 44, 1.3, 0.52),
}


@dataclass(frozen=True)
class Neuron:
    """One annotated neuron and how its terminals look; `transmitter` is None if it is unknown."""

    neuron_id: int
    looks_like: str
    transmitter: str | None
    hemilineage: str | None
    n_synapses: int
    stain: float
    grain: float
    vesicle_size: float
    vesicle_count: float
    dense_core_share: float
    tbar_size: float


@dataclass(frozen=True)
class DamagedSections:
    """missing: sections that are black. repeated: the section that repeats its predecessor."""

    missing: frozenset[int]
    repeated: int


@dataclass(frozen=True)
class Specimen:
    """The volume before synapses are placed.

    shape_zyx: in voxels. maps: one per section. owner: for each neurite the index of its neuron, −1 for none.
    """

    shape_zyx: tuple[int, int, int]
    tissue: Tissue
    maps: list[SectionMap]
    neurons: list[Neuron]
    owner: NDArray[np.int64]
    damaged: DamagedSections


@dataclass(frozen=True)
class Site:
    """A synapse: the foot of its T-bar on the membrane, the direction into the presynaptic neurite, and its partners.

    neuron: its index. disc: the disc of the tissue. normal_y, normal_x: a unit vector.
    """

    neuron: int
    disc: int
    section: int
    y_nm: float
    x_nm: float
    z_nm: float
    normal_y: float
    normal_x: float
    en_face: bool
    partners_yx_nm: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class TBar:
    """The T-bar of a synapse in one section: position in nm, inward normal (y and x), relative strength and size."""

    y: float
    x: float
    normal_y: float
    normal_x: float
    neurite: int
    strength: float
    size: float
    phase: float
    en_face: bool


def give_neurites(
    tissue: Tissue, neurons: list[Neuron], shape_zyx: tuple[int, int, int], rng: np.random.Generator
) -> NDArray:
    """Divide the widest neurites among the neurons, in proportion to their numbers of synapses.

    Wide neurites carry the presynapses (Cardona et al. 2010). Returns the index of each neurite's neuron, −1 for none,
    and gives the neurites in `tissue` the stain and grain of their neurons.
    """
    width = np.zeros(len(tissue.stain))
    middle = tissue.disc_yx_nm[len(tissue.disc_yx_nm) // 2]
    inside = ((middle > 0) & (middle < np.array(shape_zyx[1:]) * PIXEL_NM)).all(1)
    np.maximum.at(width, tissue.neurite[inside], tissue.disc_radius_nm.mean(0)[inside])
    widest = np.argsort(-width, kind="stable")[: max(len(neurons), np.count_nonzero(width) // 6)]
    quota = np.array([neuron.n_synapses for neuron in neurons])
    first_round = rng.permutation(len(neurons))
    owner = np.full(len(width), -1)
    owned = np.zeros(len(neurons))
    for turn, neurite in enumerate(widest):
        neuron = first_round[turn] if turn < len(neurons) else np.argmax(quota / owned)
        owner[neurite] = neuron
        owned[neuron] += 1
        tissue.stain[neurite], tissue.grain[neurite] = neurons[neuron].stain, neurons[neuron].grain
    return owner


def _find_candidates(section: SectionMap, tissue: Tissue, owner: NDArray, rng: np.random.Generator) -> NDArray:
    """Find places on the wall of presynaptic neurites: rows of disc, y, x, inward normal (y, x), en face."""
    step = 2 * PIXEL_NM
    presynaptic = owner[tissue.neurite[section.disc]] >= 0
    spots = np.flatnonzero(presynaptic & (section.wall_nm < 7))
    spots = rng.permutation(spots)[: 4 * len(section.disc) * 3]
    row, column = np.unravel_index(spots, section.disc.shape)
    y, x = (row + 0.5) * step, (column + 0.5) * step
    disc = section.disc[row, column]
    own = tissue.neurite[disc]

    def depth_at(dy: NDArray | int, dx: NDArray | int) -> NDArray:
        other, wall, _ = section.at(y + dy, x + dx)
        return np.where(tissue.neurite[other] == own, 1.0, -1.0) * wall

    normal = np.stack([depth_at(32, 0) - depth_at(-32, 0), depth_at(0, 32) - depth_at(0, -32)], 1)
    length = np.hypot(*normal.T)
    ny, nx = (normal / np.maximum(length, 1)[:, None]).T
    # A synapse needs at least two partners, and a neurite that is deep enough for a T-bar and vesicles.
    sides = [tissue.neurite[section.at(y - 50 * ny + u * nx, x - 50 * nx - u * ny)[0]] for u in (-80, 0, 80)]
    partners = (
        (sides[1] != own) & (sides[0] != own) & (sides[2] != own) & ((sides[0] != sides[1]) | (sides[1] != sides[2]))
    )
    deep = depth_at(110 * ny, 110 * nx) > 50
    sweep = section.sweep_nm[row, column]
    upright, flat = (sweep < 30) & partners, sweep > 45
    edge = 15  # map points, so that the partners lie inside the volume, too
    inside = (np.minimum(row, column) > edge) & (row < section.disc.shape[0] - edge)
    inside &= column < section.disc.shape[1] - edge
    good = (length > 80) & deep & (upright | flat) & inside
    return np.stack([disc, y, x, ny, nx, flat], 1)[good]


class _Candidate(NamedTuple):
    """A place for a synapse: one row of `_rank_candidates`. Positions in nm; normal: a unit vector into the neurite."""

    section: float
    disc: float
    y: float
    x: float
    normal_y: float
    normal_x: float
    en_face: float  # 1 for yes, 0 for no


def place_synapses(specimen: Specimen, rng: np.random.Generator) -> list[Site]:
    """Give every neuron its number of synapses, in random order, at least 220 nm or four sections apart.

    Raises `SynpipeError` if the volume has no room for them.
    """
    candidates = _rank_candidates(specimen, rng)
    neurons, disc_owner = specimen.neurons, specimen.owner[specimen.tissue.neurite]
    transmitters = [str(neuron.transmitter) for neuron in neurons]
    quota = np.array([neuron.n_synapses for neuron in neurons])
    taken: dict[tuple[int, int], list[tuple[float, float, float]]] = {}
    sites: list[Site] = []
    # If a neuron has no room for all its synapses, other neurons with its transmitter get them: the classes keep their
    # sizes.
    for group in (np.arange(len(neurons)), np.unique(transmitters, return_inverse=True)[1]):
        left = np.bincount(group, quota).astype(int)
        for candidate in candidates:
            neuron = int(disc_owner[int(candidate.disc)])
            if left[group[neuron]] and _is_free(candidate, taken):
                left[group[neuron]] -= 1
                quota[neuron] -= 1
                place = (candidate.section, candidate.y, candidate.x)
                taken.setdefault(_cell(candidate), []).append(place)
                sites.append(_make_site(neuron, candidate, rng))
    if left.any():
        raise SynpipeError(
            f"SyntheticSpec: a volume of {specimen.shape_zyx} voxels has room for only {len(sites)} of the synapses: "
            "lower n_synapses or enlarge shape_zyx."
        )
    return sorted(sites, key=lambda site: (site.section, site.y_nm, site.x_nm))


def _rank_candidates(specimen: Specimen, rng: np.random.Generator) -> list[_Candidate]:
    """Collect the candidates of all sections, in the order in which they are tried."""
    damaged = specimen.damaged
    beside_missing = {z + step for z in damaged.missing for step in (-1, 1)}
    extent = np.array(specimen.shape_zyx[1:]) * PIXEL_NM
    ranked = []
    for z, section in enumerate(specimen.maps):
        if z in damaged.missing or z == damaged.repeated:
            continue
        rows = _find_candidates(section, specimen.tissue, specimen.owner, rng)
        # Few synapses are annotated if a neighbouring section is missing or a tile of 1 µm extends beyond the volume.
        at_border = ((rows[:, 1:3] < 512) | (rows[:, 1:3] > extent - 512)).any(1)
        chance = (
            np.where(at_border, 0.12, 1.0) * (0.08 if z in beside_missing else 1.0) * np.where(rows[:, 5] > 0, 0.3, 1)
        )
        later = rng.random(len(rows)) > chance  # tried only if the others do not suffice
        ranked.append(np.column_stack([later + rng.random(len(rows)), np.full(len(rows), z), rows]))
    rows = np.concatenate(ranked)
    return [_Candidate(*row) for row in rows[np.argsort(rows[:, 0], kind="stable"), 1:]]


def _cell(candidate: _Candidate) -> tuple[int, int]:
    return int(candidate.y // 220), int(candidate.x // 220)


def _is_free(candidate: _Candidate, taken: Mapping[tuple[int, int], list[tuple[float, float, float]]]) -> bool:
    """Whether no synapse (z, y, x) in `taken`, by cells of 220 nm, is too close."""
    row, column = _cell(candidate)
    near = (place for dy in (-1, 0, 1) for dx in (-1, 0, 1) for place in taken.get((row + dy, column + dx), ()))
    return not any(
        abs(candidate.section - z) < 4 and np.hypot(candidate.y - y, candidate.x - x) < 220 for z, y, x in near
    )


def _make_site(neuron: int, candidate: _Candidate, rng: np.random.Generator) -> Site:
    y, x, ny, nx = candidate.y, candidate.x, candidate.normal_y, candidate.normal_x
    dz, dy, dx = rng.uniform(-0.45, 0.45, 3) * VOXEL_NM  # annotators do not click on the centres of voxels
    return Site(
        neuron=neuron,
        disc=int(candidate.disc),
        section=int(candidate.section),
        y_nm=float(y + dy),
        x_nm=float(x + dx),
        z_nm=float((int(candidate.section) + 0.5) * SECTION_NM + dz),
        normal_y=ny,
        normal_x=nx,
        en_face=candidate.en_face > 0,
        partners_yx_nm=tuple((y - 55 * ny + u * nx, x - 55 * nx - u * ny) for u in (-90, 0, 90)),
    )


def tbars_in(specimen: Specimen, sites: list[Site], z: int) -> Iterator[TBar]:
    """Yield the T-bars that appear in section z: those of synapses in this section and in its two neighbours."""
    tissue = specimen.tissue
    for site in sites:
        distance = z - site.section
        if abs(distance) > 1:
            continue
        y, x = (
            np.array([site.y_nm, site.x_nm])
            + tissue.disc_yx_nm[z, site.disc]
            - tissue.disc_yx_nm[site.section, site.disc]
        )
        if distance:  # the wall has moved along the normal, so search for it
            steps = np.arange(-72, 73, 4.0)
            _, wall, _ = specimen.maps[z].at(y + steps * site.normal_y, x + steps * site.normal_x)
            nearest = steps[np.argmin(wall + 0.2 * np.abs(steps))]
            y, x = y + nearest * site.normal_y, x + nearest * site.normal_x
        yield TBar(
            float(y),
            float(x),
            site.normal_y,
            site.normal_x,
            int(tissue.neurite[site.disc]),
            strength=1.0 if not distance else 0.5,
            size=specimen.neurons[site.neuron].tbar_size * (1 if not distance else 0.85),
            phase=site.x_nm % 6.28,
            en_face=site.en_face,
        )
