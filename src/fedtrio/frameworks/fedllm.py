"""FedLLM: sites train adapters on their own data and send them; the server puts them together.

"Communication-Efficient Learning of Deep Networks from Decentralized Data" (FedAvg, arXiv:1602.05629) on the LoRA
tensors and the head, as in "Towards Building the Federated GPT" (FedIT, arXiv:2305.05644). Other aggregations
are in `fedllm_rules` and `fedllm_merging`, what else a site may do in `fedllm_client`, a server in `fedllm_server`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..aggregation.lora import aggregation_error, remainder
from ..aggregation.sites import common_control
from ..errors import ConfigError, QuorumError
from ..message import Message, Reply
from ..models.train import Adapter
from .fedllm_client import CONTROL, Client, mean_gradient, split_control, with_control
from .fedllm_merged import note_ended
from .fedllm_merging import MERGING
from .fedllm_rules import AVERAGING, Rule
from .fedllm_seeds import Seeds
from .fedllm_server import OWN, OwnRule, Server, own_rule
from .lab import ClientProgram, Inbox, Lab, Outbox, ServerProgram, Site, State, weights_of

RULES = AVERAGING | MERGING
KINDS = {"parameters": "adapter", "delta": "update", "gradients": "gradients"}


class FedLLM(Server, Client):
    """Federated adapters. A site sends what it learnt and how many examples (or target tokens) it trained on."""

    aggregation: str = Field(
        default="fedavg",
        description="fedavg, ffa, flora, flexlora, fedex, rolora, hetlora, fedsb, fedsvd, fedsa, or your own rule as "
        "file.py:function or module:function",
    )
    upload: Literal["parameters", "delta", "gradients", "seeds"] = Field(
        default="parameters",
        description="what sites send: the adapter, its change, the mean gradient at what they were sent (FedSGD), or "
        "seeds and scalars (FedKSeed)",
    )
    local_heads: bool = Field(default=False, description="head and modules_to_save stay at each site: no common model")
    candidate_seeds: int = Field(default=4096, ge=1, le=2**31 - 1, description="of FedKSeed")
    epsilon: float = Field(default=5e-4, gt=0, description="distance of FedKSeed's central differences")

    def setup(self, lab: Lab) -> State:
        """All start from the same adapter. Raises ConfigError where the aggregation can't work with its ranks."""
        if self.upload == "seeds":
            return self._seeds.setup(lab)
        state = self.rule.setup(lab)
        if self.scaffold:
            common = self.rule.sends(lab, state["adapter"], 1)
            state["control"] = {name: torch.zeros_like(tensor) for name, tensor in common.items()}
        return state

    def server(self, lab: Lab, state: State, cohort: Sequence[str]) -> ServerProgram:
        """Send each site its adapter, let them train, put together what they send."""
        if self.upload == "seeds":
            return (yield from self._seeds.server(lab, state, cohort))
        rule, common = self.rule, state["adapter"]
        outbox = self.shared(rule.share(lab, state, cohort), state)
        inbox = yield outbox
        if len(inbox) < self.needed():
            raise QuorumError(f"fedllm.robust {self.robust} needs {self.needed()} sites, and {len(inbox)} answered")
        weights, sent = weights_of(inbox), self._received(lab, outbox, inbox, common)
        if rule.linear and not lab.ranks:
            mean = self.mean(common, sent, weights, self._own)
            state |= self.step(common, mean, state, weights, lab.weights)
            stands, scale = rule.full(lab, common, mean), lab.model.scale()
        else:
            result = rule.aggregate(lab, state, sent, weights)
            stands, scale = result.adapter, result.scale
        if self.scaffold:
            state["control"] = self._common_control(lab, state["control"], inbox)
        if rule.remembers:
            note_ended(lab, state, inbox)
        if stands is not None and self.federated and self.upload != "gradients":
            full = {site: rule.full(lab, common, tensors) or {} for site, tensors in sent.items()}
            scales = {site: rule.scale(lab, site) for site in sent}
            error = aggregation_error(full, weights, scales, stands, scale)
            state["diagnostics"] = {"aggregation_error": torch.tensor(error, dtype=torch.float64)}

    def client(self, lab: Lab, site: Site, first: Reply) -> ClientProgram:
        """Train the received adapter on the site's data and send it back."""
        if self.upload == "seeds":
            return self._seeds.client(lab, site, first)
        tensors, control = split_control(first)
        start = self.rule.start(lab, site, replace(first, tensors=tensors))
        if self.local_heads:
            head = remainder(site.memory.get("own", lab.initial))
            start = replace(start, trained={**start.trained, **head})
        facts = {"weight": site.data.weight}
        if self.upload == "gradients":
            return Message("gradients", self._sent(lab, mean_gradient(lab, site, start), site.round), facts)
        after = self.trained(lab, site, start, control)
        if self.personal:
            running = start.runs(after.tensors)
            site.memory["own"] = {name: t.clone(memory_format=torch.contiguous_format) for name, t in running.items()}
        sent = self._sent(lab, after.tensors, site.round)
        if self.upload == "delta":
            sent = {name: tensor - start.trained[name].to(tensor) for name, tensor in sent.items()}
        sent |= {CONTROL + name: tensor for name, tensor in after.control.items()}
        return Message(KINDS[self.upload], sent, facts)

    def check(self, lab: Lab, site: str, sent: Message, reply: Reply) -> None:
        """What the aggregation expects for what was sent, and its weight."""
        if self.upload == "seeds":
            return self._seeds.check(lab, site, reply)
        lab.guards.kind(site, reply, KINDS[self.upload])
        tensors, control = split_control(sent)
        wanted = self.rule.expected(lab, replace(sent, tensors=tensors))
        wanted = self.kept(wanted) | {CONTROL + name: tensor for name, tensor in control.items()}
        lab.guards.like(site, reply.tensors, wanted)
        lab.guards.weight(site, reply)

    def adapter(self, lab: Lab, state: State) -> Adapter | None:
        """The common adapter; None where each site has its own."""
        return None if self.personal else self.rule.adapter(lab, state)

    def shipped(self, lab: Lab, state: State) -> Adapter | None:
        """As one LoRA adapter, also of what was merged into the base."""
        return None if self.personal else self.rule.shipped(lab, state)

    def own_adapter(self, lab: Lab, site: Site) -> Adapter | None:
        """What a site trained last, where it keeps some of it to itself; the start where it never took part."""
        return site.memory.get("own", lab.initial) if self.personal else None

    @property
    def wants_weights(self) -> bool:
        """For unbiased sums over cohorts."""
        return self.unbiased

    def check_sites(self, sites: Sequence[str], cohort: int) -> None:
        """Raises ConfigError for too few sites, and where an own rule can't be found."""
        super().check_sites(sites, cohort)
        _ = self._own

    # Small things ----------------------------------------------------------------------------------------------------

    @property
    def personal(self) -> bool:
        """Whether each site ends up with a model of its own."""
        return self.aggregation == "fedsa" or self.local_heads

    @property
    def rule(self) -> Rule:
        """How its aggregation works in a round; an own one works as fedavg."""
        return RULES.get(self.aggregation, RULES["fedavg"])

    @property
    def _own(self) -> OwnRule | None:
        """The user's rule. Only a server asks for it: a site runs no code that a server names."""
        return None if self.aggregation in RULES else own_rule(self.aggregation)

    @property
    def _seeds(self) -> Seeds:
        return Seeds(self.candidate_seeds, self.epsilon)

    def kept(self, tensors: Adapter) -> dict[str, Tensor]:
        """Without the head where that stays at the site."""
        return {name: t for name, t in tensors.items() if not self.local_heads or ".lora_" in name}

    def _sent(self, lab: Lab, trained: Adapter, round: int) -> dict[str, Tensor]:
        return self.kept(self.rule.sends(lab, trained, round))

    def shared(self, outbox: Outbox, state: State) -> Outbox:
        """Messages as this method's settings want them; sites that get the same still share one message."""
        if self.local_heads:
            made = {id(m): replace(m, tensors=self.kept(m.tensors)) for m in outbox.values()}
            outbox = {site: made[id(message)] for site, message in outbox.items()}
        return with_control(outbox, state["control"]) if self.scaffold else outbox

    def _received(self, lab: Lab, outbox: Outbox, inbox: Inbox, common: Adapter) -> dict[str, Adapter]:
        """Adapters, in whichever form they were uploaded."""
        found: dict[str, Adapter] = {}
        for site, reply in inbox.items():
            tensors, _ = split_control(reply)
            start = {**common, **outbox[site].tensors}
            if self.upload == "delta":
                tensors = {n: (start[n].double() + t.double()).to(t.dtype) for n, t in tensors.items()}
            elif self.upload == "gradients":
                rate = lab.train.rate_factor(lab.progress(lab.round, 0, 1))
                tensors = {n: start[n].double() - rate * lab.train.rate(n) * t.double() for n, t in tensors.items()}
            found[site] = tensors
        return found

    def _common_control(self, lab: Lab, common: Adapter, inbox: Inbox) -> Adapter:
        changes = {site: split_control(reply)[1] for site, reply in inbox.items()}
        return common_control(common, changes, len(lab.sites) or len(inbox))

    def refuse_mixed_ranks(self) -> None:
        """Raises ConfigError where sites can't have ranks of their own."""
        mixed = sorted(name for name, rule in RULES.items() if rule.mixed_ranks)
        if not self.rule.mixed_ranks:
            raise ConfigError(
                f"fedllm.aggregation {self.aggregation} needs one lora.r for all; {', '.join(mixed)} can mix ranks"
            )
        if self.upload not in ("parameters", "delta") or not self.plain:
            raise ConfigError(
                "with a lora.r for each site, upload is parameters or delta, and no other mean or server optimizer "
                "can stand in for the aggregation's own"
            )

    def refuse_codecs(self, up: Any, down: Any) -> None:
        """Raises ConfigError for codecs of adapters that the aggregation would be wrong with."""
        if up is not None and up.on_delta and (self.rule.anew or self.aggregation == "rolora" or self.scaffold):
            what = "scaffold" if self.scaffold else f"aggregation {self.aggregation}"
            raise ConfigError(
                f"wire.up {up.text} encodes what changed since a site was sent its tensors, and with fedllm.{what} it "
                "is sent others: use a codec of values, as int8"
            )
        one_factor, changes = self.aggregation in ("ffa", "rolora", "fedsvd", "fedsa"), self.upload != "parameters"
        for way, codec in (("up", up), ("down", down)):
            text = codec.text if codec is not None else ""
            if re.search(r"(^|\+)rank\b", text) and (one_factor or (changes and way == "up")):
                what = f"aggregation {self.aggregation}" if one_factor else f"upload {self.upload}"
                raise ConfigError(f"wire.{way} {text} needs both factors of an adapter; not so fedllm.{what}")
        if down is not None and self.rule.merges:
            raise ConfigError(
                f"wire.down {down.text}: with fedllm.aggregation {self.aggregation} sites merge what they are sent, so "
                "it must be exact: set wire.down=none, or a codec for other uses"
            )

    # What can't be had together --------------------------------------------------------------------------------------

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        """Raises ValueError for a combination that would be wrong, or mean nothing."""
        rule, own = self.rule, self.aggregation not in RULES
        if own and not OWN.fullmatch(self.aggregation):
            known = ", ".join(RULES)
            raise ValueError(f"aggregation {self.aggregation!r} is none of {known}, nor of the form file.py:function")
        said = {
            "server_optimizer": self.server_optimizer != "none",
            "server_learning_rate": self.server_learning_rate is not None,
            "robust": self.robust != "none",
            "clip_norm": self.clip_norm is not None,
            "unbiased": self.unbiased,
            "upload gradients": self.upload == "gradients",
            "upload delta": self.upload == "delta",
            "scaffold": self.scaffold,
            "keep_optimizer": self.keep_optimizer,
            "local_heads": self.local_heads,
            "proximal_mu": self.proximal_mu > 0,
        }
        step = ("server_optimizer", "server_learning_rate", "robust", "clip_norm", "unbiased")
        for name in (n for n, is_set in said.items() if is_set):
            if not rule.linear and name in (*step, "upload gradients", "scaffold"):
                raise ValueError(f"{name} needs an aggregation that averages what is sent, and not {self.aggregation}")
            if (rule.anew and name == "upload delta") or (rule.turns and name == "keep_optimizer"):
                raise ValueError(f"{name} makes no sense with {self.aggregation}: its factors change every round")
            if rule.merges and name == "local_heads":
                raise ValueError(f"local_heads with {self.aggregation}: a site's model would have a base of its own")
            if self.upload == "seeds":
                raise ValueError(f"{name} can't be had with upload seeds, which replays plain steps")
            if self.upload == "gradients" and name in ("scaffold", "keep_optimizer", "proximal_mu"):
                raise ValueError(f"{name} can't be had with upload gradients: sites take no step")
            if self.scaffold and name in ("robust", "clip_norm", "local_heads", "proximal_mu", "unbiased"):
                raise ValueError(f"{name} can't be had with scaffold, whose control variates know nothing of it")
            if own and name in ("robust", "clip_norm"):
                raise ValueError(f"{name} is a mean of its own; it can't be had with {self.aggregation}")
        if self.upload == "seeds" and self.aggregation != "fedavg":
            raise ValueError(f"upload seeds goes with aggregation fedavg, not {self.aggregation}")
        if self.scaffold and self.aggregation not in ("fedavg", "ffa"):
            raise ValueError(f"scaffold goes with aggregation fedavg or ffa, not {self.aggregation}")
        return self
