"""Aggregations whose result a common adapter can't hold: the rest is merged into the base, at all sides."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..aggregation import rules
from ..aggregation.lora import at_scale, fresh, pairs, placed, product, remainder, stacked
from ..message import Message, Reply
from ..models.train import Adapter
from .fedllm_merged import (
    adapter_of,
    added,
    as_tensors,
    combined_adapter,
    merged_weights,
    prefixed,
    remembered,
    unprefixed,
    up_to_date,
)
from .fedllm_rules import Adapters, Numbers, Result, Rule, Start, at_rank, generator, on_device, own_scale, silent
from .lab import Lab, Outbox, Site, State


class FedEx(Rule):
    """FedEx-LoRA (arXiv:2410.09432): what averaging the factors loses is merged into the base."""

    linear, merges, remembers = False, True, True

    def setup(self, lab: Lab) -> State:
        """Nothing is merged yet."""
        return {"adapter": lab.initial, "residual": {}, "merged": {}}

    def share(self, lab: Lab, state: State, cohort: Sequence[str]) -> Outbox:
        """The adapter, and the last residual, or all of them to those who missed some."""
        common = self.common(state["adapter"])

        def message(rank: int, up: bool) -> Message:
            facts = {"rank": rank} if self.mixed_ranks else {}
            if not up:
                return Message("adapter", {**common, **prefixed(state["merged"])}, facts)
            return Message("adapter", {**common, **prefixed(state["residual"])}, facts | {"after": lab.round - 1})

        keys = {site: (lab.rank(site), up_to_date(lab, state, site)) for site in cohort}
        made = {key: message(*key) for key in sorted(set(keys.values()))}
        return {site: made[key] for site, key in keys.items()}

    def start(self, lab: Lab, site: Site, first: Reply) -> Start:
        """Merge, then train the adapter."""
        held = remembered(site, first, "merged") or {}
        merged = site.memory["merged"] = added(held, unprefixed(first.tensors), lab.initial)
        adapter = self.begin(lab, site, first, adapter_of(first))
        base, runs = on_device(lab, merged_weights(lab.model, merged)), own_scale(lab, adapter)
        return Start(adapter, lambda trained: {**base, **runs(trained)})

    def common(self, adapter: Adapter) -> Adapter:
        """What all are sent of the adapter."""
        return adapter

    def begin(self, lab: Lab, site: Site, first: Reply, common: Adapter) -> Adapter:
        """What trains."""
        return common

    def expected(self, lab: Lab, sent: Message) -> Adapter:
        """The adapter."""
        return adapter_of(sent)

    def aggregate(self, lab: Lab, state: State, sent: Adapters, weights: Numbers) -> Result:
        """FedAvg and its residual."""
        scale, like = lab.model.scale(), lab.initial
        mean, residual = rules.fedex(sent, weights, scale)
        state["adapter"] = {**state["adapter"], **mean}
        self.take(lab, state, residual)
        if not residual:
            return Result(mean, scale)
        both = {
            layer: stacked([(1.0, product(mean, pair, scale)), (1.0, product(residual, pair))])
            for layer, pair in pairs(like).items()
        }
        return Result({**mean, **placed(both, like)}, 1.0)

    def take(self, lab: Lab, state: State, residual: Adapter) -> None:
        """Merge a change of the base, given as factors whose scale is 1."""
        like = lab.initial
        state["residual"] = as_tensors({n: product(residual, p) for n, p in pairs(residual).items()}, like)
        state["merged"] = added(state["merged"], state["residual"], like)

    def adapter(self, lab: Lab, state: State) -> Adapter:
        """With the base as it is by now."""
        return {**state["adapter"], **merged_weights(lab.model, state["merged"])}

    def shipped(self, lab: Lab, state: State) -> Adapter:
        """All that was merged, and the adapter, as one adapter of a larger rank."""
        like, scale = lab.initial, lab.model.scale()
        own = {layer: product(state["adapter"], pair, scale) for layer, pair in pairs(like).items()}
        whole = combined_adapter(added(state["merged"], as_tensors(own, like), like), like)
        return {**remainder(state["adapter"]), **at_scale(whole, 1.0, scale)}


class FLoRA(FedEx):
    """FLoRA (arXiv:2409.05976): the stack of all adapters is merged, and all start again from a new one."""

    mixed_ranks, anew, turns = True, True, True

    def common(self, adapter: Adapter) -> Adapter:
        """The head; adapters are drawn from the seed."""
        return remainder(adapter)

    def begin(self, lab: Lab, site: Site, first: Reply, common: Adapter) -> Adapter:
        """A new adapter of the site's rank."""
        return {**self.fresh(lab, int(first.fact("rank")), site.round), **common}

    def fresh(self, lab: Lab, rank: int, round: int) -> dict[str, Tensor]:
        """The adapter that all start a round from: in the first the common one, later A drawn from the seed, B = 0."""
        start = lab.initial if round == 1 else fresh(lab.initial, generator(lab, round))
        return at_rank(lab, start, rank)

    def expected(self, lab: Lab, sent: Message) -> Adapter:
        """An adapter of the site's rank."""
        return at_rank(lab, lab.initial, int(sent.fact("rank")))

    def aggregate(self, lab: Lab, state: State, sent: Adapters, weights: Numbers) -> Result:
        """Stack, merge, and forget the factors."""
        stack = rules.flora(sent, weights, {site: lab.scale(site) for site in sent})
        state["adapter"] = {**silent(state["adapter"]), **remainder(stack)}
        self.take(lab, state, stack)
        return Result(stack, 1.0)


MERGING: dict[str, Rule] = {"flora": FLoRA(), "fedex": FedEx()}
