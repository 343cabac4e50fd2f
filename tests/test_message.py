"""Frames: what goes in comes out, their length is a pure function of what is said, and nothing else gets in."""

from __future__ import annotations

import json
import pickle
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny import adapted, federation, lab, play, rounds, same

from fedtrio import message as message_module
from fedtrio.errors import MessageError
from fedtrio.frameworks import KD, FedLLM, Split
from fedtrio.message import MAX_HEADER_BYTES, MAX_TENSORS, PROTOCOL, Message, Reply, decode, encode

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


def test_a_frame_is_what_safetensors_writes() -> None:
    """To the last byte: any names, shapes and dtypes, whatever must be escaped or padded, whatever order."""
    rng = random.Random(0)
    for _ in range(300):
        names = {"".join(rng.choices('abz."\\ü\n\x7f|é日', k=rng.randint(1, 5))) for _ in range(rng.randint(0, 6))}
        shapes = {name: [rng.randint(1, 4) for _ in range(rng.randint(0, 3))] for name in names}
        tensors = {name: (torch.randn(shapes[name]) * 3).to(rng.choice(FLOATS + WHOLE)) for name in names}
        facts = {"x": rng.random(), "n": rng.randint(-9, 9), "text": 'é"q'}
        head = {"v": PROTOCOL, "round": 4, "kind": "ü", "done": True, "facts": facts}
        text = json.dumps(head, separators=(",", ":"), sort_keys=True)
        wanted = safetensors.torch.save(tensors, metadata={"fedtrio": text})
        assert encode(Message("ü", tensors, facts), 4, done=True) == wanted


def test_a_dtype_that_no_frame_holds() -> None:
    with pytest.raises(TypeError, match=r"tensor 'x' is torch\.complex64; a frame holds I64, F64"):
        encode(Message("logits", {"x": torch.zeros(2, dtype=torch.complex64)}), 1)


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


@pytest.mark.parametrize("dtype", FLOATS + WHOLE)
def test_what_is_read_is_what_safetensors_reads(dtype: torch.dtype) -> None:
    sent = {f"t{d}": torch.arange(-3, 3 * 2**d - 3).to(dtype).reshape(3, *[2] * d) for d in range(8)}
    frame = encode(Message("adapter", sent), 1)
    got, read = decode(frame).tensors, safetensors.torch.load(frame)
    assert same(got, read) and same(got, sent) and all(got[name].dtype == dtype for name in read)


def test_tensors_lie_where_torch_would_put_them() -> None:
    """Wherever a frame has them: the last bit of a matrix product may depend on the alignment."""
    for at in range(9):
        gap = {"a": entry(dtype="U8", shape=[at], data_offsets=[0, at])} if at else {}
        values = torch.randn(5)
        data = bytes(at) + values.numpy().tobytes()
        got = decode(laid(gap | {"x": entry(shape=[5], data_offsets=[at, at + 20])}, data)).tensor("x")
        assert torch.equal(got, values) and got.data_ptr() % 64 == 0


def test_lacking_parts_are_named() -> None:
    message = Message("adapter", {"h": torch.ones(1)}, {"step": 1})
    with pytest.raises(MessageError, match=r"'adapter' lacks the fact 'weight'.*step"):
        message.fact("weight")
    with pytest.raises(MessageError, match=r"'adapter' lacks the tensor 'dh'.*h"):
        message.tensor("dh")


# What is refused -----------------------------------------------------------------------------------------------------


def refused(frame: bytes, *wanted: str) -> str:
    """It is refused in one short printable line that holds all of `wanted`."""
    with pytest.raises(MessageError) as caught:
        decode(frame)
    said = str(caught.value)
    assert said.isprintable() and len(said) < 400, ascii(said)
    for words in wanted:
        assert words in said, f"{words!r} not in {said!r}"
    return said


