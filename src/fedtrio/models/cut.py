"""The cut: run any stretch of a Hugging Face model's blocks without forking its code.

A span `(start, stop)` names blocks `start … stop-1`. A span that starts at -1 begins with the embeddings, one that
stops at None ends with the final norm and the head; all others start from or end in hidden states at a cut. Every
block's `forward` gets a gate that lets hidden states pass below `start`, puts the received ones in at `start`, and
leaves the model at `stop`. Only real tokens cross a cut: hidden states travel packed as `h_ND`, N the sum of the
lengths; texts are padded on the right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError

Span = tuple[int, int | None]
WHOLE: Span = (-1, None)


def find_blocks(module: nn.Module) -> nn.ModuleList:
    """The longest `nn.ModuleList` whose members are all of one class. Raises ModelError where there is none."""
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList) and len({type(b) for b in m}) == 1]
    if not lists:
        raise ModelError(f"{type(module).__name__} has no list of equal blocks, so it can't be cut")
    return max(lists, key=len)


class Reached(Exception):
    """Raised at the end of a span to leave the model; it carries the hidden states."""

    def __init__(self, h_BTD: Tensor) -> None:
        self.h_BTD = h_BTD


class Gates:
    """What the gated blocks of one model consult; also where the model is while it runs (`position`)."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.depth = len(blocks)
        self.position = -1  # -1: embeddings; i: block i; depth: norm and head
        self._start, self._stop = WHOLE
        self._h_BTD: Tensor | None = None
        self._dropout_seed: int | None = None
        self._in_tuple = False  # whether a block returns its hidden states in a tuple
        for index, block in enumerate(blocks):
            block.forward = self._gated(block.forward, index)

    @contextmanager
    def open(self, span: Span, h_BTD: Tensor | None, dropout_seed: int | None) -> Iterator[None]:
        """Inside, the model runs the span."""
        self._start, self._stop = span
        self._h_BTD, self._dropout_seed = h_BTD, dropout_seed
        self._enter(-1)
        try:
            yield
        finally:
            self._h_BTD = None

    def _enter(self, position: int) -> None:
        """Dropout is drawn afresh for each block, so that where the model is cut doesn't change what is drawn."""
        self.position = position
        if self._dropout_seed is not None:
            torch.manual_seed(self._dropout_seed * 1009 + position + 1)

    def _gated(self, forward: Callable[..., Any], index: int) -> Callable[..., Any]:
        last = index == self.depth - 1

        def gated(*args: Any, **kwargs: Any) -> Any:
            h_BTD: Any = args[0] if args else kwargs["hidden_states"]
            if index < self._start:
                if last:  # span (depth, …): what was received is what the last block would have returned
                    h_BTD = self._h_BTD
                    if self._stop == self.depth:
                        raise Reached(h_BTD)
                    self._enter(self.depth)
                return (h_BTD,) if self._in_tuple else h_BTD
            if index == self._start:
                h_BTD = self._h_BTD
            if index == self._stop:
                raise Reached(h_BTD)
            self._enter(index)
            output = forward(h_BTD, *args[1:], **kwargs) if args else forward(**{**kwargs, "hidden_states": h_BTD})
            self._in_tuple = isinstance(output, tuple)
            if last:
                if self._stop == self.depth:
                    raise Reached(output[0] if self._in_tuple else output)
                self._enter(self.depth)
            return output

        return gated


def positions_of(module: nn.Module, gates: Gates, run: Callable[[], object]) -> dict[nn.Module, list[int]]:
    """Where each module that owns parameters runs, seen by running the model once: -1, a block's index, or depth."""
    seen: dict[nn.Module, list[int]] = {}

    def note(inner: nn.Module, _: object) -> None:
        seen.setdefault(inner, []).append(gates.position)

    hooks = [m.register_forward_pre_hook(note) for m in module.modules()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    places: dict[nn.Module, list[int]] = {}
    for name, inner in module.named_modules():
        if any(True for _ in inner.parameters(recurse=False)):
            if isinstance(inner, nn.ParameterDict | nn.ParameterList):  # these never run; what holds them does
                inner_runs = seen.get(module.get_submodule(name.rpartition(".")[0]), [])
            else:
                inner_runs = seen.get(inner, [])
            if inner_runs:
                places[inner] = inner_runs
    return places


def within(position: int, span: Span, depth: int) -> bool:
    """Whether what runs at `position` belongs to `span`."""
    start, stop = span
    return start <= position < (depth + 1 if stop is None else stop)


def check_cut(cut: int, depth: int) -> None:
    """Raises ModelError where no cut lies before block `cut`."""
    if not 0 <= cut <= depth:
        raise ModelError(f"split.cut is {cut}, but the model has {depth} blocks: choose 0 to {depth}")


def real_positions(lengths_B: Tensor, width: int) -> Tensor:
    """Indices into the flattened B × T grid of the tokens that are no padding."""
    mask_BT = torch.arange(width, device=lengths_B.device) < lengths_B[:, None]
    return mask_BT.flatten().nonzero().squeeze(1)


def pack(h_BTD: Tensor, lengths_B: Tensor) -> Tensor:
    """`h_ND`: the hidden states of real tokens alone."""
    B, T, D = h_BTD.shape
    return h_BTD.reshape(B * T, D).index_select(0, real_positions(lengths_B, T))


def unpack(h_ND: Tensor, lengths_B: Tensor, width: int | None = None) -> Tensor:
    """`h_BTD` with zeros where there is padding; T is `width`, or the longest length."""
    B, T = len(lengths_B), width or int(lengths_B.max())
    grid = h_ND.new_zeros(B * T, h_ND.shape[1]).index_copy_(0, real_positions(lengths_B, T), h_ND)
    return grid.view(B, T, -1)
