"""What else FedLLM's sites may have: models of their own and ranks; own rules; and what is refused, or a lie."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from test_fedllm_learning import SEEDS, SGD
from test_fedllm_methods import ABSENT, RAGGED, SITES, seen
from test_guards import first, lied, tensor, tensors, without
from tiny import adapted, play, same
from torch import Tensor

from fedtrio.aggregation.lora import factor_of
from fedtrio.bench import Bench
from fedtrio.config import Config
from fedtrio.config_file import load_config
from fedtrio.errors import ConfigError
from fedtrio.frameworks import FedLLM
from fedtrio.frameworks.fedllm import RULES
from fedtrio.message import Message, decode, encode
from fedtrio.remote import settings_of
from fedtrio.result import spread

SLOW = pytest.mark.slow

# Own models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"aggregation": "fedsa"}, {"local_heads": True}])
def test_what_is_personal_never_crosses(settings: Any) -> None:
    model, method = adapted("gpt2"), FedLLM(**settings)
    run = seen(method, model, (SITES, SITES, SITES[:2]), epochs=1)
    personal = {n for n in model.initial if factor_of(n) == ("B" if "aggregation" in settings else None)}
    assert personal and all(sent.keys() == model.initial.keys() - personal for now in run.sent for sent in now.values())
    assert method.adapter(run.lab, run.states[-1]) is None
    for site in run.sites.values():
        last = 2 if site.name == "site-3" else 3
        own = method.own_adapter(run.lab, site)
        assert own is not None and same(own, run.after[last - 1][site.name])
    for before, after in itertools.pairwise(zip(run.before, run.after, strict=True)):
        for site in after[0]:  # begins with its own of the last round, and the common rest
            assert all(torch.equal(after[0][site][name], before[1][site][name]) for name in personal)
            others = model.initial.keys() - personal
            assert all(torch.equal(after[0][site][name], after[0]["site-1"][name]) for name in others)
    assert any(not torch.equal(run.after[-1]["site-1"][name], run.after[-1]["site-2"][name]) for name in personal)


def test_a_site_that_never_took_part_has_the_common_start() -> None:
    model, method = adapted("gpt2"), FedLLM(aggregation="fedsa")
    run = seen(method, model, (SITES[:2],), epochs=1)
    assert same(method.own_adapter(run.lab, run.sites["site-3"]) or {}, model.initial)


def test_spread_by_hand() -> None:
    assert spread([]) == {"mean": None, "min": None, "p10": None, "jain": None}
    found = spread([0.9, 0.5, 0.6, 1.0])
    assert found["mean"] == pytest.approx(0.75) and found["min"] == 0.5
    assert found["p10"] == pytest.approx(float(np.percentile([0.9, 0.5, 0.6, 1.0], 10))) == pytest.approx(0.53)
    assert found["jain"] == pytest.approx(9.0 / (4 * 2.42))
    assert spread([0.3] * 5)["jain"] == pytest.approx(1) and spread([1.0, 0, 0, 0])["jain"] == 0.25


# Own rules ------------------------------------------------------------------------------------------------------------

RULE = """
import torch
def least(adapters, weights):
    names = adapters[min(adapters)]
    return {n: torch.stack([a[n] for a in adapters.values()]).min(0).values for n in names}
def wrong(adapters, weights):
    return {}
