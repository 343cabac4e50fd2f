"""Write docs/configuration.md from the pydantic models; with --check only say whether it is up to date.

python tools/configuration_page.py [--check]
"""

from __future__ import annotations

import argparse
import re
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedtrio.config import Config
from fedtrio.data.partition import PARAMETERS

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"
POWERS = {2**63: "2^63", 2**64: "2^64"}

HEAD = """# Configuration

<!-- Made by `python tools/configuration_page.py`. Change the models in src/fedtrio, not this page. -->

A configuration is one YAML file. Every key has a default; an unknown key is an error that names the nearest known one.

```
fedtrio compare configs/banking77.yaml --set rounds=8 --set lora.r=16
```

- `--set key.sub=value` overrides the file; the value is YAML, so `[fedllm, split]`, `null` and `1e-3` mean what they
  mean in the file.
- Relative paths start from the folder of the file.
- A run folder holds `config.yaml`, in which every default and every `auto` is written out; it is itself a valid input.
- In Python the same names are keys: `Config.model_validate({"rounds": 8, "lora": {"r": 16}})`.
"""

PARTITIONS = """
Which parameters a partition takes, beside `name`; another's parameter is an error:

| name | parameters |
|-|-|
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD, "\n## Top level\n", *_table("", Config)]
    for name, field in Config.model_fields.items():
        if model := _model(field.annotation):
            parts.append(f"\n## `{name}`\n")
            if model.__doc__:
                parts.append("\n" + " ".join(model.__doc__.split()) + "\n")
            parts += _table(f"{name}.", model)
            if name == "partition":
                parts.append(PARTITIONS)
                parts += [
                    f"| `{p}` | {', '.join(f'`{k}`' for k in sorted(keys))} |\n" for p, keys in PARAMETERS.items()
                ]
    return "".join(parts)


def _table(prefix: str, model: type[BaseModel]) -> Iterator[str]:
    if not model.model_fields:
        yield "\nNo keys: `{}`.\n"
        return
    yield "\n| key | type | default | |\n|-|-|-|-|\n"
    for name, field in model.model_fields.items():
        section = _model(field.annotation)
        kind = f"[section](#{name})" if section else _type(field)
        default = (
            "" if section and field.default_factory else f"`{_yaml(field.get_default(call_default_factory=True))}`"
        )
        yield f"| `{prefix}{name}` | {kind} | {default} | {_cell(field.description or '')} |\n"


def _model(annotation: Any) -> type[BaseModel] | None:
    """The model behind a section, also where the section may be null."""
    options = [annotation, *get_args(annotation)]
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _type(field: FieldInfo) -> str:
    """Type and bounds, for instance "integer ≥ 1, or null"."""
    options = [o for o in _options(field.annotation) if o is not type(None)]
    words = " or ".join(_named(option) for option in options) + _bounds(field.metadata)
    if any(isinstance(m, MinLen) for m in field.metadata):
        words += ", not empty"
    return words + (", or null" if type(None) in _options(field.annotation) else "")


def _bounds(metadata: Iterable[Any]) -> str:
    signs = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}
    inner = [m for outer in metadata for m in (outer.metadata if isinstance(outer, FieldInfo) else [outer])]
    known = [(signs[type(m)][0], getattr(m, signs[type(m)][1])) for m in inner if type(m) in signs]
    shown = [f"{sign} {POWERS.get(value) or format(value, 'g')}" for sign, value in known]
    return f" {', '.join(shown)}" if shown else ""


def _options(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _named(annotation: Any) -> str:
    plain = {str: "text", int: "integer", float: "number", bool: "true or false"}
    if annotation in plain:
        return plain[annotation]
    args = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _named(args[0]) + _bounds(args[1:])
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if get_origin(annotation) is list:
        return "list of " + re.sub("^(text|integer|number)", r"\1s", _named(args[0]))
    if get_origin(annotation) is dict:
        return f"mapping from {_named(args[0])} to {_named(args[1])}"
    raise TypeError(f"no words for the type {annotation}")


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> int:
    """Write or check; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the page is stale")
    wanted = page()
    if not parser.parse_args().check:
        PAGE.write_text(wanted, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == wanted:
        return 0
    print(f"docs/{PAGE.name} is stale: run python tools/configuration_page.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
