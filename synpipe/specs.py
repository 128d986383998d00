"""Descriptions of what runs: frozen, validated, hashable objects that are read from YAML.

In: a mapping from a YAML or JSON file. Out: a `Spec` (volume, tiles, encoder …). Guarantee: two specs with the same
meaning have the same `digest()`, on any machine and in any process, so that the digest can be a cache key.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from synpipe.errors import SynpipeError


class Spec(BaseModel):
    """A frozen description. Unknown keys are errors; `digest()` covers every field."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(cls, mapping: Any, where: str) -> Self:
        """Build the spec from plain data; `where` names the file and key in the error.

        Raises `SynpipeError` that lists every wrong, missing or unknown key.
        """
        try:
            return cls.model_validate(mapping)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(str(part) for part in problem['loc']) or 'the whole entry'}: {problem['msg']}"
                for problem in error.errors()
            )
            known = ", ".join(cls.model_fields)
            raise SynpipeError(f"{where}: {problems}. Known keys: {known}.") from None

    def digest(self) -> str:
        return digest(self.model_dump(mode="json"))


def digest(value: Any) -> str:
    """SHA-256 (first 32 hex digits) of a JSON-able value in canonical form: sorted keys, no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def read_yaml(path: Path) -> Mapping[str, Any]:
    """Read a YAML file whose top level is a mapping. Raises `SynpipeError` naming the file and the line."""
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise SynpipeError(f"{path} does not exist.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SynpipeError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, Mapping):
        raise SynpipeError(f"{path} must hold a mapping at the top level (`key: value` lines).")
    return content
