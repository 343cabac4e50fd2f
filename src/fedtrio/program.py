"""The two programs of a round and what drives them: a site behind its one door, and the server's generator."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any, Protocol

from .checkpoint import Memory, pack_tree
from .codecs import Crossing
from .coding import Coding
from .errors import MessageError, QuorumError
from .ledger import Ledger
from .message import Fact, Message, Reply, decode, encode
from .meter import Meter

ACCOUNT, CONCLUDE = "account", "conclude"  # asked of a site itself, not of its framework's program


class Wire(Protocol):
    """Moves frames. Sites that stay silent are simply absent from what it yields."""

    @property
    def abreast(self) -> int | None:
        """How many sites may hold a dialogue at once; None: all."""
        ...

    @property
    def sites(self) -> list[str]:
        """Names of the sites that belong to the run, sorted."""
        ...

    def start_round(self, run: str, round: int, deadline: float | None) -> None:
        """From here on frames are of this round of this run, which ends `deadline` seconds from now."""
        ...

    def exchange(self, frames: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, bytes | None]]:
        """Deliver each frame and yield each answer, or None for a frame that could not leave."""
        ...

    def wait_for(self, number: int, timeout: float | None) -> list[str]:
        """Sites that are there, once there are so many. Raises WireError after `timeout` seconds."""
        ...

    def refuse(self, site: str, reason: str) -> None:
        """The site's last answer was not accepted; it is out until the next round starts."""
        ...

    def close(self) -> None:
        """Let go of sites and sockets."""
        ...


class Site:
    """A client: a name, its data, its memory, and `answer`, the only door through which anything comes or goes.

    `versions` keeps the memory of the last two rounds. `conclude(site)` gives the facts with which the site answers
    when a run is over: the scores of the model that it keeps to itself, if any.
    """

    def __init__(
        self,
        name: str,
        data: Any,
        framework: Any,
        lab: Any,
        meter: Meter | None = None,
        versions: Memory | None = None,
        conclude: Callable[[Any], Mapping[str, Fact]] = lambda site: {},
        coding: Coding | None = None,
    ) -> None:
        self.name, self.data = name, data
        self.memory: dict[str, Any] = {}
        self.round = 0
        self.secret = b""  # where a site is real, what the server must not be able to guess
        self.bytes_in = self.bytes_out = 0
        self._framework, self._lab, self._meter = framework, lab, meter or Meter()
        self._versions, self._conclude, self._coding = versions or Memory(), conclude, coding or Coding()
        self._start: Message | None = None  # what the round began with
        self._step = 0
        self._known: int | None = None  # the last round that `memory` has seen; None: it is still to be looked up
        self._settled = True  # whether that round was ended
        self._fresh = False  # whether what it left in memory is still to be `learnt`
        self._dialogue: Generator[Message, Reply, Message] | None = None

    def answer(self, frame: bytes) -> bytes:
        """Go on with the client's program until it has something to say."""
        received = decode(frame)
        if received.kind in (ACCOUNT, CONCLUDE):
            return encode(Message(received.kind, {}, self._own_account(received)), received.round, True)
        self.bytes_in += len(frame)
        with self._meter.at(self.name):
            message, done = self._advance(self._coding.read(received, "down", None))
            at = Crossing(self._coding.seed, self.round, self.name, "up", self._step)
            message = self._coding.write(message, at, self._start, self.memory)
            self._step += 1
        if done:
            self._versions.commit(self.round, self.memory, self._facts)
            self._settled = self._fresh = True
        reply = encode(message, self.round, done)
        self.bytes_out += len(reply)
        return reply

    def reset(self) -> None:
        """A round starts: forget the dialogue of one that this site did not end."""
        self._dialogue = None

    def recall(self, versions: Mapping[int, bytes]) -> None:
        """Begin with what was kept of this site's memory elsewhere, by round, as `learnt` has given it."""
        for round in sorted(versions):
            self._versions.add(round, versions[round])

    def learnt(self) -> bytes:
        """The memory as a round has left it, packed, to be kept elsewhere; empty where nothing is new."""
        fresh, self._fresh = self._fresh, False
        return pack_tree(self.memory, self._facts) if fresh else b""

    @property
    def _facts(self) -> dict[str, Any]:
        return {"effort": self._meter.effort(self.name).spent()}

    def _advance(self, received: Reply) -> tuple[Message, bool]:
        message: Reply | None = received
        if self._dialogue is None:
            self._remember(received.round)
            self.round = self._known = received.round
            self._settled = False
            self._start, self._step = received, 0
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

    def _remember(self, round: int) -> None:
        """Go back to what was known before this round, where it was begun before or by a process that is no more."""
        if self._known is None or not self._settled or self._known >= round:
            self.memory, facts = self._versions.before(round)
            self._meter.effort(self.name).restore(facts.get("effort", {}))
            self._known, self._settled = round - 1, True

    def _own_account(self, received: Reply) -> Mapping[str, Fact]:
        if received.kind == CONCLUDE:
            self._remember(received.round + 1)
            return self._conclude(self)
        if self._known is None:
            self._remember(received.round + 1)
        asked = {"weight": self.data.weight} if self._framework.wants_weights else {}
        return self._meter.effort(self.name).spent() | {"examples": len(self.data)} | asked


