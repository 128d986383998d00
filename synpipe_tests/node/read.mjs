// Reads the published version of a LanceDB table: node read.mjs FOLDER TABLE SYNAPSE_ID. Prints one JSON object.
import { connect } from "@lancedb/lancedb";

const [folder, name, synapseId] = process.argv.slice(2);
const table = await (await connect(folder)).openTable(name);
await table.checkout("current");

// An int64 is a BigInt here; JSON has none, so ids are written as text.
const id = (row) => row.synapse_id.toString();
const [query] = await table.query().where(`synapse_id = ${BigInt(synapseId)}`).limit(1).toArray();
const nearest = await table.search(Float32Array.from(query.vector)).distanceType("cosine").limit(10).toArray();
const schema = await table.schema();

console.log(
  JSON.stringify({
    version: await table.version(),
    rows: await table.countRows(),
    columns: Object.fromEntries(schema.fields.map((field) => [field.name, field.type.toString()])),
    provenance: JSON.parse(schema.metadata.get("synpipe")),
    nearest: nearest.map((row) => ({ id: id(row), distance: row._distance, neurotransmitter: row.neurotransmitter })),
  }),
);
