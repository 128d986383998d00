// The map page: each synapse of an encoder is a point, and points that are close together look alike.
//
// Input: the state of the address. Output: the page. The points stay in memory, so that returning to the map is instant.

import { el, field, select, setOptions } from "./dom.js";
import { SourceError, sentence } from "./errors.js";
import { columnTitle, count, plural, value } from "./format.js";
import { csvOf, save } from "./csv.js";
import { DARK } from "./colours.js";
import { colouring, looksOf } from "./map-colouring.js";
import { listen } from "./map-gestures.js";
import { buildIndex, nearestRow, rowsInside } from "./map-index.js";
import { legend } from "./map-legend.js";
import { PointsView } from "./map-points.js";
import { readOff, writeOff } from "./state.js";
import { picture } from "./synapse.js";

const PICK_PX = 8;
const TILE_WAIT_MS = 60; // a mouse that sweeps over the map loads no tiles
const SVG = "http://www.w3.org/2000/svg";

export function mapPage({ source, navigate }) {
  let shown = null; // what is drawn: {dataset, encoder, points, column, dark, coloured, looks}
  let loaded = null; // {key, points: a promise}
  let view = null;
  let hovered = -1;
  let tileTimer = 0;
  let selection = null; // {polygon: in map coordinates, rows}
  let lassoing = false;

  const canvas = el("canvas", {
    tabindex: 0,
    role: "application",
    "aria-label": "Map of synapses. Use arrow keys to pan, plus and minus to zoom, and 0 to show all.",
  });
  const line = document.createElementNS(SVG, "polygon");
  const overlay = document.createElementNS(SVG, "svg");
  overlay.setAttribute("class", "lasso");
  overlay.setAttribute("aria-hidden", "true");
  overlay.append(line);
  const ring = el("div", { class: "ring", hidden: true, "aria-hidden": "true" });
  const tip = el("div", { class: "tip", hidden: true });
  const loading = el("label", { class: "progress" }, el("span", {}, "Loading the map"), el("progress"));
  const stage = el("div", { class: "stage" }, canvas, overlay, ring, tip, loading);
  const statusLine = el("p", { class: "said", role: "status" });
  const colourBy = select([], "", (name) => navigate({ colour: name, off: "" }));
  const legendPlace = el("div");
  const tool = (name, label, onclick, attributes = {}) => el("button", { type: "button", title: label, "aria-label": label, onclick, ...attributes }, name);
  const lassoTool = tool("Lasso", "Lasso: draw a line around synapses to select them", () => setLasso(!lassoing), { "aria-pressed": "false" });
  const tools = el(
    "div",
    { class: "tools", role: "toolbar", "aria-label": "Map tools" },
    lassoTool,
    tool("+", "Zoom in", () => view?.zoom(1.5)),
    tool("−", "Zoom out", () => view?.zoom(1 / 1.5)),
    tool("Fit", "Show all", () => view?.fit()),
  );
  const exportButton = el("button", { type: "button", onclick: exportCsv }, "Export CSV");
  const clearButton = el("button", { type: "button", onclick: () => choose(null) }, "Clear");
  const selected = el("div", { class: "selected", hidden: true }, el("strong"), exportButton, clearButton);
  const hint = el(
    "p",
    { class: "hint" },
    el("span", { class: "mouse" }, "Drag to pan, scroll to zoom, Shift-drag to select. Click a point to search for similar synapses."),
    el("span", { class: "finger" }, "Drag to pan, pinch to zoom. Tap a point to see it, and tap again to search for similar synapses."),
  );
  const panel = el("div", { class: "panel" }, field("Colour by", colourBy), legendPlace, tools, selected, statusLine, hint);
  const element = el("div", { class: "map" }, el("h1", { class: "unseen" }, "Map of synapses"), stage, panel);
  new ResizeObserver(() => view?.resize()).observe(stage);

  const isShown = (row) => shown.looks.has(shown.coloured.codes[row]);

  function setLasso(on) {
    lassoing = on;
    lassoTool.setAttribute("aria-pressed", String(on));
    stage.classList.toggle("lassoing", on);
  }

  function startView() {
    view = new PointsView(canvas);
    view.onview = ({ x, y, scale }) => {
      // The position in the middle and the pixels per unit, for tests.
      stage.dataset.view = `${x} ${y} ${scale}`;
      drawLine(selection?.polygon.map((corner) => view.toCanvas(corner)));
      placeTip();
    };
    listen(canvas, view, {
      lassoing: () => lassoing,
      lasso: (path, done) => {
        drawLine(path);
        if (done) choose(path.map((place) => view.toMap(place)));
      },
      hover: (at) => hover(find(at)),
      leave: () => hover(-1),
      pick: (at, isTouch) => {
        const row = find(at);
        if (row < 0 || (isTouch && row !== hovered)) hover(row);
        else search(row);
      },
    });
  }

  const find = (at) => (shown?.points.index ? nearestRow(shown.points, view.toMap(at), PICK_PX / view.view.scale, isShown) : -1);
  const search = (row) => {
    const { dataset, encoder, points } = shown;
    hover(-1);
    navigate({ page: "search", dataset: dataset.name, encoder, id: String(points.ids[row]) });
  };

  function hover(row) {
    if (row === hovered) return;
    hovered = row;
    clearTimeout(tileTimer);
    stage.classList.toggle("over", row >= 0);
    ring.hidden = tip.hidden = row < 0;
    if (row < 0) return;
    const { points, dataset, encoder } = shown;
    const id = String(points.ids[row]);
    const facts = points.columns.map((column) => {
      const shownValue = column.kind === "category" ? column.names[column.codes[row]] : value(column.values[row]);
      return shownValue === undefined ? null : [el("dt", {}, columnTitle(column.name)), el("dd", {}, shownValue)];
    });
    const tile = el("div", { class: "place" });
    tip.replaceChildren(tile, el("strong", {}, id), el("dl", {}, facts));
    tip.dataset.id = id;
    tileTimer = setTimeout(() => tile.replaceChildren(picture(source.tile(dataset.name, id, encoder), "colour")), TILE_WAIT_MS);
    placeTip();
  }

  /** Places the tooltip beside the point, inside the map. */
  function placeTip() {
    if (hovered < 0) return;
    const [right, down] = view.toCanvas([shown.points.x[hovered], shown.points.y[hovered]]);
    const left = right + 16 + tip.offsetWidth > view.width ? right - 16 - tip.offsetWidth : right + 16;
    const top = Math.max(4, Math.min(down - tip.offsetHeight / 2, view.height - tip.offsetHeight - 4));
    tip.style.transform = `translate(${Math.max(4, left)}px, ${top}px)`;
    ring.style.transform = `translate(${right}px, ${down}px)`;
  }

  function drawLine(path) {
    line.setAttribute("points", (path ?? []).map((place) => place.join(",")).join(" "));
  }

  /** Selects the visible points inside a polygon in map coordinates; null clears the selection. */
  function choose(polygon) {
    const rows = polygon && shown.points.index ? rowsInside(shown.points, polygon, isShown) : null;
    selection = rows && { polygon, rows };
    selected.hidden = !selection;
    drawLine(selection?.polygon.map((corner) => view.toCanvas(corner)));
    view.setChosen(rows?.length ? rows : null);
    if (selection) selected.querySelector("strong").textContent = `${count(rows.length)} selected`;
    exportButton.disabled = !rows?.length;
    statusLine.textContent = selection ? `${plural(rows.length, "synapse")} selected` : "";
  }

  async function exportCsv() {
    const { points, dataset, encoder } = shown;
    const transmitter = points.columns.find(({ name }) => name === "neurotransmitter");
    exportButton.disabled = true;
    save(await csvOf(selection.rows, points.ids, transmitter?.names ?? [], transmitter?.codes), `${dataset.name}_${encoder}_selected.csv`);
    exportButton.disabled = false;
  }

  async function pointsOf(dataset, encoder) {
    const bar = loading.querySelector("progress");
    const points = await source.map(dataset, encoder, ({ loaded: now, total }) => {
      if (total) [bar.max, bar.value] = [total, now];
    });
    buildIndex(points.x, points.y).then(
      (index) => {
        points.index = index;
        stage.dataset.ready = "";
      },
      (error) => (statusLine.textContent = sentence(error)),
    );
    return points;
  }

  return {
    element,
    title: () => "Map",
    async show(state, { dataset, encoder, about, signal }) {
      if (!about.has_map) {
        throw new SourceError(`There is no map of ${encoder} in ${dataset.name}. Materialise projection_${encoder}, then the table and the index.`, 404);
      }
      if (!view) startView();
      const key = JSON.stringify([dataset.name, encoder, about.version, about.data_version]);
      if (loaded?.key !== key) {
        loading.hidden = false;
        delete stage.dataset.ready;
        loaded = { key, points: pointsOf(dataset.name, encoder) };
        loaded.points.catch(() => (loaded = null));
      }
      const points = await loaded.points;
      if (signal.aborted) return;
      loading.hidden = true;
      const names = points.columns.map(({ name }) => name);
      const column = points.columns.find(({ name }) => name === (state.colour || names[0]));
      if (!column) throw new SourceError(`The map has no column “${state.colour}”. Use one of ${names.join(", ")}.`, 400);
      const off = readOff(state.off);
      const fresh = shown?.points !== points;
      const dark = DARK.matches;
      const recolour = fresh || shown.column !== column || shown.dark !== dark;
      const coloured = recolour ? colouring(column, dataset.classes) : shown.coloured;
      hover(-1);
      shown = { dataset, encoder, points, column, dark, coloured, looks: looksOf(coloured, off) };
      setOptions(colourBy, names.map((name) => [name, columnTitle(name)]), column.name);
      const focused = document.activeElement?.dataset.name;
      legendPlace.replaceChildren(legend(coloured, off, (others) => navigate({ off: writeOff(others) })));
      for (const box of legendPlace.querySelectorAll("input")) if (box.dataset.name === focused) box.focus();
      view.resize();
      if (fresh) {
        view.setPoints(points.x, points.y);
        selection = null;
      }
      if (recolour) view.setCodes(coloured.codes);
      view.setLooks(shown.looks.keys(), (code) => shown.looks.get(code));
      if (selection || fresh) choose(selection?.polygon ?? null);
      if (!selection) statusLine.textContent = plural(points.rows, "synapse");
    },
  };
}
