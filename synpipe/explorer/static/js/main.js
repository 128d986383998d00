// Starts the explorer: opens the source of answers, reads the state from the address, and shows the page. Each change of the state
// becomes an entry in the browser's history.

import { DARK } from "./colours.js";
import { el, field, select, setOptions } from "./dom.js";
import { isAbort, sentence } from "./errors.js";
import { count } from "./format.js";
import { mapPage } from "./map-page.js";
import { searchPage } from "./search-page.js";
import { addressOf, placeOf, readState } from "./state.js";

const main = document.getElementById("page");
const SOURCES = { server: "./source-server.js", static: "./source-static.js" };
const PAGES = { search: ["Similarity search", searchPage], map: ["Map", mapPage] };

let source;
let datasets;
let request = new AbortController(); // cancels the answers of the previous state
const pages = {}; // those that have been shown, by name

function navigate(changes, { replace = false, memory = null, keep = false } = {}) {
  const state = { ...readState(location.search), ...changes };
  // keep: an uploaded image stays the query when a setting changes.
  const remembered = memory ?? (keep ? history.state : null);
  history[replace ? "replaceState" : "pushState"](remembered, "", addressOf(state));
  if ("id" in changes && !replace) scrollTo(0, 0);
  show();
}

async function show() {
  request.abort();
  request = new AbortController();
  const { signal } = request;
  const state = readState(location.search);
  try {
    const { dataset, encoder } = placeOf(state, datasets);
    showTop(state, dataset, encoder);
    const about = await source.about(dataset.name, encoder);
    if (signal.aborted) return;
    const page = (pages[state.page] ??= PAGES[state.page][1]({ source, navigate }));
    if (page.element.parentNode !== main) main.replaceChildren(page.element);
    showAbout(about);
    await page.show(state, { dataset, encoder, about, memory: history.state, signal });
    if (!signal.aborted) document.title = `${page.title()} · ${dataset.name} · synpipe explorer`;
  } catch (error) {
    if (!isAbort(error) && !signal.aborted) fail(error);
  }
}

function fail(error) {
  document.title = "synpipe explorer";
  // If the address names an unknown data set, show the choices of the first one.
  if (datasets?.length && !document.getElementById("where").firstChild) showTop({}, datasets[0], datasets[0].encoders[0]);
  const title = error.status === 404 ? "Not found" : "Something went wrong";
  main.replaceChildren(
    el(
      "div",
      { class: "problem", role: "alert" },
      el("h1", {}, title),
      el("p", {}, sentence(error)),
      el("p", {}, el("a", { href: "./" }, "Back to the start page")),
    ),
  );
}

const datasetChoice = select([], "", (name) => navigate({ ...readState(""), page: readState(location.search).page, dataset: name }));
const encoderChoice = select([], "", (name) => {
  const { compare } = readState(location.search);
  navigate({ encoder: name, compare: compare === name ? "" : compare }, { keep: true });
});

function showTop(state, dataset, encoder) {
  const links = Object.entries(PAGES).map(([page, [title]]) => {
    const href = addressOf({ ...readState(""), page, dataset: dataset.name, encoder });
    return el("a", { href, "aria-current": page === state.page ? "page" : null, onclick: (event) => follow(event, href) }, title);
  });
  document.getElementById("pages").replaceChildren(...links);
  setOptions(datasetChoice, datasets.map(({ name }) => [name, name]), dataset.name);
  setOptions(encoderChoice, dataset.encoders.map((name) => [name, name]), encoder);
  const where = document.getElementById("where");
  if (!where.firstChild) where.append(field("Data set", datasetChoice), field("Encoder", encoderChoice));
}

/** Follows a link between the pages without reloading, unless the user opens it in a new tab. */
function follow(event, href) {
  if (event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
  event.preventDefault();
  history.pushState(null, "", href);
  scrollTo(0, 0);
  show();
}

function showAbout(about) {
  const facts = [
    about.dataset,
    about.encoder,
    `${count(about.rows)} synapses`,
    `${about.dimensions} dimensions`,
    `version ${about.version}`,
    `fingerprint ${about.fingerprint.slice(0, 12)}`,
    ...Object.entries(about.recall ?? {}).map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`),
  ];
  document.getElementById("about").replaceChildren(...facts.map((fact) => el("span", {}, fact)));
}

function showProgress({ loaded, total, what }) {
  let box = main.querySelector(".progress.first");
  if (total && loaded >= total) {
    box?.remove();
    return;
  }
  if (!box) {
    box = el("label", { class: "progress first" }, el("span"), el("progress"));
    main.prepend(box);
  }
  const bar = box.querySelector("progress");
  if (total) [bar.max, bar.value] = [total, loaded];
  const megabytes = (bytes) => (bytes / 1e6).toFixed(1);
  box.querySelector("span").textContent = `Loading ${what}: ${megabytes(loaded)}${total ? ` of ${megabytes(total)}` : ""} MB`;
}

async function start() {
  try {
    const kind = document.querySelector("script[data-source]").dataset.source;
    source = await (await import(SOURCES[kind])).open(new URL("./", location.href));
    source.onprogress = showProgress;
    datasets = await source.datasets();
  } catch (error) {
    fail(error);
    return;
  }
  addEventListener("popstate", show);
  DARK.addEventListener("change", show);
  await show();
}

start();
