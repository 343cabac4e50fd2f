"""Codecs: what they lose is what their papers say, what they send what the formulas say, and nothing else gets in."""

from __future__ import annotations

import ast
import math
import re
import sys
import timeit
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtrio import codecs
from fedtrio.codecs import KINDS, Codec, Crossing, Spec, difference, known, parse, restore
from fedtrio.codecs.parts import LABELS, index_bytes, round_up
from fedtrio.codecs.ranks import prune
from fedtrio.errors import ConfigError, MessageError
from fedtrio.message import DTYPES, Message, decode, encode

AT = Crossing(seed=0, round=1, site="c0", direction="up")
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
EVERY = [
    *("none", "fp16", "bf16", "int8", "int8:tensor:fp16", "int8:row:fp32", "int8:tensor:feedback"),
    *("int4", "int4:row", "int4:tensor", "qsgd:1", "qsgd:7:row", "qsgd:127:token:fp16", "qsgd:1000:tensor:fp32"),
    *("topk:0.1", "topk:5", "topk:0.5:plain", "topk:1.0", "topk:0.2:token", "topk:3:token", "topk:4:logits"),
    *("topk:4:absent", "rank:1", "rank:4", "lowrank:1", "lowrank:3", "topk:0.1+int8", "topk:0.1:plain+qsgd:7"),
    *("topk:0.3:token+int4", "topk:4:logits+fp16", "rank:2+int8", "lowrank:2+int4", "topk:0.1+bf16"),
]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, size: float = 1.0) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size
    return drawn.to(dtype)


def pair(
    o: int, i: int, r: int, seed: int = 0, dtype: torch.dtype = torch.float64, at: str = "h.0"
) -> dict[str, Tensor]:
    A, B = normal(r, i, seed=seed, dtype=dtype), normal(o, r, seed=seed + 1, dtype=dtype)
    return {f"{at}.lora_A.weight": A, f"{at}.lora_B.weight": B}


def product(tensors: dict[str, Tensor]) -> Tensor:
    return tensors["h.0.lora_B.weight"] @ tensors["h.0.lora_A.weight"]


