"""Codecs at the cut, forward and backward each by itself: in use, within their bounds, and as many bytes as they say.

Bytes are those of docs/frameworks.md: N tokens of width d, and nothing for padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from tiny import WIDTH, adapted, distance, federation, lab
from torch import Tensor

from fedtrio.codecs import Crossing, parse
from fedtrio.coding import Coding, codecs_of
from fedtrio.frameworks import Split
from fedtrio.frameworks.lab import State
from fedtrio.ledger import Ledger
from fedtrio.message import Reply, decode
from fedtrio.models.train import task_loss
from fedtrio.program import Site, drive
from fedtrio.wires.loopback import Loopback

Bound = Callable[[Tensor], Tensor]  # of activations [N, d]: the largest error of each number


def relative(bits: int) -> Bound:
    return lambda h_ND: h_ND.abs() * 2.0**-bits


def steps(levels: float) -> Bound:
    """Half a step, which is a bf16 number and up to 1/128 wider than it must be."""
    return lambda h_ND: (h_ND.abs().amax(1, keepdim=True) / levels * (1 + 1 / 128) / 2).expand_as(h_ND)


CODECS: dict[str, tuple[Bound | None, Callable[[int], int]]] = {  # error, and bytes of N tokens in fp32
    "fp16": (relative(11), lambda N: 2 * N * WIDTH),
    "bf16": (relative(8), lambda N: 2 * N * WIDTH),
    "int8": (steps(126.49), lambda N: N * (WIDTH + 2)),
    "int4": (steps(7), lambda N: N * (WIDTH // 2 + 2)),
    "topk:8:token": (None, lambda N: N * min(8 * (4 + 1), 8 * 4 + WIDTH // 8)),
    "topk:8:token+int8": (None, lambda N: N * (8 + 2 + WIDTH // 8)),
    "lowrank:4": (None, lambda N: 4 * min(4 * (N + WIDTH), N * WIDTH)),
}
USES = [("gpt2", "client", way, use) for way in ("up", "down") for use in ("activations", "gradients")]
AT_SERVER = [("server", "up", "activations"), ("server", "down", "gradients")]  # forward, and backward
USES += [pytest.param("gpt2", *use, marks=pytest.mark.slow) for use in AT_SERVER]
USES += [(kind, *use) for kind in ("llama", "qwen3", "bert") for use in AT_SERVER]
NAMES = {"activations": "h", "gradients": "dh"}


@dataclass
class Run:
    state: State
    ledger: Ledger
    frames: dict[str, list[Reply]]
    sites: dict[str, Site]


def coded(
    labels: Any, folder: Path, up: Mapping[Any, str], down: Mapping[Any, str], precision: str = "fp32",
    kind: str = "gpt2",
) -> Run:  # fmt: skip
    """One round of three sites with these codecs."""
    method, setting = Split(labels=labels), lab(adapted(kind, precision=precision), epochs=1)
    code = Coding(0, codecs_of(up, "up"), codecs_of(down, "down"))
    plain, _ = federation(method, setting)
    sites = {name: Site(name, site.data, method, setting, coding=code) for name, site in plain.items()}
    state, ledger, setting.round = method.setup(setting), Ledger(folder), 1
    drive(method.server(setting, state, sorted(sites)), Loopback(sites), 1, ledger, coding=code)
    frames = {d: [decode(p.read_bytes()) for p in sorted(folder.glob(f"*-{d}-*"))] for d in ("up", "down")}
    return Run(state, ledger, frames, sites)


def first(run: Run, direction: str, name: str) -> Reply:
    """The first message that holds that tensor: what it is made from no codec has touched yet."""
    return next(r for r in run.frames[direction] if any(key.partition("|")[0] == name for key in r.tensors))


@cache
def plain(labels: str, kind: str = "gpt2") -> Run:
    """Without codecs."""
    with TemporaryDirectory() as folder:
        return coded(labels, Path(folder), {}, {}, kind=kind)


@pytest.mark.parametrize("text", list(CODECS))
@pytest.mark.parametrize(("kind", "labels", "direction", "use"), USES)
def test_in_use_within_its_bound_and_bytes(
    kind: str, labels: Any, direction: str, use: Any, text: str, tmp_path: Path
) -> None:
    """Of the same activations or gradients, with and without the codec; and no other kind of message changes."""
    ways = {"up": {}, "down": {}, direction: {use: text}}
    run, before = coded(labels, tmp_path, ways["up"], ways["down"], kind=kind), plain(labels, kind)
    name, codec = NAMES[use], parse(text, use)
    one = first(run, direction, name)
    assert name not in one.tensors and any("|" in key for key in one.tensors)  # it is on
    check_error(text, first(before, direction, name).tensor(name), codec.decode(one.tensors)[name])
    ends, wanted = ({**r.state["site"], **r.state["server"]} for r in (run, before))
    assert distance(ends, wanted) > 0
    for way in ("up", "down"):
        for reply, full in zip(run.frames[way], before.frames[way], strict=True):
            rows = len(full.tensors.get(name, ())) if way == direction else 0
            spared = 4 * rows * WIDTH - CODECS[text][1](rows) if rows * WIDTH > 64 else 0  # less travels as it is
            assert reply.payload_bytes == full.payload_bytes - spared, (reply.kind, rows)


def check_error(text: str, wanted: Tensor, got: Tensor) -> None:
    """Each number within the codec's bound; what topk and lowrank leave out is what can't be helped."""
    error, bound = (got - wanted).abs(), CODECS[text][0]
    assert float(error.max()) > 0
    if bound is not None:
        assert bool((error <= bound(wanted) + 3e-8).all())  # 2^-25 is half the smallest number of fp16
    elif text.startswith("topk"):
        smallest = wanted.abs().sort(dim=1).values[:, : WIDTH - 8]
        rounding = 0.0 if text == "topk:8:token" else math.sqrt(8) * float(steps(126.49)(wanted).max())
        assert bool((error.norm(dim=1) <= smallest.norm(dim=1) + rounding + 1e-6).all())
        assert bool(((got != 0).sum(1) <= 8).all())
    else:
        rest = torch.linalg.svdvals(wanted.double())[4:].norm()
        assert float(error.double().norm()) <= float(rest) * (1 + 1e-4) + 1e-6


@pytest.mark.parametrize("text", ["int8", "topk:8:token", "lowrank:4", "fp16"])
def test_gradients_pass_straight_through(text: str, tmp_path: Path) -> None:
    """S7: both ways coded, the weights are those of one loop in which what arrives is what was rounded."""
    codecs = {"activations": text}, {"gradients": text}
    run = coded("server", tmp_path, *codecs, precision="fp64")
    model, setting = adapted("gpt2"), lab(adapted("gpt2"), epochs=1)

    def crossed(tensor: Tensor, use: str, direction: str) -> Tensor:
        codec = parse(text, use)
        return codec.decode(codec.encode({"t": tensor.detach()}, Crossing(0, 1, "", direction, 0)))["t"]

    ends, data = {}, {name: site.data for name, site in run.sites.items()}
    for name, own in data.items():
        learner = setting.learner(model.initial)
        for step, batch in enumerate(own.batches(1)):
            h_ND = model.forward(learner.tensors, batch.lengths_B, batch.ids_BT, span=(-1, 2))
            there_ND = crossed(h_ND, "activations", "up").requires_grad_()
            logits = model.forward(learner.tensors, batch.lengths_B, h_ND=there_ND, span=(2, None))
            task_loss(logits, batch.targets).backward()  # type: ignore[arg-type]
            assert there_ND.grad is not None
            h_ND.backward(crossed(there_ND.grad, "gradients", "down"))
            learner.step(setting.progress(1, step, own.steps))
        ends[name] = learner.values()
    total = sum(own.weight for own in data.values())
    mean = {n: sum(data[s].weight / total * ends[s][n] for s in ends) for n in model.initial}
    assert distance({**run.state["site"], **run.state["server"]}, mean) < 1e-12  # type: ignore[arg-type]


def test_as_one_number_without_loss(tmp_path: Path) -> None:
    """S7 and C2: top-k of all, and a projection onto all directions, are no codec at all."""
    for text in (f"topk:{WIDTH}:token", f"lowrank:{WIDTH}"):
        both = {"activations": text, "gradients": text}
        run = coded("client", tmp_path / text.partition(":")[0], both, both)
        for group, wanted in plain("client").state.items():
            assert distance(run.state[group], wanted) == 0.0
