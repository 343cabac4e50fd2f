"""The Flower wire without Flower: its messages go through the app's own relay to real workers, in threads.

`test_flower` runs the same over Flower itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import sys
import threading
import time
import tomllib
from collections.abc import Callable
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import httpx
import pytest
from remotes import World, fedtrio, forked, free_port, sha256
from same import timeless

from fedtrio.certs import FILES, issue, make_certs, new_authority
from fedtrio.compare import compare
from fedtrio.config_file import load_config
from fedtrio.errors import ConfigError, DataError, WireError
from fedtrio.flower import server
from fedtrio.flower.app import run_app, write_app
from fedtrio.flower.template.relay import relay
from fedtrio.wires import flower, local
from fedtrio.wires.dial import dial
from fedtrio.wires.flower import Flower
from fedtrio.wires.invited import Invited


class Mail:
    """Carries messages as Flower does: each to one node, whose ClientApp relays it; answers wait to be pulled."""

    def __init__(self, sockets: dict[str, Path]) -> None:
        self.sockets, self.online = sockets, {name: number for number, name in enumerate(sockets, 1)}
        self.sent: list[tuple[str, dict, int, float | None]] = []
        self.lost = False  # whether answers are
        self._answers: dict[str, tuple[dict, bytes]] = {}

    def nodes(self) -> list[tuple[str, int]]:
        return list(self.online.items())

    def push(self, node: int, head: dict, body: bytes, round: int, seconds: float | None) -> str:
        name, site = f"message {len(self.sent)}", next(name for name, n in self.online.items() if n == node)
        self.sent.append((site, head, round, seconds))
        threading.Thread(target=self._carry, args=(name, self.sockets[site], head, body), daemon=True).start()
        return name

    def _carry(self, name: str, path: Path, head: dict, body: bytes) -> None:
        said, frame = relay(str(path), json.dumps(head), body)
        if not self.lost:
            self._answers[name] = json.loads(said), frame

    def pull(self, messages: Any) -> list[tuple[str, dict, bytes]]:
        return [(name, *self._answers.pop(name)) for name in messages if name in self._answers]

    def asked(self, site: str) -> list[str]:
        return [head["ask"] for name, head, *_ in self.sent if name == site]


@pytest.fixture(autouse=True)
def swift(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("POLL_S", 0.01), ("LOOK_S", 0.1), ("AGAIN_S", 0.1)):
        monkeypatch.setattr(flower, name, seconds)


# A whole run ----------------------------------------------------------------------------------------------------------


class Workers:
    """`fedtrio site --local` for each site, and a comparison over them as a ServerApp runs it."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.folder = world, world.folder / name
        self.folder.mkdir()
        self.mail = Mail({site: Path(os.path.relpath(self.folder / f"{site}.sock")) for site in world.sites})
        self._children: dict[str, Any] = {}

    def start(self, site: str, *die: Any) -> None:
        words = ["site", str(self.world.folder / f"{site}.yaml"), f"--local={self.mail.sockets[site]}"]
        words += [f"--name={site}", f"--folder={self.folder / f'site-{site}'}"]
        self._children[site] = forked(words, self.folder / f"{site}.log", *die)

    def died(self, site: str) -> bool:
        return not self._children[site].is_alive()

    def log(self, site: str) -> str:
        return (self.folder / f"{site}.log").read_text(encoding="utf-8")

    def serve(self, monkeypatch: pytest.MonkeyPatch, *settings: str) -> dict[str, Any]:
        port = free_port()
        whole = [*settings, f"wire.port={port}"]
        monkeypatch.setattr(server, "GridPost", lambda mail: mail)
        monkeypatch.setattr(server, "load_config", lambda path: load_config(path, whole))
        config = {"config": str(self.world.folder / "server.yaml"), "out": str(self.folder / "out")}
        return server.serve(self.mail, {**config, "address": f"https://127.0.0.1:{port}"})

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children.values():
            child.terminate()
            child.join(10)
            assert not child.is_alive()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("flower") / "world")


def in_process(world: World, *settings: str) -> tuple[list[dict[str, Any]], Path]:
    out = world.folder / f"loop-{len(list(world.folder.glob('loop-*')))}"
    return compare(load_config(world.folder / "loop.yaml", settings), out, jobs=1)["runs"], out


