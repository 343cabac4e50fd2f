"""The ledger: what crossed the wire, counted on the frames themselves."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass
class Entry:
    """Messages of one kind, in one direction, between the server and one site, in one round."""

    round: int
    site: str
    direction: str  # "up": site to server; "down": server to site
    kind: str
    messages: int = 0
    bytes: int = 0  # length of the frames
    payload: int = 0  # bytes of the tensors in them


class Ledger:
    """Counts frames; with a folder it also keeps each of them as it crossed."""

    def __init__(self, record_frames: Path | None = None) -> None:
        self._entries: dict[tuple[int, str, str, str], Entry] = {}
        self._folder = record_frames
        self._kept = 0

    def record(self, round: int, site: str, direction: str, kind: str, frame: bytes, payload: int) -> None:
        """Count one frame."""
        self.count(round, site, direction, kind, len(frame), payload)
        if self._folder:
            self._kept += 1
            name = f"{self._kept:06d}-round{round}-{direction}-{_safe(site)}-{_safe(kind)}.safetensors"
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / name).write_bytes(frame)

    def count(self, round: int, site: str, direction: str, kind: str, nbytes: int, payload: int) -> None:
        """Count a frame of that length."""
        key = (round, site, direction, kind)
        entry = self._entries.setdefault(key, Entry(*key))
        entry.messages += 1
        entry.bytes += nbytes
        entry.payload += payload

    def take_back(self, round: int, site: str, direction: str, kind: str, nbytes: int, payload: int) -> None:
        """Uncount a frame that was recorded and then could not leave."""
        entry = self._entries[round, site, direction, kind]
        entry.messages -= 1
        entry.bytes -= nbytes
        entry.payload -= payload
        if not entry.messages:
            del self._entries[round, site, direction, kind]

    def __iter__(self) -> Iterator[Entry]:
        """Entries in an order that does not depend on who answered first."""
        return iter(sorted(self._entries.values(), key=lambda e: (e.round, e.site, e.direction, e.kind)))

    def total(self, field: str, **where: object) -> int:
        """Sum of `messages`, `bytes` or `payload` over the entries whose fields equal `where`."""
        chosen = (e for e in self if all(getattr(e, name) == value for name, value in where.items()))
        return sum(getattr(entry, field) for entry in chosen)

    def by_kind(self) -> list[dict[str, str | int]]:
        """Totals for each direction and kind, over sites and rounds."""
        pairs = sorted({(e.direction, e.kind) for e in self}, key=lambda pair: (pair[0] != "up", pair[1]))
        return [
            {"direction": direction, "kind": kind}
            | {name: self.total(name, direction=direction, kind=kind) for name in ("messages", "bytes", "payload")}
            for direction, kind in pairs
        ]

    def saved(self) -> list[dict[str, Any]]:
        """All entries, for `restore`."""
        return [asdict(entry) for entry in self]

    def restore(self, saved: Iterable[Mapping[str, Any]]) -> None:
        """Go on counting from entries that were `saved`."""
        entries = (Entry(**entry) for entry in saved)
        self._entries = {(e.round, e.site, e.direction, e.kind): e for e in entries}
        self._kept = self.total("messages")

    def lines(self, **head: object) -> Iterator[str]:
        """One JSON line for each entry, led by `head` (which run it belongs to)."""
        for entry in self:
            yield json.dumps(head | asdict(entry))


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[:64]
