"""How many synapses and neurons a data set has of each class, as SynOminous printed them.

In: synapses, a part at a time. Out: counts, and sentences for the user. Guarantee: a neuron counts once in each class that
its synapses have, however they are spread over the parts; memory grows with the number of neurons, not of synapses.
"""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

KEYS = ["neurotransmitter", "neuron_id"]
SCHEMA = pa.schema([(KEYS[0], pa.string()), (KEYS[1], pa.int64()), ("synapses", pa.int64())])


class Census:
    """synapses: how many were added."""

    def __init__(self) -> None:
        self.synapses = 0
        self._groups = SCHEMA.empty_table()  # one row per class and neuron; null is a value as any other

    def add(self, synapses: pa.Table) -> None:
        self.synapses += len(synapses)
        new = synapses.group_by(KEYS).aggregate([([], "count_all")]).rename_columns(SCHEMA.names)
        both = pa.concat_tables([self._groups, new])
        self._groups = both.group_by(KEYS).aggregate([("synapses", "sum")]).rename_columns(SCHEMA.names)

    def classes(self) -> dict[str, int]:
        """Synapses by class, the most frequent first; without one they count as `unlabelled`."""
        counted = sorted(self._by_class().items(), key=lambda item: -item[1][0])
        return {name or "unlabelled": synapses for name, (synapses, _) in counted}

    def notes(self, classes: Sequence[str]) -> list[str]:
        """A line in total and one per class that occurs, in the order of `classes`."""
        labelled = self._groups.filter(pc.is_valid(self._groups["neurotransmitter"]))
        total = pc.sum(labelled["synapses"]).as_py() or 0
        neurons = pc.count_distinct(labelled["neuron_id"]).as_py()
        counts = self._by_class()
        return [f"{self.synapses:,} synapses, {total:,} of them labelled{_of(neurons)}"] + [
            f"{name or 'unlabelled'}: {counts[name][0]:,} synapses{_of(counts[name][1])}"
            for name in [*classes, None]
            if name in counts
        ]

    def _by_class(self) -> dict[str | None, tuple[int, int]]:
        """Synapses and known neurons of each class."""
        grouped = self._groups.group_by("neurotransmitter").aggregate([("synapses", "sum"), ("neuron_id", "count")])
        return {row["neurotransmitter"]: (row["synapses_sum"], row["neuron_id_count"]) for row in grouped.to_pylist()}


def _of(neurons: int) -> str:
    return f" of {neurons:,} neuron{'s' * (neurons != 1)}" if neurons else ""
