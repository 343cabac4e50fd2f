"""What crosses the wire: a message, and the frame (the bytes) that carries it.

A frame is one safetensors file whose single metadata entry is a JSON object with the keys `v`, `round`, `kind`,
`done` and `facts`. Its length is a pure function of what is said: no clock and no address is written into it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import MessageError

PROTOCOL = 1
MAX_HEADER_BYTES = 8 * 1024 * 1024
MAX_TENSORS = 20_000
MAX_LISTS = 5 * MAX_TENSORS  # lists and objects in a header: three for each tensor, and some to spare
MAX_DIMS = 8
MAX_NAME = 512  # characters of a tensor's name, a fact's name and a kind
MAX_FACTS = 1_000
MAX_TEXT = 65_536  # characters of a fact
BEYOND = 2**63  # the first whole number that 64 bits do not hold
SHOWN = 60  # characters of foreign text in an error
NAMES = f"1 to {MAX_NAME} printable characters"
FACTS = f"a finite number of 64 bits or at most {MAX_TEXT} printable characters"
DTYPES = {  # in the order in which safetensors lays tensors out
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
LABELS = {dtype: label for label, dtype in DTYPES.items()}
PLACES = {label: place for place, label in enumerate(DTYPES)}

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
            raise MessageError(f"message {_short(self.kind)} lacks the fact {name!r}; it has {_listed(self.facts)}")
        return self.facts[name]

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name. Raises MessageError where it is missing."""
        if name not in self.tensors:
            raise MessageError(f"message {_short(self.kind)} lacks the tensor {name!r}; it has {_listed(self.tensors)}")
        return self.tensors[name]


@dataclass(frozen=True)
class Reply(Message):
    """A message as it was received: `round` is the sender's round, `done` that a client's program has returned."""

    round: int = 0
    done: bool = False


def encode(message: Message, round: int, done: bool = False) -> bytes:
    """The frame of a message. Tensors of any device are copied to the CPU; their dtypes are kept.

    To the last byte what `safetensors.torch.save` gives, which copies each tensor more often: here it is copied once.
    Raises TypeError for a tensor of a dtype that no frame holds.
    """
    head = {"v": PROTOCOL, "round": round, "kind": message.kind, "done": done, "facts": dict(message.facts)}
    header: dict[str, Any] = {"__metadata__": {"fedtrio": _HEAD.encode(head)}}
    pieces: list[Any] = []
    at = 0
    for _, name, label in sorted((PLACES[label], name, label) for name, label in _labels(message.tensors)):
        tensor = message.tensors[name].detach().cpu().contiguous()
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": label, "shape": list(tensor.shape), "data_offsets": [at, end]}
        pieces.append(_bytes_of(tensor))
        at = end
    text = _HEADER.encode(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *pieces])


