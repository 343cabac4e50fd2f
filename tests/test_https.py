"""The HTTPS wire: exactly-once turns, sites that are late, vanish, return or are doubled, and TLS."""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedtrio.certs import issue, load_authority, make_certs
from fedtrio.errors import ConfigError, WireError
from fedtrio.wires import desk, tls
from fedtrio.wires import dial as site_end
from fedtrio.wires.dial import dial
from fedtrio.wires.https import CONNECTIONS, Https

NOW, DAY = datetime.now(UTC), timedelta(days=1)
SITES = ("a", "b", "c")


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sites, one that is not on the list, and those that are wrong in some way."""
    out = tmp_path_factory.mktemp("certs")
    make_certs([*SITES, "stranger"], out)
    make_certs(["a"], out / "other")
    authority = load_authority(out / "authority")
    for name, start, end in (("old", -2, -1), ("young", 1, 2)):
        issue(authority, out / f"{name}-a", "a", NOW + start * DAY, NOW + end * DAY)
        issue(authority, out / f"{name}-server", "server", NOW + start * DAY, NOW + end * DAY, ["127.0.0.1"])
    issue(authority, out / "elsewhere", "server", NOW - DAY, NOW + DAY, ["example.org"])
    return out


@pytest.fixture
def serve(certs: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(**options: Any) -> Server:
        servers.append(Server(certs, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.wire.close()


class Server:
    """A wire with its events, and the sites that dial it."""

    def __init__(self, certs: Path, folder: str = "server", **options: Any) -> None:
        self.certs, self.events = certs, []
        options = {"host": "127.0.0.1", "port": 0, "on_event": self.events.append} | options
        welcome = options.pop("welcome", lambda site, greeting: {"for": site, "said": greeting})
        self.wire = Https(certs / folder, SITES, welcome, **options)
        self.url = f"https://127.0.0.1:{self.wire.port}"

    def heard(self, event: str, site: str = "a") -> list[str]:
        return [e["reason"] for e in list(self.events) if (e["event"], e["site"]) == (event, site)]

    def raw(self, name: str = "a", process: str = "process-1", hello: bool = True) -> Raw:
        return Raw(self, name, process, hello)

    def gather(self, frames: dict[str, bytes]) -> dict[str, bytes]:
        return {name: answer for name, answer in self.wire.exchange(frames.items()) if answer is not None}

    def begin(self, frames: dict[str, bytes]) -> Begun:
        """An exchange in another thread."""
        return Begun(lambda: self.gather(frames))


class Begun:
    """What runs in a thread, and what comes of it."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function, self._box = function, queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._box.put((self._function(), None))
        except BaseException as error:
            self._box.put((None, error))

    def result(self, timeout: float = 10.0) -> Any:
        value, error = self._box.get(timeout=timeout)
        self.thread.join()
        if error is not None:
            raise error
        return value


class Raw:
    """A site by hand: each request as the test wants it."""

    def __init__(self, server: Server, name: str, process: str, hello: bool) -> None:
        self.process, self.session = process, ""
        context = tls.site_context(server.certs / name)
        self.client = httpx.Client(base_url=server.url, verify=context, timeout=10.0, trust_env=False)
        if hello:
            answer = self.client.post("/v1/hello", json={"site_id": process, "greeting": {}})
            assert answer.status_code == 200, answer.text
            self.session = answer.json()["session"]

    def headers(self, turn: int | str) -> dict[str, str]:
        return {"Fedtrio-Session": self.session, "Fedtrio-Site-Id": self.process, "Fedtrio-Turn": str(turn)}

    def turn(self, turn: int, body: Any = b"", **headers: str) -> httpx.Response:
        return self.client.post("/v1/turn", headers=self.headers(turn) | headers, content=body)

    def beat(self) -> httpx.Response:
        return self.client.post("/v1/beat", headers=self.headers(-1))


class Echo:
    """A door that answers with the frame in capitals, and remembers all."""

    def __init__(self, work: Callable[[bytes], None] = lambda frame: None) -> None:
        self.work, self.settings, self.asked, self.regained = work, [], [], None

    def greeting(self) -> dict:
        return {"examples": 7}

    def welcome(self, settings: dict) -> None:
        self.settings.append(settings)

    def regain(self, session: str) -> tuple[int, bytes] | None:
        return self.regained

    def answer(self, session: str, run: str, round: int, turn: int, start: bool, frame: bytes) -> bytes:
        self.asked.append((run, round, turn, start, frame))
        self.work(frame)
        return frame.upper()


class Dialled:
    """Sites in threads that dial a server."""

    def __init__(self, server: Server, doors: dict[str, Any], **options: Any) -> None:
        self.events: list[dict] = []
        options = {"patience": 5.0, "on_event": self.events.append} | options
        self.ends = {
            name: Begun(lambda name=name, door=door: dial(server.url, server.certs / name, door, **options))
            for name, door in doors.items()
        }
        until(lambda: all(server.wire.status()[name] != "absent" for name in doors))


def until(true: Callable[[], Any], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.005)


# Turns ----------------------------------------------------------------------------------------------------------------


