// Selected synapses as CSV (RFC 4180). The text is built in pieces, so that the page stays responsive.

const ROWS_AT_ONCE = 20_000;

/**
 * rows: which synapses. ids: of all synapses, int64. names, codes: the known transmitter of all synapses; a code beyond the names
 * means that it is unknown. Resolves to a `Blob`.
 */
export async function csvOf(rows, ids, names, codes) {
  const fields = names.map(csvField);
  const parts = ["synapse_id,neurotransmitter\r\n"];
  for (let start = 0; start < rows.length; start += ROWS_AT_ONCE) {
    const lines = [];
    for (const row of rows.subarray(start, start + ROWS_AT_ONCE)) lines.push(`${ids[row]},${fields[codes?.[row]] ?? ""}\r\n`);
    parts.push(lines.join(""));
    await new Promise((resolve) => setTimeout(resolve));
  }
  return new Blob(parts, { type: "text/csv" });
}

const csvField = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

/** Downloads a file. */
export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