def _labels(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    for name, tensor in tensors.items():
        if tensor.dtype not in LABELS:
            raise TypeError(f"tensor {_short(name)} is {tensor.dtype}; a frame holds {', '.join(DTYPES)}")
        yield name, LABELS[tensor.dtype]


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a tensor that lies in one piece."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def decode(frame: bytes) -> Reply:
    """The message in a frame.

    Raises MessageError, and nothing else, for everything that the protocol does not allow. safetensors would read the
    frame too, but it lets pass NaN and infinity, names that occur twice, empty tensors, any number of them and bytes
    that are no bool, and names no tensor when it refuses one. What is read here, it reads alike.
    """
    size = int.from_bytes(frame[:8], "little")
    if len(frame) < 8 or size > min(MAX_HEADER_BYTES, len(frame) - 8):
        fits = max(0, min(MAX_HEADER_BYTES, len(frame) - 8))
        raise MessageError(f"a frame of {len(frame)} bytes whose header claims {size}; at most {fits} can be")
    try:
        entries = _parsed(str(frame[8 : 8 + size], "utf-8"))
    except UnicodeDecodeError as error:
        raise MessageError(f"a frame without a readable header: {error}") from error
    if not isinstance(entries, dict):
        raise MessageError(f"a frame without a readable header: it is {_short(entries)}, not an object")
    head = _head(entries.pop("__metadata__", None))
    body = memoryview(frame)[8 + size :]
    layout = _layout(entries, len(body))
    tensors = {name: _tensor(name, layout[name], body) for name in sorted(layout)}
    return Reply(head["kind"], tensors, head["facts"], round=head["round"], done=head["done"])


def _parsed(text: str) -> Any:
    """What a JSON text says, where it can't explode.

    Three characters may become an object of sixty-four bytes, so what opens or parts values is counted first.
    """
    values = max(text.count("[") + text.count("{"), text.count(",") // 4, text.count("\\") // 4)
    if values > MAX_LISTS:
        raise MessageError(f"a header of {values} or more lists and objects; at most {MAX_LISTS} are allowed")
    try:
        return _JSON.decode(text)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"a frame without a readable header: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"the name {_short(counts.most_common(1)[0][0])} occurs twice")
    return table


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no number")


# json.loads and json.dumps would build one each time
_JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_number)
_HEAD = json.JSONEncoder(separators=(",", ":"), sort_keys=True, allow_nan=False)
_HEADER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)


# The head ------------------------------------------------------------------------------------------------------------


def _head(metadata: Any) -> dict[str, Any]:
    """Our own part of the header, checked before any tensor is looked at."""
    text = metadata.get("fedtrio") if isinstance(metadata, dict) and len(metadata) == 1 else None
    if not isinstance(text, str):
        raise MessageError("a frame without a readable header: its metadata are not the one text 'fedtrio'")
    head = _parsed(text)
    version = head.get("v") if isinstance(head, dict) else None
    if type(version) is int and version != PROTOCOL:  # first of all: another version may have another form
        raise MessageError(
            f"a frame of protocol {_short(version)}; this side speaks {PROTOCOL}: install the same version"
        )
    if fault := _fault(head):
        raise MessageError(f"a frame whose head is not of the form {{v, round, kind, done, facts}}: {fault}")
    return head


def _fault(head: Any) -> str:
    """What is wrong with a head; empty where nothing is."""
    if not isinstance(head, dict) or head.keys() != {"v", "round", "kind", "done", "facts"}:
        return f"it has {_listed(head)}" if isinstance(head, dict) else f"it is {_short(head)}"
    if type(head["v"]) is not int:
        return f"v is {_short(head['v'])}"
    if type(head["round"]) is not int or not 0 <= head["round"] < BEYOND:
        return f"round is {_short(head['round'])}, not a whole number from 0"
    if not _is_name(head["kind"]):
        return f"kind is {_short(head['kind'])}, not {NAMES}"
    if not isinstance(head["done"], bool):
        return f"done is {_short(head['done'])}, neither true nor false"
    if not isinstance(head["facts"], dict) or len(head["facts"]) > MAX_FACTS:
        return f"facts are {_short(head['facts'])}, not an object of at most {MAX_FACTS}"
    for name, fact in head["facts"].items():
        if not _is_name(name):
            return f"a fact is called {_short(name)}, not {NAMES}"
        if not _is_fact(fact):
            return f"the fact {_short(name)} is {_short(fact)}, not {FACTS}"
    return ""


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable()


def _is_fact(fact: Any) -> bool:
    match fact:
        case bool():
            return False
        case int():
            return -BEYOND <= fact < BEYOND
        case float():
            return math.isfinite(fact)
        case str():
            return len(fact) <= MAX_TEXT and fact.isprintable()
    return False


# The tensors ---------------------------------------------------------------------------------------------------------


