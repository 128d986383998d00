// Files of columns: fetched once, kept by the browser, unpacked into typed arrays. `site.json` describes them.

import { SourceError } from "./errors.js";

const ARRAYS = {
  int8: Int8Array,
  uint16: Uint16Array,
  uint32: Uint32Array,
  int64: BigInt64Array,
  float32: Float32Array,
  float64: Float64Array,
};

/** What the browser keeps of the site at this address; null where it keeps nothing, as on plain http. */
export async function openCache(root) {
  try {
    return await caches.open(`synpipe data ${root}`);
  } catch {
    return null;
  }
}

/** Answers a request: from the cache, else from the host. Throws `SourceError` where neither has it. */
export async function ask(address, options = {}) {
  let response;
  try {
    response = await fetch(address, options);
  } catch {
    throw new SourceError("There is no connection, and this part of the site has not been kept by the browser.");
  }
  if (response.ok) return response;
  const reason = response.status === 404 ? "the site has been renewed meanwhile: reload the page" : `the host answers ${response.status}`;
  throw new SourceError(`${address.pathname.split("/").pop()} cannot be loaded: ${reason}.`, response.status);
}

/**
 * The columns of a file, which may be in several pieces: {name: {array, kind, names}}.
 * onBytes: called with the number of bytes that have come, each time some have.
 */
export async function loadColumns(root, file, onBytes) {
  const cache = await openCache(root);
  const pieces = await Promise.all(file.paths.map((path) => loadPiece(cache, new URL(path, root), onBytes)));
  const packed = new Blob(pieces.map(({ blob }) => blob));
  if (packed.size !== file.bytes) {
    throw new SourceError(`${file.paths[0]} came with ${packed.size} of ${file.bytes} bytes: try again.`);
  }
  for (const { address, blob, kept } of pieces) if (!kept) keep(cache, address, blob);
  const unpacked = packed.stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(unpacked).arrayBuffer();
  return Object.fromEntries(
    file.columns.map(({ name, dtype, offset, length, kind, names }) => [
      name,
      { array: new ARRAYS[dtype](buffer, offset, length), kind, names },
    ]),
  );
}

async function loadPiece(cache, address, onBytes) {
  const kept = await (await cache?.match(address))?.blob();
  if (kept) {
    onBytes(kept.size);
    return { address, blob: kept, kept: true };
  }
  const response = await ask(address);
  const parts = [];
  try {
    for (const reader = response.body.getReader(); ; ) {
      const { done, value } = await reader.read();
      if (done) break;
      parts.push(value);
      onBytes(value.length);
    }
  } catch {
    throw new SourceError("The connection broke off: try again.");
  }
  return { address, blob: new Blob(parts), kept: false };
}

/** A full disk is no reason not to answer. */
export function keep(cache, address, blob) {
  cache?.put(address, new Response(blob)).catch((error) => console.warn(`The browser does not keep ${address}: ${error}`));
}
