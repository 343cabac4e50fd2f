"""What the server makes of the sites' adapters; each rule is the step of one paper, and pure.

`adapters`, `weights` and `scales` go by site. A rule that averages factors takes adapters of one scale; where sites'
scales differ, `at_scale` brings them to the server's first. All but the LoRA factors (the head, `modules_to_save`) is
averaged. What is frozen isn't sent, so `sent` holds only what `travelling` names; `common` is what the server holds.

| rule | trains | result | mean of the products | mixed ranks |
|-|-|-|-|-|
| fedavg | A, B | adapter | inexact | no |
| ffa, rolora | one factor | adapter | exact | no |
| fedsvd | B | adapter, A orthonormal | exact | no |
| fedsb | R | R | exact | yes |
| flora | A, B | stack of rank Σ r_k to merge | exact | yes |
| fedex | A, B | adapter, and a residual of rank (K−1)r to merge | exact | no |
| flexlora | A, B | adapter | nearest of its rank | yes |
| hetlora | A, B | adapter | inexact | yes |
| lora_fair, fedrot | A, B | adapter | nearer than fedavg | no |
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from .adapters import normalised, weighted_mean
from .lora import (
    Adapter,
    Factor,
    Product,
    check_alike,
    core_name,
    mean_product,
    of_rank,
    pairs,
    placed,
    product,
    product_norm,
    remainder,
    resized,
    row_signs,
    stacked,
    travelling,
    truncated,
)

Adapters = Mapping[str, Adapter]
Numbers = Mapping[str, float]


# Averages of factors --------------------------------------------------------------------------------------------------


def fedavg(adapters: Adapters, weights: Numbers) -> dict[str, Tensor]:
    """Ā = Σ p_k A_k and B̄ = Σ p_k B_k; "Towards Building the Federated GPT" (FedIT, arXiv:2305.05644)."""
    check_alike(adapters)
    return weighted_mean(adapters, weights)


def ffa(common: Adapter, sent: Adapters, weights: Numbers) -> dict[str, Tensor]:
    """B̄ beside the A that all were born with, so that mean(B_k)·A = mean(B_k·A).

    "Improving LoRA in Privacy-preserving Federated Learning" (FFA-LoRA, arXiv:2403.12313).
    """
    return _one_factor(common, sent, weights, "B")


def rolora_factor(round: int) -> Factor:
    """B in the rounds 1, 3, 5 …, and A in between. B is first, for while it is zero A has no gradient."""
    return "B" if round % 2 else "A"


def rolora(common: Adapter, sent: Adapters, weights: Numbers, round: int) -> dict[str, Tensor]:
    """The mean of the factor that trains in this round, while all hold the same other one.

    "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA" (RoLoRA, arXiv:2502.01755).
    """
    return _one_factor(common, sent, weights, rolora_factor(round))


def _one_factor(common: Adapter, sent: Adapters, weights: Numbers, factor: Factor) -> dict[str, Tensor]:
    check_alike({"the server": travelling(common, factor), **sent})
    return {**common, **weighted_mean(sent, weights)}


def fedsvd(common: Adapter, sent: Adapters, weights: Numbers) -> dict[str, Tensor]:
    """FFA, and then the same product with orthonormal rows of A: B̄·A = UΣVᵀ, B ← UΣ, A ← Vᵀ.

    "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA" (arXiv:2505.12805). What it does is
    post-processing, which costs no privacy. Rows of A keep being a basis where B̄ is of smaller rank, or zero.
    """
    found = ffa(common, sent, weights)
    turned = {}
    for layer, pair in pairs(found).items():
        b, a = product(found, pair)
        q_a, r_a = torch.linalg.qr(a.T)
        v = _right_basis(b @ r_a.T)
        turned[layer] = of_rank(Product(b @ r_a.T @ v.T, v @ q_a.T), a.shape[0])
    return found | placed(turned, found)


def _right_basis(b: Tensor) -> Tensor:
    """All right singular vectors of a tall [o, r] as rows [r, r], also those whose value is 0."""
    v = torch.linalg.svd(torch.linalg.qr(b, mode="r").R, full_matrices=True).Vh
    return v * row_signs(v)


# Exact sums of products -----------------------------------------------------------------------------------------------


def flora(adapters: Adapters, weights: Numbers, scales: Numbers) -> dict[str, Tensor]:
    """[s_1 B_1 … s_K B_K] and [p_1 A_1; …; p_K A_K]: an adapter of rank Σ r_k whose scale is 1.

    "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations" (arXiv:2409.05976).
    All merge it into W and start again from a `fresh` adapter and a new optimizer. PEFT gives it the scale 1 with
    lora_alpha = Σ r_k (under rslora its root).
    """
    check_alike(adapters, mixed_ranks=True)
    like = adapters[min(adapters)]
    sums = {layer: mean_product(adapters, pair, weights, scales) for layer, pair in pairs(like).items()}
    return placed(sums, like) | _mean_remainder(adapters, weights)


def fedex(adapters: Adapters, weights: Numbers, scale: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """FedAvg, and what it loses as a residual adapter of rank (K−1)r whose scale is 1, to be merged into W.

    "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models" (arXiv:2410.09432).
    The residual is a covariance, Σ p_k B_k A_k − B̄Ā = Σ p_k (B_k − B̄)(A_k − Ā). As Σ p_k (B_k − B̄) = 0, it is also
    Σ_{k<K} p_k (B_k − B̄)(A_k − A_K), with one term less. Of one site alone it is empty.
    """
    mean = fedavg(adapters, weights)
    p = normalised(weights)
    *others, last = p
    if not others:
        return mean, {}
    residuals = {}
    for layer, pair in pairs(mean).items():
        ours = {site: product(adapters[site], pair, scale) for site in p}
        b_mean = torch.stack([p[site] * ours[site].b for site in p]).sum(0)
        terms = {site: Product(ours[site].b - b_mean, ours[site].a - ours[last].a) for site in others}
        residuals[layer] = stacked((p[site], terms[site]) for site in others)
    return mean, placed(residuals, mean)


def flexlora(
    adapters: Adapters,
    weights: Numbers,
    scales: Numbers,
    scale: float,
    rank: int | None = None,
    energy: float | None = None,
) -> dict[str, Tensor]:
    """Σ p_k s_k B_k A_k = UΣVᵀ; then B = UΣ/s and A = Vᵀ, at the given rank or that which keeps so much energy.

    "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources" (FlexLoRA,
    arXiv:2402.11505). The components stand in order of σ, so a site of rank r_k takes the first r_k of them:
    `at_scale(resized(common, r_k, its first adapter), scale, s_k)`.
    """
    check_alike(adapters, mixed_ranks=True)
    like = adapters[min(adapters)]
    found = {}
    for layer, pair in pairs(like).items():
        b, a = truncated(mean_product(adapters, pair, weights, scales), rank, energy)
        found[layer] = Product(b / scale, a)
    return placed(found, like) | _mean_remainder(adapters, weights)


def _mean_remainder(adapters: Adapters, weights: Numbers) -> dict[str, Tensor]:
    return weighted_mean({site: remainder(adapter) for site, adapter in adapters.items()}, weights)


# Mixed ranks by padding -----------------------------------------------------------------------------------------------


def hetlora(adapters: Adapters, weights: Numbers, rank: int, common: Adapter | None = None) -> dict[str, Tensor]:
    """The mean of adapters padded with zeros to one rank; a site takes the first r_k components, by `resized`.

    "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models" (HetLoRA, arXiv:2401.06432), where
    `weights` are `norm_weights`. Components that no site of the cohort holds would become zero and never train again;
    with `common` they stay as they were.
    """
    check_alike(adapters, mixed_ranks=True)
    held = max(adapter[pair.a].shape[0] for adapter in adapters.values() for pair in pairs(adapter).values())
    if held > rank:
        raise ConfigError(f"hetlora at rank {rank}, but a site sent rank {held}")
    mean = weighted_mean({site: resized(adapter, held) for site, adapter in adapters.items()}, weights)
    return resized(mean, rank, common)


def norm_weights(adapters: Adapters, scales: Numbers) -> dict[str, float]:
    """HetLoRA's weights ‖s_k B_k A_k‖_F over all layers; 1 each where no site has changed anything."""
    norms = {site: product_norm(adapters[site], scales[site]) for site in sorted(adapters)}
    return norms if any(norms.values()) else dict.fromkeys(norms, 1.0)