def test_turns_go_both_ways(serve: Callable[..., Server]) -> None:
    server, doors = serve(), {name: Echo() for name in SITES}
    assert server.wire.sites == ["a", "b", "c"] and server.wire.abreast is None
    sites = Dialled(server, doors)
    server.wire.start_round("fedllm-0", 3, 30)
    long = b"x" * (3 * site_end.PIECE_BYTES + 5)
    assert server.gather({"b": b"to b", "a": b"to a", "c": long}) == {"a": b"TO A", "b": b"TO B", "c": long.upper()}
    assert server.gather({"a": b"again", "b": b""}) == {"a": b"AGAIN", "b": b""}
    server.wire.start_round("fedllm-0", 4, None)
    assert server.gather({"a": b"next"}) == {"a": b"NEXT"}
    assert doors["a"].asked == [
        ("fedllm-0", 3, 0, True, b"to a"),
        ("fedllm-0", 3, 1, False, b"again"),
        ("fedllm-0", 4, 2, True, b"next"),
    ]
    assert doors["a"].settings == [{"for": "a", "said": {"examples": 7}}]
    server.wire.finish()
    assert [end.result() for end in sites.ends.values()] == [None, None, None]


def test_a_long_dialogue_keeps_its_order(serve: Callable[..., Server]) -> None:
    server, doors = serve(), {name: Echo() for name in SITES}
    Dialled(server, doors)
    server.wire.start_round("split-0", 1, None)
    for step in range(100):
        frames = {name: f"{name}{step}".encode() for name in SITES}
        assert server.gather(frames) == {name: frame.upper() for name, frame in frames.items()}
    for name, door in doors.items():
        assert [(turn, frame) for _, _, turn, _, frame in door.asked] == [
            (i, f"{name}{i}".encode()) for i in range(100)
        ]
        assert [start for _, _, _, start, _ in door.asked] == [True] + 99 * [False]


def test_answers_are_yielded_as_they_arrive(serve: Callable[..., Server]) -> None:
    server, gate = serve(), threading.Event()
    Dialled(server, {"a": Echo(lambda frame: gate.wait(5) and None), "b": Echo()})
    server.wire.start_round("r", 1, None)
    arriving = server.wire.exchange([("a", b"x"), ("b", b"y")])
    assert next(arriving) == ("b", b"Y")
    gate.set()
    assert list(arriving) == [("a", b"X")]


def test_an_exchange_given_up_leaves_nothing_behind(serve: Callable[..., Server]) -> None:
    server, gate = serve(), threading.Event()
    Dialled(server, {"a": Echo(lambda frame: gate.wait(5) and None), "b": Echo()})
    server.wire.start_round("r", 1, None)
    arriving = server.wire.exchange([("a", b"old"), ("b", b"y")])
    next(arriving)
    arriving.close()
    gate.set()
    until(lambda: server.heard("late"))
    server.wire.start_round("r", 2, None)
    assert server.gather({"a": b"new"}) == {"a": b"NEW"}


def test_a_duplicate_is_taken_once(serve: Callable[..., Server]) -> None:
    server = serve()
    site = server.raw()
    server.wire.start_round("r", 1, 20)
    first = server.begin({"a": b"one"})
    assert site.turn(-1).content == b"one"
    polls = [Begun(lambda body=body: site.turn(0, body)) for body in (b"answer", b"answer", b"answer")]
    assert first.result() == {"a": b"answer"}
    second = server.begin({"a": b"two"})
    answers = [poll.result() for poll in polls]  # older polls give way to the newest, which gets the frame
    assert {(a.status_code, a.content) for a in answers} - {(204, b"")} == {(200, b"two")}
    again = site.turn(0, b"answer")  # the response was lost
    assert (again.content, again.headers["fedtrio-turn"], "fedtrio-start" in again.headers) == (b"two", "1", False)
    poll = Begun(lambda: site.turn(1, b"done"))
    assert second.result() == {"a": b"done"}
    assert site.turn(0, b"answer").status_code == 409  # long ago
    assert server.wire.status()["a"] == "connected"
    server.wire.close()
    with contextlib.suppress(httpx.TransportError):
        assert poll.result().status_code == 204


def test_turns_that_were_never_given(serve: Callable[..., Server]) -> None:
    server = serve()
    site = server.raw()
    for turn in (0, 99):
        assert site.turn(turn, b"x").json()["error"] == "no such turn"
    for text in ("", "x", "-2", "1e3", "9" * 40):
        headers = site.headers(text)
        assert site.client.post("/v1/turn", headers=headers, content=b"x").json()["error"] == "no number"


# Deadlines and silence ------------------------------------------------------------------------------------------------


