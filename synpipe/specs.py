"""Defines `Spec`, the base of all descriptions of what runs: frozen, validated, hashable objects read from YAML.

Input: a mapping from a YAML or JSON file. Output: a `Spec` (volume, tiles, encoder …). Guarantee: two specs with the same
meaning have the same `digest()`, on any machine and in any process, so the digest can serve as a cache key.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from synpipe.errors import SynpipeError, one_line

MAX_YAML_VALUES = 100_000  # after aliases are unfolded
MAX_YAML_DEPTH = 100
MAX_YAML_INT = 2**64
_TOO_LARGE = "a number is too large: numbers of more than 64 bits cannot be used"
_SHOWN_CHARACTERS = 60
_SURROGATE = re.compile(r"[\ud800-\udfff]")

# What a wrong value should be, by pydantic's types of errors. The braces hold what the type of error says about itself.
_EXPECTED = {
    "string_type": "text",
    "string_pattern_mismatch": "text of the form {pattern}",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of usual size",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list in square brackets",
    "list_type": "a list in square brackets",
    "dict_type": "a mapping (`key: value` lines)",
    "model_type": "a mapping (`key: value` lines)",
    "model_attributes_type": "a mapping (`key: value` lines)",
    "literal_error": "{expected}",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
}


class Spec(BaseModel):
    """A frozen description. Unknown keys are errors, and `digest()` covers every field."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(cls, mapping: Any, where: str) -> Self:
        """Build the spec from plain data. where: file and key, for the error message.

        Raises `SynpipeError` with a sentence on every wrong, missing or unknown key.
        """
        try:
            return cls.model_validate(mapping)
        except ValidationError as error:
            raise SynpipeError(f"{where}: {' '.join(_explain(error, mapping, cls))}") from None

    def digest(self) -> str:
        return digest(self.model_dump(mode="json"))


def digest(value: Any) -> str:
    """SHA-256, first 32 hex digits, of a JSON-able value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _explain(error: ValidationError, mapping: Any, model: type[Spec]) -> Iterable[str]:
    """A sentence on each wrong key: the key, what was found, and what is expected. mapping: what was to become a `model`."""
    sentences: dict[tuple[str, str], str] = {}
    for problem in error.errors(include_url=False):
        if problem["type"] == "too_short" and problem["ctx"]["min_length"] <= len(problem["input"]):
            continue  # pydantic counts the valid entries, and there is a sentence on each of the others
        key, kind, context = _key_of(problem, mapping), problem["type"], problem.get("ctx", {})
        found = _shown(problem["input"])
        if kind in ("extra_forbidden", "invalid_key"):
            known = _known_keys(model, problem["loc"][:-1])
            close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=2)
            hint = f": did you mean `{'` or `'.join(close)}`?" if close else "."
            sentence = f"{key} is not a known key{hint} Known keys: {', '.join(known)}."
        elif kind == "missing" and isinstance(problem["loc"][-1], int):
            sentence = f"{key} is required and missing: the list is too short."
        elif kind == "missing":
            sentence = f"{key} is required and missing."
        elif kind == "union_tag_not_found":
            sentence = f"{key} has no key {context['discriminator']}, which is required."
        elif kind == "union_tag_invalid":
            tag, name, tags = context["tag"], context["discriminator"], context["expected_tags"]
            sentence = f"{key} has {tag!r} as {name}, but it should be one of {tags}."
        elif kind == "value_error":
            sentence = f"{key}: {context['error']}."
        elif problem["loc"] and problem["loc"][-1] == "[key]":
            sentence = f"{key} has the key {found}, but its keys should be {_expected(problem)}."
        elif former := sentences.get((key, found)):  # another member of a union
            sentence = f"{former.removesuffix('.')} or {_expected(problem)}."
        else:
            sentence = f"{key} is {found}, but it should be {_expected(problem)}."
        sentences[key, found] = sentence
    return sentences.values()


def _key_of(problem: ErrorDetails, mapping: Any) -> str:
    """The place of a problem as the YAML file has it. Pydantic also names the members of unions on the way."""
    parts, here, last = list[str](), mapping, len(problem["loc"]) - 1
    for number, part in enumerate(problem["loc"]):
        try:
            here = here[part]
        except (KeyError, IndexError, TypeError):
            if number < last or problem["type"] not in ("missing", "extra_forbidden", "invalid_key"):
                continue
        parts.append(str(part))
    return f"`{'.'.join(parts)}`" if parts else "the whole entry"


def _shown(value: Any) -> str:
    """A value as an error message shows it: in the way of YAML, and short."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a mapping"
    text = repr(value) if isinstance(value, str | int | float | list | tuple) else str(value)
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    return f"a list of {len(value)}" if isinstance(value, list | tuple) else f"{text[:_SHOWN_CHARACTERS]}…"


