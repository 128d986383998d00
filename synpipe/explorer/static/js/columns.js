// Loads files of columns: fetches each file once, keeps it in the browser's cache, and unpacks it into typed arrays. `site.json`
// describes the files.

import { SourceError } from "./errors.js";

const ARRAYS = {
  int8: Int8Array,
  uint16: Uint16Array,
  uint32: Uint32Array,
  int64: BigInt64Array,
  float32: Float32Array,
  float64: Float64Array,
};

/** The browser's cache of the site at this address; null if there is no cache, for example on plain http. */
export async function openCache(root) {
  try {
    return await caches.open(`synpipe data ${root}`);
  } catch {
    return null;
  }
}

/** Fetches an address. Throws `SourceError` if there is no connection or the host refuses. */
export async function ask(address, options = {}) {
  let response;
  try {
    response = await fetch(address, options);
  } catch {
    throw new SourceError("There is no connection, and the browser has not saved this part of the site.");
  }
  if (response.ok) return response;
  const reason = response.status === 404 ? "the site has been updated: reload the page" : `the host answered with status ${response.status}`;
  throw new SourceError(`${address.pathname.split("/").pop()} cannot be loaded: ${reason}.`, response.status);
}

/**
 * The columns of a file, which may consist of several pieces: {name: {array, kind, names}}.
 * onBytes: is called with the number of new bytes whenever some have arrived.
 */
export async function loadColumns(root, file, onBytes) {
  const cache = await openCache(root);
  const pieces = await Promise.all(file.paths.map((path) => loadPiece(cache, new URL(path, root), onBytes)));
  const packed = new Blob(pieces.map(({ blob }) => blob));
  if (packed.size !== file.bytes) {
    throw new SourceError(`Only ${packed.size} of ${file.bytes} bytes of ${file.paths[0]} arrived: try again.`);
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
    throw new SourceError("The connection was interrupted: try again.");
  }
  return { address, blob: new Blob(parts), kept: false };
}

/** Keeps a file in the cache. A failure, such as a full disk, is only logged. */
export function keep(cache, address, blob) {
  cache?.put(address, new Response(blob)).catch((error) => console.warn(`The browser could not save ${address}: ${error}`));
}
