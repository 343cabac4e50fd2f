"""Codecs that keep few directions: of LoRA pairs, and of the tokens of a batch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError, MessageError
from .parts import Crossing, Spec, is_finite, rows, working
from .stages import BOUNDARY, Parts, Stage

FACTOR = re.compile(r"(.*\blora_(?:embedding_)?)([AB])(\b.*)")


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
