"""The two programs of a round and what drives them: a site behind its one door, and the server's generator."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import nullcontext
from typing import Any, Protocol

from .errors import MessageError
from .ledger import Ledger
from .message import Message, Reply, decode, encode
from .meter import Meter


class Wire(Protocol):
    """Moves frames. Sites that stay silent are simply absent from what it yields."""

    @property
    def abreast(self) -> int | None:
        """How many sites may hold a dialogue at once; None: all."""
        ...

    @property
    def sites(self) -> list[str]:
        """Names of the sites that can be reached, sorted."""
        ...

    def exchange(self, frames: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
        """Deliver each frame and yield each answer."""
        ...

    def close(self) -> None:
        """Let go of sites and sockets."""
        ...


class Site:
    """A client: a name, its data, its memory, and `answer`, the only door through which anything comes or goes."""

    def __init__(self, name: str, data: Any, framework: Any, lab: Any, meter: Meter | None = None) -> None:
        self.name, self.data = name, data
        self.memory: dict[str, Any] = {}
        self.round = 0
        self.bytes_in = self.bytes_out = 0
        self._framework, self._lab, self._meter = framework, lab, meter
        self._dialogue: Generator[Message, Reply, Message] | None = None

    def answer(self, frame: bytes) -> bytes:
        """Go on with the client's program until it has something to say."""
        self.bytes_in += len(frame)
        with self._meter.at(self.name) if self._meter else nullcontext():
            message, done = self._advance(decode(frame))
        reply = encode(message, self.round, done)
        self.bytes_out += len(reply)
        return reply

    def _advance(self, received: Reply) -> tuple[Message, bool]:
        message: Reply | None = received
        if self._dialogue is None:
            self.round = received.round
            program = self._framework.client(self._lab, self, received)
            if isinstance(program, Message):
                return program, True
            self._dialogue, message = program, None  # a generator starts with None
        elif received.round != self.round:
            raise MessageError(f"{self.name} is in round {self.round}, the server in round {received.round}")
        try:
            return self._dialogue.send(message), False  # type: ignore[arg-type]
        except StopIteration as end:
            self._dialogue = None
            return end.value, True


def drive(
    program: Generator[dict[str, Message], dict[str, Reply], None], wire: Wire, round: int, ledger: Ledger
) -> None:
    """Run the server's program of one round over a wire; each frame that crosses is entered in the ledger."""
    inbox: dict[str, Reply] | None = None
    while True:
        try:
            outbox = next(program) if inbox is None else program.send(inbox)
        except StopIteration:
            return
        inbox = {}
        for site, frame in wire.exchange(_frames(outbox, round, ledger)):
            reply = decode(frame)
            if reply.round != round:
                raise MessageError(f"{site} answered for round {reply.round} in round {round}")
            ledger.record(round, site, "up", reply.kind, frame, reply.payload_bytes)
            inbox[site] = reply
        inbox = {site: inbox[site] for site in outbox if site in inbox}  # not in order of arrival


def _frames(outbox: dict[str, Message], round: int, ledger: Ledger) -> Iterator[tuple[str, bytes]]:
    """Encode as late as possible, and a broadcast once."""
    last: tuple[Message, bytes] | None = None
    for site, message in outbox.items():
        if last is None or last[0] is not message:
            last = (message, encode(message, round))
        ledger.record(round, site, "down", message.kind, last[1], message.payload_bytes)
        yield site, last[1]
