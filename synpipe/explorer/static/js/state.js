// The whole state of a page is in the query of its address, so a link that is sent to a colleague shows the same.

import { SourceError } from "./errors.js";

/** Default values. A setting with its default value is left out of the address. */
export const DEFAULTS = {
  page: "search",
  dataset: "",
  encoder: "",
  compare: "",
  id: "",
  metric: "cosine",
  per_class: "4",
  exclude_neuron: "",
  region: "",
  hemilineage: "",
  tiles: "colour",
  colour: "",
  off: "",
};

const SETTINGS = {
  search: ["dataset", "encoder", "compare", "id", "metric", "per_class", "exclude_neuron", "region", "hemilineage", "tiles"],
  map: ["page", "dataset", "encoder", "colour", "off"],
};
export const TILES = { colour: "Colour", grey: "Grey", strip: "Strip" };
export const METRICS = { cosine: "cosine", l2: "Euclidean (L2)", dot: "inner product", l1: "Manhattan (L1)" };
export const MAX_PER_CLASS = 100;

export function readState(query) {
  const given = new URLSearchParams(query);
  return Object.fromEntries(Object.entries(DEFAULTS).map(([key, value]) => [key, given.get(key) ?? value]));
}

/** The address of this state, relative to the page. */
export function addressOf(state) {
  const query = new URLSearchParams();
  for (const key of SETTINGS[state.page] ?? []) if (state[key] !== DEFAULTS[key]) query.set(key, state[key]);
  return `?${query}`;
}

/** Names that are hidden on the map. A comma inside a name is written as %2C. */
export const readOff = (off) => new Set(off.split(",").filter(Boolean).map(decodeName));
export const writeOff = (names) => [...names].map((name) => name.replaceAll("%", "%25").replaceAll(",", "%2C")).join(",");
const decodeName = (name) => name.replaceAll("%2C", ",").replaceAll("%25", "%");

const oneOf = (names) => (names.length ? `use one of ${names.join(", ")}` : "there are none here");

function checkKnown(value, names, what, status = 400) {
  if (value && !names.includes(value)) throw new SourceError(`${what} “${value}” is unknown: ${oneOf(names)}.`, status);
}

/** The data set and encoder of a state; if it names none, the first ones. Throws `SourceError` if they are unknown. */
export function placeOf(state, datasets) {
  checkKnown(state.page, Object.keys(SETTINGS), "The page", 404);
  if (!datasets.length) throw new SourceError("No data set has an index yet. Make one with `synpipe materialize`.", 404);
  checkKnown(state.dataset, datasets.map((each) => each.name), "The data set", 404);
  const dataset = datasets.find((each) => each.name === state.dataset) ?? datasets[0];
  checkKnown(state.encoder, dataset.encoders, `The encoder of ${dataset.name}`, 404);
  checkKnown(state.compare, dataset.encoders, `The encoder of ${dataset.name}`, 404);
  return { dataset, encoder: state.encoder || dataset.encoders[0] };
}

/** Throws `SourceError` for the first invalid setting of a search. about: as returned by the source. */
export function checkSearch(state, about) {
  checkKnown(state.metric, about.metrics, "The metric");
  checkKnown(state.region, about.regions, `In ${about.dataset} the region`);
  checkKnown(state.hemilineage, about.hemilineages, `In ${about.dataset} the hemilineage`);
  checkKnown(state.tiles, Object.keys(TILES), "The tile view");
  if (state.exclude_neuron !== "" && state.exclude_neuron !== "1") {
    throw new SourceError(`exclude_neuron must be 1 or left out, not “${state.exclude_neuron}”.`, 400);
  }
  if (!/^[0-9]{1,3}$/.test(state.per_class) || state.per_class < 1 || state.per_class > MAX_PER_CLASS) {
    throw new SourceError(`per_class must be a whole number from 1 to ${MAX_PER_CLASS}, not “${state.per_class}”.`, 400);
  }
}