def test_all_three_give_the_same_bits_as_in_process(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("frameworks=[fedllm,split,kd]", "rounds=1")
    with Workers(world, "whole") as workers:
        for site in world.sites:
            workers.start(site)
        there = workers.serve(monkeypatch, *settings)["runs"]
        here, loop = in_process(world, *settings)
        assert [r["adapter_sha256"] for r in there] == [r["adapter_sha256"] for r in here]
        assert [timeless(r["curve"]) for r in there] == [timeless(r["curve"]) for r in here]
        assert sha256(workers.folder / "out" / "ledger.jsonl") == sha256(loop / "ledger.jsonl")
        # FedLLM's round is one message, KD's two: what a site has spent comes along. At the end of a run one more.
        assert workers.mail.asked("ada") == ["hello", *["turn"] * 2, "dial", *["turn"] * 3]
        assert not list(workers.folder.rglob("*.pem"))  # the certificates of the call are gone
        assert workers.log("ada").count("ada: 22 examples") == 1  # the model was loaded once


def test_a_worker_started_anew_is_told_all_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with Workers(world, "anew") as workers:
        workers.start("ada")
        workers.start("bob", ("fedtrio.remote:Turns.add", "after", 3))  # in round 2, with `account` beside each

        def again() -> None:
            while not workers.died("bob"):
                time.sleep(0.02)
            workers.start("bob")

        threading.Thread(target=again, daemon=True).start()
        [there] = workers.serve(monkeypatch, "frameworks=[fedllm]", "min_sites=2")["runs"]
        [here], _ = in_process(world, "frameworks=[fedllm]")
        assert there["adapter_sha256"] == here["adapter_sha256"]
        assert [(e["event"], e["site"]) for e in there["events"]] == []  # the round was run again, so none was lost
        assert workers.mail.asked("bob").count("hello") >= 2 and workers.log("bob").count("bob: 17 examples") == 2


# Doors of our own -----------------------------------------------------------------------------------------------------


class Echo:
    """A site that says back what it is told, and how often it was asked."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int, bool, bytes]] = []
        self.hold = threading.Event()
        self.hold.set()
        self.fault: Exception | None = None

    def greeting(self) -> dict[str, Any]:
        return {"protocol": 1}

    def welcome(self, settings: dict[str, Any]) -> None:
        if settings.get("labels") == "wrong":
            raise DataError("labels that do not occur")

    def regain(self, session: str) -> None:
        return None

    def answer(self, session: str, run: str, round: int, turn: int, start: bool, frame: bytes) -> bytes:
        self.hold.wait(10)
        if self.fault is not None:
            raise self.fault
        self.heard.append((run, round, start, frame))
        return frame.upper()


class Sites:
    """Workers in threads of this process, the mail between, and the wire."""

    def __init__(self, folder: Path, names: str = "ab", **options: Any) -> None:
        self.folder, self.doors = folder, {name: Echo() for name in names}
        self.mail = Mail({name: Path(os.path.relpath(folder / f"{name}.sock")) for name in names})
        self.events: list[tuple[str, str, str]] = []
        self.ended: dict[str, BaseException] = {}
        self.options = {"settings": {}, **options}
        for name in names:
            self.start(name)
        self.wire = self.new_wire()

    def new_wire(self) -> Flower:
        def note(event: dict[str, Any]) -> None:
            self.events.append((event["event"], event["site"], event["reason"]))

        return Flower(self.mail, list(self.doors), **{"on_event": note, **self.options})

    def start(self, name: str, called: str = "") -> None:
        def serve() -> None:
            try:
                local.serve(self.mail.sockets[name], called or name, self.doors[name], self.folder / name)
            except BaseException as error:
                self.ended[name] = error

        threading.Thread(target=serve, daemon=True).start()
        until(lambda: self.mail.sockets[name].exists())

    def told(self, event: str) -> list[tuple[str, str]]:
        return [(site, reason) for kind, site, reason in self.events if kind == event]


def until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_frames_cross_and_what_is_beside_is_not_sent_again(tmp_path: Path) -> None:
    sites = Sites(tmp_path, beside=lambda round: f"account {round}".encode())
    assert sites.wire.sites == ["a", "b"] and sites.wire.wait_for(2, 10) == ["a", "b"]
    sites.wire.start_round("fedllm-0", 3, 60)
    assert dict(sites.wire.exchange([("a", b"x"), ("b", b"y")])) == {"a": b"X", "b": b"Y"}
    assert dict(sites.wire.exchange([("a", b"z")])) == {"a": b"Z"}
    before = len(sites.mail.sent)
    sites.wire.start_round("fedllm-0", 3, 60)
    assert dict(sites.wire.exchange([("a", b"account 3"), ("b", b"account 3")])) == dict.fromkeys("ab", b"ACCOUNT 3")
    assert len(sites.mail.sent) == before
    beside = ("fedllm-0", 3, False, b"account 3")
    assert sites.doors["a"].heard == [("fedllm-0", 3, True, b"x"), beside, ("fedllm-0", 3, False, b"z"), beside]
    assert all(0 < seconds <= 60 for _, head, _, seconds in sites.mail.sent if head["ask"] == "turn")
    assert dict(sites.wire.exchange([("a", b"account 4")])) == {"a": b"ACCOUNT 4"}  # another question is asked


def test_the_deadline_is_the_message_s_and_who_is_late_is_out(tmp_path: Path) -> None:
    sites = Sites(tmp_path)
    sites.wire.wait_for(2, 10)
    sites.doors["b"].hold.clear()
    sites.wire.start_round("r", 1, 1.5)
    assert dict(sites.wire.exchange([("a", b"x"), ("b", b"x")])) == {"a": b"X"}
    assert sites.told("late") == [("b", "no answer before the deadline")]
    sites.doors["b"].hold.set()
    assert sites.wire.wait_for(2, 10) == ["a", "b"]
    assert sites.mail.sent[-1][3] == pytest.approx(600, abs=1)  # a hello outlives the round that has failed
    sites.wire.start_round("r", 2, 30)
    assert dict(sites.wire.exchange([("a", b"y"), ("b", b"y")])) == {"a": b"Y", "b": b"Y"}
    assert sites.doors["b"].heard[-1] == ("r", 2, True, b"y")


def test_a_node_that_goes_is_done_without(tmp_path: Path) -> None:
    sites = Sites(tmp_path)
    sites.wire.wait_for(2, 10)
    sites.wire.start_round("r", 1, None)
    sites.mail.lost = True
    offline = threading.Timer(0.3, sites.mail.online.clear)
    offline.start()
    assert dict(sites.wire.exchange([("a", b"x"), ("b", b"x")])) == {}
    assert {site for site, _ in sites.told("vanished")} == {"a", "b"}
    assert dict(sites.wire.exchange([("a", b"x")])) == {"a": None}  # it has no part in the rest of the round
    sites.wire.start_round("r", 2, None)
    assert dict(sites.wire.exchange([("a", b"x")])) == {"a": None}
    assert sites.told("absent") == [("a", "its SuperNode is not online")]
    with pytest.raises(WireError, match=r"0 of 1 sites answered within 0\.2 s; missing: a, b"):
        sites.wire.wait_for(1, 0.2)


def test_a_node_that_holds_its_answers_back_is_nudged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a SuperNode does whose last run ended while it received: an answer leaves when the next message comes."""

    class Lagging(Mail):
        held: tuple[str, Any] | None = None

        def _carry(self, name: str, path: Path, head: dict, body: bytes) -> None:
            said, frame = relay(str(path), json.dumps(head), body)
            held, self.held = self.held, (name, (json.loads(said), frame))
            if held:
                self._answers[held[0]] = held[1]

    monkeypatch.setattr(flower, "NUDGE_S", 0.3)
    sites = Sites(tmp_path, "a")
    sites.mail = Lagging(sites.mail.sockets)
    wire = sites.new_wire()
    assert wire.wait_for(1, 10) == ["a"]
    wire.start_round("r", 1, None)
    assert dict(wire.exchange([("a", b"x")])) == {"a": b"X"}
    wire.start_round("r", 2, None)
    assert dict(wire.exchange([("a", b"y")])) == {"a": b"Y"}
    assert sites.mail.asked("a") == ["hello", "nothing", "turn", "nothing", "turn", "nothing"]


def test_names_are_the_nodes(tmp_path: Path) -> None:
    sites = Sites(tmp_path)
    sites.mail.online |= {"": 7, "stranger": 8}
    assert sites.wire.wait_for(2, 10) == ["a", "b"]
    told = dict(sites.told("refused"))
    assert "register it by" in told["SuperNode 7"] and "not on the server's list" in told["stranger"]
    assert len(told) == len(sites.told("refused")) == 2  # each said once

    class Twins(Mail):
        def nodes(self) -> list[tuple[str, int]]:
            return [("a", 1), ("a", 2)]

    with pytest.raises(WireError, match="two SuperNodes are registered as a"):
        Flower(Twins({}), ["a"], {}).wait_for(1, 1)


def test_swapped_sockets_are_noticed(tmp_path: Path) -> None:
    sites = Sites(tmp_path, "a")
    sites.mail.sockets["b"] = sites.mail.sockets["a"]
    sites.mail.online["b"] = 2
    sites.doors["b"] = Echo()
    wire = sites.new_wire()
    with pytest.raises(WireError, match="1 of 2"):
        wire.wait_for(2, 0.5)
    assert ("b", "this site is a, and the SuperNode beside it is registered as b") in sites.told("refused")


def test_a_server_of_another_session_says_hello_again(tmp_path: Path) -> None:
    sites = Sites(tmp_path, "a")
    first, second = sites.wire, sites.new_wire()
    first.wait_for(1, 10)
    second.wait_for(1, 10)
    first.start_round("r", 1, None)
    assert dict(first.exchange([("a", b"x")])) == {"a": b"X"}  # its session was forgotten for the second's
    assert sites.mail.asked("a") == ["hello", "hello", "turn", "hello", "turn"]


def test_a_dialogue_is_not_taken_up_by_a_worker_started_anew(tmp_path: Path) -> None:
    sites = Sites(tmp_path, "a")
    sites.wire.wait_for(1, 10)
    sites.wire.start_round("r", 1, None)
    assert dict(sites.wire.exchange([("a", b"x")])) == {"a": b"X"}
    sites.new_wire().wait_for(1, 10)
    assert dict(sites.wire.exchange([("a", b"y")])) == {}
    assert sites.told("lost place") == [("a", "the site was started anew")]


def test_a_site_that_does_not_fit_is_told_of(tmp_path: Path) -> None:
    sites = Sites(tmp_path, "a", settings={"labels": "wrong"})
    with pytest.raises(WireError, match="missing: a"):
        sites.wire.wait_for(1, 0.4)
    assert sites.told("refused") == [("a", "labels that do not occur")]

    def strict(site: str, greeting: dict) -> None:
        raise ValueError(f"this server speaks protocol 2, the site {greeting['protocol']}")

    sites = Sites(tmp_path / "..", "c", welcome=strict)
    with pytest.raises(WireError, match="missing: c"):
        sites.wire.wait_for(1, 0.4)
    assert sites.told("refused") == [("c", "this server speaks protocol 2, the site 1")]


def test_what_the_site_s_program_raises_is_told_and_ends_it(tmp_path: Path) -> None:
    sites = Sites(tmp_path)
    sites.wire.wait_for(2, 10)
    sites.doors["a"].fault = ConfigError("'adapter' was not sent; the server goes on without a")
    sites.wire.start_round("r", 1, None)
    assert dict(sites.wire.exchange([("a", b"x"), ("b", b"x")])) == {"b": b"X"}
    assert sites.told("refused") == [("a", "'adapter' was not sent; the server goes on without a")]
    until(lambda: "a" in sites.ended)
    assert sites.ended["a"] is sites.doors["a"].fault and not sites.mail.sockets["a"].exists()
    sites.wire.start_round("r", 2, None)
    assert dict(sites.wire.exchange([("a", b"x"), ("b", b"x")])) == {"b": b"X"}
    assert "no site's worker at" in sites.told("absent")[0][1]


def test_a_refusal_travels_with_the_next_message(tmp_path: Path) -> None:
    heard: list[dict] = []
    sites = Sites(tmp_path, "a", limit=10)
    local_sites = Sites(tmp_path, "")
    path = Path(os.path.relpath(tmp_path / "n.sock"))
    note = {"on_event": heard.append}
    threading.Thread(target=local.serve, args=(path, "a", Echo(), tmp_path), kwargs=note, daemon=True).start()
    until(path.exists)
    sites.mail.sockets["a"] = path
    sites.wire.wait_for(1, 10)
    sites.wire.start_round("r", 1, None)
    assert dict(sites.wire.exchange([("a", b"x" * 11)])) == {}
    assert "11 bytes, 10 are accepted" in sites.told("refused")[0][1]
    sites.wire.start_round("r", 2, None)
    sites.wire.refuse("a", "norm a million times the median")
    assert dict(sites.wire.exchange([("a", b"x")])) == {"a": None}
    sites.wire.start_round("r", 3, None)
    assert dict(sites.wire.exchange([("a", b"x")])) == {"a": b"X"}
    assert {"event": "refused", "reason": "norm a million times the median"} in heard
    assert local_sites.events == []


# The socket -----------------------------------------------------------------------------------------------------------


def test_the_socket_is_for_user_and_group(tmp_path: Path) -> None:
    sites = Sites(tmp_path, "a")
    assert stat.S_IMODE(sites.mail.sockets["a"].stat().st_mode) == 0o660
    with pytest.raises(ConfigError, match="another site's process serves there"):
        local.serve(sites.mail.sockets["a"], "a", Echo(), tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is no socket"):
        local.serve(tmp_path / "file", "a", Echo(), tmp_path)
    with pytest.raises(ConfigError, match="at most 100 bytes"):
        local.serve(tmp_path / ("x" * 100), "a", Echo(), tmp_path)
    with pytest.raises(ConfigError, match="can't be made"):
        local.serve(Path("no-such-folder/x.sock"), "a", Echo(), tmp_path)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "head", ["", "[]", "{}", '{"ask": "go"}', '{"ask": "turn"}', '{"ask": []}', "[" * 100_000, '{"ask": "dial"}', "ÿ"]
)
def test_questions_that_are_none_end_nothing(tmp_path: Path, head: str) -> None:
    sites = Sites(tmp_path, "a")
    path = str(sites.mail.sockets["a"])
    said, body = relay(path, head, b"")
    assert json.loads(said)["reason"] == "the question is not understood; are both sides of the same version?"
    with Client(path, "AF_UNIX"):
        pass  # opened and left
    with Client(path, "AF_UNIX") as line:
        line.send_bytes(b"{}")  # a head and no body
    assert body == b"" and sites.wire.wait_for(1, 10) == ["a"] and not sites.ended


def test_the_relay_says_what_is_missing(tmp_path: Path) -> None:
    assert "names no worker" in relay("", "{}", b"")[0]
    assert "No such file or directory" in relay(str(tmp_path / "x.sock"), "{}", b"")[0]


# Called to the HTTPS wire ---------------------------------------------------------------------------------------------


def test_a_call_is_good_for_one_hello(tmp_path: Path) -> None:
    calls: list[tuple[dict, bytes]] = []
    make_certs(["a"], tmp_path / "certs")
    port = free_port()

    class Caller(Flower):
        def call(self, questions: Any, seconds: float) -> None:
            calls.extend(questions.values())

    events: list[dict] = []
    wire = Caller(Mail({}), ["a"], {}, lambda site, greeting: {"told": greeting}, on_event=events.append)
    files = lambda site: {name: (tmp_path / "certs" / site / name).read_text() for name in FILES}  # noqa: E731
    invited = Invited(wire, f"https://127.0.0.1:{port}", tmp_path / "certs" / "server", files, "127.0.0.1", port)
    try:
        invited.start_round("split-0", 1, 30)
        [(head, body)] = calls
        assert json.loads(body) == files("a") and head["url"] == f"https://127.0.0.1:{port}"
        for token in ("wrong", ""):
            with pytest.raises(WireError, match="its token is not the one"):
                knock(head["url"], tmp_path / "certs" / "a", token)
        with pytest.raises(WireError, match="its token"):  # a wrong one spends it, so that none can be guessed
            knock(head["url"], tmp_path / "certs" / "a", head["token"])
        invited.start_round("split-0", 2, 30)
        token = calls[-1][0]["token"]
        assert token != head["token"]
        with contextlib.suppress(Greeted):
            knock(head["url"], tmp_path / "certs" / "a", token)
        assert ("joined", "a") in [(event["event"], event["site"]) for event in events]
        with pytest.raises(WireError, match="was used before"):
            knock(head["url"], tmp_path / "certs" / "a", token)
        issue(new_authority(*window()[:1]), tmp_path / "other", "a", *window())
        with pytest.raises(WireError, match="an authority that this site does not know"):
            knock(head["url"], tmp_path / "other", token)
        with pytest.raises(httpx.TransportError):
            httpx.post(head["url"] + "/v1/hello", verify=False)  # no certificate: nothing is read
    finally:
        invited._https.close()  # waits for nobody


class Greeted(Exception):
    """The server has let us in."""


def window() -> tuple[Any, Any]:
    from datetime import UTC, datetime, timedelta

    now = datetime.now(UTC) - timedelta(minutes=10)
    return now, now + timedelta(days=1)


def knock(url: str, folder: Path, token: str) -> None:
    class Door(Echo):
        def greeting(self) -> dict[str, Any]:
            return {"token": token}

        def welcome(self, settings: dict[str, Any]) -> None:
            assert settings == {"told": {}}  # the token is nothing to whoever admits sites
            raise Greeted

    dial(url, folder, Door(), patience=3)


# The app --------------------------------------------------------------------------------------------------------------


def test_the_app_holds_paths_and_nothing_of_the_configuration(world: World, tmp_path: Path) -> None:
    place = tmp_path / 'an "odd" folder'
    file, config = world.folder / "server.yaml", load_config(world.folder / "server.yaml")
    written = write_app(place, config, file, tmp_path / "run", "https://fed.example.org:8443")
    assert sorted(path.name for path in written) == ["client_app.py", "pyproject.toml", "relay.py", "server_app.py"]
    tree = tomllib.loads((place / "pyproject.toml").read_text(encoding="utf-8"))
    told = {"config": str(file), "out": str(tmp_path / "run"), "address": "https://fed.example.org:8443"}
    assert tree["tool"]["flwr"]["app"]["config"] == told and tree["project"]["dependencies"] == []
    assert not any("public.csv" in path.read_text(encoding="utf-8") for path in written)
    imported = [line for path in written if path.name != "server_app.py" for line in path.read_text().splitlines()]
    assert not [line for line in imported if line.startswith(("import ", "from ")) and "fedtrio" in line]
    write_app(place, config, file, tmp_path / "run", "https://fed.example.org:8443")  # again, over itself
    (place / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds something else"):
        write_app(place, config, file, tmp_path / "run", "https://fed.example.org:8443")


def test_what_can_not_run_over_flower_is_refused_before(world: World, tmp_path: Path) -> None:
    def refused(*settings: str, address: str = "") -> str:
        with pytest.raises(ConfigError) as error:
            config = load_config(world.folder / "server.yaml", settings)
            write_app(tmp_path / "app", config, world.folder / "server.yaml", tmp_path / "run", address)
        assert not (tmp_path / "app").exists()
        return str(error.value)

    assert "--address https://host:8443" in refused("frameworks=[split]")
    assert "wire.sites is missing" in refused("wire.sites=null")
    assert "is no address of a server" in refused(address="http://fed.example.org")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ('{"success": false, "error-message": "Connection refused"}', "flwr run: Connection refused"),
        ("something broke", "flwr run: something broke"),
    ],
)
def test_an_exit_code_of_0_is_not_believed(
    tmp_path: Path, said: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "flwr"
    command.write_text(f"#!/bin/sh\necho \"$FLWR_TELEMETRY_ENABLED $FLWR_DISABLE_UPDATE_CHECK\" > {tmp_path}/env\n"
                       f"echo '{said}'\n")  # fmt: skip
    command.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(WireError, match=message):
        run_app(tmp_path, "here")
    assert (tmp_path / "env").read_text() == "0 1\n"
    command.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"pip install 'fedtrio\[flower\]'"):
        run_app(tmp_path, "here")


def test_the_commands_say_how(tmp_path: Path, world: World) -> None:
    file = world.folder / "ada.yaml"
    code, said = fedtrio("site", file, log=tmp_path / "1.log")
    assert code == 2 and "say --server and --certs" in said and "Traceback" not in said
    code, said = fedtrio("site", file, "--local=x.sock", log=tmp_path / "2.log")
    assert code == 2 and "--local goes with --name" in said
    code, said = fedtrio("flower", "app", tmp_path / "app", world.folder / "server.yaml", log=tmp_path / "3.log")
    assert code == 2 and "split needs an HTTPS address" in said


def test_two_runs_do_not_share_a_folder(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "GOING_S", 0.1)
    told = {"config": str(world.folder / "server.yaml"), "out": str(tmp_path), "address": "https://127.0.0.1:1"}
    with server._alone(tmp_path), pytest.raises(ConfigError, match="another run works in this folder"):
        server.serve(None, told)
    with server._alone(tmp_path):
        pass
