"""The temporal cache and the local loss: against plain loops, in bytes, and over rounds that were broken off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DEPTH, adapted, distance, federation, lab, play, rounds, same
from torch import Tensor

from fedtrio.checkpoint import Memory, pack_tree, unpack_tree
from fedtrio.config import Config
from fedtrio.data.batches import Batch
from fedtrio.errors import ConfigError
from fedtrio.frameworks import Split
from fedtrio.frameworks.lab import Lab
from fedtrio.frameworks.split_cache import cosine, next_threshold
from fedtrio.frameworks.split_local import NAME, auxiliary
from fedtrio.ledger import Ledger
from fedtrio.message import Reply, decode
from fedtrio.meter import Meter
from fedtrio.models.cut import unpack
from fedtrio.models.train import task_loss
from fedtrio.program import Site, drive
from fedtrio.wires.loopback import Loopback

FEW = [("gpt2", "classification"), ("llama", "causal-lm"), ("qwen3", "causal-lm"), ("bert", "classification")]
REST = [("gpt2", "causal-lm"), ("llama", "classification"), ("qwen3", "classification")]
ALL = FEW + [pytest.param(*case, marks=pytest.mark.slow) for case in REST]
LABELS_AT = ("server", "client")
SIZES = (5, 8, 3)
FROZEN = r".*\.h\.[23]\.attn\.c_attn"


def ups(folder: Path) -> list[Reply]:
    replies = [decode(path.read_bytes()) for path in sorted(folder.glob("*-up-*"))]
    return [reply for reply in replies if reply.kind.startswith("activations")]


def tokens(run: Any) -> int:
    return sum(len(ids) for site in run.sites.values() for ids in site.data.encoded.input_ids)


# The cache -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "task"), ALL)
def test_always_sent_is_no_cache(kind: str, task: str) -> None:
    """S8: with a threshold that every cosine is below, not one bit and not one byte of a tensor differs."""
    for labels in LABELS_AT:
        plain = play(Split(labels=labels), adapted(kind, task), (5, 3), epochs=1)  # type: ignore[arg-type]
        run = play(Split(labels=labels, cache="fixed", cache_threshold=2), adapted(kind, task), (5, 3), epochs=1)  # type: ignore[arg-type]
        assert same(run.adapter, plain.adapter)
        assert run.ledger.total("payload") == plain.ledger.total("payload")
        assert len(run.state["cache"]) == 8 + 2 + 1 and len(run.sites["site-1"].memory["cache"]) == 5 + 1


@pytest.mark.parametrize("labels", LABELS_AT)
def test_below_a_frozen_cut_nothing_is_lost_and_each_text_travels_once(labels: Any) -> None:
    """S8: whatever the threshold; batches are others in each epoch, which moves the last digits alone."""
    model = adapted("gpt2", target_modules=FROZEN)
    plain = play(Split(labels=labels), model)
    for threshold in (0.5, 0.9999):
        run = play(Split(labels=labels, cache="fixed", cache_threshold=threshold), model)
        assert distance(run.adapter, plain.adapter) < 1e-10
        spared = plain.ledger.total("payload", direction="up") - run.ledger.total("payload", direction="up")
        assert spared == (2 * 2 - 1) * tokens(run) * model.width * 8  # two rounds of two epochs, but one


@pytest.mark.parametrize(
    ("kind", "labels", "threshold"), [("gpt2", "server", 0.5), ("qwen3", "client", 0.75), ("bert", "server", 0.984)]
)
def test_against_a_loop_that_remembers(kind: str, labels: Any, threshold: float, tmp_path: Path) -> None:
    """Two rounds of three sites; what is not sent is what was, the gradient is that at it, and ρ·T·d·b bytes go up."""
    model = adapted(kind)
    method = Split(labels=labels, cache="fixed", cache_threshold=threshold)
    run = play(method, model, frames=tmp_path)
    setting, mean = lab(model), dict(model.initial)
    known: dict[tuple[str, int], Tensor] = {}
    sent = total = 0
    for setting.round in (1, 2):
        ends: dict[str, Mapping[str, Tensor]] = {}
        for name, site in run.sites.items():
            learner = setting.learner(mean)
            for step, batch in enumerate(site.data.batches(setting.round)):
                h_ND = model.forward(learner.tensors, batch.lengths_B, batch.ids_BT, span=(-1, 2))
                for text, h_TD in zip(batch.texts, h_ND.detach().split(batch.lengths_B.tolist()), strict=True):
                    total += len(h_TD)
                    if (name, text) not in known or cosine(h_TD, known[name, text]) < threshold:
                        known[name, text], sent = h_TD.clone(), sent + len(h_TD)
                there_ND = torch.cat([known[name, text] for text in batch.texts]).requires_grad_()
                logits = model.forward(learner.tensors, batch.lengths_B, h_ND=there_ND, span=(2, None))
                task_loss(logits, batch.targets).backward()  # type: ignore[arg-type]
                h_ND.backward(there_ND.grad)
                learner.step(setting.progress(setting.round, step, site.data.steps))
            ends[name] = learner.values()
        mean = {n: sum(s.data.weight / 16 * ends[k][n] for k, s in run.sites.items()) for n in mean}  # type: ignore[misc]
    assert distance(run.adapter, mean) < 1e-11
    assert tokens(run) < sent < total  # some moved, some didn't
    assert sum(len(reply.tensors.get("h", ())) for reply in ups(tmp_path)) == sent


class Silent(Loopback):
    """A wire on which one site's answers are lost from its n-th of a round on."""

    victim, left = "site-3", 10**9

    def exchange(self, frames: Any) -> Iterator[tuple[str, bytes]]:
        for site, answer in super().exchange(frames):
            self.left -= site == self.victim
            if site != self.victim or self.left >= 0:
                yield site, answer


