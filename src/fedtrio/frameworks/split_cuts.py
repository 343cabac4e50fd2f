"""Where to cut for a site: what a mini-batch costs at each cut, and the cut at which a step takes the least time."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..errors import ConfigError
from ..models.adapter import AdaptedModel
from ..models.cut import Span
from ..models.train import Learner, TrainConfig


@dataclass(frozen=True)
class Device:
    """What a site has: FLOPs a second, bytes a second of its line, and bytes of memory (None: no limit)."""

    flops_per_second: float
    bytes_per_second: float
    memory_bytes: float | None = None


@dataclass(frozen=True)
class Costs:
    """Of one mini-batch, for each cut 0 … : FLOPs of the site, bytes both ways, bytes that the site holds.

    `flops` are those of the whole model.
    """

    flops: float
    site_flops: tuple[float, ...]
    bytes: tuple[float, ...]
    memory: tuple[float, ...]


def seconds(costs: Costs, device: Device, server_flops_per_second: float, cut: int) -> float:
    """T(c) = F(c)/φ_site + bytes(c)/R + (F(L) − F(c))/φ_server: of one step, without the line's latency.

    Three terms one after the other: the site computes, the line carries, the server computes.
    """
    own = costs.site_flops[cut]
    elsewhere = (costs.flops - own) / server_flops_per_second
    return own / device.flops_per_second + costs.bytes[cut] / device.bytes_per_second + elsewhere


def choose(costs: Costs, device: Device, server_flops_per_second: float, least: int, site: str = "a site") -> int:
    """The cut c ≥ `least` of the smallest T(c) among those that fit into the memory; the lowest of equals.

    Raises ConfigError where none fits.
    """
    limit = float("inf") if device.memory_bytes is None else device.memory_bytes
    fitting = [c for c in range(least, len(costs.site_flops)) if costs.memory[c] <= limit]
    if not fitting:
        needed = min(costs.memory[least:], default=None)
        why = f"the smallest half needs {needed:,.0f} bytes" if needed is not None else "the model has fewer blocks"
        raise ConfigError(f"split.cut auto finds no cut from split.least_cut {least} on for {site}: {why}")
    return min(fitting, key=lambda cut: (seconds(costs, device, server_flops_per_second, cut), cut))


_MEASURED: WeakKeyDictionary[AdaptedModel, dict[tuple[int, int, int | None, str], Costs]] = WeakKeyDictionary()


def of_batch(model: AdaptedModel, train: TrainConfig, last: int | None = None) -> Costs:
    """Counted on a batch of `batch_size` texts of `max_length` tokens, each block once.

    `last`: None where the head is at the server, else the blocks before the head that run at the site too. Numbers
    travel as they are in the model (4 bytes, 8 in fp64), whatever codec is set. Memory is a little more than a run
    keeps: what one block hands to the next counts for both.
    """
    positions = getattr(model.module.config, "max_position_embeddings", None)
    length = min(train.max_length, positions or train.max_length)
    key = (train.batch_size, length, last, train.optimizer)
    known = _MEASURED.setdefault(model, {})
    if key not in known:
        observe, model.observe = model.observe, lambda key, weights: nullcontext()  # it is no site's work
        try:
            known[key] = _measured(model, train, length, last)
        finally:
            model.observe = observe
    return known[key]


def _measured(model: AdaptedModel, train: TrainConfig, length: int, last: int | None) -> Costs:
    lengths_B = torch.full((train.batch_size,), length)
    # position -1: embeddings; then the blocks; then norm and head
    works = [_work(model, lengths_B, (p, p + 1 if p < model.depth else None)) for p in range(-1, model.depth + 1)]
    flops = list(accumulate(flops for flops, _ in works))
    kept = list(accumulate(kept for _, kept in works))
    end = model.depth - (last or 0)
    of_top = (0, 0) if last is None else (flops[-1] - flops[end], kept[-1] - kept[end])
    h_bytes = train.batch_size * length * model.width * torch.empty((), dtype=model.dtype).element_size()
    cuts = range((model.depth if last is None else end) + 1)
    memory, traffic = [], []
    for cut in cuts:
        spans: tuple[Span, ...] = ((-1, cut),) if last is None else ((-1, cut), (end, None))
        learner = Learner(model.part(model.initial, *spans), train)
        memory.append(model.held_bytes(*spans) + learner.nbytes + kept[cut] + of_top[1])
        gradients_down = bool(model.part(model.initial, (-1, cut)))
        traffic.append(h_bytes * (1 + gradients_down + (0 if last is None else 2)))
    return Costs(flops[-1], tuple(flops[cut] + of_top[0] for cut in cuts), tuple(traffic), tuple(memory))


def _work(model: AdaptedModel, lengths_B: Tensor, span: Span) -> tuple[int, int]:
    """FLOPs of a forward and backward pass over a span, and the bytes that autograd keeps in between."""
    adapter = {name: tensor.detach().requires_grad_() for name, tensor in model.part(model.initial, span).items()}
    below = span[0] >= 0 and bool(model.part(model.initial, (-1, span[0])))
    h_ND = None
    if span[0] >= 0:
        h_ND = torch.zeros(int(lengths_B.sum()), model.width, dtype=model.dtype, device=model.device)
        h_ND.requires_grad_(below)
    weights = {p.untyped_storage().data_ptr() for p in (*model.module.parameters(), *adapter.values())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model.forward(adapter, lengths_B, h_ND=h_ND, span=span)
        if output.requires_grad:
            output.sum().backward()
    return counter.get_total_flops(), sum(kept.values())
