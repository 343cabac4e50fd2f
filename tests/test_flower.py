"""Flower itself: SuperLink and SuperNodes with TLS and registered keys on loopback. Slow: a message takes seconds."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from flowers import Garden
from remotes import World, sha256
from same import timeless

from fedtrio.compare import compare
from fedtrio.config_file import load_config

pytestmark = [pytest.mark.engines, pytest.mark.skipif(not shutil.which("flwr"), reason="fedtrio[flower] is not here")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("flower") / "world")


@pytest.fixture(scope="module")
def garden(world: World) -> Iterator[Garden]:
    with Garden(world, ["frameworks=[fedllm,kd,split]"]) as garden:
        garden.plant()
        garden.run()
        yield garden


def in_process(world: World, *settings: str) -> Path:
    out = world.folder / f"loop-{len(list(world.folder.glob('loop-*')))}"
    compare(load_config(world.folder / "loop.yaml", settings), out, jobs=1)
    return out


def same(garden: Garden, loop: Path) -> None:
    """Adapters, scores and ledger are those of a run in one process."""
    there, here = garden.results()["runs"], json.loads((loop / "results.json").read_text(encoding="utf-8"))["runs"]
    assert [r["adapter_sha256"] for r in there] == [r["adapter_sha256"] for r in here]
    assert sha256(garden.out / "ledger.jsonl") == sha256(loop / "ledger.jsonl")
    assert [timeless(r["curve"]) for r in there] == [timeless(r["curve"]) for r in here]


def test_the_same_bits_as_in_process(garden: Garden, world: World) -> None:
    same(garden, in_process(world, "frameworks=[fedllm,kd,split]"))


def test_no_message_more_than_needed(garden: Garden) -> None:
    """One hello; of FedLLM two rounds of one message, of KD two of two, each with one at the end; of split a call."""
    received = garden.log("ada").count("Receiving: query message")
    assert received == 1 + (2 + 1) + (4 + 1) + 1, garden.log("ada")
    assert not {"refused", "absent", "late", "vanished"} & {event["event"] for event in garden.events()}


def test_a_key_that_is_not_registered_gets_nowhere(garden: Garden) -> None:
    garden.key("stranger")
    garden.node("stranger")
    assert garden.ended("stranger", 60) != 0
    assert "Failed to activate SuperNode" in garden.log("stranger") and "SuperNode ID" not in garden.log("stranger")
    assert {event["site"] for event in garden.events()} == set(garden.world.sites)


def test_the_server_app_does_not_call_home(garden: Garden) -> None:
    """It says so where the environment of Flower's own processes, which it inherits, would let it."""
    assert "joined" in garden.log("run") and "Flower may call home" not in garden.log("run")


def test_a_node_killed_in_mid_round_is_done_without(world: World) -> None:
    """Its worker is held with the frame; the run ends as that of the other site alone."""
    with Garden(world, ["frameworks=[fedllm]"], name="killed") as garden:
        garden.plant()
        garden.until(lambda: "waiting" in garden.log("ada worker"))
        garden.begin()
        garden.until(lambda: "ada joined" in garden.log("run") and "bob joined" in garden.log("run"))
        garden.children["ada worker"].send_signal(signal.SIGSTOP)
        garden.until(lambda: garden.log("ada").count("Start `flwr-clientapp` process") == 2)
        garden.kill("ada")
        assert garden.ended("run", 240) == 0, garden.said()
        events = [(e["event"], e["site"]) for e in garden.events() if e["event"] != "joined"]
        assert ("vanished", "ada") in events or ("absent", "ada") in events, events
        assert ("lost", "ada") in events and all(site == "ada" for _, site in events), events
        alone = in_process(world, "frameworks=[fedllm]", "data.train=bob.csv")
        [there] = garden.results()["runs"]
        [here] = json.loads((alone / "results.json").read_text(encoding="utf-8"))["runs"]
        assert there["adapter_sha256"] == here["adapter_sha256"]


def test_a_lost_superlink_costs_a_round_at_most(world: World) -> None:
    """Flower forgets the run; the same app with the same run folder goes on after the last committed round."""
    with Garden(world, ["frameworks=[fedllm]", "rounds=3"], name="lost") as garden:
        garden.plant()
        garden.begin()
        garden.until(lambda: "round 1 " in garden.log("run"))
        garden.kill("link")
        for site in world.sites:
            garden.kill(site)
        assert garden.ended("run", 60) == 6, garden.said()
        before = len(garden.log("run"))
        garden.link()
        for site in world.sites:  # one that was receiving when its run was lost would lag by a message
            garden.node_again(site)
        garden.run()
        assert "round 3 " in garden.log("run")[before:]
        same(garden, in_process(world, "frameworks=[fedllm]", "rounds=3"))
