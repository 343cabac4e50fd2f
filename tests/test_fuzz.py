"""Whatever bytes come, `decode` gives a message that can be sent again, or MessageError: soon, and in little memory.

The long run: `pytest tests/test_fuzz.py -m faults`.
"""

from __future__ import annotations

import json
import re
import struct
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from random import Random
from typing import Any

import psutil
import pytest
import safetensors.torch
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from fedtrio import message as message_module
from fedtrio.errors import MessageError
from fedtrio.message import DTYPES, MAX_HEADER_BYTES, MAX_LISTS, MAX_TENSORS, PROTOCOL, Message, Reply, decode, encode

LONG_RUN = 100_000  # frames
SECONDS = 0.25  # of this thread's own time for a small frame; it takes some 50 µs
MEMORY = (20, 128 * 1024)  # so many times the frame, and so many bytes besides
QUICK = settings(max_examples=100, deadline=None, database=None, derandomize=True)
HEAD = {"v": PROTOCOL, "round": 1, "kind": "adapter", "done": False, "facts": {}}


def raw(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def judge(frame: bytes) -> str:
    """What `decode` says of a frame: the first words of its refusal, or "accepted". Asserts all that is promised."""
    reply, said = priced(frame, SECONDS, *MEMORY)
    shown = frame[:2000].hex()
    assert said.isprintable() and len(said) < 1000, f"{said!r}: {shown}"
    if reply is None:
        return " ".join(re.sub(r"'.*?'|\d+", "…", said).split()[:8])
    assert reply.payload_bytes <= len(frame), shown
    assert told(frame) == whole(reply) == whole(decode(encode(reply, reply.round, reply.done))), shown
    return said


def priced(frame: bytes, seconds: float, times: int, besides: int) -> tuple[Reply | None, str]:
    """What comes of a frame, within its time and its memory: so many times the frame, and so many bytes besides."""
    tracemalloc.start()  # torch's own memory is not seen by it; that is what `payload_bytes` counts
    start = time.thread_time()
    try:
        reply, said = message_module.decode(frame), "accepted"
    except MessageError as error:
        reply, said = None, str(error)
    finally:
        took, held = time.thread_time() - start, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert took < seconds, f"{took:.2f} s for {len(frame)} bytes: {frame[:2000].hex()}"
    assert held < times * len(frame) + besides, f"{held} bytes for {len(frame)}: {frame[:2000].hex()}"
    return reply, said


def whole(reply: Reply) -> str:
    """All that is said in a message, types and bytes of tensors included."""
    bits = {name: (t.dtype, t.shape, t.reshape(-1).view(torch.uint8).tolist()) for name, t in reply.tensors.items()}
    return repr((reply.round, reply.kind, reply.done, sorted(reply.facts.items()), sorted(bits.items())))


def told(frame: bytes) -> str:
    """The same from the bytes, as json and safetensors read them."""
    size = int.from_bytes(frame[:8], "little")
    head = json.loads(json.loads(frame[8 : 8 + size])["__metadata__"]["fedtrio"])
    return whole(Reply(head["kind"], safetensors.torch.load(frame), head["facts"], head["round"], head["done"]))


# Mutations -----------------------------------------------------------------------------------------------------------


def _good() -> list[bytes]:
    """Valid frames of several forms, small ones, so that a mutation hits something."""
    step = {"step": 3, "steps": 40, "lengths": "5 7 2", "loss": -0.5}
    every = {code: torch.arange(4).to(dtype) for code, dtype in DTYPES.items()}
    return [
        encode(Message("start"), 1),
        encode(Message("activations and labels", {"h": torch.ones(2, 3), "labels": torch.ones(2).int()}, step), 3),
        encode(Message("logits", {"z": torch.randn(3, 5).bfloat16(), "scalar": torch.tensor(2.0)}), 2, done=True),
        encode(Message("adapter", every, {"weight": 12}), 1),
        encode(Message("adapter", {f"h.{i}.lora_{x}.weight": torch.randn(2, 4) for i in range(4) for x in "AB"}), 9),
    ]


GOOD = _good()
SPECIALS = [0, 1, 7, 8, 2**15, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, MAX_HEADER_BYTES + 1]
PATTERNS = [b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff\xff\xff\xff", b"\0\x7c", b"\x80\x7f", b"\2\0"]
HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "F32", "BF16", "I64", "BOOL", "F8_E4M3", "C64", "1", "a\nb", "\x1b[2J", "\u202e", "\ud800", "é",
    "../../x", "<script>", "n" * 512, "n" * 513, [], [0], [1], [2, 3], [1] * 9, [0, 4], [0, 24], [24, 32], [4, 0], {},
    {"x": 1}, {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, [[[[]]]],
]  # fmt: skip


class Pairs(list):
    """A JSON object as pairs, in which a name may occur twice."""


def dumped(tree: Any) -> str:
    if isinstance(tree, Pairs):
        return "{" + ",".join(f"{json.dumps(name)}:{dumped(value)}" for name, value in tree) + "}"
    if isinstance(tree, list):
        return "[" + ",".join(map(dumped, tree)) + "]"
    return json.dumps(tree)


def objects(tree: Any) -> list[list[Any]]:
    """All objects and lists in a tree."""
    inner = [value for _, value in tree] if isinstance(tree, Pairs) else tree if isinstance(tree, list) else []
    return ([tree] if isinstance(tree, list) else []) + [found for value in inner for found in objects(value)]


def edited(frame: bytes, random: Random) -> bytes:
    """The header says something else: a value, a name, one entry more, less or twice, in it or in the head."""
    size = int.from_bytes(frame[:8], "little")
    tree = json.loads(frame[8 : 8 + size], object_pairs_hook=Pairs)
    metadata = next(value for name, value in tree if name == "__metadata__")
    inner = json.loads(metadata[0][1], object_pairs_hook=Pairs)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        node = random.choice(objects(inner if random.random() < 0.5 else tree))
        at = random.randrange(len(node)) if node else -1
        match random.randrange(5) if node else 4:
            case 0:
                del node[at]
            case 1:
                node.append(node[at])
            case 2 if isinstance(node, Pairs):
                node[at] = (random.choice(["", "x", "a\nb", "n" * 513, "é", "facts", node[-1][0]]), node[at][1])
            case 4:
                value = deepcopy(random.choice(HOSTILE))
                node.append((random.choice("xyz"), value) if isinstance(node, Pairs) else value)
            case _:
                value = deepcopy(random.choice(HOSTILE))
                if isinstance(node[at], int) and random.random() < 0.5:
                    value = node[at] + random.choice((-8, -4, -1, 1, 4, 8))
                node[at] = (node[at][0], value) if isinstance(node, Pairs) else value
    if random.random() < 0.98:
        metadata[:] = Pairs([("fedtrio", dumped(inner)), *metadata[1:]])
    return raw(dumped(tree).encode("utf-8", "surrogatepass"), frame[8 + size :])


def shared(frame: bytes, random: Random) -> bytes:
    """One tensor lies where another does, or has its dtype or shape."""
    size = int.from_bytes(frame[:8], "little")
    entries = json.loads(frame[8 : 8 + size])
    names = [name for name in entries if name != "__metadata__"]
    if names:
        field = random.choice(("data_offsets", "data_offsets", "dtype", "shape"))
        entries[random.choice(names)][field] = entries[random.choice(names)][field]
    return raw(json.dumps(entries).encode(), frame[8 + size :])


def flipped(frame: bytes, random: Random) -> bytes:
    changed = bytearray(frame)
    for _ in range(random.choice((1, 1, 2, 8))):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def cut(frame: bytes, random: Random) -> bytes:
    """Truncated, longer, or with a stretch missing or twice."""
    a, b = sorted(random.randrange(len(frame) + 1) for _ in range(2))
    return random.choice((frame[:a], frame + random.randbytes(1 + a % 9), frame[:a] + frame[b:], frame[:b] + frame[a:]))


def spliced(frame: bytes, random: Random) -> bytes:
    other = random.choice(GOOD)
    return frame[: random.randrange(len(frame))] + other[random.randrange(len(other)) :]


def stamped(frame: bytes, random: Random) -> bytes:
    """Infinity, NaN and other patterns anywhere, mostly in the body."""
    new = random.choice(PATTERNS)
    first = 8 + int.from_bytes(frame[:8], "little") if random.random() < 0.9 else 0
    at = random.randrange(first, len(frame) + 1) & ~1
    return frame[:at] + new + frame[at + len(new) :]


def resized(frame: bytes, random: Random) -> bytes:
    size = int.from_bytes(frame[:8], "little")
    new = random.choice([*SPECIALS, size - 1, size + 1, size + 8, len(frame), len(frame) - 8])
    return struct.pack("<Q", new % 2**64) + frame[8:]


def noise(frame: bytes, random: Random) -> bytes:
    data = random.randbytes(random.randrange(64))
    return random.choice((data, raw(data), raw(data, data), frame[: 8 + len(data)] + data))


MUTATIONS: list[Callable[[bytes, Random], bytes]] = [
    edited, edited, edited, edited, shared, flipped, flipped, cut, spliced, stamped, resized, noise,
]  # fmt: skip


def mutants(seed: int, number: int) -> Iterator[bytes]:
    random = Random(seed)
    for _ in range(number):
        frame = random.choice(MUTATIONS)(random.choice(GOOD), random)
        yield random.choice(MUTATIONS)(frame, random) if random.random() < 0.05 and sound(frame) else frame


def sound(frame: bytes) -> bool:
    try:
        return bool(decode(frame).kind)
    except MessageError:
        return False


# The quick run -------------------------------------------------------------------------------------------------------


def test_good_frames_are_good() -> None:
    assert [judge(frame) for frame in GOOD] == ["accepted"] * len(GOOD)


@QUICK
@given(st.binary(max_size=300))
@example(b"")
@example(bytes(8))
def test_random_bytes(frame: bytes) -> None:
    judge(frame)
    judge(raw(frame))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPES, "F8_E4M3", "C64"]) | JSON,
        "shape": st.lists(st.integers(-1, 3), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 16), min_size=2, max_size=2) | JSON,
    },
)
CHANGED_HEAD = st.fixed_dictionaries({}, optional={"v": JSON, "round": JSON, "kind": JSON, "done": JSON, "facts": JSON})