def laid(entries: dict[str, Any], data: bytes, **head: Any) -> bytes:
    """A frame with any entries and any body."""
    return raw(json.dumps(head_text(**head) | entries), data)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity(value: float, dtype: torch.dtype) -> None:
    for size, at in ((100, 63), (100, 0), (100, 99), (70_001, 70_000), (1, 0)):
        values = torch.zeros(size, dtype=dtype)
        assert decode(encode(Message("logits", {"z": values}), 1)).tensors
        values[at] = value
        refused(encode(Message("logits", {"a": torch.ones(2), "z": values}), 1), "tensor 'z' holds NaN or infinity")
    refused(encode(Message("logits", {"z": torch.tensor(value, dtype=dtype)}), 1), "NaN or infinity")


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_numbers_are_finite(dtype: torch.dtype) -> None:
    """Their sum is not; and infinities of both signs are still two infinities."""
    edge = torch.finfo(dtype).max
    values = torch.full((1000,), edge, dtype=dtype)
    values[500:] = -edge
    for kept in (values, values[:500], values.sort().values):
        assert torch.equal(decode(encode(Message("logits", {"z": kept}), 1)).tensor("z"), kept)
    values[7], values[700] = float("inf"), -float("inf")
    refused(encode(Message("logits", {"z": values}), 1), "'z'", "NaN or infinity")


def test_bytes_that_are_no_bool() -> None:
    entries = {"m": entry(dtype="BOOL", shape=[4])}
    assert decode(laid(entries, b"\0\1\1\0")).tensor("m").tolist() == [False, True, True, False]
    for byte in (2, 255):
        refused(laid(entries, bytes((0, 1, byte, 0))), "tensor 'm' is BOOL", "other than 0 and 1")


def test_names_that_occur_twice() -> None:
    one, two = json.dumps(entry()), json.dumps(entry(data_offsets=[4, 8]))
    head = json.dumps(head_text())[1:-1]
    assert sorted(decode(raw(f'{{{head},"a":{one},"b":{two}}}', bytes(8))).tensors) == ["a", "b"]
    refused(raw(f'{{{head},"a":{one},"a":{two}}}', bytes(8)), "'a' occurs twice")
    refused(raw(f'{{{head},{head},"a":{one}}}', bytes(4)), "'__metadata__' occurs twice")
    refused(raw(f'{{{head},"a":{one[:-1]},"shape":[1]}}}}', bytes(4)), "'shape' occurs twice")
    doubled = json.dumps(HEAD)
    for text, name in ((doubled[:-1] + ', "round": 2}', "round"), (doubled.replace("{}", '{"x":1,"x":1}'), "x")):
        refused(raw(json.dumps({"__metadata__": {"fedtrio": text}})), f"'{name}' occurs twice")


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5)])
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    refused(framed({"x": torch.zeros(shape)}), "tensor 'x' is empty", str(list(shape)))


def test_too_many_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {str(i): entry(dtype="U8", data_offsets=[i, i + 1]) for i in range(100_000)}
    refused(laid(entries, bytes(100_000)), "header", "at most")
    few = dict(list(entries.items())[: MAX_TENSORS + 1])
    refused(laid(few, bytes(len(few))), f"{MAX_TENSORS + 1} tensors; at most {MAX_TENSORS}")
    monkeypatch.setattr(message_module, "MAX_TENSORS", 3)
    assert len(decode(framed({str(i): torch.ones(1) for i in range(3)})).tensors) == 3
    refused(framed({str(i): torch.ones(1) for i in range(4)}), "4 tensors; at most 3")


@pytest.mark.parametrize("version", [0, PROTOCOL + 1, -1, 2**70])
def test_another_protocol(version: int) -> None:
    refused(framed({}, v=version), f"protocol {version}", f"speaks {PROTOCOL}", "install the same version")
    refused(framed({}, v=version, more=[], facts=None, round="1"), f"protocol {version}")
    refused(laid({"x": entry(dtype="NEW")}, bytes(4), v=version), f"protocol {version}")


