"""Changes of the frozen base, in which some aggregations leave what a common adapter can't hold.

A change is, for each layer, two factors or, where that is smaller, the one matrix [o, i] itself, always as B·A would
have it, whichever way round the layer keeps its weight. It is kept in the adapter's dtype beside the base and never
added to it: a bf16 base would lose small changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from urllib.parse import quote

import torch
from torch import Tensor

from ..aggregation.lora import Pair, Product, of_rank, pairs, placed, product, stacked, svd
from ..errors import MessageError
from ..message import Reply
from ..models.adapter import AdaptedModel
from ..models.train import Adapter
from .lab import Lab, Site, State

PREFIX = "residual."


def prefixed(change: Adapter) -> dict[str, Tensor]:
    """As it stands in a message, beside an adapter with the same names."""
    return {PREFIX + name: tensor for name, tensor in change.items()}


def unprefixed(tensors: Adapter) -> dict[str, Tensor]:
    """The change that a message holds."""
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}


def as_tensors(products: Mapping[str, Product], like: Adapter) -> dict[str, Tensor]:
    """Products by layer, each in the smaller of its two forms."""
    found: dict[str, Tensor] = {}
    for layer, (b, a) in products.items():
        if a.shape[0] * (b.shape[0] + a.shape[1]) < b.shape[0] * a.shape[1]:
            found |= placed({layer: Product(b, a)}, like)
        else:
            found[_dense_name(layer)] = (b.double() @ a.double()).to(like[pairs(like)[layer].a])
    return found


def added(change: Adapter, more: Adapter, like: Adapter) -> dict[str, Tensor]:
    """The sum of two changes. Factors are set side by side, so nothing is rounded until they outgrow the matrix."""
    found: dict[str, Tensor] = {}
    for layer, pair in pairs(like).items():
        terms = [term for term in (change, more) if pair.a in term or _dense_name(layer) in term]
        if any(_dense_name(layer) in term for term in terms):
            total = torch.stack([_dense(term, layer, pair) for term in terms]).sum(0)
            found[_dense_name(layer)] = total.to(like[pair.a])
        elif terms:
            found |= as_tensors({layer: stacked((1.0, product(term, pair)) for term in terms)}, like)
    return found


def merged_weights(model: AdaptedModel, change: Adapter) -> dict[str, Tensor]:
    """The weights of the layers that a change touches, W + ΔW, by the names of the model's parameters."""
    found: dict[str, Tensor] = {}
    for layer, pair in pairs(model.initial).items():
        if pair.a in change or _dense_name(layer) in change:
            name, weight, turned = model.base_weight(layer)
            delta = _dense(change, layer, pair)
            delta = delta.to(weight.device)
            found[name] = (weight.double() + (delta.T if turned else delta)).to(model.dtype)
    return found


def combined_adapter(change: Adapter, like: Adapter) -> dict[str, Tensor]:
    """A change as LoRA factors of one rank and scale 1, the least that lose nothing but rounding errors."""
    products: dict[str, Product] = {}
    for layer, pair in pairs(like).items():
        if _dense_name(layer) in change or pair.a in change:
            products[layer] = _shortest(change, layer, pair)
    rank = max((p.a.shape[0] for p in products.values()), default=1)
    return placed({layer: of_rank(p, rank) for layer, p in products.items()}, like)


def _shortest(change: Adapter, layer: str, pair: Pair) -> Product:
    if _dense_name(layer) in change:
        u, s, v = torch.linalg.svd(change[_dense_name(layer)].double(), full_matrices=False)
    else:
        u, s, v = svd(product(change, pair))
    keep = max(1, int((s > 4 * torch.finfo(change[min(change)].dtype).eps * s[0]).sum()))
    return Product(u[:, :keep] * s[:keep], v[:keep])


def _dense(change: Adapter, layer: str, pair: Pair) -> Tensor:
    if _dense_name(layer) in change:
        return change[_dense_name(layer)].double()
    b, a = product(change, pair)
    return b @ a


def _dense_name(layer: str) -> str:
    return f"{layer}.base_layer.weight"


# Who has missed nothing -----------------------------------------------------------------------------------------------

# Where sites remember what they were sent, they are sent only what is new. The server notes the last round that each
# site ended, and a site the last round that it began.


def up_to_date(lab: Lab, state: State, site: str) -> bool:
    """Whether a site ended the last round; before the first, all did."""
    seen = state.get("seen", {}).get(quote(site, safe=""))
    return int(seen if seen is not None else 0) == lab.round - 1


def note_ended(lab: Lab, state: State, sites: Iterable[str]) -> None:
    """These sites have ended the round."""
    state["seen"] = {**state.get("seen", {}), **{quote(s, safe=""): torch.tensor(lab.round) for s in sites}}


def remembered(site: Site, first: Reply, group: str) -> Adapter | None:
    """What a site holds of earlier rounds, None where it is sent the whole. Raises MessageError where it is lost."""
    before, site.memory["began"] = site.memory.get("began", {}), {"round": torch.tensor(site.round)}
    if "after" not in first.facts:
        return None
    if int(before.get("round", 0)) != first.fact("after"):
        raise MessageError(
            f"{site.name} is taken for up to date after round {first.fact('after')}, but has forgotten what it was "
            "sent; bring its folder back or start a new run"
        )
    return site.memory.get(group, {})
