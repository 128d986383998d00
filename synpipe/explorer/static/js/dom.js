// Builds elements without a framework. Text is always inserted as text, never as HTML.

/**
 * Creates an element. attributes: `class`, `for`, … as in HTML. A function becomes an event listener (`onclick`), true and false
 * set and omit a boolean attribute, and null omits an attribute. children: elements, strings, null (omitted), or lists of these.
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

/** A control with its label above it. */
export function field(label, control, className = "") {
  return el("label", { class: `field ${className}` }, el("span", {}, label), control);
}

/** A <select>. options: a list of [value, text, disabled?]. */
export function select(options, value, onchange, attributes = {}) {
  const element = el("select", { ...attributes, onchange: (event) => onchange(event.target.value) });
  setOptions(element, options, value);
  return element;
}

/** Gives a <select> new options. Equal options are not replaced, so that an open list stays open. */
export function setOptions(element, options, value) {
  const wanted = JSON.stringify(options);
  if (element.dataset.options !== wanted) {
    element.dataset.options = wanted;
    element.replaceChildren(...options.map(([each, text, disabled]) => el("option", { value: each, disabled: !!disabled }, text)));
  }
  element.value = value;
}
