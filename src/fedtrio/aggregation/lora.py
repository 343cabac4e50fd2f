"""The algebra of low-rank products B·A, which are never multiplied out.

LoRA (arXiv:2106.09685) changes a weight by s·B·A with A [r, i], B [o, r] and the scale s = lora_alpha / r. PEFT keeps
these shapes for every kind of layer; only the layer's own weight may lie the other way round (see `merged`). A
weighted sum of products is one product of larger rank (`stacked`), and what one wants to know of it, its norm or its
SVD, is found in the small core between two QR factorizations. All of it is computed in fp64.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, MessageError
from .adapters import normalised

Adapter = Mapping[str, Tensor]
Factor = Literal["A", "B"]

_LORA = re.compile(r"(?P<layer>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(?P<end>(\..+)?)")


class Pair(NamedTuple):
    """The names of a layer's two LoRA tensors."""

    a: str
    b: str


class Product(NamedTuple):
    """B·A as its factors: b [o, r], a [r, i]."""

    b: Tensor
    a: Tensor


class Svd(NamedTuple):
    """U·diag(σ)·Vᵀ with q values in falling order: u [o, q], s [q], v [q, i]."""

    u: Tensor
    s: Tensor
    v: Tensor


# Names ----------------------------------------------------------------------------------------------------------------


def factor_of(name: str) -> Factor | None:
    """Which factor a tensor is, told by its name alone; None for the head and all else that trains whole.

    Shapes can't tell: a layer may be as wide as the rank.
    """
    match = _LORA.fullmatch(name)
    return None if match is None else "A" if match["factor"] == "A" else "B"


def pairs(adapter: Iterable[str]) -> dict[str, Pair]:
    """The LoRA tensors by layer, in sorted order. Raises MessageError where a factor is without the other."""
    names, found = set(adapter), {}
    for name in sorted(names):
        if (match := _LORA.fullmatch(name)) is None:
            continue
        layer, kind, end = match["layer"], match["embedding"] or "", match["end"]
        pair = Pair(f"{layer}.lora_{kind}A{end}", f"{layer}.lora_{kind}B{end}")
        if found.setdefault(layer, pair) != pair:
            raise MessageError(f"{layer} has two adapters, {found[layer].a} and {pair.a}; one is expected")
        if not names.issuperset(pair):
            raise MessageError(f"{name} came without {pair.b if name == pair.a else pair.a}")
    return found


def core_name(pair: Pair) -> str:
    """The name of a small core R [r, r] between the factors of a pair: `….lora_R.default.weight`."""
    match = _LORA.fullmatch(pair.a)
    assert match is not None
    return f"{match['layer']}.lora_R{match['end']}"


def travelling(adapter: Adapter, factor: Factor) -> dict[str, Tensor]:
    """What is sent where one factor trains and the other is frozen: that factor, and all that is no LoRA."""
    return {name: tensor for name, tensor in adapter.items() if factor_of(name) in (factor, None)}


def remainder(adapter: Adapter) -> dict[str, Tensor]:
    """All that is no LoRA: the head and `modules_to_save`."""
    return {name: tensor for name, tensor in adapter.items() if factor_of(name) is None}


def check_alike(adapters: Mapping[str, Adapter], mixed_ranks: bool = False) -> None:
    """Raises MessageError unless all have the same names and shapes, ConfigError where only the ranks differ.

    With `mixed_ranks` the ranks may differ from site to site.
    """
    first = min(adapters)
    for site in sorted(adapters):
        if missing := adapters[first].keys() ^ adapters[site].keys():
            raise MessageError(f"{site} and {first} differ in {len(missing)} tensors, such as {min(missing)}")
        for name, tensor in adapters[site].items():
            mine, theirs = list(tensor.shape), list(adapters[first][name].shape)
            if _free(name, mine) != _free(name, theirs):
                raise MessageError(f"{site} sent {name} as {mine}, {first} as {theirs}")
            if mine != theirs and not mixed_ranks:
                raise ConfigError(
                    f"{site} sent {name} as {mine}, {first} as {theirs}; "
                    "only flora, flexlora, hetlora and fedsb can mix ranks"
                )


