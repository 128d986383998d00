"""The neurons of the synthetic demo and their synapses.

In: `Tissue` and its `SectionMap`s, the neurons and random generators. Out: `Site`s (where synapses are), and the
`TBar`s that `synthetic_texture.py` draws. Guarantees: a synapse lies on the wall of a neurite of its neuron,
in its section; a transmitter keeps its number of synapses. Every number is invented for the demo; `synthetic.py`
tells which rules follow the literature.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from synpipe.errors import SynpipeError
from synpipe.synthetic.tissue import PIXEL_NM, SECTION_NM, VOXEL_NM, SectionMap, Tissue


@dataclass(frozen=True)
class Look:
    """Share of the labelled neurons and synapses, hemilineages, and vesicles of a transmitter (nm; stain)."""

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
    dense_core_fill: float = 0  # radius of the core ÷ radius of the vesicle: the rest is a clear halo


# Neurons, synapses (shares as in FAFB, the rare ones raised), hemilineages; clear vesicles: radius, aspect, lumen, how
# many a synapse; dense-core vesicles: share, radius, stain, fill.
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
    """One annotated neuron and how its terminals look; `transmitter` is None where nobody knows it."""

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
class Site:
    """A synapse: its T-bar's foot on the membrane, the direction into the presynaptic neurite, its partners."""

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
    """What a synapse draws in one section. Lengths in nm, angle of the inward normal (y, x components)."""

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
    """Divide the widest neurites, which carry the presynapses (Cardona et al. 2010), among the neurons by their quotas.

    Returns for each neurite the index of its neuron, −1 for none; colours the neurites in `tissue` like their neurons.
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


def _candidates(section: SectionMap, tissue: Tissue, owner: NDArray, rng: np.random.Generator) -> NDArray:
    """Places on the wall of presynaptic neurites: rows of disc, y, x, normal (y, x; into the neurite), en face."""
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
    # A synapse faces at least two partners, and its neurite is deep enough for a T-bar and vesicles.
    sides = [tissue.neurite[section.at(y - 50 * ny + u * nx, x - 50 * nx - u * ny)[0]] for u in (-80, 0, 80)]
    partners = (
        (sides[1] != own) & (sides[0] != own) & (sides[2] != own) & ((sides[0] != sides[1]) | (sides[1] != sides[2]))
    )
    deep = depth_at(110 * ny, 110 * nx) > 50
    sweep = section.sweep_nm[row, column]
    upright, flat = (sweep < 30) & partners, sweep > 45
    edge = 15  # map points: partners lie inside the volume, too
    inside = (np.minimum(row, column) > edge) & (row < section.disc.shape[0] - edge)
    inside &= column < section.disc.shape[1] - edge
    good = (length > 80) & deep & (upright | flat) & inside
    return np.stack([disc, y, x, ny, nx, flat], 1)[good]


def place_synapses(
    shape_zyx: tuple[int, int, int],
    missing: set[int],
    repeated: int,
    tissue: Tissue,
    maps: list[SectionMap],
    neurons: list[Neuron],
    owner: NDArray,
    rng: np.random.Generator,
) -> list[Site]:
    """Fill every neuron's quota from the candidates, in random order, at least 220 nm (or three sections) apart."""
    beside_missing = {z + step for z in missing for step in (-1, 1)}
    extent = np.array(shape_zyx[1:]) * PIXEL_NM
    found = []
    for z, section in enumerate(maps):
        if z in missing or z == repeated:
            continue
        rows = _candidates(section, tissue, owner, rng)
        # Few synapses are annotated where a neighbouring section is missing or a 1 µm tile sticks out of the volume.
        at_border = ((rows[:, 1:3] < 512) | (rows[:, 1:3] > extent - 512)).any(1)
        chance = (
            np.where(at_border, 0.12, 1.0) * (0.08 if z in beside_missing else 1.0) * np.where(rows[:, 5] > 0, 0.3, 1)
        )
        later = rng.random(len(rows)) > chance  # tried only where the others do not fill a neuron's quota
        found.append(np.column_stack([later + rng.random(len(rows)), np.full(len(rows), z), rows]))
    candidates = np.concatenate(found)
    candidates = candidates[np.argsort(candidates[:, 0], kind="stable"), 1:]

    transmitters = [str(neuron.transmitter) for neuron in neurons]
    quota = np.array([neuron.n_synapses for neuron in neurons])
    taken: dict[tuple[int, int], list[tuple[float, float, float]]] = {}
    sites: list[Site] = []
    # What a neuron has no room for goes to the others of its transmitter, so that classes keep their sizes.
    for group in (np.arange(len(neurons)), np.unique(transmitters, return_inverse=True)[1]):
        left = np.bincount(group, quota).astype(int)
        for z, disc, y, x, ny, nx, flat in candidates:
            neuron = int(owner[tissue.neurite[int(disc)]])
            cell = (int(y // 220), int(x // 220))
            near = (s for dy in (-1, 0, 1) for dx in (-1, 0, 1) for s in taken.get((cell[0] + dy, cell[1] + dx), ()))
            if left[group[neuron]] and not any(abs(z - s[0]) < 4 and np.hypot(y - s[1], x - s[2]) < 220 for s in near):
                left[group[neuron]] -= 1
                quota[neuron] -= 1
                taken.setdefault(cell, []).append((z, y, x))
                sites.append(_site(neuron, int(disc), int(z), (y, x), (ny, nx), flat > 0, rng))
    if left.any():
        raise SynpipeError(
            f"SyntheticSpec: a volume of {shape_zyx} voxels has room for only {len(sites)} of the synapses asked for: "
            "lower n_synapses or enlarge shape_zyx."
        )
    return sorted(sites, key=lambda site: (site.section, site.y_nm, site.x_nm))


def _site(
    neuron: int,
    disc: int,
    z: int,
    yx: tuple[float, float],
    normal: tuple[float, float],
    en_face: bool,
    rng: np.random.Generator,
) -> Site:
    (y, x), (ny, nx) = yx, normal
    dz, dy, dx = rng.uniform(-0.45, 0.45, 3) * VOXEL_NM  # annotators do not click on voxel centres
    return Site(
        neuron=neuron,
        disc=disc,
        section=z,
        y_nm=float(y + dy),
        x_nm=float(x + dx),
        z_nm=float((z + 0.5) * SECTION_NM + dz),
        normal_y=ny,
        normal_x=nx,
        en_face=en_face,
        partners_yx_nm=tuple((y - 55 * ny + u * nx, x - 55 * nx - u * ny) for u in (-90, 0, 90)),
    )


def tbars_in(
    tissue: Tissue, maps: list[SectionMap], neurons: list[Neuron], sites: list[Site], z: int
) -> Iterator[TBar]:
    """What the synapses of section z and its two neighbours show in section z."""
    for site in sites:
        away = z - site.section
        if abs(away) > 1:
            continue
        neurite = int(tissue.neurite[site.disc])
        y, x = (
            np.array([site.y_nm, site.x_nm])
            + tissue.disc_yx_nm[z, site.disc]
            - tissue.disc_yx_nm[site.section, site.disc]
        )
        if away:  # The wall has moved along the normal: look for it.
            steps = np.arange(-72, 73, 4.0)
            _, wall, _ = maps[z].at(y + steps * site.normal_y, x + steps * site.normal_x)
            nearest = steps[np.argmin(wall + 0.2 * np.abs(steps))]
            y, x = y + nearest * site.normal_y, x + nearest * site.normal_x
        yield TBar(
            float(y),
            float(x),
            site.normal_y,
            site.normal_x,
            neurite,
            strength=1.0 if not away else 0.5,
            size=neurons[site.neuron].tbar_size * (1 if not away else 0.85),
            phase=site.x_nm % 6.28,
            en_face=site.en_face,
        )
