"""The server's end of the HTTPS wire: uvicorn in a thread of its own, and the wire as the rounds see it.

What sites and server say to each other is in `desk`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import queue
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import ConfigError, WireError
from . import tls
from .desk import Answers, Desk
from .flow import wake

CONNECTIONS = 8  # at once from one site
SMALL_BYTES = 1 << 16
KEEP_ALIVE_S = 75  # longer than sites keep an idle connection, so that it is they who close it


class _Joined:
    """A transport that sends what is written in one step of the loop as one: head and body of a small response."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._parts: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)
        if len(data) > SMALL_BYTES:
            self._flush()  # at once, or the sender would never be told to pause

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        parts, self._parts = self._parts, []
        if parts and not self._transport.is_closing():
            self._transport.write(b"".join(parts))


class _Protocol(H11Protocol):
    """HTTP/1.1 that knows the name in the peer's certificate, and when a waiting peer has gone."""

    peer = ""
    poll: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_Joined(transport, self.loop))  # type: ignore[arg-type]
        self.peer = tls.name_of(transport.get_extra_info("peercert"))
        # asyncio does so only where the listening socket names its protocol; without it each small turn takes 40 ms.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        app = self.app

        async def named(scope: Any, receive: Any, send: Any) -> None:
            scope["fedtrio.connection"] = self
            await app(scope, receive, send)

        self.app = named
        mine = [c for c in self.connections if isinstance(c, _Protocol) and c.counts_for(self.peer) and c is not self]
        if len(mine) >= CONNECTIONS:  # left by processes that are no more; any may go, as a turn can be repeated
            mine[0].abort()
        # Until its first request, a connection is idle.
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        wake(self.poll)

    def counts_for(self, peer: str) -> bool:
        """Whether this is one of the peer's connections, and not one that is being closed."""
        return self.peer == peer and not self.transport.is_closing()

    def abort(self) -> None:
        self.transport.abort()


