"""Corrections of a site's training that need what other sites sent: FedProx and SCAFFOLD, tensor by tensor.

Both act on A and B, so what they hold to depends on how a product is split into its factors. SCAFFOLD's formulas are
those of plain SGD: y ← y − η(g − c_k + c). After an optimizer with memory, (x − y)/(Tη) is no mean gradient.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .adapters import weighted_mean

Named = Mapping[str, Tensor]


def proximal(gradient: Tensor, here: Tensor, start: Tensor, mu: float) -> Tensor:
    """g + μ(y − x), the gradient of ℓ + μ/2·‖y − x‖².

    "Federated Optimization in Heterogeneous Networks" (FedProx, arXiv:1812.06127).
    """
    return gradient + mu * (here - start)


def corrected(gradient: Tensor, own: Tensor, common: Tensor) -> Tensor:
    """g − c_k + c; "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning" (arXiv:1910.06378)."""
    return gradient - own + common


def control(own: Named, common: Named, start: Named, end: Named, steps: int, lr: float) -> dict[str, Tensor]:
    """c_k⁺ = c_k − c + (x − y)/(Tη), after T steps of SGD at rate η from x to y (option II)."""
    return {name: own[name] - common[name] + (start[name] - y) / (steps * lr) for name, y in end.items()}


def common_control(common: Named, changes: Mapping[str, Named], sites: int) -> dict[str, Tensor]:
    """c ← c + |S|/K · mean_S(c_k⁺ − c_k), where K sites exist and those of `changes` took part; each counts alike."""
    doubles = {site: {name: tensor.double() for name, tensor in c.items()} for site, c in changes.items()}
    mean = weighted_mean(doubles, dict.fromkeys(changes, 1.0))
    return {name: (c.double() + len(changes) / sites * mean[name]).to(c.dtype) for name, c in common.items()}
