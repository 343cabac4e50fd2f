"""Aggregation of logits on the public set: K sites' [M, C] become one, whose softmax is what is learnt from.

p_k are the shares of the sites' weights, q_k = softmax(z_k), and p̄ = Σ p_k q_k. Sums are in fp64 and in sorted order of
sites. Rules that make distributions give their logarithms, so every aggregate is logits.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapters import normalised
from .robust import coordinate_median as _median
from .robust import trimmed_mean as _trimmed

Logits = Mapping[str, Tensor]
Weights = Mapping[str, float]

ERA, POWER, CONFIDENCE = 0.1, 0.5, 1.0  # temperatures where none is given


def mean_logits(logits: Logits, weights: Weights) -> Tensor:
    """z̄ = Σ_k p_k z_k, [M, C]: the normalised geometric mean of the sites' distributions.

    It does not change where a site adds a constant to all its logits. FedDF's AVGLOGITS (arXiv:2006.07242).
    """
    return _weighted(logits, weights)


def mean_probabilities(logits: Logits, weights: Weights) -> Tensor:
    """log Σ_k p_k softmax(z_k), [M, C]: logits whose softmax is the arithmetic mean of the sites' distributions."""
    return _weighted(logits, weights, lambda z: F.softmax(z.double(), dim=-1)).log()


def entropy_reduction(logits: Logits, weights: Weights, temperature: float = ERA) -> Tensor:
    """log softmax(p̄/T), [M, C]: the ERA of DS-FL.

    "Distillation-Based Semi-Supervised Federated Learning for Communication-Efficient Collaborative Training with
    Non-IID Private Data" (arXiv:2008.06180). p̄ lies within 0 … 1, so over many classes softmax(p̄/T) is flatter than p̄
    unless that is very sure; a UserWarning says so where the mean entropy has risen.
    """
    before = mean_probabilities(logits, weights)
    after = F.log_softmax(before.exp() / temperature, dim=-1)
    if len(after) and float(entropy(after).mean()) > float(entropy(before).mean()):
        share = float((entropy(after) > entropy(before)).double().mean())
        warnings.warn(
            f"entropy reduction at T = {temperature:g} made {share:.0%} of the public set's distributions flatter, not "
            "sharper: use kd.aggregation power, or a smaller kd.sharpening",
            stacklevel=2,
        )
    return after


def reduced(consensus: float, classes: int, temperature: float = ERA) -> float:
    """What ERA makes of a top probability at best: e^{p/T} / (e^{p/T} + C − 1), where the others have next to none."""
    return 1 / (1 + (classes - 1) * math.exp(-consensus / temperature))


def power(logits: Logits, weights: Weights, temperature: float = POWER) -> Tensor:
    """log of p̂ ∝ p̄^{1/T}, [M, C]: sharper for T < 1 whatever C is, and p̄ itself at T = 1."""
    return F.log_softmax(mean_probabilities(logits, weights) / temperature, dim=-1)


def confidence(logits: Logits, weights: Weights, temperature: float = CONFIDENCE) -> Tensor:
    """log Σ_k w_{k,m} q_{k,m} with w_{k,m} ∝ p_k·exp(−H(q_{k,m})/τ), [M, C]: on each text the surer site counts more.

    τ → ∞ gives `mean_probabilities`.
    """
    p = normalised(weights)
    log_q_KMC = torch.stack([F.log_softmax(logits[site].double(), dim=-1) for site in p])
    prior_K1 = torch.tensor(list(p.values()), dtype=torch.float64, device=log_q_KMC.device).log()[:, None]
    w_KM = F.softmax(prior_K1 - entropy(log_q_KMC) / temperature, dim=0)
    return (w_KM[..., None] * log_q_KMC.exp()).sum(0).log()


def union_mean(logits: Logits, weights: Weights) -> Tensor:
    """z̄_i = Σ_{k∋i} p_k z_{k,i} / Σ_{k∋i} p_k over the sites that sent class i, [M, C]; absent where none did.

    The mean without zero padding of sparse logits, as AdaLD describes it (arXiv:2509.01750). What a site has not sent
    is at or below a quarter of the least number of its dtype, as `topk:…:absent` decodes it.
    """
    p = normalised(weights)
    first = logits[next(iter(p))]
    total, heard = torch.zeros_like(first, dtype=torch.float64), torch.zeros_like(first, dtype=torch.float64)
    for site, share in p.items():
        sent = ~absent(logits[site])
        total = total.add(torch.where(sent, logits[site].double(), 0.0), alpha=share)
        heard = heard.add(sent.double(), alpha=share)
    return torch.where(heard > 0, total / heard.clamp(min=1e-300), -torch.inf)


def absent(logits: Tensor) -> Tensor:
    """Where a class was not sent, as bools."""
    return logits <= torch.finfo(logits.dtype).min / 8


def median(logits: Logits, weights: Weights) -> Tensor:
    """The median over sites of each log-probability, [M, C]; one site, one vote. Raises ConfigError below three."""
    return _median(_votes(logits))["z"]


def trimmed_mean(logits: Logits, weights: Weights, trim: int = 1) -> Tensor:
    """The mean of each log-probability without the `trim` least and greatest, [M, C]; one site, one vote.

    Raises ConfigError where nobody would be left.
    """
    return _trimmed(_votes(logits), trim)["z"]


RULES: dict[str, Callable[..., Tensor]] = {
    "logits": mean_logits,
    "probabilities": mean_probabilities,
    "era": entropy_reduction,
    "power": power,
    "confidence": confidence,
    "union": union_mean,
    "median": median,
    "trimmed": trimmed_mean,
}
SHARPENED = ("era", "power", "confidence")  # those that take a temperature


def aggregate(
    rule: str, logits: Logits, weights: Weights, temperature: float | None = None, trim: int | None = None
) -> Tensor:
    """The aggregate by the rule of that name, in the dtype of the logits; None: the rule's own default."""
    dtype = logits[next(iter(logits))].dtype
    floor = torch.finfo(torch.float32).min / 4  # a class that no site gives any probability stays finite
    found = RULES[rule]
    if rule in SHARPENED and temperature is not None:
        found = partial(found, temperature=temperature)
    if rule == "trimmed" and trim is not None:
        found = partial(found, trim=trim)
    return found(logits, weights).clamp(min=floor).to(dtype)


def entropy(log_p: Tensor) -> Tensor:
    """H = −Σ p log p of each row of log-probabilities, in nats."""
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)  # 0·log 0 = 0


def _votes(logits: Logits) -> dict[str, dict[str, Tensor]]:
    """Log-probabilities: a constant that a site adds to a row would move its place among the others."""
    return {site: {"z": F.log_softmax(z.double(), dim=-1)} for site, z in logits.items()}


def _weighted(logits: Logits, weights: Weights, term: Callable[[Tensor], Tensor] = lambda z: z) -> Tensor:
    """Σ_k p_k term(z_k); one site's logits are looked at after the other, as `Logits` may decode them when asked."""
    total: Tensor | None = None
    for site, share in normalised(weights).items():
        z = term(logits[site]).double()
        total = (torch.zeros_like(z) if total is None else total).add(z, alpha=share)
    assert total is not None
    return total