def going_on(method: Split, setting: Lab, folder: Path, state: Any, first: int, last: int, lose: int = 10**9) -> Any:
    """Those rounds, with sites that start from what is on disk; in the first the third site falls silent."""
    plain, _ = federation(method, setting, SIZES)
    sites = {n: Site(n, s.data, method, setting, None, Memory(folder / "sites" / n)) for n, s in plain.items()}
    for setting.round in range(first, last + 1):
        wire = Silent(sites)
        wire.left = lose if setting.round == first else 10**9
        wire.start_round("run", setting.round, None)
        frames = folder / f"frames-{setting.round}"
        drive(method.server(setting, state, sorted(sites)), wire, setting.round, Ledger(frames))
        state = unpack_tree(pack_tree(state, {}))[0]  # as a checkpoint
    return state


@pytest.mark.parametrize("settings", [
    {"cache": "fixed", "cache_threshold": 0.5, "labels": "server"},
    {"cache": "adaptive", "cache_threshold": 0.5, "cache_step": 0.01, "labels": "client"},
    pytest.param(
        {"cache": "adaptive", "cache_threshold": 0.5, "labels": "server", "local_loss": True, "variant": "sflv2"},
        marks=pytest.mark.slow,
    ),
])  # fmt: skip
def test_a_resumed_run_ends_in_the_same_bits(settings: Any, tmp_path: Path) -> None:
    """P4: server state and sites' memories on disk, both taken up anew after each round or after the last."""
    method, model = Split(**settings), adapted("gpt2")
    whole = going_on(method, lab(model, rounds=3), tmp_path / "a", method.setup(lab(model)), 1, 3)
    state = method.setup(lab(model))
    for number in (1, 2, 3):
        state = going_on(method, lab(model, rounds=3), tmp_path / "b", state, number, number)
    assert state.keys() == whole.keys() and all(same(state[group], whole[group]) for group in whole)
    flags = "".join(str(r.fact("fresh")) for r in ups(tmp_path / "b" / "frames-3"))
    assert "0" in flags and "1" in flags  # the memory was used


def test_a_site_that_is_lost_and_comes_back(tmp_path: Path) -> None:
    """In mid-round: both sides go back to the round before. At its last word: the site starts anew."""
    method, model = Split(labels="server", cache="fixed", cache_threshold=-1), adapted("gpt2")  # once is enough
    for lose, anew in ((1, False), (3, True)):  # the third site has two batches a round, then its half
        folder = tmp_path / str(lose)
        state = going_on(method, lab(model, rounds=3), folder, method.setup(lab(model)), 1, 1)
        state = going_on(method, lab(model, rounds=3), folder, state, 2, 3, lose - 1)
        replies = [decode(p.read_bytes()) for p in sorted((folder / "frames-3").glob("*-up-site-3-activ*"))]
        flags = "".join(str(reply.fact("fresh")) for reply in replies)
        assert len(flags) == 6 and flags == ("111000" if anew else "000000")
        assert int(state["cache"]["site-3 round"]) == 3


