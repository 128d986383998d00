"""Generate the demo data set: an EM-like volume and a table of synapses of six transmitters.

Input: a `SyntheticSpec`. Output: `volume.h5` (CREMI layout, FAFB's voxel of 40×4×4 nm) and `synapses.csv` in one folder.
The same spec gives the same bytes on any number of threads. A file is either complete or absent. If the files exist and
match the spec, the call returns at once. The data are not a measurement of a brain, and the files say so.

Based on the literature:
- voxel size and section thickness: FAFB (Zheng et al., Cell 2018);
- neurites well under a micrometre wide, with thin postsynaptic twigs around larger presynaptic varicosities (Cardona et
  al., PLoS Biol 2010);
- T-bars with a pedestal and a platform that faces several partners (Fröhlich, J Comp Neurol 1985; Prokop & Meinertzhagen,
  Semin Cell Dev Biol 2006);
- one transmitter per hemilineage (Lacin et al., eLife 2019);
- the six classes, their imbalance, and visible but subtle differences between transmitters around the T-bar (Eckstein et
  al., Cell 2024);
- round clear vesicles in excitatory terminals, smaller and flattened ones in GABAergic terminals (Uchizono, Nature 1965;
  Larramendi et al., Science 1967);
- dense-core vesicles for amines (Atwood et al., J Neurobiol 1993, in the fly).

Invented: every number in `tissue.py` (neurites), `synapses.py` (differences between transmitters) and `texture.py`
(appearance), chosen so that the classes can be told apart, but not at a glance; which amine has which dense core; how much
neurons of one class differ; names, positions and partners.
"""

import csv
import hashlib
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Self

import h5py
import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from synpipe import __version__
from synpipe.progress import Log
from synpipe.specs import Spec, digest
from synpipe.store.files import atomic_path
from synpipe.synthetic.synapses import (
    LOOKS,
    DamagedSections,
    Neuron,
    Site,
    Specimen,
    give_neurites,
    place_synapses,
    tbars_in,
)
from synpipe.synthetic.texture import draw_section
from synpipe.synthetic.tissue import PIXEL_NM, SECTION_NM, VOXEL_NM, grow, section_map
from synpipe.synthetic.vesicles import Bodies, make_bodies

RECIPE = 2  # increase it when the pictures change, so that a demo on disk is generated again
VOLUME, TABLE = "volume.h5", "synapses.csv"
COLUMNS = ["synapse_id", "x_nm", "y_nm", "z_nm", "neuron_id", "hemilineage", "region", "neurotransmitter", "confidence"]