def _expected(problem: ErrorDetails) -> str:
    template = _EXPECTED.get(problem["type"])
    if template is None:
        return problem["msg"].removeprefix("Input should be ")
    return template.format(**problem.get("ctx", {}))


def _known_keys(model: type[Spec], place: Sequence[str | int]) -> list[str]:
    """The keys that a mapping at this place of a spec may have."""
    models = [model]
    for part in place:
        if fields := [each.model_fields[part] for each in models if part in each.model_fields]:
            models = [inner for field in fields for inner in _specs_in(field.annotation)]
        elif isinstance(part, str):  # the member of a union whose discriminator has this value
            models = [each for each in models if any(part in _choices(each, name) for name in each.model_fields)]
    return list(dict.fromkeys(name for each in models for name in each.model_fields))


def _specs_in(annotation: Any) -> list[type[Spec]]:
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return [annotation]
    return [spec for argument in get_args(annotation) for spec in _specs_in(argument)]


def _choices(model: type[Spec], name: str) -> tuple[Any, ...]:
    annotation = model.model_fields[name].annotation
    return get_args(annotation) if get_origin(annotation) is Literal else ()


class _Loader(yaml.SafeLoader):
    """Refuses what the standard loader answers with other exceptions, or reads as something that cannot be used."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ValueError, KeyError, OverflowError) as error:  # such as a month 13
            if node.tag.endswith(":int"):  # Python refuses to read more than 4,300 digits
                raise _wrong(node, _TOO_LARGE) from None
            raise _wrong(node, f"a value cannot be used ({one_line(error)})") from None
        if isinstance(value, int) and abs(value) > MAX_YAML_INT:
            raise _wrong(node, _TOO_LARGE)
        if isinstance(value, str) and (_SURROGATE.search(value) or "\0" in value):
            raise _wrong(node, "a text has characters that no text may have")
        return value


def _wrong(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _measure(node: yaml.Node, measured: dict[yaml.Node, tuple[int, int] | None]) -> tuple[int, int]:
    """The number of values that a node unfolds to, and their depth. measured: nodes that are known; None for those around it.

    The standard loader silently keeps the last of two equal keys, and unfolds aliases of aliases without limit. This function
    raises `MarkedYAMLError` for both, for an alias that contains itself, and for a key that is not a single value.
    """
    if node in measured:
        if (known := measured[node]) is None:
            raise _wrong(node, "an alias refers to a value that contains the alias: write the value out")
        return known
    measured[node] = None
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        inner = [value for _, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        inner = node.value
    sizes = [_measure(each, measured) for each in inner]
    size, depth = 1 + sum(size for size, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
    if size > MAX_YAML_VALUES:
        raise _wrong(node, f"this holds more than {MAX_YAML_VALUES:,} values once its aliases (`*name`) are unfolded")
    if depth > MAX_YAML_DEPTH:
        raise _wrong(node, f"values are nested more than {MAX_YAML_DEPTH} deep")
    measured[node] = size, depth
    return size, depth


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set[tuple[str, str]]()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _wrong(key, "a key is a list or a mapping: write a single word before the colon")
        if (key.tag, key.value) in seen:
            raise _wrong(key, f"the key {key.value!r} appears twice")
        seen.add((key.tag, key.value))


def read_yaml(path: Path) -> Mapping[str, Any]:
    """Read a YAML file whose top level is a mapping. Raises `SynpipeError`, which names the file and the line."""
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        content = _load(text)
    except FileNotFoundError:
        raise SynpipeError(f"{path} does not exist.") from None
    except OSError as error:
        raise SynpipeError(f"{path} cannot be read: {error.strerror}.") from None
    except RecursionError:
        raise SynpipeError(f"{path} is not valid YAML: values are nested more than {MAX_YAML_DEPTH} deep.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        hint = ""
        if "{{" in text:
            hint = " Placeholders such as {{ name }} are not filled in: write the value, or ${VARIABLE:-default}."
        raise SynpipeError(f"{path} is not valid YAML: {_describe(error)}.{hint}") from None
    if not isinstance(content, Mapping):
        raise SynpipeError(f"{path} must hold a mapping at the top level (`key: value` lines).")
    return content


def _describe(error: Exception) -> str:
    """The place in the file and the problem, in one line."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return one_line(error)
    place = f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
    return f"{place}: {f'{error.context}, ' if error.context else ''}{error.problem}"


def _load(text: str) -> Any:
    """The content of a YAML document. Raises `YAMLError`, or `RecursionError` where values are nested deeply."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()
