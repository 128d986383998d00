// The controls of the search page. They show the state and request a new one. They hold no state of their own, except for a number
// that is being typed.

import { el, field, select, setOptions } from "./dom.js";
import { MAX_PER_CLASS, METRICS, TILES } from "./state.js";

/**
 * ask: {change(changes), goTo(id), random(), image(file)}.
 * Returns the element and `show(state, encoder, dataset, about)`.
 */
export function searchControls(ask) {
  const change = (key) => (value) => ask.change({ [key]: value });
  const metric = select([], "", change("metric"));
  const compare = select([], "", change("compare"));
  const region = select([], "", change("region"));
  const hemilineage = select([], "", change("hemilineage"));
  let typing = false;
  const perClass = el("input", {
    type: "number",
    min: 1,
    max: MAX_PER_CLASS,
    step: 1,
    required: true,
    oninput: () => (typing = true),
    onblur: () => (typing = false),
    onchange: ({ target }) => {
      typing = false;
      if (target.reportValidity()) ask.change({ per_class: String(target.valueAsNumber) });
    },
  });
  const exclude = el("input", {
    type: "checkbox",
    onchange: ({ target }) => ask.change({ exclude_neuron: target.checked ? "1" : "" }),
  });
  const ways = Object.entries(TILES).map(([way, title]) => {
    const radio = el("input", { type: "radio", name: "tiles", value: way, onchange: () => ask.change({ tiles: way }) });
    return { way, radio, label: el("label", {}, radio, el("span", {}, title)) };
  });
  const id = el("input", { type: "text", inputmode: "numeric", autocomplete: "off", spellcheck: "false", required: true, placeholder: "id" });
  const goTo = el(
    "form",
    { class: "go", onsubmit: (event) => (event.preventDefault(), ask.goTo(id.value.trim())) },
    field("Go to synapse", id),
    el("button", { type: "submit" }, "Go"),
  );
  const file = el("input", {
    type: "file",
    accept: "image/png",
    onchange: () => {
      if (file.files[0]) ask.image(file.files[0]);
      file.value = "";
    },
  });
  const image = el("label", { class: "button file" }, file, "Image …");
  const element = el(
    "div",
    { class: "controls" },
    el(
      "div",
      { class: "asks" },
      goTo,
      el("button", { type: "button", class: "random", onclick: () => ask.random() }, "Random synapse"),
      image,
      el("span", { class: "hint" }, "or drop a PNG anywhere"),
    ),
    el(
      "div",
      { class: "settings", role: "group", "aria-label": "Search settings" },
      field("Metric", metric),
      field("Compare with", compare),
      field("Per class", perClass, "narrow"),
      field("Region", region),
      field("Hemilineage", hemilineage),
      el("fieldset", { class: "choice" }, el("legend", {}, "Tiles"), el("div", {}, ways.map(({ label }) => label))),
      el("label", { class: "check" }, exclude, "Exclude own neuron"),
    ),
  );
  return {
    element,
    show(state, encoder, dataset, about) {
      const filter = (control, names, value) => {
        setOptions(control, [["", names.length ? "all" : "none known"], ...names.map((name) => [name, name])], value);
        control.disabled = !names.length;
      };
      setOptions(metric, Object.keys(METRICS).map((each) => [each, METRICS[each], !about.metrics.includes(each)]), state.metric);
      const others = dataset.encoders.filter((each) => each !== encoder);
      setOptions(compare, [["", others.length ? "no other" : "no other indexed"], ...others.map((each) => [each, each])], state.compare);
      compare.disabled = !others.length;
      filter(region, about.regions, state.region);
      filter(hemilineage, about.hemilineages, state.hemilineage);
      if (!typing) perClass.value = state.per_class;
      exclude.checked = state.exclude_neuron === "1";
      for (const { way, radio } of ways) radio.checked = way === state.tiles;
      if (document.activeElement !== id) id.value = state.id;
      for (const each of element.querySelectorAll(".file, .hint")) each.hidden = !about.upload;
    },
  };
}