def _free(name: str, shape: list[int]) -> list[int]:
    """A shape without its rank."""
    factor = factor_of(name)
    return shape if factor is None else shape[1:] if factor == "A" else shape[:-1]


# Products -------------------------------------------------------------------------------------------------------------


def product(adapter: Adapter, pair: Pair, scale: float = 1.0) -> Product:
    """(s·B)·A of one layer."""
    return Product(scale * adapter[pair.b].double(), adapter[pair.a].double())


def stacked(terms: Iterable[tuple[float, Product]]) -> Product:
    """Σ_k w_k B_k A_k = [B_1 … B_K]·[w_1 A_1; …; w_K A_K], of rank Σ r_k."""
    terms = list(terms)
    return Product(torch.cat([p.b for _, p in terms], 1), torch.cat([w * p.a for w, p in terms]))


def mean_product(
    adapters: Mapping[str, Adapter], pair: Pair, weights: Mapping[str, float], scales: Mapping[str, float]
) -> Product:
    """Σ_k p_k s_k B_k A_k of one layer, exact, with the ranks side by side; the sites in sorted order."""
    return stacked((p, product(adapters[site], pair, scales[site])) for site, p in normalised(weights).items())


def mean_factors(
    adapters: Mapping[str, Adapter], pair: Pair, weights: Mapping[str, float], scales: Mapping[str, float]
) -> Product:
    """(Σ_k p_k s_k B_k)·(Σ_k p_k A_k) of one layer, what averaging the factors makes of it.

    Smaller ranks are padded with zeros.
    """
    p = normalised(weights)
    rank = max(adapters[site][pair.a].shape[0] for site in p)
    each = {site: of_rank(product(adapters[site], pair, scales[site]), rank) for site in p}
    b = torch.stack([p[site] * each[site].b for site in p]).sum(0)
    return Product(b, torch.stack([p[site] * each[site].a for site in p]).sum(0))


def of_rank(product: Product, rank: int, beyond: Product | None = None) -> Product:
    """The first `rank` components; where there are fewer, then those of `beyond` at these places, or zeros."""
    b, a = product.b[:, :rank], product.a[:rank]
    have = a.shape[0]
    if have < rank and beyond is not None:
        b = torch.cat([b, beyond.b[:, have:rank].to(b)], 1)
        a = torch.cat([a, beyond.a[have:rank].to(a)])
    missing = rank - a.shape[0]
    if missing:
        b = torch.cat([b, b.new_zeros(b.shape[0], missing)], 1)
        a = torch.cat([a, a.new_zeros(missing, a.shape[1])])
    return Product(b, a)


# Norm and SVD, by the core --------------------------------------------------------------------------------------------


def norm(product: Product) -> float:
    """‖B·A‖_F. By QR, since Gram matrices would find 1e-8 where the truth is 0."""
    r_b = torch.linalg.qr(product.b, mode="r").R
    r_a = torch.linalg.qr(product.a.T, mode="r").R
    return float(torch.linalg.matrix_norm(r_b @ r_a.T))


