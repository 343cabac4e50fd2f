"""Codecs on the wire: chosen by kind and direction, seen in the ledger, exact where they must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import adapted, federation, lab, public_set, same

from fedtrio.checkpoint import Memory, pack_tree, unpack_tree
from fedtrio.codecs import Crossing
from fedtrio.coding import Coding, codecs_of
from fedtrio.compare import compare
from fedtrio.config import Config, WireConfig
from fedtrio.config_file import load_config
from fedtrio.errors import ConfigError
from fedtrio.frameworks import KD, FedLLM, Split
from fedtrio.ledger import Ledger
from fedtrio.message import Message
from fedtrio.program import Site, drive
from fedtrio.wires.loopback import Loopback

SIZES = (5, 8, 3)


def coding(up: Any = "none", down: Any = "none", seed: int = 0) -> Coding:
    return Coding(seed, codecs_of(up, "up"), codecs_of(down, "down"))


def played(method: Any, code: Coding, rounds: int = 2, folder: Path | None = None, **train: Any) -> Any:
    """State, ledger and sites after so many rounds with that coding."""
    setting = lab(adapted("gpt2", precision="fp32"), public=public_set(n=40), **train)
    plain, _ = federation(method, setting, SIZES)
    sites = {
        name: Site(name, site.data, method, setting, None, Memory(folder / name if folder else None), coding=code)
        for name, site in plain.items()
    }
    state, ledger = method.setup(setting), Ledger()
    for setting.round in range(1, rounds + 1):
        drive(method.server(setting, state, sorted(sites)), Loopback(sites), setting.round, ledger, coding=code)
    return state, ledger, sites


@pytest.mark.parametrize("method", [FedLLM(), KD(), Split(labels="server"), Split(labels="client")])
def test_no_codec_changes_nothing(method: Any) -> None:
    """C2 at its edge: without a codec not one bit and not one byte differs."""
    plain, with_coding = played(method, Coding()), played(method, coding("none", "none", 3))
    assert list(plain[1]) == list(with_coding[1])
    for group in plain[0]:
        assert same(plain[0][group], with_coding[0][group])


@pytest.mark.parametrize(("method", "use"), [
    (FedLLM(), "adapter"), (KD(), "logits"), (Split(labels="server"), "activations"),
    (Split(labels="server"), "gradients"), (Split(labels="client"), "activations"),
    (Split(labels="client"), "gradients"),
])  # fmt: skip
@pytest.mark.parametrize("text", ["fp16", "int8", "int4"])
def test_savings_show_in_the_ledger(method: Any, use: Any, text: str) -> None:
    """Payload of the kinds of that use shrinks in the coded direction and in no other; training stays close."""
    kinds = {
        "adapter": {"adapter"}, "logits": {"logits", "aggregated logits"},
        "activations": {"activations", "activations and labels"}, "gradients": {"activation gradients"},
    }[use]  # fmt: skip
    plain = played(method, Coding())
    for direction in ("up", "down"):
        code = coding({use: text}) if direction == "up" else coding("none", {use: text})
        state, ledger, _ = played(method, code)
        for entry, before in zip(ledger, plain[1], strict=True):
            assert (entry.site, entry.kind, entry.messages) == (before.site, before.kind, before.messages)
            coded = entry.direction == direction and entry.kind in kinds
            share = {"fp16": 0.55, "int8": 0.42, "int4": 0.35}[text]
            assert entry.payload < share * before.payload if coded else entry.payload == before.payload, entry
        trained = {n: t for group in state.values() for n, t in group.items()}
        wanted = {n: t for group in plain[0].values() for n, t in group.items()}
        used = any(entry.direction == direction and entry.kind in kinds for entry in ledger)
        moved = max(float((trained[n] - wanted[n]).abs().max()) for n in wanted)
        assert (0 < moved < 0.5) if used else moved == 0


def test_a_codec_for_updates_sees_updates() -> None:
    """With lr 0 the update is nothing, whatever is dropped of it: F4 stays exact. Else most of it is dropped."""
    method, code = FedLLM(), coding({"adapter": "topk:0.1:plain"})
    still = {"learning_rate": 0.0, "head_learning_rate": 0.0, "weight_decay": 0.0}
    state, _, _ = played(method, code, **still)
    assert same(state["adapter"], adapted("gpt2", precision="fp32").initial)
    start = adapted("gpt2", precision="fp32").initial
    state, _, _ = played(method, code, rounds=1)
    large = [name for name, tensor in start.items() if tensor.numel() > 64]
    changed = sum(int((state["adapter"][name] != start[name]).sum()) for name in large)
    assert 0 < changed <= 3 * 0.11 * sum(start[name].numel() for name in large)  # three sites, a tenth each


def test_error_feedback_is_memory_of_the_site(tmp_path: Path) -> None:
    """C1 over the wire: what was not sent waits in the memory, on disk too, and a repeated round goes back to it."""
    method, code = FedLLM(), coding({"adapter": "topk:0.1"})
    state, ledger, sites = played(method, code, rounds=2)
    other, same_ledger, _ = played(method, code, rounds=2, folder=tmp_path)
    assert list(ledger) == list(same_ledger) and same(state["adapter"], other["adapter"])
    kept = sites["site-1"].memory["feedback"]
    assert kept and any(float(tensor.abs().max()) > 0 for tensor in kept.values())
    assert same(Memory(tmp_path / "site-1").before(3)[0]["feedback"], kept)
    plain, _, _ = played(method, coding({"adapter": "topk:0.1:plain"}), rounds=2)
    assert not same(plain["adapter"], state["adapter"])  # it matters
    groups, _ = unpack_tree(pack_tree({"feedback": kept}, {}))
    assert same(groups["feedback"], kept)


def test_randomness_is_a_function_of_seed_round_and_site() -> None:
    message = Message("adapter", {"w": torch.linspace(-1, 1, 200)})
    code = coding({"adapter": "qsgd:4"}, seed=7)
    zero = Message("adapter", {"w": torch.zeros(200)})

    def sent(seed: int, round: int, site: str) -> Any:
        return list(code.write(message, Crossing(seed, round, site, "up"), zero, {}).tensors.values())

    one = sent(7, 1, "a")
    assert all(torch.equal(x, y) for x, y in zip(one, sent(7, 1, "a"), strict=True))
    for other in (sent(8, 1, "a"), sent(7, 2, "a"), sent(7, 1, "b")):
        assert not all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize(("wire", "wanted"), [
    ({"up": "int9"}, "did you mean 'int8'"), ({"up": {"adapter": "topk:0.1:token"}}, "not for adapter"),
    ({"down": "topk:0.1"}, "not for wire.down"), ({"up": {"weights": "int8"}}, "adapter"),
    ({"up": "topk"}, "lacks its number"),
])  # fmt: skip
def test_refused_in_the_configuration(wire: Any, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        WireConfig(**wire)


def test_from_the_command_line() -> None:
    config = load_config(settings=["wire.up=topk:0.1+int8", "wire.down={activations: int8, gradients: fp16}"])
    assert isinstance(config, Config)
    code = config.wire.coding(3)
    assert code.seed == 3 and set(code.up) == {"adapter"} and set(code.down) == {"activations", "gradients"}
    with pytest.raises(ConfigError, match=r"--set: wire"):
        load_config(settings=["wire.up=zip"])


def test_a_whole_comparison(tmp_path: Path) -> None:
    """Through the command's own path: both sides of every framework use the same codecs."""
    small = ["data.max_train=60", "data.max_test=20", "data.max_public=80", "rounds=1", "threads=1", "clients=2"]
    small += ["partition={name: iid}", "frameworks=[fedllm,kd,split]", "train.precision=fp32"]
    plain = compare(load_config(settings=small), jobs=1)["runs"]
    coded = compare(load_config(settings=[*small, "wire.up=int8", "wire.down=int8"]), tmp_path, jobs=1)["runs"]
    for before, after in zip(plain, coded, strict=True):
        for direction in ("payload_up", "payload_down"):
            assert after[direction] < 0.4 * before[direction]
