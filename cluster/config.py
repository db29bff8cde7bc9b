"""The one configuration tree, and its loader. The same file runs a laptop, a Ray cluster and a chart."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from cluster.core.config import ClassesConfig
from cluster.distributed.config import ParallelConfig
from cluster.errors import ConfigError
from cluster.gateway.config import GatewayConfig
from cluster.serve.config import LoggingConfig, ModelConfig, RayConfig

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_SIZE = r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B|B)?\s*"
# Sections that may be written as one word.
_WORDS: dict[type, dict[str, dict[str, str]]] = {ParallelConfig: {"auto": {"tp": "auto", "pp": "auto"}}}


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Everything that can be set.

    Attributes:
        models: what is served; at least one.
        classes: shares, targets and bounds of the priority classes, at gateways and in engines alike.
        gateway: where clients connect.
        ray: which Ray to run on.
        logging: structured logs.
    """

    models: tuple[ModelConfig, ...]
    classes: ClassesConfig = field(default_factory=ClassesConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("no model is configured; give at least one", field="models")
        names = [model.name for model in self.models]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise ConfigError(
                    f"models.{index}.name: two models are called {name!r}; give one another name",
                    field=f"models.{index}.name",
                )


def load_config(path: Path | str) -> ClusterConfig:
    """Reads a YAML file.

    Raises:
        ConfigError: the file cannot be read or something in it is wrong; every problem is listed with its path.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    try:
        return parse_config(tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", field=error.field) from error


def parse_config(tree: object) -> ClusterConfig:
    """The configuration of an untyped tree, as YAML or JSON give it. Sizes may be written like ``"2GiB"``, and
    ``parallel: auto`` stands for ``parallel: {tp: auto, pp: auto}``.

    Raises:
        ConfigError: something in it is wrong; every problem is listed with its path.
    """
    if not isinstance(tree, dict):
        raise ConfigError("the configuration must be a mapping that has at least 'models:'")
    try:
        return _adapter().validate_python(_written_out(ClusterConfig, tree))
    except ValidationError as error:
        problems: dict[str, str] = {}
        for detail in error.errors(include_url=False):
            path, problem = _problem(detail)
            problems.setdefault(path, problem)
        text = "; ".join(f"{path}: {problem}" for path, problem in problems.items())
        raise ConfigError(text, field=next(iter(problems))) from error


def effective_config(config: ClusterConfig) -> dict[str, Any]:
    """The tree with every default filled in, of plain types."""
    return typing.cast("dict[str, Any]", _adapter().dump_python(config, mode="json"))


def json_schema() -> dict[str, Any]:
    """The tree's JSON Schema; descriptions come from the dataclasses' docstrings."""
    schema = _adapter().json_schema()
    for cls in _dataclasses(ClusterConfig):
        node = schema if cls is ClusterConfig else schema["$defs"][cls.__name__]
        node["description"] = node["description"].partition("\n\nAttributes:")[0]
        descriptions = _attribute_docs(cls)
        for name, value in node["properties"].items():
            value["description"] = descriptions[name]
            if name.endswith("_bytes"):
                _allow_size(value)
        for name, hint in typing.get_type_hints(cls).items():
            for part in _named_dataclasses(hint):
                if part in _WORDS:
                    _allow_words(node["properties"][name], list(_WORDS[part]))
    return schema


def _dataclasses(cls: type) -> Iterator[type]:
    """The class and every dataclass that its fields name, each once."""
    seen: dict[type, None] = {}
    pending = [cls]
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen[current] = None
        for hint in typing.get_type_hints(current).values():
            pending += _named_dataclasses(hint)
    return iter(seen)


def _named_dataclasses(hint: Any) -> list[type]:
    """The dataclasses in a field's type, which is one, or a tuple of one."""
    parts = (hint, *typing.get_args(hint))
    return [part for part in parts if isinstance(part, type) and dataclasses.is_dataclass(part)]


@functools.cache
def _adapter() -> TypeAdapter[ClusterConfig]:
    # The owners' dataclasses are of the standard library: pydantic's settings are hung on them here.
    for cls in _dataclasses(ClusterConfig):
        cls.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    return TypeAdapter(ClusterConfig)


def _written_out(cls: type, tree: Any) -> Any:
    """A copy of the tree in which fields called ``*_bytes`` hold numbers, and sections that are one word what it stands
    for; what is out of place is left for pydantic.
    """
    if isinstance(tree, str):
        return _WORDS.get(cls, {}).get(tree, tree)
    if not isinstance(tree, dict):
        return tree
    hints = typing.get_type_hints(cls)
    result = {}
    for key, value in tree.items():
        if key in hints and key.endswith("_bytes") and isinstance(value, str):
            value = _size(value)
        for part in _named_dataclasses(hints.get(key)):
            if isinstance(value, list):
                value = [_written_out(part, item) for item in value]
            else:
                value = _written_out(part, value)
        result[key] = value
    return result


def _size(text: str) -> int | str:
    """Bytes of a text such as ``"512MiB"``, ``"2GB"`` or ``"4096"``; another text comes back as it is."""
    match = re.fullmatch(_SIZE, text)
    return text if match is None else int(float(match[1]) * _UNITS[match[2] or "B"])


def _problem(detail: Any) -> tuple[str, str]:
    """The path and the text of one of pydantic's findings."""
    location, kind, value = detail["loc"], detail["type"], detail["input"]
    path = ".".join(str(part) for part in location)
    if kind == "unexpected_keyword_argument":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return path, f"unknown key; {hint}"
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return ".".join(part for part in (path, cause.field) if part), cause.message
    if kind in ("missing", "missing_argument"):
        return path, "is required"
    if location[-1] in ("int", "literal['auto']"):  # pydantic's names for the two halves of a Size
        return path.rpartition(".")[0], f"must be a whole number or auto, not {value!r}"
    if path.endswith("_bytes"):
        return path, f"{value!r} is no size; write bytes, or a number with {', '.join(_UNITS)}"
    if kind == "tuple_type":
        return path, f"input should be a list, not {value!r}"
    return path, f"{detail['msg'][0].lower()}{detail['msg'][1:]}, not {value!r}"


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    cls: type = ClusterConfig
    for part in location:
        if isinstance(part, str):
            (cls,) = _named_dataclasses(typing.get_type_hints(cls)[part])
    return list(typing.get_type_hints(cls))


def _attribute_docs(cls: type) -> dict[str, str]:
    """Field descriptions from the docstring's ``Attributes:`` section."""
    section = inspect.getdoc(cls).partition("Attributes:\n")[2]  # type: ignore[union-attr]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _allow_words(node: dict[str, Any], words: list[str]) -> None:
    """Lets a section be written as one of the words, as the loader does."""
    node["anyOf"] = [{"$ref": node.pop("$ref")}, {"enum": words}]


def _allow_size(node: dict[str, Any]) -> None:
    """Lets a ``*_bytes`` field be written as a text with a unit, as the loader does."""
    alternatives = node.pop("anyOf", None) or [{"type": node.pop("type")}]
    node["anyOf"] = [*alternatives, {"type": "string", "pattern": f"^{_SIZE}$"}]
