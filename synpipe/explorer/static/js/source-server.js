// Gets answers from the server of `synpipe explore`. It has the same functions as the other source, source-static.js.

import { SourceError } from "./errors.js";

/** Opens the source. base: the address of the folder with the pages. The server answers below it, in api/. */
export async function open(base) {
  const path = (dataset, encoder) => `${encodeURIComponent(dataset)}/${encodeURIComponent(encoder)}`;
  const json = async (below, options) => (await fetchOk(new URL(`api/${below}`, base), options)).json();
  const searchPath = (query) => `${path(query.dataset, query.encoder)}/search?${parametersOf(query)}`;

  return {
    onprogress: null,
    datasets: async () => (await json("datasets")).datasets,
    about: (dataset, encoder) => json(`${path(dataset, encoder)}/about`), // not cached, because an index may be rebuilt
    search: (query, signal) => json(searchPath(query), { signal }),
    upload: (query, signal) =>
      // An image has no neuron that could be excluded.
      json(searchPath({ ...query, id: "", excludeNeuron: false }), { signal, method: "POST", body: query.file, headers: { "Content-Type": "image/png" } }),
    random: async (dataset, encoder) => (await json(`${path(dataset, encoder)}/random`, { cache: "no-store" })).id,
    synapse: (dataset, encoder, id) => json(`${path(dataset, encoder)}/synapses/${encodeURIComponent(id)}`),
    tile: async (dataset, id, encoder) => new URL(`api/${path(dataset, encoder)}/tiles/${encodeURIComponent(id)}.png`, base).href,
    map: async (dataset, encoder, onProgress) => {
      const response = await fetchOk(new URL(`api/${path(dataset, encoder)}/map`, base));
      return parseMap(await readAll(response, onProgress));
    },
  };
}

function parametersOf({ id, metric, perClass, excludeNeuron, region, hemilineage }) {
  const parameters = new URLSearchParams({ metric, per_class: perClass });
  if (id) parameters.set("id", id);
  if (excludeNeuron) parameters.set("exclude_neuron", "1");
  if (region) parameters.set("region", region);
  if (hemilineage) parameters.set("hemilineage", hemilineage);
  return parameters;
}

async function fetchOk(address, options = {}) {
  let response;
  try {
    response = await fetch(address, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new SourceError("The server does not answer. Is `synpipe explore` still running?");
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  throw new SourceError(answer?.error ?? `The server answered with status ${response.status} and no message.`, response.status);
}

async function readAll(response, onProgress) {
  const total = Number(response.headers.get("Content-Length")) || null;
  const parts = [];
  let loaded = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    loaded += value.length;
    onProgress?.({ loaded, total, what: "map" });
  }
  return new Blob(parts).arrayBuffer();
}

/** Reads a map file; synpipe/explorer/map_file.py describes its layout. */
function parseMap(buffer) {
  const headerBytes = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, headerBytes)));
  const arrays = { int64: BigInt64Array, float32: Float32Array, uint16: Uint16Array };
  const map = { rows: header.rows, columns: [] };
  for (const { name, kind, dtype, offset, names } of header.columns) {
    const array = new arrays[dtype](buffer, 4 + headerBytes + offset, header.rows);
    if (kind === "id") map.ids = array;
    else if (kind === "x" || kind === "y") map[kind] = array;
    else if (kind === "category") map.columns.push({ name, kind, names, codes: array });
    else map.columns.push({ name, kind, values: array });
  }
  return map;
}
