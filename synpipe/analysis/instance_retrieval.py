"""Measure whether an altered view of a place finds the tile of that place among other tiles. No labels are needed.

Inputs: an opened volume, the positions and vectors of its tiles, and the function that embeds tiles. Output: the rank of
the original tile for each view. Guarantees:
- A view is cut from the volume again, with a margin, so that rotation and shift show tissue and not padding.
- Tiles that overlap the original are not ranked, because they show the same place.
- Tiles as near as the original are ranked before it, so that an encoder with equal vectors for all tiles finds nothing.

An alteration rotates by any angle, shifts by up to 16 px in any direction, moves one section (one step of the stack) up or
down, multiplies the contrast about mid-grey by 0.75 to 1.25, and changes the brightness by up to 20 grey levels.
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
"""Margin around the tile: 53 px by which half the diagonal of 256 px exceeds half its side, 16 px of shift, and 1 px for
interpolation."""

MIN_WHOLE = 50
"""If fewer places have their margin inside the volume, others are used too; the missing margin is filled with mean grey."""

Embed = Callable[[np.ndarray], np.ndarray]
"""Maps tiles uint8 (n, 3, 256, 256) to vectors float32 (n, d)."""


@dataclass(frozen=True)
class Alteration:
    """The difference between a view and its tile. shift_yx_px: pixels. sections: steps of the stack. brightness: grey levels."""

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
"""The fields that are altered when each alteration is tried alone."""
ALL = "all"


def draw_alterations(count: int, seed: int) -> list[Alteration]:
    """Draw alterations in which every field is altered."""
    rng = np.random.default_rng(seed)
    alterations = []
    for _ in range(count):
        length, direction = rng.uniform(0, SHIFT_PX), rng.uniform(0, 2 * np.pi)
        alterations.append(
            Alteration(
                angle_deg=rng.uniform(0, 360),
                shift_yx_px=(length * np.sin(direction), length * np.cos(direction)),
                sections=int(rng.choice([-1, 1])),
                contrast=rng.uniform(1 - CONTRAST, 1 + CONTRAST),
                brightness=rng.uniform(-BRIGHTNESS, BRIGHTNESS),
            )
        )
    return alterations


def keep_only(alteration: Alteration, fields: Sequence[str]) -> Alteration:
    """Return the alteration with all other fields unaltered."""
    return replace(UNALTERED, **{name: getattr(alteration, name) for name in fields})


def draw_places(
    starts_zyx: np.ndarray, window_zyx: Sequence[int], shape_zyx: np.ndarray, spec: EvaluationSpec
) -> np.ndarray:
    """Draw at most `spec.places` rows to try: int64, in random order. Views that leave the volume are used only if needed."""
    reach = np.array([(window_zyx[0] - 1) // (SECTIONS - 1), MARGIN_PX, MARGIN_PX])
    whole = ((starts_zyx >= reach) & (starts_zyx + np.array(window_zyx) + reach <= shape_zyx)).all(axis=1)
    drawn = np.random.default_rng(spec.seed).permutation(len(starts_zyx))
    inside, others = drawn[whole[drawn]], drawn[~whole[drawn]]
    chosen = inside if len(inside) >= min(MIN_WHOLE, spec.places) else np.concatenate([inside, others])
    return chosen[: spec.places]


def read_surroundings(volume: Volume, start_zyx: np.ndarray, spec: TileSpec) -> np.ndarray | None:
    """Read the three sections of a tile and one more on either side, with the margin: uint8 (5, 396, 396).

    start_zyx: first voxel of the tile. Pixels outside the volume get the mean grey value. A section that is outside the
    volume or blank is replaced by its neighbour towards the middle, as in a tile. Returns None if the volume stores nothing
    there.
    """
    step = spec.section_step(volume.voxel_size_nm_zyx)
    middle, size = int(start_zyx[0]) + step, TILE_PX + 2 * MARGIN_PX
    corner = start_zyx[1:] - MARGIN_PX
    low, high = np.maximum(corner, 0), np.minimum(corner + size, volume.shape_zyx[1:])
    sections: dict[int, np.ndarray] = {}
    for offset in (0, -1, 1, -2, 2):
        z = middle + offset * step
        section = None
        if 0 <= z < volume.shape_zyx[0] and (high > low).all():
            try:
                section = volume.read(np.array([z, *low]), np.array([z + 1, *high]))[0]
            except MissingChunk:
                return None
        if section is None or is_blank(section, spec):
            if offset == 0:
                return None
            sections[offset] = sections[offset - int(np.sign(offset))]
            continue
        canvas = np.full((size, size), round(float(section.mean())), dtype=np.uint8)
        top, left = low - corner
        canvas[top : top + section.shape[0], left : left + section.shape[1]] = section
        sections[offset] = canvas
    return np.stack([sections[offset] for offset in range(-2, 3)])


def cut_view(surroundings: np.ndarray, alteration: Alteration) -> np.ndarray:
    """Cut the altered view out of the surroundings of `read_surroundings`: uint8 (3, 256, 256), bicubic interpolation."""
    first = 1 + alteration.sections
    angle, centre = np.deg2rad(alteration.angle_deg), surroundings.shape[-1] / 2
    cos, sin = np.cos(angle), np.sin(angle)
    dy, dx = alteration.shift_yx_px
    half = TILE_PX / 2
    # Pillow wants to know where an output pixel comes from: x' = a·x + b·y + c, y' = d·x + e·y + f.
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


def rank_originals(
    view_vectors: np.ndarray,
    places: np.ndarray,
    vectors: np.ndarray,
    starts_zyx: np.ndarray,
    window_zyx: Sequence[int],
    spec: EvaluationSpec,
) -> np.ndarray:
    """Rank the original of each view among the distractors: int64 (m,), 1 is best.

    view_vectors: float (m, d), of any length. places: int (m,), the rows of the originals. vectors: float32 (n, d), all
    tiles, of unit length. starts_zyx: int64 (n, 3), first voxels of the tiles. window_zyx: size of a tile in voxels. The
    distractors are the same `spec.distractors` tiles for every encoder.
    """
    drawn = np.random.default_rng([spec.seed, 1]).permutation(len(vectors))[: spec.distractors]
    unit = unit_vectors(view_vectors)
    own = (unit * vectors[places]).sum(axis=1)
    others = unit @ vectors[drawn].T
    others[same_place(starts_zyx[places], starts_zyx[drawn], window_zyx)] = -np.inf
    return 1 + (others >= own[:, None]).sum(axis=1)


@dataclass(frozen=True)
class EmbeddedTiles:
    """The tiles of a volume with their vectors, and how views become comparable to them.

    tile_spec: how tiles are cut. stack_view: maps a view, uint8 (3, 256, 256), to the tile that the stacking makes of it;
    grey stacking repeats the middle section. embed: the encoder that computed `vectors`. vectors: float32 (n, d), of unit
    length. starts_zyx: int64 (n, 3), first voxels of the tiles. window_zyx: size of a tile in voxels.
    """

    volume: Volume
    tile_spec: TileSpec
    stack_view: Callable[[np.ndarray], np.ndarray]
    embed: Embed
    vectors: np.ndarray
    starts_zyx: np.ndarray
    window_zyx: Sequence[int]


@dataclass(frozen=True)
class InstanceRetrieval:
    """The ranks of the originals.

    places: rows that were tried, (m,). ranks: int64 (m,), for views with every alteration at once. singles: ranks for views
    with one alteration alone, by the name of the alteration; of the first `EvaluationSpec.singles` places.
    """

    places: np.ndarray
    ranks: np.ndarray
    singles: dict[str, np.ndarray]


def retrieve_instances(tiles: EmbeddedTiles, spec: EvaluationSpec) -> InstanceRetrieval:
    """Cut altered views of some places, embed them, and rank the originals. Places without stored voxels are skipped."""
    places: list[int] = []
    views: dict[str, list[np.ndarray]] = {ALL: [], **{name: [] for name in SINGLES}}
    drawn = draw_places(tiles.starts_zyx, tiles.window_zyx, tiles.volume.shape_zyx, spec)
    for row, alteration in zip(drawn.tolist(), draw_alterations(len(drawn), spec.seed), strict=True):
        surroundings = read_surroundings(tiles.volume, tiles.starts_zyx[row], tiles.tile_spec)
        if surroundings is None:
            continue
        places.append(row)
        views[ALL].append(tiles.stack_view(cut_view(surroundings, alteration)))
        if len(places) <= spec.singles:
            for name, fields in SINGLES.items():
                views[name].append(tiles.stack_view(cut_view(surroundings, keep_only(alteration, fields))))
    rows = np.array(places, dtype=np.int64)
    if not places:
        return InstanceRetrieval(rows, rows, dict.fromkeys(SINGLES, rows))

    def rank(tried: list[np.ndarray]) -> np.ndarray:
        view_vectors = tiles.embed(np.stack(tried))
        return rank_originals(view_vectors, rows[: len(tried)], tiles.vectors, tiles.starts_zyx, tiles.window_zyx, spec)

    ranks = {name: rank(tried) for name, tried in views.items()}
    return InstanceRetrieval(rows, ranks.pop(ALL), ranks)
