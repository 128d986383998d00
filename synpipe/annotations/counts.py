"""Count the synapses and neurons of each class.

Input: synapses, a part at a time. Output: counts, and sentences for the user. A neuron counts once in each class that
its synapses have, however the synapses are spread over the parts. Memory grows with the number of neurons, not with the
number of synapses. The sentences follow the summary that SynOminous printed.
"""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from synpipe.annotations.schema import UNLABELLED

GROUP_KEYS = ["neurotransmitter", "neuron_id"]
GROUP_SCHEMA = pa.schema([(GROUP_KEYS[0], pa.string()), (GROUP_KEYS[1], pa.int64()), ("synapses", pa.int64())])


class ClassCounts:
    """Counts of the synapses that were added so far. synapses: their total number."""

    def __init__(self) -> None:
        self.synapses = 0
        self._groups = GROUP_SCHEMA.empty_table()  # one row per class and neuron; null is treated like any other value

    def add(self, synapses: pa.Table) -> None:
        self.synapses += len(synapses)
        added = synapses.group_by(GROUP_KEYS).aggregate([([], "count_all")]).rename_columns(GROUP_SCHEMA.names)
        groups = pa.concat_tables([self._groups, added]).group_by(GROUP_KEYS)
        self._groups = groups.aggregate([("synapses", "sum")]).rename_columns(GROUP_SCHEMA.names)

    def synapses_by_class(self) -> dict[str, int]:
        """Number of synapses of each class, the most frequent class first; null is counted as `UNLABELLED`."""
        by_frequency = sorted(self._by_class().items(), key=lambda item: -item[1][0])
        return {name or UNLABELLED: synapses for name, (synapses, _) in by_frequency}

    def describe(self, classes: Sequence[str]) -> list[str]:
        """One line for the total, then one line for each class that occurs, in the order of `classes`."""
        labelled = self._groups.filter(pc.is_valid(self._groups["neurotransmitter"]))
        n_labelled = pc.sum(labelled["synapses"]).as_py() or 0
        n_neurons = pc.count_distinct(labelled["neuron_id"]).as_py()
        total = f"{self.synapses:,} synapses, {n_labelled:,} of them labelled"
        by_class = self._by_class()
        return [f"{total} ({_neurons(n_neurons)})" if n_neurons else total] + [
            f"{name or UNLABELLED}: {synapses:,} synapses{f' of {_neurons(neurons)}' if neurons else ''}"
            for name, (synapses, neurons) in ((name, by_class[name]) for name in [*classes, None] if name in by_class)
        ]

    def _by_class(self) -> dict[str | None, tuple[int, int]]:
        """Number of synapses and of known neurons of each class."""
        grouped = self._groups.group_by("neurotransmitter").aggregate([("synapses", "sum"), ("neuron_id", "count")])
        return {row["neurotransmitter"]: (row["synapses_sum"], row["neuron_id_count"]) for row in grouped.to_pylist()}


def _neurons(count: int) -> str:
    return f"{count:,} neuron{'s' * (count != 1)}"
