"""The site's end of the HTTPS wire: dial out, post each answer, get the next frame, until all is over."""

from __future__ import annotations

import io
import json
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import httpx

from ..errors import ConfigError, WireError
from . import tls

LONG_POLL_S = 20.0  # the server answers a poll within this time
PIECE_BYTES = 1 << 20
WORDS_BYTES = 1 << 16  # of a refusal


class Door(Protocol):
    """What stands behind the wire at a site."""

    def greeting(self) -> dict:
        """What the site says of itself in its hello: a small JSON object."""
        ...

    def welcome(self, settings: dict) -> None:
        """Take what the server's `welcome` returned; may raise."""
        ...

    def regain(self, session: str) -> tuple[int, bytes] | None:
        """After a restart: the turn and answer regained for that session of the server, or None."""
        ...

    def answer(self, session: str, run: str, round: int, turn: int, start: bool, frame: bytes) -> bytes:
        """Go on with the dialogue; `start` says that the frame is the first of its round."""
        ...


class _Answer(NamedTuple):
    status: int
    headers: httpx.Headers
    body: bytes


class _Refused(Exception):
    """The server's {error, reason}."""

    def __init__(self, error: str, reason: str) -> None:
        super().__init__(reason)
        self.error, self.reason = error, reason


def dial(
    url: str,
    folder: Path,
    door: Door,
    *,
    limit: int = 1 << 30,
    patience: float = 60.0,
    on_event: Callable[[dict], None] = lambda event: None,
) -> None:
    """Serve the server at `url` until it says that all is over.

    `folder` holds this site's certificates, `limit` is the longest frame in bytes. Where the connection fails, or the
    server is started anew, the site tries again for `patience` seconds. The usual proxy variables are heeded.
    `on_event` is called from any thread and gets {"event", "reason"}. ConfigError where URL or certificates can't be
    used; WireError where the server can't be reached, refuses, or ends with an error. What the door raises passes.
    """
    try:
        named = url.startswith("https://") and bool(httpx.URL(url).host)
    except httpx.InvalidURL:
        named = False
    if not named:
        raise ConfigError(f"{url!r:.200} is no address of a server; write https://host:8443")
    with _Line(url.rstrip("/"), tls.site_context(folder), door, limit, patience, on_event) as line:
        line.serve()


