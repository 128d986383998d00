"""Defines `Spec`, the base of all descriptions of what runs: frozen, validated, hashable objects read from YAML.

Input: a mapping from a YAML or JSON file. Output: a `Spec` (volume, tiles, encoder …). Guarantee: two specs with the same
meaning have the same `digest()`, on any machine and in any process, so the digest can serve as a cache key.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from synpipe.errors import SynpipeError, one_line


class Spec(BaseModel):
    """A frozen description. Unknown keys are errors, and `digest()` covers every field."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(cls, mapping: Any, where: str) -> Self:
        """Build the spec from plain data. where: file and key, for the error message.

        Raises `SynpipeError`, which lists every wrong, missing or unknown key.
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
    """SHA-256, first 32 hex digits, of a JSON-able value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class _Loader(yaml.SafeLoader):
    """Refuses repeated keys. The standard loader silently keeps the last of two entries."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} appears twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Mapping[str, Any]:
    """Read a YAML file whose top level is a mapping. Raises `SynpipeError`, which names the file and the line."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise SynpipeError(f"{path} does not exist.") from None
    except OSError as error:
        raise SynpipeError(f"{path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SynpipeError(f"{path} is not valid YAML: {one_line(error)}") from None
    if not isinstance(content, Mapping):
        raise SynpipeError(f"{path} must hold a mapping at the top level (`key: value` lines).")
    return content
