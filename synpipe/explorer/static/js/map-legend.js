// The legend of the map: the meaning of each colour, the number of points, and a checkbox to hide them.

import { rampGradient } from "./colours.js";
import { el } from "./dom.js";
import { count, value } from "./format.js";

/** The first argument is the result of `colouring`. off: names that are hidden. change(names): hides these names instead. */
export function legend({ entries, range }, off, change) {
  const items = entries.map(({ name, count: number, colour, shape }) => {
    const swatch = el("span", { class: `mark ${shape}`, "aria-hidden": "true" });
    swatch.style.setProperty("--mark", colour);
    const toggle = () => {
      const others = new Set(off);
      if (!others.delete(name)) others.add(name);
      change(others);
    };
    const box = el("input", { type: "checkbox", checked: !off.has(name), onchange: toggle, "data-name": name });
    return el("li", {}, el("label", {}, box, swatch, el("span", { class: "name" }, name), el("span", { class: "count" }, count(number))));
  });
  const ramp = el("div", { class: "ramp", role: "img", "aria-label": range ? `from ${value(range[0])} to ${value(range[1])}` : "" });
  ramp.style.background = rampGradient();
  return el(
    "div",
    { class: "legend", role: "group", "aria-label": "Legend: show or hide points" },
    range && [ramp, el("p", { class: "ends" }, el("span", {}, value(range[0])), el("span", {}, value(range[1])))],
    el("ul", {}, items),
    items.length > 1 &&
      el(
        "p",
        { class: "all" },
        el("button", { type: "button", onclick: () => change(new Set()) }, "Show all"),
        el("button", { type: "button", onclick: () => change(new Set(entries.map(({ name }) => name))) }, "Hide all"),
      ),
  );
}
