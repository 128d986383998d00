"""Draw one section of the demo tissue.

Input: the neurites, mitochondria, vesicles and T-bars (from `tissue.py`, `vesicles.py` and `synapses.py`) and the index of
a section. Output: the picture of the section, uint8. A picture depends only on the arguments.

The picture follows the physics of a transmission electron microscope: every structure adds stain, and the brightness is
`LIGHT * exp(-stain)`. A section is 40 nm thick and its stain is projected onto the plane, so an upright membrane is a
sharp line, and a membrane that leans is a broad grey band with the same total stain.
"""

import numpy as np
from numpy.typing import NDArray

from synpipe.synthetic.synapses import TBar
from synpipe.synthetic.tissue import MAP_NM, PIXEL_NM, SECTION_NM, Floats, SectionMap, Tissue, double, smooth_noise
from synpipe.synthetic.vesicles import Bodies

LIGHT = 224.0  # grey value without any stain


def _membrane_stain() -> Floats:
    """Stain of two membranes 14 nm apart, centre to centre, by distance to the wall (nm) and sweep (steps of 8 nm)."""
    distance = np.arange(256)[:, None, None]
    sweep = np.maximum(np.arange(32) * 8.0, 1)[None, :, None]
    inside = distance + sweep * np.linspace(-0.5, 0.5, 41)
    profile = 1.75 * np.exp(-(((np.abs(inside) - 7) / 4.5) ** 2)) + 0.7 * np.exp(-((inside / 6) ** 2))
    return profile.mean(2).astype(np.float32).ravel()


MEMBRANE_STAIN = _membrane_stain()