@QUICK
@given(st.dictionaries(st.text(max_size=3), ENTRY | JSON, max_size=3), CHANGED_HEAD | JSON, st.binary(max_size=24))
def test_headers(entries: dict[str, Any], change: Any, data: bytes) -> None:
    head = HEAD | change if isinstance(change, dict) else change
    judge(raw(json.dumps({"__metadata__": {"fedtrio": json.dumps(head)}} | entries).encode(), data))


@QUICK
@given(st.sampled_from(GOOD), st.data(), st.binary(min_size=1, max_size=4), st.integers(0, 4))
def test_changed_bytes(good: bytes, data: st.DataObject, new: bytes, dropped: int) -> None:
    at = data.draw(st.integers(0, len(good) - 1))
    judge(good[:at] + new + good[at + dropped :])


def test_mutations_reach_every_kind_of_refusal() -> None:
    """Else the fuzzing would knock at one door a thousand times."""
    frames = list(mutants(0, 3000))
    assert 200 < sum(judge(frame) == "accepted" for frame in frames) < 1500
    reasons = [why(frame) for frame in frames]
    known = (
        "claims", "utf-8", "occurs twice", "metadata", "protocol", "of the form", "round is", "kind is", "done is",
        "facts are", "a fact is called", "the fact", "a tensor is called", "in the header, not", "has dtype",
        "is empty", "not [start, end]", "in a body of", "wants", "overlaps", "leaves a hole", "whose tensors take",
        "is BOOL", "holds NaN",
    )  # fmt: skip
    assert [words for words in known if not any(words in reason for reason in reasons)] == []