class _Line:
    """One process of a site at the wire."""

    def __init__(
        self, url: str, context: Any, door: Door, limit: int, patience: float, on_event: Callable[[dict], None]
    ) -> None:
        self._door, self._limit, self._patience, self._on_event = door, limit, patience, on_event
        self._client = httpx.Client(
            base_url=url,
            verify=context,
            headers={"Accept-Encoding": "identity", "User-Agent": "fedtrio"},
            timeout=httpx.Timeout(connect=10.0, read=2 * LONG_POLL_S, write=30.0, pool=None),
            limits=httpx.Limits(max_connections=4, max_keepalive_connections=4, keepalive_expiry=30.0),
        )
        self._id = secrets.token_hex(16)
        self._session, self._turn, self._answer = "", -1, b""
        self._place: tuple[str, int] | None = None  # run and round
        self._server_limit = limit
        self._beat = 5.0
        self._over: str | None = None  # as a beat heard it
        self._closed = False
        self._rhythm = threading.Event()  # set when there is a new one
        self._beats = threading.Thread(target=self._keep_beating, name="fedtrio-beat", daemon=True)

    def __enter__(self) -> _Line:
        self._beats.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._rhythm.set()
        self._beats.join()
        self._client.close()

    def serve(self) -> None:
        self._greet()
        while self._over is None:
            try:
                answer = self._post("/v1/turn", {"Fedtrio-Turn": str(self._turn)}, self._answer)
            except _Refused as refused:
                self._heed(refused)
                continue
            self._answer = b""  # it has arrived
            if answer.status == 200:
                self._work(answer)
        if self._over:
            raise WireError(f"the server ended with an error: {self._over}")

    def _greet(self) -> None:
        """Say hello, and take up what the server says of the session."""
        hello = json.dumps({"site_id": self._id, "greeting": self._door.greeting()}).encode()
        try:
            said = _json(self._post("/v1/hello", {"Content-Type": "application/json"}, hello).body)
        except _Refused as refused:
            if refused.error == "finished":
                self._over = refused.reason
                return
            raise WireError(f"the server refuses this site: {refused.reason}") from refused
        try:
            self._session, settings = str(said["session"]), said["settings"]
            self._server_limit = int(said["limit"])
            self._beat_every(float(said["beat"]))
        except (KeyError, TypeError, ValueError) as error:
            raise WireError("the server's answer to hello is not understood; are both of the same version?") from error
        self._door.welcome(settings)
        self._turn, self._answer = self._door.regain(self._session) or (-1, b"")
        self._on_event({"event": "joined", "reason": ""})

    def _work(self, said: _Answer) -> None:
        """Let the door answer a frame."""
        try:
            turn, start = int(said.headers["fedtrio-turn"]), said.headers.get("fedtrio-start") == "1"
            if "fedtrio-run" in said.headers:
                self._place = said.headers["fedtrio-run"], int(said.headers["fedtrio-round"])
                self._beat_every(float(said.headers["fedtrio-beat"]))
            run, round = self._place  # type: ignore[misc]
        except (KeyError, TypeError, ValueError) as error:
            raise WireError("the server's answer is not understood; are both of the same version?") from error
        answer = self._door.answer(self._session, run, round, turn, start, said.body)
        if len(answer) > self._server_limit:
            raise WireError(
                f"the answer has {len(answer):,} bytes and the server takes {self._server_limit:,}; raise its limit"
            )
        self._turn, self._answer = turn, answer

    def _heed(self, refused: _Refused) -> None:
        """Do what a refused turn asks for."""
        self._turn, self._answer = -1, b""
        if refused.error == "finished":
            self._over = refused.reason
            return
        self._on_event({"event": refused.error, "reason": refused.reason})
        if refused.error == "new session":
            self._greet()
        elif refused.error == "replaced":
            raise WireError(f"{refused.reason}; stop one of the two, or make a certificate for each")
        elif refused.error not in ("round closed", "refused"):
            raise WireError(f"the server refuses: {refused.reason}")

    # Requests ---------------------------------------------------------------------------------------------------------

    def _post(self, path: str, headers: dict[str, str], body: bytes) -> _Answer:
        """The server's answer, after as many tries as patience allows. _Refused, or WireError."""
        since, pause = None, 0.05
        while True:
            try:
                answer = self._try(path, headers, body)
                if answer.status < 500:
                    return answer
                why = f"the server, or a proxy before it, answers with status {answer.status}; look into its log"
            except httpx.TransportError as error:
                why = tls.explain(error)
                if tls.is_final(error):
                    raise WireError(why) from error
            now = time.monotonic()
            if since is None:
                since = now
                self._on_event({"event": "waiting", "reason": why})
            if now - since > self._patience:
                raise WireError(f"{why} (tried for {self._patience:g} s)")
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, 3.0)

    def _try(self, path: str, headers: dict[str, str], body: bytes, **options: Any) -> _Answer:
        headers = {
            **headers,
            "Fedtrio-Session": self._session,
            "Fedtrio-Site-Id": self._id,
            "Content-Length": str(len(body)),
        }
        content: Any = body if len(body) <= PIECE_BYTES else _pieces(body)
        with self._client.stream("POST", path, headers=headers, content=content, **options) as response:
            if response.headers.get("content-encoding", "identity") != "identity":
                raise WireError("the answer is compressed, which no server of ours does; what stands between?")
            fine = response.status_code == 200
            answer = _Answer(response.status_code, response.headers, self._body(response, fine))
        if 300 <= answer.status < 500:
            said = _json(answer.body)
            error, reason = said.get("error"), said.get("reason")
            if not isinstance(error, str) or not isinstance(reason, str):
                raise WireError(f"{self._client.base_url} answers with status {answer.status}; is it a fedtrio server?")
            raise _Refused(error, reason)
        return answer

    def _body(self, response: httpx.Response, fine: bool) -> bytes:
        limit = self._limit if fine else WORDS_BYTES
        body = io.BytesIO()
        for piece in response.iter_raw():
            if body.tell() + len(piece) > limit:
                raise WireError(f"the server's answer is longer than the {limit:,} bytes that this site accepts")
            body.write(piece)
        return body.getvalue()

    # Beats ------------------------------------------------------------------------------------------------------------

    def _beat_every(self, seconds: float) -> None:
        if seconds != self._beat:
            self._beat = seconds
            self._rhythm.set()

    def _keep_beating(self) -> None:
        """Also while a frame comes or an answer goes: the last of it may be long under way unseen by the server."""
        while not self._closed:
            if self._rhythm.wait(self._beat):
                self._rhythm.clear()
            elif self._session:
                try:
                    self._try("/v1/beat", {}, b"", timeout=max(2.0, self._beat))
                except _Refused as refused:
                    if refused.error == "finished":
                        self._over = refused.reason
                except (httpx.TransportError, WireError):
                    pass  # the next turn will tell


def _pieces(body: bytes) -> Iterator[memoryview]:
    """So that the time to write counts for each piece, not for the whole."""
    view = memoryview(body)
    for at in range(0, len(view), PIECE_BYTES):
        yield view[at : at + PIECE_BYTES]


def _json(body: bytes) -> dict[str, Any]:
    """A JSON object; an empty one where it is none."""
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}
