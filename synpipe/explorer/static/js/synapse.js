// Shows a synapse: its tile and facts.

import { markOf } from "./colours.js";
import { el } from "./dom.js";
import { distance, nanometres } from "./format.js";

export const UNLABELLED = "unlabelled"; // the last class: synapses without a label
const TILE_PX = 256;

/** The coloured mark of a class, hollow if the class is predicted. It is hidden from screen readers, because text says the same. */
export function mark(name, classes, hollow = false) {
  const place = name === UNLABELLED ? -1 : classes.indexOf(name);
  const element = el("span", { class: `mark ${hollow ? "hollow" : ""} ${place < 0 ? "none" : ""}`, "aria-hidden": "true" });
  if (place >= 0) {
    const { colour, shape } = markOf(place);
    element.classList.add(shape);
    element.style.setProperty("--mark", colour);
  }
  return element;
}

/**
 * The image of a tile. way: `colour`, `grey` (the middle section) or `strip` (all three sections, z−1 z z+1). address: a promise.
 * The space is reserved at once, so that nothing moves when the image arrives.
 */
export function picture(address, way) {
  const sections = { colour: [null], grey: [1], strip: [0, 1, 2] }[way];
  const images = sections.map((section) =>
    el("img", {
      class: section === null ? "" : `section-${section}`,
      width: TILE_PX,
      height: TILE_PX,
      alt: "",
      loading: "lazy",
      decoding: "async",
      draggable: "false",
    }),
  );
  const frame = el("span", { class: `picture ${way}` }, images);
  const missing = () => {
    if (!frame.querySelector(".gone")) frame.append(el("span", { class: "gone" }, "no tile"));
  };
  for (const image of images) image.addEventListener("error", missing);
  address.then((source) => images.forEach((image) => (image.src = source)), missing);
  return frame;
}

/** The known and the predicted transmitter, distinguished by words and by the mark. */
export function transmitter(synapse, classes) {
  const { neurotransmitter: known, predicted, probability } = synapse;
  const lines = [];
  if (known) lines.push(el("span", { class: "known" }, mark(known, classes), known));
  if (predicted) {
    const sure = probability === null || probability === undefined ? "" : ` ${probability.toFixed(2)}`;
    lines.push(
      el("span", { class: "predicted" }, mark(predicted, classes, true), `${predicted}?${sure}`, el("small", {}, " predicted")),
    );
  }
  return lines.length ? lines : [el("span", { class: "unknown" }, mark(null, classes), UNLABELLED)];
}

/** The position in nm, and a link to it in Neuroglancer. */
export function place(synapse) {
  const [x, y, z] = nanometres(synapse.position_nm);
  return [
    el("span", { class: "position" }, el("span", {}, `x ${x}`), " ", el("span", {}, `y ${y}`), " ", el("span", {}, `z ${z} nm`)),
    synapse.neuroglancer &&
      el(
        "a",
        {
          class: "neuroglancer",
          href: safeLink(synapse.neuroglancer),
          target: "_blank",
          rel: "noopener",
          "aria-label": `Synapse ${synapse.id} in Neuroglancer (opens a new tab)`,
        },
        "Neuroglancer ↗",
      ),
  ];
}

// The address comes from a data set's file. Only web addresses become links.
const safeLink = (address) => (/^https?:\/\//.test(address) ? address : null);

/**
 * A neighbour. Its tile is a button that searches from this neighbour.
 * shared: whether the other encoder finds it, too; null if there is no other encoder.
 */
export function neighbour(synapse, { address, way, classes, shared = null, ask }) {
  const known = synapse.neurotransmitter ?? (synapse.predicted ? `predicted ${synapse.predicted}` : UNLABELLED);
  const label = `Search from synapse ${synapse.id}, ${known}, distance ${distance(synapse.distance)}`;
  return el(
    "li",
    { class: `neighbour ${shared ? "shared" : ""}`, "data-id": synapse.id },
    el(
      "button",
      { type: "button", class: "tile", tabindex: "-1", "aria-label": shared ? `${label}, found by both encoders` : label, onclick: ask },
      picture(address, way),
    ),
    el(
      "div",
      { class: "facts" },
      el(
        "span",
        { class: "first" },
        el("b", { class: "distance", title: `distance ${synapse.distance}` }, distance(synapse.distance)),
        shared && el("span", { class: "both" }, "both"),
      ),
      el("span", { class: "id" }, synapse.id),
      transmitter(synapse, classes),
      el("span", { class: "neuron" }, synapse.neuron === null ? "neuron unknown" : `neuron ${synapse.neuron}`),
      place(synapse),
    ),
  );
}