def why(frame: bytes) -> str:
    try:
        decode(frame)
        return ""
    except MessageError as error:
        return str(error)


# The bounds can fail -------------------------------------------------------------------------------------------------


def slow(frame: bytes) -> Reply:
    end = time.thread_time() + SECONDS
    while time.thread_time() < end:
        pass
    return decode(frame)


def forgetful(frame: bytes) -> Reply:
    reply = decode(frame)
    return Reply(reply.kind, reply.tensors, {}, reply.round, reply.done)


def distorted(frame: bytes) -> Reply:
    reply = decode(frame)
    return Reply(reply.kind, {n: t + 1 for n, t in reply.tensors.items()}, reply.facts, reply.round, reply.done)


def chatty(frame: bytes) -> Reply:
    raise MessageError("two\nlines")


def hungry(frame: bytes) -> Reply:
    assert len(bytes(200_000))
    return decode(frame)


def faulty(frame: bytes) -> Reply:
    raise ValueError("no MessageError")


@pytest.mark.parametrize("worse", [slow, forgetful, distorted, chatty, hungry, faulty])
def test_a_worse_decode_is_caught(monkeypatch: pytest.MonkeyPatch, worse: Callable[[bytes], Reply]) -> None:
    assert judge(GOOD[1]) == "accepted"
    monkeypatch.setattr(message_module, "decode", worse)
    with pytest.raises((AssertionError, ValueError)):
        judge(GOOD[1])


