"""Bodies of the HTTPS wire at the server: bounded in bytes and in seconds, and all of them together in memory."""

from __future__ import annotations

import asyncio
import io
import threading
from collections import deque
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

PIECE_BYTES = 1 << 18
SMALL_BYTES = 1 << 14
SLOWEST_BYTES_PER_S = 10_000


class Refusal(Exception):
    """What a request is told in place of a frame."""

    def __init__(self, status: int, error: str, reason: str, close: bool = False) -> None:
        super().__init__(reason)
        self.status, self.error, self.reason, self.close = status, error, reason, close


class Pieces(Response):
    """A body sent in pieces, so that a slow reader keeps one piece in memory and not the whole once more.

    Each piece may take `patience` seconds.
    """

    def __init__(self, body: bytes, headers: dict[str, str], patience: float) -> None:
        super().__init__(body, headers=headers)
        self._patience = patience

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send it (ASGI)."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if len(self.body) <= SMALL_BYTES:  # fits into what the connection buffers
            return await send({"type": "http.response.body", "body": self.body})
        body, loop = memoryview(self.body), asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._patience) as end:
                for at in range(0, len(body) or 1, PIECE_BYTES):
                    end.reschedule(loop.time() + self._patience)
                    more = at + PIECE_BYTES < len(body)
                    piece = body[at : at + PIECE_BYTES]
                    await send({"type": "http.response.body", "body": piece, "more_body": more})
        except TimeoutError:
            scope["fedtrio.connection"].abort()


class Room:
    """The bytes that answers may take together until they are fetched; who finds no room waits for it."""

    def __init__(self, size: int, loop: asyncio.AbstractEventLoop) -> None:
        self._free, self._loop = size, loop
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._lock = threading.Lock()

    async def take(self, size: int) -> None:
        """Wait until there is room for `size` bytes."""
        with self._lock:
            if not self._queue and size <= self._free:
                self._free -= size
                return
            turn = self._loop.create_future()
            self._queue.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            with self._lock:
                waiting = (size, turn) in self._queue
                if waiting:
                    self._queue.remove((size, turn))
            if not waiting:
                self.give(size)
            raise

    def give(self, size: int) -> None:
        """Make room again; from any thread."""
        with self._lock:
            self._free += size
            while self._queue and self._queue[0][0] <= self._free:
                taken, turn = self._queue.popleft()
                self._free -= taken
                self._loop.call_soon_threadsafe(wake, turn)


async def read(request: Request, limit: int, patience: float, keep: bool = True) -> bytes:
    """The body, `limit` bytes at most, in `patience` seconds and one more for each 10 kB. Refusal."""
    loop = asyncio.get_running_loop()
    body, size, start = io.BytesIO(), 0, loop.time()  # grows in place, and hands out what it holds without a copy
    try:
        async with asyncio.timeout(patience) as end:
            async for piece in request.stream():
                size += len(piece)
                if size > limit:
                    raise Refusal(413, "too long", f"the body has more than {limit:,} bytes", close=True)
                if keep:
                    body.write(piece)
                end.reschedule(start + patience + size / SLOWEST_BYTES_PER_S)
    except TimeoutError:
        raise Refusal(408, "too slow", f"{size:,} bytes came in {loop.time() - start:.1f} s", close=True) from None
    return body.getvalue()


def number(text: str, least: int = 0) -> int:
    """A header's decimal number. Refusal."""
    digits = text.removeprefix("-") if least < 0 else text
    if not (digits.isascii() and digits.isdigit() and len(digits) < 19) or int(text) < least:
        raise Refusal(400, "no number", f"{text[:20]!r} is not a number", close=True)
    return int(text)


def wake(waiter: asyncio.Future[None] | None) -> None:
    """End the wait of whoever awaits this future."""
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
