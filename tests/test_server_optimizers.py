"""Server optimizers, sampled participation, FedProx and SCAFFOLD: by hand, and the identities F of FedAvg's family."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import adapted, distance, same, shaken
from torch import Tensor

from fedtrio.aggregation import sites
from fedtrio.aggregation.adapters import normalised, weighted_mean
from fedtrio.aggregation.lora import factor_of, travelling
from fedtrio.aggregation.server_optimizers import (
    OPTIMIZERS,
    delta,
    fedadagrad,
    fedadam,
    fedavg,
    fedavgm,
    fedyogi,
    mean_update,
    sampled_update,
)

Named = dict[str, Tensor]
WEIGHTS = {"s0": 3.0, "s1": 1.0, "s2": 4.0, "s3": 1.5}


def of(*values: float) -> Named:
    return {"x": torch.tensor(values, dtype=torch.float64)}


def sent(start: Mapping[str, Tensor]) -> dict[str, Named]:
    return {site: shaken(start, seed=k) for k, site in enumerate(WEIGHTS)}


# Steps by hand --------------------------------------------------------------------------------------------------------


def test_fedavgm_by_hand():
    """Δ of 2 and then 3 at β = ½, η = 0.1: m is 2 and then 4."""
    params, state = fedavgm(of(1.0), of(2.0), {}, lr=0.1, momentum=0.5)
    assert params["x"].item() == pytest.approx(1.2) and state["m"]["x"].item() == 2.0
    params, state = fedavgm(params, of(3.0), state, lr=0.1, momentum=0.5)
    assert params["x"].item() == pytest.approx(1.6) and state["m"]["x"].item() == 4.0


def test_fedadam_by_hand():
    """β₁ = ½, β₂ = ¾, τ = 1, η = 6: m is 1 and then 0, of Δ = 2 and −1; v is 1.75 and then 1.5625.

    Public code squares m in place of Δ, takes Δ for the first m, and weighs sites alike.
    """
    settings = {"lr": 6.0, "beta1": 0.5, "beta2": 0.75, "tau": 1.0}
    params, state = fedadam(of(10.0), of(2.0), {}, **settings)
    assert state["m"]["x"].item() == 1.0 and state["v"]["x"].item() == 0.75 * 1 + 0.25 * 4
    assert params["x"].item() == pytest.approx(10 + 6 / (math.sqrt(1.75) + 1), rel=1e-15)
    params, state = fedadam(params, of(-1.0), state, **settings)
    assert state["m"]["x"].item() == 0.0 and state["v"]["x"].item() == 0.75 * 1.75 + 0.25
    assert params["x"].item() == pytest.approx(10 + 6 / (math.sqrt(1.75) + 1), rel=1e-15)


def test_fedyogi_by_hand():
    """v moves towards Δ² by (1−β₂)Δ², from above and from below, and stays where it is reached."""
    _, state = fedyogi(of(0.0), of(2.0), {}, beta2=0.75, tau=1.0)
    assert state["v"]["x"].item() == 1 + 0.25 * 4
    _, state = fedyogi(of(0.0), of(1.0), state, beta2=0.75, tau=1.0)
    assert state["v"]["x"].item() == 2 - 0.25 * 1
    params, state = fedyogi(of(0.0), of(2.0), {"v": of(4.0), "m": of(3.0)}, lr=9.0, beta1=0.5, beta2=0.75, tau=1.0)
    assert state["v"]["x"].item() == 4.0 and state["m"]["x"].item() == 2.5
    assert params["x"].item() == pytest.approx(9 * 2.5 / 3)


def test_fedadagrad_by_hand():
    """τ = ½ and Δ of 3, then 4: v is 9.25 and then 25.25; m is Δ itself where β₁ = 0."""
    params, state = fedadagrad(of(0.0), of(3.0), {}, lr=1.0, tau=0.5)
    assert state["v"]["x"].item() == 9.25 and params["x"].item() == pytest.approx(3 / (math.sqrt(9.25) + 0.5))
    params, state = fedadagrad(params, of(4.0), state, lr=1.0, tau=0.5)
    second = 3 / (math.sqrt(9.25) + 0.5) + 4 / (math.sqrt(25.25) + 0.5)
    assert state["v"]["x"].item() == 25.25 and params["x"].item() == pytest.approx(second)


@pytest.mark.parametrize("step", [fedadagrad, fedadam, fedyogi])
def test_v_starts_at_tau_squared(step: Any):
    """So a first tiny update makes a tiny step, and not one of length η."""
    params, _ = step(of(0.0), of(1e-9), {}, lr=1.0, beta1=0.0, tau=0.1)
    assert params["x"].item() == pytest.approx(1e-9 / 0.2, rel=2e-2)


# Identities -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_eta_one_is_the_weighted_mean(precision: str):
    """F5."""
    start = adapted("gpt2", precision=precision).initial
    answers = sent(start)
    params, state = fedavg(start, mean_update(answers, start, WEIGHTS), {})
    assert state == {} and distance(params, weighted_mean(answers, WEIGHTS)) < (1e-12 if precision == "fp64" else 1e-7)
    assert {t.dtype for t in params.values()} == {t.dtype for t in start.values()}
    half, _ = fedavg(start, mean_update(answers, start, WEIGHTS), {}, lr=0.5)
    middle = weighted_mean({"start": start, "mean": params}, {"start": 1.0, "mean": 1.0})
    assert distance(half, middle) < 1e-6 < distance(half, params)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_nothing_learnt_leaves_every_bit(name: str, precision: str):
    """F4: where no site has moved, the mean update is exactly 0."""
    start = adapted("llama", precision=precision).initial
    update = mean_update(dict.fromkeys(WEIGHTS, start), start, WEIGHTS)
    assert not any(tensor.any() for tensor in update.values())
    params, state = OPTIMIZERS[name](start, update, {})
    assert same(params, start)
    params, _ = OPTIMIZERS[name](params, update, state)
    assert same(params, start)
    moved, _ = OPTIMIZERS[name](start, mean_update(sent(start), start, WEIGHTS), {})
    assert not same(moved, start)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_identical_sites_are_one_site(name: str):
    """F3, over three rounds."""
    start = adapted("gpt2").initial
    one, many, states = start, start, [{}, {}]
    for round in range(3):
        one, states[0] = OPTIMIZERS[name](one, mean_update({"s": shaken(one, round)}, one, {"s": 2.0}), states[0])
        answers = {site: shaken(many, round) for site in WEIGHTS}
        many, states[1] = OPTIMIZERS[name](many, mean_update(answers, many, WEIGHTS), states[1])
    assert same(one, many) and distance(one, start) > 1e-3


def test_no_momentum_is_fedavg():
    """F6: bit for bit, over three rounds."""
    start = adapted("gpt2", precision="fp32").initial
    plain, heavy, state, update = start, start, {}, {}
    for _ in range(3):
        update = mean_update(sent(plain), plain, WEIGHTS)
        heavy, state = fedavgm(heavy, update, state, lr=0.7, momentum=0.0)
        plain, _ = fedavg(plain, update, {}, lr=0.7)
        assert same(plain, heavy)
    assert not same(fedavgm(heavy, update, state, momentum=0.9)[0], fedavg(plain, update, {})[0])


def test_adam_becomes_fedavg_or_signs():
    """F9: without memory, τ = η → ∞ is FedAvg, and τ = 0 steps by η·sign(Δ), also where Δ is 0."""
    start, update = of(1.0, -2.0, 0.5), of(3.0, -1e-3, 0.0)
    wide, _ = fedadam(start, update, {}, lr=1e9, beta1=0.0, beta2=0.0, tau=1e9)
    assert distance(wide, fedavg(start, update, {})[0]) < 1e-6
    signs, _ = fedadam(start, update, {}, lr=0.25, beta1=0.0, beta2=0.0, tau=0.0)
    assert torch.equal(signs["x"], torch.tensor([1.25, -2.25, 0.5]).double())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_order_of_sites_changes_no_bit(name: str):
    """F10."""
    start = adapted("gpt2", precision="fp32").initial
    answers = sent(start)
    turned = {site: answers[site] for site in ("s2", "s0", "s3", "s1")}
    ours, theirs = (OPTIMIZERS[name](start, mean_update(a, start, WEIGHTS), {})[0] for a in (answers, turned))
    assert same(ours, theirs)


def test_small_updates_survive():
    """F11: 1 + 2⁻¹⁰ is 1 in bf16, and so is each small step; of an fp32 master none is lost."""
    start = {"x": torch.ones(3)}
    params: Mapping[str, Tensor] = start
    for _ in range(64):
        params, _ = fedavg(params, {"x": torch.full((3,), 2.0**-10)}, {})
    assert torch.equal(params["x"], torch.full((3,), 1 + 64 * 2.0**-10))
    assert torch.equal(torch.ones(3).bfloat16() + torch.full((3,), 2.0**-10).bfloat16(), torch.ones(3).bfloat16())


def test_sampled_participation_is_unbiased():
    """F12: the mean over all cohorts of two and of three, of five; the usual mean is biased."""
    generator = torch.Generator().manual_seed(0)
    updates = {f"s{k}": {"x": torch.randn(4, generator=generator, dtype=torch.float64)} for k in range(5)}
    weights = dict(zip(updates, (5.0, 11.0, 8.0, 3.0, 1.0), strict=True))
    wanted = weighted_mean(updates, weights)["x"]
    for m in (2, 3, 5):
        cohorts = list(itertools.combinations(updates, m))
        chosen = [({s: updates[s] for s in c}, {s: weights[s] for s in c}) for c in cohorts]
        fair = torch.stack([sampled_update(u, w, weights)["x"] for u, w in chosen]).mean(0)
        usual = torch.stack([weighted_mean(u, w)["x"] for u, w in chosen]).mean(0)
        assert float((fair - wanted).abs().max()) < 1e-12
        assert (float((usual - wanted).abs().max()) > 1e-2) == (m < 5)
    by_hand = sum(normalised(weights)[s] * 5 / 2 * updates[s]["x"] for s in ("s1", "s3"))
    two = {s: updates[s] for s in ("s1", "s3")}
    got = sampled_update(two, {s: weights[s] for s in two}, weights)["x"]
    assert float((got - by_hand).abs().max()) < 1e-14  # type: ignore[union-attr]


# State ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_survives_a_file(name: str, tmp_path: Path):
    """Named tensors, saved after two rounds and read again, go on to the same bits; nothing given is changed."""
    import safetensors.torch

    start = adapted("gpt2", precision="fp32").initial
    params, state = start, {}
    for round in range(4):
        if round == 2:
            flat = {f"{kind}/{n}": t for kind, named in state.items() for n, t in named.items()}
            safetensors.torch.save_file(flat, str(tmp_path / "state"))
            loaded = safetensors.torch.load_file(str(tmp_path / "state"))
            state = {k: {n: loaded[f"{k}/{n}"] for n in named} for k, named in state.items()}
        before = {n: t.clone() for n, t in params.items()}
        held = {k: {n: t.clone() for n, t in named.items()} for k, named in state.items()}
        given, kept = params, state
        params, state = OPTIMIZERS[name](params, mean_update(sent(params), params, WEIGHTS), state)
        assert same(given, before) and all(same(kept[k], held[k]) for k in held)
        assert not {t.data_ptr() for t in params.values()} & {t.data_ptr() for t in given.values()}
        if round == 3:
            again, moments = start, {}
            for _ in range(4):
                again, moments = OPTIMIZERS[name](again, mean_update(sent(again), again, WEIGHTS), moments)
            assert same(params, again) and all(same(state[k], moments[k]) for k in moments)
    kinds = {"fedavg": set(), "fedavgm": {"m"}}
    assert set(state) == kinds.get(name, {"m", "v"})


@pytest.mark.parametrize("name", ["fedavgm", "fedadagrad", "fedadam", "fedyogi"])
def test_only_what_is_updated_moves(name: str):
    """In RoLoRA a round brings one factor; the other stays to the last bit, and so do its moments."""
    start = adapted("gpt2").initial
    params, state = OPTIMIZERS[name](start, mean_update(sent(start), start, WEIGHTS), {})
    update = mean_update({s: travelling(a, "B") for s, a in sent(params).items()}, params, WEIGHTS)
    after, later = OPTIMIZERS[name](params, update, state)
    frozen = {n for n in start if factor_of(n) == "A"}
    assert frozen == {n for n in start if torch.equal(after[n], params[n])}
    assert frozen == {n for n in start if torch.equal(later["m"][n], state["m"][n])}
    assert not {t.data_ptr() for t in after.values()} & {t.data_ptr() for t in params.values()}


# FedProx and SCAFFOLD -------------------------------------------------------------------------------------------------


def test_proximal_and_corrected_by_hand():
    """F6: g + μ(y − x), and g − c_k + c; with μ = 0 or c = c_k = 0 it is g to the last bit."""
    g, y, x, zero = (torch.tensor([v, 2 * v]).double() for v in (0.1, 3.0, 1.0, 0.0))
    assert torch.allclose(sites.proximal(g, y, x, 0.5), torch.tensor([1.1, 2.2]).double())
    assert torch.equal(sites.proximal(g, y, x, 0.0), g) and torch.equal(sites.corrected(g, zero, zero), g)
    assert torch.allclose(sites.corrected(g, y, x), torch.tensor([-1.9, -3.8]).double())
    leaf = y.clone().requires_grad_()
    (0.5 / 2 * (leaf - x).square().sum()).backward()
    assert leaf.grad is not None and torch.allclose(sites.proximal(zero, y, x, 0.5), leaf.grad)


def test_control_by_hand():
    """From 5 to 2 in four steps of ½: the mean gradient was 1.5. Of 8 sites two took part."""
    own = sites.control(of(0.25), of(1.0), of(5.0), of(2.0), steps=4, lr=0.5)
    assert own["x"].item() == 0.25 - 1 + 1.5
    common = sites.common_control(of(1.0), {"a": of(4.0), "b": of(2.0)}, sites=8)
    assert common["x"].item() == 1 + 2 / 8 * 3


# Q_k diagonal, b_k: three sites whose optima lie apart
Q = [torch.tensor(q).double() for q in ([1.0, 0.5], [0.2, 2.0], [0.7, 0.1])]
BIAS = [torch.tensor(b).double() for b in ([1.0, -1.0], [2.0, 3.0], [-4.0, 0.5])]
T, RATE = 10, 0.1


def descent(k: int, x: Tensor, own: Tensor, common: Tensor) -> Tensor:
    y = x.clone()
    for _ in range(T):
        y = y - RATE * sites.corrected(Q[k] * y - BIAS[k], own, common)
    return y


def scaffold(rounds: int, cohorts: list[list[int]]) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    x, c, own = torch.zeros(2).double(), torch.zeros(2).double(), {k: torch.zeros(2).double() for k in range(3)}
    for round in range(rounds):
        ends, changes = {}, {}
        for k in cohorts[round % len(cohorts)]:
            end = descent(k, x, own[k], c)
            fresh = sites.control({"x": own[k]}, {"x": c}, {"x": x}, {"x": end}, T, RATE)["x"]
            changes[f"s{k}"], own[k] = {"x": fresh - own[k]}, fresh
            ends[f"s{k}"] = {"x": end}
        x = weighted_mean(ends, dict.fromkeys(ends, 1.0))["x"]
        c = sites.common_control({"x": c}, changes, sites=3)["x"]
        assert float((c - torch.stack(list(own.values())).mean(0)).abs().max()) < 1e-12  # F7, whoever takes part
    return x, c, own


def test_scaffold_starts_as_fedavg():
    """F6: with all controls 0 the first round is FedAvg's; the second isn't."""
    x = torch.zeros(2).double()
    for round in (1, 2):
        x = torch.stack([descent(k, x, torch.zeros(2), torch.zeros(2)) for k in range(3)]).mean(0)  # type: ignore
        assert (float((scaffold(round, [[0, 1, 2]])[0] - x).abs().max()) < 1e-14) == (round == 1)


def test_scaffold_finds_the_optimum_and_fedavg_does_not():
    """F8: SCAFFOLD ends in (ΣQ_k)⁻¹Σb_k; FedAvg in (ΣP_k)⁻¹ΣP_kQ_k⁻¹b_k with P_k = 1 − (1 − ηQ_k)ᵀ, elsewhere."""
    optimum = sum(BIAS) / sum(Q)
    x, c, own = scaffold(400, [[0, 1, 2]])
    assert float((x - optimum).abs().max()) < 1e-10
    assert float(c.abs().max()) < 1e-10  # the mean gradient at the optimum
    assert all(float((own[k] - (Q[k] * optimum - BIAS[k])).abs().max()) < 1e-10 for k in own)
    some, _, _ = scaffold(3000, [[0, 1], [2], [1, 2], [0]])
    assert float((some - optimum).abs().max()) < 1e-6

    y, zero = torch.zeros(2).double(), torch.zeros(2).double()
    for _ in range(400):
        y = torch.stack([descent(k, y, zero, zero) for k in range(3)]).mean(0)
    shares = [1 - (1 - RATE * q) ** T for q in Q]
    biased = sum(p / q * b for p, q, b in zip(shares, Q, BIAS, strict=True)) / sum(shares)
    assert float((y - biased).abs().max()) < 1e-12 and float((y - optimum).abs().max()) > 0.05


def test_delta_is_of_what_came_back():
    before = {"a": torch.ones(2), "b": torch.zeros(2)}
    assert same(delta({"b": torch.full((2,), 0.1)}, before), {"b": torch.full((2,), 0.1).double()})