@pytest.mark.parametrize("variant", ["sflv1", "concatenated"])
def test_who_points_to_what_was_never_sent_is_left_out(variant: Any) -> None:
    """The server does not go on with nothing, and the others go on."""
    method, model = Split(labels="server", cache="fixed", variant=variant), adapted("gpt2")
    setting = lab(model, epochs=1)
    sites, wire = federation(method, setting)

    class Lying(Loopback):
        def exchange(self, frames: Any) -> Iterator[tuple[str, bytes]]:
            from dataclasses import replace

            from fedtrio.message import encode

            for site, answer in super().exchange(frames):
                reply = decode(answer)
                if site == "site-2" and not reply.done:
                    tensors = {"labels": reply.tensor("labels")}
                    zeros = {**reply.facts, "fresh": "0" * len(str(reply.fact("fresh")))}
                    answer = encode(replace(reply, tensors=tensors, facts=zeros), 1)
                yield site, answer

    state, setting.round = method.setup(setting), 1
    check = lambda site, sent, reply: method.check(setting, site, sent, reply)  # noqa: E731
    drive(method.server(setting, state, wire.sites), Lying(sites), 1, Ledger(), check)
    assert not any(name.startswith("site-2") for name in state["cache"])
    if variant == "sflv1":
        honest = lab(model, epochs=1)
        others, _ = federation(method, honest)
        del others["site-2"]
        wanted, _ = rounds(method, honest, Loopback(others), 1)
        assert all(same(state[group], wanted[group]) for group in wanted)


def test_the_threshold_moves_with_the_loss(tmp_path: Path) -> None:
    """Up by a step after a round of more loss, down after one of less, as the server and each site are told."""
    assert next_threshold(0.5, 2.0, 1.0, 0.25) == 0.75 and next_threshold(0.9, 1.0, 1.0, 0.05) == pytest.approx(0.85)
    assert next_threshold(0.99, 2.0, 1.0, 0.05) == 1.0 and next_threshold(-1.0, 0.0, 1.0, 0.05) == -1.0
    for labels, rate in (("server", 1e-2), ("client", 3.0)):
        method = Split(labels=labels, cache="adaptive", cache_threshold=0.9, cache_step=0.05)  # type: ignore[arg-type]
        setting = lab(adapted("gpt2"), rounds=4, epochs=1, learning_rate=rate, head_learning_rate=rate, optimizer="sgd")
        _, wire = federation(method, setting)
        state, theta, losses = method.setup(setting), [0.9], []
        for number in range(4):
            folder = tmp_path / f"{labels}-{rate}-{number}"
            state, _ = rounds(method, setting, wire, 1, Ledger(folder), state)
            told = {float(decode(p.read_bytes()).fact("threshold")) for p in folder.glob("*-down-*-adapter.*")}
            assert told == {theta[-1]}
            theta.append(float(state["cache"]["threshold"]))
            losses.append(float(state["cache"]["loss"]))
        wanted = [0.9, 0.9]
        for before, loss in pairwise(losses):
            wanted.append(next_threshold(wanted[-1], loss, before, 0.05))
        assert theta == wanted and len(set(theta)) > 1


def test_cosine_of_texts() -> None:
    h_TD = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert cosine(h_TD, h_TD) == pytest.approx(1.0, abs=1e-15) and cosine(h_TD, -2 * h_TD) == pytest.approx(-1.0)
    assert cosine(h_TD, 0 * h_TD) == 0.0
    assert cosine(torch.tensor([[3.0], [0.0]]), torch.tensor([[3.0], [4.0]])) == pytest.approx(0.6)


# The local loss ------------------------------------------------------------------------------------------------------


def aux_logits(model: Any, weight: Tensor, h_ND: Tensor, batch: Batch) -> Tensor:
    if model.task == "causal-lm":
        embeddings = model.module.get_input_embeddings().weight
        return unpack(torch.nn.functional.linear(h_ND, weight), batch.lengths_B) @ embeddings.T
    means = torch.stack([h_TD.mean(0) for h_TD in h_ND.split(batch.lengths_B.tolist())])
    return torch.nn.functional.linear(means, weight)