def svd(product: Product) -> Svd:
    """The SVD of B·A: B = Q_B R_B and Aᵀ = Q_A R_A, and then that of the small core R_B R_Aᵀ.

    An SVD leaves signs open; here the largest entry of each right vector is positive.
    """
    q_b, r_b = torch.linalg.qr(product.b)
    q_a, r_a = torch.linalg.qr(product.a.T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    u, v = q_b @ u, v @ q_a.T
    sign = row_signs(v)
    return Svd(u * sign.T, s, v * sign)


def row_signs(v: Tensor) -> Tensor:
    """[q, 1] of ±1, by which each row's entry of greatest magnitude becomes positive."""
    return torch.where(v.gather(1, v.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0).to(v)


def truncated(product: Product, rank: int | None = None, energy: float | None = None) -> Product:
    """The nearest product of a smaller rank, (UΣ)·Vᵀ (Eckart and Young); of the smaller of both where both are given.

    `energy` τ takes the least rank with Σ_{j≤r} σ_j² ≥ τ Σ σ_j² ("FLoRIST", arXiv:2506.09199).
    """
    u, s, v = svd(product)
    keep = len(s) if rank is None else rank
    if energy is not None:
        tail = s.square().flip(0).cumsum(0).flip(0)  # tail[r] is what the first r leave behind, summed from the small
        keep = min(keep, max(1, int((tail > (1 - energy) * tail[0]).sum())))
    return Product(u[:, :keep] * s[:keep], v[:keep])


def product_norm(adapter: Adapter, scale: float = 1.0) -> float:
    """‖s·B·A‖_F over all layers together."""
    return math.hypot(*(norm(product(adapter, pair, scale)) for pair in pairs(adapter).values()))


def aggregation_error(
    adapters: Mapping[str, Adapter],
    weights: Mapping[str, float],
    scales: Mapping[str, float],
    result: Adapter | None = None,
    scale: float = 1.0,
) -> float:
    """‖Σ p_k s_k B_k A_k − got‖_F / ‖Σ p_k s_k B_k A_k‖_F over all layers; 0 where the denominator is.

    `got` is s·B·A of the `result` at its `scale`, or without it the product of the averaged factors (FedIT).
    """
    check_alike(adapters, mixed_ranks=True)
    errors, norms = [0.0], [0.0]
    for pair in pairs(adapters[min(adapters)]).values():
        exact = mean_product(adapters, pair, weights, scales)
        got = mean_factors(adapters, pair, weights, scales) if result is None else product(result, pair, scale)
        errors.append(norm(stacked([(1.0, exact), (-1.0, got)])))
        norms.append(norm(exact))
    whole = math.hypot(*norms)
    return math.hypot(*errors) / whole if whole > 0 else 0.0


# Adapters -------------------------------------------------------------------------------------------------------------


def placed(products: Mapping[str, Product], like: Adapter) -> dict[str, Tensor]:
    """Products by layer as LoRA tensors, with the names and dtypes of an adapter; of their own storage."""
    found = {}
    for layer, pair in pairs(like).items():
        if layer in products:
            found[pair.a] = _own(products[layer].a.to(like[pair.a]))
            found[pair.b] = _own(products[layer].b.to(like[pair.b]))
    return found


def at_scale(adapter: Adapter, have: float, want: float) -> dict[str, Tensor]:
    """The same change of the weights under another scale: B·have/want. A is never touched, so it can be shared."""
    return {name: t * (have / want) if factor_of(name) == "B" else t for name, t in adapter.items()}


def resized(adapter: Adapter, rank: int, beyond: Adapter | None = None) -> dict[str, Tensor]:
    """Every pair at that rank: components beyond it are cut off, and those it lacks are taken from `beyond`, or zero.

    A component that is zero in both factors never trains again, as each one's gradient has the other as a factor.
    So a site that grows passes its first adapter as `beyond`: B is zero there and A is not.
    """
    found = {name: _own(tensor) for name, tensor in remainder(adapter).items()}
    for pair in pairs(adapter).values():
        more = None if beyond is None else Product(beyond[pair.b], beyond[pair.a])
        b, a = of_rank(Product(adapter[pair.b], adapter[pair.a]), rank, more)
        found |= {pair.a: _own(a), pair.b: _own(b)}
    return found


def fresh(adapter: Adapter, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """The adapter with a new A, drawn as PEFT draws it (uniform within ±1/√i), and B = 0: it changes no weight."""
    found = {name: _own(tensor) for name, tensor in adapter.items()}
    for pair in pairs(adapter).values():
        a, b = adapter[pair.a], adapter[pair.b]
        drawn = torch.rand(a.shape, generator=generator, dtype=torch.float64)
        found |= {pair.a: ((2 * drawn - 1) / math.sqrt(a.shape[1])).to(a), pair.b: torch.zeros_like(b)}
    return found


def merged(weight: Tensor, product: Product, transposed: bool = False) -> Tensor:
    """W + B·A, the only place where the product is multiplied out, in the dtype of W.

    `transposed` where the layer keeps its weight as [i, o], as GPT-2's `Conv1D` (PEFT's `fan_in_fan_out`) and an
    embedding do. It must be told: the shape of a square weight doesn't show it.
    """
    delta = product.b.double() @ product.a.double()
    return (weight.double() + (delta.T if transposed else delta)).to(weight.dtype)


def _own(tensor: Tensor) -> Tensor:
    """A contiguous copy: no two adapters share storage."""
    return tensor.clone(memory_format=torch.contiguous_format)
