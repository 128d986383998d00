"""Run the command `synpipe` in the test process, which saves each call several seconds of imports."""

import json
import re
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from synpipe.cli import main
from synpipe.datasets import Project

PROGRESS = re.compile(r"\d\d:\d\d:\d\d  ")


def invoke(project: Project, *arguments: str, **environment: str | None) -> Result:
    """Run the command on `project`. Exceptions that the command does not turn into a message are raised."""
    places = {"SYNPIPE_DATA": str(project.data), "SYNPIPE_STORE": str(project.store), "DAGSTER_HOME": None}
    result = CliRunner().invoke(main, arguments, env=places | environment)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def answer(project: Project, *arguments: str) -> str:
    """Run a command that must succeed, and return its standard output."""
    result = invoke(project, *arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def refusal(result: Any) -> str:
    """Return the message of a command that must have failed with one paragraph on standard error and no traceback."""
    code = result.exit_code if isinstance(result, Result) else result.returncode
    said = [line for line in result.stderr.splitlines() if not PROGRESS.match(line)]
    assert code == 1, (code, result.stdout, result.stderr)
    assert len(said) == 1, result.stderr
    assert said[0].startswith("Error: "), result.stderr
    return said[0]


def assets(project: Project, dataset: str = "demo") -> dict[str, dict[str, Any]]:
    """Return what `synpipe status` reports, by asset."""
    return json.loads(answer(project, "status", "--dataset", dataset, "--json"))["assets"]


def versions(project: Project, dataset: str = "demo") -> dict[str, str]:
    """Return the data version of each asset that has been made."""
    return {asset: said["made"]["data_version"] for asset, said in assets(project, dataset).items() if said["made"]}


def runs(project: Project, dataset: str = "demo") -> dict[str, str]:
    """Return the id of the run that made each asset."""
    return {asset: said["made"]["run_id"] for asset, said in assets(project, dataset).items() if said["made"]}


def files(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below `folder`, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
