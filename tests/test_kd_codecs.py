"""How KD's logits travel: exact bytes, a k for each site from its budget, and the settings that go together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_guards import extra, poked, tensor, tensors, without
from test_kd import logits
from tiny import LABELS, VOCAB, adapted, distance, federation, lab, play, public_set, same

from fedtrio.codecs import Crossing, Spec
from fedtrio.config import Config
from fedtrio.config_file import load_config
from fedtrio.errors import ConfigError, MessageError
from fedtrio.frameworks import KD
from fedtrio.frameworks.kd_logits import codec_of, fitted, top_k
from fedtrio.message import Message, Reply, decode, encode
from fedtrio.models.train import distillation_loss

AT = Crossing(0, 1, "a", "up")
M, C = 1000, 77
AT_REST: dict[str, Any] = {"optimizer": "sgd", "weight_decay": 0.0, "batch_size": 64, "epochs": 0}


def nbytes(text: str, rows: int = M, columns: int = C) -> int:
    return codec_of(text).payload_bytes({"logits": Spec("logits", torch.float32, (rows, columns))})


def test_bytes_are_those_of_the_formula():
    """M·C·b dense, M·k(b_v + b_i) sparse, b_v more for the rest's mass, M(C + 2) for int8; worked numbers of GPT-2."""
    assert nbytes("none") == M * C * 4 == 308_000
    assert nbytes("fp16") == M * C * 2 == 154_000
    assert nbytes("int8") == M * (C + 2)
    assert nbytes("topk:8:absent+fp16") == M * 8 * (2 + 1) == 24_000
    assert nbytes("topk:8:logits+fp16") == M * (8 * (2 + 1) + 2)
    assert nbytes("topk:8:logits+int8") == M * (8 * (1 + 1) + 1 + 2)
    assert nbytes("topk:32:absent+fp16", 32_000, 50_257) == 32_000 * 32 * (2 + 2) == 4_096_000
    assert nbytes("topk:20:absent+fp16") == M * (20 * 2 + 10)  # a bitmap of 77 bits is less than 20 indices


@pytest.mark.parametrize(("task", "text"), [("classification", "topk:2:absent"), ("causal-lm", "topk:4:logits+fp16")])
def test_measured_bytes_are_those_of_the_formula(task: Any, text: str):
    """Of every site in every round, up and down; padding is no part of it."""
    model, public = adapted("gpt2", task, "fp32"), public_set(task)
    rows, columns = public.target_tokens(), LABELS if task == "classification" else VOCAB
    each = {"topk:2:absent": min(2 * (4 + 1), 2 * 4 + 1), "topk:4:logits+fp16": 5 * 2 + 4}[text]
    rule = "probabilities" if task == "classification" else "logits"
    run = play(KD(logits=text, aggregation=rule), model, n=2, public=public, epochs=1)
    sent = [e.payload for e in run.ledger if e.kind in ("logits", "aggregated logits")]
    assert sent == [rows * each] * (2 * 2 * 3) and rows * each < rows * columns * 4
    dense = play(KD(aggregation=rule), model, n=2, public=public, epochs=1)
    assert distance(run.adapter, dense.adapter) > 1e-6  # it was on


@pytest.mark.parametrize("text", [f"topk:{LABELS}:logits", "topk:1.0:absent"])
def test_all_of_them_is_dense(text: str):
    """K4: top-k with k = C carries the payload of dense logits, and the run ends in the same bits."""
    z, codec = logits(9, LABELS), codec_of(text)
    (sent,) = codec.encode({"logits": z}, AT).values()
    assert torch.equal(sent, z) and torch.equal(codec.decode(codec.encode({"logits": z}, AT))["logits"], z)
    model = adapted("gpt2")
    rule = "union" if "absent" in text else "logits"
    run, dense = play(KD(logits=text, aggregation=rule), model), play(KD(), model)
    if rule == "logits":
        assert same(run.adapter, dense.adapter)
    else:
        assert distance(run.adapter, dense.adapter) < 1e-9  # the union's division may round otherwise