START = json.dumps({"__metadata__": {"fedtrio": json.dumps(HEAD)}}).encode()[:-1]
MUCH = MAX_HEADER_BYTES - 1000


def many_tensors() -> bytes:
    entries = {str(i): {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(MAX_TENSORS)}
    return raw(START + b"," + json.dumps(entries).encode()[1:], bytes(MAX_TENSORS))


BOMBS: dict[str, Callable[[], bytes]] = {
    "lists": lambda: raw(b"[" + b"[]," * (MUCH // 3) + b"0]"),
    "as many lists as may be": lambda: raw(b"[" + b"[]," * (MAX_LISTS - 9) + b"0]"),
    "nested lists": lambda: raw(b"[" * MUCH),
    "nested objects": lambda: raw(b'{"a":' * (MAX_LISTS - 9)),
    "short texts": lambda: raw(b"[" + b'"ab",' * (MUCH // 5) + b"0]"),
    "as many short texts as may be": lambda: raw(b"[" + b'"ab",' * (4 * MAX_LISTS - 9) + b"0]"),
    "escapes": lambda: raw(b'{"a":"' + rb"\u1234" * (MUCH // 6) + b'"}'),
    "one wide character": lambda: raw(START + b',"x":"' + b"a" * MUCH + "😀".encode() + b'"}'),
    "long numbers": lambda: raw(b"[" + (b"9" * 4299 + b",") * (MUCH // 4300) + b"0]"),
    "one name, often": lambda: raw(b"{" + b'"a":1,' * (4 * MAX_LISTS - 9) + b'"b":2}'),
    "as many tensors as may be": many_tensors,
    "a shape of many sizes": lambda: raw(START + b',"x":{"shape":[' + b"9," * (MUCH // 2) + b"1]}}"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name: str) -> None:
    """Frames as large as may be, made to cost the most: where nothing is counted, 20 times their length and more."""
    reply, said = priced(BOMBS[name](), 5.0, 10, 48 * 2**20)  # seconds with the tracing, which makes all of it slow
    assert (reply is not None) == (name == "as many tensors as may be") and said.isprintable() and len(said) < 300


# The long run --------------------------------------------------------------------------------------------------------


@pytest.mark.faults
def test_a_hundred_thousand_frames() -> None:
    """A thousand mutations for each seed that hypothesis draws."""
    seen: Counter[str] = Counter()

    @settings(
        max_examples=LONG_RUN // 1000 + 5, deadline=None, database=None, derandomize=True, phases=[Phase.generate]
    )
    @given(st.integers(0, 2**64))
    def many(seed: int) -> None:
        seen.update(judge(frame) for frame in mutants(seed, 1000))

    many()
    assert sum(seen.values()) >= LONG_RUN, "hypothesis drew fewer seeds"
    assert seen["accepted"] > LONG_RUN // 20 and len(seen) > 30, seen.most_common()


@pytest.mark.faults
def test_nothing_is_kept_of_a_frame() -> None:
    """Without tracemalloc, which itself keeps something each time it is started."""
    process, sizes = psutil.Process(), []
    for seed in range(30):
        for frame in mutants(seed, 1000):
            why(frame)
        sizes.append(process.memory_info().rss)
    assert sizes[-1] - sizes[5] < 8 * 2**20, f"{(sizes[-1] - sizes[5]) / 2**20:.0f} MiB more after 24,000 frames"
