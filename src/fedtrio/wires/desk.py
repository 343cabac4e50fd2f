"""What sites and server say over HTTPS: a site posts its answer, and the response is its next frame.

Each frame to a site has a turn, which counts up within the server's session. A turn is answered once: sent again it is
ignored, after its round it is late. What is lost on the way is sent again, so that each frame counts exactly once.

    POST /v1/hello   {"site_id", "greeting"} → {"session", "beat", "settings"}
    POST /v1/turn    Fedtrio-Session, -Site-Id, -Turn (answered, or -1) and the answer → the next frame with
                     Fedtrio-Turn and, until the site has answered in this round, -Run, -Round, -Beat and -Start
                     (1: its first in this round); 204: nothing yet
    POST /v1/beat    the site is still at work

Refusals are JSON, {"error", "reason"}. Who a site is stands in its certificate, and nothing is read before that.
"""

from __future__ import annotations

import asyncio
import json
import queue
import secrets
import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from .flow import Pieces, Refusal, Room, number, read, wake

LONG_POLL_S = 20.0
SILENCE_S = 30.0  # a site without a sign for longer has gone; with a deadline, a fifth of it where that is less
BEAT_S = 5.0
GREETING_BYTES = 1 << 16
HELLOS = 8  # at once

Answers = queue.SimpleQueue[tuple[str, bytes | None, bool]]  # None: the site is left out; whether it was sent a frame


class Connection(Protocol):
    """What carries a request."""

    peer: str  # the name in its certificate
    poll: asyncio.Future[None] | None  # ends when the connection does

    def abort(self) -> None:
        """Break it off."""
        ...


@dataclass(eq=False)
class _Site:
    """All that the server knows of a site; touched by the server's thread alone."""

    name: str
    process: str = ""  # the newest one's id
    former: str = ""  # the one before, until it asks again
    seen: float = float("-inf")  # last sign, in seconds of the loop
    open: int = 0  # requests in progress
    there: bool = False
    barred: str = ""  # why its last hello was refused
    turn: int = -1  # the last one given
    accepted: int = -1  # the last one answered
    frame: bytes | None = None  # outstanding
    start: bool = False  # the outstanding frame is its first in this round
    begun: bool = False  # it has had a frame in this round
    shown: int = -1  # the last turn that this process was given
    knows: bool = False  # and it has answered one in this round
    forgot: bool = False  # its process knows nothing of this round
    out: str = ""  # why it has no part in the rest of this round
    notice: str = ""  # a refusal that it has not been told yet
    told: bool = False  # that all is over
    answers: Answers | None = None
    poll: asyncio.Future[None] | None = None


