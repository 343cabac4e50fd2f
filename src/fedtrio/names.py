"""Names that a setting takes: those that are built in, and those that a user has added."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import PlainSerializer, WrapValidator


def or_added(added: Mapping[str, Any]) -> tuple[WrapValidator, PlainSerializer]:
    """Beside a Literal in an Annotated: what was added is as good as what the Literal lists."""

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        return value if isinstance(value, str) and value in added else handler(value)

    return WrapValidator(check), PlainSerializer(str, return_type=str)
