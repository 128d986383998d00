// The search page: a query synapse and the most similar synapses of each class.
//
// Input: the state of the address. Output: the page. A new query cancels the previous one. The old answer stays visible, dimmed, until
// the new one arrives.

import { columns, sideBySide } from "./answers.js";
import { el } from "./dom.js";
import { isAbort, SourceError, sentence } from "./errors.js";
import { plural } from "./format.js";
import { arrowKeys } from "./grid-keys.js";
import { searchControls } from "./search-controls.js";
import { addressOf, checkSearch, METRICS } from "./state.js";
import { picture, place, transmitter } from "./synapse.js";

const IMAGE_TYPE = "image/png";

/** app: {source, navigate(changes, options)}. Returns the page's element, title and `show`. */
export function searchPage({ source, navigate }) {
  let shown = null; // the arguments of the last `show`: {state, dataset, encoder, about}
  const uploads = []; // files of this visit, because an address cannot contain them
  const query = el("section", { class: "query", "aria-label": "Query" });
  const statusLine = el("p", { class: "said", role: "status" });
  const answer = el("div", { class: "answer" });
  const keys = arrowKeys(answer, "button.tile");
  const controls = searchControls({
    change: (changes) => navigate(changes, { keep: true }),
    goTo: (id) => navigate({ id }),
    random: () => random(false).catch(fail),
    image: (file) => upload(file),
  });
  const element = el("div", { class: "search" }, el("div", { class: "band" }, query, controls.element), statusLine, answer);
  dropImages(element.ownerDocument, () => element.isConnected && shown?.about.upload, upload);

  async function random(replace) {
    const { encoder, dataset } = shown;
    navigate({ id: await source.random(dataset.name, encoder) }, { replace });
  }

  function upload(file) {
    if (file.type !== IMAGE_TYPE) {
      fail(new SourceError(`“${file.name}” is not a PNG image. Use a grey image, or one with three sections as red, green and blue.`, 415));
      return;
    }
    navigate({ id: "" }, { memory: { upload: uploads.push(file) - 1 } });
  }

  function fail(error) {
    if (isAbort(error)) return;
    const start = addressOf({ ...shown.state, page: "search", id: "", region: "", hemilineage: "", metric: "cosine", per_class: "4", exclude_neuron: "", tiles: "colour" });
    statusLine.textContent = "";
    answer.removeAttribute("aria-busy");
    query.replaceChildren();
    answer.replaceChildren(
      el(
        "div",
        { class: "problem", role: "alert" },
        el("h1", {}, error.status === 404 ? "Not found" : "Something went wrong"),
        el("p", {}, sentence(error)),
        el("p", {}, el("a", { href: start }, "Back to a random synapse")),
      ),
    );
  }

  async function ask(file, signal) {
    const { state, dataset, encoder } = shown;
    const began = performance.now();
    if (file) statusLine.textContent = `Embedding ${file.name} and searching …`;
    const request = {
      dataset: dataset.name,
      id: state.id,
      file,
      metric: state.metric,
      perClass: Number(state.per_class),
      excludeNeuron: state.exclude_neuron === "1",
      region: state.region,
      hemilineage: state.hemilineage,
    };
    const answerOf = (each) => (file ? source.upload({ ...request, encoder: each }, signal) : source.search({ ...request, encoder: each }, signal));
    const compared = state.compare && state.compare !== encoder ? [state.compare] : [];
    const answers = await Promise.all([encoder, ...compared].map(answerOf));
    signal.throwIfAborted();
    const milliseconds = Math.max(1, Math.round(performance.now() - began));

    const show = {
      way: state.tiles,
      classes: dataset.classes,
      tileOf: (id, by) => source.tile(dataset.name, id, by),
      ask: (id) => navigate({ id }),
    };
    const hadFocus = answer.contains(document.activeElement);
    showQuery(answers[0].query, file, show);
    const count = answers[0].groups.reduce((sum, { neighbours }) => sum + neighbours.length, 0);
    let summary = `${plural(count, "neighbour")} by ${METRICS[state.metric]} in ${milliseconds} ms`;
    if (answers.length > 1) {
      const both = sideBySide(answers[0], answers[1], show);
      answer.replaceChildren(both.element);
      summary = `${both.summary}, by ${METRICS[state.metric]}, in ${milliseconds} ms`;
    } else {
      answer.replaceChildren(columns(answers[0], show));
    }
    statusLine.textContent = count ? summary : "No synapse matches. Remove a filter.";
    answer.removeAttribute("aria-busy");
    keys.refresh(hadFocus);
  }

  function showQuery(synapse, file, show) {
    if (!synapse) {
      const address = URL.createObjectURL(file);
      const image = picture(Promise.resolve(address), show.way);
      image.querySelector("img").addEventListener("load", () => URL.revokeObjectURL(address), { once: true });
      query.replaceChildren(image, el("div", { class: "facts" }, el("h1", {}, "Your image"), el("span", {}, file.name)));
      return;
    }
    const fact = (term, ...values) => [el("dt", {}, term), el("dd", {}, values)];
    query.replaceChildren(
      picture(show.tileOf(synapse.id, shown.encoder), show.way),
      el(
        "div",
        { class: "facts" },
        el("h1", {}, el("small", {}, "Synapse "), synapse.id),
        el(
          "dl",
          {},
          fact("Transmitter", transmitter(synapse, show.classes)),
          fact("Neuron", synapse.neuron ?? "unknown"),
          fact("Hemilineage", synapse.hemilineage ?? "unknown"),
          fact("Region", synapse.region ?? "unknown"),
          fact("Position", place(synapse)),
        ),
      ),
    );
  }

  return {
    element,
    title: () => (shown?.state.id ? `Synapse ${shown.state.id}` : "Search"),
    async show(state, { dataset, encoder, about, memory, signal }) {
      shown = { state, dataset, encoder, about };
      answer.setAttribute("aria-busy", "true");
      controls.show(state, encoder, dataset, about);
      try {
        checkSearch(state, about);
        const file = uploads[memory?.upload];
        if (!state.id && !file) await random(true);
        else await ask(file, signal);
      } catch (error) {
        if (!signal.aborted) fail(error);
      }
      if (!signal.aborted) answer.dataset.of = location.search; // the address whose answer the page shows
    },
  };
}

/** Uploads an image that is dropped anywhere. Without this, the browser would open the file instead of the page. */
function dropImages(document, isWanted, upload) {
  const body = document.documentElement;
  const isFile = (event) => event.dataTransfer?.types.includes("Files") && isWanted();
  document.addEventListener("dragover", (event) => {
    if (!isFile(event)) return;
    event.preventDefault();
    body.classList.add("dropping");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) body.classList.remove("dropping");
  });
  document.addEventListener("drop", (event) => {
    body.classList.remove("dropping");
    if (!isFile(event)) return;
    event.preventDefault();
    if (event.dataTransfer.files[0]) upload(event.dataTransfer.files[0]);
  });
}
