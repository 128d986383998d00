// Shows answers: one encoder as a column per class, or two encoders side by side as a row per class. Neighbours that both
// encoders find are marked.

import { el } from "./dom.js";
import { percent, plural } from "./format.js";
import { overlap } from "./overlap.js";
import { mark, neighbour } from "./synapse.js";

/** One answer of `source.search`. show: {way (see `picture`), classes, tileOf(id, encoder), ask(id)}. */
export function columns(answer, show) {
  const classColumns = answer.groups.map(({ name, neighbours }) =>
    el(
      "section",
      { class: "class", "aria-label": `${name}: ${plural(neighbours.length, "neighbour")}` },
      heading(name, show.classes),
      list(neighbours, answer.encoder, show),
    ),
  );
  const element = el("div", { class: `columns ${show.way}` }, classColumns);
  // All neighbours of one rank are in one row, even if the text of one of them is long.
  element.style.setProperty("--ranks", Math.max(1, ...answer.groups.map(({ neighbours }) => neighbours.length)));
  return element;
}

/** The answers of two encoders to the same query. Returns the element and a summary for the status line. */
export function sideBySide(first, second, show) {
  const agreement = overlap(first.groups, second.groups);
  const rows = first.groups.map(({ name, neighbours }) => {
    const { shared, of } = agreement.byClass.get(name);
    const secondNeighbours = second.groups.find((group) => group.name === name)?.neighbours ?? [];
    const half = (answer, nearest) =>
      el("div", { class: "half", role: "group", "aria-label": `${name}, ${answer.encoder}` }, list(nearest, answer.encoder, show, agreement.ids));
    return el(
      "section",
      { class: "pair", "aria-label": name },
      el("header", {}, heading(name, show.classes), el("p", { class: "share" }, of ? `${shared} of ${of} shared` : "")),
      half(first, neighbours),
      half(second, secondNeighbours),
    );
  });
  const share = agreement.of ? ` (${percent(agreement.shared / agreement.of)})` : "";
  const summary = `Both encoders find ${agreement.shared} of ${plural(agreement.of, "neighbour")}${share}`;
  const heads = el("div", { class: "pair heads" }, el("span"), el("h2", {}, first.encoder), el("h2", {}, second.encoder));
  return { element: el("div", { class: `pairs ${show.way}` }, heads, rows), summary };
}

const heading = (name, classes) => el("h3", {}, mark(name, classes), name);

function list(neighbours, encoder, show, shared = null) {
  if (!neighbours.length) return el("p", { class: "empty" }, "No match");
  const items = neighbours.map((synapse) =>
    neighbour(synapse, {
      address: show.tileOf(synapse.id, encoder),
      way: show.way,
      classes: show.classes,
      shared: shared?.has(synapse.id) ?? null,
      ask: () => show.ask(synapse.id),
    }),
  );
  return el("ol", {}, items);
}
