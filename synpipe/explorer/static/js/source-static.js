// Answers from a static site: site.json says what there is, a worker searches in it. The same form as source-server.js.

import { SourceError } from "./errors.js";

const TILES_HELD = 1000;

/** base: an address in the folder of the site. */
export async function open(base) {
  if (!("DecompressionStream" in globalThis)) {
    throw new SourceError("This browser is too old for this site: it needs one of 2023 or later.");
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
    for (const { reject } of waiting.values()) reject(new SourceError("The search cannot be started in this browser."));
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
    search: (asked, signal) => orAbort(ask("search", asked), signal),
    random: (dataset, encoder) => ask("random", dataset, encoder),
    synapse: (dataset, encoder, id) => ask("synapse", dataset, encoder, id),
    tile: (dataset, id) => {
      const key = `${dataset} ${id}`;
      const address = addresses.get(key) ?? ask("tile", dataset, id).then((blob) => URL.createObjectURL(blob));
      addresses.delete(key); // and to the end: the first is the one that has not been shown for the longest
      addresses.set(key, address);
      address.catch(() => addresses.delete(key));
      if (addresses.size > TILES_HELD) forgetFirst(addresses);
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
  if (!response?.ok) throw new SourceError("site.json of this site cannot be loaded: is there a connection?", response?.status ?? 0);
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
    recall: shownRecall(recall),
  };
}

/** How many of the true neighbours the search finds, by what to call it: overall, and of the class that has the fewest rows. */
function shownRecall({ per_class: count, overall, rarest, rarest_class: name }) {
  return { [`recall@${count}`]: overall, ...(name && { [`recall@${count} of ${name}`]: rarest }) };
}

/** The worker goes on, but nobody waits for it. */
function orAbort(answer, signal) {
  if (!signal) return answer;
  return new Promise((resolve, reject) => {
    const stop = () => reject(signal.reason);
    if (signal.aborted) stop();
    signal.addEventListener("abort", stop, { once: true });
    answer.then(resolve, reject);
  });
}

async function forgetFirst(addresses) {
  const [key, address] = addresses.entries().next().value;
  addresses.delete(key);
  URL.revokeObjectURL(await address);
}

let answered = false;

/** After the first answer, for which the network is free then. Plain http has no service worker; the site works without. */
function keepPages(root) {
  if (answered) return;
  answered = true;
  navigator.serviceWorker?.register(new URL("sw.js", root), { scope: root }).catch((error) => console.warn(error));
}

// The site has been renewed while this page, of the former one, was opened: what it would ask for may be gone.
navigator.serviceWorker?.addEventListener("controllerchange", () => answered || location.reload());