"""


def test_an_own_rule(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(RULE, encoding="utf-8")
    model, at = adapted("gpt2"), tmp_path / "mine.py"
    run = seen(FedLLM(aggregation=f"{at}:least"), model, (SITES,), epochs=1)
    least = {n: torch.stack([sent[n] for sent in run.sent[0].values()]).min(0).values for n in model.initial}
    assert same(run.states[1]["adapter"], least)
    for name, said in (
        (f"{at}:wrong", "wrong gave no finite tensor"), (f"{at}:other", "has no function 'other'; it has least, wrong"),
        (f"{at}x.py:least", "can't be imported: there is no such file"), ("nowhere_at_all:f", "can't be imported"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=re.escape(said)):
            FedLLM(aggregation=name).check_sites(SITES, 3)
            play(FedLLM(aggregation=name), model, n=1)


def test_a_site_runs_no_code_that_a_server_names(tmp_path: Path) -> None:
    """Sites are told nothing of an own rule; and one that is told imports nothing."""
    (tmp_path / "mine.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    method = FedLLM(aggregation=f"{tmp_path / 'mine.py'}:least")
    run = seen(FedLLM(), adapted("gpt2"), (SITES,))
    site = run.sites["site-1"]
    reply = decode(encode(Message("adapter", run.lab.model.initial), 2))
    site.round = 2
    assert isinstance(method.client(run.lab, site, reply), Message)
    settings = ["data.max_train=40", "data.max_public=8", f"fedllm.aggregation={method.aggregation}"]
    config = load_config(settings=settings)
    assert config.resolved().fedllm.aggregation == method.aggregation
    (tmp_path / "my.yaml").write_text("fedllm: {aggregation: 'mine.py:least'}", encoding="utf-8")
    assert load_config(tmp_path / "my.yaml").resolved().fedllm.aggregation == method.aggregation
    assert settings_of(Bench(config), "x")["config"]["fedllm"]["aggregation"] == "fedavg"


# All of it together ---------------------------------------------------------------------------------------------------

CHOICES: list[dict[str, Any]] = [
    {"local_heads": True}, {"keep_optimizer": True}, {"proximal_mu": 0.1}, {"upload": "delta"}, {"upload": "gradients"},
    {"robust": "median"}, {"server_optimizer": "fedyogi"}, {"clip_norm": 0.1}, {"scaffold": True},
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: next(iter(choice)))
def test_what_is_not_refused_runs(name: str, choice: Any) -> None:
    """Every aggregation with every other choice, in fp32, with sites that come and go, and ranks that differ."""
    try:
        method = FedLLM(aggregation=name, **choice)
    except ValidationError:
        return
    cohorts = (SITES,) * 2 if "robust" in choice else ABSENT[:3]
    mixes = RULES[name].mixed_ranks and method.plain and method.upload != "gradients"
    for ranks in (None, RAGGED) if mixes else (None,):
        run = seen(method, adapted("gpt2", precision="fp32"), cohorts, ranks, epochs=1, **SGD)
        assert all(t.dtype == torch.float32 for t in run.states[-1]["adapter"].values())
        assert not same(run.states[-1]["adapter"], run.states[0]["adapter"]) or name == "flora"


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"aggregation": "fedavgg"}, "'fedavgg' is none of fedavg, ffa"),
        ({"aggregation": "flora", "server_optimizer": "fedadam"}, "server_optimizer needs an aggregation that"),
        ({"aggregation": "fedsvd", "robust": "krum"}, "robust needs an aggregation that averages"),
        ({"aggregation": "flexlora", "upload": "gradients"}, "upload gradients needs an aggregation that averages"),
        ({"aggregation": "flora", "upload": "delta"}, "its factors change every round"),
        ({"aggregation": "fedsvd", "keep_optimizer": True}, "its factors change every round"),
        ({"aggregation": "fedex", "local_heads": True}, "a base of its own"),
        ({"aggregation": "rolora", "scaffold": True}, "scaffold goes with aggregation fedavg or ffa"),
        ({"scaffold": True, "robust": "median"}, "can't be had with scaffold"),
        ({"upload": "gradients", "proximal_mu": 0.1}, "sites take no step"),
        ({"upload": "seeds", "aggregation": "ffa"}, "upload seeds goes with aggregation fedavg"),
        ({"upload": "seeds", "server_optimizer": "fedyogi"}, "can't be had with upload seeds"),
        ({"aggregation": "mine.py:f", "robust": "median"}, "is a mean of its own"),
    ],
)
def test_what_can_not_be_had_together(settings: Any, said: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(said)):
        FedLLM(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["fedllm.aggregation=florra"], "fedllm: aggregation 'florra' is none of"),
        (["fedllm.scaffold=true"], "set train.optimizer=sgd"),
        (["fedllm.scaffold=true", "train.optimizer=sgd", "train.momentum=0.9"], "train.momentum=0"),
        (["fedllm.upload=seeds", "train.optimizer=sgd", "train.weight_decay=0.1"], "train.weight_decay=0"),
        (["fedllm.aggregation=flora", "wire.up=topk:0.1"], "wire.up topk:0.1 encodes what changed"),
        (["fedllm.aggregation=fedex", "wire.down=int8"], "wire.down int8: with fedllm.aggregation fedex"),
        (["fedllm.aggregation=ffa", "wire.up=rank:2"], "wire.up rank:2 needs both factors of an adapter"),
        (["fedllm.upload=delta", "wire.up=rank:2+int8"], "not so fedllm.upload delta"),
        (["lora.r=[4,8]"], "lora.r by site is for fedllm, not for kd, split"),
        (["lora.r=[4,8]", "frameworks=[fedllm]"], "fedavg needs one lora.r for all; fedsb, flexlora, flora, hetlora"),
        (["lora.r=[4,8]", "frameworks=[fedllm]", "fedllm.aggregation=fedsb", "fedllm.robust=median"], "no other mean"),
        (["lora.r=[4,0]"], "lora.r: Input should be greater than or equal to 1"),
        (["lora.r=many"], "lora.r: Input should be a valid integer"),
        (["lora.r={}"], "lora.r: a rank is missing"),
        (["lora.capacity={a: 1, b: 2}"], "lora.capacity is for fedllm, not for kd, split"),
        (["lora.capacity={a: 1, b: 2}", "frameworks=[fedllm]"], "fedavg needs one lora.r for all; fedsb, flexlora"),
        (["lora.capacity={a: 0}"], "lora.capacity.a: Input should be greater than 0"),
        (["lora.capacity={a: much}"], "lora.capacity.a: Input should be a valid number"),
        (["lora.capacity={}"], "capacity names no site"),
        (["lora.capacity={a: 1}", "lora.r=[4]"], "r is given site by site: keep one of them"),
        (["lora.capacity={a: 1}", "lora.r_min=9"], "r_min 9 is above r 8"),
        (["lora.r_min=2"], "r_min goes with lora.capacity"),
        (["kd.lora.r=[4,8]"], "lora.r by site is for fedllm: kd.lora has one rank for all of models"),
    ],
)
def test_what_a_configuration_can_not_have(settings: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config(settings=settings)


def test_ranks_by_site() -> None:
    def ranks(text: str) -> dict[str, int]:
        settings = [f"lora.r={text}", "frameworks=[fedllm,local]", "fedllm.aggregation=flexlora"]
        return load_config(settings=settings).lora.ranks(["b", "a", "c"])

    assert ranks("[2,4,8]") == {"a": 2, "b": 4, "c": 8} and ranks("{c: 1, a: 2, b: 3}") == {"a": 2, "b": 3, "c": 1}
    with pytest.raises(ConfigError, match=r"lora.r lists 2 ranks for 3 sites: a, b, c"):
        ranks("[2,4]")
    with pytest.raises(ConfigError, match=r"lora.r: 'c' has no rank; the sites are a, b, c"):
        ranks("{a: 2, b: 4}")
    with pytest.raises(ConfigError, match=r"lora.r: 'd' is no site"):
        ranks("{a: 2, b: 4, c: 5, d: 6}")


def test_ranks_by_capacity() -> None:
    """⌊r · c_k / max c⌋, and r_min at least, in any unit."""

    def ranks(capacity: str, *more: str, sites: Sequence[str] = ("b", "a", "c")) -> dict[str, int]:
        settings = [f"lora.capacity={capacity}", *more, "frameworks=[fedllm,local]", "fedllm.aggregation=flora"]
        config = load_config(settings=settings)
        assert Config.model_validate(config.model_dump(mode="json")).lora == config.lora  # as a remote site is told it
        assert config.lora.rank == config.lora.r
        return config.lora.ranks(sites)

    assert ranks("{a: 4, b: 16, c: 11}", "lora.r=16") == {"a": 4, "b": 16, "c": 11}
    assert ranks("{a: 4.0e+9, b: 1.6e+10, c: 8589934592}") == {"a": 2, "b": 8, "c": 4}  # 8 · 0.537 = 4.29
    assert ranks("{a: 1, b: 1000, c: 400}") == {"a": 1, "b": 8, "c": 3}
    assert ranks("{a: 1, b: 1000, c: 400}", "lora.r_min=4", "lora.r=32") == {"a": 4, "b": 32, "c": 12}
    assert ranks("{a: 0.7, b: 2.1, c: 1.4}", "lora.r=3") == {"a": 1, "b": 3, "c": 2}  # 3 · 0.7 / 2.1 < 1 in fp64
    assert ranks("{a: 5}", sites=["a"]) == {"a": 8}
    with pytest.raises(ConfigError, match=r"lora.capacity: 'c' has no capacity; the sites are a, b, c"):
        ranks("{a: 2, b: 4}")
    with pytest.raises(ConfigError, match=r"lora.capacity: 'd' is no site"):
        ranks("{a: 2, b: 4, c: 5, d: 6}")


# Lies -----------------------------------------------------------------------------------------------------------------


def no_control(known: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in known.items() if not name.startswith("control.")}


LIES = [
    ({"aggregation": "rolora"}, "adapter", first(lambda t: t.T), r"of shape \(\d+, \d+\); expected"),
    ({"aggregation": "flora"}, "adapter", first(lambda t: t[:1]), r"of shape \(1, \d+\); expected \(\d, \d+\)"),
    ({"upload": "delta"}, "update", lambda r: replace(r, kind="adapter"), "'adapter'; expected 'update'"),
    ({"scaffold": True}, "adapter", tensors(no_control), "lacks tensor 'control."),
    (SEEDS, "seed sums", tensor("seeds", lambda t: t + 16), "not in rising order from 0 to 15"),
    (SEEDS, "seed sums", tensor("sums", lambda t: t + 1e9), "guards.max_value"),
]
MORE_LIES = [
    ({"aggregation": "ffa"}, "adapter", tensors(lambda known: {**known, "x": torch.ones(1)}), "unknown tensor 'x'"),
    ({"aggregation": "fedex"}, "adapter", without(), "lacks tensor"),
    ({"aggregation": "fedsb"}, "adapter", first(lambda t: 1e6 * (t + 1)), "guards.max_growth"),
    ({"upload": "gradients"}, "gradients", first(lambda t: t.float()), "as torch.float32; expected torch.float64"),
    (SEEDS, "seed sums", tensor("seeds", lambda t: t.flip(0) if len(t) > 1 else t - 1), "not in rising order"),
    (SEEDS, "seed sums", tensor("sums", lambda t: t.float()), "as torch.float32; expected torch.float64"),
    (SEEDS, "seed sums", without("seeds"), "lacks tensor 'seeds'"),
]


@pytest.mark.parametrize(
    ("settings", "kind", "lie", "said"), LIES + [pytest.param(*lie, marks=SLOW) for lie in MORE_LIES]
)
def test_lies(settings: Any, kind: str, lie: Any, said: str) -> None:
    sgd = SGD if {"scaffold", "candidate_seeds"} & settings.keys() else {}
    assert re.search(said, lied(FedLLM(**settings), kind, lie, epochs=1, **sgd))