def test_a_late_answer_is_never_used(serve: Callable[..., Server]) -> None:
    server = serve()
    Dialled(server, {"b": Echo()})
    site = server.raw()
    started = time.monotonic()
    server.wire.start_round("r", 1, 3)
    running = server.begin({"a": b"one", "b": b"two"})
    assert site.turn(-1).content == b"one"
    beating = Begun(lambda: [(site.beat(), time.sleep(0.03)) for _ in range(100)])
    assert running.result() == {"b": b"TWO"}
    assert 2.95 < time.monotonic() - started < 12
    assert server.heard("late") == ["no answer before the round's deadline"] and server.wire.status()["a"] == "late"
    beating.result()
    answer = site.turn(0, b"too late")
    assert (answer.status_code, answer.json()["error"]) == (409, "round closed")
    assert len(server.heard("late")) == 2
    assert server.gather({"a": b"again"}) == {}  # out for the rest of the round
    server.wire.start_round("r", 2, 20)
    running = server.begin({"a": b"next"})
    assert site.turn(-1).content == b"next"
    assert site.turn(0, b"too late").json()["error"] == "round closed"  # and the open turn stays open
    answered = Begun(lambda: site.turn(1, b"in time"))
    assert running.result() == {"a": b"in time"}
    server.wire.close()
    with contextlib.suppress(httpx.TransportError):
        answered.result()


def test_a_late_answer_is_not_used_where_it_overtakes_the_watch(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk.Desk, "watch", lambda self: None)  # as where the machine stood still for a while
    server = serve()
    site = server.raw()
    server.wire.start_round("r", 1, 2)
    running = server.begin({"a": b"one"})
    assert site.turn(-1).content == b"one"
    time.sleep(2.1)
    answer = site.turn(0, b"too late")
    assert (answer.status_code, answer.json()["error"]) == (409, "round closed")
    assert running.result() == {} and server.heard("late")[0] == "no answer before the round's deadline"


def test_a_late_site_comes_again_in_the_next_round(serve: Callable[..., Server]) -> None:
    server, slow = serve(), threading.Event()
    sites = Dialled(server, {"a": Echo(lambda frame: slow.wait(60) and None), "b": Echo()})
    server.wire.start_round("r", 1, 3)
    assert server.gather({"a": b"one", "b": b"two"}) == {"b": b"TWO"}
    slow.set()
    until(lambda: len(server.heard("late")) == 2)
    until(lambda: [e["event"] for e in sites.events if e["event"] != "joined"] == ["round closed"])
    server.wire.start_round("r", 2, 20)
    assert server.gather({"a": b"one", "b": b"two"}) == {"a": b"ONE", "b": b"TWO"}


def test_a_vanished_site_does_not_hold_up_the_others(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk, "SILENCE_S", 1.0)
    server = serve()
    Dialled(server, {"b": Echo()})
    site = server.raw()
    server.wire.start_round("r", 1, 60)
    started = time.monotonic()
    running = server.begin({"a": b"one", "b": b"two"})
    assert site.turn(-1).content == b"one"
    site.client.close()
    assert running.result() == {"b": b"TWO"}
    assert 0.9 < time.monotonic() - started < 9  # after some silence, and not at the deadline
    assert server.heard("vanished") and server.heard("left") and server.wire.status()["a"] == "absent"
    started = time.monotonic()
    assert server.gather({"a": b"three", "b": b"four"}) == {"b": b"FOUR"}
    assert time.monotonic() - started < 30


def test_a_site_that_beats_is_waited_for(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk, "SILENCE_S", 0.8)
    monkeypatch.setattr(desk, "BEAT_S", 0.2)
    server = serve()
    Dialled(server, {"a": Echo(lambda frame: time.sleep(1.5))})
    server.wire.start_round("r", 1, 60)
    assert server.gather({"a": b"one"}) == {"a": b"ONE"}
    assert not server.heard("vanished") and not server.heard("left")


def test_the_server_standing_still_is_no_silence_of_the_sites(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk, "SILENCE_S", 0.5)
    server = serve()
    site = server.raw()
    server.wire.start_round("r", 1, 60)
    running = server.begin({"a": b"one"})
    assert site.turn(-1).content == b"one"
    time.sleep(0.2)
    server.wire._ask(time.sleep, 1.5)  # as a paused machine
    site.beat()
    time.sleep(0.2)
    assert not server.heard("vanished") and not server.heard("left")
    answered = Begun(lambda: site.turn(0, b"done"))
    assert running.result() == {"a": b"done"}
    server.wire.close()
    with contextlib.suppress(httpx.TransportError):
        answered.result()


def test_absent_sites_are_left_out_at_once(serve: Callable[..., Server]) -> None:
    server = serve()
    Dialled(server, {"b": Echo()})
    server.wire.start_round("r", 1, 20)
    started = time.monotonic()
    assert server.gather({"a": b"one", "b": b"two"}) == {"b": b"TWO"}
    assert time.monotonic() - started < 15 and server.heard("absent") == ["it has not said hello"]
    assert list(server.wire.exchange([("a", b"three")])) == [("a", None)]  # the frame did not leave
    with pytest.raises(ValueError, match="'z' is none of the sites"):
        server.gather({"z": b"x"})


def test_waiting_for_sites(serve: Callable[..., Server]) -> None:
    server, heard = serve(), []
    waiting = Begun(lambda: server.wire.wait_for(2, 10, heard.append))
    until(lambda: heard == [[]])
    server.raw("b")
    until(lambda: heard == [[], ["b"]])
    server.raw("a")
    assert waiting.result() == ["a", "b"]
    with pytest.raises(WireError, match=r"2 of 3 sites connected within 0.1 s; missing: c"):
        server.wire.wait_for(3, 0.1)


# Restarts -------------------------------------------------------------------------------------------------------------


