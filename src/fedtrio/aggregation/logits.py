"""Aggregation of logits on the public set."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapters import normalised


def mean_logits(logits: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """z̄ = Σ_k p_k z_k, [M, C]: the normalised geometric mean of the sites' distributions.

    It does not change where a site adds a constant to all its logits.
    """
    return _weighted(logits, weights)


def mean_probabilities(logits: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """log Σ_k p_k softmax(z_k), [M, C]: logits whose softmax is the arithmetic mean of the sites' distributions."""
    return _weighted({site: F.softmax(z.double(), dim=-1) for site, z in logits.items()}, weights).log()


RULES = {"logits": mean_logits, "probabilities": mean_probabilities}


def aggregate(rule: str, logits: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The aggregate by the rule of that name, in the dtype of the logits."""
    dtype = next(iter(logits.values())).dtype
    floor = torch.finfo(torch.float32).min / 4  # a class that no site gives any probability stays finite
    return RULES[rule](logits, weights).clamp(min=floor).to(dtype)


def _weighted(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    p = normalised(weights)
    first = next(iter(p))
    total = torch.zeros_like(terms[first], dtype=torch.float64)
    for site, share in p.items():
        total = total.add(terms[site].double(), alpha=share)
    return total
