"""Local loss: a site learns from an auxiliary head of its own, and no gradient comes back from the server.

"Decoupled Greedy Learning of CNNs" (arXiv:1901.08164) at the cut of split learning, as in CSE-FSL: the site minimises
CE(aux(h), y), sends h and labels every so many steps, and the server trains on h as data. The auxiliary head is part of
the site's half: it travels and is averaged with it, and is in no saved adapter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.batches import Batch
from ..models.cut import unpack
from ..models.train import Adapter, task_loss
from .lab import Lab

NAME = "auxiliary.weight"


def auxiliary(lab: Lab) -> dict[str, Tensor]:
    """The head that all start from, a pure function of the seed.

    Classification: C × D, on the mean over a text's tokens. Language modelling: D × D before the frozen embeddings,
    which serve as the output's; it starts as the identity.
    """
    width, device, dtype = lab.model.width, lab.model.device, lab.model.dtype
    if lab.model.task == "causal-lm":
        return {NAME: torch.eye(width, dtype=dtype, device=device)}
    generator = torch.Generator().manual_seed(lab.seed % 2**62)
    weight_CD = torch.randn(lab.model.classes, width, generator=generator, dtype=torch.float64) / width**0.5
    return {NAME: weight_CD.to(device, dtype)}


def local_gradient(lab: Lab, tensors: Adapter, h_ND: Tensor, batch: Batch) -> Tensor:
    """∂ℓ_aux/∂h, [N, D]; that of the head goes into its own `grad`."""
    here_ND = h_ND.detach().requires_grad_()
    key = ("auxiliary", batch.shape, True)  # no span of the model, so it is metered by itself
    with lab.model.observe(("forward", *key), lambda: {tensors[NAME].untyped_storage().data_ptr()}):
        loss = task_loss(_logits(lab, tensors[NAME], here_ND, batch.lengths_B), lab.to_device(batch.targets))
    with lab.model.observe(("backward", *key), set):
        loss.backward()
    assert here_ND.grad is not None
    return here_ND.grad


def _logits(lab: Lab, weight: Tensor, h_ND: Tensor, lengths_B: Tensor) -> Tensor:
    h_BTD = unpack(h_ND, lab.to_device(lengths_B))
    if lab.model.task == "classification":
        return h_BTD.sum(1) / lab.to_device(lengths_B)[:, None] @ weight.T
    embeddings: Tensor = lab.model.module.get_input_embeddings().weight  # type: ignore[operator, union-attr, assignment]
    return h_BTD @ weight.T @ embeddings.to(h_BTD.dtype).T
