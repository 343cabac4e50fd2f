"""What a check found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Finding:
    """What one check found; `code` is the exit code of a fault."""

    check: str
    state: Literal["ok", "warning", "fault"]
    text: str
    code: int = 0

    def line(self) -> str:
        """For people."""
        return f"{self.state:<8} {self.check:<13} {self.text}"

    def facts(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


Found = Iterator[Finding]


@dataclass(frozen=True)
class Size:
    """In bytes: what is to be downloaded, the adapter, and (modelled) what a process that trains takes."""

    download: int
    adapter: int
    memory: int


@dataclass
class Seen:
    """What one check learnt and another needs; `sites` are those that this machine holds."""

    task: Literal["classification", "causal-lm"] = "classification"
    labels: int = 2
    sites: int = 1
    size: Size | None = None
