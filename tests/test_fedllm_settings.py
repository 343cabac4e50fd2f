"""What else FedLLM's sites and servers can do: uploads, optimizers, robust means, own models and rules; refusals."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from test_fedllm import ONE_STEP
from test_fedllm_methods import ABSENT, RAGGED, SITES, SIZES, seen
from test_guards import first, lied, tensor, tensors, without
from tiny import adapted, distance, federation, lab, play, rounds, same
from torch import Tensor

from fedtrio.aggregation.lora import factor_of
from fedtrio.aggregation.robust import coordinate_median
from fedtrio.aggregation.server_optimizers import fedadam, fedavgm, mean_update
from fedtrio.bench import Bench
from fedtrio.coding import Coding, codecs_of
from fedtrio.config import Config
from fedtrio.config_file import load_config
from fedtrio.data.batches import collate
from fedtrio.errors import ConfigError, QuorumError
from fedtrio.frameworks import FedLLM
from fedtrio.frameworks.fedllm import RULES
from fedtrio.frameworks.fedllm_seeds import Seeds
from fedtrio.ledger import Ledger
from fedtrio.message import Message, decode, encode
from fedtrio.models.train import task_loss
from fedtrio.program import Site, drive
from fedtrio.remote import settings_of
from fedtrio.result import spread
from fedtrio.wires.loopback import Loopback

SLOW = pytest.mark.slow
REST = ("fedavg", "rolora", "ffa", "fedsb", "fedsvd", "fedex", "hetlora")
SGD = {"optimizer": "sgd", "weight_decay": 0.0}
SEEDS = {"upload": "seeds", "candidate_seeds": 16}


def weights_of(run: Any) -> dict[str, float]:
    return {name: float(site.data.weight) for name, site in run.sites.items()}


# Uploads --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flexlora", *(pytest.param(name, marks=SLOW) for name in REST)])
def test_a_change_is_as_good_as_what_it_leads_to(name: str) -> None:
    model = adapted("gpt2")
    uploads = [FedLLM(aggregation=name, upload=how) for how in ("parameters", "delta")]  # type: ignore[arg-type]
    plain, changed = (play(method, model, n=2, epochs=1) for method in uploads)
    assert distance(plain.adapter, changed.adapter) < 1e-12
    assert not same({n: plain.adapter[n] for n in model.initial}, model.initial)
    assert {entry.kind for entry in changed.ledger if entry.direction == "up"} == {"update"}


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp64", marks=SLOW)])
def test_no_change_leaves_every_bit(precision: str) -> None:
    """F4."""
    model = adapted("gpt2", precision=precision)
    for settings in ({"upload": "delta"}, {"upload": "delta", "server_optimizer": "fedadam"}, SEEDS):
        assert same(play(FedLLM(**settings), model, n=2, epochs=0, **SGD).adapter, model.initial)


@pytest.mark.parametrize("task", ["causal-lm", pytest.param("classification", marks=SLOW)])
def test_fedsgd_is_one_step_of_all_data(task: str) -> None:
    """F1 and F2: gradients over batches of 4, weighted by examples or target tokens, make the one full-batch step."""
    model = adapted("gpt2", task)
    one = play(FedLLM(), model, (5, 11, 8), n=1, **ONE_STEP)
    sent = play(FedLLM(upload="gradients"), model, (5, 11, 8), n=1, **ONE_STEP | {"batch_size": 4, "epochs": 3})
    assert distance(one.adapter, sent.adapter) < 1e-12
    assert distance(one.adapter, model.initial) > 1e-3
    half = play(FedLLM(upload="gradients", server_learning_rate=0.5), model, (5, 11, 8), n=1, **ONE_STEP)
    halfway = {name: (t + model.initial[name]) / 2 for name, t in one.adapter.items()}
    assert distance(half.adapter, halfway) < 1e-12


def test_seeds_and_scalars_are_all_that_crosses() -> None:
    """K·b down; at most T(4 + b) up, where T are the seeds touched."""
    run = play(FedLLM(**SEEDS), adapted("gpt2", precision="fp32"), n=2, **SGD)
    assert run.ledger.total("payload", site="site-2", direction="down") == 2 * 16 * 4
    steps = run.sites["site-2"].data.steps
    assert steps == 4 and 2 * 8 <= run.ledger.total("payload", site="site-2", direction="up") <= 2 * steps * 8


def test_the_replayed_model_is_the_mean_of_the_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    """Z1: averaging the sites' models and replaying averaged scalars are the same; Z2: to the same bits everywhere."""
    model, ends = adapted("gpt2"), {}
    walk = Seeds.walk

    def watched(self: Seeds, lab: Any, start: Any, site: Any) -> dict[int, float]:
        walked = walk(self, lab, start, site)
        end = {name: t.clone() for name, t in start.items()}
        for seed, slope in walked.items():
            z = self.direction(lab, seed)
            end = {name: t - lab.train.rate(name) * slope * z[name] for name, t in end.items()}
        ends[site.round, site.name] = (start, end)
        return walked

    monkeypatch.setattr(Seeds, "walk", watched)
    run = play(FedLLM(**SEEDS), model, n=2, **SGD)
    weights = weights_of(run)
    mean = {
        name: sum(weights[s] / sum(weights.values()) * ends[2, s][1][name] for s in weights) for name in model.initial
    }
    assert distance(run.adapter, mean) < 1e-12 and distance(run.adapter, model.initial) > 1e-3
    assert all(same(ends[2, "site-1"][0], ends[2, site][0]) for site in weights)
    again = Seeds(16, 5e-4).replayed(run.lab, run.state["seeds"]["sums"])
    assert same(again, run.adapter)


