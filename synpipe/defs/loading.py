"""Which data sets of a project can be loaded, and what is wrong with the others."""

from synpipe.datasets import Dataset, Project
from synpipe.errors import SynpipeError


def load_datasets(project: Project) -> tuple[list[Dataset], dict[str, str]]:
    """The data sets whose YAML files are right, and what is wrong with each of the others, by name."""
    datasets, problems = [], {}
    for name in project.dataset_names():
        try:
            datasets.append(project.dataset(name))
        except SynpipeError as error:
            problems[name] = str(error)
    return datasets, problems


def explain_absence(dataset: Dataset) -> str | None:
    """A sentence for people if source files of the data set do not exist; else None."""
    missing = dataset.missing_sources()
    if not missing:
        return None
    files = ", ".join(map(str, missing))
    return (
        f"Nothing can be made yet. These files do not exist: {files}. Put them there, or correct {dataset.name}.yaml."
    )
