"""The HTTPS wire to sites that a Flower message calls to it, each with a certificate and a token for one hello."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .flower import Flower
from .https import Https

CALL_S = 120.0  # for a call and its answer, which comes once the site is connected


class Invited:
    """A round's turns go over HTTPS; who is not there when it starts is called by a Flower message.

    `url` is the address that the sites dial, `folder` holds the server's certificates for it, and `credential(site)`
    gives the texts of a new `ca.pem`, `cert.pem` and `key.pem`. Who is admitted, what they are told, limits and events
    are those of the Flower wire.
    """

    abreast = None

    def __init__(
        self,
        flower: Flower,
        url: str,
        folder: Path,
        credential: Callable[[str], Mapping[str, str]],
        host: str,
        port: int,
    ) -> None:
        self._flower, self._url, self._credential = flower, url, credential
        self._tokens: dict[str, str] = {}
        limit, on_event = flower.limit, flower.on_event
        self._https = Https(folder, flower.sites, self._admit, host=host, port=port, limit=limit, on_event=on_event)

    def _admit(self, site: str, greeting: dict[str, Any]) -> Any:
        """A token is good for one hello. ValueError."""
        token = greeting.pop("token", None)
        if not isinstance(token, str) or not token or not secrets.compare_digest(token, self._tokens.pop(site, "")):
            raise ValueError("its token is not the one that it was called with, or was used before")
        return self._flower.welcome(site, greeting)

    @property
    def sites(self) -> list[str]:
        """Names of the sites that are admitted, sorted."""
        return self._https.sites

    def start_round(self, run: str, round: int, deadline: float | None) -> None:
        """Call whoever is not there, and begin."""
        self._call(min(deadline or CALL_S, CALL_S))
        self._https.start_round(run, round, deadline)

    def wait_for(self, number: int, timeout: float | None = None) -> list[str]:
        """Call whoever is not there once they are online again; WireError after `timeout` seconds."""
        self._flower.wait_for(number, timeout)
        self._call(CALL_S)
        return self._https.wait_for(number, timeout)

    def _call(self, seconds: float) -> None:
        questions = {}
        for site in sorted(set(self.sites) - set(self._https.wait_for(0))):
            self._tokens[site] = secrets.token_hex(32)
            head = {"ask": "dial", "url": self._url, "token": self._tokens[site]}
            questions[site] = head, json.dumps(dict(self._credential(site))).encode()
        if questions:
            self._flower.call(questions, seconds)

    def exchange(self, frames: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, bytes | None]]:
        """As `Https`."""
        return self._https.exchange(frames)

    def refuse(self, site: str, reason: str) -> None:
        """As `Https`."""
        self._https.refuse(site, reason)

    def close(self) -> None:
        """All is over on this wire: the sites go back to waiting for messages."""
        self._https.finish()