def test_the_rest_keeps_its_mass():
    """At T = 1 the probabilities of what was sent are exact, and the others share what is left."""
    z, codec = logits(6, 40), codec_of("topk:5:logits")
    found = codec.decode(codec.encode({"logits": z}, AT))["logits"].softmax(-1)
    kept = z.topk(5).indices
    assert float((found.gather(1, kept) - z.softmax(-1).gather(1, kept)).abs().max()) < 1e-12
    assert float((found.scatter(1, kept, 0).amax(1) - found.scatter(1, kept, 1).amin(1)).abs().max()) < 1e-12


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_what_is_learnt_from_keeps_its_mass(temperature: float):
    """At the temperature of distillation what was sent has its exact probabilities, there and back."""
    setting = lab(adapted("gpt2", "causal-lm"))
    method, z = KD(logits="topk:6:logits", temperature=temperature), logits(setting.public.target_tokens(), VOCAB)
    found = method.read(setting, method.message(setting, "logits", z, 1, "a"), "a", "a")
    kept, wanted = z.topk(6).indices, (z / temperature).softmax(-1)
    assert float(((found / temperature).softmax(-1) - wanted).gather(1, kept).abs().max()) < 1e-12
    again = method.read(setting, method.message(setting, "aggregated logits", found, 1), "the server")
    assert float((again - found).abs().max()) < 1e-12


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_nothing_is_learnt_of_what_was_not_said(temperature: float):
    """K10 for sparse logits: one's own top-k and the mass of the rest teach nothing; spread evenly they would."""
    setting = lab(adapted("gpt2", "causal-lm"))
    method, z = KD(logits="topk:6:logits", temperature=temperature), logits(setting.public.target_tokens(), VOCAB)
    told = method.read(setting, method.message(setting, "logits", z, 1, "a"), "a", "a")
    student = z.clone().requires_grad_()
    (nothing,) = torch.autograd.grad(distillation_loss(student, told, temperature, rest=True), student)
    (evenly,) = torch.autograd.grad(distillation_loss(student, told, temperature), student)
    assert float(nothing.abs().max()) < 1e-12 < 1e-4 < float(evenly.abs().max())
    other, dense = logits(*z.shape, seed=5), logits(*z.shape, seed=6)
    lumped = distillation_loss(other, dense, temperature, rest=True)
    assert abs(float(lumped - distillation_loss(other, dense, temperature))) < 1e-12  # a single least: nothing to lump

    run = play(method.model_copy(update={"logits_down": "none"}), adapted("gpt2", "causal-lm"), (5,), n=1, **AT_REST)
    assert distance(run.sites["site-1"].memory["adapter"], run.lab.model.initial) < 1e-12
    assert distance(run.adapter, run.lab.model.initial) < 1e-12


def test_mass_by_hand():
    """Classes 1 and 2 are one: KL((0.7, 0.3) ‖ (0.5, 0.5)), whatever 0.5 consists of."""
    teacher = torch.tensor([[0.7, 0.15, 0.15]], dtype=torch.float64).log()
    for first in (0.1, 0.25, 0.4):
        student = torch.tensor([[0.5, first, 0.5 - first]], dtype=torch.float64).log()
        wanted = 0.7 * math.log(0.7 / 0.5) + 0.3 * math.log(0.3 / 0.5)
        assert math.isclose(float(distillation_loss(student, teacher, 1.0, rest=True)), wanted)
        half = distillation_loss(student, teacher, 1.0, torch.tensor([0.5]), rest=True)
        assert math.isclose(float(half), wanted / 2)


# Budgets --------------------------------------------------------------------------------------------------------------


def test_k_follows_from_the_budget():
    """k = ⌊R·τ / (M(b_v + b_i))⌋, and no k that fits is left unused."""
    spec = Spec("logits", torch.float32, (M, 50_257))
    codec = codec_of("topk:64:absent+fp16")
    for rate, seconds in ((1000.0, 30.0), (12_500.0, 2.0), (100.0, 100.0)):
        found = fitted(codec, spec, rate * seconds, "a")
        assert found.layout({"logits": spec})["logits|F32:1000x50257|values.values"].shape[1] == int(
            rate * seconds / (M * (2 + 2))
        )
    assert fitted(codec, spec, None, "a") == fitted(codec, spec, 1e9, "a") == codec
    small, most = Spec("logits", torch.float32, (10, 77)), codec_of("topk:1.0:logits")
    for k, budget in ((1, 90), (1, 139), (2, 140), (10, 540), (73, 3_070)):  # a row: 5k + 4, or 4k + 14 with a bitmap
        top = top_k(fitted(most, small, budget, "a"))
        assert top is not None and top.amount == k
    assert fitted(most, small, 77 * 4 * 10, "a") == most  # dense
    with pytest.raises(ConfigError, match="a may send 3,999 bytes of logits, and one of each row takes 4,000: raise"):
        fitted(codec, spec, 3_999, "a")


def test_each_site_has_its_own_k():
    """By name and by pattern; the least of a rate and a number of bytes."""
    model = adapted("gpt2", "causal-lm", "fp32")
    rows = lab(model).public.target_tokens()
    method = KD(
        logits="topk:16:logits+fp16", upload_bytes={"site-1": rows * 20, "site-*": rows * 38}, upload_rate=rows * 3.5,
        upload_seconds=10,
    )  # fmt: skip
    run = play(method, model, n=1)
    sent = {e.site: e.payload for e in run.ledger if e.kind == "logits"}
    assert sent == {"site-1": rows * (2 + 6 * 3), "site-2": rows * (2 + 11 * 3), "site-3": rows * (2 + 11 * 3)}
    assert {e.payload for e in run.ledger if e.kind == "aggregated logits"} == {rows * (17 * 2 + 13)}  # a bitmap


# Settings -------------------------------------------------------------------------------------------------------------


