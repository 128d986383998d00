"""Make the vesicles, dense-core vesicles and microtubules of the demo tissue.

Input: the tissue, its neurons and synapses, and a random generator. Output: the `Bodies` of the whole volume, which
`texture.py` draws. Every number is invented.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from synpipe.synthetic.synapses import LOOKS, Neuron, Site
from synpipe.synthetic.tissue import SECTION_NM, Tissue


@dataclass(frozen=True)
class Bodies:
    """Small bodies in the cytoplasm: vesicles, dense-core vesicles and microtubules. One row each, lengths in nm.

    `ring`, `lumen` and `core` are amounts of stain; `lumen` is negative if the inside is clearer than the cytoplasm.
    """

    z: NDArray
    y: NDArray
    x: NDArray
    neurite: NDArray[np.int64]
    radius: NDArray
    aspect: NDArray
    angle: NDArray
    ring: NDArray
    lumen: NDArray
    core: NDArray
    core_radius: NDArray

    def select(self, rows: NDArray) -> "Bodies":
        """Return the bodies at `rows`, which are indices or a bool mask."""
        return Bodies(**{name: column[rows] for name, column in vars(self).items()})

    @staticmethod
    def join(parts: "list[Bodies]") -> "Bodies":
        return Bodies(**{name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])})


def make_bodies(tissue: Tissue, neurons: list[Neuron], sites: list[Site], rng: np.random.Generator) -> Bodies:
    """Make the vesicles around every T-bar, and the microtubules and stray vesicles in every neurite of the volume."""
    from scipy.spatial import cKDTree

    depth = len(tissue.disc_yx_nm)
    parts = []
    for site in sites:
        neuron, look = neurons[site.neuron], LOOKS[neurons[site.neuron].looks_like]
        count = int(3 * look.per_synapse * neuron.vesicle_count)
        dense = rng.random(count) < neuron.dense_core_share
        inward = 25 + rng.gamma(2.0, 75, count) * np.where(dense, 1.2, 1)
        along = rng.normal(0, 120, count) * np.where(dense, 1.3, 1)
        z_nm = site.z_nm + rng.normal(0, 75, count)
        section = np.clip(z_nm // SECTION_NM, 0, depth - 1).astype(int)
        drift = tissue.disc_yx_nm[section, site.disc] - tissue.disc_yx_nm[site.section, site.disc]
        radius = (
            np.where(dense, look.dense_core_radius, look.radius) * neuron.vesicle_size * rng.lognormal(0, 0.08, count)
        )
        parts.append(
            Bodies(
                z=z_nm,
                y=site.y_nm + inward * site.normal_y - along * site.normal_x + drift[:, 0],
                x=site.x_nm + inward * site.normal_x + along * site.normal_y + drift[:, 1],
                neurite=np.full(count, tissue.neurite[site.disc]),
                radius=radius,
                aspect=1 + np.abs(rng.normal(look.aspect - 1, 0.12, count)) * ~dense,
                angle=rng.uniform(0, np.pi, count),
                ring=np.where(dense, 0.5, rng.normal(0.75, 0.1, count)),
                lumen=np.where(dense, -0.04, look.lumen),
                core=np.where(dense, look.dense_core_stain * rng.lognormal(0, 0.15, count), 0),
                core_radius=radius * look.dense_core_fill,
            )
        )
    # Vesicles do not overlap: if two would, the later one is removed. Dense-core vesicles come first and are kept.
    vesicles = Bodies.join(parts)
    order = np.argsort(vesicles.core <= 0, kind="stable")
    vesicles = vesicles.select(order)
    space = np.stack([vesicles.z, vesicles.y, vesicles.x], 1)
    close = cKDTree(space).query_pairs(60, output_type="ndarray")
    gap = np.linalg.norm(space[close[:, 0]] - space[close[:, 1]], axis=1)
    crowded = close[gap < 0.85 * (vesicles.radius[close[:, 0]] + vesicles.radius[close[:, 1]])]
    keep = np.ones(len(space), bool)
    keep[crowded.max(1)] = False
    return Bodies.join([vesicles.select(keep), _background_bodies(tissue, depth, rng)])


def _background_bodies(tissue: Tissue, depth: int, rng: np.random.Generator) -> Bodies:
    """Make microtubules (25 nm), which continue from section to section, and stray vesicles, tubules and a few dense cores."""
    radii = tissue.disc_radius_nm.mean(0)
    tubes = np.repeat(np.arange(len(radii)), rng.poisson(np.minimum(radii / 22, 16)))
    offset = rng.uniform(-0.75, 0.75, (len(tubes), 2)) * radii[tubes, None]
    disc = np.repeat(tubes[None], depth, 0).ravel()
    z = np.repeat(np.arange(depth), len(tubes))
    wander = np.cumsum(rng.normal(0, 9, (depth, len(tubes), 2)), 0).reshape(-1, 2)
    lying = np.tile(rng.random(len(tubes)) < 0.25, depth)
    microtubules = (disc, z, np.tile(offset, (depth, 1)) + wander, np.full(len(disc), 9.0))

    stray = np.repeat(np.arange(len(radii)), rng.poisson(0.00016 * depth * radii**1.7))
    stray_offset = rng.uniform(-0.9, 0.9, (len(stray), 2)) * radii[stray, None]
    strays = (stray, rng.integers(0, depth, len(stray)), stray_offset, rng.uniform(14, 34, len(stray)))

    parts = []
    for (disc, z, offset, radius), tube in ((microtubules, True), (strays, False)):
        count = len(disc)
        dense = (rng.random(count) < 0.03) & (not tube)
        y, x = (tissue.disc_yx_nm[z, disc] + offset).T
        parts.append(
            Bodies(
                z=(z + 0.5) * SECTION_NM,
                y=y,
                x=x,
                neurite=tissue.neurite[disc],
                radius=radius,
                aspect=np.where(lying, 6.0, 1.1) if tube else 1 + rng.gamma(1.0, 0.6, count),
                angle=rng.uniform(0, np.pi, count),
                ring=np.full(count, 0.42) if tube else rng.normal(0.6, 0.1, count),
                lumen=np.full(count, 0.0) if tube else rng.uniform(-0.1, 0.15, count),
                core=np.where(dense, 1.5, 0.0),
                core_radius=np.full(count, 18.0),
            )
        )
    return Bodies.join(parts)