def test_a_site_restarted_at_its_first_turn_gets_it_again(serve: Callable[..., Server]) -> None:
    server = serve()
    first = server.raw(process="process-1")
    server.wire.start_round("r", 1, 20)
    running = server.begin({"a": b"one"})
    assert first.turn(-1).content == b"one"
    second = server.raw(process="process-2")
    again = second.turn(-1)
    assert (again.content, again.headers["fedtrio-turn"], again.headers["fedtrio-start"]) == (b"one", "0", "1")
    answered = Begun(lambda: second.turn(0, b"ok"))
    assert running.result() == {"a": b"ok"}
    running = server.begin({"a": b"two"})  # and it is in its place
    assert answered.result().content == b"two"
    second.client.close()
    server.wire.close()


def test_a_site_that_regains_its_place_goes_on(serve: Callable[..., Server]) -> None:
    server = serve()
    first = server.raw()
    server.wire.start_round("r", 1, 20)
    running = server.begin({"a": b"one"})
    assert first.turn(-1).content == b"one"
    door = Echo()
    door.regained = (0, b"kept")
    dialling = Dialled(server, {"a": door})
    assert running.result() == {"a": b"kept"}
    assert server.gather({"a": b"two"}) == {"a": b"TWO"}
    assert [(turn, start, frame) for _, _, turn, start, frame in door.asked] == [(1, False, b"two")]
    server.wire.finish()
    dialling.ends["a"].result()


@pytest.mark.parametrize("between", [False, True])
def test_a_site_that_lost_its_place_is_out_of_the_round(between: bool, serve: Callable[..., Server]) -> None:
    """Whether it comes back while a frame waits for it, or between two."""
    server = serve()
    first = server.raw()
    Dialled(server, {"b": Echo()})
    server.wire.start_round("r", 1, 20)
    running = server.begin({"a": b"one", "b": b"one"})
    assert first.turn(-1).content == b"one"
    polling = Begun(lambda: first.turn(0, b"1"))
    assert running.result() == {"a": b"1", "b": b"ONE"}
    door = Echo()
    if between:
        Dialled(server, {"a": door})
        assert polling.result().json()["error"] == "replaced"
        time.sleep(0.2)
        running = server.begin({"a": b"two", "b": b"two"})
    else:
        running = server.begin({"a": b"two", "b": b"two"})
        assert polling.result().content == b"two"
        Dialled(server, {"a": door})
    assert running.result() == {"b": b"TWO"}
    assert server.heard("lost place") == ["it was started anew in the middle of the round"]
    assert server.gather({"a": b"three", "b": b"three"}) == {"b": b"THREE"}
    assert door.asked == []
    server.wire.start_round("r", 2, 20)
    assert server.gather({"a": b"four", "b": b"four"}) == {"a": b"FOUR", "b": b"FOUR"}


def test_a_new_server_is_a_new_session(serve: Callable[..., Server]) -> None:
    server, door = serve(), Echo()
    sites = Dialled(server, {"a": door}, patience=20)
    server.wire.start_round("r", 1, 20)
    assert server.gather({"a": b"one"}) == {"a": b"ONE"}
    server.wire.close()
    until(lambda: any(e["event"] == "waiting" for e in sites.events))
    server = serve(port=server.wire.port)
    server.wire.wait_for(1, 10)
    server.wire.start_round("r", 1, 20)
    assert server.gather({"a": b"two"}) == {"a": b"TWO"}
    assert [turn for _, _, turn, _, _ in door.asked] == [0, 0] and len(door.settings) == 2
    assert [e["event"] for e in sites.events] == ["joined", "waiting", "new session", "joined"]
    server.wire.finish()
    assert sites.ends["a"].result() is None


def test_the_newest_process_wins(serve: Callable[..., Server]) -> None:
    server, second = serve(), Echo()
    old = Dialled(server, {"a": Echo()})
    new = Dialled(server, {"a": second})
    with pytest.raises(WireError, match="another process uses the certificate of a; stop one"):
        old.ends["a"].result()
    assert len(server.heard("replaced")) == 1
    server.wire.start_round("r", 1, 20)
    assert server.gather({"a": b"one"}) == {"a": b"ONE"} and len(second.asked) == 1
    server.wire.finish()
    assert new.ends["a"].result() is None


# Refusals and the end -------------------------------------------------------------------------------------------------


def test_a_refused_greeting_says_why(serve: Callable[..., Server]) -> None:
    def welcome(site: str, greeting: dict) -> dict:
        raise ConfigError(f"{site} has {greeting['examples']} examples, 8 are needed")

    server = serve(welcome=welcome)
    with pytest.raises(WireError, match="the server refuses this site: a has 7 examples, 8 are needed"):
        dial(server.url, server.certs / "a", Echo())
    assert server.wire.status()["a"] == "refused: a has 7 examples, 8 are needed"
    assert server.heard("refused") == ["a has 7 examples, 8 are needed"]


