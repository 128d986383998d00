// Gets answers from a static site. site.json describes its files, and a worker searches them. It has the same functions as
// source-server.js.

import { SourceError } from "./errors.js";

const MAX_TILES = 1000; // kept in memory

/** Opens the source. base: an address in the folder of the site. */
export async function open(base) {
  if (!("DecompressionStream" in globalThis)) {
    throw new SourceError("This browser is too old for this site. Use a browser of 2023 or later.");
  }
  const root = new URL("./", base).href;
  const site = await readSite(root);
  const worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
  worker.postMessage({ root, site });

  const waiting = new Map();
  const listeners = new Set();
  const addresses = new Map();
  let calls = 0;
  worker.onmessage = ({ data }) => {
    if (data.progress) {
      for (const listener of [source.onprogress, ...listeners]) listener?.(data.progress);
      return;
    }
    const { resolve, reject } = waiting.get(data.call);
    waiting.delete(data.call);
    if (data.error) {
      reject(new SourceError(data.error.message, data.error.status));
    } else {
      resolve(data.result);
      keepPages(root);
    }
  };
  worker.onerror = () => {
    for (const { reject } of waiting.values()) reject(new SourceError("The search could not be started in this browser. Reload the page, or use another browser."));
    waiting.clear();
  };

  const ask = (method, ...args) =>
    new Promise((resolve, reject) => {
      waiting.set((calls += 1), { resolve, reject });
      worker.postMessage({ call: calls, method, args });
    });

  const source = {
    onprogress: null,
    datasets: async () =>
      site.datasets.map(({ name, title, classes, encoders, neuroglancer }) => ({
        name,
        title,
        classes,
        encoders: Object.keys(encoders),
        neuroglancer: neuroglancer !== null,
      })),
    about: async (dataset, encoder) => about(site, dataset, encoder),
    search: (query, signal) => orAbort(ask("search", query), signal),
    random: (dataset, encoder) => ask("random", dataset, encoder),
    synapse: (dataset, encoder, id) => ask("synapse", dataset, encoder, id),
    // All encoders of a site were made from the same tiles.
    tile: (dataset, id) => {
      const key = `${dataset} ${id}`;
      const address = addresses.get(key) ?? ask("tile", dataset, id).then((blob) => URL.createObjectURL(blob));
      addresses.delete(key); // inserted again at the end, so that the first entry is the least recently used
      addresses.set(key, address);
      address.catch(() => addresses.delete(key));
      if (addresses.size > MAX_TILES) releaseFirst(addresses);
      return address;
    },
    map: async (dataset, encoder, onProgress) => {
      listeners.add(onProgress);
      try {
        return await ask("map", dataset, encoder);
      } finally {
        listeners.delete(onProgress);
      }
    },
  };
  return source;
}

async function readSite(root) {
  const response = await fetch(new URL("site.json", root)).catch(() => null);
  if (!response?.ok) throw new SourceError("The site's site.json cannot be loaded. Check the connection.", response?.status ?? 0);
  return response.json();
}

function about(site, dataset, encoder) {
  const shared = site.datasets.find(({ name }) => name === dataset);
  if (!shared) throw new SourceError(`There is no data set “${dataset}” here.`, 404);
  if (!Object.hasOwn(shared.encoders, encoder)) throw new SourceError(`${dataset} has no encoder “${encoder}” here.`, 404);
  const { version, fingerprint, dimensions, map, recall } = shared.encoders[encoder];
  const names = (column) => shared.synapses.columns.find(({ name }) => name === column)?.names ?? [];
  return {
    dataset,
    encoder,
    rows: shared.starts.at(-1),
    dimensions,
    metrics: site.metrics,
    has_map: map !== null,
    version,
    fingerprint,
    classes: shared.classes,
    regions: names("region"),
    hemilineages: names("hemilineage"),
    upload: false,
    recall: recallByName(recall),
  };
}

/** The share of the true neighbours that the search finds, overall and for the rarest class, by the name to show. */
function recallByName({ per_class: count, overall, rarest, rarest_class: name }) {
  return { [`recall@${count}`]: overall, ...(name && { [`recall@${count} of ${name}`]: rarest }) };
}

/** Stops waiting when the signal aborts. The worker still finishes. */
function orAbort(answer, signal) {
  if (!signal) return answer;
  return new Promise((resolve, reject) => {
    const stop = () => reject(signal.reason);
    if (signal.aborted) stop();
    signal.addEventListener("abort", stop, { once: true });
    answer.then(resolve, reject);
  });
}

async function releaseFirst(addresses) {
  const [key, address] = addresses.entries().next().value;
  addresses.delete(key);
  URL.revokeObjectURL(await address);
}

let answered = false;

/** Starts the service worker after the first answer, when the network is idle. Plain http has no service worker, which is fine. */
function keepPages(root) {
  if (answered) return;
  answered = true;
  navigator.serviceWorker?.register(new URL("sw.js", root), { scope: root }).catch((error) => console.warn(error));
}

// The site was updated while this page was open. Files that the page would need may be gone, so it reloads unless it has an answer.
navigator.serviceWorker?.addEventListener("controllerchange", () => answered || location.reload());
