// Colours the points of the map by a column: a code for each point, and a name, count, colour and shape for each code.

import { markOf, noneColour, rampColour, rgb } from "./colours.js";
import { NONE } from "./map-points.js";
import { UNLABELLED } from "./synapse.js";

const STEPS = 256; // codes of the colour ramp, for columns of numbers

/**
 * column: a column of a map. classes: the classes of the data set, which have the same colours in every column.
 * Returns {codes (uint16), entries: [{code, name, count, colour, shape}], range?: [low, high]}. A column of numbers has the codes
 * 0 … 255, and a single entry for missing values.
 */
export function colouring(column, classes) {
  return column.kind === "number" ? byNumber(column) : byCategory(column, classes);
}

function byCategory({ name, names, codes }, classes) {
  const counts = new Uint32Array(NONE + 1);
  for (let row = 0; row < codes.length; row++) counts[codes[row]]++;
  const used = names.map((each, code) => ({ code, name: each, count: counts[code] })).filter((entry) => entry.count);
  const areClasses = used.every((entry) => classes.includes(entry.name));
  // Classes keep their order. Other names are sorted by frequency, so that frequent ones get the most distinct colours.
  if (areClasses) used.sort((a, b) => classes.indexOf(a.name) - classes.indexOf(b.name));
  else used.sort((a, b) => b.count - a.count);
  const entries = used.map((entry, place) => ({ ...entry, ...markOf(areClasses ? classes.indexOf(entry.name) : place) }));
  if (counts[NONE]) entries.push(none(counts[NONE], name === "neurotransmitter" ? UNLABELLED : "none"));
  return { codes, entries };
}

const none = (count, name) => ({ code: NONE, name, count, colour: noneColour(), shape: "circle" });

function byNumber({ values }) {
  let [low, high, missing] = [Infinity, -Infinity, 0];
  for (let row = 0; row < values.length; row++) {
    if (Number.isFinite(values[row])) {
      low = Math.min(low, values[row]);
      high = Math.max(high, values[row]);
    } else missing++;
  }
  const codes = new Uint16Array(values.length);
  const step = (STEPS - 1) / (high - low || 1);
  for (let row = 0; row < values.length; row++) {
    codes[row] = Number.isFinite(values[row]) ? Math.round((values[row] - low) * step) : NONE;
  }
  return { codes, entries: missing ? [none(missing, "none")] : [], range: missing < values.length ? [low, high] : null };
}

/** The colour and shape of each visible code, for `PointsView.setLooks`. off: names that are hidden. */
export function looksOf({ entries, range }, off) {
  const looks = new Map();
  if (range) for (let code = 0; code < STEPS; code++) looks.set(code, { rgb: rampColour(code / (STEPS - 1)), shape: "circle" });
  for (const { code, name, colour, shape } of entries) if (!off.has(name)) looks.set(code, { rgb: rgb(colour), shape });
  return looks;
}
