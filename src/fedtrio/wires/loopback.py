"""The in-process wire: sites are objects of this process and answer one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol


class Answers(Protocol):
    """A site, as far as a wire knows it."""

    def answer(self, frame: bytes) -> bytes:
        """The site's next frame."""
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

    def exchange(self, frames: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
        """Deliver each frame and yield each answer."""
        for site, frame in frames:
            yield site, self._sites[site].answer(frame)

    def close(self) -> None:
        """Nothing to close."""
