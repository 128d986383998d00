"""Does the same place find itself? Altered views of a tile must find its original among other tiles; no labels needed.

In: an opened volume, where the tiles begin, their vectors, and the function that embeds. Out: the rank of the original
for each view. Guarantees: a view is cut from the volume again, with a margin, so that turning and shifting show tissue
and not padding; tiles that overlap the original are left out, because they show the same place; equally near tiles count
as nearer, so that an encoder that tells nothing apart finds nothing.

An alteration: turned by any angle, shifted by up to 16 px in any direction, one section off (one step of the stack) up or
down, contrast × 0.75 to 1.25 about mid-grey and brightness ± 20 grey levels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from synpipe.analysis.evaluation import EvaluationSpec, same_place
from synpipe.embeddings.vectors import unit_vectors
from synpipe.tiles.tile import SECTIONS, TILE_PX, TileSpec, is_blank
from synpipe.volumes.volume import MissingChunk, Volume

SHIFT_PX = 16
CONTRAST = 0.25
BRIGHTNESS = 20
MARGIN_PX = 70
"""Beyond the tile: half of the diagonal of 256 px is 53 px longer than half of its side; 16 px of shift, 1 px to read."""

MIN_WHOLE = 50
"""With fewer places whose margin lies in the volume, others are taken too, and their margin filled with mean grey."""

Embed = Callable[[np.ndarray], np.ndarray]
"""Tiles uint8 (n, 3, 256, 256) to vectors float32 (n, d)."""


@dataclass(frozen=True)
class Alteration:
    """How a view differs from its tile. sections: steps of the stack, up or down."""

    angle_deg: float = 0.0
    shift_yx_px: tuple[float, float] = (0.0, 0.0)
    sections: int = 0
    contrast: float = 1.0
    brightness: float = 0.0


UNALTERED = Alteration()
SINGLES: dict[str, tuple[str, ...]] = {
    "rotation": ("angle_deg",),
    "shift": ("shift_yx_px",),
    "section": ("sections",),
    "contrast": ("contrast", "brightness"),
}
"""What is altered where each alteration is tried alone."""
ALL = "all"


def draw_alterations(count: int, seed: int) -> list[Alteration]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        length, direction = rng.uniform(0, SHIFT_PX), rng.uniform(0, 2 * np.pi)
        found.append(
            Alteration(
                angle_deg=rng.uniform(0, 360),
                shift_yx_px=(length * np.sin(direction), length * np.cos(direction)),
                sections=int(rng.choice([-1, 1])),
                contrast=rng.uniform(1 - CONTRAST, 1 + CONTRAST),
                brightness=rng.uniform(-BRIGHTNESS, BRIGHTNESS),
            )
        )
    return found


def only(alteration: Alteration, fields: Sequence[str]) -> Alteration:
    return replace(UNALTERED, **{name: getattr(alteration, name) for name in fields})


def draw_places(
    starts_zyx: np.ndarray, window_zyx: Sequence[int], shape_zyx: np.ndarray, spec: EvaluationSpec
) -> np.ndarray:
    """Rows to try, int64 (≤ `spec.places`,), in random order; none whose view leaves the volume if there are enough."""
    reach = np.array([(window_zyx[0] - 1) // (SECTIONS - 1), MARGIN_PX, MARGIN_PX])
    whole = ((starts_zyx >= reach) & (starts_zyx + np.array(window_zyx) + reach <= shape_zyx)).all(axis=1)
    drawn = np.random.default_rng(spec.seed).permutation(len(starts_zyx))
    inside, others = drawn[whole[drawn]], drawn[~whole[drawn]]
    chosen = inside if len(inside) >= min(MIN_WHOLE, spec.places) else np.concatenate([inside, others])
    return chosen[: spec.places]


def read_surroundings(volume: Volume, start_zyx: np.ndarray, spec: TileSpec) -> np.ndarray | None:
    """Five sections around a tile, its three and one more on either side, with the margin: uint8 (5, 396, 396).

    start_zyx: first voxel of the tile. What is outside the volume is of the mean grey value; a section that is outside or
    blank is its neighbour towards the middle, as in a tile. None where the volume holds nothing there.
    """
    step = spec.section_step(volume.voxel_size_nm_zyx)
    middle, size = int(start_zyx[0]) + step, TILE_PX + 2 * MARGIN_PX
    corner = start_zyx[1:] - MARGIN_PX
    low, high = np.maximum(corner, 0), np.minimum(corner + size, volume.shape_zyx[1:])
    sections: dict[int, np.ndarray] = {}
    for offset in (0, -1, 1, -2, 2):
        z = middle + offset * step
        found = None
        if 0 <= z < volume.shape_zyx[0] and (high > low).all():
            try:
                found = volume.read(np.array([z, *low]), np.array([z + 1, *high]))[0]
            except MissingChunk:
                return None
        if found is None or is_blank(found, spec):
            if offset == 0:
                return None
            sections[offset] = sections[offset - int(np.sign(offset))]
            continue
        canvas = np.full((size, size), round(float(found.mean())), dtype=np.uint8)
        top, left = low - corner
        canvas[top : top + found.shape[0], left : left + found.shape[1]] = found
        sections[offset] = canvas
    return np.stack([sections[offset] for offset in range(-2, 3)])


def view(surroundings: np.ndarray, alteration: Alteration) -> np.ndarray:
    """A tile of the altered place: uint8 (3, 256, 256); bicubic where it is turned or shifted by parts of a pixel."""
    first = 1 + alteration.sections
    angle, centre = np.deg2rad(alteration.angle_deg), surroundings.shape[-1] / 2
    cos, sin = np.cos(angle), np.sin(angle)
    dy, dx = alteration.shift_yx_px
    half = TILE_PX / 2
    # Pillow asks where an output pixel comes from: x' = a·x + b·y + c, y' = d·x + e·y + f.
    matrix = (
        *(cos, -sin, centre + dx - half * (cos - sin)),
        *(sin, cos, centre + dy - half * (sin + cos)),
    )
    tile = np.stack(
        [
            np.asarray(
                Image.fromarray(section).transform(
                    (TILE_PX, TILE_PX), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC
                )
            )
            for section in surroundings[first : first + SECTIONS]
        ]
    ).astype(np.float32)
    altered = (tile - 127.5) * alteration.contrast + 127.5 + alteration.brightness
    return np.clip(np.round(altered), 0, 255).astype(np.uint8)


def ranks(
    found: np.ndarray,
    places: np.ndarray,
    vectors: np.ndarray,
    starts_zyx: np.ndarray,
    window_zyx: Sequence[int],
    spec: EvaluationSpec,
) -> np.ndarray:
    """Rank of the original of each view, 1 being the best: int64 (m,).

    found: vectors of the views, (m, d), of any length; places: their rows. vectors: of all tiles, (n, d), unit length;
    the distractors are the same `spec.distractors` of them for every encoder.
    """
    drawn = np.random.default_rng([spec.seed, 1]).permutation(len(vectors))[: spec.distractors]
    unit = unit_vectors(found)
    own = (unit * vectors[places]).sum(axis=1)
    others = unit @ vectors[drawn].T
    others[same_place(starts_zyx[places], starts_zyx[drawn], window_zyx)] = -np.inf
    return 1 + (others >= own[:, None]).sum(axis=1)


@dataclass(frozen=True)
class InstanceRetrieval:
    """places: rows that were tried (m,); ranks: of their originals for views with every alteration at once (m,); singles:
    by name of the alteration, ranks of the first of them with that one alone."""

    places: np.ndarray
    ranks: np.ndarray
    singles: dict[str, np.ndarray]


def instance_retrieval(
    volume: Volume,
    tiles: TileSpec,
    embed: Embed,
    view_of: Callable[[np.ndarray], np.ndarray],
    vectors: np.ndarray,
    starts_zyx: np.ndarray,
    window_zyx: Sequence[int],
    spec: EvaluationSpec,
) -> InstanceRetrieval:
    """Try it. embed: the encoder that made `vectors`; view_of: what the stacking makes of a tile, (3, 256, 256) to the
    same. The rest as in `ranks`; places at which the volume holds nothing are left out."""
    places: list[int] = []
    views: dict[str, list[np.ndarray]] = {ALL: [], **{name: [] for name in SINGLES}}
    drawn = draw_places(starts_zyx, window_zyx, volume.shape_zyx, spec)
    for row, alteration in zip(drawn.tolist(), draw_alterations(len(drawn), spec.seed), strict=True):
        surroundings = read_surroundings(volume, starts_zyx[row], tiles)
        if surroundings is None:
            continue
        places.append(row)
        views[ALL].append(view_of(view(surroundings, alteration)))
        if len(places) <= spec.singles:
            for name, fields in SINGLES.items():
                views[name].append(view_of(view(surroundings, only(alteration, fields))))
    rows = np.array(places, dtype=np.int64)
    if not places:
        return InstanceRetrieval(rows, rows, dict.fromkeys(SINGLES, rows))
    found = {
        name: ranks(embed(np.stack(tried)), rows[: len(tried)], vectors, starts_zyx, window_zyx, spec)
        for name, tried in views.items()
    }
    return InstanceRetrieval(rows, found.pop(ALL), found)