@pytest.mark.parametrize(("kind", "task"), ALL)
@pytest.mark.parametrize(("every", "clip"), [(2, 0.05), pytest.param(1, None, marks=pytest.mark.slow)])
def test_local_loss_against_a_plain_loop(kind: str, task: str, every: int, clip: float | None) -> None:
    """Two losses, two halves: the site's from its auxiliary head, the server's from activations that are data to it."""
    model, sizes = adapted(kind, task), (9, 4)
    method = Split(labels="server", local_loss=True, send_every=every)
    run = play(method, model, sizes, n=1, max_grad_norm=clip)
    setting = lab(model, rounds=1, max_grad_norm=clip)
    ends: dict[str, dict[str, Tensor]] = {}
    below = setting.model.part(model.initial, (-1, 2))
    for name, site in run.sites.items():
        own = setting.learner({**below, **auxiliary(setting)})
        top = setting.learner({n: t for n, t in model.initial.items() if n not in below})
        for step, batch in enumerate(site.data.batches(1)):
            bottom = {n: t for n, t in own.tensors.items() if n != NAME}
            h_ND = model.forward(bottom, batch.lengths_B, batch.ids_BT, span=(-1, 2))
            there_ND, progress = h_ND.detach(), setting.progress(1, step, site.data.steps)
            task_loss(aux_logits(model, own.tensors[NAME], h_ND, batch), batch.targets).backward()  # type: ignore[arg-type]
            own.step(progress)
            if step % every == 0:
                logits = model.forward(top.tensors, batch.lengths_B, h_ND=there_ND, span=(2, None))
                task_loss(logits, batch.targets).backward()  # type: ignore[arg-type]
                top.step(progress)
        ends[name] = {**own.values(), **top.values()}
    p = {name: site.data.weight / sum(s.data.weight for s in run.sites.values()) for name, site in run.sites.items()}
    mean = {n: sum(p[s] * ends[s][n] for s in ends) for n in ends["site-1"]}
    assert distance({**run.state["site"], **run.state["server"]}, mean) < 1e-12  # type: ignore[arg-type]
    assert distance({NAME: mean[NAME]}, auxiliary(setting)) > 1e-4  # type: ignore[dict-item]
    assert run.adapter.keys() == model.initial.keys()  # nothing of it is saved
    assert {e.kind for e in run.ledger if e.direction == "down"} == {"adapter", "step taken"}
    assert not run.ledger.total("payload", direction="down", kind="step taken")


def test_local_loss_in_bytes_and_operations() -> None:
    """T·d·b/m up, and down nothing but the half; the auxiliary head is counted at the site."""
    model, meter, plain = adapted("gpt2"), Meter({}), Meter({})
    every = [play(Split(labels="server", local_loss=True, send_every=m), model, (8,), n=1) for m in (1, 2, 4)]
    assert [run.ledger.total("messages", direction="up") for run in every] == [5, 3, 2]
    run = play(Split(labels="server", local_loss=True), model, (8,), n=1, meter=meter)
    play(Split(labels="server"), model, (8,), n=1, meter=plain)
    head = 2 * (2 * model.classes * model.width) + 2 * model.classes * model.width  # forward, and both gradients
    assert meter.total("flops") - plain.total("flops") == 2 * 8 * head
    assert run.ledger.total("payload", direction="down", kind="adapter") == 8 * sum(
        t.numel() for t in run.state["site"].values()
    )


@pytest.mark.parametrize("variant", ["sflv2", "sequential", "concatenated"])
def test_local_loss_with_one_server_half(variant: Any) -> None:
    """The sites' own halves are those of sflv1 (but for sequential), whatever the server does."""
    model = adapted("gpt2")
    alone = play(Split(labels="server", local_loss=True), model, n=1)
    run = play(Split(labels="server", local_loss=True, variant=variant, cut={"site-1": 2, "others": 2}), model, n=1)
    assert same(run.state["site"], alone.state["site"]) == (variant != "sequential")
    assert distance(run.state["server"], alone.state["server"]) > 1e-4
    mixed = Split(labels="server", local_loss=True, variant=variant, cut={"site-1": 1, "others": DEPTH})
    assert all(bool(t.isfinite().all()) for t in play(mixed, model, n=1).adapter.values())


def test_settings_that_do_not_go_together() -> None:
    for split, says in (
        ({"local_loss": True, "labels": "client"}, "local_loss needs labels: server"),
        ({"local_loss": True, "last_blocks": 1}, "last_blocks and local_loss"),
        ({"send_every": 2}, "send_every needs local_loss"),
        ({"cache_threshold": 3}, "less than or equal to 2"),
    ):
        with pytest.raises(ValueError, match=says):
            Config.model_validate({"split": split})
    causal = Config(task="causal-lm", split=Split(local_loss=True))
    assert causal.resolved().split.labels == "server"


def test_embeddings_of_another_width() -> None:
    model = adapted("gpt2", "causal-lm")
    width, model.width = model.width, 7
    try:
        with pytest.raises(ConfigError, match="embeddings as wide as the blocks, not 32 and 7"):
            Split(local_loss=True, labels="server").admit(model, lab(model).train, [])
    finally:
        model.width = width
