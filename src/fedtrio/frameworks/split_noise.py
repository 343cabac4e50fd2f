"""Protection at the cut: each token's activations are clipped, and get Gaussian noise, before they leave a site.

h̃ = h·min(1, C/‖h‖) + N(0, σ²C²), token by token: the Gaussian mechanism ("The Algorithmic Foundations of Differential
Privacy", Dwork and Roth 2014) on each release of each token. A text is released in every epoch of every round, and
what is revealed adds up; so a small σ hides little, and this is no guarantee for a whole run.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from .lab import Lab, Site
from .split_settings import SplitSettings


def protected(split: SplitSettings, lab: Lab, site: Site, step: int, h_ND: Tensor) -> Tensor:
    """The activations as they leave, [N, D]; gradients go back through the clipping, and straight through the noise."""
    if split.clip is None:
        return h_ND
    kept_ND = clipped(h_ND, split.clip)
    if not split.noise:
        return kept_ND
    return kept_ND + split.noise * split.clip * normal(kept_ND, lab.seed, site.round, step, site.name, site.secret)


def clipped(h_ND: Tensor, most: float) -> Tensor:
    """Each row scaled down to a norm of at most `most`."""
    norms_N = torch.linalg.vector_norm(h_ND, dim=1, keepdim=True)
    return h_ND * (most / norms_N.clamp(min=most))


def normal(like_ND: Tensor, seed: int, round: int, step: int, site: str, secret: bytes) -> Tensor:
    """Standard normal numbers, a pure function of these words: a resumed run draws the same.

    The server knows all of them but `secret`, which a real site draws for itself; in a simulation it is empty.
    """
    words = b"|".join([str((seed, round, step)).encode(), site.encode(), secret])
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(words).digest()[:8], "little") >> 1)
    return torch.randn(like_ND.shape, generator=generator, dtype=torch.float64).to(like_ND)
