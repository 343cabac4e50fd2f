"""fedtrio: federated fine-tuning of language models in three ways, side by side.

>>> from fedtrio import Config, compare, run
>>> results = compare(Config(rounds=2), out="runs/mine")  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compare import compare
    from .config import Config
    from .config_file import load_config
    from .errors import FedtrioError
    from .run import run

__all__ = ["Config", "FedtrioError", "compare", "load_config", "run"]
__version__ = "0.1.0"

_HOMES = {
    "compare": "compare",
    "Config": "config",
    "load_config": "config_file",
    "FedtrioError": "errors",
    "run": "run",
}


def __getattr__(name: str) -> Any:
    """Import late: torch takes seconds, and `fedtrio --help` needs none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fedtrio' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value  # also where a submodule of the same name has meanwhile taken its place
    return value
