"""Means that a few wrong or hostile sites can't carry off.

Every site has one vote: weights are what sites say of themselves, and a liar would choose a large one. All work on the
tensors as they are sent, best on updates θ_k − θ, element by element or by distance. Two adapters with the same product
B·A may differ in both factors, so distances between factors and between products differ; `product_distances` gives the
latter for `krum`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import ConfigError
from .adapters import weighted_mean
from .lora import Adapter, check_alike, norm, pairs, product, remainder, stacked

Updates = Mapping[str, Adapter]


def trimmed_mean(updates: Updates, trim: int) -> dict[str, Tensor]:
    """Of each element the mean without the `trim` least and the `trim` greatest values.

    "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates" (arXiv:1803.01498). Bears `trim` hostile
    sites; raises ConfigError where nobody would be left.
    """
    _at_least(2 * trim + 1, updates, f"a trimmed mean without {trim} on either side")
    found = {}
    for name, first in updates[min(updates)].items():
        ordered = torch.stack([updates[site][name].double() for site in sorted(updates)]).sort(0).values
        kept = ordered[trim : len(updates) - trim]
        found[name] = kept.mean(0).clamp(kept[0], kept[-1]).to(first.dtype)  # equal values give exactly themselves
    return found


def coordinate_median(updates: Updates) -> dict[str, Tensor]:
    """The median of each element, and the mean of the middle two where sites are even in number.

    It is the trimmed mean that trims most (arXiv:1803.01498). Raises ConfigError below three sites.
    """
    _at_least(3, updates, "the median")
    return trimmed_mean(updates, (len(updates) - 1) // 2)


def krum_scores(distances_KK: Tensor, byzantine: int) -> Tensor:
    """Σ of the squared distances to the K − f − 2 nearest others: [K]; the least is the most central site."""
    squares = distances_KK.square().sort(1).values
    return squares[:, : len(distances_KK) - byzantine - 1].sum(1)  # one more, as each is at no distance to itself


def multi_krum(updates: Updates, byzantine: int, keep: int, distances_KK: Tensor | None = None) -> dict[str, Tensor]:
    """The mean of the `keep` sites with the least Krum scores, out of K ≥ 2f + 3.

    "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent" (Krum, NeurIPS 2017, arXiv:1703.02757).
    """
    chosen = krum_sites(updates, byzantine, keep, distances_KK)
    return weighted_mean({site: updates[site] for site in chosen}, dict.fromkeys(chosen, 1.0))


def krum(updates: Updates, byzantine: int, distances_KK: Tensor | None = None) -> dict[str, Tensor]:
    """The update of the one site that is most central; where two are, of the first by name."""
    (chosen,) = krum_sites(updates, byzantine, 1, distances_KK)
    return {name: tensor.clone() for name, tensor in updates[chosen].items()}


def krum_sites(updates: Updates, byzantine: int, keep: int, distances_KK: Tensor | None = None) -> list[str]:
    """Who is kept, best first; distances are between the tensors as sent, unless they are given."""
    _at_least(2 * byzantine + 3, updates, f"krum against {byzantine} hostile")
    if not 1 <= keep <= len(updates):
        raise ConfigError(f"multi-krum can keep 1 to {len(updates)} of {len(updates)} sites, not {keep}")
    scores = krum_scores(distances(updates) if distances_KK is None else distances_KK, byzantine)
    sites = sorted(updates)
    return [sites[k] for k in scores.argsort(stable=True)[:keep]]


def distances(updates: Updates) -> Tensor:
    """‖θ_k − θ_j‖ over all tensors: [K, K], in sorted order of sites."""
    check_alike(updates)
    sites = sorted(updates)
    squares = torch.zeros(len(sites), len(sites), dtype=torch.float64)
    for name in updates[sites[0]]:
        flat = torch.stack([updates[site][name].double().flatten() for site in sites])
        squares += torch.stack([(flat - row).square().sum(1) for row in flat]).cpu()
    return squares.sqrt()


def product_distances(adapters: Mapping[str, Adapter], scales: Mapping[str, float]) -> Tensor:
    """‖s_k B_k A_k − s_j B_j A_j‖_F over all layers, and ‖θ_k − θ_j‖ of all that is no LoRA: [K, K].

    These are distances between the models themselves; ranks may differ.
    """
    check_alike(adapters, mixed_ranks=True)
    sites = sorted(adapters)
    squares = distances({site: remainder(adapters[site]) for site in sites}).square()
    for pair in pairs(adapters[sites[0]]).values():
        ours = [product(adapters[site], pair, scales[site]) for site in sites]
        for k, mine in enumerate(ours):
            for j in range(k):
                squares[k, j] += norm(stacked([(1.0, mine), (-1.0, ours[j])])) ** 2
                squares[j, k] = squares[k, j]
    return squares.sqrt()


def update_norm(update: Adapter) -> float:
    """‖Δ‖ over all tensors."""
    return math.hypot(*(float(torch.linalg.vector_norm(tensor.double())) for tensor in update.values()))


def clipped(update: Adapter, limit: float) -> dict[str, Tensor]:
    """Δ·min(1, limit/‖Δ‖): bounds what one site can do, and changes no bit of what is within.

    "Can You Really Backdoor Federated Learning?" (arXiv:1911.07963).
    """
    size = update_norm(update)
    factor = limit / size if size > limit else 1.0
    return {name: (tensor.double() * factor).to(tensor.dtype) for name, tensor in update.items()}


def _at_least(needed: int, updates: Updates, what: str) -> None:
    if len(updates) < needed:
        raise ConfigError(f"{what} needs {needed} sites at least, and {len(updates)} answered")
    check_alike(updates)
