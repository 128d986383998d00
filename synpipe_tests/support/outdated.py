"""Bring a data set up to date in this process, without Dagster."""

from synpipe.assets.graph import nodes, states
from synpipe.datasets import Dataset


def make_outdated(dataset: Dataset) -> set[str]:
    """Make every asset that is stale or missing; returns their names."""
    outdated = {state.asset for state in states(dataset) if state.state != "fresh"}
    for node in nodes(dataset):
        if node.name in outdated:
            node.run(lambda line: None)
    return outdated
