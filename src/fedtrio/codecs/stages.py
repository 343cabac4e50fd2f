"""The codecs, each a stage that turns one tensor into named parts and back.

`layout` is the contract: from what a tensor is (name, dtype, shape) it says which parts of which dtypes and shapes it
becomes, without any values. So the bytes of a codec are known beforehand, and a receiver can check all that it got
before it calculates with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..errors import ConfigError
from .parts import (
    Crossing,
    Per,
    Spec,
    index_bytes,
    is_finite,
    pack_bits,
    pack_indices,
    pack_nibbles,
    round_up,
    rows,
    unpack_bits,
    unpack_indices,
    unpack_nibbles,
    working,
)

Parts = dict[str, Tensor]
ALL = frozenset({"adapter", "activations", "gradients", "logits"})
BOUNDARY = frozenset({"activations", "gradients"})


class Stage:
    """What all codecs share. `reduces` keeps less; the others write numbers in another form and come last."""

    reduces: ClassVar[bool] = False
    feedback: bool = False

    @property
    def on_delta(self) -> bool:
        """Whether adapters must be encoded as updates θ_k − θ, never as values."""
        return self.feedback

    @property
    def uses(self) -> frozenset[str]:
        """What it can encode: of `adapter`, `activations`, `gradients`, `logits`."""
        return frozenset({"adapter"}) if self.feedback else ALL

    def before(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A look at all tensors together, before each is encoded by itself."""
        return tensors

    def layout(self, spec: Spec) -> dict[str, Spec]:
        """The parts that a tensor becomes."""
        raise NotImplementedError

    def encode(self, x: Tensor, spec: Spec, at: Crossing) -> Parts:
        """The parts of a float tensor, as `layout` says."""
        raise NotImplementedError

    def decode(self, parts: Parts, spec: Spec) -> Tensor:
        """The tensor of these parts, which are as `layout` says. Raises MessageError for values out of range."""
        raise NotImplementedError


# Number formats -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cast(Stage):
    """fp16 (relative error ≤ 2⁻¹¹, range 6e-8 … 65504) or bf16 (≤ 2⁻⁸, the range of fp32). b = 2 bytes a number."""

    dtype: torch.dtype

    def layout(self, spec: Spec) -> dict[str, Spec]:
        """values [...]; tensors of two bytes stay as they are."""
        dtype = self.dtype if spec.dtype.itemsize > 2 else spec.dtype
        return {"values": spec.part("values", dtype, *spec.shape)}

    def encode(self, x: Tensor, spec: Spec, at: Crossing) -> Parts:
        """Round to nearest."""
        return {"values": x.to(self.layout(spec)["values"].dtype)}

    def decode(self, parts: Parts, spec: Spec) -> Tensor:
        """Widen again."""
        return parts["values"].to(spec.dtype)