FORM = "of the form {v, round, kind, done, facts}"


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"v": "1"}, "v is '1'"), ({"v": True}, "v is true"), ({"v": 1.0}, "v is 1.0"),
        ({"round": 1.0}, "round is 1.0"), ({"round": None}, "round is null"), ({"round": -1}, "round is -1"),
        ({"round": True}, "round is true"), ({"round": 2**63}, f"round is {2**63}"),
        ({"round": 10**300}, "round is a number of over"), ({"round": "1"}, "round is '1'"),
        ({"kind": 3}, "kind is 3"), ({"kind": ""}, "kind is ''"), ({"kind": None}, "kind is null"),
        ({"kind": "a\nb"}, "kind is 'a\\nb'"), ({"kind": "k" * 513}, "(513 characters), not 1 to 512"),
        ({"done": 1}, "done is 1"), ({"done": "false"}, "done is 'false'"), ({"done": None}, "done is null"),
        ({"facts": []}, "facts are []"), ({"facts": None}, "facts are null"),
        ({"facts": dict.fromkeys(map(str, range(1001)), 0)}, "facts are an object of 1001"),
        ({"facts": {"x": None}}, "'x' is null"), ({"facts": {"x": [1]}}, "'x' is [1]"),
        ({"facts": {"x": {}}}, "'x' is an object"), ({"facts": {"x": True}}, "'x' is true"),
        ({"facts": {"x": 2**63}}, f"'x' is {2**63}"), ({"facts": {"x": -(2**63) - 1}}, f"'x' is {-(2**63) - 1}"),
        ({"facts": {"x": 10**400}}, "'x' is a number of over"), ({"facts": {"x": "a\0b"}}, r"'x' is 'a\x00b'"),
        ({"facts": {"x": "y" * 65_537}}, "(65537 characters)"), ({"facts": {"x": "\ud800"}}, r"\ud800"),
        ({"facts": {"": 1}}, "a fact is called ''"), ({"facts": {"a\rb": 1}}, r"called 'a\rb'"),
        ({"facts": {"x" * 513: 1}}, "a fact is called 'xx"), ({"more": 1}, "it has 'done', 'facts', 'kind', 'more'"),
    ],
)  # fmt: skip
def test_a_head_of_another_form(change: dict[str, Any], wanted: str) -> None:
    assert decode(framed({})).kind == "adapter"
    refused(framed({}, **change), FORM, wanted)


def test_facts_at_their_limits() -> None:
    facts = {"low": -(2**63), "high": 2**63 - 1, "tiny": 5e-324, "text": "y" * 65_536, "n" * 512: "ü € 😀 <b>"}
    assert decode(framed({}, facts=facts, round=2**63 - 1, kind="k" * 512)).facts == facts
    assert decode(encode(Message("k", {}, facts), 0)).facts == facts


def test_nan_among_the_facts() -> None:
    with pytest.raises(ValueError):
        encode(Message("logits", {}, {"weight": float("nan")}), 1)
    head = json.dumps(HEAD | {"facts": {"weight": 7}})
    assert decode(raw(json.dumps({"__metadata__": {"fedtrio": head}}))).fact("weight") == 7
    for word, said in (("NaN",) * 2, ("Infinity",) * 2, ("-Infinity",) * 2, ("1e999", "inf"), ("-1e999", "-inf")):
        refused(raw(json.dumps({"__metadata__": {"fedtrio": head.replace("7", word)}})), f"{said}")


def test_a_head_that_lacks_something() -> None:
    for name in HEAD:
        head = {key: value for key, value in HEAD.items() if key != name}
        refused(safetensors.torch.save({}, metadata={"fedtrio": json.dumps(head)}), FORM)
    for head in ("[]", "3", '"text"', "null"):
        refused(safetensors.torch.save({}, metadata={"fedtrio": head}), FORM, "it is")