def test_a_refused_answer_says_why_and_the_site_comes_again(serve: Callable[..., Server]) -> None:
    server = serve()
    sites = Dialled(server, {"a": Echo(), "b": Echo()})
    server.wire.start_round("r", 1, 20)
    assert len(server.gather({"a": b"one", "b": b"one"})) == 2
    server.wire.refuse("a", "w has a NaN")
    until(lambda: {"event": "refused", "reason": "w has a NaN"} in sites.events)
    assert server.wire.status()["a"] == "refused: w has a NaN"
    assert server.gather({"a": b"two", "b": b"two"}) == {"b": b"TWO"}
    server.wire.start_round("r", 2, 20)
    assert server.gather({"a": b"two", "b": b"two"}) == {"a": b"TWO", "b": b"TWO"}


def test_the_end_is_told_to_all(serve: Callable[..., Server]) -> None:
    """Also to a site at work, which hears it by its beat."""
    server, gate = serve(), threading.Event()
    sites = Dialled(server, {"a": Echo(lambda frame: gate.wait(60) and None), "b": Echo()})
    server.wire.start_round("r", 1, 60)
    arriving = server.wire.exchange([("a", b"x"), ("b", b"x")])
    next(arriving)
    arriving.close()
    server.wire.finish("no quorum in round 1")
    gate.set()
    for end in sites.ends.values():
        with pytest.raises(WireError, match="the server ended with an error: no quorum in round 1"):
            end.result()


def test_after_the_end_the_wire_is_closed(serve: Callable[..., Server]) -> None:
    server = serve()
    server.wire.finish()
    server.wire.close()
    for call in (lambda: server.gather({"a": b"x"}), server.wire.status, lambda: server.wire.start_round("r", 1, None)):
        with pytest.raises(WireError, match="the wire is closed"):
            call()


def test_what_a_door_raises_goes_through(serve: Callable[..., Server]) -> None:
    def work(frame: bytes) -> None:
        raise KeyError("mine")

    server = serve()
    sites = Dialled(server, {"a": Echo(work)})
    server.wire.start_round("r", 1, 2.5)
    assert server.gather({"a": b"x"}) == {}
    with pytest.raises(KeyError, match="mine"):
        sites.ends["a"].result()


# Bodies ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(certs: Path) -> Iterator[Server]:
    """A server that takes 100 kB, and has little patience."""
    server = Server(certs, limit=100_000, patience=0.4)
    yield server
    server.wire.close()


@pytest.fixture
def asked(small: Server) -> Iterator[tuple[Server, Raw, Begun]]:
    """A site with an open first turn, number `site.at`; a good answer still counts at the end."""
    site = small.raw()
    small.wire.start_round("r", 1, 20)
    running = small.begin({"a": b"one"})
    site.at = int(site.turn(-1).headers["fedtrio-turn"])  # type: ignore[attr-defined]
    yield small, site, running
    answered = Begun(lambda: site.turn(site.at, b"good"))  # type: ignore[attr-defined]
    assert running.result() == {"a": b"good"}
    small.wire.refuse("a", "enough")
    assert answered.result().json()["error"] == "refused"
    site.client.close()


def tls_socket(server: Server, name: str = "a") -> ssl.SSLSocket:
    plain = socket.create_connection(("127.0.0.1", server.wire.port), timeout=5)
    return tls.site_context(server.certs / name).wrap_socket(plain, server_hostname="127.0.0.1")


def said(site: Raw, turn: int, *more: str) -> bytes:
    headers = [f"{key}: {value}" for key, value in site.headers(turn).items()]
    return "\r\n".join(["POST /v1/turn HTTP/1.1", "Host: x", *headers, *more, "", ""]).encode()


def all_of(connection: ssl.SSLSocket) -> bytes:
    parts = []
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def test_a_compressed_body_is_refused(asked: Any) -> None:
    _, site, _ = asked
    answer = site.turn(site.at, b"x" * 10, **{"Content-Encoding": "gzip"})
    assert (answer.status_code, answer.json()["error"]) == (415, "encoded")


def test_a_body_declared_too_long_is_refused_unread(asked: Any) -> None:
    server, site, _ = asked
    with tls_socket(server) as connection:
        connection.sendall(said(site, site.at, "Content-Length: 100001"))
        answer = all_of(connection)
    assert answer.startswith(b"HTTP/1.1 413") and b"100,001 bytes, 100,000 are accepted" in answer


def test_a_body_without_a_length_is_cut(asked: Any) -> None:
    server, site, _ = asked
    with tls_socket(server) as connection:
        connection.sendall(said(site, site.at, "Transfer-Encoding: chunked"))
        with contextlib.suppress(OSError):
            for _ in range(20):
                connection.sendall(b"2710\r\n" + bytes(10_000) + b"\r\n")
        assert all_of(connection).startswith(b"HTTP/1.1 413")


def test_a_body_without_a_length_that_fits_is_taken(small: Server) -> None:
    site = small.raw("b")
    small.wire.start_round("r", 1, 20)
    running = small.begin({"b": b"one"})
    turn = int(site.turn(-1).headers["fedtrio-turn"])
    poll = Begun(lambda: site.turn(turn, iter([b"in ", b"parts"])))
    assert running.result() == {"b": b"in parts"}
    small.wire.refuse("b", "")
    poll.result()


def test_a_body_shorter_than_declared_is_not_an_answer(asked: Any) -> None:
    server, site, running = asked
    with tls_socket(server) as connection:
        connection.sendall(said(site, site.at, "Content-Length: 1000") + b"only this")
    time.sleep(0.1)
    assert running.thread.is_alive()