@dataclass(frozen=True)
class Levels(Stage):
    """Integers q in −levels..levels times a step for each row: x ≈ q·step. The step is never rounded down.

    R·C numbers need R·(C·bits/8 + bytes of a step); int8 per token of width d: d + 2 bytes.
    """

    levels: int
    per: Per = "token"
    scale: torch.dtype = torch.bfloat16
    feedback: bool = False

    @property
    def bits(self) -> int:
        """Bits of an integer as it travels: 4, 8 or 16."""
        return 4 if self.levels <= 7 else 8 if self.levels <= 127 else 16

    def step(self, x_RC: Tensor) -> Tensor:
        """[R] before rounding."""
        raise NotImplementedError

    def round(self, ratio_RC: Tensor, spec: Spec, at: Crossing) -> Tensor:
        """x/step to whole numbers."""
        raise NotImplementedError

    def layout(self, spec: Spec) -> dict[str, Spec]:
        """q [R, C], for 4 bits u8 [R, ⌈C/2⌉]; step [R]."""
        R, C = rows(spec.shape, self.per)
        dtype, width = {4: (torch.uint8, (C + 1) // 2), 8: (torch.int8, C), 16: (torch.int16, C)}[self.bits]
        return {"q": spec.part("q", dtype, R, width), "step": spec.part("step", self.scale, R)}

    def encode(self, x: Tensor, spec: Spec, at: Crossing) -> Parts:
        """Steps, then integers. Rows of zeros have step 0."""
        x_RC = x.reshape(rows(spec.shape, self.per)).to(working(spec.dtype))
        step_R = round_up(self.step(x_RC), self.scale)
        divisor_R = torch.where(step_R == 0, 1, step_R).to(x_RC.dtype)
        q_RC = self.round(x_RC / divisor_R[:, None], spec, at).to(torch.int16 if self.bits == 16 else torch.int8)
        return {"q": pack_nibbles(q_RC) if self.bits == 4 else q_RC, "step": step_R}

    def decode(self, parts: Parts, spec: Spec) -> Tensor:
        """q·step. Raises MessageError for negative steps and integers beyond the levels."""
        C = rows(spec.shape, self.per)[1]
        q_RC = unpack_nibbles(parts["q"], C, spec) if self.bits == 4 else parts["q"]
        low, high = (int(end) for end in q_RC.aminmax())
        if low < -self.levels or high > self.levels:
            raise spec.wrong(f"integers in ±{self.levels}", f"{low} to {high}")
        step_R = parts["step"].to(working(spec.dtype))
        if not bool((step_R >= 0).all()):
            raise spec.wrong("steps ≥ 0", f"a step of {float(step_R.min())}")
        return (q_RC * step_R[:, None]).reshape(spec.shape).to(spec.dtype)


@dataclass(frozen=True)
class Nearest(Levels):
    """int8 (127 levels) and int4 (7): step = max|x|/levels, rounded to nearest: |error| ≤ step/2.

    A row in which a value is already a whole number of steps does not change: Q(Q(x)) = Q(x). A bf16 step may be 1/128
    too wide; with max|x|/126.49 the largest of 8-bit integers is then always 126, so that this holds for bf16 too.
    """

    def step(self, x_RC: Tensor) -> Tensor:
        """max|x|/levels, [R]."""
        top = 126.49 if self.levels == 127 and self.scale == torch.bfloat16 else self.levels
        return x_RC.abs().amax(1) / top

    def round(self, ratio_RC: Tensor, spec: Spec, at: Crossing) -> Tensor:
        """To nearest, halves to even."""
        return ratio_RC.round_()


@dataclass(frozen=True)
class QSGD(Levels):
    """Random rounding to step = ‖v‖₂/s of a row: E Q(v) = v and E‖Q(v)−v‖² ≤ min(n/s², √n/s)·‖v‖².

    "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding" (arXiv:1610.02132). A row is a bucket.
    """

    def __post_init__(self) -> None:
        if not isinstance(self.levels, int) or not 1 <= self.levels <= 32767:
            raise ConfigError(f"qsgd: levels are a whole number from 1 to 32767, not {self.levels}")

    @property
    def on_delta(self) -> bool:
        """Its noise grows with the norm of what it encodes."""
        return True

    @property
    def uses(self) -> frozenset[str]:
        """Updates."""
        return frozenset({"adapter", "gradients"})

    def step(self, x_RC: Tensor) -> Tensor:
        """‖v‖₂/s, [R]."""
        return torch.linalg.vector_norm(x_RC, dim=1) / self.levels

    def round(self, ratio_RC: Tensor, spec: Spec, at: Crossing) -> Tensor:
        """Down or up, up with the probability of the fraction."""
        low_RC = ratio_RC.floor()
        return (low_RC + (at.random(spec, ratio_RC) < ratio_RC - low_RC)).clamp_(-self.levels, self.levels)


# Codecs that keep less ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TopK(Stage):
    """The k largest of each row and where they stand; `amount` is k, or a fraction of the row.

    * Of a whole update, with error feedback: "Sparsified SGD with Memory" (arXiv:1809.07599).
    * Of each token at the cut.
    * Of the logits of each row (largest, not largest by size) with the rest's mass: one more value, the log-sum-exp of
      the others; the decoded logits spread it evenly, so that the kept probabilities are exact at T = 1. Without the
      mass the others get `finfo.min / 4`, which no softmax sees; as in AdaLD (arXiv:2509.01750).

    k(b_v + ⌈log2(C)/8⌉) bytes a row, or k·b_v + ⌈C/8⌉ (a bitmap) where that is less; b_v more for the mass.
    """

    amount: float
    per: Per = "tensor"
    rest: Literal["zero", "mass", "absent"] = "zero"
    feedback: bool = True
    reduces: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (0 < self.amount <= 1 if isinstance(self.amount, float) else self.amount >= 1):
            raise ConfigError(f"topk: a count from 1 on, or a fraction with 0 < fraction ≤ 1, not {self.amount}")

    @property
    def on_delta(self) -> bool:
        """Whole adapters are sparse only in how they moved."""
        return self.per == "tensor"

    @property
    def uses(self) -> frozenset[str]:
        """Adapters as a whole, boundaries by token, logits by row."""
        if self.rest != "zero":
            return frozenset({"logits"})
        return frozenset({"adapter"}) if self.per == "tensor" else BOUNDARY

    def kept(self, columns: int) -> int:
        """K of a row of C numbers."""
        return max(1, round(self.amount * columns)) if isinstance(self.amount, float) else min(self.amount, columns)

    def layout(self, spec: Spec) -> dict[str, Spec]:
        """values [R, K] (one more with the mass) and index u8 [R, K, b] or bitmap u8 [R, ⌈C/8⌉]; all: values [R, C]."""
        R, C = rows(spec.shape, self.per)
        K, b = self.kept(C), index_bytes(C)
        if K == C:
            return {"values": spec.part("values", spec.dtype, R, C)}
        bitmap = -(-C // 8)
        where = {"bitmap": (R, bitmap)} if bitmap < K * b else {"index": (R, K, b)}
        values = spec.part("values", spec.dtype, R, K + (self.rest == "mass"))
        return {"values": values} | {name: spec.part(name, torch.uint8, *shape) for name, shape in where.items()}

    def encode(self, x: Tensor, spec: Spec, at: Crossing) -> Parts:
        """Indices rise within a row."""
        x_RC = x.reshape(rows(spec.shape, self.per))
        C = x_RC.shape[1]
        if self.kept(C) == C:
            return {"values": x_RC}
        order = x_RC.abs() if self.rest == "zero" else x_RC
        if self.rest != "zero" and not is_finite(x_RC):
            raise spec.wrong("finite numbers", "NaN or infinity")  # −∞ would not be among those kept
        i_RK = order.topk(self.kept(C), dim=1, sorted=False).indices.sort(dim=1).values
        values = x_RC.gather(1, i_RK)
        if self.rest == "mass":
            others = x_RC.to(working(x.dtype)).scatter(1, i_RK, -math.inf)
            values = torch.cat((values, others.logsumexp(1, keepdim=True).to(x.dtype)), dim=1)
        if "index" in self.layout(spec):
            return {"values": values, "index": pack_indices(i_RK, C)}
        return {"values": values, "bitmap": pack_bits(i_RK, C)}

    def decode(self, parts: Parts, spec: Spec) -> Tensor:
        """Dense again. Raises MessageError for indices that are out of range, twice, or not in order."""
        R, C = rows(spec.shape, self.per)
        K, values = self.kept(C), parts["values"]
        if K == C:
            return values.reshape(spec.shape)
        where = parts.get("index")
        i_RK = unpack_bits(parts["bitmap"], C, K, spec) if where is None else unpack_indices(where, C, spec)
        if self.rest == "mass":
            dense = (values[:, K:] - math.log(C - K)).expand(R, C)
        else:
            dense = values.new_full((R, C), torch.finfo(spec.dtype).min / 4 if self.rest == "absent" else 0)
        return dense.scatter(1, i_RK, values[:, :K]).reshape(spec.shape)
