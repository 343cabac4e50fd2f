"""Frames: what goes in comes out, their length is a pure function of what is said, and nothing else gets in."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import adapted, federation, lab, play, rounds, same

from fedtrio import message as message_module
from fedtrio.errors import MessageError
from fedtrio.frameworks import KD, FedLLM, Split
from fedtrio.message import MAX_TENSORS, PROTOCOL, Message, Reply, decode, encode

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
WHOLE = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
HEAD = {"v": PROTOCOL, "round": 1, "kind": "adapter", "done": False, "facts": {}}


def framed(tensors: dict[str, torch.Tensor], **head: Any) -> bytes:
    """A frame with any head, made without `encode`."""
    return safetensors.torch.save(tensors, metadata={"fedtrio": json.dumps(HEAD | head)})


def raw(header: str, data: bytes = b"") -> bytes:
    text = header.encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes


def head_text(**changes: Any) -> dict[str, Any]:
    return {"__metadata__": {"fedtrio": json.dumps(HEAD | changes)}}


# There and back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS + WHOLE)
def test_round_trip_of_every_dtype(dtype: torch.dtype) -> None:
    values = (torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) * 50).to(dtype)
    sent = Message("logits", {"x": values, "scalar": values[0, 0].clone()}, {"n": 3, "x": 0.5, "name": "sites/ü"})
    got = decode(encode(sent, 7, done=True))
    assert isinstance(got, Reply) and got.round == 7 and got.done and got.kind == "logits"
    assert got.facts == sent.facts and [type(f) for f in got.facts.values()] == [type(got.facts[n]) for n in got.facts]
    assert same(got.tensors, sent.tensors) and got.tensors["x"].dtype == dtype and got.tensors["scalar"].shape == ()
    assert got.payload_bytes == sent.payload_bytes == 16 * values.element_size()


def test_what_is_sent_is_a_copy() -> None:
    """Views, transposes and leaves of a graph all arrive as plain tensors of their own."""
    for change in (lambda t: t, lambda t: t[1:3], lambda t: t.T, lambda t: t[:, ::2], lambda t: t.expand(2, 4, 6)):
        base = torch.randn(4, 6, requires_grad=True)
        sent = change(base)
        got = decode(encode(Message("adapter", {"x": sent}), 1)).tensor("x")
        assert torch.equal(got, sent.detach()) and not got.requires_grad
        assert got.untyped_storage().nbytes() == got.numel() * 4
        got.zero_()
        assert float(base.detach().abs().min()) > 0


def test_an_empty_message() -> None:
    got = decode(encode(Message("start"), 1))
    assert got.tensors == {} and got.facts == {} and not got.done and got.payload_bytes == 0


def test_the_length_is_a_pure_function() -> None:
    """Other values, another order of names and another day change no byte of the length; equal messages are equal."""
    one = {"a": torch.randn(3, 4), "b": torch.randn(2).bfloat16()}
    two = {name: torch.randn(t.shape).to(t.dtype) for name, t in reversed(one.items())}
    lengths = {len(encode(Message("adapter", t, {"weight": n}), 1)) for t, n in ((one, 15), (two, 99))}
    assert len(lengths) == 1
    facts = {"weight": 3, "step": 1}
    frames = {encode(Message("adapter", one, f), 2) for f in (facts, dict(reversed(facts.items())))}
    assert len(frames) == 1


def test_tensors_come_in_sorted_order() -> None:
    """safetensors gives them in another order each time, which would show in what is computed over all of them."""
    names = [f"{i:02d}" for i in range(20)]
    got = decode(encode(Message("adapter", {name: torch.ones(1) for name in reversed(names)}), 1))
    assert list(got.tensors) == names


@pytest.mark.parametrize("labels", ["server", "client"])
def test_a_run_sends_the_same_frames_again(labels: Any, tmp_path: Path) -> None:
    """Byte by byte, also with what clipping exchanges: squared norms of many tensors."""
    kept = []
    for i in range(2):
        play(Split(labels=labels), adapted("gpt2"), (3, 5), n=1, max_grad_norm=0.1, frames=tmp_path / str(i))
        kept.append({path.name: path.read_bytes() for path in (tmp_path / str(i)).iterdir()})
    assert kept[0].keys() == kept[1].keys() and any("squared norms" in decode(f).tensors for f in kept[0].values())
    assert [name for name in kept[0] if kept[0][name] != kept[1][name]] == []


def test_lacking_parts_are_named() -> None:
    message = Message("adapter", {"h": torch.ones(1)}, {"step": 1})
    with pytest.raises(MessageError, match=r"'adapter' lacks the fact 'weight'.*step"):
        message.fact("weight")
    with pytest.raises(MessageError, match=r"'adapter' lacks the tensor 'dh'.*h"):
        message.tensor("dh")


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity(value: float, dtype: torch.dtype) -> None:
    values = torch.zeros(100, dtype=dtype)
    assert decode(encode(Message("logits", {"z": values}), 1)).tensors
    values[63] = value
    with pytest.raises(MessageError, match="NaN or infinity"):
        decode(encode(Message("logits", {"z": values}), 1))


def test_nan_among_the_facts() -> None:
    with pytest.raises(ValueError):
        encode(Message("logits", {}, {"weight": float("nan")}), 1)
    for word in ("NaN", "Infinity", "-Infinity", "1e999"):
        head = json.dumps(HEAD | {"facts": {"weight": 7}})
        assert decode(raw(json.dumps({"__metadata__": {"fedtrio": head}}))).fact("weight") == 7
        frame = raw(json.dumps({"__metadata__": {"fedtrio": head.replace("7", word)}}))
        with pytest.raises(MessageError):
            decode(frame)


def test_duplicate_names() -> None:
    one, two = json.dumps(entry()), json.dumps(entry(data_offsets=[4, 8]))
    head = json.dumps(head_text())[1:-1]
    assert sorted(decode(raw(f'{{{head},"a":{one},"b":{two}}}', bytes(8))).tensors) == ["a", "b"]
    with pytest.raises(MessageError, match="twice"):
        decode(raw(f'{{{head},"a":{one},"a":{two}}}', bytes(8)))
    with pytest.raises(MessageError, match="twice"):
        decode(raw(json.dumps({"__metadata__": {"fedtrio": json.dumps(HEAD)[:-1] + ', "round": 2}'}})))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5)])
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    with pytest.raises(MessageError, match="empty"):
        decode(framed({"x": torch.zeros(shape)}))


def test_too_many_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_TENSORS < 100_000
    monkeypatch.setattr(message_module, "MAX_TENSORS", 3)
    frames = [framed({str(i): torch.ones(1) for i in range(n)}) for n in (3, 4)]
    assert len(decode(frames[0]).tensors) == 3
    with pytest.raises(MessageError, match="4 tensors; at most 3"):
        decode(frames[1])


@pytest.mark.parametrize("version", [0, PROTOCOL + 1, -1])
def test_another_protocol(version: int) -> None:
    with pytest.raises(MessageError, match=f"protocol {version}.*speaks {PROTOCOL}"):
        decode(framed({}, v=version))


@pytest.mark.parametrize(
    "change",
    [
        {"v": "1"}, {"v": True}, {"round": 1.0}, {"round": None}, {"kind": 3}, {"done": 1}, {"done": "false"},
        {"facts": []}, {"facts": {"x": None}}, {"facts": {"x": [1]}}, {"facts": {"x": {}}}, {"facts": {"x": True}},
        {"more": 1},
    ],
)  # fmt: skip
def test_a_head_of_another_form(change: dict[str, Any]) -> None:
    assert decode(framed({})).kind == "adapter"
    with pytest.raises(MessageError, match="form"):
        decode(framed({}, **change))


def test_a_head_that_lacks_something() -> None:
    for name in HEAD:
        head = {key: value for key, value in HEAD.items() if key != name}
        with pytest.raises(MessageError, match="form"):
            decode(safetensors.torch.save({}, metadata={"fedtrio": json.dumps(head)}))
    with pytest.raises(MessageError, match="header"):
        decode(safetensors.torch.save({"x": torch.ones(2)}))
    with pytest.raises(MessageError, match="header"):
        decode(safetensors.torch.save({"x": torch.ones(2)}, metadata={"other": "1"}))


@pytest.mark.parametrize(
    "wrong",
    [
        entry(dtype="F128"), entry(dtype=3), entry(dtype=["F32"]), entry(dtype={}), entry(shape=[-1]),
        entry(shape=["1"]), entry(shape="1"), entry(shape=None), entry(shape=3), entry(shape=[1.0]),
        entry(shape=[None]), entry(shape=[[1]]), entry(shape=[2]), entry(shape=[2**62, 2**62]), entry(shape=[10**400]),
        entry(data_offsets=[0, 400]), entry(data_offsets=[4, 0]), entry(data_offsets=None), {}, {"dtype": "F32"},
        {"shape": [1], "data_offsets": [0, 4]}, 3, None, [], "F32",
    ],
)  # fmt: skip
def test_a_tensor_entry_of_another_form(wrong: Any) -> None:
    good = raw(json.dumps(head_text() | {"x": entry()}), bytes(4))
    assert decode(good).tensors["x"].tolist() == [0.0]
    with pytest.raises(MessageError):
        decode(raw(json.dumps(head_text() | {"x": wrong}), bytes(4)))


def test_truncated_and_padded_frames() -> None:
    frame = encode(Message("logits", {"z": torch.randn(3, 5)}, {"weight": 3}), 1)
    for cut in range(len(frame)):
        with pytest.raises(MessageError):
            decode(frame[:cut])
    with pytest.raises(MessageError):
        decode(frame + b"\0")


@pytest.mark.parametrize("size", [2**63, 2**64 - 1, 10**12, 17 * 2**20])
def test_a_header_that_claims_too_much(size: int) -> None:
    with pytest.raises(MessageError, match="claims"):
        decode(size.to_bytes(8, "little") + b"{}")


def test_a_deeply_nested_header() -> None:
    with pytest.raises(MessageError):
        decode(raw('{"__metadata__":' + "[" * 200_000))


class Pickled:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('a frame ran code')",)


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / "x.pt")
    for bad in (pickle.dumps(Pickled()), (tmp_path / "x.pt").read_bytes(), raw("{}", pickle.dumps(Pickled()))):
        with pytest.raises(MessageError):
            decode(bad)


# Anything at all -----------------------------------------------------------------------------------------------------


def survives(frame: bytes) -> None:
    """Whatever comes, a message or MessageError."""
    try:
        reply = decode(frame)
    except MessageError:
        return
    assert all(t.numel() for t in reply.tensors.values())
    encode(reply, reply.round, reply.done)


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(st.binary(max_size=300))
@example(b"")
@example(bytes(8))
def test_fuzz_random_bytes(frame: bytes) -> None:
    survives(frame)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I64", "BOOL", "F8_E4M3", "C64"]) | JSON,
        "shape": st.lists(st.integers(-1, 3), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 16), min_size=2, max_size=2) | JSON,
    },
)
CHANGED_HEAD = st.fixed_dictionaries({}, optional={"v": JSON, "round": JSON, "kind": JSON, "done": JSON, "facts": JSON})


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(st.dictionaries(st.text(max_size=3), ENTRY | JSON, max_size=3), CHANGED_HEAD | JSON, st.binary(max_size=24))
def test_fuzz_headers(entries: dict[str, Any], change: Any, data: bytes) -> None:
    head = HEAD | change if isinstance(change, dict) else change
    survives(raw(json.dumps({"__metadata__": {"fedtrio": json.dumps(head)}} | entries), data))


GOOD = encode(Message("activations", {"h": torch.ones(2, 3), "labels": torch.ones(2).int()}, {"step": 1}), 3)


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=4), st.integers(0, 4))
def test_fuzz_changed_bytes(at: int, new: bytes, dropped: int) -> None:
    survives(GOOD[:at] + new + GOOD[at + dropped :])


# Counted on both sides -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [FedLLM(), KD(), Split(labels="server"), Split(labels="client", variant="sflv2")])
@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_both_sides_count_the_same_bytes(task: str, method: Any) -> None:
    """P1, for each site; a run that is repeated sends the same number of bytes."""
    model = adapted("gpt2", task)
    run = play(method, model, (3, 5))
    for name, site in run.sites.items():
        assert site.bytes_in == run.ledger.total("bytes", site=name, direction="down") > 0
        assert site.bytes_out == run.ledger.total("bytes", site=name, direction="up") > 0
    assert list(play(method, model, (3, 5)).ledger) == list(run.ledger)


def test_a_site_refuses_another_round() -> None:
    method, setting = Split(labels="server"), lab(adapted("gpt2"))
    sites, wire = federation(method, setting, (5,))
    first = Message("adapter", method.setup(setting)["site"])
    assert decode(sites["site-1"].answer(encode(first, 1))).kind == "activations and labels"
    with pytest.raises(MessageError, match="round 1, the server in round 2"):
        sites["site-1"].answer(encode(Message("activation gradients"), 2))
    sites, wire = federation(FedLLM(), setting, (5,))
    answer = sites["site-1"].answer
    sites["site-1"].answer = lambda frame: encode(decode(answer(frame)), 9)  # type: ignore[method-assign]
    with pytest.raises(MessageError, match="round 9 in round 1"):
        rounds(FedLLM(), setting, wire, 1)
