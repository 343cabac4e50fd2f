"""Aggregation of logits, rule by rule, against hand-made numbers and identities in fp64."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_kd import WEIGHTS, logits, three
from torch import Tensor

from fedtrio.aggregation.logits import (
    RULES,
    absent,
    aggregate,
    confidence,
    entropy,
    entropy_reduction,
    mean_logits,
    mean_probabilities,
    median,
    power,
    reduced,
    trimmed_mean,
    union_mean,
)
from fedtrio.codecs import Crossing, parse
from fedtrio.errors import ConfigError
from fedtrio.models.train import distillation_loss

QUIET = pytest.mark.filterwarnings("ignore:entropy reduction")
AT = Crossing(0, 1, "a", "up")


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def sparse(z: Tensor, k: int) -> Tensor:
    """What arrives of logits whose k largest were sent."""
    codec = parse(f"topk:{k}:absent", "logits", small=0)
    return codec.decode(codec.encode({"logits": z}, AT))["logits"]


# Sharpening -----------------------------------------------------------------------------------------------------------


@QUIET
def test_sharpening_by_hand():
    """Two sites, p̄ = (0.6, 0.4): ERA takes softmax of p̄/T, the power p̄^(1/T)."""
    q = {"a": [[0.8, 0.2]], "b": [[0.4, 0.6]]}
    z = {site: torch.tensor(rows, dtype=torch.float64).log() for site, rows in q.items()}
    same_weight = {"a": 1.0, "b": 1.0}
    era, squared = math.exp(6) / (math.exp(6) + math.exp(4)), 0.36 / (0.36 + 0.16)
    assert math.isclose(float(entropy_reduction(z, same_weight, 0.1).exp()[0, 0]), era)
    assert math.isclose(float(power(z, same_weight, 0.5).exp()[0, 0]), squared)
    assert torch.equal(aggregate("era", z, same_weight), entropy_reduction(z, same_weight, 0.1))  # the defaults
    assert torch.equal(aggregate("power", z, same_weight), power(z, same_weight, 0.5))
    assert torch.equal(aggregate("power", z, same_weight, 0.25), power(z, same_weight, 0.25))


@QUIET
def test_power_sharpening():
    """K8: T = 1 changes nothing, T → 0 gives the one-hot of the greatest; ERA at T = 1 is not p̄."""
    z, mean = three(), mean_probabilities(three(), WEIGHTS)
    assert apart(power(z, WEIGHTS, 1.0), mean) < 1e-12
    one_hot = F.one_hot(mean.argmax(-1), 5).double()
    assert apart(power(z, WEIGHTS, 1e-3).exp(), one_hot) < 1e-12
    assert apart(entropy_reduction(z, WEIGHTS, 1.0), mean) > 0.1
    sharper = [entropy(power(z, WEIGHTS, t)).mean() for t in (2.0, 1.0, 0.5, 0.1)]
    assert sharper == sorted(sharper, reverse=True)


def test_entropy_reduction_warns_where_it_flattens():
    """K9: it sharpens what is sure, and says where it does the contrary; over many classes it does so soon."""
    sure = {site: 8.0 * F.one_hot(torch.arange(6) % 5, 5).double() for site in WEIGHTS}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = entropy_reduction(sure, WEIGHTS, 0.1)
    assert bool((entropy(found) < entropy(mean_probabilities(sure, WEIGHTS))).all())
    unsure = {site: logits(6, 77, seed, 0.5) for seed, site in enumerate(WEIGHTS)}
    with pytest.warns(UserWarning, match="made 100% of the public set's distributions flatter"):
        found = entropy_reduction(unsure, WEIGHTS, 0.1)
    assert bool((entropy(found) > entropy(mean_probabilities(unsure, WEIGHTS))).all())
    assert round(reduced(0.3, 77), 2) == 0.21 and round(reduced(1.0, 50257), 2) == 0.30  # at most, by e^{10p}
    assert not len(entropy_reduction({"a": torch.zeros(0, 5)}, {"a": 1.0}))


# Confidence -----------------------------------------------------------------------------------------------------------


def test_confidence_by_hand():
    """A sure site outweighs an unsure one on that text only; τ → ∞ is the mean by weights."""
    z = {"a": torch.tensor([[9.0, 0, 0], [0, 0, 0]]).double(), "b": torch.tensor([[0, 0, 0], [0, 9.0, 0]]).double()}
    weights = {"a": 3.0, "b": 1.0}
    found = confidence(z, weights, 0.5)
    sure, unsure = entropy(F.log_softmax(z["a"], -1))[0], math.log(3)
    parts = [3.0 * math.exp(-float(sure) / 0.5), math.exp(-unsure / 0.5)]
    by_hand = (parts[0] * F.softmax(z["a"][0], -1) + parts[1] / 3) / sum(parts)
    assert apart(found[0].exp(), by_hand) < 1e-12
    assert apart(confidence(z, weights, 1e9), mean_probabilities(z, weights)) < 1e-8
    assert float(found.exp()[0, 0]) > 0.9
    assert float(found.exp()[1, 1]) > float(mean_probabilities(z, weights).exp()[1, 1])


# Sparse logits --------------------------------------------------------------------------------------------------------


def test_union_divides_by_those_who_sent_it():
    """Class 0 from both, class 1 from a, class 2 from b, class 3 from nobody."""
    z = {"a": sparse(torch.tensor([[4.0, 3.0, 0.0, 0.0]]), 2), "b": sparse(torch.tensor([[8.0, 0.0, 5.0, 0.0]]), 2)}
    found = union_mean(z, {"a": 3.0, "b": 1.0})
    assert found[0, :3].tolist() == [5.0, 3.0, 5.0] and found[0, 3] == -torch.inf
    taught = aggregate("union", z, {"a": 3.0, "b": 1.0})
    assert bool(absent(taught)[0, 3]) and bool(torch.isfinite(taught).all())
    student = torch.zeros(1, 4, requires_grad=True)
    distillation_loss(student, taught, 2.0).backward()
    assert student.grad is not None and bool(torch.isfinite(student.grad).all()) and float(student.grad[0, 3]) > 0


def test_union_of_one_support_is_the_mean():
    """K5: the same support at all sites gives the dense mean on it; one site gives its own values."""
    z = three()
    assert apart(union_mean(z, WEIGHTS), mean_logits(z, WEIGHTS)) < 1e-12
    top = {site: t.sort(-1, descending=True).values for site, t in z.items()}  # all sites keep the first three
    found = union_mean({site: sparse(t, 3) for site, t in top.items()}, WEIGHTS)
    assert apart(found[:, :3], mean_logits(top, WEIGHTS)[:, :3]) < 1e-12
    assert bool((found[:, 3:] == -torch.inf).all())
    alone = union_mean({"a": sparse(z["a"], 2)}, {"a": 7.0})
    kept = alone > -torch.inf
    assert torch.equal(alone[kept], z["a"][kept]) and int(kept.sum()) == 12


# Robust rules ---------------------------------------------------------------------------------------------------------


def test_a_liar_does_not_move_the_robust_rules():
    honest = {site: logits(seed=7) + 0.01 * t for site, t in three().items()}
    liar = {**honest, "d": 1e4 * logits(seed=8)}
    weights = {**WEIGHTS, "d": 1e6}
    for rule in (median, trimmed_mean):
        assert apart(rule(liar, weights).exp(), F.softmax(logits(seed=7), -1)) < 0.05
    assert apart(F.softmax(mean_logits(liar, weights), -1), F.softmax(logits(seed=7), -1)) > 0.5


def test_robust_rules_by_hand():
    """Votes are log-probabilities, so that a constant a site adds to its rows changes no vote."""
    z = {site: torch.tensor([[a, 0.0]]).double() for site, a in zip("abcd", (-2.0, 0.0, 1.0, 50.0), strict=True)}
    votes = torch.stack([F.log_softmax(t, -1) for t in z.values()]).sort(0).values
    assert apart(median(z, {}), votes[1:3].mean(0)) < 1e-12
    assert apart(trimmed_mean(z, {}, 1), votes[1:3].mean(0)) < 1e-12
    assert apart(trimmed_mean(z, {}, 0), votes.mean(0)) < 1e-12
    shifted = {site: t + 100.0 * n for n, (site, t) in enumerate(z.items())}
    assert apart(median(shifted, {}), median(z, {})) < 1e-12
    for rule, sites in (("median", "ab"), ("trimmed", "ab")):
        with pytest.raises(ConfigError, match="needs 3 sites at least, and 2 answered"):
            aggregate(rule, {site: z[site] for site in sites}, {"a": 1.0, "b": 1.0}, trim=1)


@QUIET
@pytest.mark.parametrize("rule", list(RULES))
def test_identical_sites_agree(rule: str):
    """K7, for every rule: the distribution of one is that of all, but for the rules that sharpen."""
    z = logits()
    found = aggregate(rule, dict.fromkeys(WEIGHTS, z), WEIGHTS, temperature=1.0)
    alone = aggregate(rule, {"a": z}, {"a": 1.0}, 1.0, trim=0) if rule != "median" else F.log_softmax(z, -1)
    assert apart(F.softmax(found, -1), F.softmax(alone, -1)) < 1e-12
    if rule != "era":
        assert apart(F.softmax(found, -1), F.softmax(z, -1)) < 1e-12


def test_rows_can_be_weighted():
    """Ones change nothing, zeros take a row out of the sum but not out of the mean."""
    student, teacher = logits(seed=1), logits(seed=2)
    plain = distillation_loss(student, teacher, 2.0)
    assert apart(distillation_loss(student, teacher, 2.0, torch.ones(6).double()), plain) < 1e-12
    half = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]).double()
    wanted = distillation_loss(student[:3], teacher[:3], 2.0) / 2
    assert apart(distillation_loss(student, teacher, 2.0, half), wanted) < 1e-12
