// Answers from `synpipe explore`. What another source (source-static.js) does has the same form.

import { SourceError } from "./errors.js";

/** base: the address of the folder that holds the pages; the server's answers are below it, in api/. */
export async function open(base) {
  const place = (dataset, encoder) => `${encodeURIComponent(dataset)}/${encodeURIComponent(encoder)}`;
  const json = async (path, options) => (await request(new URL(`api/${path}`, base), options)).json();
  const searchPath = (asked) => `${place(asked.dataset, asked.encoder)}/search?${queryOf(asked)}`;

  return {
    onprogress: null,
    datasets: async () => (await json("datasets")).datasets,
    about: (dataset, encoder) => json(`${place(dataset, encoder)}/about`), // each time: an index may be built anew meanwhile
    search: (asked, signal) => json(searchPath(asked), { signal }),
    upload: (asked, signal) =>
      // An image is of no neuron.
      json(searchPath({ ...asked, id: "", excludeNeuron: false }), { signal, method: "POST", body: asked.file, headers: { "Content-Type": "image/png" } }),
    random: async (dataset, encoder) => (await json(`${place(dataset, encoder)}/random`, { cache: "no-store" })).id,
    synapse: (dataset, encoder, id) => json(`${place(dataset, encoder)}/synapses/${encodeURIComponent(id)}`),
    tile: async (dataset, id) => new URL(`api/${encodeURIComponent(dataset)}/tiles/${encodeURIComponent(id)}.png`, base).href,
    map: async (dataset, encoder, onProgress) => {
      const response = await request(new URL(`api/${place(dataset, encoder)}/map`, base));
      return parseMap(await readAll(response, onProgress));
    },
  };
}

function queryOf({ id, metric, perClass, excludeNeuron, region, hemilineage }) {
  const query = new URLSearchParams({ metric, per_class: perClass });
  if (id) query.set("id", id);
  if (excludeNeuron) query.set("exclude_neuron", "1");
  if (region) query.set("region", region);
  if (hemilineage) query.set("hemilineage", hemilineage);
  return query;
}

async function request(address, options = {}) {
  let response;
  try {
    response = await fetch(address, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new SourceError("The server does not answer. Is `synpipe explore` still running?");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  throw new SourceError(said?.error ?? `The server answers ${response.status} and says no more.`, response.status);
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

/** A header's length (uint32), the header (JSON), then the columns, each at a multiple of eight bytes after the header. */
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