@pytest.mark.parametrize("metadata", [None, {}, {"other": "1"}, {"fedtrio": "{}", "b": "1"}, {"fedtrio": {}}, [], "x"])
def test_metadata_of_another_form(metadata: Any) -> None:
    refused(raw(json.dumps({"__metadata__": metadata})), "header", "metadata")
    refused(safetensors.torch.save({"x": torch.ones(2)}), "header", "metadata")


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        (b"", "header"), (b"{", "header"), (b"[]", "not an object"), (b"null", "null, not an object"),
        (b"{}x", "Extra data"),
        (b"\xff{}", "utf-8"), ("{}".encode("utf-16"), "utf-8"), (b"\xef\xbb\xbf{}", "header"), (b'{"a":NaN}', "NaN"),
        (b"9" * 5000, "digits"), (b'{"a":' + b"[" * 90_000, "recursion"), (b"[" * 200_000, "200000 or more lists"),
        (b"[" + b"1," * 500_000 + b"1]", "or more lists"), (b'"' + b"\\u1234" * 500_000 + b'"', "or more lists"),
    ],
)  # fmt: skip
def test_headers_that_are_none(header: bytes, wanted: str) -> None:
    refused(len(header).to_bytes(8, "little") + header, wanted)


@pytest.mark.parametrize(
    ("wrong", "wanted"),
    [
        (entry(dtype="F128"), "dtype 'F128'; allowed are I64, F64"), (entry(dtype="F8_E4M3"), "dtype 'F8_E4M3'"),
        (entry(dtype="C64"), "dtype 'C64'"), (entry(dtype=3), "dtype 3"), (entry(dtype=["F32"]), "dtype a list"),
        (entry(dtype={}), "dtype an object"), (entry(shape=[-1]), "shape: [-1]"), (entry(shape=["1"]), "shape: a list"),
        (entry(shape="1"), "shape: '1'"), (entry(shape=None), "shape: null"), (entry(shape=3), "shape: 3"),
        (entry(shape=[1.0]), "shape: a list"), (entry(shape=[True]), "shape: a list"),
        (entry(shape=[[1]]), "shape: a list"), (entry(shape=[1] * 9), "shape: a list of 9, not a list of at most 8"),
        (entry(shape=[2]), "has 4 bytes; F32 [2] wants 8"), (entry(shape=[2**62, 2**62]), f"wants {2**126}"),
        (entry(shape=[2**62]), f"wants {2**64}"), (entry(shape=[10**400]), "F32 a list of 1 wants a number of"),
        (entry(dtype="F64"), "has 4 bytes; F64 [1] wants 8"), (entry(data_offsets=[0, 400]), "[0, 400] in a body of 4"),
        (entry(data_offsets=[4, 0]), "data_offsets [4, 0]"), (entry(data_offsets=[-4, 0]), "data_offsets [-4, 0]"),
        (entry(data_offsets=[2**63, 2**63 + 4]), f"data_offsets [{2**63}"),
        (entry(data_offsets=[0]), "[0], not [start"), (entry(data_offsets=[2**64, 0]), "data_offsets a list of 2"),
        (entry(data_offsets=None), "data_offsets null"), (entry(data_offsets=[0.0, 4.0]), "data_offsets a list of 2"),
        (entry(more=1), "'more'"), ({}, "nothing in the header"), ({"dtype": "F32"}, "has 'dtype' in"), (3, "has 3 in"),
        (None, "has null"), ([], "has [] in"), ("F32", "has 'F32' in"),
    ],
)  # fmt: skip
def test_a_tensor_entry_of_another_form(wrong: Any, wanted: str) -> None:
    assert decode(laid({"x": entry()}, bytes(4))).tensors["x"].tolist() == [0.0]
    refused(laid({"x": wrong}, bytes(4)), "tensor 'x'", wanted)


