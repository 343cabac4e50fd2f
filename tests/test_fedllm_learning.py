"""How FedLLM's sites and servers learn: what is uploaded, and the optimizers and robust means on both sides."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from test_fedllm import ONE_STEP
from test_fedllm_methods import SITES, SIZES, seen
from tiny import adapted, distance, federation, lab, play, rounds, same
from torch import Tensor

from fedtrio.aggregation.robust import coordinate_median
from fedtrio.aggregation.server_optimizers import fedadam, fedavgm, mean_update
from fedtrio.coding import Coding, codecs_of
from fedtrio.data.batches import collate
from fedtrio.errors import ConfigError, QuorumError
from fedtrio.frameworks import FedLLM
from fedtrio.frameworks.fedllm_seeds import Seeds
from fedtrio.ledger import Ledger
from fedtrio.message import Message, decode, encode
from fedtrio.models.train import task_loss
from fedtrio.program import Site, drive
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
