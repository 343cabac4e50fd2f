"""Guards: what a server checks in an answer before its program sees it. Each refusal says site, tensor and reason.

`decode` has already refused what no message may hold (NaN, infinity, empty tensors); here stand the expectations that
need to know what was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..errors import MessageError
from ..message import Reply


class Guards(BaseModel):
    """Bounds on what a site may send; names, shapes, dtypes and finite values are always checked."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_growth: float = Field(default=100.0, gt=0, description="norm of what comes back, over that of what was sent")
    max_value: float = Field(default=1e6, gt=0, description="magnitude of any activation, gradient or logit")
    max_weight: float = Field(default=1e9, gt=0, description="examples or target tokens that a site may claim")

    def kind(self, site: str, reply: Reply, *wanted: str) -> None:
        """Raises MessageError unless the message is of one of these kinds."""
        if reply.kind not in wanted:
            raise MessageError(f"{site} sent {reply.kind[:40]!r}; expected {' or '.join(map(repr, wanted))}")

    def names(self, site: str, reply: Reply, *wanted: str) -> None:
        """Raises MessageError unless these are the message's tensors, no more and no fewer."""
        for name in sorted(set(wanted) ^ reply.tensors.keys()):
            raise MessageError(f"{site} {'lacks' if name in wanted else 'sent an unknown'} tensor {name[:200]!r}")

    def like(self, site: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
        """Raises MessageError unless names, shapes and dtypes are those of `wanted`, and norms near theirs."""
        for name in sorted(wanted.keys() ^ tensors.keys()):
            raise MessageError(f"{site} {'lacks' if name in wanted else 'sent an unknown'} tensor {name[:200]!r}")
        for name, tensor in wanted.items():
            self.form(site, name, tensors[name], tuple(tensor.shape), tensor.dtype)
        got, base = _norm(tensors.values()), _norm(wanted.values())
        if got > self.max_growth * max(base, 1.0):
            raise MessageError(
                f"{site} sent tensors of norm {got:.3g} where {base:.3g} was sent; "
                f"guards.max_growth allows {self.max_growth:g} times as much"
            )

    def form(
        self, site: str, name: str, tensor: Tensor, shape: Sequence[int | None], dtype: torch.dtype | None = None
    ) -> None:
        """Raises MessageError unless tensor has that shape (None: any size) and dtype."""
        fits = tensor.dim() == len(shape) and all(w in (None, s) for s, w in zip(tensor.shape, shape, strict=True))
        if not fits:
            wanted = tuple("any" if size is None else size for size in shape)
            raise MessageError(f"{site} sent tensor {name!r} of shape {tuple(tensor.shape)}; expected {wanted}")
        if dtype is not None and tensor.dtype != dtype:
            raise MessageError(f"{site} sent tensor {name!r} as {tensor.dtype}; expected {dtype}")

    def values(self, site: str, name: str, tensor: Tensor) -> None:
        """Raises MessageError where a value is beyond `max_value`."""
        low, high = torch.aminmax(tensor)
        if max(-float(low), float(high)) > self.max_value:
            raise MessageError(f"{site} sent tensor {name!r} with values beyond guards.max_value {self.max_value:g}")

    def count(self, site: str, reply: Reply, *facts: str) -> None:
        """Raises MessageError unless these facts are whole numbers from 0."""
        for name in facts:
            value = reply.fact(name)
            if type(value) is not int or value < 0:
                raise MessageError(f"{site} sent {name} {value!r:.40}; it must be a whole number from 0")

    def weight(self, site: str, reply: Reply) -> None:
        """Raises MessageError unless `weight` is a number above 0 and at most `max_weight`."""
        weight = reply.fact("weight")
        if isinstance(weight, str) or not 0 < weight <= self.max_weight:
            raise MessageError(f"{site} sent the weight {weight!r}; it must lie above 0, up to {self.max_weight:g}")


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(math.fsum(float(tensor.double().square().sum()) for tensor in tensors))
