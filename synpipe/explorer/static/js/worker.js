// The worker of a static site: keeps the site's columns in memory and answers queries from them.
//
// Input: first {root, site}, the address of the folder and its site.json; then {call, method, args}. Output: {call, result} or
// {call, error: {message, status}}; and {progress: {loaded, total, what}} while files are loaded.

import { loadColumns } from "./columns.js";
import { SourceError } from "./errors.js";
import { nearestByClass } from "./nearest.js";
import { readTile } from "./tile-packs.js";

const MAX_PER_CLASS = 100;
const NO_CATEGORY = 2 ** 16 - 1;
const NO_NEURON = 2 ** 32 - 1;
const DECIMALS = 6; // of a position in voxels, as in synpipe/reports/links.py

let root, site;
const files = new Map(); // promises of columns, by path
const downloads = { files: 0, loaded: 0, total: 0 };
const METHODS = { search, random, synapse, map, tile };

self.onmessage = async ({ data }) => {
  if (data.site) {
    ({ root, site } = data);
    return;
  }
  try {
    self.postMessage({ call: data.call, result: await METHODS[data.method](...data.args) });
  } catch (error) {
    if (!(error instanceof SourceError)) console.error(error);
    self.postMessage({ call: data.call, error: { message: error.message, status: error.status } });
  }
};

async function search({ dataset, encoder, id, metric, perClass, excludeNeuron, region, hemilineage }) {
  if (!site.metrics.includes(metric)) {
    throw new SourceError(`The metric “${metric}” is unknown: use one of ${site.metrics.join(", ")}.`, 400);
  }
  const count = Number(perClass);
  if (!Number.isInteger(count) || count < 1 || count > MAX_PER_CLASS) {
    throw new SourceError(`per_class must be a whole number from 1 to ${MAX_PER_CLASS}, not “${perClass}”.`, 400);
  }
  const opened = await open(dataset, encoder);
  const query = rowOf(opened, id);
  const { neuron } = opened.synapses;
  const ownNeuron = excludeNeuron && neuron.array[query] !== NO_NEURON ? neuron.array[query] : null;
  const wanted = [...conditions(opened.synapses, { region, hemilineage })];
  const keep = (row) =>
    row !== query &&
    (ownNeuron === null || neuron.array[row] !== ownNeuron) &&
    wanted.every(([codes, code]) => codes[row] === code);
  const found = nearestByClass(opened.vectors, { query, metric, perClass: count, starts: opened.shared.starts, keep });
  const { version, fingerprint } = opened.entry;
  const groups = found.map((rows, number) => ({
    name: opened.shared.classes[number],
    neighbours: rows.map(({ row, distance }) => ({ ...describe(opened, row), distance })),
  }));
  return { dataset, encoder, metric, version, fingerprint, query: describe(opened, query), groups };
}

async function random(dataset, encoder) {
  const { array } = (await open(dataset, encoder)).synapses.synapse_id;
  return String(array[Math.floor(Math.random() * array.length)]);
}

async function synapse(dataset, encoder, id) {
  const opened = await open(dataset, encoder);
  return describe(opened, rowOf(opened, id));
}

async function map(dataset, encoder) {
  const { shared, entry } = find(dataset, encoder);
  if (!entry.map) throw new SourceError(`${encoder} of ${dataset} has no map.`, 404);
  const [synapses, columns, { x, y, ...more }] = await Promise.all([
    load(shared.synapses, "synapses"),
    load(entry.columns, encoder),
    load(entry.map, "map"),
  ]);
  const labelled = { neurotransmitter: transmitters(shared), ...columns, ...synapses, ...more };
  const rowsOnMap = x.array.some(Number.isNaN) ? x.array.reduce((rows, value, row) => (value === value && rows.push(row), rows), []) : null;
  const pick = (array) => (rowsOnMap ? array.constructor.from(rowsOnMap, (row) => array[row]) : array);
  return {
    rows: rowsOnMap?.length ?? x.array.length,
    ids: pick(synapses.synapse_id.array),
    x: pick(x.array),
    y: pick(y.array),
    columns: Object.entries(labelled)
      .filter(([, { kind }]) => kind)
      .map(([name, { array, kind, names }]) =>
        kind === "category" ? { name, kind, names, codes: pick(array) } : { name, kind, values: pick(array) },
      ),
  };
}

async function tile(dataset, id) {
  const { shared } = find(dataset);
  const synapses = await load(shared.synapses, "synapses");
  const places = await load(shared.tiles.places, "tiles");
  return readTile(new URL(root), shared.tiles.folder, places, rowOf({ shared, synapses }, id));
}