def test_a_body_longer_than_declared_is_cut_off(small: Server) -> None:
    site = small.raw("b")
    small.wire.start_round("r", 1, 20)
    running = small.begin({"b": b"one"})
    turn = int(site.turn(-1).headers["fedtrio-turn"])
    with tls_socket(small, "b") as connection:
        connection.sendall(said(site, turn, "Content-Length: 4") + b"good" + b"\x00\x01 and more")
        assert running.result() == {"b": b"good"}
        small.wire.refuse("b", "enough")
        assert b"HTTP/1.1 400" in all_of(connection)


def test_a_slow_drip_is_dropped(asked: Any) -> None:
    server, site, _ = asked
    with tls_socket(server) as connection:
        connection.sendall(said(site, site.at, "Content-Length: 1000"))
        started = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - started < 60:
                connection.sendall(b".")
                time.sleep(0.02)
        assert b"too slow" in all_of(connection)


def test_a_duplicate_of_any_length_blocks_nobody(serve: Callable[..., Server]) -> None:
    """Its body is read away before the answer is sent, or both ends would send and wait for each other."""
    server = serve()
    site = server.raw()
    server.wire.start_round("r", 1, 20)
    running = server.begin({"a": b"one"})
    site.turn(-1)
    poll = Begun(lambda: site.turn(0, b"good"))
    assert running.result() == {"a": b"good"}
    second = server.begin({"a": bytes(20_000_000)})
    assert len(poll.result().content) == 20_000_000
    assert len(site.turn(0, bytes(20_000_000)).content) == 20_000_000
    server.wire.refuse("a", "")  # which also closes the open turn
    assert second.result() == {}


def test_a_slow_reader_is_there_and_holds_little_memory(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk, "SILENCE_S", 0.5)
    server, frame = serve(), bytes(20_000_000)
    site = server.raw()
    server.wire.start_round("r", 1, 60)
    running = server.begin({"a": frame})
    with tls_socket(server) as connection:
        connection.sendall(said(site, -1, "Content-Length: 0"))
        time.sleep(1.0)  # and reads nothing
        [sending] = [c for c in server.wire._server.server_state.connections if not c.cycle.response_complete]
        assert sending.transport.get_write_buffer_size() < 2_000_000
        received = [connection.recv(1 << 20)]
        while sum(map(len, received)) < len(frame):
            received.append(connection.recv(1 << 20))
        assert b"fedtrio-turn: 0" in received[0] and not server.heard("vanished")
        connection.sendall(said(site, 0, "Content-Length: 4") + b"done")
        assert running.result() == {"a": b"done"}


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"\xff\xfe", b"[" * 60_000, b"[]", b"null", b'{"greeting": {}}', b'{"site_id": 5, "greeting": {}}'),
        *(b'{"site_id": "12345678", "greeting": []}', b'{"site_id": "12345678", "greeting": {}, "x": 1}'),
    ],
)
def test_greetings_that_are_none(body: bytes, small: Server) -> None:
    site = small.raw(hello=False)
    answer = site.client.post("/v1/hello", content=body)
    assert (answer.status_code, answer.json()["error"]) == (400, "no greeting")


def test_paths_and_lengths_of_greetings(small: Server) -> None:
    site = small.raw(hello=False)
    assert site.client.post("/v1/hello", content=bytes(desk.GREETING_BYTES + 1)).status_code == 413
    for path in ("/", "/v1/hello/", "/docs", "/v1"):
        assert site.client.post(path).status_code == 404
    assert site.client.get("/v1/hello").status_code == 404


def test_answers_wait_for_room(serve: Callable[..., Server]) -> None:
    """What two sites send together is more than the limit: the second is read once the first is fetched."""
    server = serve(limit=1_000_000)
    sites = {name: server.raw(name) for name in ("a", "b")}
    server.wire.start_round("r", 1, 20)
    arriving = server.wire.exchange([("a", b"1"), ("b", b"2")])
    begun = Begun(lambda: next(arriving))
    for site in sites.values():
        site.turn(-1)
    polls = [Begun(lambda site=site: site.turn(0, bytes(800_000))) for site in sites.values()]
    name, answer = begun.result()
    time.sleep(0.2)
    assert server.wire._desk.room._free == 200_000
    other, rest = next(arriving)
    assert {name, other} == {"a", "b"} and len(answer) == len(rest) == 800_000
    assert list(arriving) == []
    assert server.wire._desk.room._free == 1_000_000
    server.wire.finish()
    assert {poll.result().json()["error"] for poll in polls} == {"finished"}


def test_an_answer_longer_than_the_server_takes_stays_at_home(serve: Callable[..., Server]) -> None:
    server = serve(limit=1000)
    sites = Dialled(server, {"a": Echo()})
    server.wire.start_round("r", 1, 2)
    server.gather({"a": bytes(1001)})
    with pytest.raises(WireError, match=r"the answer has 1,001 bytes and the server takes 1,000"):
        sites.ends["a"].result()


