// Formats numbers and names for display.

const GROUPED = new Intl.NumberFormat("en-GB");
const WHOLE = new Intl.NumberFormat("en-GB", { maximumFractionDigits: 0 });

export const count = (number) => GROUPED.format(number);
export const plural = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;
export const nanometres = (position) => position.map((each) => WHOLE.format(each));
export const percent = (share) => `${Math.round(100 * share)} %`;

/** Four significant digits, because distances of different metrics differ by powers of ten. */
export const distance = (number) => (Math.abs(number) < 1e-4 ? number.toExponential(1) : number.toPrecision(4));

/** A value of a column, with four significant digits. */
export const value = (number) => (Number.isFinite(number) ? String(Number(number.toPrecision(4))) : "none");

export const columnTitle = (name) => name.replaceAll("_", " ");
