"""The in-process wire: sites are objects of this process and answer one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol


class Answers(Protocol):
    """A site, as far as a wire knows it."""

    def answer(self, frame: bytes) -> bytes:
        """The site's next frame."""
        ...

    def reset(self) -> None:
        """A round starts: forget an open dialogue."""
        ...


class Loopback:
    """Frames go to each site in turn, and its answer comes back before the next site is asked."""

    abreast = 1  # sites that work at the same time

    def __init__(self, sites: Mapping[str, Answers]) -> None:
        self._sites = dict(sites)

    @property
    def sites(self) -> list[str]:
        """Names of the sites that can be reached, sorted."""
        return sorted(self._sites)

    def start_round(self, run: str, round: int, deadline: float | None) -> None:
        """Sites of one process are never late."""
        for site in self._sites.values():
            site.reset()

    def exchange(self, frames: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
        """Deliver each frame and yield each answer."""
        for site, frame in frames:
            yield site, self._sites[site].answer(frame)

    def wait_for(self, number: int, timeout: float | None) -> list[str]:
        """All sites are always there."""
        return self.sites

    def refuse(self, site: str, reason: str) -> None:
        """Nobody needs to be told."""

    def close(self) -> None:
        """Nothing to close."""