def test_a_scalar_is_the_slope_along_its_direction() -> None:
    """Z4: g = zᵀ∇ℓ up to ε²."""
    model, method = adapted("gpt2"), Seeds(16, 1e-6)
    setting = lab(model, batch_size=16, epochs=1, **SGD)
    site = federation(FedLLM(), setting)[0]["site-2"]
    site.round = 1
    ((seed, slope),) = method.walk(setting, model.initial, site).items()
    leaves = {name: t.clone().requires_grad_() for name, t in model.initial.items()}
    batch = collate(site.data.encoded, np.arange(8), 1)
    loss = task_loss(model.forward(leaves, batch.lengths_B, batch.ids_BT), batch.targets)  # type: ignore[arg-type]
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    z = method.direction(setting, seed)
    true = sum(float((g * z[name]).sum()) for name, g in zip(leaves, gradients, strict=True) if g is not None)
    assert abs(slope - true) < 1e-5 * max(1, abs(true)) and abs(true) > 1e-3


def coded(method: FedLLM, codec: str, cohorts: int = 2) -> dict[str, Tensor]:
    """A run whose uploads go through a codec."""
    setting, code = lab(adapted("gpt2"), epochs=1), Coding(0, codecs_of(codec, "up"))
    plain, _ = federation(method, setting, SIZES)
    sites = {name: Site(name, site.data, method, setting, coding=code) for name, site in plain.items()}
    state = method.setup(setting)
    for setting.round in range(1, cohorts + 1):
        program = method.server(setting, state, SITES)
        drive(program, Loopback(sites), setting.round, Ledger(), partial(method.check, setting), coding=code)
    return dict(method.adapter(setting, state) or {})


def test_codecs_take_a_change_as_they_take_what_it_leads_to() -> None:
    """Top-k with error feedback encodes updates, be they made by it or given; gradients are compressed too."""
    sent, changed = (coded(FedLLM(upload=how), "topk:0.1") for how in ("parameters", "delta"))
    assert distance(sent, changed) < 1e-12 < 1e-4 < distance(sent, play(FedLLM(), adapted("gpt2"), epochs=1).adapter)
    whole, coarse = (coded(FedLLM(upload="gradients"), codec) for codec in ("none", "int8"))
    assert 1e-9 < distance(whole, coarse) < 1e-2


# Sites ----------------------------------------------------------------------------------------------------------------


def by_hand(run: Any, site: str, correct: Any) -> dict[str, Tensor]:
    """Plain SGD on a site's batches of round 1 by torch.autograd; `correct(name, gradient, y)` changes gradients."""
    model, y = run.lab.model, {name: t.clone() for name, t in run.lab.model.initial.items()}
    for batch in run.sites[site].data.batches(1):
        leaves = {name: t.clone().requires_grad_() for name, t in y.items()}
        loss = task_loss(model.forward(leaves, batch.lengths_B, batch.ids_BT), batch.targets)
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for (name, t), g in zip(list(y.items()), gradients, strict=True):
            if g is not None:
                y[name] = t - run.lab.train.rate(name) * correct(name, g, t)
    return y


