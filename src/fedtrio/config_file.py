"""Configurations from files: YAML, `--set`, and faults with the file and line they stand in."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from .config import Config, SiteConfig
from .errors import ConfigError, did_you_mean

MAX_CONFIG_BYTES = 1_000_000
DEMO = Path(__file__).parent / "data" / "demo" / "config.yaml"
PLAIN = Path(os.devnull)  # no file at all: each key's own default

Loaded = TypeVar("Loaded", Config, SiteConfig)


def load_config(path: Path | None = None, settings: Sequence[str] = ()) -> Config:
    """Read a YAML file, or the embedded default, and apply `key.sub=value` settings over it.

    Raises ConfigError, with file and line, for what is unknown (with the near name), mistyped or out of range.
    """
    base = Path.cwd() if path is None else path.parent.resolve()
    return _load(Config, path or DEMO, base, settings)


def load_site_config(path: Path, settings: Sequence[str] = ()) -> SiteConfig:
    """Read a site's YAML file. Raises ConfigError as `load_config` does."""
    return _load(SiteConfig, path, path.parent.resolve(), settings)


def _load(kind: type[Loaded], path: Path, base: Path, settings: Sequence[str]) -> Loaded:
    text = _read(path)
    try:
        tree = yaml.load(text, Loader=_PlainLoader)
    except Exception as error:  # tags whose values do not fit make PyYAML fail in many ways
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not a plain YAML file: {_problem(error)}") from error
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of keys to values")
    given = [_set(tree, setting) for setting in settings]
    try:
        config = kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(kind, error, path, text, given)) from error
    config._base = base
    return config


class _PlainLoader(yaml.SafeLoader):
    """Safe YAML without aliases, which could make a small file explode, and without a key that occurs twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed in a configuration")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: dict[tuple[str, str], int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if name in seen:
                problem = f"the key {key.value!r} occurs twice, first in line {seen[name]}; keep one of them"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen[name] = line
        return super().construct_mapping(node, deep)


def _problem(error: Exception) -> str:
    """What a YAML error says, in one line."""
    if isinstance(error, RecursionError):
        return "lists or mappings stand within each other hundreds of times"
    if not isinstance(error, yaml.YAMLError | ValueError):
        return "a value does not fit its tag (!!name)"
    return " ".join(str(getattr(error, "problem", None) or error).split())


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        near = [p.name for p in path.parent.glob("*.y*ml")] if os.path.isdir(path.parent) else []
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: {why}{did_you_mean(path.name, near)}") from error
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: a configuration has at most {MAX_CONFIG_BYTES} bytes")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start})") from error


def _set(tree: dict[str, Any], setting: str) -> tuple[str, ...]:
    """Apply one `a.b=value`; the value is YAML. The path that was set."""
    key, equals, value = setting.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {setting!r}: write key=value, for example --set lora.r=16")
    path = tuple(key.strip().split("."))
    if any("\ud800" <= letter <= "\udfff" for letter in setting):
        raise ConfigError(
            f"--set {key.strip()}: the value is not in this terminal's encoding ({sys.getfilesystemencoding()}); "
            "set LC_ALL=C.UTF-8, or write the value into a configuration file in UTF-8"
        )
    try:
        parsed = yaml.load(value, Loader=_PlainLoader)
    except Exception as error:  # tags whose values do not fit make PyYAML fail in many ways
        raise ConfigError(f"--set {setting!r:.120}: the value is not YAML: {_problem(error)}") from error
    node: Any = tree
    for part in path[:-1]:
        child = node.get(part)
        node[part] = child if isinstance(child, dict) else {}
        node = node[part]
    if path == ("partition", "name") and node.get("name") != parsed:
        node.clear()  # another partitioner has other parameters
    node[path[-1]] = parsed
    return path


def _explain(
    kind: type[BaseModel], error: ValidationError, path: Path, text: str, given: Iterable[tuple[str, ...]]
) -> str:
    """The first fault in one line: where, what, what would be right; and how many more there are."""
    faults = error.errors()
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    loc = tuple(str(part) for part in fault["loc"])
    name = ".".join(loc)
    if fault["type"] == "extra_forbidden":
        known = _keys_beside(kind, loc)
        what = f"{name} is no setting{did_you_mean(loc[-1], known)}" + (
            f" (known: {', '.join(known)})" if known else ""
        )
    else:
        shown = re.sub(r"^(Value error|Assertion failed), ", "", fault["msg"])
        near = did_you_mean(str(fault["input"]), re.findall("'([^']+)'", fault.get("ctx", {}).get("expected", "")))
        section = isinstance(fault["input"], dict) and fault["type"] == "value_error"  # its words name the keys
        got = "" if section else f", got {fault['input']!r:.80}{near}"
        what = f"{name}: {shown}{got}" if name else shown
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{_blamed(path, text, loc, given)}: {what}{more}"


def _blamed(path: Path, text: str, loc: tuple[str, ...], given: Iterable[tuple[str, ...]]) -> str:
    """Where a faulty key or section was written: on the command line, in a line of the file, or in both."""
    line, depth = _line_of(text, loc)
    if any(loc[: len(p)] == p for p in given) or path in (DEMO, PLAIN):
        return "--set"
    beneath = [".".join(p) for p in given if p[: len(loc)] == loc]
    if beneath and depth < len(loc):
        return "--set"
    return f"{path}:{line}" + (f" with --set {beneath[-1]}" if beneath else "")


def _keys_beside(kind: Any, loc: tuple[str, ...]) -> list[str]:
    for part in loc[:-1]:
        field = kind.model_fields.get(part)
        options = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        kind = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if kind is None:
            return []
    return list(kind.model_fields)


def _line_of(text: str, loc: tuple[str, ...]) -> tuple[int, int]:
    """The line (from 1) on which a key, or the nearest key above it, stands; and how many parts of `loc` do."""
    node, line = yaml.compose(text, Loader=yaml.SafeLoader), 1
    for depth, part in enumerate(loc):
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        pair = next(((k, v) for k, v in pairs if k.value == part), None)
        if pair is None:
            return line, depth
        line, node = pair[0].start_mark.line + 1, pair[1]
    return line, len(loc)