# Small cores between frozen factors -----------------------------------------------------------------------------------


def fedsb(sent: Adapters, weights: Numbers, rank: int | None = None) -> dict[str, Tensor]:
    """Σ p_k R_k for W + s·B·R·A with B and A frozen and common; exact, as it is linear in R.

    "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private) Federated LoRA
    Fine-Tuning" (arXiv:2502.15436). A site of smaller rank trains the upper left block of R, which is padded.
    """
    if rank is not None:
        sent = {site: {n: _padded(n, t, rank) for n, t in tensors.items()} for site, tensors in sent.items()}
    check_alike(sent)
    return weighted_mean(sent, weights)


def _padded(name: str, core: Tensor, rank: int) -> Tensor:
    if ".lora_R" not in name:
        return core
    if core.shape[0] > rank:
        raise ConfigError(f"fedsb at rank {rank}, but {name} is {list(core.shape)}")
    return F.pad(core, (0, rank - core.shape[1], 0, rank - core.shape[0]))


def fedsb_start(like: Adapter, generator: torch.Generator | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Orthonormal random B and A to be frozen, and what trains: R = 0, and all that is no LoRA."""
    frozen, cores = {}, {}
    for layer, pair in pairs(like).items():
        r, i = like[pair.a].shape
        o = like[pair.b].shape[0]
        if r > min(o, i):
            raise ConfigError(f"fedsb needs a rank of at most {min(o, i)} at {layer}, got {r}")
        a, b = (torch.randn(n, r, generator=generator, dtype=torch.float64) for n in (i, o))
        frozen[layer] = Product(torch.linalg.qr(b).Q, torch.linalg.qr(a).Q.T)
        cores[core_name(pair)] = like[pair.a].new_zeros(r, r)
    return placed(frozen, like), cores | remainder(like)


def fedsb_adapter(frozen: Adapter, trained: Adapter) -> dict[str, Tensor]:
    """What the model runs with: B, R·A, and the rest. Autograd goes through R; a smaller R uses the first columns."""
    found = {name: tensor for name, tensor in trained.items() if ".lora_R" not in name}
    for pair in pairs(frozen).values():
        core = trained[core_name(pair)]
        found |= {pair.a: core @ frozen[pair.a][: core.shape[1]], pair.b: frozen[pair.b][:, : core.shape[0]]}
    return found


# Nearer means of factors ----------------------------------------------------------------------------------------------


def lora_fair(adapters: Adapters, weights: Numbers, ridge: float = 0.01) -> dict[str, Tensor]:
    """Ā, and B̄ + ΔB with ΔB = (ΔW − B̄Ā)Āᵀ(ĀĀᵀ + λ1)⁻¹, where ΔW = Σ p_k B_k A_k.

    "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement" (arXiv:2411.14961) minimises
    a cosine loss by SGD; this is the closed form for squared errors. λ → 0 projects ΔW on the rows of Ā, and λ → ∞ is
    FedIT.
    """
    mean = fedavg(adapters, weights)
    p = normalised(weights)
    refined = {}
    for layer, pair in pairs(mean).items():
        b, a = product(mean, pair)
        ours = [(share, product(adapters[site], pair)) for site, share in p.items()]
        lost = torch.stack([share * (b_k @ (a_k @ a.T)) for share, (b_k, a_k) in ours]).sum(0) - b @ (a @ a.T)
        gram = a @ a.T + ridge * torch.eye(len(a)).to(a)
        refined[layer] = Product(b + torch.linalg.solve(gram, lost.T).T, a)
    return mean | placed(refined, mean)


def fedrot(adapters: Adapters, weights: Numbers, reference: Adapter, factor: Factor = "A") -> dict[str, Tensor]:
    """FedAvg of adapters that were turned, B_k Rᵀ and R A_k, so that one factor is near to the reference's.

    "FedRot-LoRA" (arXiv:2602.23638); R is the nearest orthogonal matrix (Procrustes), which leaves B_k A_k as it is.
    """
    check_alike({"the reference": reference, **adapters})
    turned = {site: {**adapters[site], **_turned(adapters[site], reference, factor)} for site in adapters}
    return weighted_mean(turned, weights)


def _turned(adapter: Adapter, reference: Adapter, factor: Factor) -> dict[str, Tensor]:
    found = {}
    for layer, pair in pairs(adapter).items():
        (b, a), (b_ref, a_ref) = product(adapter, pair), product(reference, pair)
        u, _, v = torch.linalg.svd(a_ref @ a.T if factor == "A" else b_ref.T @ b)
        found[layer] = Product(b @ (u @ v).T, u @ v @ a)
    return placed(found, adapter)
