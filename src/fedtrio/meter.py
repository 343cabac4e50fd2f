"""The meter: floating point operations, memory and seconds of a site, counted while it works.

* **FLOPs** are counted, not estimated: each operation of the forward and the backward pass is seen the first time a
  shape occurs, and the count reused for that shape (formulas of `torch.utils.flop_counter`: matrix products, 2 FLOPs
  for a multiply-add).
* **Memory** is modelled from counted parts: weights held, trainable tensors with gradients and optimizer state, and
  the tensors that autograd keeps for the backward pass, counted once for each shape.
* **Seconds** are wall-clock seconds in which the site worked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, register_flop_formula

GROUPED = getattr(torch.ops.aten, "_grouped_mm", None)  # experts: each group of rows with a matrix of its own


def _grouped_flops(a: Any, b: Any, *rest: Any, **more: Any) -> int:
    """Of [S, K]·[E, K, N], each row in one group; or for a weight's gradient [K, S]·[S, N] in groups of S."""
    return 2 * a[0] * a[1] * b[-1]


if GROUPED is not None and GROUPED not in flop_registry:
    register_flop_formula(GROUPED)(_grouped_flops)


@dataclass
class Effort:
    """What one site has spent so far."""

    flops: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    held_bytes: int = 0  # weights and trainable state, now
    saved_bytes: int = 0  # kept for backward passes that are still to come, now

    def spent(self) -> dict[str, int | float]:
        """What a site says of itself, and keeps in its memory."""
        return {"flops": int(self.flops), "seconds": self.seconds, "peak_bytes": int(self.peak_bytes)}

    def restore(self, spent: Mapping[str, int | float]) -> None:
        """Go on from what `spent` said, or from nothing."""
        self.flops, self.seconds = int(spent.get("flops", 0)), float(spent.get("seconds", 0.0))
        self.peak_bytes, self.held_bytes, self.saved_bytes = int(spent.get("peak_bytes", 0)), 0, 0


@dataclass(frozen=True)
class Cost:
    """What one pass takes: FLOPs, and bytes kept for its backward pass."""

    flops: int
    saved_bytes: int


class Meter:
    """Counts only while a site works (`at`), so a server that shares the process costs its clients nothing."""

    def __init__(self, costs: dict[Hashable, Cost] | None = None) -> None:
        self._costs = {} if costs is None else costs  # may be shared by runs on the same model
        self._efforts: dict[str, Effort] = {}
        self._site: Effort | None = None

    @contextmanager
    def at(self, site: str) -> Iterator[None]:
        """Everything inside is the work of that site."""
        effort = self._site = self.effort(site)
        start = time.perf_counter()
        try:
            yield
        finally:
            effort.seconds += time.perf_counter() - start
            self._site = None

    def hold(self, nbytes: int) -> None:
        """The site now holds that many bytes of weights, trainable tensors, gradients and optimizer state."""
        if self._site is not None:
            self._site.held_bytes, self._site.saved_bytes = nbytes, 0
            self._site.peak_bytes = max(self._site.peak_bytes, nbytes)

    @contextmanager
    def work(self, key: tuple[Hashable, ...], weights: Callable[[], set[int]]) -> Iterator[None]:
        """One pass; `key` is `(direction, span, shape, with gradients)`, and the same key costs the same.

        `weights()` gives the storage addresses of parameters: autograd keeps them too, but they are no activations.
        """
        effort = self._site
        if effort is None:
            yield
            return
        if key in self._costs:
            yield
        else:
            with Watch(weights()) as watch:
                yield
            self._costs[key] = watch.cost()
        effort.flops += self._costs[key].flops
        forward = ("forward", *key[1:])
        kept = self._costs[forward].saved_bytes if forward in self._costs else 0
        if key[0] == "forward":
            effort.saved_bytes += kept
            effort.peak_bytes = max(effort.peak_bytes, effort.held_bytes + effort.saved_bytes)
        else:
            effort.saved_bytes -= kept

    def effort(self, site: str) -> Effort:
        """What that site has spent."""
        return self._efforts.setdefault(site, Effort())

    def total(self, name: str) -> float:
        """Sum over sites of `flops` or `seconds`."""
        return sum(getattr(effort, name) for effort in self._efforts.values())

    @property
    def peak_bytes(self) -> int:
        """The largest peak of any site."""
        return max((effort.peak_bytes for effort in self._efforts.values()), default=0)


class Watch(TorchDispatchMode):
    """Counts FLOPs by torch's formulas, and the distinct storages saved for backward.

    Not one bit of a result changes: operations run as they are, while `FlopCounterMode` would first take some apart.
    """

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self._weights = weights
        self._flops = 0
        self._saved: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self._flops += formula(*args, **(kwargs or {}), out_val=output)
        return output

    def _pack(self, tensor: Tensor) -> Tensor:
        place = self.place(tensor)
        # indices depend on the texts and not on the shape alone; they are a few bytes a token
        if tensor.is_floating_point() and place not in self._weights:
            self._saved[place] = tensor.untyped_storage().nbytes()
        return tensor

    def place(self, tensor: Tensor) -> int:
        """Which storage a tensor lies in."""
        return tensor.untyped_storage().data_ptr()

    def __enter__(self) -> Watch:
        self._hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.__exit__(*error)

    def cost(self) -> Cost:
        """What has been counted."""
        return Cost(self._flops, sum(self._saved.values()))


def peak_memory() -> int:
    """Bytes of memory that this process has held at most (peak resident set, libraries included)."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
