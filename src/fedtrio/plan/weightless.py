"""A model without weights: its adapter, what each stretch of it holds, and what each pass over it costs.

Two blocks of it are built on the meta device, and passes over them are run on tensors that have a shape and no values,
under the same counting as a run's (`meter.Watch`). What a pass costs is a polynomial in the batch's shape, the number
of blocks and the rank; it is found from a few counted passes, so that 80 blocks cost no more time than two.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import flop_registry

from ..aggregation.lora import core_name, factor_of, pairs
from ..aggregation.rules import fedsb_adapter
from ..meter import GROUPED, Cost, Watch
from ..models.adapter import AdaptedModel, adapt
from ..models.cut import WHOLE, Span, within
from ..models.load import Task
from ..models.lora import LoraConfig
from ..models.train import Adapter
from .quantity import Quantity

CPU = torch.device("cpu")


@dataclass(frozen=True)
class How:
    """In which way a span is passed: what is frozen of the adapter, and whether what enters it wants a gradient."""

    frozen: str = ""  # "A" or "B": that factor; "AB": both, a core between them trains
    below: bool = True
    dropout: bool = True
    rank: int | None = None  # of the adapter, where it is not the model's


class _Places(Watch):
    """Tensors without values lie nowhere, but each storage is an object of its own."""

    def place(self, tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is not GROUPED:
            return super().__torch_dispatch__(func, types, args, kwargs)
        a, b = args[:2]  # on shapes alone torch does this product in bf16 only
        self._flops += flop_registry[GROUPED](*args, **(kwargs or {}), out_val=None)
        return a.new_empty(a.shape[0], b.shape[-1])


class Ghost(AdaptedModel):
    """An adapted model on the meta device; a pass over it runs on shapes alone, as it would on the CPU."""

    def __init__(self, base: Any, lora: LoraConfig, task: Task, precision: str, pad_to_multiple_of: int) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._shadows: dict[str, Tensor] = {}
        self._costs: dict[Hashable, tuple[Cost, int]] = {}
        self._watch = _Places(set())
        with torch.device("meta"):
            adapted = adapt(base, lora, task)
        super().__init__(adapted, task, precision, torch.device("meta"), pad_to_multiple_of)

    def _probe(self) -> None:
        self.device = CPU  # which the shapes stand for from here on
        super()._probe()

    def _call(self, adapter: Adapter, ids_BT: Tensor, mask_BT: Tensor) -> Any:
        ids_BT, mask_BT = self._mode.from_tensor(ids_BT), self._mode.from_tensor(mask_BT)
        with self._mode, self._watch:
            return super()._call({**self._weights(), **adapter}, ids_BT, mask_BT)

    def _weights(self) -> dict[str, Tensor]:
        """All weights as shapes; tied ones are one and the same."""
        if not self._shadows:
            module, made = self.module, {}
            for name, tensor in (
                *module.named_parameters(remove_duplicate=False),
                *module.named_buffers(remove_duplicate=False),
            ):
                made.setdefault(id(tensor), self._shadow(tensor.shape, tensor.dtype))
                self._shadows[name] = made[id(tensor)]
        return self._shadows

    def _shadow(self, shape: Any, dtype: torch.dtype) -> Tensor:
        return FakeTensor(self._mode, torch.empty(shape, dtype=dtype, device="meta"), CPU)

    def count(self, shape: tuple[int, int], span: Span, how: How) -> tuple[Cost, int]:
        """Of one pass over a span: FLOPs and bytes kept of the forward pass, FLOPs of the backward pass."""
        key = (shape, span, how)
        if key not in self._costs:
            self._costs[key] = self._counted(shape, span, how)
        return self._costs[key]

    def _counted(self, shape: tuple[int, int], span: Span, how: How) -> tuple[Cost, int]:
        lengths_B, h_ND = torch.full((shape[0],), shape[1]), None
        if span[0] >= 0:
            h_ND = self._shadow((shape[0] * shape[1], self.width), self.dtype).requires_grad_(how.below)
        adapter = self._trained(self.part(self.initial, span), how)
        known = {self._watch.place(tensor) for tensor in (*self._weights().values(), *adapter.values())}
        forward = self._watch = _Places(known)
        seed = 0 if how.dropout else None
        output = self.forward(adapter, lengths_B, h_ND=h_ND, span=span, dropout_seed=seed)
        with self._mode, _Places(set()) as backward:
            if output.requires_grad:
                output.sum().backward()
        self._watch = _Places(set())
        return forward.cost(), backward.cost().flops

    def _trained(self, tensors: Adapter, how: How) -> dict[str, Tensor]:
        """Shapes of an adapter, with gradients where it trains."""
        made = {name: self._shadow(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        if how.frozen == "AB":
            cores = {core_name(pair): self._shadow((self.rank, self.rank), self.dtype) for pair in pairs(made).values()}
            rest = {name: tensor for name, tensor in made.items() if factor_of(name) is None}
            trained = {name: tensor.requires_grad_() for name, tensor in {**cores, **rest}.items()}
            return fedsb_adapter(made, trained)
        return {name: t.requires_grad_(factor_of(name) != how.frozen) for name, t in made.items()}


class Kin(Protocol):
    """Models that differ in rank alone, and what was counted of them; see `family`."""

    def model(self, rank: int) -> Weightless:
        """The one of that rank."""
        ...

    def quantities(self, model: Weightless, span: Span, how: How) -> tuple[Quantity, Quantity, Quantity]:
        """Forward FLOPs, bytes kept for backward, and backward FLOPs of a pass."""
        ...


class Weightless(AdaptedModel):
    """The same at its full depth: what frameworks ask of a model, but for running it."""

    def __init__(self, ghost: Ghost, depth: int, blocks: str, family: Kin) -> None:
        self.__dict__ |= ghost.__dict__
        self.ghost, self.depth, self.blocks, self.family = ghost, depth, blocks, family
        self.initial, self._owner = {}, {}
        for name, tensor in ghost.initial.items():
            for full, places in self._repeated(name, ghost._owner[name]):
                self.initial[full] = tensor
                self._owner[full] = places

    def _repeated(self, name: str, places: list[int]) -> list[tuple[str, list[int]]]:
        """The names that a tensor of the ghost stands for: one in each block, or itself."""
        inside = re.fullmatch(rf"({re.escape(self.blocks)}\.)(\d+)(\..+)", name)
        if self.depth == self.ghost.depth or inside is None:
            return [(name, [self.depth if p == self.ghost.depth else p for p in places])]
        if int(inside[2]) > 0:
            return []
        return [(f"{inside[1]}{i}{inside[3]}", [i]) for i in range(self.depth)]

    def held_bytes(self, *spans: Span) -> int:
        """Bytes of the frozen weights that run within the spans."""
        return self._over(spans, lambda p: p.numel() * p.element_size())

    @property
    def parameters(self) -> int:
        """Number of the frozen weights of the whole model, tied ones once."""
        return self._over((WHOLE,), nn.Parameter.numel)

    @property
    def reads(self) -> int | None:
        """Tokens of a text at most; None where it sets no limit."""
        return getattr(self.module.config, "max_position_embeddings", None)

    def _over(self, spans: Sequence[Span], of: Callable[[nn.Parameter], int]) -> int:
        """A sum over the frozen weights within the spans: the ghost's ends, and one block for each."""
        few, depth = self.ghost.depth, self.depth
        inside = [p for p in range(-1, depth + 1) if any(within(p, span, depth) for span in spans)]
        ends: list[Span] = [(-1, 0)] if -1 in inside else []
        ends += [(few, None)] if depth in inside else []
        blocks = [p for p in inside if 0 <= p < depth]
        if few == depth:
            return sum(map(of, self.ghost.frozen(*ends, *((p, p + 1) for p in blocks))))
        return sum(map(of, self.ghost.frozen(*ends))) + len(blocks) * sum(map(of, self.ghost.frozen((0, 1))))

    def padded(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The batch's shape as it runs."""
        width, most = shape[1], self.reads
        wide = width + -width % self.pad_to_multiple_of
        return shape[0], min(wide, max(width, most)) if most else wide

    # What passes cost ----------------------------------------------------------------------------------------------

    def cost(self, shape: tuple[int, int], span: Span, how: How) -> tuple[Cost, int]:
        """Of one pass: FLOPs and bytes kept of the forward pass, FLOPs of the backward pass.

        `shape` is (B, T) before padding to a multiple.
        """
        if how.rank is not None and how.rank != self.rank:
            return self.family.model(how.rank).cost(shape, span, replace(how, rank=None))
        found = self.family.quantities(self, span, how)
        forward, saved, backward = (q.at(*self.padded(shape)) for q in found)
        return Cost(forward, saved), backward

    def work(self, shape: tuple[int, int], span: Span) -> tuple[int, int]:
        """As of the model itself, of one block or of an end; a block after the first costs what the second one does."""
        at, few = span[0], self.ghost.depth
        here = few if at == self.depth else min(at, few - 1)
        how = How(below=at >= 0 and bool(self.part(self.initial, (-1, at))), dropout=False)
        forward, backward = self.ghost.count(shape, (here, here + 1 if here < few else None), how)
        return forward.flops + backward, forward.saved_bytes

    def auxiliary_cost(self, shape: tuple[int, int]) -> tuple[Cost, int]:
        """The same of `split_local.local_gradient`, which is no span of the model.

        Classification: [B, D]·[D, C]. Language modelling: [BT, D]·[D, D]·[D, V], whose last matrix is frozen, and kept.
        """
        (B, T), D, C, size = shape, self.width, self.classes, self.dtype.itemsize
        if self.task == "classification":
            return Cost(2 * B * D * C, size * (B * D + B * C + 1)), 4 * B * D * C
        saved = B * T * D + C * D + B * (T - 1) * C + 1
        return Cost(2 * B * T * D * (D + C), size * saved), 2 * B * T * D * (2 * D + C)
