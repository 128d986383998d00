// Finds the point at a position, and the points inside a polygon.

import KDBush from "../vendor/kdbush.js";

/** Builds the spatial index of points in a worker. x, y: float32 (n). Resolves to a `KDBush`. */
export function buildIndex(x, y) {
  return new Promise((resolve, reject) => {
    const worker = new Worker(new URL("./index-worker.js", import.meta.url), { type: "module" });
    worker.onmessage = ({ data }) => (worker.terminate(), resolve(KDBush.from(data)));
    worker.onerror = (event) => (worker.terminate(), reject(new Error(event.message || "The map's worker did not start. Reload the page.")));
    worker.postMessage({ x, y });
  });
}

/** The row of the nearest point within `radius` of a position, or -1. points: {x, y, index}. visible(row): whether to consider it. */
export function nearestRow({ x, y, index }, [atX, atY], radius, visible) {
  let best = -1;
  let bestSquare = radius * radius;
  for (const row of index.within(atX, atY, radius)) {
    const square = (x[row] - atX) ** 2 + (y[row] - atY) ** 2;
    if (square <= bestSquare && visible(row)) [best, bestSquare] = [row, square];
  }
  return best;
}

/** Rows (uint32, ascending) of the visible points inside a polygon [[x, y], …], by the even-odd rule. */
export function rowsInside({ x, y, index }, polygon, visible) {
  const [xs, ys] = [polygon.map((corner) => corner[0]), polygon.map((corner) => corner[1])];
  const near = index.range(Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys));
  return Uint32Array.from(near.filter((row) => visible(row) && isInside(x[row], y[row], xs, ys))).sort();
}

function isInside(x, y, xs, ys) {
  let inside = false;
  for (let here = 0, before = xs.length - 1; here < xs.length; before = here++) {
    const crosses = ys[here] > y !== ys[before] > y;
    if (crosses && x < ((xs[before] - xs[here]) * (y - ys[here])) / (ys[before] - ys[here]) + xs[here]) inside = !inside;
  }
  return inside;
}
