// Colours of classes, the same as in synpipe/analysis/projection.py, so that pictures, map and tiles agree; and a colour ramp for
// numbers.

// M. Okabe, K. Ito, "Color universal design", 2008, without its yellow, which is faint on white. Black becomes white in dark mode.
const PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"];
export const DARK = matchMedia("(prefers-color-scheme: dark)");
const last = () => (DARK.matches ? "#FFFFFF" : "#000000");
export const noneColour = () => (DARK.matches ? "#5d6873" : "#BBBBBB");

/** After seven names the colours repeat with another shape. */
export const SHAPES = ["circle", "triangle", "square"];
const COLOURS = PALETTE.length + 1;

/** Colour and shape of the name at this position of its list. */
export function markOf(place) {
  return { colour: PALETTE[place % COLOURS] ?? last(), shape: SHAPES[Math.floor(place / COLOURS) % SHAPES.length] };
}

// Nine colours of matplotlib's viridis (S. van der Walt, N. Smith, 2015), without the last one, a faint yellow.
const RAMP = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30"];
export const rampGradient = () => `linear-gradient(to right, ${RAMP.join(", ")})`;

/** The colour at `share` (0 … 1) of the ramp: [red, green, blue], 0 … 255. */
export function rampColour(share) {
  const place = share * (RAMP.length - 1);
  const lower = Math.min(Math.floor(place), RAMP.length - 2);
  const [from, to] = [rgb(RAMP[lower]), rgb(RAMP[lower + 1])];
  return from.map((each, channel) => Math.round(each + (place - lower) * (to[channel] - each)));
}

export const rgb = (hex) => [1, 3, 5].map((place) => parseInt(hex.slice(place, place + 2), 16));