class Https:
    """The wire to sites that dial in over HTTPS with their certificates.

    `folder` holds the server's certificates, `sites` are the names that are admitted. `welcome(site, greeting)`, called
    from another thread, gives the settings that a site is sent, or raises what refuses it. `limit` is the longest
    answer in bytes, and bounds all answers under way together; a body may take `patience` seconds, and one more for
    each 10 kB. `on_event` is called from any thread, must not block, and gets {"event", "site", "reason"}. ConfigError
    where certificates or port can't be used; the methods raise WireError once the wire is closed.
    """

    abreast = None  # sites that work at the same time: all

    def __init__(
        self,
        folder: Path,
        sites: Collection[str],
        welcome: Callable[[str, dict], dict],
        *,
        host: str = "0.0.0.0",
        port: int = 8443,
        limit: int = 1 << 30,
        patience: float = 30.0,
        on_event: Callable[[dict], None] = lambda event: None,
    ) -> None:
        context = tls.server_context(folder)
        self._names = sorted(sites)
        self._socket = _listen(host, port)
        self.port: int = self._socket.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._desk = Desk(self._names, welcome, limit, patience, on_event, self._loop)
        config = uvicorn.Config(
            self._desk.app,
            interface="asgi3",
            loop="none",
            http=_Protocol,
            ws="none",
            lifespan="off",
            proxy_headers=False,  # what a header says of the client is not to be believed
            log_config=None,
            log_level="critical",  # a malformed request is the sender's affair
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
        )
        config.load()
        config.ssl = context
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="fedtrio-https", daemon=True)
        self._thread.start()

    @property
    def sites(self) -> list[str]:
        """Names of the sites that are admitted, sorted."""
        return list(self._names)

    def start_round(self, run: str, round: int, deadline: float | None) -> None:
        """Let all sites take part again; answers after `deadline` seconds from now (None: no limit) are too late."""
        if not run.isascii() or not run.isprintable():
            raise ValueError(f"run {run!r} cannot stand in a header; use printable ASCII")
        self._ask(self._desk.open_round, run, round, deadline)

    def exchange(self, frames: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, bytes | None]]:
        """Deliver each frame and yield each answer as it arrives, or None where a site was gone before its frame left.

        Sites that vanish later, or are late, are left out.
        """
        answers: Answers = queue.SimpleQueue()
        pending: set[str] = set()
        try:
            for name, frame in frames:
                if name not in self._names:
                    raise ValueError(f"{name!r} is none of the sites {self._names}")
                pending.add(name)
                self._soon(self._desk.give, name, frame, answers)
            while pending:
                name, answer, sent = self._fetch(answers)
                pending.discard(name)
                if answer is None:
                    if not sent:
                        yield name, None
                else:
                    try:
                        yield name, answer
                    finally:
                        self._desk.room.give(len(answer))
                        answer = None
        finally:
            if pending and self._thread.is_alive():
                self._ask(self._desk.withdraw, pending)
            while not answers.empty():
                self._desk.room.give(len(answers.get()[1] or b""))

    def refuse(self, site: str, reason: str) -> None:
        """The site's last answer is not accepted: it is told why, and is out until the next `start_round`."""
        self._ask(self._desk.refuse, site, reason)

    def wait_for(
        self, number: int, timeout: float | None = None, on_wait: Callable[[list[str]], None] = lambda names: None
    ) -> list[str]:
        """Block until that many sites are there, and give their names; `on_wait` hears of each change meanwhile.

        WireError after `timeout` seconds.
        """
        end = None if timeout is None else time.monotonic() + timeout
        before: list[str] | None = None
        while True:
            self._desk.changed.clear()
            names = self._ask(self._desk.present)
            if len(names) >= number:
                return names
            if names != before:
                on_wait(names)
            before = names
            left = 1.0 if end is None else end - time.monotonic()
            if left <= 0:
                missing = ", ".join(name for name in self._names if name not in names)
                raise WireError(
                    f"{len(names)} of {number} sites connected within {timeout:g} s; missing: {missing}; start them by "
                    "`fedtrio site`, or wait longer"
                )
            self._desk.changed.wait(min(1.0, left))

    def status(self) -> dict[str, str]:
        """Of each site: absent, connected, working, late, or `refused: why`."""
        return self._ask(self._desk.states)

    def finish(self, reason: str = "", grace: float = 10.0) -> None:
        """Tell all sites that all is over (`reason`: by which error), wait `grace` seconds for them at most, close."""
        if self._thread.is_alive():
            self._ask(self._desk.end, reason)
            end = time.monotonic() + grace
            while not self._ask(self._desk.all_told) and time.monotonic() < end:
                self._desk.changed.wait(0.02)
        self.close()

    def close(self) -> None:
        """Let go of sites, thread and port. Sites that were not told that all is over will wait for a new server."""
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stop)
            self._thread.join()

    # Between the threads ----------------------------------------------------------------------------------------------

    def _soon(self, function: Callable[..., Any], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError as error:
            raise WireError("the wire is closed") from error

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What `function` gives in the server's thread."""
        done: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def run() -> None:
            try:
                done.set_result(function(*arguments))
            except Exception as error:
                done.set_exception(error)

        self._soon(run)
        while True:
            with contextlib.suppress(concurrent.futures.TimeoutError):
                return done.result(timeout=1.0)
            self._check_thread()

    def _fetch(self, answers: Answers) -> tuple[str, bytes | None, bool]:
        while True:
            with contextlib.suppress(queue.Empty):
                return answers.get(timeout=1.0)
            self._check_thread()

    def _check_thread(self) -> None:
        if not self._thread.is_alive():
            raise WireError("the wire is closed")

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.call_soon(self._desk.watch)
            self._loop.run_until_complete(self._server.serve(sockets=[self._socket]))
            self._abort()
            self._loop.run_until_complete(asyncio.sleep(0))
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            self._socket.close()
            self._loop.close()

    def _stop(self) -> None:
        for listening in getattr(self._server, "servers", []):  # so that nobody comes back while we go
            listening.close()
        self._desk.release()
        self._loop.call_later(0.05, self._abort)  # what was just answered goes out first; then nobody is waited for
        self._server.should_exit = True

    def _abort(self) -> None:
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        why = {
            errno.EADDRINUSE: "the port is in use; stop what holds it, or choose another wire.port",
            errno.EACCES: "that port needs more rights; choose a wire.port above 1023",
            socket.EAI_NONAME: "there is no such host; give an address of this machine",
            errno.EADDRNOTAVAIL: "that is no address of this machine; 0.0.0.0 stands for all of them",
        }.get(getattr(error, "errno", None) or 0, str(error))
        raise ConfigError(f"cannot listen on {host}:{port}: {why}") from error
