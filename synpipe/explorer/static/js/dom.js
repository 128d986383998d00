// Building elements without a framework. Text is always set as text, never as HTML.

/**
 * An element. attributes: `class`, `for`, … as in HTML; a function is a listener (`onclick`); true and false switch an
 * attribute; null leaves it out. children: elements, strings, null (left out), or lists of them.
 */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** A labelled control: the label stands above it. */
export function field(label, control, className = "") {
  return el("label", { class: `field ${className}` }, el("span", {}, label), control);
}

/** A <select>. options: [value, text, disabled?] each. */
export function select(options, value, onchange, attributes = {}) {
  const element = el("select", { ...attributes, onchange: (event) => onchange(event.target.value) });
  setOptions(element, options, value);
  return element;
}

/** Give a <select> other options; it is left alone where nothing changes, so that an open list stays open. */
export function setOptions(element, options, value) {
  const wanted = JSON.stringify(options);
  if (element.dataset.options !== wanted) {
    element.dataset.options = wanted;
    element.replaceChildren(...options.map(([each, text, disabled]) => el("option", { value: each, disabled: !!disabled }, text)));
  }
  element.value = value;
}
