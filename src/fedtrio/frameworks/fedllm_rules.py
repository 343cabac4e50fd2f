"""How each aggregation of adapters works in a round: what travels, what trains, and what the server makes of it.

A rule is used by both sides. At the server `share` says what each site is sent and `aggregate` what its answers become;
at a site `start` says what trains and what the model runs with. The mathematics is in `aggregation.rules`. There is one
scale, the server's; an adapter of another rank crosses in the scale of that rank, which only B shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..aggregation import rules
from ..aggregation.lora import at_scale, factor_of, pairs, resized, travelling
from ..message import Message, Reply
from ..models.train import Adapter
from .fedllm_merged import (
    remembered,
    up_to_date,
)
from .lab import Lab, Outbox, Site, State

Adapters = Mapping[str, Adapter]
Numbers = Mapping[str, float]


@dataclass(frozen=True)
class Start:
    """What a site trains, and what its model runs with while it does: `runs(trained)`."""

    trained: Adapter
    runs: Callable[[Adapter], dict[str, Tensor]] = dict


@dataclass(frozen=True)
class Result:
    """What stands for Σ p_k s_k B_k A_k after a round: an adapter and its scale."""

    adapter: Adapter
    scale: float


class Rule:
    """FedAvg of all that trains; the other rules say where they differ.

    `linear`: what is sent takes, averaged, the place of its namesake in `state["adapter"]`, so that any other mean and
    any server optimizer can stand in. `merges`: changes of the base are sent too, once. `anew`: sites start from a new
    adapter in each round. `turns`: coordinates change from round to round, so that no moment holds on. `remembers`:
    sites keep what they were sent, and those who missed something are sent the whole.
    """

    mixed_ranks: ClassVar[bool] = False
    linear: ClassVar[bool] = True
    merges: ClassVar[bool] = False
    anew: ClassVar[bool] = False
    turns: ClassVar[bool] = False
    remembers: ClassVar[bool] = False

    def setup(self, lab: Lab) -> State:
        """The server's state before the first round."""
        return {"adapter": lab.initial}

    def share(self, lab: Lab, state: State, cohort: Sequence[str]) -> Outbox:
        """What each site is sent."""
        return dict.fromkeys(cohort, Message("adapter", self.sends(lab, state["adapter"], lab.round)))

    def start(self, lab: Lab, site: Site, first: Reply) -> Start:
        """What a site makes of it."""
        return Start(first.tensors)

    def sends(self, lab: Lab, trained: Adapter, round: int) -> dict[str, Tensor]:
        """The part of what trained that is sent back."""
        return dict(trained)

    def expected(self, lab: Lab, sent: Message) -> Adapter:
        """Names, shapes and sizes of an answer."""
        return sent.tensors

    def aggregate(self, lab: Lab, state: State, sent: Adapters, weights: Numbers) -> Result:
        """Put together what was sent, where that is not linear; changes the state."""
        raise NotImplementedError

    def full(self, lab: Lab, common: Adapter, sent: Adapter) -> Adapter | None:
        """A and B of all layers, with what one site sent in its place; None where no one holds the whole."""
        return {**common, **sent}

    def scale(self, lab: Lab, site: str) -> float:
        """The scale of what a site sends."""
        return lab.scale(site)

    def adapter(self, lab: Lab, state: State) -> Adapter:
        """What the model runs with."""
        return state["adapter"]

    def shipped(self, lab: Lab, state: State) -> Adapter:
        """The same as LoRA and head alone."""
        return self.adapter(lab, state)


class FedAvg(Rule):
    """FedIT (arXiv:2305.05644): A, B and head are averaged."""


# One factor at a time -------------------------------------------------------------------------------------------------


class FFA(Rule):
    """FFA-LoRA (arXiv:2403.12313): A stays as all were born with it, and never travels."""

    def start(self, lab: Lab, site: Site, first: Reply) -> Start:
        """B and head train."""
        return _beside(lab, travelling(lab.initial, "A"), first.tensors)

    def sends(self, lab: Lab, trained: Adapter, round: int) -> dict[str, Tensor]:
        """B and head."""
        return travelling(trained, "B")