def test_fedprox_by_hand() -> None:
    model = adapted("gpt2")
    run = play(FedLLM(proximal_mu=0.7), model, (9,), n=1, **SGD)
    wanted = by_hand(run, "site-1", lambda name, g, y: g + 0.7 * (y - model.initial[name]))
    assert distance(run.adapter, wanted) < 1e-12
    plain = play(FedLLM(), model, (9,), n=1, **SGD)
    assert distance(run.adapter, plain.adapter) > 1e-5
    assert same(play(FedLLM(proximal_mu=0.0), model, (9,), n=1, **SGD).adapter, plain.adapter)  # F6


def test_scaffold_by_hand() -> None:
    """F6: as FedAvg in round 1; F7: c is the mean of c_k; then sites step along g − c_k + c."""
    model = adapted("gpt2")
    one = play(FedLLM(scaffold=True), model, n=1, **SGD)
    assert same(one.adapter, play(FedLLM(), model, n=1, **SGD).adapter)
    two = play(FedLLM(scaffold=True), model, n=2, rounds=2, **SGD)
    for run in (one, two):
        own = [site.memory["control"] for site in run.sites.values()]
        mean = {name: torch.stack([c[name] for c in own]).mean(0) for name in own[0]}
        assert distance(run.state["control"], mean) < 1e-12 and distance(own[0], own[1]) > 1e-3
    x, name = model.initial, "score.modules_to_save.default.weight"
    steps, rate = one.sites["site-1"].data.steps, 2e-2
    end = by_hand(one, "site-1", lambda name, g, y: g)
    own = one.sites["site-1"].memory["control"][name]
    assert distance({"": own}, {"": (x[name] - end[name]) / (steps * rate)}) < 1e-12
    plain = play(FedLLM(), model, n=2, rounds=2, **SGD)
    assert distance(two.adapter, plain.adapter) > 1e-5


def test_scaffold_of_one_site_is_plain_training() -> None:
    """c_k = c, so nothing is corrected."""
    model = adapted("gpt2")
    assert distance(*(play(FedLLM(scaffold=on), model, (7,), n=3, **SGD).adapter for on in (True, False))) < 1e-12


@pytest.mark.parametrize(
    "optimizer", [{"optimizer": "adamw"}, pytest.param({"optimizer": "sgd", "momentum": 0.9}, marks=SLOW)]
)
def test_an_optimizer_that_remembers(optimizer: Any) -> None:
    """One site, three rounds: the same as one optimizer that never stops."""
    model, method = adapted("gpt2"), FedLLM(keep_optimizer=True)
    run = play(method, model, (9,), n=3, **optimizer)
    setting = run.lab
    site = federation(method, setting, (9,))[0]["site-1"]
    learner = setting.learner(model.initial)
    for site.round in (1, 2, 3):
        setting.descend(learner, site)
    assert distance(run.adapter, learner.values()) < 1e-12
    assert distance(run.adapter, play(FedLLM(), model, (9,), n=3, **optimizer).adapter) > 1e-5


# Servers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fedadam", pytest.param("fedavgm", marks=SLOW)])
def test_server_optimizers_step_along_the_mean(name: Any) -> None:
    model, method = adapted("gpt2"), FedLLM(server_optimizer=name, server_learning_rate=0.3)
    run, params, state = seen(method, model, epochs=1), model.initial, {}
    step = {"fedavgm": fedavgm, "fedadam": fedadam}[name]
    for sent in run.sent:
        params, state = step(params, mean_update(sent, params, weights_of(run)), state, lr=0.3)
    assert distance(run.states[-1]["adapter"], params) < 1e-12
    assert distance(params, play(FedLLM(), model, epochs=1).adapter) > 1e-4


