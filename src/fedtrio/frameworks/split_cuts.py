"""Where to cut for a site: what a mini-batch costs at each cut, and the cut at which a step takes the least time."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from weakref import WeakKeyDictionary

import torch

from ..errors import ConfigError
from ..models.adapter import AdaptedModel
from ..models.cut import Span
from ..models.train import TrainConfig


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
    # equal where the server is as fast as the site, but for rounding
    return min(fitting, key=lambda cut: (float(f"{seconds(costs, device, server_flops_per_second, cut):.9g}"), cut))


_MEASURED: WeakKeyDictionary[AdaptedModel, dict[tuple[int, int, int | None, str], Costs]] = WeakKeyDictionary()


def of_batch(model: AdaptedModel, train: TrainConfig, last: int | None = None) -> Costs:
    """Counted on a batch of `batch_size` texts of `max_length` tokens, each block once (`AdaptedModel.work`).

    `last`: None where the head is at the server, else the blocks before the head that run at the site too. Numbers
    travel as they are in the model (4 bytes, 8 in fp64), whatever codec is set. Memory is a little more than a run
    keeps: what one block hands to the next counts for both.
    """
    positions = getattr(model.module.config, "max_position_embeddings", None)
    length = min(train.max_length, positions or train.max_length)
    key = (train.batch_size, length, last, train.optimizer)
    known = _MEASURED.setdefault(model, {})
    if key not in known:
        known[key] = _measured(model, train, length, last)
    return known[key]


def _measured(model: AdaptedModel, train: TrainConfig, length: int, last: int | None) -> Costs:
    shape = train.batch_size, length
    # position -1: embeddings; then the blocks; then norm and head
    works = [model.work(shape, (p, p + 1 if p < model.depth else None)) for p in range(-1, model.depth + 1)]
    flops = list(accumulate(flops for flops, _ in works))
    kept = list(accumulate(kept for _, kept in works))
    end = model.depth - (last or 0)
    of_top = (0, 0) if last is None else (flops[-1] - flops[end], kept[-1] - kept[end])
    h_bytes = train.batch_size * length * model.width * torch.empty((), dtype=model.dtype).element_size()
    cuts = range((model.depth if last is None else end) + 1)
    memory, traffic = [], []
    for cut in cuts:
        spans: tuple[Span, ...] = ((-1, cut),) if last is None else ((-1, cut), (end, None))
        trained = train.state_bytes(model.part(model.initial, *spans))
        memory.append(model.held_bytes(*spans) + trained + kept[cut] + of_top[1])
        gradients_down = bool(model.part(model.initial, (-1, cut)))
        traffic.append(h_bytes * (1 + gradients_down + (0 if last is None else 2)))
    return Costs(flops[-1], tuple(flops[cut] + of_top[0] for cut in cuts), tuple(traffic), tuple(memory))