def ask(wire: Wire, kind: str, sites: Iterable[str], round: int) -> dict[str, Mapping[str, Fact]]:
    """What sites say of themselves, `ACCOUNT` or `CONCLUDE`; no part of a framework, and so not in the ledger."""
    frame = encode(Message(kind), round)
    answers = wire.exchange((site, frame) for site in sites)
    return {site: decode(answer).facts for site, answer in answers if answer is not None}


def drive(
    program: Generator[dict[str, Message], dict[str, Reply], None],
    wire: Wire,
    round: int,
    ledger: Ledger,
    check: Callable[[str, Message, Reply], None] = lambda site, sent, reply: None,
    refuse: Callable[[str, MessageError], None] | None = None,
    min_sites: int = 1,
    coding: Coding | None = None,
    sites: int = 0,
) -> list[str]:
    """Run the server's program of one round over a wire; each frame that crosses is entered in the ledger.

    Gives the sites that were asked and fell silent, sorted.

    `check(site, sent, reply)` raises MessageError for an answer that the program must not see: that site is refused
    and absent for the rest of the round, or without `refuse` the error is raised. Raises QuorumError as soon as fewer
    than `min_sites` of the round's sites are left; `sites` is their number, where not all are asked at once.
    """
    coding = coding or Coding()
    inbox: dict[str, Reply] | None = None
    starts: dict[str, Message] = {}  # what each site received first, as it decoded it
    step = 0
    lost: set[str] = set()
    cohort: set[str] = set()
    last_refusal: MessageError | None = None
    while True:
        try:
            outbox = next(program) if inbox is None else program.send(inbox)
        except StopIteration:
            return sorted(lost)
        inbox = {}
        sent = _Sent(coding, round, step, ledger)
        step += 1
        for site, frame in wire.exchange(sent.frames(outbox)):
            if frame is None:
                sent.take_back(site)
                continue
            try:
                reply = decode(frame)
                ledger.record(round, site, "up", reply.kind, frame, reply.payload_bytes)
                if reply.round != round:
                    raise MessageError(f"{site} answered for round {reply.round} in round {round}")
                reply = coding.read(reply, "up", starts.setdefault(site, sent.as_read[site]))
                check(site, sent.as_read[site], reply)
                inbox[site] = reply
            except MessageError as error:
                if refuse is None:
                    raise
                wire.refuse(site, str(error))
                refuse(site, error)
                last_refusal = error
        inbox = {site: inbox[site] for site in outbox if site in inbox}  # not in order of arrival
        cohort |= outbox.keys()
        lost |= outbox.keys() - inbox.keys()
        left, asked = max(sites, len(cohort)) - len(lost), max(sites, len(cohort))
        if left < min(min_sites, asked):
            program.close()
            why = last_refusal or f"missing: {', '.join(sorted(lost))}"
            raise QuorumError(f"round {round}: {left} of at least {min_sites} sites are left; {why}")


class _Sent:
    """One outbox on its way: encoded as late as possible, and a broadcast once."""

    def __init__(self, coding: Coding, round: int, step: int, ledger: Ledger) -> None:
        self._coding, self._round, self._step, self._ledger = coding, round, step, ledger
        self.as_read: dict[str, Message] = {}  # each message as its site reads it
        self._counted: dict[str, tuple[str, int, int]] = {}  # kind, bytes, payload

    def frames(self, outbox: dict[str, Message]) -> Iterator[tuple[str, bytes]]:
        """Site and frame, each entered in the ledger."""
        last: Message | None = None
        as_sent = as_read = Message("")
        frame = b""
        for site, message in outbox.items():
            if last is not message:
                at = Crossing(self._coding.seed, self._round, "", "down", self._step)
                as_sent = self._coding.write(message, at, None, {})
                frame = encode(as_sent, self._round)
                as_read = message if as_sent is message else self._coding.read(as_sent, "down", None)
                last = message
            self.as_read[site] = as_read
            self._ledger.record(self._round, site, "down", message.kind, frame, as_sent.payload_bytes)
            self._counted[site] = message.kind, len(frame), as_sent.payload_bytes
            yield site, frame

    def take_back(self, site: str) -> None:
        """The site's frame did not leave."""
        self._ledger.take_back(self._round, site, "down", *self._counted[site])