class RoLoRA(Rule):
    """RoLoRA (arXiv:2502.01755): B in odd rounds, A in even ones. Down goes the factor that moved last."""

    remembers = True

    def share(self, lab: Lab, state: State, cohort: Sequence[str]) -> Outbox:
        """The news, or the whole adapter to those who missed some."""
        news = Message("adapter", self.sends(lab, state["adapter"], lab.round - 1), {"after": lab.round - 1})
        whole = Message("adapter", state["adapter"])
        return {site: news if up_to_date(lab, state, site) else whole for site in cohort}

    def start(self, lab: Lab, site: Site, first: Reply) -> Start:
        """One factor and the head train."""
        held = remembered(site, first, "common") or lab.initial
        common = site.memory["common"] = {**held, **first.tensors}
        return _beside(lab, common, self.sends(lab, common, site.round))

    def sends(self, lab: Lab, trained: Adapter, round: int) -> dict[str, Tensor]:
        """The factor of that round, and the head."""
        return travelling(trained, rules.rolora_factor(round))

    def expected(self, lab: Lab, sent: Message) -> Adapter:
        """As `initial` has it."""
        return self.sends(lab, lab.initial, lab.round)


class FedSVD(Rule):
    """FedSVD (arXiv:2505.12805): FFA whose A the server turns to an orthonormal one with the same product."""

    linear, turns = False, True

    def share(self, lab: Lab, state: State, cohort: Sequence[str]) -> Outbox:
        """All of it, as A changes too."""
        return dict.fromkeys(cohort, Message("adapter", state["adapter"]))

    def start(self, lab: Lab, site: Site, first: Reply) -> Start:
        """B and head train."""
        return _beside(lab, first.tensors, travelling(first.tensors, "B"))

    def sends(self, lab: Lab, trained: Adapter, round: int) -> dict[str, Tensor]:
        """B and head."""
        return travelling(trained, "B")

    def expected(self, lab: Lab, sent: Message) -> Adapter:
        """B and head."""
        return travelling(sent.tensors, "B")

    def aggregate(self, lab: Lab, state: State, sent: Adapters, weights: Numbers) -> Result:
        """B̄·A = UΣVᵀ."""
        common, like = state["adapter"], sent[min(sent)]
        held = {name: t for name, t in common.items() if factor_of(name) or name in like}  # heads may stay at the sites
        state["adapter"] = {**common, **rules.fedsvd(held, sent, weights)}
        return Result(state["adapter"], lab.model.scale())


class FedSA(Rule):
    """FedSA-LoRA (arXiv:2410.01463): A and head are shared, each site keeps its own B."""

    def start(self, lab: Lab, site: Site, first: Reply) -> Start:
        """All of it trains."""
        own = site.memory.get("own", lab.initial)
        return Start({**lab.initial, **travelling(own, "B"), **first.tensors})

    def sends(self, lab: Lab, trained: Adapter, round: int) -> dict[str, Tensor]:
        """A and head."""
        return travelling(trained, "A")

    def full(self, lab: Lab, common: Adapter, sent: Adapter) -> Adapter | None:
        """The server knows no B."""
        return None


class FedSB(Rule):
    """Fed-SB (arXiv:2502.15436): a core R between frozen factors, which all draw from the seed."""

    mixed_ranks = True

    def setup(self, lab: Lab) -> State:
        """R = 0. Raises ConfigError where the rank is too large for a layer."""
        return {"adapter": rules.fedsb_start(lab.initial, generator(lab, 0))[1]}

    def share(self, lab: Lab, state: State, cohort: Sequence[str]) -> Outbox:
        """The upper left of R, as large as the site's rank."""
        return _by_rank(lab, cohort, lambda rank: Message("adapter", _corner(state["adapter"], rank)))

    def start(self, lab: Lab, site: Site, first: Reply) -> Start:
        """R and head train."""
        frozen = on_device(lab, self.frozen(lab))
        return Start(first.tensors, lambda trained: rules.fedsb_adapter(frozen, trained))

    def aggregate(self, lab: Lab, state: State, sent: Adapters, weights: Numbers) -> Result:
        """The mean of cores padded to the server's rank."""
        state["adapter"] = rules.fedsb(sent, weights, lab.model.rank)
        return Result(self.adapter(lab, state), lab.model.scale())

    def full(self, lab: Lab, common: Adapter, sent: Adapter) -> Adapter | None:
        """B and R·A."""
        return rules.fedsb_adapter(self.frozen(lab), {n: t.to(common[n].dtype) for n, t in sent.items()})

    def scale(self, lab: Lab, site: str) -> float:
        """R of any rank stands in the same W + s·B·R·A."""
        return lab.model.scale()

    def adapter(self, lab: Lab, state: State) -> Adapter:
        """B and R·A."""
        return rules.fedsb_adapter(self.frozen(lab), state["adapter"])

    def frozen(self, lab: Lab) -> Adapter:
        """Orthonormal B and A, a function of the seed."""
        return rules.fedsb_start(lab.initial, generator(lab, 0))[0]


