"""The demo data set, made on the spot: an EM-like volume and a table of synapses with six transmitters.

In: a `SyntheticSpec`. Out: `volume.h5` (CREMI layout, FAFB's voxel of 40×4×4 nm) and `synapses.csv` in one folder.
Guarantees: the same spec gives the same bytes on any number of threads; a file is whole or absent; a second call with
the same spec returns at once. Nothing here is a measurement of a brain, and the files say so themselves.

What follows the literature: voxel size and section thickness (FAFB, Zheng et al., Cell 2018); neurites of well under a
micrometre, thin postsynaptic twigs around larger presynaptic varicosities (Cardona et al., PLoS Biol 2010); T-bars
with a pedestal and a platform facing several partners (Fröhlich, J Comp Neurol 1985; Prokop & Meinertzhagen, Semin
Cell Dev Biol 2006); one transmitter per hemilineage (Lacin et al., eLife 2019); the six classes, their imbalance, and
that transmitters differ visibly, but subtly, around the T-bar (Eckstein et al., Cell 2024); round clear vesicles for
excitatory and smaller, flattened ones for GABAergic terminals (Uchizono, Nature 1965; Larramendi et al., Science 1967);
dense-core vesicles for amines (Atwood et al., J Neurobiol 1993, in the fly).
What is invented: every number in `synthetic_tissue.py` (neurites), `synthetic_synapses.py` (what tells transmitters
apart) and `synthetic_texture.py` (how it looks), chosen so that the classes can be told apart but not at a glance;
which amine has which dense core; how much neurons of one class differ; names, positions, partners.
"""

import csv
import hashlib
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Self

import h5py
import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from synpipe import __version__
from synpipe.specs import Spec, digest
from synpipe.store.files import atomic_path
from synpipe.synthetic.synapses import LOOKS, Neuron, Site, give_neurites, place_synapses, tbars_in
from synpipe.synthetic.texture import draw_section
from synpipe.synthetic.tissue import PIXEL_NM, SECTION_NM, VOXEL_NM, grow, section_map
from synpipe.synthetic.vesicles import make_bodies

RECIPE = 2  # raise when the pictures change, so that a demo on disk is made again
VOLUME, TABLE = "volume.h5", "synapses.csv"
COLUMNS = ["synapse_id", "x_nm", "y_nm", "z_nm", "neuron_id", "hemilineage", "region", "neurotransmitter", "confidence"]


class SyntheticSpec(Spec):
    """What to make. `n_synapses` counts the good rows; a few bad ones come on top, to show what rejects look like.

    The default is 10.2 × 10.2 × 1.6 µm, 262 MB. One synapse needs about 0.12 µm³ of volume.
    """

    seed: int = Field(default=0, ge=0)
    shape_zyx: tuple[Annotated[int, Field(ge=8)], Annotated[int, Field(ge=512)], Annotated[int, Field(ge=512)]] = (
        40,
        2560,
        2560,
    )
    n_synapses: int = Field(default=1320, ge=12)
    n_neurons: int = Field(default=60, ge=12)
    n_missing_sections: int = Field(default=2, ge=0, le=3)

    @model_validator(mode="after")
    def _enough_synapses(self) -> Self:
        if self.n_synapses < 3 * self.n_neurons:
            raise ValueError("n_synapses must be at least three times n_neurons")
        return self