def test_a_frame_longer_than_the_site_takes(serve: Callable[..., Server]) -> None:
    server = serve()
    sites = Dialled(server, {"a": Echo()}, limit=1000)
    server.wire.start_round("r", 1, 2)
    server.gather({"a": bytes(1001)})
    with pytest.raises(WireError, match=r"longer than the 1,000 bytes that this site accepts"):
        sites.ends["a"].result()


def test_a_site_has_a_handful_of_connections(serve: Callable[..., Server]) -> None:
    server = serve()
    connections = [tls_socket(server) for _ in range(CONNECTIONS + 5)]
    until(lambda: sum(map(is_closed, connections)) == 5)
    assert len(server.wire._server.server_state.connections) == CONNECTIONS
    for connection in connections:
        connection.close()
    until(lambda: not server.wire._server.server_state.connections)


def is_closed(connection: ssl.SSLSocket) -> bool:
    """Whether the server has closed it."""
    connection.settimeout(0.01)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except (ssl.SSLError, ConnectionError):
        return True


# Identity, TLS and the way there --------------------------------------------------------------------------------------


def test_identity_is_the_certificate_alone(small: Server) -> None:
    """Whatever a message says; and who is not on the list is refused before anything of the message is read."""
    site = small.raw("b", process="process-b")
    site.process = "process-1"
    site.client.headers.update({"Fedtrio-Site": "a", "X-Forwarded-For": "a"})
    assert site.beat().json()["error"] == "replaced"  # as b
    stranger = small.raw("stranger", hello=False)
    for path in ("/v1/hello", "/v1/turn", "/nonsense"):
        answer = stranger.client.post(path, content=b"\xff not json", headers={"Content-Encoding": "gzip"})
        assert (answer.status_code, answer.json()["error"]) == (403, "not listed")
    with pytest.raises(WireError, match="stranger is not on the server's list of sites; ask for 'stranger'"):
        dial(small.url, small.certs / "stranger", Echo())


