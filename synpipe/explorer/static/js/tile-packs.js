// Reads tiles from packs: a part of the file if the host supports Range requests, otherwise the whole file.

import { ask, keep, openCache } from "./columns.js";

const MAX_PACKS = 8; // of 4 MiB, kept in memory if the host sends whole files

let ranged = null; // a promise: whether the host supports Range requests
const packs = new Map();

/** The tile of a row as JPEG. The third argument has the bytes of each tile and the first tile of each pack. */
export async function readTile(root, folder, { length, pack }, row) {
  const number = pack.array.findLastIndex((first) => first <= row);
  let start = 0;
  for (let before = pack.array[number]; before < row; before++) start += length.array[before];
  const address = new URL(`${folder}/${String(number).padStart(5, "0")}.bin`, root);
  const part = await read(root, address, start, start + length.array[row]);
  return part.slice(0, part.size, "image/jpeg");
}

async function read(root, address, start, stop) {
  const cache = await openCache(root);
  const key = new URL(`?bytes=${start}-${stop - 1}`, address);
  const kept = await cache?.match(key);
  if (kept) return kept.blob();
  ranged ??= supportsRanges(address).catch((error) => ((ranged = null), Promise.reject(error)));
  const part = (await ranged)
    ? await (await ask(address, { headers: { Range: `bytes=${start}-${stop - 1}` } })).blob()
    : (await wholePack(address)).slice(start, stop);
  if (part.size === stop - start) keep(cache, key, part);
  return part;
}

async function supportsRanges(address) {
  const enough = new AbortController();
  const response = await ask(address, { headers: { Range: "bytes=0-0" }, signal: enough.signal });
  enough.abort(); // stops the download, because the answer may be the whole file
  return response.status === 206;
}

function wholePack(address) {
  const { href } = address;
  const pack = packs.get(href) ?? ask(address).then((response) => response.blob());
  packs.delete(href); // inserted again at the end, so that the first entry is the least recently used
  packs.set(href, pack);
  pack.catch(() => packs.delete(href));
  if (packs.size > MAX_PACKS) packs.delete(packs.keys().next().value);
  return pack;
}