def _layout(entries: dict[str, Any], length: int) -> dict[str, tuple[torch.dtype, list[int], int, int]]:
    """Dtype, shape, first byte and end of each tensor; together they fill the body, without a hole or an overlap."""
    if len(entries) > MAX_TENSORS:
        raise MessageError(f"a frame of {len(entries)} tensors; at most {MAX_TENSORS} are allowed")
    layout = {name: _entry(name, entry, length) for name, entry in entries.items()}
    at = 0
    for start, end, name in sorted((start, end, name) for name, (_, _, start, end) in layout.items()):
        if start != at:
            fault = "overlaps the tensor before it" if start < at else "leaves a hole"
            raise MessageError(f"tensor {_short(name)} {fault}: it starts at byte {start}, {at} expected")
        at = end
    if at != length:
        raise MessageError(f"a frame whose tensors take {at} bytes and whose body has {length}")
    return layout


def _entry(name: str, entry: Any, length: int) -> tuple[torch.dtype, list[int], int, int]:
    """One tensor's dtype, shape, first byte and end, checked by themselves and against each other."""
    if not _is_name(name):
        raise MessageError(f"a tensor is called {_short(name)}, not {NAMES}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        has = _listed(entry) if isinstance(entry, dict) else _short(entry)
        raise MessageError(f"tensor {_short(name)} has {has} in the header, not dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise MessageError(f"tensor {_short(name)} has dtype {_short(code)}; allowed are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(type(n) is int and n > 0 for n in shape):
        raise MessageError(
            f"tensor {_short(name)} is empty or has no shape: {_short(shape)}, "
            f"not a list of at most {MAX_DIMS} whole numbers above 0"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        raise MessageError(f"tensor {_short(name)} has data_offsets {_short(offsets)}, not [start, end]")
    start, end = offsets
    if not 0 <= start <= end <= length:
        raise MessageError(f"tensor {_short(name)} has data_offsets {_short(offsets)} in a body of {length} bytes")
    if end - start != (wanted := math.prod(shape) * dtype.itemsize):
        raise MessageError(
            f"tensor {_short(name)} has {end - start} bytes; {code} {_short(shape)} wants {_short(wanted)}"
        )
    return dtype, shape, start, end


def _tensor(name: str, place: tuple[torch.dtype, list[int], int, int], body: memoryview) -> Tensor:
    """A copy of its own, in torch's memory, whose alignment is always the same: products may depend on it."""
    dtype, shape, start, end = place
    tensor = torch.empty(shape, dtype=dtype)
    _bytes_of(tensor)[:] = body[start:end]
    if dtype == torch.bool and tensor.view(torch.uint8).max().item() > 1:
        raise MessageError(f"tensor {_short(name)} is BOOL and holds bytes other than 0 and 1")
    if dtype.is_floating_point and not _finite(tensor):
        raise MessageError(f"tensor {_short(name)} holds NaN or infinity")
    return tensor


def _finite(tensor: Tensor) -> bool:
    """NaN and infinity show in the sum, which is fastest; so does an overflow of the sum, hence the second look."""
    return math.isfinite(tensor.sum().item()) or all(math.isfinite(edge) for edge in tensor.aminmax())


# Foreign text in our own words ---------------------------------------------------------------------------------------


def _short(value: Any) -> str:
    """A short quotation on one line: what does not print is escaped, and what is long or deep is not shown."""
    if isinstance(value, str):
        text = repr(value[: SHOWN + 1])
        return text if len(text) <= SHOWN + 2 else f"{text[:SHOWN]}… ({len(value)} characters)"
    if isinstance(value, list) and len(value) <= MAX_DIMS and all(type(n) is int and abs(n) < 2**64 for n in value):
        return str(value)
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = str(value) if not isinstance(value, int) or abs(value) < 10**SHOWN else f"a number of over {SHOWN} digits"
    return {"None": "null", "True": "true", "False": "false"}.get(text, text)


def _listed(names: Iterable[str]) -> str:
    """The first few names, quoted."""
    names = sorted(names)
    return ", ".join(map(_short, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"