def test_auto_is_top_k_for_language_models():
    def resolved(*settings: str) -> KD:
        found = load_config(settings=settings).resolved()
        assert Config.model_validate(found.model_dump()).kd == found.kd  # a resolved configuration is a valid one
        return found.kd

    assert resolved().logits == "none"
    assert resolved("task=causal-lm").logits == "topk:32:logits+fp16"
    assert resolved("task=causal-lm", "kd.aggregation=union").logits == "topk:32:absent+fp16"
    assert resolved("task=causal-lm", "kd.logits=none").logits == "none"
    assert resolved("task=causal-lm", "wire.up=int8").logits == "none"  # the wire encodes them already
    assert resolved("task=causal-lm", "kd.protocol=feddf").logits == "none"
    assert resolved("kd.upload_bytes=1000").logits == "topk:1.0:logits+fp16"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["kd.logits=gzip"], "no codec 'gzip'"),
        (["kd.logits=topk:0.1"], "is for adapter, not for logits"),
        (["kd.logits=topk:4:absent"], "topk:…:absent leaves classes out: not with aggregation logits, but union"),
        (["kd.protocol=dsfl"], "dsfl averages probabilities: choose aggregation era"),
        (["kd.upload_rate=100"], "upload_rate and upload_seconds go together"),
        (["kd.upload_bytes=100", "kd.logits=int8"], "a budget chooses k: it needs logits topk:…, not int8"),
        (["kd.protocol=feddf", "kd.logits=int8"], "feddf sends adapters and no logits"),
        (["kd.sharpening=0.5"], "sharpening is of era, power, confidence, not of aggregation logits"),
        (["kd.public_weight=0.5"], "public_weight is of protocol fedmkt, not of standard"),
        (["kd.logits=int8", "wire.up=fp16"], "logits would be encoded twice"),
        (["kd.upload_bytes=100", "wire.down={logits: fp16}"], "logits would be encoded twice"),
        (["kd.protocol=fedmkt"], "fedmkt weighs a model by its own loss on the public texts, which bear no labels"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: list[str], said: str):
    if "aggregation" not in str(settings):
        settings = [*settings, "kd.aggregation=logits"]
    with pytest.raises(ConfigError) as refusal:
        load_config(settings=settings).resolved()
    assert said in str(refusal.value)


def test_the_run_says_what_full_logits_would_cost():
    model = adapted("gpt2", "causal-lm", "fp32")
    setting = lab(model)
    rows = setting.public.target_tokens()
    (said,) = KD(logits="topk:4:logits+fp16").foresee(setting, ["a", "b"])
    full = rows * VOCAB * 4
    assert f"{rows * 14 / 1e6:,.2f} MB of logits a site and round; in full they would be {full / 1e6:,.2f} MB" in said
    assert f"({rows} tokens x {VOCAB} words)" in said and KD().foresee(setting, ["a"]) == []
    (said,) = KD(aggregation="era", protocol="dsfl").foresee(setting, ["a", "b"])
    assert "era flattens over 97 classes: at T = 0.1 a consensus of 30% becomes 17% at most" in said
    with pytest.raises(ConfigError, match="median needs 3 sites, and 2 take part in a round"):
        KD(aggregation="median").check_sites(["a", "b", "c", "d"], 2)
    for name in ("models", "upload_bytes"):
        method = KD.model_validate({name: {"*": "1", "bnak": "1"}, "logits": "topk:9:logits"})
        with pytest.raises(
            ConfigError, match=rf"kd\.{name}: no site is called 'bnak'; did you mean 'bank'\?; there are"
        ):
            method.check_sites(["bank", "mill"], 2)
    with pytest.raises(ConfigError, match="b may send 10 bytes"):
        KD(logits="topk:4:logits", upload_bytes={"b": 10}).foresee(setting, ["a", "b"])


# Guards ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (tensor("logits|F64:7x5|values", lambda t: t[:-1]), "site-2 sent tensor"),
        (tensor("logits|F64:7x5|values", lambda t: t.float()), "site-2 sent tensor"),
        (tensor("logits|F64:7x5|values", poked(1e7)), "site-2 sent tensor 'logits' with values beyond"),
        (tensor("logits|F64:7x5|values", poked(-1e300)), "site-2 sent tensor 'logits' with values beyond"),
        (without("logits|F64:7x5|values"), "site-2 sent tensor"),
        (tensors(extra), "'evil'"),
        (tensor("logits|F64:7x5|bitmap", lambda t: t | 255), "bits in each row"),
    ],
)  # fmt: skip
def test_guards_of_sparse_logits(lie: Any, said: str):
    method = KD(logits="topk:3:absent", aggregation="union")
    assert said in refused(method, lie)


def refused(method: KD, lie: Callable[[Reply], Any], task: str = "classification") -> str:
    """Why the server's check refuses a site's first answer; the honest one passes."""
    setting = lab(adapted("gpt2", task))
    site = next(iter(federation(method, setting, (3,))[0].values()))
    setting.round = 1
    start = Message("start")
    honest = decode(site.answer(encode(start, 1)))
    method.check(setting, "site-2", start, honest)
    with pytest.raises(MessageError) as refusal:
        method.check(setting, "site-2", start, lie(honest))
    return str(refusal.value)
