// The state of a page is the query of its address, all of it: what is sent to a colleague shows the same.

import { SourceError } from "./errors.js";

/** What is not in the address; what has its default is left out of it. */
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

const OF_PAGE = {
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

/** The address, relative to the page, that holds this state. */
export function addressOf(state) {
  const query = new URLSearchParams();
  for (const key of OF_PAGE[state.page] ?? []) if (state[key] !== DEFAULTS[key]) query.set(key, state[key]);
  return `?${query}`;
}

/** Names switched off on the map. A comma inside a name is written %2C. */
export const readOff = (off) => new Set(off.split(",").filter(Boolean).map(decodeName));
export const writeOff = (names) => [...names].map((name) => name.replaceAll("%", "%25").replaceAll(",", "%2C")).join(",");
const decodeName = (name) => name.replaceAll("%2C", ",").replaceAll("%25", "%");

const oneOf = (names) => (names.length ? `use one of ${names.join(", ")}` : "there is none here");

function known(value, names, what, status = 400) {
  if (value && !names.includes(value)) throw new SourceError(`${what} “${value}” is unknown: ${oneOf(names)}.`, status);
}

/** The data set and encoder of a state, the first ones where it names none. Throws `SourceError` for unknown ones. */
export function placeOf(state, datasets) {
  known(state.page, Object.keys(OF_PAGE), "The page", 404);
  if (!datasets.length) throw new SourceError("No data set has an index yet: make one with `synpipe materialize`.", 404);
  known(state.dataset, datasets.map((each) => each.name), "The data set", 404);
  const dataset = datasets.find((each) => each.name === state.dataset) ?? datasets[0];
  known(state.encoder, dataset.encoders, `The encoder of ${dataset.name}`, 404);
  known(state.compare, dataset.encoders, `The encoder of ${dataset.name}`, 404);
  return { dataset, encoder: state.encoder || dataset.encoders[0] };
}

/** Throws `SourceError` for the first value of a search that cannot be meant. about: as the source gives it. */
export function checkSearch(state, about) {
  known(state.metric, about.metrics, "The metric");
  known(state.region, about.regions, `In ${about.dataset} the region`);
  known(state.hemilineage, about.hemilineages, `In ${about.dataset} the hemilineage`);
  known(state.tiles, Object.keys(TILES), "The way to show tiles");
  if (state.exclude_neuron !== "" && state.exclude_neuron !== "1") {
    throw new SourceError(`exclude_neuron is 1 or left out, not “${state.exclude_neuron}”.`, 400);
  }
  if (!/^[0-9]{1,3}$/.test(state.per_class) || state.per_class < 1 || state.per_class > MAX_PER_CLASS) {
    throw new SourceError(`per_class is a whole number from 1 to ${MAX_PER_CLASS}, not “${state.per_class}”.`, 400);
  }
}