def make_demo(folder: Path, spec: SyntheticSpec, progress: Callable[[str], None] | None = None) -> None:
    """Write `volume.h5` and `synapses.csv` into `folder`, unless both are there and were made from the same spec.

    `progress` is told about every eighth section and the last. Raises `SynpipeError` where the folder cannot be written
    or the volume is too small for the synapses asked for.
    """
    if _is_made(folder, spec):
        return
    tell = progress or (lambda message: None)
    streams = [np.random.default_rng(child) for child in np.random.SeedSequence(spec.seed).spawn(4)]
    depth, height, width = spec.shape_zyx
    map_shape = (-(-height // 2), -(-width // 2))
    missing, repeated = _spoilt_sections(spec)

    def tell_section(what: str, number: int) -> None:
        if number % 8 == 0 or number == depth:
            tell(f"{what} section {number} of {depth}")

    tell("synthetic tissue: growing neurites")
    tissue = grow(spec.shape_zyx, streams[0])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        maps = []
        for section in pool.map(lambda z: section_map(tissue, z, map_shape), range(depth)):
            maps.append(section)
            tell_section("synthetic tissue: membranes of", len(maps))
        neurons = _neurons(spec, streams[1])
        owner = give_neurites(tissue, neurons, spec.shape_zyx, streams[1])
        sites = place_synapses(spec.shape_zyx, missing, repeated, tissue, maps, neurons, owner, streams[2])
        bodies = make_bodies(tissue, neurons, sites, streams[3])

        def draw(z: int) -> NDArray[np.uint8]:
            rng = np.random.default_rng([spec.seed, 1, z])
            if z in missing:
                return rng.poisson(1.2, (height, width)).astype(np.uint8)
            source = z - 1 if z == repeated else z
            near = bodies.pick(np.abs(bodies.z - (source + 0.5) * SECTION_NM) < SECTION_NM / 2 + bodies.radius)
            picture_rng = np.random.default_rng([spec.seed, 2, source])
            tbars = list(tbars_in(tissue, maps, neurons, sites, source))
            return draw_section(tissue, source, maps[source], near, tbars, picture_rng)[:height, :width]

        table = _table(spec, neurons, sites, streams[2])
        with atomic_path(folder / VOLUME) as temporary, h5py.File(temporary, "w") as file:
            raw = file.create_dataset("volumes/raw", spec.shape_zyx, np.uint8)
            raw.attrs["resolution"], raw.attrs["offset"] = VOXEL_NM, (0.0, 0.0, 0.0)
            for z, picture in enumerate(pool.map(draw, range(depth))):
                raw[z] = picture
                tell_section("synthetic volume:", z + 1)
            _write_annotations(file, table, sites)
            file.attrs["title"] = "synthetic demo data, not a brain"
            file.attrs["synthetic"] = True
            file.attrs["seed"] = spec.seed
            file.attrs["spec_digest"] = _digest(spec)
            file.attrs["synpipe_version"] = __version__
            file.attrs["synapses_sha256"] = hashlib.sha256(table.encode()).hexdigest()
    with atomic_path(folder / TABLE) as temporary:
        temporary.write_text(table)


def _digest(spec: SyntheticSpec) -> str:
    return digest({"spec": spec.digest(), "recipe": RECIPE})


def _is_made(folder: Path, spec: SyntheticSpec) -> bool:
    # The table is plain CSV and cannot carry a digest; the volume, written first, carries the table's.
    try:
        with h5py.File(folder / VOLUME, "r") as file:
            attributes = dict(file.attrs)
        table_sha256 = hashlib.sha256((folder / TABLE).read_bytes()).hexdigest()
    except OSError:
        return False
    return attributes.get("spec_digest") == _digest(spec) and attributes.get("synapses_sha256") == table_sha256


def _spoilt_sections(spec: SyntheticSpec) -> tuple[set[int], int]:
    """Sections that are black, and the one that repeats its predecessor: spread out, never the first or the last."""
    depth = spec.shape_zyx[0]
    steps = spec.n_missing_sections + 2
    spots = [round((i + 1) * depth / steps) for i in range(spec.n_missing_sections + 1)]
    return set(spots[1:]), spots[0]


def _shares(total: int, weights: Sequence[float] | NDArray, least: int) -> NDArray[np.int64]:
    """Divide `total` by weight into whole numbers, each at least `least`."""
    weights = np.asarray(weights, float)
    free = total - least * len(weights)
    shares = np.floor(free * weights / weights.sum()).astype(int)
    shares[np.argsort(-weights, kind="stable")[: free - shares.sum()]] += 1
    return shares + least


def _neurons(spec: SyntheticSpec, rng: np.random.Generator) -> list[Neuron]:
    """The annotated neurons: classes as unequal as in FAFB, one transmitter per hemilineage, about 7 % unknown."""
    n_unknown = max(1, spec.n_neurons // 15)
    n_labelled = spec.n_neurons - n_unknown
    n_unknown_synapses = spec.n_synapses * n_unknown // spec.n_neurons
    least = min(5, n_labelled // 6)
    per_class = _shares(n_labelled, [look.neurons for look in LOOKS.values()], least)
    synapses = _shares(spec.n_synapses - n_unknown_synapses, [look.synapses for look in LOOKS.values()], least)
    ids = iter(rng.choice(np.arange(20_000, 9_000_000), spec.n_neurons, replace=False))
    neurons = []
    lineage = 1
    for (name, look), count, total in zip(LOOKS.items(), per_class, synapses, strict=True):
        for member, quota in enumerate(_shares(total, rng.lognormal(0, 0.3, count), 1)):
            hemilineage = f"synthetic_HL{lineage + member * look.hemilineages // count:02d}"
            neurons.append(_neuron(rng, int(next(ids)), name, name, hemilineage, int(quota)))
        lineage += look.hemilineages
    for quota in _shares(n_unknown_synapses, np.ones(n_unknown), 0):
        neurons.append(_neuron(rng, int(next(ids)), str(rng.choice(list(LOOKS))), None, None, int(quota)))
    return neurons


def _neuron(
    rng: np.random.Generator, neuron_id: int, look: str, transmitter: str | None, hemilineage: str | None, quota: int
) -> Neuron:
    """One neuron with its own appearance, so that recognising the neuron is not recognising the transmitter."""
    return Neuron(
        neuron_id=neuron_id,
        looks_like=look,
        transmitter=transmitter,
        hemilineage=hemilineage,
        n_synapses=quota,
        stain=float(np.clip(rng.normal(0.28, 0.08), 0.15, 0.48)),
        grain=float(rng.lognormal(0, 0.3)),
        vesicle_size=float(np.clip(rng.normal(1, 0.07), 0.85, 1.15)),
        vesicle_count=float(np.clip(rng.lognormal(0, 0.35), 0.4, 2)),
        dense_core_share=LOOKS[look].dense_core_share * float(np.clip(rng.lognormal(0, 0.4), 0.4, 2)),
        tbar_size=float(np.clip(rng.lognormal(0, 0.15), 0.7, 1.4)),
    )


def _table(spec: SyntheticSpec, neurons: list[Neuron], sites: list[Site], rng: np.random.Generator) -> str:
    """The CSV: one good row per synapse, then five bad ones."""
    extent = np.array(spec.shape_zyx[1:]) * PIXEL_NM
    ids = np.sort(rng.choice(np.arange(1_000_000, 16_000_000), len(sites) + 3, replace=False))
    ids = rng.permutation(ids)
    rows = []
    for synapse_id, site in zip(ids, sites, strict=False):
        neuron = neurons[site.neuron]
        quadrant = 2 * (site.y_nm > extent[0] / 2) + (site.x_nm > extent[1] / 2) + 1
        rows.append(
            [
                synapse_id,
                f"{site.x_nm:.2f}",
                f"{site.y_nm:.2f}",
                f"{site.z_nm:.2f}",
                neuron.neuron_id,
                neuron.hemilineage or "",
                f"synthetic_region_{quadrant}",
                neuron.transmitter or "",
                f"{rng.beta(12, 1.5):.3f}",
            ]
        )
    labelled = [row for row in rows if row[7]]
    bad = [list(labelled[i * len(labelled) // 4]) for i in range(4)]
    bad[1][0], bad[2][0], bad[3][0] = ids[-3:]  # bad[0] keeps its id: a duplicate
    bad[1][3] = ""
    bad[2][1] = f"{extent[1] + 5000:.2f}"
    bad[3][7] = "acetylcholin"
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows, *bad])
    return text.getvalue()


def _write_annotations(file: h5py.File, table: str, sites: list[Site]) -> None:
    """CREMI's `annotations`: presynaptic sites under the ids of the table, postsynaptic ones under ids after them."""
    presynaptic = [int(row.split(",", 1)[0]) for row in table.splitlines()[1 : len(sites) + 1]]
    ids, locations = list(presynaptic), [(s.z_nm, s.y_nm, s.x_nm) for s in sites]
    pairs: list[tuple[int, int]] = []
    for synapse_id, site in zip(presynaptic, sites, strict=True):
        for y, x in site.partners_yx_nm:
            ids.append(max(presynaptic) + 1 + len(pairs))
            pairs.append((synapse_id, ids[-1]))
            locations.append((site.z_nm, y, x))
    kinds = ["presynaptic_site"] * len(sites) + ["postsynaptic_site"] * len(pairs)
    group = file.create_group("annotations")
    group.attrs["offset"] = (0.0, 0.0, 0.0)
    group["ids"] = np.array(ids, np.uint64)
    group.create_dataset("types", data=kinds, dtype=h5py.string_dtype())
    group["locations"] = np.array(locations)
    group["presynaptic_site/partners"] = np.array(pairs, np.uint64)