class SyntheticSpec(Spec):
    """Size and content of the demo. The default volume is 10.2 × 10.2 × 1.6 µm, 262 MB.

    n_synapses: the number of good rows; the table has four bad rows more, as examples of rejects. One synapse needs about
        0.12 µm³ of volume.
    n_missing_sections: black sections. One more section repeats its predecessor.
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


def make_demo(folder: Path, spec: SyntheticSpec, log: Log | None = None) -> None:
    """Write `volume.h5` and `synapses.csv` into `folder`, unless both exist and were made from the same spec.

    `log` receives a message after every eighth section and after the last one. Raises `SynpipeError` if the folder
    cannot be written to, or if the volume is too small for the number of synapses.
    """
    if _is_complete(folder, spec):
        return
    log = log or (lambda message: None)
    tissue_rng, neuron_rng, synapse_rng, body_rng = (
        np.random.default_rng(child) for child in np.random.SeedSequence(spec.seed).spawn(4)
    )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        specimen = _grow_specimen(spec, tissue_rng, neuron_rng, pool, log)
        sites = place_synapses(specimen, synapse_rng)
        bodies = make_bodies(specimen.tissue, specimen.neurons, sites, body_rng)
        table = _format_table(spec, specimen.neurons, sites, synapse_rng)
        pictures = pool.map(lambda z: _draw(spec, specimen, sites, bodies, z), range(spec.shape_zyx[0]))
        with atomic_path(folder / VOLUME) as temporary, h5py.File(temporary, "w") as file:
            raw = file.create_dataset("volumes/raw", spec.shape_zyx, np.uint8)
            raw.attrs["resolution"], raw.attrs["offset"] = VOXEL_NM, (0.0, 0.0, 0.0)
            for z, picture in enumerate(pictures):
                raw[z] = picture
                _log_section(log, "synthetic volume:", z + 1, len(raw))
            _write_annotations(file, table, sites)
            file.attrs["title"] = "synthetic demo data, not a brain"
            file.attrs["synthetic"] = True
            file.attrs["seed"] = spec.seed
            file.attrs["spec_digest"] = _digest(spec)
            file.attrs["synpipe_version"] = __version__
            file.attrs["synapses_sha256"] = hashlib.sha256(table.encode()).hexdigest()
    with atomic_path(folder / TABLE) as temporary:
        temporary.write_text(table)


def _grow_specimen(
    spec: SyntheticSpec,
    tissue_rng: np.random.Generator,
    neuron_rng: np.random.Generator,
    pool: ThreadPoolExecutor,
    log: Log,
) -> Specimen:
    depth, height, width = spec.shape_zyx
    map_shape = (-(-height // 2), -(-width // 2))
    log("synthetic tissue: growing neurites")
    tissue = grow(spec.shape_zyx, tissue_rng)
    maps = []
    for section in pool.map(lambda z: section_map(tissue, z, map_shape), range(depth)):
        maps.append(section)
        _log_section(log, "synthetic tissue: membranes of", len(maps), depth)
    neurons = _make_neurons(spec, neuron_rng)
    owner = give_neurites(tissue, neurons, spec.shape_zyx, neuron_rng)
    return Specimen(spec.shape_zyx, tissue, maps, neurons, owner, _choose_damaged_sections(spec))


def _draw(spec: SyntheticSpec, specimen: Specimen, sites: list[Site], bodies: Bodies, z: int) -> NDArray[np.uint8]:
    """The picture of section z, uint8 (height, width): black if it is missing, and of its predecessor if it is repeated."""
    _, height, width = spec.shape_zyx
    if z in specimen.damaged.missing:
        return np.random.default_rng([spec.seed, 1, z]).poisson(1.2, (height, width)).astype(np.uint8)
    shown = z - 1 if z == specimen.damaged.repeated else z
    visible = np.abs(bodies.z - (shown + 0.5) * SECTION_NM) < SECTION_NM / 2 + bodies.radius
    tbars = list(tbars_in(specimen, sites, shown))
    rng = np.random.default_rng([spec.seed, 2, shown])
    picture = draw_section(specimen.tissue, shown, specimen.maps[shown], bodies.select(visible), tbars, rng)
    return picture[:height, :width]


def _log_section(log: Log, task: str, number: int, depth: int) -> None:
    if number % 8 == 0 or number == depth:
        log(f"{task} section {number} of {depth}")


def _digest(spec: SyntheticSpec) -> str:
    return digest({"spec": spec.digest(), "recipe": RECIPE})


def _is_complete(folder: Path, spec: SyntheticSpec) -> bool:
    # The table is plain CSV and cannot carry a digest, so the volume, which is written first, carries that of the table.
    try:
        with h5py.File(folder / VOLUME, "r") as file:
            attributes = dict(file.attrs)
        table_sha256 = hashlib.sha256((folder / TABLE).read_bytes()).hexdigest()
    except OSError:
        return False
    return attributes.get("spec_digest") == _digest(spec) and attributes.get("synapses_sha256") == table_sha256


def _choose_damaged_sections(spec: SyntheticSpec) -> DamagedSections:
    """Spread the damaged sections over the volume, without the first and the last section."""
    depth = spec.shape_zyx[0]
    steps = spec.n_missing_sections + 2
    sections = [round((i + 1) * depth / steps) for i in range(spec.n_missing_sections + 1)]
    return DamagedSections(missing=frozenset(sections[1:]), repeated=sections[0])


def _shares(total: int, weights: Sequence[float] | NDArray, least: int) -> NDArray[np.int64]:
    """Divide `total` in proportion to the weights into whole numbers, each at least `least`."""
    weights = np.asarray(weights, float)
    free = total - least * len(weights)
    shares = np.floor(free * weights / weights.sum()).astype(int)
    shares[np.argsort(-weights, kind="stable")[: free - shares.sum()]] += 1
    return shares + least


def _make_neurons(spec: SyntheticSpec, rng: np.random.Generator) -> list[Neuron]:
    """Make the annotated neurons: class frequencies as in FAFB, one transmitter per hemilineage, about 7 % unknown."""
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
            neurons.append(_make_neuron(rng, int(next(ids)), name, name, hemilineage, int(quota)))
        lineage += look.hemilineages
    for quota in _shares(n_unknown_synapses, np.ones(n_unknown), 0):
        neurons.append(_make_neuron(rng, int(next(ids)), str(rng.choice(list(LOOKS))), None, None, int(quota)))
    return neurons


def _make_neuron(
    rng: np.random.Generator, neuron_id: int, look: str, transmitter: str | None, hemilineage: str | None, quota: int
) -> Neuron:
    """Make a neuron with an appearance of its own, so that recognising a neuron is not enough to recognise its transmitter."""
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


def _format_table(spec: SyntheticSpec, neurons: list[Neuron], sites: list[Site], rng: np.random.Generator) -> str:
    """Return the CSV text: one good row per synapse, then four bad rows."""
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
    bad[1][0], bad[2][0], bad[3][0] = ids[-3:]  # bad[0] keeps its id and is a duplicate
    bad[1][3] = ""
    bad[2][1] = f"{extent[1] + 5000:.2f}"
    bad[3][7] = "acetylcholin"
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows, *bad])
    return text.getvalue()


def _write_annotations(file: h5py.File, table: str, sites: list[Site]) -> None:
    """Write CREMI's group `annotations`. Presynaptic sites have the ids of the table, postsynaptic sites the ids after them."""
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
