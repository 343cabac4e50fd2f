"""What the server does with the mean update Δ = Σ p_k (θ_k − θ): a step of an optimizer whose gradient is −Δ.

"Adaptive Federated Optimization" (FedAdagrad, FedAdam, FedYogi, arXiv:2003.00295) and "Measuring the Effects of
Non-Identical Data Distribution for Federated Visual Classification" (FedAvgM, arXiv:1909.06335). There is no bias
correction. Every step is `(params, update, state, …) -> (params, state)`: it changes nothing it is given, computes in
fp64, and returns a state of named tensors, `{"m": {name: tensor}, "v": …}`, to be kept with the server's. Only what the
update names moves, with its moments; all else stays, as half of an adapter does in a round of RoLoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .adapters import normalised, weighted_mean

Named = Mapping[str, Tensor]
Moments = Mapping[str, Named]
Step = tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]


# The mean update ------------------------------------------------------------------------------------------------------


def delta(after: Named, before: Named) -> dict[str, Tensor]:
    """θ_k − θ in fp64, of the tensors that came back."""
    return {name: tensor.double() - before[name].double() for name, tensor in after.items()}


def mean_update(sent: Mapping[str, Named], before: Named, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Δ = Σ p_k (θ_k − θ) in fp64; where nobody has moved, it is exactly 0."""
    return weighted_mean({site: delta(after, before) for site, after in sent.items()}, weights)


def sampled_update(
    updates: Mapping[str, Named], cohort_weights: Mapping[str, float], all_weights: Mapping[str, float]
) -> dict[str, Tensor]:
    """Σ_{k∈S} (p_k K/m) Δ_k, with p_k over all K sites: over all cohorts of m its mean is Σ p_k Δ_k.

    The usual mean, whose weights are shared out anew in each cohort, has not that mean.
    """
    p = normalised(all_weights)
    factor = sum(p[site] for site in cohort_weights) * len(p) / len(cohort_weights)
    mean = weighted_mean({site: {n: t.double() for n, t in u.items()} for site, u in updates.items()}, cohort_weights)
    return {name: factor * tensor for name, tensor in mean.items()}


# Steps ----------------------------------------------------------------------------------------------------------------


def fedavg(params: Named, update: Named, state: Moments, lr: float = 1.0) -> Step:
    """θ ← θ + ηΔ."""
    return _moved(params, {name: lr * tensor.double() for name, tensor in update.items()}), _copied(state)


def fedavgm(params: Named, update: Named, state: Moments, lr: float = 1.0, momentum: float = 0.9) -> Step:
    """m ← βm + Δ; θ ← θ + ηm."""
    m = {name: momentum * _moment(state, "m", name, d) + d.double() for name, d in update.items()}
    return _moved(params, {name: lr * tensor for name, tensor in m.items()}), _updated(state, m=m)


def fedadagrad(
    params: Named, update: Named, state: Moments, lr: float = 1e-2, beta1: float = 0.0, tau: float = 1e-3
) -> Step:
    """v ← v + Δ²; then as `fedadam`."""
    return _adaptive(params, update, state, lr, beta1, tau, lambda v, square: v + square)


def fedadam(
    params: Named,
    update: Named,
    state: Moments,
    lr: float = 1e-2,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
) -> Step:
    """m ← β₁m + (1−β₁)Δ; v ← β₂v + (1−β₂)Δ²; θ ← θ + ηm/(√v + τ), from m₀ = 0 and v₀ = τ²."""
    return _adaptive(params, update, state, lr, beta1, tau, lambda v, square: beta2 * v + (1 - beta2) * square)


def fedyogi(
    params: Named,
    update: Named,
    state: Moments,
    lr: float = 1e-2,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
) -> Step:
    """v ← v − (1−β₂)Δ²·sign(v − Δ²), which moves by as much as Δ² and no more; else as `fedadam`."""
    return _adaptive(
        params, update, state, lr, beta1, tau, lambda v, square: v - (1 - beta2) * square * (v - square).sign()
    )


OPTIMIZERS: dict[str, Callable[..., Step]] = {
    "fedavg": fedavg,
    "fedavgm": fedavgm,
    "fedadagrad": fedadagrad,
    "fedadam": fedadam,
    "fedyogi": fedyogi,
}


def _adaptive(
    params: Named,
    update: Named,
    state: Moments,
    lr: float,
    beta1: float,
    tau: float,
    second: Callable[[Tensor, Tensor], Tensor],
) -> Step:
    m, v, steps = {}, {}, {}
    for name, tensor in update.items():
        d = tensor.double()
        m[name] = beta1 * _moment(state, "m", name, d) + (1 - beta1) * d
        v[name] = second(_moment(state, "v", name, d, tau**2), d.square())
        root = v[name].sqrt() + tau
        steps[name] = torch.where(root > 0, lr * m[name] / root, 0.0)  # 0/0 where τ = 0 and nothing has ever moved
    return _moved(params, steps), _updated(state, m=m, v=v)


def _moment(state: Moments, kind: str, name: str, like: Tensor, start: float = 0.0) -> Tensor:
    held = state.get(kind, {}).get(name)
    return torch.full_like(like, start, dtype=torch.float64) if held is None else held.double()


def _moved(params: Named, steps: Named) -> dict[str, Tensor]:
    return {
        name: (tensor.double() + steps[name]).to(tensor.dtype) if name in steps else tensor.clone()
        for name, tensor in params.items()
    }


def _updated(state: Moments, **moments: Named) -> dict[str, dict[str, Tensor]]:
    return _copied(state) | {kind: {**state.get(kind, {}), **fresh} for kind, fresh in moments.items()}


def _copied(state: Moments) -> dict[str, dict[str, Tensor]]:
    return {kind: dict(named) for kind, named in state.items()}
