"""Frameworks, partitioners and codecs of your own, added from Python under names that configurations then may use.

They are known to the process that added them, and to those that it starts, as long as they are added where a script's
or module's imports run, not beneath `if __name__ == "__main__"`. Sites elsewhere know nothing of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from .codecs import Stage
from .codecs.parse import KINDS, Kind
from .data.partition import ADDED as PARTITIONERS
from .data.partition import PARAMETERS, Partitioner
from .errors import ConfigError
from .frameworks import ADDED as FRAMEWORKS
from .frameworks import FRAMEWORKS as BUILT_IN
from .frameworks.lab import Framework

CODECS = frozenset({"none", *KINDS})  # those that are built in


def framework(name: str, method: Framework) -> None:
    """`frameworks: [fedllm, <name>]` runs `method`, whose settings are those it was made with.

    Raises ConfigError for a name that is built in or can't be one.
    """
    _check(name, BUILT_IN)
    FRAMEWORKS[name] = method


def partitioner(name: str, deal: Partitioner) -> None:
    """`partition: {name: <name>}` deals by `deal(rows, clients, rng)`, which gives the indices of each client.

    What it gives must be a partition, and a pure function of its arguments. Raises ConfigError as `framework`.
    """
    _check(name, PARAMETERS)
    PARTITIONERS[name] = deal


def codec(
    name: str,
    make: Callable[..., Stage],
    about: str,
    number: str | None = None,
    words: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """`wire: {up: <name>}` encodes by the stage that `make()` gives.

    `number` names the argument that a number after a colon becomes, `words` the arguments that words stand for
    (`<name>:3:word`). Raises ConfigError as `framework`.
    """
    _check(name, CODECS)
    KINDS[name] = Kind(make, about, number, words or {})


def _check(name: str, taken: Collection[str]) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_-]{0,40}", name):
        raise ConfigError(f"{name!r} can't be a name: write small letters, digits, - and _, and a letter first")
    if name in taken:
        raise ConfigError(f"{name!r} is built in; choose another name")
