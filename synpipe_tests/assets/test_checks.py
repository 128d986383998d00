"""The share of rejects as a check: a run in which too much is lost fails, names the reasons, and stops nothing else."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from synpipe.assets.rejects import are_few
from synpipe.datasets import DatasetSpec, Project
from synpipe.errors import SynpipeError
from synpipe_tests.conftest import write_project
from synpipe_tests.support.command import assets, invoke, refusal, runs
from synpipe_tests.volumes.test_sources import write_n5

# Of 20 synapses one has no coordinate and two lie on a black section.
SECTIONS = [1] * 17 + [4] * 2


@pytest.fixture
def project(tmp_path: Path) -> Project:
    grey = np.random.default_rng(0).integers(1, 256, (6, 300, 300), dtype=np.uint8)
    grey[4] = 0
    write_n5(tmp_path / "volume", grey, resolution=(4, 4, 40), offset=(0, 0, 0))
    rows = [f"{number},{600 + number},600,{z * 40 + 20}" for number, z in enumerate(SECTIONS, start=1)]
    (tmp_path / "synapses.csv").write_text("\n".join(["synapse_id,x,y,z", *rows, "20,,600,60"]))
    return write_project(
        tmp_path,
        synthetic=None,
        volume={"path": f"n5://{tmp_path}/volume"},
        annotations=[{"format": "table", "path": f"{tmp_path}/synapses.csv"}],
    )


def change(project: Project, **changes: Any) -> None:
    path = project.data / "datasets" / "demo.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


def test_too_many_rejects_fail_the_run_and_nothing_else(project: Project) -> None:
    """Until they are fewer, or the YAML file says that so many are right: then only the check is made again."""
    everything = ("materialize", "-s", "+rejects", "-s", "+rgb_tiles")
    message = refusal(invoke(project, *everything))
    for words in (
        "demo/rejects",
        "3 of 20 synapses",
        "15.00%",
        "5.00% are allowed",
        "2 blank_section, 1 missing_coordinate",
    ):
        assert words in message
    assert "max_reject_share" in message and str(project.dataset("demo").rejects_path) in message
    state = assets(project)
    assert state["rgb_tiles"]["state"] == "fresh" and state["rgb_tiles"]["made"]["rows"] == 17
    assert state["rejects"]["state"] == "stale" and "are_few has not passed" in state["rejects"]["reasons"][0]
    assert state["rejects"]["made"]["figures"]["share"] == 0.15
    before = runs(project)

    change(project, max_reject_share=0.15)
    assert invoke(project, *everything[:3]).exit_code == 0
    state = assets(project)
    assert state["rejects"]["state"] == "fresh"
    change(project, max_reject_share=0.1)  # a stricter threshold counts at once
    assert assets(project)["rejects"]["state"] == "stale"
    assert runs(project)["rgb_tiles"] == before["rgb_tiles"]


def test_the_check_tells_the_share_and_the_reasons(project: Project) -> None:
    change(project, max_reject_share=1)
    assert invoke(project, "materialize", "-s", "+rejects").exit_code == 0
    found = are_few(project.dataset("demo"), "")
    assert found.passed
    assert found.figures == {"share": 0.15, "allowed": 1, "blank_section": 2, "missing_coordinate": 1}


@pytest.mark.parametrize("share", [-0.01, 1.01, "nan", "many"])
def test_shares_that_make_no_sense(project: Project, share: Any) -> None:
    change(project, max_reject_share=share)
    with pytest.raises(SynpipeError, match=r"demo\.yaml: `max_reject_share` is"):
        project.dataset("demo")


def test_the_default_is_one_in_twenty() -> None:
    assert DatasetSpec.model_fields["max_reject_share"].default == 0.05