def there_and_back(
    codec: Codec, tensors: dict[str, Tensor], state: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Through a real frame."""
    sent = codec.encode(tensors, AT, {} if state is None and codec.feedback else state)
    return codec.decode(decode(encode(Message("x", sent), 1)).tensors)


def bytes_of(tensors: dict[str, Tensor]) -> int:
    return Message("x", tensors).payload_bytes


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else bytes(tensor.tolist())


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(
        one[n].dtype == two[n].dtype and one[n].shape == two[n].shape and torch.equal(one[n], two[n]) for n in one
    )


# All codecs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", EVERY)
@pytest.mark.parametrize("dtype", FLOATS)
def test_round_trip_of_every_codec_and_dtype(text: str, dtype: torch.dtype) -> None:
    """Through a frame: names, shapes and dtypes are back; what travels is what `layout` said, to the byte."""
    codec = parse(text)
    tensors = {
        **pair(20, 30, 4, dtype=dtype),
        "h": normal(6, 5, 7, seed=3, dtype=dtype),
        "bias": normal(80, dtype=dtype),
    }
    state: dict[str, Tensor] = {}
    sent = codec.encode(tensors, AT, state)
    assert {name: Spec.of(name, t) for name, t in sent.items()} == {
        name: Spec(name, spec.dtype, spec.shape) for name, spec in codec.layout(tensors).items()
    }
    frame = encode(Message("x", sent), 1)
    header = 8 + int.from_bytes(frame[:8], "little")
    assert len(frame) - header == bytes_of(sent) == codec.payload_bytes(tensors)
    back = codec.decode(decode(frame).tensors, like=tensors)
    assert {n: (t.dtype, t.shape) for n, t in back.items()} == {n: (t.dtype, t.shape) for n, t in tensors.items()}
    assert equal(sent, codec.encode(dict(reversed(tensors.items())), AT, {}) if not state else sent)
    assert bool(state) == codec.feedback and state.keys() <= tensors.keys()


@settings(max_examples=60, deadline=None)
@given(
    text=st.sampled_from([text for text in EVERY if text != "none"]),
    shape=st.lists(st.integers(1, 9), max_size=4),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 99),
)
@example("int4", [1, 1, 1], torch.float16, 0)
@example("lowrank:3", [2, 9], torch.bfloat16, 0)
def test_any_shape(text: str, shape: list[int], dtype: torch.dtype, seed: int) -> None:
    codec = parse(text, small=0)
    x = normal(*shape, seed=seed, dtype=dtype)
    assert not torch.equal(x, torch.zeros_like(x))
    sent = codec.encode({"x": x}, AT, {})
    assert all(name.startswith("x|") for name in sent)
    back = codec.decode(sent, like={"x": x})["x"]
    assert back.shape == x.shape and back.dtype == dtype and bool(torch.isfinite(back).all())
    if "qsgd" not in text and "absent" not in text and "logits" not in text:
        assert float((back - x).double().norm()) <= float(x.double().norm()) * 1.01


@pytest.mark.parametrize("text", EVERY)
def test_zeros_views_and_leaves(text: str) -> None:
    """Zeros stay zeros (but for logits); a transposed leaf of a graph is encoded like its plain copy."""
    codec = parse(text)
    if "logits" not in text and "absent" not in text:
        assert not there_and_back(codec, {"x": torch.zeros(10, 11)})["x"].any()
    base = normal(12, 10).requires_grad_()
    assert equal(codec.encode({"x": base.T}, AT, {}), codec.encode({"x": base.detach().T.contiguous()}, AT, {}))
    assert not any(t.requires_grad for t in codec.encode({"x": base}, AT, {}).values())


def test_what_passes_unchanged() -> None:
    """Whole numbers, small tensors, and those to skip: the very bits."""
    tensors = {
        "labels": torch.arange(500),
        "mask": torch.ones(500, dtype=torch.bool),
        "small": normal(64),
        "norms": normal(500, dtype=torch.float64),
        "h": normal(65),
    }
    codec = parse("int8", skip=frozenset({"norms"}))
    sent = codec.encode(tensors, AT)
    assert set(sent) == {"labels", "mask", "small", "norms", "h|F32:65|q", "h|F32:65|step"}
    back = codec.decode(sent)
    assert all(torch.equal(back[n], tensors[n]) for n in tensors if n != "h") and not torch.equal(
        back["h"], tensors["h"]
    )
    assert parse("int8", small=65).encode(tensors, AT).keys() == (tensors.keys() - {"norms"}) | {
        "norms|F64:500|q",
        "norms|F64:500|step",
    }


@pytest.mark.parametrize("text", [text for text in EVERY if text != "none"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_not_hidden(text: str, bad: float) -> None:
    """An integer can hold neither, so a codec must not turn them into numbers."""
    tensors = pair(20, 30, 4, dtype=torch.float32) | {"h": normal(10, 11)}
    for name in tensors:
        tensors = {n: t.clone() for n, t in tensors.items()}
        tensors[name][3, 2] = bad
        with pytest.raises(MessageError, match="NaN"):
            there_and_back(parse(text), tensors)
    nan = torch.full((80,), -1, dtype=torch.int32).view(torch.float32)  # NaN of another bit pattern
    with pytest.raises(MessageError, match=r"'x'.*NaN"):
        parse("int8:fp32").encode({"x": nan}, AT)


def test_numbers_that_a_format_cannot_hold() -> None:
    large = {"x": torch.full((80,), 1e9)}
    for text in ("fp16", "int8:fp16", "topk:0.5+fp16"):
        with pytest.raises(MessageError, match=r"'x'.*a larger one"):
            parse(text).encode(large, AT, {})
    for text in ("bf16", "int8", "int8:fp32"):
        assert torch.allclose(there_and_back(parse(text), large)["x"], large["x"], rtol=2**-7)


def test_names_with_a_bar_are_refused() -> None:
    with pytest.raises(MessageError, match=r"'a\|b'"):
        parse("int8").encode({"a|b": torch.ones(3)}, AT)


# Identities C ---------------------------------------------------------------------------------------------------------


def test_c2_nothing_is_lost_where_all_is_kept() -> None:
    """Top-k of all, rank r' = r and no codec: to the bit. All principal directions: to rounding."""
    tensors = {**pair(20, 30, 4), "h": normal(9, 13, seed=3)}
    for text in ("none", "topk:1.0", "topk:999999", "topk:1.0:token", "topk:13:logits", "rank:4", "rank:9"):
        wanted = {"h": tensors["h"]} if "logits" in text else tensors
        assert equal(there_and_back(parse(text), wanted), wanted)
    assert torch.equal(there_and_back(parse("lowrank:13"), tensors)["h"], tensors["h"])
    low = normal(40, 3, dtype=torch.float64) @ normal(3, 30, seed=1, dtype=torch.float64)  # of rank 3
    assert float((there_and_back(parse("lowrank:3"), {"h": low})["h"] - low).abs().max()) < 1e-10


def test_c2_qsgd_of_many_levels() -> None:
    """The error of each number is below ‖v‖/s, here 1/32767 of the norm; with few levels it is not."""
    v = normal(300, dtype=torch.float64)
    error = {s: float((there_and_back(parse(f"qsgd:{s}:fp32"), {"x": v})["x"] - v).abs().max()) for s in (10, 32767)}
    assert error[32767] <= float(v.norm()) / 32767 * (1 + 2**-14) < error[10] / 100


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(["int8", "int4"]),
    per=st.sampled_from(["tensor", "row", "token"]),
    scale=st.sampled_from(["fp32", "fp16", "bf16"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    exponent=st.integers(-25, 25),
    seed=st.integers(0, 10_000),
)
@example("int8", "token", "bf16", torch.float32, [12, 12], -25, 0)
@example("int8", "tensor", "fp16", torch.float32, [12, 12], -3, 5)
def test_c3_half_a_step_and_twice_is_once(
    name: str, per: str, scale: str, dtype: torch.dtype, shape: list[int], exponent: int, seed: int
) -> None:
    """|error| ≤ step/2 with the step that travels, and Q(Q(x)) = Q(x); `per` says which numbers share a step."""
    if scale == "fp16":  # whose normal numbers are 6e-5 … 65504; below them only the bound holds
        exponent = max(-1, min(4, exponent // 4))
    x = normal(*shape, seed=seed, dtype=dtype) * 10.0**exponent
    codec = parse(f"{name}:{per}:{scale}", small=0)
    sent = codec.encode({"x": x}, AT)
    once = codec.decode(sent)["x"]
    step = next(t for key, t in sent.items() if key.endswith("step")).to(dtype)
    count = {"tensor": 1, "row": shape[0], "token": math.prod(shape[:-1])}[per] if len(shape) > 1 else 1
    assert step.shape == (count,) and bool((step > 0).all())
    error = (once - x).reshape(count, -1).abs()
    rounding = 1e-12 if dtype == torch.float64 else 2e-5  # of x/step, which is up to 127
    assert bool((error <= step[:, None] / 2 * (1 + rounding)).all())
    if scale != "fp16" or float(step.min()) >= 2**-14:
        assert torch.equal(codec.decode(codec.encode({"x": once}, AT))["x"], once)


def test_c3_the_bound_is_met_and_not_wider_than_it_must_be() -> None:
    """The worst error of many is near half a step; the step is the least of its format that can hold the largest."""
    x = normal(4000, 16)
    for scale, wide in (("fp32", 1 + 2**-14), ("fp16", 1 + 2**-9), ("bf16", (1 + 2**-7) * 127 / 126.49)):
        codec = parse(f"int8:{scale}")
        sent = codec.encode({"x": x}, AT)
        step = sent["x|F32:4000x16|step"].float()
        ratio = step * 127 / x.abs().amax(1)
        assert float(ratio.min()) >= 1 - 1e-6 and float(ratio.max()) <= wide
        worst = ((codec.decode(sent)["x"] - x).abs() / step[:, None]).max()
        assert 0.499 < float(worst) <= 0.5 + 1e-5


def test_tiny_gradients_survive() -> None:
    """Why the step is bf16 unless said otherwise: gradients at the cut are small, and fp16 ends at 6e-8."""
    dh = normal(20, 30, size=1e-9)
    error = {
        scale: (there_and_back(parse(f"int8:{scale}"), {"dh": dh})["dh"] - dh).norm() / dh.norm()
        for scale in ("fp32", "bf16", "fp16")
    }
    assert error["fp32"] < 0.01 and error["bf16"] < 0.01 and error["fp16"] > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_up_is_the_nearest_number_not_below(dtype: torch.dtype) -> None:
    x = normal(5000, dtype=torch.float64, size=3.0).abs() + 1e-3
    up = round_up(x, dtype)
    grain = {torch.float32: 2**-15, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    assert up.dtype == dtype and bool((up.double() >= x).all()) and bool((up.double() < x * (1 + grain)).all())
    nan = torch.tensor([2**31 - 1], dtype=torch.int32).view(torch.float32)  # the next bit pattern would be −0
    assert bool(round_up(nan, dtype).isnan()) and bool(round_up(nan / 0, dtype).isnan())
    whole = torch.arange(-127, 128)[:, None]
    assert torch.equal((up.float() * whole).double(), up.double() * whole)  # q·step is exact
    assert torch.equal(round_up(up, dtype), up) and torch.equal(
        round_up(torch.zeros(2), dtype), torch.zeros(2, dtype=dtype)
    )


def test_numbers_by_hand() -> None:
    x = {"x": torch.tensor([[127.0, -1.0, 2.5, 0.4], [0.0, 0.0, 0.0, 0.0], [-254.0, 3.1, 253.0, 1.0]])}
    sent = parse("int8:fp32", small=0).encode(x, AT)
    assert sent["x|F32:3x4|q"].tolist() == [[127, -1, 2, 0], [0, 0, 0, 0], [-127, 2, 126, 0]]
    assert sent["x|F32:3x4|step"].tolist() == [1, 0, 2]
    near = torch.tensor([127.0, 2.5 + 1e-9], dtype=torch.float64)
    assert parse("int8:fp32", small=0).encode({"x": near}, AT)["x|F64:2|q"].tolist() == [[127, 3]]
    sent = parse("int4:fp32", small=0).encode({"x": torch.tensor([[7.0, -7.0, 3.4]])}, AT)
    assert sent["x|F32:1x3|q"].tolist() == [[(7 + 8) | (-7 + 8) << 4, (3 + 8) | 8 << 4]]
    assert parse("int4:fp32", small=0).decode(sent)["x"].tolist() == [[7, -7, 3]]
    sent = parse("int8:row:fp32", small=0).encode({"x": torch.tensor([[[1.0, 127.0]], [[2.0, 254.0]]])}, AT)
    assert sent["x|F32:2x1x2|step"].tolist() == [1, 2] and sent["x|F32:2x1x2|q"].tolist() == [[1, 127], [1, 127]]


# QSGD -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 4, 20])
def test_c4_qsgd_is_unbiased_and_within_its_variance(levels: int) -> None:
    """20,000 draws of 20 coordinates in one go (each row draws by itself): z-scores, exact variance, and its bound."""
    N, v = 20_000, normal(20, dtype=torch.float64)
    drawn = there_and_back(parse(f"qsgd:{levels}:row:fp32"), {"x": v.expand(N, 20)})["x"]
    z = (drawn.mean(0) - v) / (drawn.std(0) / math.sqrt(N)).clamp_min(1e-12)
    assert float(z.abs().max()) < 4.5
    step = float(v.norm()) / levels
    fraction = (v / step) - (v / step).floor()
    exact = float((fraction * (1 - fraction)).sum()) * step**2
    measured = float((drawn - v).square().sum(1).mean())
    assert measured == pytest.approx(exact, rel=0.03)
    assert measured <= min(20 / levels**2, math.sqrt(20) / levels) * float(v.square().sum())
    assert not torch.equal(drawn[0], drawn[1])


def test_qsgd_is_a_pure_function_of_the_crossing() -> None:
    x, codec = {"a": normal(100), "b": normal(100)}, parse("qsgd:7:row")
    key = "a|F32:100|q"
    first = codec.encode(x, AT)
    torch.manual_seed(99)
    assert equal(codec.encode({"b": x["b"], "a": x["a"]}, AT), first)
    others = [Crossing(1, 1, "c0", "up"), Crossing(0, 2, "c0", "up"), Crossing(0, 1, "c1", "up")]
    others += [Crossing(0, 1, "c0", "down"), Crossing(0, 1, "c0", "up", 1), Crossing(0, 11, "c0", "up")]
    drawn = {bits(codec.encode(x, at)[key]) for at in [AT, *others]}
    assert len(drawn) == 7
    same = codec.encode({"a": x["a"], "b": x["a"]}, AT)
    assert not torch.equal(same[key], same["b|F32:100|q"])


@pytest.mark.parametrize(
    ("levels", "dtype", "size"), [(7, torch.uint8, 50), (8, torch.int8, 100), (128, torch.int16, 200)]
)
def test_qsgd_levels_are_packed(levels: int, dtype: torch.dtype, size: int) -> None:
    sent = parse(f"qsgd:{levels}").encode({"a": normal(100)}, AT)["a|F32:100|q"]
    assert sent.dtype == dtype and sent.numel() * sent.element_size() == size


# Top-k and error feedback ---------------------------------------------------------------------------------------------


def test_topk_by_hand() -> None:
    x = {"x": torch.tensor([[0.0, -5.0, 1.0, 0.5], [3.0, 0.0, -0.1, 2.0]])}
    sent = parse("topk:3:plain", small=0).encode(x, AT)
    assert sent["x|F32:2x4|values"].tolist() == [[-5, 3, 2]]
    assert sent["x|F32:2x4|bitmap"].tolist() == [[1 << 1 | 1 << 4 | 1 << 7]]
    assert parse("topk:3:plain", small=0).decode(sent)["x"].tolist() == [[0, -5, 0, 0], [3, 0, 0, 2]]
    wide = F.pad(x["x"], (0, 596))
    sent = parse("topk:1:token").encode({"x": wide}, AT)
    assert sent["x|F32:2x600|values"].tolist() == [[-5], [3]] and sent["x|F32:2x600|index"].tolist() == [
        [[1, 0]],
        [[0, 0]],
    ]
    wide[1, 599] = 9
    assert parse("topk:1:token").encode({"x": wide}, AT)["x|F32:2x600|index"].tolist()[1] == [[599 % 256, 599 // 256]]


@settings(max_examples=60, deadline=None)
@given(columns=st.integers(2, 700), kept=st.integers(1, 700), count=st.integers(1, 4), seed=st.integers(0, 99))
@example(8, 1, 1, 0)
@example(257, 17, 3, 0)
@example(256, 32, 2, 0)
def test_topk_keeps_the_largest_by_the_shorter_of_two_ways(columns: int, kept: int, count: int, seed: int) -> None:
    x = normal(count, columns, seed=seed)
    codec = parse(f"topk:{kept}:token", small=0)
    sent = codec.encode({"x": x}, AT)
    k = min(kept, columns)
    places = 0 if k == columns else min(k * index_bytes(columns), -(-columns // 8))
    assert bytes_of(sent) == count * (4 * k + places)
    back = codec.decode(sent)["x"]
    floor = x.abs().sort(dim=1, descending=True).values[:, k - 1 : k]
    assert torch.equal(back, torch.where(x.abs() >= floor, x, 0))


def test_indices_take_as_many_bytes_as_they_must() -> None:
    assert [index_bytes(n) for n in (1, 2, 77, 256, 257, 50_257, 65_536, 65_537, 128_256, 1 << 24, 1 << 32)] == (
        [1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4]
    )
    for size in (70_000, 1 << 24 | 1):
        x = torch.zeros(size)
        x[[0, 256, size - 1]] = torch.tensor([1.0, -2.0, 3.0])
        codec = parse("topk:3:plain")
        sent = codec.encode({"x": x}, AT)
        assert bytes_of(sent) == 3 * (4 + index_bytes(size)) and torch.equal(codec.decode(sent)["x"], x)


def test_error_feedback_by_hand() -> None:
    codec, state = parse("topk:1", small=0), {}
    assert codec.decode(codec.encode({"x": torch.tensor([3.0, 1.0])}, AT, state))["x"].tolist() == [3, 0]
    assert state["x"].tolist() == [0, 1]
    assert codec.decode(codec.encode({"x": torch.tensor([0.5, 1.5])}, AT, state))["x"].tolist() == [0, 2.5]
    assert state["x"].tolist() == [0.5, 0]


@pytest.mark.parametrize(
    "text", ["topk:0.1", "topk:0.1+int8", "topk:0.05+fp16", "int4:feedback", "topk:0.2:plain+int4:feedback"]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_c1_what_was_sent_and_what_is_kept_are_all_there_was(text: str, dtype: torch.dtype, tolerance: float) -> None:
    codec, state = parse(text), {}
    sent, total = torch.zeros(30, 40, dtype=dtype), torch.zeros(30, 40, dtype=dtype)
    for round in range(20):
        update = normal(30, 40, seed=round, dtype=dtype)
        total += update
        sent += codec.decode(codec.encode({"x": update}, AT, state))["x"]
    assert float((sent + state["x"] - total).abs().max()) <= tolerance * float(total.abs().max())
    assert float((sent - total).norm()) > 1e-3 * float(total.norm())  # so something was kept
    assert state["x"].norm() < 20 * 40  # and does not pile up


def test_without_feedback_the_same_is_lost_for_good() -> None:
    """Twenty equal updates: with feedback every number arrives, without it the same tenth again and again."""
    update = normal(30, 40)
    arrived = {}
    for text in ("topk:0.1", "topk:0.1:plain"):
        state: dict[str, Tensor] = {}
        codec = parse(text)
        arrived[text] = sum(codec.decode(codec.encode({"x": update}, AT, state))["x"] for _ in range(20))
    missed = {text: float((sent - 20 * update).norm() / (20 * update).norm()) for text, sent in arrived.items()}
    assert missed["topk:0.1"] < 0.35 < 0.7 < missed["topk:0.1:plain"]


def test_feedback_is_kept_in_fp32_also_for_bf16() -> None:
    codec, state, sent = parse("topk:0.01"), {}, torch.zeros(1000)
    for _ in range(50):
        sent += codec.decode(codec.encode({"x": torch.full((1000,), 0.01, dtype=torch.bfloat16)}, AT, state))[
            "x"
        ].float()
    exact = 50 * float(torch.tensor(0.01, dtype=torch.bfloat16))
    assert state["x"].dtype == torch.float32 and torch.allclose(
        sent + state["x"], torch.full((1000,), exact), rtol=1e-5
    )


def test_feedback_survives_a_checkpoint_and_can_go_back() -> None:
    """A saved state goes on to the bit; `dict(state)` is a copy to return to when an upload was lost."""
    codec, state = parse("topk:0.1+int8"), {}
    codec.encode({"x": normal(200)}, AT, state)
    before = dict(state)
    saved = safetensors.torch.load(safetensors.torch.save(state))
    values = before["x"].clone()
    lost = codec.encode({"x": normal(200, seed=1)}, AT, state)
    assert torch.equal(before["x"], values) and not torch.equal(state["x"], values)
    assert equal(codec.encode({"x": normal(200, seed=1)}, AT, saved), lost) and equal(saved, state)
    assert equal(codec.encode({"x": normal(200, seed=1)}, AT, before), lost)


def test_a_failed_encoding_and_one_without_feedback_leave_the_state_alone() -> None:
    codec, state = parse("topk:0.1"), {}
    with pytest.raises(MessageError, match="'b'"):
        codec.encode({"a": normal(200), "b": torch.full((200,), math.nan)}, AT, state)
    assert state == {}
    kept = {"a": torch.ones(200)}
    assert equal(parse("int8").encode({"a": normal(200)}, AT, kept), parse("int8").encode({"a": normal(200)}, AT))
    assert equal(kept, {"a": torch.ones(200)})
    with pytest.raises(TypeError, match="state"):
        codec.encode({"a": normal(200)}, AT)
    with pytest.raises(MessageError, match=r"'a'.*\[100\].*\[200\]"):
        codec.encode({"a": normal(200)}, AT, {"a": torch.zeros(100)})


# Logits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_keep_their_probabilities(dtype: torch.dtype) -> None:
    """At T = 1 the kept probabilities are exact and the rest's mass is spread evenly over the others."""
    z = normal(50, 77, dtype=dtype, size=3.0) - 4
    codec = parse("topk:8:logits")
    back = there_and_back(codec, {"z": z})["z"]
    top = z.topk(8).indices
    p, q = F.softmax(z, -1), F.softmax(back, -1)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert torch.equal(back.gather(1, top), z.gather(1, top))
    assert torch.allclose(q.gather(1, top), p.gather(1, top), atol=tolerance, rtol=0)
    rest = q.scatter(1, top, math.nan)
    expected = (1 - p.gather(1, top).sum(1)) / 69
    others = rest[~rest.isnan()].view(50, 69)
    assert torch.allclose(others, expected[:, None].expand(50, 69), atol=tolerance, rtol=0)


def test_logits_are_the_largest_and_not_the_largest_by_size() -> None:
    z = torch.tensor([[-50.0, 1.0, 2.0, -3.0]])
    sent = parse("topk:2:logits", small=0).encode({"z": z}, AT)
    mass = math.log(math.exp(-50) + math.exp(-3))
    assert sent["z|F32:1x4|values"].tolist() == [[1.0, 2.0, pytest.approx(mass)]]
    assert parse("topk:2:logits", small=0).decode(sent)["z"].tolist() == [
        [pytest.approx(mass - math.log(2)), 1, 2, pytest.approx(mass - math.log(2))]
    ]


@pytest.mark.parametrize("dtype", FLOATS)
def test_absent_logits_are_known_by_their_floor(dtype: torch.dtype) -> None:
    """Without the mass the others get a value that is finite, that no softmax sees, and that can be told apart."""
    z = normal(20, 77, dtype=dtype)
    back = there_and_back(parse("topk:8:absent"), {"z": z})["z"]
    floor = torch.finfo(dtype).min / 4
    assert bool(((back == floor).sum(1) == 69).all())
    kept = z.topk(8).values.sort().values
    assert torch.equal(back.sort().values[:, -8:], kept)
    q = F.softmax(back.double(), -1)
    assert torch.allclose(q.topk(8).values.sort().values, F.softmax(kept.double(), -1)) and int((q > 0).sum()) == 160


# Rank and projections -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("o", "i", "r"), [(20, 30, 6), (30, 20, 6), (4, 30, 6), (20, 5, 6)])
@pytest.mark.parametrize("kept", [1, 3, 5])
def test_rank_is_eckart_young(o: int, i: int, r: int, kept: int) -> None:
    """The error of the product is √Σ_{j>r'} σ_j², the least of any rank r'; A' has orthonormal rows."""
    tensors = pair(o, i, r)
    back = there_and_back(parse(f"rank:{kept}", small=0), tensors)
    U, S, Vh = torch.linalg.svd(product(tensors))
    assert float((product(tensors) - product(back)).norm()) == pytest.approx(float(S[kept:].norm()), abs=1e-10)
    k = min(kept, len(S))
    assert float((product(back) - U[:, :k] @ torch.diag(S[:k]) @ Vh[:k]).abs().max()) < 1e-10
    A, B = back["h.0.lora_A.weight"], back["h.0.lora_B.weight"]
    assert A.shape == (r, i) and B.shape == (o, r) and not A[k:].any() and not B[:, k:].any()
    assert torch.allclose(A[:k] @ A[:k].T, torch.eye(k, dtype=A.dtype), atol=1e-12)
    again = there_and_back(parse(f"rank:{kept}", small=0), back)
    assert float((product(again) - product(back)).abs().max()) < 1e-10


def test_rank_of_a_fresh_pair_can_still_learn() -> None:
    """B = 0: the product is zero, and A' is not, or no gradient would ever flow."""
    tensors = pair(20, 30, 4)
    tensors["h.0.lora_B.weight"].zero_()
    back = there_and_back(parse("rank:2"), tensors)
    assert not back["h.0.lora_B.weight"].any() and float(back["h.0.lora_A.weight"].norm()) == pytest.approx(
        math.sqrt(2)
    )


def test_rank_knows_its_pairs() -> None:
    names = ["base.h.1.lora_{}.default.weight", "emb.lora_embedding_{}", "lora_{}.weight"]
    tensors = {n.format(f): t for n in names for f, t in zip("AB", pair(20, 30, 4).values(), strict=True)}
    tensors |= {"score.weight": normal(20, 30), "my_lora_Average": normal(20, 30)}
    sent = parse("rank:2").layout(tensors)
    assert {name.partition("|")[0]: spec.shape for name, spec in sent.items()} == {
        n: tuple(t.shape) if "verage" in n or "score" in n else (2, 30) if "A" in n else (20, 2)
        for n, t in tensors.items()
    }
    back = there_and_back(parse("rank:2"), tensors)
    assert torch.equal(back["score.weight"], tensors["score.weight"])
    del tensors["emb.lora_embedding_A"]
    with pytest.raises(MessageError, match=r"emb\.lora_embedding_B' comes without 'emb\.lora_embedding_A"):
        parse("rank:2").encode(tensors, AT)
    assert parse("rank:2", skip=frozenset({"emb.lora_embedding_B"})).encode(tensors, AT)
    with pytest.raises(MessageError, match=r"no pair"):
        prune(torch.zeros(4, 30), torch.zeros(20, 5), 2)


@pytest.mark.parametrize(("N", "D"), [(50, 24), (24, 50), (5, 24)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_lowrank_is_eckart_young(N: int, D: int, dtype: torch.dtype, tolerance: float) -> None:
    h = normal(N, D, dtype=dtype)
    for q in (1, 4):
        back = there_and_back(parse(f"lowrank:{q}"), {"h": h.view(N, 1, D)})["h"].view(N, D)
        least = float(torch.linalg.svdvals(h.double())[q:].norm())
        whole = q * (N + D) >= N * D
        assert float((back - h).double().norm()) == pytest.approx(0 if whole else least, rel=tolerance)
        assert parse(f"lowrank:{q}").payload_bytes({"h": h}) == h.element_size() * min(q * (N + D), N * D)


# Bytes ----------------------------------------------------------------------------------------------------------------

N, D, M, C = 330, 192, 100, 77
BYTES = [  # methods of §4.2: what is encoded, bytes by the formula
    ("none", (N, D), N * D * 4),
    ("fp16", (N, D), N * D * 2),
    ("bf16", (N, D), N * D * 2),
    ("int8", (N, D), N * (D + 2)),
    ("int8:fp16", (N, D), N * (D + 2)),
    ("int8:fp32", (N, D), N * (D + 4)),
    ("int8:tensor:fp16", (N, D), N * D + 2),
    ("int4", (N, D), N * (D // 2 + 2)),
    ("int4", (N, 191), N * (96 + 2)),
    ("qsgd:127:row", (N, D), N * (D + 2)),
    ("qsgd:7:row:fp32", (N, D), N * (D // 2 + 4)),
    ("topk:8:token", (N, D), N * 8 * (4 + 1)),
    ("topk:8:token+fp16", (N, 768), N * 8 * (2 + 2)),
    ("topk:8:token+int8", (N, D), N * (8 * (1 + 1) + 2)),
    ("topk:0.25:token", (N, D), N * (48 * 4 + 192 // 8)),
    ("topk:0.1", (N, D), 6336 * 4 + N * D // 8),
    ("topk:0.1+int8:tensor", (N, D), 6336 + 2 + N * D // 8),
    ("topk:100", (N, D), 100 * (4 + 2)),
    ("lowrank:16", (N, D), 16 * (N + D) * 4),
    ("lowrank:16+int8", (N, D), N * (16 + 2) + 16 * (D + 2)),
    ("topk:8:absent+fp16", (M, C), M * 8 * (2 + 1)),
    ("topk:8:logits+fp16", (M, C), M * (8 * (2 + 1) + 2)),
    ("topk:8:logits", (M, C), M * (8 * (4 + 1) + 4)),
]


@pytest.mark.parametrize(("text", "shape", "formula"), BYTES)
def test_bytes_by_the_formula(text: str, shape: tuple[int, int], formula: int) -> None:
    """C5: bytes of a real frame without its header, of the message, of `payload_bytes`, and of the formula."""
    codec, x = parse(text), normal(*shape)
    message = Message("x", codec.encode({"x": x}, AT, {}))
    frame = encode(message, 1)
    header = 8 + int.from_bytes(frame[:8], "little")
    assert len(frame) - header == message.payload_bytes == decode(frame).payload_bytes == formula
    assert codec.payload_bytes({"x": x}) == codec.payload_bytes({"x": Spec("x", x.dtype, shape)}) == formula


def test_bytes_of_gpt2() -> None:
    """The worked numbers of GPT-2 small: S = 32, n = M = 1000, r = 8 on c_attn, 77 classes."""
    adapter = {"score.weight": torch.empty(77, 768, device="meta")}
    for layer in range(12):
        adapter[f"h.{layer}.c_attn.lora_A.weight"] = torch.empty(8, 768, device="meta")
        adapter[f"h.{layer}.c_attn.lora_B.weight"] = torch.empty(2304, 8, device="meta")
    h, logits = ({"x": Spec("x", torch.float32, shape)} for shape in ((32_000, 768), (1000, 77)))
    tokens = {"x": Spec("x", torch.float32, (32_000, 50_257))}
    assert parse("none").payload_bytes(adapter) == 1_416_192
    assert parse("fp16").payload_bytes(adapter) == 708_096
    assert parse("int8:tensor:fp16").payload_bytes(adapter) == 354_048 + 25 * 2
    assert parse("rank:4").payload_bytes(adapter) == 4 * (12 * 4 * (768 + 2304) + 59_136)
    assert [parse(c).payload_bytes(h) for c in ("none", "fp16", "int8")] == [98_304_000, 49_152_000, 24_640_000]
    assert [parse(c).payload_bytes(logits) for c in ("none", "fp16", "topk:8:absent+fp16")] == [
        308_000,
        154_000,
        24_000,
    ]
    assert parse("topk:32:absent+fp16").payload_bytes(tokens) == 4_096_000
    large = {"x": Spec("x", torch.float32, (10, 128_256))}
    assert parse("topk:32:absent+fp16").payload_bytes(large) == 10 * 32 * (2 + 3)


# Hostile peers --------------------------------------------------------------------------------------------------------

X = "x|F32:20x30"


def sent_by(text: str) -> dict[str, Tensor]:
    return parse(text).encode({"x": normal(20, 30)}, AT, {})


def replaced(tensors: dict[str, Tensor], part: str, value: Tensor | None, name: str | None = None) -> dict[str, Tensor]:
    """With another tensor, name, or without it."""
    rest = {key: t for key, t in tensors.items() if not key.endswith(f"|{part}")}
    assert len(rest) == len(tensors) - 1
    return rest if value is None else rest | {name or f"{X}|{part}": value}


def changed(tensors: dict[str, Tensor], part: str, place: tuple[int, ...], value: float) -> dict[str, Tensor]:
    other = tensors[f"{X}|{part}"].clone()
    other[place] = value
    return replaced(tensors, part, other)


HOSTILE = {
    "a missing part": ("int8", lambda t: replaced(t, "step", None), r"'x': expected \['q', 'step'\], received \['q'\]"),
    "one part too many": (
        "int8",
        lambda t: t | {f"{X}|more": torch.ones(3)},
        r"expected \['q', 'step'\], received \['more'",
    ),
    "another dtype": (
        "int8",
        lambda t: replaced(t, "q", t[f"{X}|q"].short()),
        r"'x\.q': expected I8 \[20, 30\], received I16",
    ),
    "another shape": ("int8", lambda t: replaced(t, "q", t[f"{X}|q"][:19]), r"'x\.q': .*received I8 \[19, 30\]"),
    "steps of another shape": (
        "int8",
        lambda t: replaced(t, "step", torch.ones(1).bfloat16()),
        r"'x\.step': expected BF16 \[20\]",
    ),
    "steps of another format": (
        "int8",
        lambda t: replaced(t, "step", torch.ones(20)),
        r"'x\.step': expected BF16 \[20\].*F32",
    ),
    "a negative step": (
        "int8",
        lambda t: changed(t, "step", (3,), -1.0),
        r"'x': expected steps ≥ 0, received a step of -1",
    ),
    "a step of NaN": ("int8", lambda t: changed(t, "step", (3,), math.nan), "'x': expected steps ≥ 0"),
    "a step of infinity": ("int8", lambda t: changed(t, "step", (3,), math.inf), "'x': expected finite"),
    "a step that overflows": ("int8", lambda t: changed(t, "step", (3,), 3e38), "'x': expected finite"),
    "an integer of -128": (
        "int8",
        lambda t: changed(t, "q", (0, 0), -128),
        r"expected integers in ±127, received -128",
    ),
    "a nibble of -8": ("int4", lambda t: changed(t, "q", (0, 0), 0), r"expected integers in ±7, received -8"),
    "more than the levels": (
        "qsgd:20",
        lambda t: changed(t, "q", (0, 0), 21),
        r"expected integers in ±20, received .* to 21",
    ),
    "values of NaN": ("topk:5", lambda t: changed(t, "values", (0, 2), math.nan), "'x': expected finite"),
    "fp16 of infinity": ("fp16", lambda t: changed(t, "values", (0, 2), math.inf), "'x': expected finite"),
    "an index out of range": (
        "topk:5",
        lambda t: changed(t, "index", (0, 4, 1), 255),
        "'x': expected rising indices below 600",
    ),
    "an index just out of range": (
        "topk:5",
        lambda t: replaced(t, "index", torch.tensor([[[0, 0], [1, 0], [2, 0], [3, 0], [88, 2]]], dtype=torch.uint8)),
        "rising indices below 600, received indices up to 600",
    ),
    "an index twice": (
        "topk:5",
        lambda t: replaced(t, "index", torch.tensor([[[0, 0], [1, 0], [1, 0], [3, 0], [4, 0]]], dtype=torch.uint8)),
        "rising indices",
    ),
    "indices in another order": ("topk:5", lambda t: replaced(t, "index", t[f"{X}|index"].flip(1)), "rising indices"),
    "a bit too many": (
        "topk:0.5",
        lambda t: replaced(t, "bitmap", t[f"{X}|bitmap"] | 1 | 2 | 4 | 8),
        "expected 300 bits",
    ),
    "no bits": ("topk:0.5", lambda t: replaced(t, "bitmap", torch.zeros_like(t[f"{X}|bitmap"])), "expected 300 bits"),
    "names of another codec": (
        "int8",
        lambda t: sent_by("topk:5"),
        r"expected \['q', 'step'\], received \['index', 'values'\]",
    ),
    "a chain cut short": (
        "topk:5+int8",
        lambda t: sent_by("topk:5"),
        r"expected \['index', 'values\.q', 'values\.step'\]",
    ),
    "unencoded": (
        "int8",
        lambda t: {"x": normal(20, 30)},
        r"'x': expected it encoded by int8, received F32 \[20, 30\] as it is",
    ),
    "encoded, but small": (
        "int8",
        lambda t: {"x|F32:2x2|q": torch.ones(2, 2).char()},
        r"'x': expected \[\], received \['q'\]",
    ),
    "two shapes of one tensor": (
        "int8",
        lambda t: t | {"x|F32:30x20|q": torch.ones(30, 20).char()},
        "parts of one tensor",
    ),
    "two dtypes of one tensor": (
        "int8",
        lambda t: t | {"x|F64:20x30|q": torch.ones(20, 30).char()},
        "parts of one tensor",
    ),
    "both ways at once": ("int8", lambda t: t | {"x": torch.ones(3)}, "'x' came both encoded and as it is"),
    "a tensor that claims terabytes": (
        "topk:5",
        lambda t: {k.replace("20x30", "9999999999x9999999999"): v for k, v in t.items()},
        r"a message that decodes to 3999\d* bytes; at most",
    ),
    "many that claim a gigabyte": (
        "topk:5",
        lambda t: {k.replace("x|", f"{i}|").replace("20x30", "16384x16384"): v for i in "abc" for k, v in t.items()},
        r"a message that decodes to 3221225472 bytes; at most 2147483648",
    ),
    "a claim within the limit": (
        "topk:0.01",
        lambda t: {k.replace("20x30", "16000x16000"): v for k, v in t.items()},
        r"'x\.values': expected F32 \[1, 2560000\], received F32 \[1, 6\]",
    ),
}
BAD_NAMES = ["x|", "x|F32:3|", "|||", "x|F32:3|q|q", "x|I32:70|q", "x|F32:0x3|q", "x|F32:-3|q", "x|F32:03x30|q"]
BAD_NAMES += [
    "x|F32:3x|q",
    "x|F32:1e9|q",
    "x|F32:" + "9" * 11 + "|q",
    "x|F32:" + "x".join("222222222") + "|q",
    "x|f32:70|q",
]
BAD_NAMES += ["x|F32:٣|q", "x|F32:20x30|q\n", "x|F8:70|q"]


@pytest.mark.parametrize("case", HOSTILE)
def test_what_encode_does_not_give_is_refused(case: str) -> None:
    """Names the tensor, what was expected and what came; and the untouched message is accepted."""
    text, spoil, says = HOSTILE[case]
    tensors = sent_by(text)
    parse(text).decode(tensors)
    with pytest.raises(MessageError, match=says):
        parse(text).decode(spoil(dict(tensors)))


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_say_no_shape_are_refused(name: str) -> None:
    with pytest.raises(MessageError, match=r"expected name\|dtype:shape\|part"):
        parse("int8").decode({name: torch.ones(70).char()})


def test_a_bit_beyond_the_row_is_refused() -> None:
    codec = parse("topk:3:token", small=0)
    sent = codec.encode({"x": normal(2, 5)}, AT)
    assert codec.decode(sent)["x"].shape == (2, 5)
    sent["x|F32:2x5|bitmap"] = torch.tensor([[0b00111], [0b100011]], dtype=torch.uint8)
    with pytest.raises(MessageError, match="all among the first 5"):
        codec.decode(sent)


def test_a_nibble_beyond_the_row_is_refused() -> None:
    sent = parse("int4", small=0).encode({"x": normal(2, 5)}, AT)
    sent["x|F32:2x5|q"][1, 2] ^= 1 << 5
    with pytest.raises(MessageError, match="'x': expected a zero after the last of 5 columns"):
        parse("int4", small=0).decode(sent)


def test_what_is_known_beforehand_is_held_to() -> None:
    codec, x = parse("int8"), normal(20, 30)
    sent = codec.encode({"x": x, "n": torch.ones(3)}, AT)
    like = {"x": Spec.of("x", x), "n": torch.empty(3, device="meta")}
    assert codec.decode(sent, like).keys() == like.keys()
    with pytest.raises(MessageError, match=r"'x': expected F32 \[30, 20\], received F32 \[20, 30\]"):
        codec.decode(sent, like | {"x": x.T})
    with pytest.raises(MessageError, match=r"'x': expected F16 \[20, 30\], received F32"):
        codec.decode(sent, like | {"x": x.half()})
    for other in ({"x": x}, like | {"y": x}):
        with pytest.raises(MessageError, match=r"the message: expected .*received \['n', 'x'\]"):
            codec.decode(sent, other)


@settings(max_examples=150, deadline=None)
@given(
    text=st.sampled_from([t for t in EVERY if t != "none"]),
    other=st.sampled_from(EVERY),
    place=st.integers(0, 10**6),
    byte=st.integers(0, 255),
)
def test_any_byte_may_be_wrong(text: str, other: str, place: int, byte: int) -> None:
    """One byte of one part is changed, and it is read by this or another codec: refused, or a finite tensor."""
    sent = parse(text).encode({"x": normal(9, 11)}, AT, {})
    name = sorted(sent)[place % len(sent)]
    spoiled = sent[name].contiguous().clone()
    raw = spoiled.view(-1).view(torch.uint8)
    raw[place % raw.numel()] = byte
    for codec in (parse(text), parse(other)):
        try:
            got = codec.decode(sent | {name: spoiled})
        except MessageError as error:
            assert "'x" in str(error)
        else:
            assert got["x"].shape == (9, 11) and bool(torch.isfinite(got["x"]).all())


# Updates --------------------------------------------------------------------------------------------------------------


def test_updates_and_values() -> None:
    """Codecs that need updates say so; top-k of a value would send other numbers than top-k of how it moved."""
    moved = {text: parse(text).on_delta for text in EVERY}
    expected = {
        t: ("topk" in t and not re.search("token|logits|absent", t)) or "qsgd" in t or "feedback" in t for t in EVERY
    }
    assert moved == expected
    reference = {"w": normal(100), "n": torch.tensor(3)}
    values = {"w": reference["w"] + F.one_hot(torch.tensor(7), 100), "n": torch.tensor(4)}
    update = difference(values, reference)
    assert torch.equal(update["w"], values["w"] - reference["w"]) and update["n"] == 4
    arrived = restore(there_and_back(parse("topk:1:plain"), update), reference)
    assert torch.equal(arrived["w"], reference["w"] + update["w"]) and arrived["n"] == 4
    assert torch.equal(restore(difference(reference, reference), reference)["w"], reference["w"])
    for wrong in ({}, {"w": normal(99)}):
        for helper in (difference, restore):
            with pytest.raises(MessageError, match="'w'"):
                helper({"w": normal(100)}, wrong)


# Writing and reading --------------------------------------------------------------------------------------------------


def test_texts_and_lists() -> None:
    assert parse("topk:0.1+int8") == parse(["topk:0.1", "int8"]) == parse(" topk:0.1 + int8 ")
    assert parse("topk:0.1+int8").text == "topk:0.1+int8"
    assert parse(None) == parse("none") == parse([]) == Codec() and parse("none").text == "none"
    assert all(parse(text).text == text and parse(parse(text).text) == parse(text) for text in EVERY)
    assert parse("topk:1") != parse("topk:1.0")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("int9", r"no codec 'int9'; did you mean 'int8'\?; there are fp16"),
        ("tpok:0.1", r"did you mean 'topk'"),
        ("", "no codec ''"),
        ("int8+", "no codec ''"),
        ("topk", r"'topk' lacks its number; it is written topk:AMOUNT\[:plain"),
        ("int8:0.1", r"does not know '0.1'; it is written int8\[:tensor"),
        ("int8:tokens", r"does not know 'tokens'; did you mean 'token'\?"),
        ("int8:row:token", r"says the same twice"),
        ("topk:3:4", r"says the same twice"),
        *((f"topk:{k}", "topk: a count") for k in ("0", "0.0", "-3", "1.5", "nan", "inf")),
        *((f"rank:{k}", "rank: a whole number") for k in ("0", "2.5", "-1")),
        *((f"lowrank:{k}", "lowrank: a whole number") for k in ("0", "2.5")),
        *((f"qsgd:{s}", "qsgd: levels are a whole number") for s in ("0", "40000", "3.5", "inf", "nan")),
        ("int8+topk:0.1", "in this order"),
        ("int8+fp16", "in this order"),
        ("topk:0.1+rank:3", "in this order"),
        ("topk:0.1+int8+fp16", "in this order"),
        ("topk:0.1+qsgd:7", "pile up"),
        ("rank:4+qsgd:7", "rank works on factors"),
        ("rank:4+int8:feedback", "rank works on factors"),
        ("topk:8:token+int8:feedback", "different things"),
        ("topk:8:logits+qsgd:7", "different things"),
    ],
)
def test_what_is_written_wrongly(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(text)


def test_each_codec_is_for_something() -> None:
    for text, use in [
        ("int8", "logits"),
        ("topk:0.1", "adapter"),
        ("topk:8:token", "gradients"),
        ("rank:4", "adapter"),
    ]:
        assert parse(text, use).uses >= {use}
    for text, use in [
        ("topk:0.1", "activations"),
        ("rank:4", "logits"),
        ("qsgd:7", "activations"),
        ("lowrank:4", "adapter"),
    ]:
        with pytest.raises(ConfigError, match=f"is for .*, not for {use}"):
            parse(text, use)


def test_all_that_is_known_can_be_used() -> None:
    assert {re.match(r"\w+", usage)[0] for usage in known()} == set(KINDS)
    for name, kind in KINDS.items():
        number = ":3" if kind.number else ""
        for word in ["", *(f":{word}" for word in kind.words)]:
            assert parse(f"{name}{number}{word}").stages
    assert {kind for text in EVERY for kind in re.findall(r"[a-z]+\d*", text) if kind in KINDS} == set(KINDS)


# The house ------------------------------------------------------------------------------------------------------------


def test_dtypes_are_those_of_messages() -> None:
    assert set(LABELS.values()) == set(DTYPES)


def test_what_codecs_import() -> None:
    """The standard library, torch, numpy, and of ours errors and message."""
    found = set()
    for path in Path(codecs.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(f"{'.' * node.level}{(node.module or '').partition('.')[0]}")
    inside = {"." + path.stem for path in Path(codecs.__file__).parent.glob("*.py")} | {"."}
    others = found - inside - set(sys.stdlib_module_names)
    assert others <= {"torch", "numpy", "..errors", "..message"} and {"torch", "..errors"} <= others


@pytest.mark.slow
def test_int8_of_activations_is_fast() -> None:
    """330 tokens of width 192: under 0.2 ms to encode, and as much to decode."""
    codec, h = parse("int8"), {"h": normal(330, 192)}
    sent = codec.encode(h, AT)
    assert min(timeit.repeat(lambda: codec.encode(h, AT), number=10, repeat=30)) / 10 < 0.2e-3
    assert min(timeit.repeat(lambda: codec.decode(sent), number=10, repeat=30)) / 10 < 0.2e-3