def draw_section(
    tissue: Tissue, z: int, section: SectionMap, bodies: Bodies, tbars: list[TBar], rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Draw section z, uint8 (2h, 2w) for a map of (h, w). `bodies` and `tbars` are those of this section."""
    shape = section.disc.shape
    neurite = tissue.neurite[section.disc]
    grain = smooth_noise(rng, shape, 0.85)
    specks = np.maximum(grain - np.float32(0.7), 0)
    patches = double(smooth_noise(rng, (shape[0] // 2 + 1, shape[1] // 2 + 1), 3.5))[: shape[0], : shape[1]]
    cytoplasm = tissue.stain[neurite] + tissue.grain[neurite] * (
        np.float32(0.10) * grain + np.float32(0.48) * specks + np.float32(0.06) * patches
    )
    free = _draw_mitochondria(cytoplasm, tissue, z, section, neurite)
    stain = double(np.maximum(cytoplasm, np.float32(0.02)))

    _draw_bodies(stain, z, section, np.where(free, neurite, -1), bodies)
    wall = double(section.wall_nm.astype(np.float32))
    sweep = double(section.sweep_nm.astype(np.float32))
    stain += MEMBRANE_STAIN.take(wall.astype(np.int32) * 32 + (sweep * np.float32(1 / 8)).astype(np.int32))
    for tbar in tbars:
        _draw_tbar(stain, wall, neurite, tbar)
    return _expose(stain, rng)


def _expose(stain: Floats, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Turn stain into grey values: transmission, shot noise, the microscope's blur, the section's contrast and brightness."""
    from scipy import ndimage

    image = np.exp(np.negative(stain, out=stain), out=stain)
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    noise *= np.sqrt(image)
    noise *= np.float32(0.15)
    image += noise
    for axis in (0, 1):
        image = ndimage.correlate1d(image, [0.16, 0.68, 0.16], axis=axis, mode="nearest")
    tilts = [
        np.linspace(1 - tilt, 1 + tilt, size, dtype=np.float32)
        for tilt, size in zip(rng.normal(0, 0.03, 2), image.shape, strict=True)
    ]
    image *= np.float32(LIGHT * rng.normal(1, 0.035)) * tilts[0][:, None]
    image *= tilts[1]
    image += np.float32(rng.normal(0, 3.5))
    return np.clip(image, 1, 255, out=image).astype(np.uint8)


def _window(y_nm: float, x_nm: float, half_nm: float, step_nm: float, shape: tuple[int, ...]):
    """Return the slices of a square around a point, and the distance in nm from the point to its rows and to its columns.

    Returns None if the square lies outside the picture.
    """
    slices, offsets = [], []
    for centre, size in zip((y_nm, x_nm), shape, strict=True):
        low, high = max(int((centre - half_nm) / step_nm), 0), min(int((centre + half_nm) / step_nm) + 1, size)
        if low >= high:
            return None
        slices.append(slice(low, high))
        offsets.append((np.arange(low, high, dtype=np.float32) + 0.5) * step_nm - centre)
    return tuple(slices), offsets[0][:, None], offsets[1][None]


def _draw_mitochondria(cytoplasm: Floats, tissue: Tissue, z: int, section: SectionMap, neurite: NDArray) -> NDArray:
    """Draw mitochondria: two membranes around a dark matrix with cristae, shaped by the wall of the neurite.

    Returns a bool mask of the map points without a mitochondrion.
    """
    free = np.ones(cytoplasm.shape, bool)
    for disc, centre_z, length, long, short, angle, pitch, phase in tissue.mitochondria:
        height = 1 - (((z + 0.5) * SECTION_NM - centre_z) / length) ** 2
        disc = int(disc)
        centre = tissue.disc_yx_nm[z, disc]
        square = _window(centre[0], centre[1], long + MAP_NM, MAP_NM, cytoplasm.shape) if height > 0 else None
        if square is None:
            continue
        window, dy, dx = square
        along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
        bend = 9 * np.sin(along / 47 + phase) + 6 * np.sin(across / 29 - 2 * phase)
        depth = (np.sqrt(height) - np.hypot(along / long, (across + bend) / short)) * short
        depth = np.minimum(depth, section.wall_nm[window].astype(np.float32) - 26)
        inside = np.clip(depth / 6 + 0.5, 0, 1) * (neurite[window] == tissue.neurite[disc])
        stripes = np.sin((across + bend + along * 0.25) * (2 * np.pi / pitch) + phase)
        cristae = np.clip(1.6 * stripes - 0.3, -0.55, 1) * np.clip(np.sin(along / 60 + phase) + 0.9, 0, 1)
        mitochondrion = 0.72 + 0.38 * cristae * np.clip(depth / 15 - 1, 0, 1)
        mitochondrion += 0.75 * np.exp(-(((depth - 4) / 6) ** 2)) + 0.45 * np.exp(-(((depth - 20) / 6) ** 2))
        cytoplasm[window] += inside * (mitochondrion - 0.35 * cytoplasm[window])
        free[window] &= inside == 0
    return free


def _draw_bodies(stain: Floats, z: int, section: SectionMap, neurite: NDArray, bodies: Bodies) -> None:
    """Add the stain of the bodies that lie in their own neurite, clear of the wall, by the share that is in the section."""
    low, high = z * SECTION_NM, (z + 1) * SECTION_NM
    share = np.minimum(bodies.z + bodies.radius, high) - np.maximum(bodies.z - bodies.radius, low)
    share = np.clip(share / np.minimum(2 * bodies.radius, SECTION_NM), 0, 1)
    wall = section.at(bodies.y, bodies.x)[1]
    height, width = stain.shape
    radius = bodies.radius * np.sqrt(bodies.aspect) + 10
    row, column = bodies.y / PIXEL_NM, bodies.x / PIXEL_NM
    margin = np.ceil(radius / PIXEL_NM)
    fits = (row > margin) & (row < height - margin - 1) & (column > margin) & (column < width - margin - 1)
    clear = wall > 0.8 * bodies.radius + 12
    keep = np.flatnonzero((share > 0.15) & fits & clear)
    home = neurite[(row[keep] / 2).astype(int), (column[keep] / 2).astype(int)]
    keep = keep[home == bodies.neurite[keep]]
    for half in np.unique(margin[keep]).astype(int):
        group = keep[margin[keep] == half]
        b = bodies.select(group)
        top, left = row[group].astype(int), column[group].astype(int)
        steps = np.arange(-half, half + 1)
        dy = ((top[:, None] + steps + 0.5) * PIXEL_NM - b.y[:, None])[:, :, None].astype(np.float32)
        dx = ((left[:, None] + steps + 0.5) * PIXEL_NM - b.x[:, None])[:, None, :].astype(np.float32)
        cos, sin, stretch = _per_body(np.cos(b.angle)), _per_body(np.sin(b.angle)), _per_body(np.sqrt(b.aspect))
        distance = np.hypot((dx * cos + dy * sin) / stretch, (dy * cos - dx * sin) * stretch)
        depth = _per_body(b.radius) - distance
        sprite = _per_body(b.ring) * np.exp(-(((depth - 3) / 4.5) ** 2))
        sprite += _per_body(b.lumen) * np.clip(depth / 6 - 0.5, 0, 1)
        sprite += _per_body(b.core) * np.clip((_per_body(b.core_radius) - distance) / 8 + 0.5, 0, 1)
        sprite *= _per_body(share[group])
        pixel = (top[:, None, None] + steps[:, None]) * width + left[:, None, None] + steps
        np.add.at(stain.reshape(-1), pixel.ravel(), sprite.ravel())


def _per_body(values: NDArray) -> Floats:
    return values[:, None, None].astype(np.float32)


def _soft(depth: Floats, edge_nm: float = 16) -> Floats:
    """Return 1 inside and 0 outside, with a smooth edge of about `edge_nm`; `depth` is in nm."""
    return 1 / (1 + np.exp(-4 / edge_nm * depth))


def _draw_tbar(stain: Floats, wall: Floats, neurite: NDArray, tbar: TBar) -> None:
    """Draw a T-bar, the cleft and the postsynaptic density (Prokop & Meinertzhagen 2006).

    From the side, the T-bar is a pedestal on the membrane with a platform parallel to it. En face, only the platform is
    visible, a four-pronged disc.
    """
    square = _window(tbar.y, tbar.x, 240, PIXEL_NM, stain.shape)
    if square is None:
        return
    window, dy, dx = square
    inward = dy * tbar.normal_y + dx * tbar.normal_x
    along = dx * tbar.normal_y - dy * tbar.normal_x
    # The outlines are ragged, in a different way for every synapse.
    ragged = 6 * np.sin(along / 13 + tbar.phase) + 5 * np.sin(along / 29 - inward / 21 + 3 * tbar.phase)
    size = tbar.size
    if tbar.en_face:
        distance = np.hypot(dy, dx) + ragged
        outline = 62 * size * (1 + 0.2 * np.cos(4 * np.arctan2(dy, dx + 1e-3) + tbar.phase))
        ink = 0.8 * _soft(outline - distance) + 0.6 * _soft(24 * size - distance)
        ink += 0.35 * np.exp(-((distance / 110) ** 2))
    else:
        height = 46 * size
        above = inward + along**2 / (700 * size) - 0.5 * ragged
        across = np.abs(along + 0.7 * ragged)
        ink = 1.4 * _soft(17 * size - across) * _soft(inward) * _soft(height - above)
        ink += 1.7 * _soft(58 * size - across) * np.exp(-(((above - height) / (11 * size)) ** 2))
        ink += 0.6 * np.exp(-((along / (60 * size)) ** 2) - ((inward - 26 * size) / (38 * size)) ** 2)
        close = wall[window]
        rows, columns = (np.arange(part.start, part.stop) // 2 for part in window)
        post = neurite[np.ix_(rows, columns)] != tbar.neurite
        near = _soft(85 * size - across, 50) * np.exp(-((np.maximum(np.abs(inward) - 25, 0) / 35) ** 2))
        ink += near * (
            0.9 * np.exp(-((close / 14) ** 2)) + 1.2 * post * np.exp(-(((close - 4 - 0.4 * ragged) / 17) ** 2))
        )
    stain[window] += np.float32(tbar.strength) * ink