function find(dataset, encoder = null) {
  const shared = site.datasets.find(({ name }) => name === dataset);
  if (!shared) throw new SourceError(`There is no data set “${dataset}” here.`, 404);
  if (encoder === null) return { shared };
  if (!Object.hasOwn(shared.encoders, encoder)) {
    throw new SourceError(`${dataset} has no encoder “${encoder}” here; it has ${Object.keys(shared.encoders).join(", ")}.`, 404);
  }
  return { shared, entry: shared.encoders[encoder] };
}

/** Loads everything that a search in the vectors of an encoder needs. */
async function open(dataset, encoder) {
  const { shared, entry } = find(dataset, encoder);
  const [synapses, columns, { codes }] = await Promise.all([
    load(shared.synapses, "synapses"),
    load(entry.columns, encoder),
    load(entry.vectors, encoder),
  ]);
  const vectors = { codes: codes.array };
  for (const name of ["mean", "scale", "centre", "norm"]) vectors[name] = columns[name].array;
  return { shared, entry, synapses, columns, vectors };
}

/** The columns of a file. A failed download is tried again at the next call. */
function load(file, what) {
  const [path] = file.paths;
  if (!files.has(path)) files.set(path, fetchFile(file, what).catch((error) => (files.delete(path), Promise.reject(error))));
  return files.get(path);
}

async function fetchFile(file, what) {
  downloads.files += 1;
  downloads.total += file.bytes;
  try {
    return await loadColumns(root, file, (bytes) => {
      downloads.loaded += bytes;
      self.postMessage({ progress: { loaded: downloads.loaded, total: downloads.total, what } });
    });
  } finally {
    downloads.files -= 1;
    if (!downloads.files) downloads.loaded = downloads.total = 0;
  }
}

/** The row of a synapse. Ids are sorted within each class. */
function rowOf({ shared, synapses }, text) {
  if (!/^[0-9]{1,19}$/.test(text)) {
    throw new SourceError(`“${text}” is not a synapse id: an id is a whole number below 2^63.`, 400);
  }
  const id = BigInt(text);
  const ids = synapses.synapse_id.array;
  for (let number = 0; number + 1 < shared.starts.length; number++) {
    const row = firstAtLeast(ids, id, shared.starts[number], shared.starts[number + 1]);
    if (row < shared.starts[number + 1] && ids[row] === id) return row;
  }
  throw new SourceError(`Synapse ${text} is not on this site: it is unknown or was rejected.`, 404);
}

function firstAtLeast(values, value, low, high) {
  while (low < high) {
    const middle = (low + high) >>> 1;
    if (values[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Pairs of a column's codes and the wanted code. A name that no row has matches nothing. */
function* conditions(columns, names) {
  for (const [column, name] of Object.entries(names)) {
    if (name) yield [columns[column]?.array ?? [], columns[column]?.names.indexOf(name) ?? 0];
  }
}

function describe({ shared, synapses, columns }, row) {
  const number = shared.starts.findIndex((start, at) => row < shared.starts[at + 1]);
  const neuron = synapses.neuron.array[row];
  const probability = columns.predicted_probability?.array[row];
  const id = String(synapses.synapse_id.array[row]);
  const position = [..."xyz"].map((axis) => synapses[`${axis}_nm`].array[row]);
  return {
    id,
    neuron: neuron === NO_NEURON ? null : String(synapses.neurons.array[neuron]),
    neurotransmitter: number === shared.classes.length - 1 ? null : shared.classes[number],
    predicted: nameAt(columns.predicted_neurotransmitter, row),
    probability: Number.isFinite(probability) ? probability : null,
    region: nameAt(synapses.region, row),
    hemilineage: nameAt(synapses.hemilineage, row),
    position_nm: position,
    neuroglancer: link(shared, id, position),
  };
}

const nameAt = (column, row) => column?.names[column.array[row]] ?? null;

function link({ neuroglancer, voxel_size_nm: size }, id, position) {
  if (!neuroglancer || position.some(Number.isNaN)) return null;
  const places = position.map((nm, axis) => Number((nm / size[axis]).toFixed(DECIMALS)));
  return [..."xyz"].reduce((address, axis, at) => address.replaceAll(`{${axis}}`, places[at]), neuroglancer).replaceAll("{id}", id);
}

/** The class of each row, as a column. Rows are sorted by class. */
function transmitters({ classes, starts }) {
  const array = new Uint16Array(starts.at(-1)).fill(NO_CATEGORY);
  const names = classes.slice(0, -1);
  names.forEach((_, number) => array.fill(number, starts[number], starts[number + 1]));
  return { array, kind: "category", names };
}