# Ranks that differ ----------------------------------------------------------------------------------------------------


class FlexLoRA(Rule):
    """FlexLoRA (arXiv:2402.11505): the SVD of the mean of the products; each site takes the first of it."""

    mixed_ranks, linear, turns = True, False, True

    def share(self, lab: Lab, state: State, cohort: Sequence[str]) -> Outbox:
        """The components that a site has the rank for."""
        return _by_rank(lab, cohort, lambda rank: Message("adapter", at_rank(lab, state["adapter"], rank)))

    def start(self, lab: Lab, site: Site, first: Reply) -> Start:
        """All of it trains, in the scale of its rank."""
        return Start(first.tensors, own_scale(lab, first.tensors))

    def aggregate(self, lab: Lab, state: State, sent: Adapters, weights: Numbers) -> Result:
        """Components beyond the rank of what was sent get an A that can train."""
        scale, rank = lab.model.scale(), lab.model.rank
        scales = {site: lab.scale(site) for site in sent}
        found = rules.flexlora(sent, weights, scales, scale, rank)
        state["adapter"] = {**state["adapter"], **resized(found, rank, silent(lab.initial))}
        return Result(found, scale)


class HetLoRA(FlexLoRA):
    """HetLoRA (arXiv:2401.06432): padded with zeros, and weighted by ‖s_k B_k A_k‖; without its self-pruning."""

    turns = False

    def aggregate(self, lab: Lab, state: State, sent: Adapters, weights: Numbers) -> Result:
        """In the server's scale."""
        scale = lab.model.scale()
        alike = {site: _rescaled(adapter, lab.scale(site), scale) for site, adapter in sent.items()}
        norms = rules.norm_weights(alike, dict.fromkeys(alike, scale))
        found = rules.hetlora(alike, norms, lab.model.rank, state["adapter"])
        state["adapter"] = {**state["adapter"], **found}
        return Result(found, scale)


AVERAGING: dict[str, Rule] = {
    "fedavg": FedAvg(), "ffa": FFA(), "rolora": RoLoRA(), "fedsvd": FedSVD(), "fedsa": FedSA(), "fedsb": FedSB(),
    "flexlora": FlexLoRA(), "hetlora": HetLoRA(),
}  # fmt: skip


# Small things ---------------------------------------------------------------------------------------------------------


def at_rank(lab: Lab, adapter: Adapter, rank: int) -> dict[str, Tensor]:
    """The first components of an adapter in the scale of that rank; the same tensors at the server's."""
    if rank == lab.model.rank:
        return dict(adapter)
    return at_scale(resized(adapter, rank), lab.model.scale(), lab.model.scale(rank))


def _beside(lab: Lab, frozen: Adapter, trained: Adapter) -> Start:
    held = on_device(lab, frozen)
    return Start(trained, lambda now: {**held, **now})


def on_device(lab: Lab, tensors: Adapter) -> dict[str, Tensor]:
    """Tensors where the model is."""
    return {name: lab.to_device(tensor) for name, tensor in tensors.items()}


def _by_rank(lab: Lab, cohort: Sequence[str], message: Callable[[int], Message]) -> Outbox:
    """One message for all sites of a rank."""
    made = {rank: message(rank) for rank in sorted({lab.rank(site) for site in cohort})}
    return {site: made[lab.rank(site)] for site in cohort}


def _rescaled(adapter: Adapter, have: float, want: float) -> Adapter:
    return adapter if have == want else at_scale(adapter, have, want)


def own_scale(lab: Lab, adapter: Adapter) -> Callable[[Adapter], dict[str, Tensor]]:
    """What the model, which knows the server's scale alone, runs with for an adapter of this one's rank."""
    rank = next((adapter[pair.a].shape[0] for pair in pairs(adapter).values()), lab.model.rank)
    have, want = lab.model.scale(rank), lab.model.scale()
    return lambda trained: dict(_rescaled(trained, have, want))


def _corner(cores: Adapter, rank: int) -> dict[str, Tensor]:
    return {name: core[:rank, :rank].contiguous() if ".lora_R" in name else core for name, core in cores.items()}


def silent(adapter: Adapter) -> dict[str, Tensor]:
    """The same with B = 0: it changes no weight, and can train."""
    zeros = {pair.b: torch.zeros_like(adapter[pair.b]) for pair in pairs(adapter).values()}
    return {**adapter, **zeros}


def generator(lab: Lab, round: int) -> torch.Generator:
    """What all sides draw alike in a round."""
    return torch.Generator().manual_seed(lab.seed_of(round, "factors", 0))
