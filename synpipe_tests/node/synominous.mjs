// What SynOminous does in the browser, for the bench: vectors from JSON into PGlite, ranks by class with pgvector.
//
// node synominous.mjs embeddings.json.gz, beside @electric-sql/pglite and @electric-sql/pglite-pgvector. Prints JSON. Its index
// on the vectors is left out: a query that ranks every row does not use it, and it takes minutes to build.

import { readFileSync } from "node:fs";
import { gunzipSync } from "node:zlib";
import { PGlite } from "@electric-sql/pglite";
import { vector } from "@electric-sql/pglite-pgvector";

const CHUNKS = 100;
const SEARCH = `
  SELECT * FROM (
    SELECT synapse, neurotransmitter, embedding <=> $1 AS score,
           rank() OVER (PARTITION BY neurotransmitter ORDER BY embedding <=> $1) AS rank
    FROM embeddings WHERE synapse <> $2
  ) t WHERE rank <= 4`;

const began = performance.now();
const { embeddings, queries } = JSON.parse(gunzipSync(readFileSync(process.argv[2])));
const db = await PGlite.create({ extensions: { vector } });
await db.exec(`
  CREATE EXTENSION vector;
  CREATE TABLE embeddings (synapse TEXT NOT NULL UNIQUE, neurotransmitter TEXT, embedding VECTOR(${embeddings[0].v.length}));`);
const size = Math.ceil(embeddings.length / CHUNKS);
for (let first = 0; first < embeddings.length; first += size) {
  const rows = embeddings.slice(first, first + size).map(({ s, n, v }) => `('${s}', '${n}', '${JSON.stringify(v)}')`);
  await db.exec(`INSERT INTO embeddings VALUES ${rows.join(",")};`);
}
const loadSeconds = (performance.now() - began) / 1000;

const milliseconds = [];
for (const id of queries) {
  const start = performance.now();
  const { rows } = await db.query("SELECT embedding FROM embeddings WHERE synapse = $1", [id]);
  const answer = await db.query(SEARCH, [rows[0].embedding, id]);
  milliseconds.push(performance.now() - start);
  if (answer.rows.length < 4) throw new Error(`${answer.rows.length} rows for ${id}`);
}
console.log(JSON.stringify({ loadSeconds, milliseconds, gigabytes: process.memoryUsage.rss() / 1e9 }));
