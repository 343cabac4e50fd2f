"""The codecs, each a stage that turns one tensor into named parts and back.

`layout` is the contract: from what a tensor is (name, dtype, shape) it says which parts of which dtypes and shapes it
becomes, without any values. So the bytes of a codec are known beforehand, and a receiver can check all that it got
before it calculates with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..errors import ConfigError, MessageError
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
FACTOR = re.compile(r"(.*\blora_(?:embedding_)?)([AB])(\b.*)")


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


@dataclass(frozen=True)
class Rank(Stage):
    """LoRA pairs of a smaller rank r': the best one in ‖B·A − B'·A'‖ (Eckart–Young), by QR and an r × r SVD.

    A' has orthonormal rows and B' the singular values, as in FlexLoRA (arXiv:2402.11505). r'(i + o) numbers a pair;
    the receiver gets A' [r', i] and B' [o, r'] padded with zeros to the old shapes. It keeps the product, not the
    factors: it goes with aggregation by products, not with means of factors, and never with updates of factors.
    """

    rank: int
    reduces: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ConfigError(f"rank: a whole number from 1 on, not {self.rank}")

    @property
    def uses(self) -> frozenset[str]:
        """Adapters."""
        return frozenset({"adapter"})

    def before(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Each pair pruned. Raises MessageError where a factor is alone."""
        pruned = dict(tensors)
        for name, A in tensors.items():
            factor = FACTOR.fullmatch(name)
            if not factor:
                continue
            other = f"{factor[1]}{'BA'[factor[2] == 'B']}{factor[3]}"
            if other not in tensors:
                raise MessageError(f"rank needs both factors: {name!r} comes without {other!r}")
            if factor[2] == "A":
                pruned[name], pruned[other] = prune(A, tensors[other], self.rank, name)
        return pruned

    def layout(self, spec: Spec) -> dict[str, Spec]:
        """values [r', i] or [o, r']; other tensors whole."""
        return {"values": spec.part("values", spec.dtype, *self._shape(spec))}

    def encode(self, x: Tensor, spec: Spec, at: Crossing) -> Parts:
        """Without the zeros."""
        return {"values": x[tuple(slice(size) for size in self._shape(spec))]}

    def decode(self, parts: Parts, spec: Spec) -> Tensor:
        """With zeros."""
        padded = parts["values"].new_zeros(spec.shape)
        padded[tuple(slice(size) for size in self._shape(spec))] = parts["values"]
        return padded

    def _shape(self, spec: Spec) -> tuple[int, ...]:
        factor = FACTOR.fullmatch(spec.name)
        if not factor or len(spec.shape) != 2:
            return spec.shape
        rows, columns = spec.shape
        return (min(self.rank, rows), columns) if factor[2] == "A" else (rows, min(self.rank, columns))


def prune(A: Tensor, B: Tensor, rank: int, name: str = "lora_A") -> tuple[Tensor, Tensor]:
    """The best factors of B·A of that rank, padded with zeros to the shapes of A [r, i] and B [o, r].

    Raises MessageError where the shapes do not go together, or a number is not finite.
    """
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
        raise MessageError(f"tensor {name!r}: A {list(A.shape)} and B {list(B.shape)} are no pair [r, i], [o, r]")
    if rank >= A.shape[0]:
        return A, B
    if not is_finite(A) or not is_finite(B):
        raise MessageError(f"tensor {name!r} or its pair holds NaN or infinity")
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    small_A, small_B = torch.zeros_like(A), torch.zeros_like(B)
    k = min(rank, len(S))
    small_A[:k] = (Vh[:k] @ Q_A.T).to(A.dtype)
    small_B[:, :k] = (Q_B @ (U[:, :k] * S[:k])).to(B.dtype)
    return small_A, small_B


@dataclass(frozen=True)
class LowRank(Stage):
    """Tokens h [N, D] as coefficients [N, q] on the q principal directions [q, D] of this batch: h ≈ C·P.

    The best approximation of rank q (Eckart–Young); q(N + D) numbers. Tensors for which that is no less stay whole.
    """

    rank: int
    reduces: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ConfigError(f"lowrank: a whole number from 1 on, not {self.rank}")

    @property
    def uses(self) -> frozenset[str]:
        """What crosses the cut."""
        return BOUNDARY

    def layout(self, spec: Spec) -> dict[str, Spec]:
        """coefficients [N, q] and directions [q, D], or values [N, D]."""
        N, D = rows(spec.shape, "token")
        if self.rank * (N + D) >= N * D:
            return {"values": spec.part("values", spec.dtype, N, D)}
        sizes = {"coefficients": (N, self.rank), "directions": (self.rank, D)}
        return {name: spec.part(name, spec.dtype, *size) for name, size in sizes.items()}

    def encode(self, x: Tensor, spec: Spec, at: Crossing) -> Parts:
        """Eigenvectors of hᵀh or, where there are fewer tokens than numbers in one, of h·hᵀ, in fp64."""
        x_ND = x.reshape(rows(spec.shape, "token"))
        if "values" in self.layout(spec):
            return {"values": x_ND}
        if not is_finite(x_ND):
            raise spec.wrong("finite numbers", "NaN or infinity")
        h_ND = x_ND.double()
        if len(h_ND) >= h_ND.shape[1]:
            directions = torch.linalg.eigh(h_ND.T @ h_ND).eigenvectors[:, -self.rank :].T
            coefficients = h_ND @ directions.T
        else:
            coefficients = torch.linalg.eigh(h_ND @ h_ND.T).eigenvectors[:, -self.rank :]
            directions = coefficients.T @ h_ND
        return {"coefficients": coefficients.to(x.dtype), "directions": directions.to(x.dtype)}

    def decode(self, parts: Parts, spec: Spec) -> Tensor:
        """C·P."""
        if "values" in parts:
            return parts["values"].reshape(spec.shape)
        coefficients, directions = (parts[name].to(working(spec.dtype)) for name in ("coefficients", "directions"))
        return (coefficients @ directions).to(spec.dtype).reshape(spec.shape)
