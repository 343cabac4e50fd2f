"""Aggregation of adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def normalised(weights: Mapping[str, float]) -> dict[str, float]:
    """p_k = n_k / Σ n_j over the sites that took part, in sorted order."""
    total = sum(weights.values())
    return {site: weights[site] / total for site in sorted(weights)}


def weighted_mean(adapters: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Σ_k p_k θ_k for each tensor; "Communication-Efficient Learning of Deep Networks" (FedAvg, arXiv:1602.05629).

    Sums in fp64 and in sorted order of sites, so the result does not depend on who answered first. A mean lies
    between its terms; holding it there removes the last rounding error, so equal adapters give exactly themselves.
    """
    p = normalised(weights)
    sites = list(p)
    return {name: _mean([adapters[s][name] for s in sites], [p[s] for s in sites]) for name in adapters[sites[0]]}


def _mean(terms: Sequence[Tensor], p: Sequence[float]) -> Tensor:
    total = terms[0].double() * p[0]
    low, high = terms[0], terms[0]
    for term, weight in zip(terms[1:], p[1:], strict=True):
        total = total.add(term.double(), alpha=weight)
        low, high = torch.minimum(low, term), torch.maximum(high, term)
    return total.to(low.dtype).clamp(low, high)
