"""Small pieces that codecs are made of: what a tensor is, its rows, rounding up, and how integers are packed.

Letters: `_R` rows, `_C` columns, `_K` kept entries of a row, `_b` bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import MessageError
from ..message import LABELS

Per = Literal["tensor", "row", "token"]
SAME_WIDTH = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@dataclass(frozen=True)
class Spec:
    """What a tensor is, without its values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Spec:
        """The spec of a tensor."""
        return cls(name, tensor.dtype, tuple(tensor.shape))

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of the values."""
        return self.size * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{LABELS.get(self.dtype, self.dtype)} {list(self.shape)}"

    def part(self, name: str, dtype: torch.dtype, *shape: int) -> Spec:
        """A piece that this tensor is encoded into."""
        return Spec(f"{self.name}.{name}", dtype, shape)

    def wrong(self, expected: str, received: object) -> MessageError:
        """The error to raise where this tensor is not what it should be."""
        return MessageError(f"tensor {self.name!r}: expected {expected}, received {received}")


@dataclass(frozen=True)
class Crossing:
    """One crossing of the wire. Random rounding is a pure function of it and of the tensor's name."""

    seed: int
    round: int
    site: str
    direction: str
    step: int = 0

    def random(self, spec: Spec, like: Tensor) -> Tensor:
        """Uniform numbers in [0, 1) in the shape, dtype (fp32 or fp64) and on the device of `like`."""
        key = repr((self.seed, self.round, self.site, self.direction, self.step, spec.name))
        stream = np.random.default_rng(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest(), "little"))
        drawn = stream.random(tuple(like.shape), np.float64 if like.dtype == torch.float64 else np.float32)
        return torch.from_numpy(drawn).to(like.device)


def rows(shape: Sequence[int], per: Per) -> tuple[int, int]:
    """(R, C): one row for the tensor, one for each index of its first dimension, or one for each token.

    A token is a row of the last dimension. A vector is one row.
    """
    size = math.prod(shape)
    if per == "tensor" or len(shape) < 2:
        return 1, size
    count = shape[0] if per == "row" else size // shape[-1]
    return count, size // count


def working(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which is calculated: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite. A maximum takes a tenth of the time of `torch.isfinite`."""
    return not tensor.numel() or math.isfinite(float(tensor.abs().max()))


def round_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest number of fp32, fp16 or bf16 that is not below x ≥ 0; infinity where there is none.

    Of fp32 only the numbers with 16 significant bits are used, so that an 8-bit integer times it is exact in fp32.
    """
    near = x.to(dtype)
    bits = near.view(SAME_WIDTH[dtype])
    bits = torch.where(near.to(x.dtype) < x, bits + 1, bits)
    if dtype == torch.float32:
        bits = (bits + 0xFF) & ~0xFF
    return torch.where(x.isfinite(), bits.view(dtype), near)


def pack_nibbles(q_RC: Tensor) -> Tensor:
    """Integers in −8..7 as u8 [R, ⌈C/2⌉], the first of two in the low half; an odd row ends with a zero."""
    q_RC = F.pad(q_RC + 8, (0, q_RC.shape[1] % 2), value=8).to(torch.uint8)
    return q_RC[:, 0::2] | (q_RC[:, 1::2] << 4)


def unpack_nibbles(packed_Rb: Tensor, columns: int, spec: Spec) -> Tensor:
    """What `pack_nibbles` packed, int8 [R, C]. Raises MessageError where an odd row ends with something else."""
    if columns % 2 and bool((packed_Rb[:, -1] >> 4 != 8).any()):
        raise spec.wrong(f"a zero after the last of {columns} columns", "another number")
    pairs = torch.stack((packed_Rb & 15, packed_Rb >> 4), dim=-1)
    return pairs.flatten(1)[:, :columns].to(torch.int8) - 8


def index_bytes(columns: int) -> int:
    """⌈log2(C)/8⌉: bytes that hold any index below C, at least one."""
    return max(1, ((columns - 1).bit_length() + 7) // 8)


def pack_indices(i_RK: Tensor, columns: int) -> Tensor:
    """Indices below C as u8 [R, K, b], the lowest byte first."""
    shifts = torch.arange(0, 8 * index_bytes(columns), 8, device=i_RK.device)
    return ((i_RK[..., None] >> shifts) & 255).to(torch.uint8)


def unpack_indices(packed_RKb: Tensor, columns: int, spec: Spec) -> Tensor:
    """What `pack_indices` packed, int64 [R, K]. Raises MessageError unless each row rises and stays below C."""
    shifts = torch.arange(0, 8 * index_bytes(columns), 8, device=packed_RKb.device)
    i_RK = (packed_RKb.long() << shifts).sum(-1)
    if int(i_RK.max()) >= columns or not bool((i_RK.diff(dim=1) > 0).all()):
        raise spec.wrong(
            f"rising indices below {columns}", f"indices up to {int(i_RK.max())}, in another order or twice"
        )
    return i_RK


def pack_bits(i_RK: Tensor, columns: int) -> Tensor:
    """Indices below C as a bitmap, u8 [R, ⌈C/8⌉], the first column in the lowest bit."""
    mask = torch.zeros(len(i_RK), -(-columns // 8) * 8, dtype=torch.uint8, device=i_RK.device).scatter_(1, i_RK, 1)
    bits = mask.view(len(i_RK), -1, 8)
    packed = bits[..., 0].clone()
    for place in range(1, 8):
        packed |= bits[..., place] << place
    return packed


def unpack_bits(packed_Rb: Tensor, columns: int, kept: int, spec: Spec) -> Tensor:
    """What `pack_bits` packed, int64 [R, K]. Raises MessageError unless each row has K bits, all below C."""
    mask = torch.stack([(packed_Rb >> place) & 1 for place in range(8)], dim=-1).flatten(1).bool()
    counts = mask.sum(1)
    if not bool((counts == kept).all()) or bool(mask[:, columns:].any()):
        found = f"{int(counts.min())} to {int(counts.max())} bits"
        raise spec.wrong(f"{kept} bits in each row, all among the first {columns}", found)
    return mask.nonzero()[:, 1].view(len(mask), kept)
