"""What crosses the wire: a message, and the frame (the bytes) that carries it.

A frame is one safetensors file whose single metadata entry is a JSON object with the keys `v`, `round`, `kind`,
`done` and `facts`. Its length is a pure function of what is said: no clock and no address is written into it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from .errors import MessageError

PROTOCOL = 1
MAX_HEADER_BYTES = 16 * 1024 * 1024
MAX_TENSORS = 20_000
DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}

Fact = int | float | str


@dataclass(frozen=True)
class Message:
    """Tensors and facts under one name. `kind` says in the field's words what is sent: `"adapter"`, `"logits"`, …"""

    kind: str
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Fact] = field(default_factory=dict)

    @property
    def payload_bytes(self) -> int:
        """Bytes of the tensors alone, without names, shapes and facts."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def fact(self, name: str) -> Fact:
        """The fact of that name. Raises MessageError where it is missing."""
        if name not in self.facts:
            raise MessageError(f"message {self.kind!r} lacks the fact {name!r}; it has {sorted(self.facts)}")
        return self.facts[name]

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name. Raises MessageError where it is missing."""
        if name not in self.tensors:
            raise MessageError(f"message {self.kind!r} lacks the tensor {name!r}; it has {sorted(self.tensors)[:8]}")
        return self.tensors[name]


@dataclass(frozen=True)
class Reply(Message):
    """A message as it was received: `round` is the sender's round, `done` that a client's program has returned."""

    round: int = 0
    done: bool = False


def encode(message: Message, round: int, done: bool = False) -> bytes:
    """The frame of a message. Tensors of any device are copied to the CPU; their dtypes are kept."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in message.tensors.items()}
    head = {"v": PROTOCOL, "round": round, "kind": message.kind, "done": done, "facts": dict(message.facts)}
    text = json.dumps(head, separators=(",", ":"), sort_keys=True, allow_nan=False)
    return safetensors.torch.save(tensors, metadata={"fedtrio": text})


def decode(frame: bytes) -> Reply:
    """The message in a frame.

    Raises MessageError for everything that the protocol does not allow, among it what safetensors accepts: NaN and
    infinity, duplicate names, zero-size tensors, and more than `MAX_TENSORS` tensors.
    """
    entries, head = _header(frame)
    if len(entries) > MAX_TENSORS:
        raise MessageError(f"a frame of {len(entries)} tensors; at most {MAX_TENSORS} are allowed")
    for name, entry in entries.items():
        dtype, shape = entry.get("dtype"), entry.get("shape")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise MessageError(f"tensor {name!r} has dtype {dtype!r}; allowed are {sorted(DTYPES)}")
        if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
            raise MessageError(f"tensor {name!r} is empty or has no shape ({shape!r})")
    try:
        tensors = safetensors.torch.load(frame)
    except Exception as error:  # safetensors names its own exception, and torch may raise several
        raise MessageError(f"not a safetensors frame: {error}") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise MessageError(f"tensor {name!r} of message {head['kind']!r} holds NaN or infinity")
    tensors = {name: tensors[name] for name in sorted(tensors)}  # safetensors gives them in a random order
    return Reply(head["kind"], tensors, head["facts"], round=head["round"], done=head["done"])


def _header(frame: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensor entries and our own head, checked, before any tensor is read."""
    size = int.from_bytes(frame[:8], "little")
    if len(frame) < 8 or size > min(MAX_HEADER_BYTES, len(frame) - 8):
        raise MessageError(f"a frame of {len(frame)} bytes whose header claims {size}")
    try:
        entries = json.loads(frame[8 : 8 + size], object_pairs_hook=_unique)
        metadata = entries.pop("__metadata__")
        head = json.loads(metadata["fedtrio"], object_pairs_hook=_unique)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MessageError(f"a frame without a readable header: {error}") from error
    well_formed = (
        isinstance(head, dict)
        and set(head) == {"v", "round", "kind", "done", "facts"}
        and type(head["v"]) is type(head["round"]) is int
        and isinstance(head["kind"], str)
        and isinstance(head["done"], bool)
        and isinstance(head["facts"], dict)
        and all(type(fact) in (int, float, str) for fact in head["facts"].values())
        and all(math.isfinite(fact) for fact in head["facts"].values() if isinstance(fact, float))
        and all(isinstance(entry, dict) for entry in entries.values())
    )
    if not well_formed:
        raise MessageError("a frame whose head is not of the form {v, round, kind, done, facts}")
    if head["v"] != PROTOCOL:
        raise MessageError(f"a frame of protocol {head['v']}; this side speaks {PROTOCOL}: install the same version")
    return entries, head


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table
