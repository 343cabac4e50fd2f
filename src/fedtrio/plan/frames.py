"""The length of a frame from what would be said in it, without any values: what `len(encode(message))` would be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache

from ..codecs import Spec
from ..codecs.parts import LABELS
from ..message import PROTOCOL, Fact

ORDER = {label: number for number, label in enumerate(("F64", "I64", "F32", "I32", "F16", "BF16", "I16", "I8", "U8"))}


def frame_bytes(specs: tuple[Spec, ...], kind: str, round: int, done: bool, facts: Mapping[str, Fact]) -> int:
    """Bytes of the frame: 8 for the header's length, the header, filled up to a multiple of 8, and the tensors."""
    entries, payload = _tensors(specs)
    head = {"v": PROTOCOL, "round": round, "kind": kind, "done": done, "facts": dict(facts)}
    said = json.dumps(json.dumps(head, separators=(",", ":"), sort_keys=True))
    header = len('{"__metadata__":{"fedtrio":}') + len(said) + entries + len("}")
    return 8 + header + -header % 8 + payload


def payload_bytes(specs: tuple[Spec, ...]) -> int:
    """Bytes of the tensors alone."""
    return _tensors(specs)[1]


@lru_cache(maxsize=4096)
def _tensors(specs: tuple[Spec, ...]) -> tuple[int, int]:
    """Characters of the header's entries, each with its comma, and bytes of the tensors.

    safetensors lays tensors out by falling size of their numbers, then by name; where each lies stands in the header.
    """
    characters = at = 0
    for spec in sorted(specs, key=lambda s: (-s.dtype.itemsize, ORDER[LABELS[s.dtype]], s.name)):
        end = at + spec.bytes
        entry = {"dtype": LABELS[spec.dtype], "shape": list(spec.shape), "data_offsets": [at, end]}
        name = json.dumps(spec.name, ensure_ascii=False)
        characters += 1 + len(name.encode()) + 1 + len(json.dumps(entry, separators=(",", ":")))
        at = end
    return characters, at