CERTIFICATES = [
    # server's folder, site's folder, what the site is told
    ("server", "other/a", "the server's certificate is signed by an authority that this site does not know"),
    ("server", "mixed", "the server does not know the authority that signed this site's certificate"),
    ("server", "none", "the server asks for a certificate and this site showed none"),
    ("server", "old-a", "this site's certificate has expired"),
    ("server", "young-a", "finds this site's certificate not yet valid or broken; check the clocks"),
    ("server", "server", "this certificate is not one for a site; use a site's folder, not the server's"),
    ("old-server", "a", "the server's certificate has expired"),
    ("young-server", "a", "the server's certificate is not yet valid; check the clocks"),
    ("elsewhere", "a", "is for other addresses than the one dialled"),
    ("b", "a", "that certificate is not one for a server"),
]


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
@pytest.mark.parametrize(("server", "site", "message"), CERTIFICATES)
def test_each_certificate_fault_has_its_own_message(
    server: str, site: str, message: str, version: str, certs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = Server(certs, server)
    if site == "mixed":  # trusts the server, and is signed by another authority
        shutil.copytree(certs / "other/a", tmp_path / "mixed")
        shutil.copy(certs / "server/ca.pem", tmp_path / "mixed/ca.pem")
    context = tls.site_context(tmp_path / "mixed" if site == "mixed" else certs / ("a" if site == "none" else site))
    if site == "none":
        context = ssl.create_default_context(cafile=str(certs / "server/ca.pem"))
    context.maximum_version = ssl.TLSVersion[version]
    monkeypatch.setattr(tls, "site_context", lambda folder: context)
    if (site, version) == ("none", "TLSv1_2"):
        message = "the server broke off the TLS handshake, perhaps for want of a certificate"
    try:
        started = time.monotonic()
        with pytest.raises(WireError) as told:
            dial(serving.url, certs / "a", Echo())
        assert message in str(told.value) and str(told.value).startswith(f"cannot reach {serving.url}: ")
        assert "\n" not in str(told.value) and time.monotonic() - started < 8
    finally:
        serving.wire.close()


def test_the_messages_are_all_different() -> None:
    assert len({message for _, _, message in CERTIFICATES}) == len(CERTIFICATES)
    texts = [*tls._REASONS.values(), *tls._VERIFY.values(), *tls._ERRNO.values()]
    assert len(set(texts)) == len(texts) and all("; " in text for text in texts)


def failing(url: str, certs: Path, **options: Any) -> str:
    with pytest.raises(WireError) as told:
        dial(url, certs / "a", Echo(), **({"patience": 0.1} | options))
    return str(told.value)


def test_nobody_is_there(certs: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    assert "nothing listens there (connection refused)" in failing(f"https://127.0.0.1:{port}", certs)
    assert "(tried for 0.1 s)" in failing(f"https://127.0.0.1:{port}", certs)
    assert "this host name is not known" in failing("https://no-such-host.invalid:8443", certs)


@contextlib.contextmanager
def answering(reply: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port where each connection is handed to `reply`."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(5)
                    reply(connection)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)
    thread.join()


def test_tls_to_a_plain_port(certs: Path) -> None:
    def http(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

    with answering(http) as port:
        assert "what answers there does not speak TLS" in failing(f"https://127.0.0.1:{port}", certs, patience=60)


def test_a_connection_closed_without_a_word(certs: Path) -> None:
    with answering(lambda connection: None) as port:
        message = failing(f"https://127.0.0.1:{port}", certs)
        assert "closed the connection" in message or "connection reset" in message


def test_plain_http_to_the_tls_port(small: Server) -> None:
    with pytest.raises(httpx.TransportError) as told:
        httpx.post(small.url.replace("https", "http") + "/v1/hello", trust_env=False)
    message = tls.explain(told.value)
    assert "both ends speak TLS" in message or "asked without TLS" in message or "connection reset" in message
    with pytest.raises(ConfigError, match="no address of a server; write https://host:8443"):
        dial(small.url.replace("https", "http"), small.certs / "a", Echo())


def test_folders_and_ports_that_cannot_be_used(certs: Path, small: Server, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lacks ca.pem, cert.pem, key.pem; `fedtrio certs` makes"):
        Server(certs, "nowhere")
    mixed = Path(shutil.copytree(certs / "a", tmp_path / "mixed"))
    shutil.copy(certs / "b/key.pem", mixed / "key.pem")
    with pytest.raises(ConfigError, match=r"key.pem is not the key of cert.pem"):
        dial(small.url, mixed, Echo())
    (mixed / "key.pem").write_text("x")
    with pytest.raises(ConfigError, match="broken or not in PEM format"):
        dial(small.url, mixed, Echo())
    with pytest.raises(ConfigError, match=rf"127.0.0.1:{small.wire.port}: the port is in use; stop what holds it"):
        Server(certs, port=small.wire.port)
    with pytest.raises(ConfigError, match="no address of this machine"):
        Server(certs, host="192.0.2.1")
    with pytest.raises(ConfigError, match="no such host"):
        Server(certs, host="no-such-host.invalid")


def https_with(certs: Path, response: bytes) -> Callable[[socket.socket], None]:
    def reply(connection: socket.socket) -> None:
        with tls.server_context(certs / "server").wrap_socket(connection, server_side=True) as secure:
            secure.recv(65536)
            secure.sendall(response)

    return reply


def test_what_a_server_may_not_answer(certs: Path) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}"
    with answering(https_with(certs, head)) as port:
        assert "compressed" in failing(f"https://127.0.0.1:{port}", certs)
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    with answering(https_with(certs, head)) as port:
        assert "answer to hello is not understood" in failing(f"https://127.0.0.1:{port}", certs)
    for head in (
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno",
        b"HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n",
    ):
        with answering(https_with(certs, head)) as port:
            assert "is it a fedtrio server?" in failing(f"https://127.0.0.1:{port}", certs)
    with answering(https_with(certs, b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n")) as port:
        assert "answers with status 503" in failing(f"https://127.0.0.1:{port}", certs)
    with answering(https_with(certs, b"SSH-2.0-OpenSSH\r\n\r\n")) as port:
        assert "does not speak HTTP" in failing(f"https://127.0.0.1:{port}", certs)


def connect_proxy(seen: list[bytes], allow: bool = True) -> Callable[[socket.socket], None]:
    """As small as a proxy can be: CONNECT, then bytes both ways."""

    def reply(connection: socket.socket) -> None:
        line = connection.recv(65536).split(b"\r\n")[0]
        seen.append(line)
        if not allow:
            connection.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
            return
        host, _, port = line.split()[1].decode().rpartition(":")
        connection = connection.dup()
        target = socket.create_connection((host, int(port)))
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")

        def pump(source: socket.socket, sink: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(65536):
                    sink.sendall(data)
            for end in (source, sink):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

        for pair in ((connection, target), (target, connection)):
            threading.Thread(target=pump, args=pair, daemon=True).start()

    return reply


def test_a_proxy_by_the_usual_variable(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    server, seen = serve(), []
    with answering(connect_proxy(seen)) as port:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
        sites = Dialled(server, {"a": Echo()})
        server.wire.start_round("r", 1, 20)
        assert server.gather({"a": b"by proxy"}) == {"a": b"BY PROXY"}
        server.wire.finish()
        assert sites.ends["a"].result() is None
    assert seen and set(seen) == {f"CONNECT 127.0.0.1:{server.wire.port} HTTP/1.1".encode()}


def test_a_proxy_that_refuses(small: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with answering(connect_proxy([], allow=False)) as port:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
        message = failing(small.url, small.certs, patience=60)
    assert "the proxy would not connect (407" in message and "HTTPS_PROXY" in message


# What is left ---------------------------------------------------------------------------------------------------------


def test_nothing_is_left_after_close(certs: Path) -> None:
    gc.collect()
    threads, files = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    server = Server(certs)
    sites = Dialled(server, {name: Echo() for name in SITES})
    idle = socket.create_connection(("127.0.0.1", server.wire.port))  # never says a word
    server.wire.start_round("r", 1, 20)
    assert len(server.gather(dict.fromkeys(SITES, b"x"))) == 3
    server.wire.finish()
    for end in sites.ends.values():
        end.result()
    idle.close()
    gc.collect()
    assert set(threading.enumerate()) <= threads
    until(lambda: len(os.listdir("/proc/self/fd")) <= files)
    with socket.create_server(("127.0.0.1", server.wire.port)):
        pass