@pytest.mark.slow
def test_no_momentum_and_rate_one_is_the_mean() -> None:
    """F5, F6."""
    model = adapted("gpt2")
    plain = play(FedLLM(), model).adapter
    assert distance(plain, play(FedLLM(server_optimizer="fedavgm", server_momentum=0.0), model).adapter) < 1e-12
    assert distance(plain, play(FedLLM(clip_norm=1e9), model).adapter) < 1e-12


class Hostile(Loopback):
    """One site sends its update turned round and fifty times as large."""

    def exchange(self, frames: Any) -> Any:
        for site, answer in super().exchange(frames):
            reply = decode(answer)
            if site == "site-1":
                tensors = {name: -50 * t for name, t in reply.tensors.items()}
                answer = encode(Message(reply.kind, tensors, reply.facts), reply.round, reply.done)
            yield site, answer


def attacked(settings: Mapping[str, Any], wire: type[Loopback]) -> dict[str, Tensor]:
    model, method = adapted("gpt2"), FedLLM(upload="delta", **settings)
    setting = lab(model, epochs=1)
    sites, _ = federation(method, setting, (6, 6, 6, 6, 6))
    return dict(rounds(method, setting, wire(sites), 2)[0]["adapter"])


@pytest.mark.parametrize(
    "name", ["multi_krum", *(pytest.param(name, marks=SLOW) for name in ("median", "trimmed_mean", "krum"))]
)
def test_robust_means_bear_a_hostile_site(name: str) -> None:
    honest = attacked({}, Loopback)
    moved = distance(honest, adapted("gpt2").initial)
    borne, lost = (distance(honest, attacked(settings, Hostile)) for settings in ({"robust": name}, {}))
    assert borne < 2 * moved < 4 * moved < lost
    clipped = attacked({"clip_norm": 0.1}, Hostile)
    size = sum(float((clipped[n] - t).square().sum()) for n, t in adapted("gpt2").initial.items()) ** 0.5
    assert size < 0.2 + 1e-12  # 0.1 a round


def test_robust_means_are_those_of_the_updates() -> None:
    """The median by the pure function; Multi-Krum that keeps all, and f = 0, is the plain mean."""
    model = adapted("gpt2")
    run = seen(FedLLM(robust="median"), model, (SITES,), epochs=1)
    changes = {s: {n: t - model.initial[n] for n, t in sent.items()} for s, sent in run.sent[0].items()}
    median = coordinate_median(changes)
    assert distance(run.states[1]["adapter"], {n: t + median[n] for n, t in model.initial.items()}) < 1e-12
    everyone = play(FedLLM(robust="multi_krum", byzantine=0), model, (4, 4, 4)).adapter
    assert distance(everyone, play(FedLLM(), model, (4, 4, 4)).adapter) < 1e-12


def test_too_few_for_a_robust_mean() -> None:
    with pytest.raises(ConfigError, match=r"krum with fedllm.byzantine 1 needs 5 sites in a round; 4 of 8 take part"):
        FedLLM(robust="krum").check_sites([f"s{k}" for k in range(8)], 4)
    with pytest.raises(QuorumError, match=r"fedllm.robust median needs 3 sites, and 2 answered"):
        play(FedLLM(robust="median"), adapted("gpt2"), (3, 3), n=1)


def test_unbiased_over_all_cohorts() -> None:
    """F12: over all cohorts of two, Σ (p_k K/m) Δ_k has the mean Σ p_k Δ_k; weights shared out anew have not."""
    model = adapted("gpt2")
    runs: dict[bool, list[Any]] = {True: [], False: []}
    for unbiased, cohort in itertools.product(runs, itertools.combinations(SITES, 2)):
        method, setting = FedLLM(unbiased=unbiased), lab(model, epochs=1)
        sites, wire = federation(method, setting, SIZES)
        setting.weights, setting.sites, setting.round = {n: s.data.weight for n, s in sites.items()}, SITES, 1
        state = method.setup(setting)
        drive(method.server(setting, state, cohort), wire, 1, Ledger())
        runs[unbiased].append(state["adapter"])
    whole = play(FedLLM(), model, SIZES, n=1, rounds=2, epochs=1).adapter
    means = {u: {n: torch.stack([a[n] for a in adapters]).mean(0) for n in whole} for u, adapters in runs.items()}
    assert distance(means[True], whole) < 1e-12 < 1e-5 < distance(means[False], whole)


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