class Desk:
    """Where sites are served: all methods but `room`'s are for the thread of the event loop."""

    def __init__(
        self,
        sites: Collection[str],
        welcome: Callable[[str, dict], dict],
        limit: int,
        patience: float,
        on_event: Callable[[dict], None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._sites = {name: _Site(name) for name in sorted(sites)}
        self._welcome, self._limit, self._patience, self._on_event = welcome, limit, patience, on_event
        self._loop = loop
        self._session = secrets.token_hex(16)
        self._run, self._round = "", 0
        self._deadline: float | None = None  # in seconds of the loop
        self._silence, self._beat = SILENCE_S, BEAT_S
        self._next_watch = float("inf")
        self._timer: asyncio.TimerHandle | None = None
        self._over: str | None = None
        self._hellos = asyncio.Semaphore(HELLOS)
        self.room = Room(limit, loop)
        self.changed = threading.Event()

    # The rounds -------------------------------------------------------------------------------------------------------

    def open_round(self, run: str, round: int, deadline: float | None) -> None:
        """Close what is open and let all sites take part; `deadline` in seconds from now."""
        self._run, self._round = run, round
        self._deadline = None if deadline is None else self._loop.time() + deadline
        self._silence = SILENCE_S if deadline is None else min(SILENCE_S, deadline / 5)
        self._beat = BEAT_S if deadline is None else min(BEAT_S, deadline / 20)
        for site in self._sites.values():
            self._close_turn(site)
            site.out, site.begun, site.knows = "", False, False
        self.watch()  # from now on as often as this round's silence asks

    def give(self, name: str, frame: bytes, answers: Answers) -> None:
        """Deliver a frame; its answer will be put into `answers`, or None."""
        site, now = self._sites[name], self._loop.time()
        if site.out:
            answers.put((name, None, False))
            return
        site.turn += 1
        site.frame, site.answers, site.start, site.begun = frame, answers, not site.begun, True
        if self._past():
            self._drop(site, "late", "the round's deadline had passed")
        elif not self._is_there(site, now):
            self._drop(site, "absent", "it is not connected" if site.process else "it has not said hello")
        elif site.forgot and not site.start:
            self._drop(site, "lost place", "it was started anew in the middle of the round")
        else:
            site.forgot = False
            wake(site.poll)

    def _drop(self, site: _Site, event: str, reason: str) -> None:
        """Go on without this site until the next round."""
        self._close_turn(site)
        site.out = event
        self._tell(event, site.name, reason)

    def _close_turn(self, site: _Site) -> None:
        """What is outstanding will have no answer."""
        if site.answers is not None:
            site.answers.put((site.name, None, site.shown == site.turn))
        site.frame, site.answers = None, None

    def withdraw(self, names: Iterable[str]) -> None:
        """Take back what is outstanding of these sites."""
        for name in names:
            site = self._sites[name]
            if site.frame is not None:
                self._close_turn(site)
                site.out = "late"

    def refuse(self, name: str, reason: str) -> None:
        """Tell a site that its last answer is not accepted, and leave it out."""
        site = self._sites[name]
        self._drop(site, "refused", reason)
        site.out, site.notice = f"refused: {reason}", reason
        wake(site.poll)

    def end(self, reason: str) -> None:
        """All is over; each site is told when it next asks."""
        self._over = reason
        self.release()

    def release(self) -> None:
        """End all polls."""
        for site in self._sites.values():
            wake(site.poll)

    def all_told(self) -> bool:
        """Whether all sites that are there know that all is over."""
        return not any(site.there and not site.told for site in self._sites.values())

    def present(self) -> list[str]:
        """Names of the sites that are there."""
        now = self._loop.time()
        return [name for name, site in self._sites.items() if self._is_there(site, now)]

    def states(self) -> dict[str, str]:
        """Of each site: absent, connected, working, late, or refused: why."""
        return {name: self._state_of(site) for name, site in self._sites.items()}

    def watch(self) -> None:
        """Time and again: who has gone, and who is late."""
        now = self._loop.time()
        stood_still = max(0.0, now - self._next_watch)  # a paused machine: that was not the sites' silence
        pause = min(1.0, max(0.02, self._silence / 10))
        self._next_watch = now + pause
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_later(pause, self.watch)
        for site in self._sites.values():
            site.seen = min(now, site.seen + stood_still)
            there = self._is_there(site, now)
            if site.there and not there:
                self._tell("left", site.name, f"no sign of it for {self._silence:.3g} s")
            site.there = there
            if site.frame is not None and self._past():
                self._drop(site, "late", "no answer before the round's deadline")
            elif site.frame is not None and not there:
                self._drop(site, "vanished", f"no sign of it for {self._silence:.3g} s; the round goes on without it")

    def _past(self) -> bool:
        return self._deadline is not None and self._loop.time() >= self._deadline

    def _is_there(self, site: _Site, now: float) -> bool:
        return bool(site.process) and (site.open > 0 or now - site.seen <= self._silence)

    def _state_of(self, site: _Site) -> str:
        if site.barred:
            return f"refused: {site.barred}"
        if site.out.startswith("refused") or site.out == "late":
            return site.out
        if not self._is_there(site, self._loop.time()):
            return "absent"
        return "working" if site.frame is not None else "connected"

    def _tell(self, event: str, site: str, reason: str = "") -> None:
        self._on_event({"event": event, "site": site, "reason": reason})
        self.changed.set()

    # Requests ---------------------------------------------------------------------------------------------------------

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        """One request (ASGI)."""
        request, connection = Request(scope, receive), scope["fedtrio.connection"]
        site = self._sites.get(connection.peer)
        mine = site is not None and site.process == request.headers.get("fedtrio-site-id")
        if site is not None and mine:
            site.open += 1  # till the response is out, as long as that may take
        try:
            response = await self._respond(site, request, connection)
            await response(scope, receive, send)
        except Refusal as refusal:
            headers = {"connection": "close"} if refusal.close else None
            content = {"error": refusal.error, "reason": refusal.reason}
            await JSONResponse(content, refusal.status, headers)(scope, receive, send)
        except ClientDisconnect:
            pass
        finally:
            if site is not None and mine:
                site.open -= 1
                site.seen = self._loop.time()

    async def _respond(self, site: _Site | None, request: Request, connection: Connection) -> Response:
        if site is None:
            reason = f"{connection.peer or 'a certificate without a name'} is not on the server's list of sites"
            self._tell("refused", connection.peer, reason)
            raise Refusal(403, "not listed", f"{reason}; ask for {connection.peer!r} to be added", close=True)
        path = request.scope["path"]
        if request.method != "POST" or path not in ("/v1/hello", "/v1/turn", "/v1/beat"):
            raise Refusal(404, "no such path", f"{request.method} {path} is not part of the protocol", close=True)
        if "content-encoding" in request.headers:
            raise Refusal(415, "encoded", "compressed bodies are not accepted", close=True)
        limit = self._limit if path == "/v1/turn" else GREETING_BYTES
        length = number(request.headers.get("content-length", str(limit)))
        if length > limit:
            raise Refusal(413, "too long", f"the body has {length:,} bytes, {limit:,} are accepted", close=True)
        if path == "/v1/hello":
            return await self._hello(site, request)
        self._check_process(site, request)
        self._check_over(site)
        if path == "/v1/beat":
            return Response(status_code=204)
        return await self._turn(site, request, connection, length)

    def _check_process(self, site: _Site, request: Request) -> None:
        """That this is the newest process of the site, in this session."""
        if request.headers.get("fedtrio-session") != self._session or not site.process:
            raise Refusal(409, "new session", "the server was started anew; say hello")
        if request.headers.get("fedtrio-site-id") != site.process:
            if request.headers.get("fedtrio-site-id") == site.former:
                site.former = ""  # say it once
                self._tell("replaced", site.name, "another process with its certificate has taken over")
            raise Refusal(409, "replaced", f"another process uses the certificate of {site.name}")

    def _check_over(self, site: _Site) -> None:
        if self._over is not None:
            # The site has heard of it once the response is out.
            self._loop.call_soon(self._mark_told, site)
            raise Refusal(410, "finished", self._over)

    def _mark_told(self, site: _Site) -> None:
        site.told = True
        self.changed.set()

    async def _hello(self, site: _Site, request: Request) -> Response:
        self._check_over(site)
        async with self._hellos:
            process, greeting = _greeting(await read(request, GREETING_BYTES, self._patience))
            try:
                settings = await asyncio.to_thread(self._welcome, site.name, greeting)
            except Exception as error:
                site.barred = str(error) or type(error).__name__
                self._tell("refused", site.name, site.barred)
                raise Refusal(403, "refused", site.barred) from error
            answer = {"session": self._session, "beat": self._beat, "limit": self._limit, "settings": settings}
            body = await asyncio.to_thread(lambda: json.dumps(answer).encode())
        if site.process != process:
            site.former, site.process = site.process, process
            site.shown, site.knows = -1, False
            wake(site.poll)  # which is the older process's
            self._tell("joined", site.name)
        site.barred, site.seen, site.there = "", self._loop.time(), True
        self.changed.set()
        return Pieces(body, {"content-type": "application/json"}, self._patience)

    async def _turn(self, site: _Site, request: Request, connection: Connection, length: int) -> Response:
        turn = number(request.headers.get("fedtrio-turn", ""), least=-1)
        if turn > site.turn:
            raise Refusal(400, "no such turn", f"turn {turn} was answered, the last one given is {site.turn}")
        if turn not in (-1, site.accepted):
            await self._accept(site, request, turn, length)
        elif length:
            await read(
                request, self._limit, self._patience, keep=False
            )  # a duplicate; with both sides sending both would block
        if turn == -1:
            self._forget(site)
        if site.frame is None and not site.notice:
            await self._wait(site, connection)
        self._check_over(site)
        self._check_process(site, request)
        if site.notice:
            notice, site.notice = site.notice, ""
            raise Refusal(409, "refused", notice)
        if site.frame is None:
            return Response(status_code=204)
        site.shown, headers = site.turn, {"fedtrio-turn": str(site.turn)}
        if not site.knows:
            headers |= {"fedtrio-run": self._run, "fedtrio-round": str(self._round)}
            headers |= {"fedtrio-start": str(int(site.start)), "fedtrio-beat": f"{self._beat:g}"}
        return Pieces(site.frame, headers, self._patience)

    def _forget(self, site: _Site) -> None:
        """The site's process holds no dialogue: it can begin one and cannot go on with one."""
        if site.frame is None:
            site.forgot = True
        elif not site.start:
            self._drop(site, "lost place", "it was started anew in the middle of the round")

    async def _accept(self, site: _Site, request: Request, turn: int, length: int) -> None:
        """Take the answer of the outstanding turn, once; another turn's is late, or a duplicate of long ago."""
        self._check_turn(site, turn)
        await self.room.take(length)
        kept = 0
        try:
            self._check_turn(site, turn)  # after waiting for room
            answer = await read(request, length, self._patience)
            if turn == site.accepted:
                return
            self._check_turn(site, turn)
            self._check_process(site, request)
            assert site.answers is not None
            site.accepted, site.frame, site.knows, kept = turn, None, turn == site.shown, len(answer)
            site.answers.put((site.name, answer, True))
            site.answers = None
        finally:
            self.room.give(length - kept)

    def _check_turn(self, site: _Site, turn: int) -> None:
        if site.frame is not None and self._past():  # where an answer overtakes the next `watch`
            self._drop(site, "late", "no answer before the round's deadline")
        if turn == site.turn and site.frame is not None:
            return
        if turn > site.accepted:
            self._tell("late", site.name, f"its answer to turn {turn} came when that turn was closed")
        raise Refusal(409, "round closed", f"turn {turn} is closed; the answer is not used")

    async def _wait(self, site: _Site, connection: Connection) -> None:
        """Until there is something for the site, or it has gone; an older poll gives way to a newer one."""
        wake(site.poll)
        poll = site.poll = connection.poll = self._loop.create_future()
        timer = self._loop.call_later(LONG_POLL_S, wake, poll)
        try:
            await poll
        finally:
            timer.cancel()
            connection.poll = None
            if site.poll is poll:
                site.poll = None


def _greeting(body: bytes) -> tuple[str, dict]:
    try:
        said = json.loads(body)
        process, greeting = said.pop("site_id"), said.pop("greeting")
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
        raise Refusal(400, "no greeting", "hello must be JSON with site_id and greeting") from error
    if said or not isinstance(greeting, dict) or not isinstance(process, str) or not 8 <= len(process) <= 64:
        raise Refusal(400, "no greeting", "hello must be JSON with site_id (8 to 64 characters) and greeting, no more")
    return process, greeting
