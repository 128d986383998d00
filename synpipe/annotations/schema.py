"""The tables that annotations become: their columns, the reasons for rejecting a row, and the name for "no class"."""

import pyarrow as pa

UNLABELLED = "unlabelled"  # stands for a null in the column `neurotransmitter`, wherever classes are listed or counted

SYNAPSE_SCHEMA = pa.schema(
    [
        pa.field("synapse_id", pa.int64(), nullable=False),
        pa.field("x_nm", pa.float64()),
        pa.field("y_nm", pa.float64()),
        pa.field("z_nm", pa.float64()),
        pa.field("neuron_id", pa.int64()),  # null: unknown
        pa.field("hemilineage", pa.string()),
        pa.field("region", pa.string()),
        pa.field("neurotransmitter", pa.string()),  # one of the data set's classes; null: unlabelled
        pa.field("confidence", pa.float32()),
        pa.field("source", pa.string()),
        pa.field("source_id", pa.string()),  # the id as the file writes it, before `id_offset` is added
    ]
)
REJECT_SCHEMA = pa.schema(
    [
        pa.field("synapse_id", pa.int64()),  # null for missing_id, bad_id and malformed_row
        pa.field("x_nm", pa.float64()),
        pa.field("y_nm", pa.float64()),
        pa.field("z_nm", pa.float64()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("source", pa.string()),
        pa.field("source_id", pa.string()),
    ]
)

# The reasons, in the order of the checks: a row is rejected for the first one that applies.
MALFORMED_ROW = "malformed_row"  # a CSV line with too few or too many values, or a JSON entry that is not an object
MISSING_ID = "missing_id"
BAD_ID = "bad_id"
MISSING_COORDINATE = "missing_coordinate"  # absent, not a number, or not finite
OUTSIDE_VOLUME = "outside_volume"
UNKNOWN_NEUROTRANSMITTER = "unknown_neurotransmitter"
DUPLICATE_ID = "duplicate_id"  # an earlier row without any fault has the same id