def test_tensors_that_do_not_fill_the_body() -> None:
    """Each byte belongs to one tensor: no two names for the same bytes, none that is not accounted for."""

    def two(first: list[int], second: list[int]) -> dict[str, Any]:
        return {"a": entry(dtype="U8", shape=[first[1] - first[0]], data_offsets=first),
                "b": entry(dtype="U8", shape=[second[1] - second[0]], data_offsets=second)}  # fmt: skip

    assert decode(laid(two([4, 8], [0, 4]), bytes(range(8)))).tensor("a").tolist() == [4, 5, 6, 7]
    refused(laid(two([0, 4], [2, 8]), bytes(8)), "tensor 'b' overlaps", "starts at byte 2, 4 expected")
    refused(laid(two([0, 4], [0, 4]), bytes(4)), "tensor 'b' overlaps", "starts at byte 0, 4 expected")
    refused(laid(two([0, 4], [5, 8]), bytes(8)), "tensor 'b' leaves a hole", "starts at byte 5, 4 expected")
    refused(laid(two([1, 4], [4, 8]), bytes(8)), "tensor 'a' leaves a hole", "starts at byte 1, 0 expected")
    refused(laid(two([0, 4], [4, 8]), bytes(9)), "take 8 bytes", "body has 9")
    refused(laid(two([0, 4], [4, 8]), bytes(7)), "tensor 'b'", "[4, 8] in a body of 7 bytes")
    refused(laid({}, b"x"), "take 0 bytes", "body has 1")


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[31m", "a\0", "\u202egnp", "n" * 513, "n" * 1_000_000, "\ud800"])
def test_hostile_names(name: str) -> None:
    """Refused, and quoted short and escaped; `refused` looks for control characters in what is said."""
    said = refused(laid({name: entry()}, bytes(4)), "a tensor is called", "not 1 to 512 printable characters")
    assert len(said) < 200


@pytest.mark.parametrize("name", ["n" * 512, "../../etc/passwd", "<script>alert(1)</script>", "poids/ü €", "C:\\x"])
def test_printable_names_are_only_names(name: str) -> None:
    """Whatever they spell: nothing here opens a path or writes a page."""
    frame = laid({name: entry()}, bytes(4), kind=name, facts={name: name})
    got = decode(frame)
    assert (list(got.tensors), got.kind, dict(got.facts)) == ([name], name, {name: name})
    assert decode(encode(got, 1)).facts == got.facts
    with pytest.raises(MessageError) as caught:
        got.tensor("h")
    assert len(str(caught.value)) < 250


def test_truncated_and_padded_frames() -> None:
    frame = encode(Message("logits", {"z": torch.randn(3, 5)}, {"weight": 3}), 1)
    start = 8 + int.from_bytes(frame[:8], "little")
    for cut in range(len(frame)):
        refused(frame[:cut], "claims" if cut < start else f"in a body of {cut - start} bytes")
    refused(frame + b"\0", "tensors take 60 bytes and whose body has 61")


@pytest.mark.parametrize("size", [2**63, 2**64 - 1, 10**12, MAX_HEADER_BYTES + 1, 3])
def test_a_header_that_claims_too_much(size: int) -> None:
    refused(size.to_bytes(8, "little") + b"{}", f"claims {size}; at most 2 can be")


def test_a_header_longer_than_any_message_needs() -> None:
    text = json.dumps(head_text())
    assert decode(raw(text + " " * (MAX_HEADER_BYTES - len(text)))).kind == "adapter"
    refused(raw(text + " " * (MAX_HEADER_BYTES - len(text) + 1)), "claims", f"at most {MAX_HEADER_BYTES} can be")


class Pickled:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('a frame ran code')",)


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / "x.pt")
    for bad in (pickle.dumps(Pickled()), (tmp_path / "x.pt").read_bytes(), raw("{}", pickle.dumps(Pickled()))):
        refused(bad)


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
