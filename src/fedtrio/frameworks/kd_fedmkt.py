"""FedMKT: on each public text, learn only from who knows it better.

"FedMKT: Federated Mutual Knowledge Transfer for Large and Small Language Models" (arXiv:2406.02224). Every party tells,
beside its logits, its own cross-entropy on each public text, whose next tokens are known to all. The server's student
takes for each text the logits of the site with the least (the greatest reward e^−CE), and only where that is less than
its own; each site then takes the student's where these are better than its own (DualMinCE). `selection: weighted` mixes
the distributions of all, one's own among them, by the softmax of rewards. The loss is `public_weight`·CE +
`distill_weight`·T²·KL; the authors' code has 0.9, 0.1 and T = 1, and `topk:128`. Models share a tokenizer; the
alignment of unlike vocabularies (MinED) is not here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.batches import IGNORE
from ..errors import MessageError
from ..message import Message, Reply
from ..models.train import Adapter
from .kd import KD, Protocol
from .lab import ClientDialogue, Lab, ServerProgram, Site, State


class Knowledge(NamedTuple):
    """What a party says of the public texts: logits [rows, V] and its mean cross-entropy on each text [M]."""

    logits: Tensor
    losses_M: Tensor


class FedMKT(KD):
    """Selective transfer between a server's model and the sites'."""

    protocol: Protocol = "fedmkt"

    def server(self, lab: Lab, state: State, cohort: Sequence[str]) -> ServerProgram:
        """Ask for knowledge, let the student learn what others know better, and send what it knows then."""
        inbox = yield dict.fromkeys(cohort, Message("start"))
        lab = self.of_round(lab, lab.round)
        if not len(lab.public):
            return
        theirs = {site: self._heard(lab, reply, site, site) for site, reply in inbox.items()}
        student = self._learn(lab, state["student"], theirs, "server", lab.round, self.server_epochs)
        state["student"] = student
        yield dict.fromkeys(inbox, self._said(lab, "aggregated logits", knowledge(lab, student), lab.round))

    def client(self, lab: Lab, site: Site, first: Reply) -> ClientDialogue:
        """Train on private data, say what one knows of the public texts, learn what the server knows better."""
        adapter: Adapter = lab.fit(site.memory.get("adapter", lab.model.initial), site)
        weight, lab = site.data.weight, self.of_round(lab, site.round)
        if not len(lab.public):
            site.memory["adapter"] = adapter
            return Message("done", {}, {"weight": weight})
        said = self._said(lab, "logits", knowledge(lab, adapter), site.round, site.name)
        answer = yield replace(said, facts={"weight": weight})
        heard = {"the server": self._heard(lab, answer, "the server")}
        site.memory["adapter"] = self._learn(lab, adapter, heard, site.name, site.round, self.distill_epochs)
        return Message("done")

    def check(self, lab: Lab, site: str, sent: Message, reply: Reply) -> None:
        """Logits as in the standard protocol, and a cross-entropy for each text."""
        if sent.kind == "start" and len(lab.public):
            lab.guards.kind(site, reply, "logits")
            self._check_losses(self.of_round(lab, lab.round), site, reply)
            reply = replace(reply, tensors={name: t for name, t in reply.tensors.items() if name != "losses"})
        super().check(lab, site, sent, reply)

    def _learn(
        self, lab: Lab, adapter: Adapter, others: Mapping[str, Knowledge], who: str, round: int, epochs: int
    ) -> Adapter:
        """Distil from the others what they know better, or from the mixture of all."""
        if not epochs or not (self.distill_weight or self.public_weight):
            return adapter
        own, counts = knowledge(lab, adapter), lab.public_rows
        if self.selection == "weighted":
            teacher, weight = mixture({**others, "": own}, counts), self.distill_weight
        else:
            teacher, losses_M = least_loss(others, counts)
            better_M = self.distill_weight * (losses_M < own.losses_M.cpu()).to(lab.model.dtype)
            weight = better_M.repeat_interleave(torch.tensor(counts))
        return self.distil(lab, adapter, teacher, round, who, epochs, weight)

    def _said(self, lab: Lab, kind: str, known: Knowledge, round: int, site: str | None = None) -> Message:
        message = self.message(lab, kind, known.logits, round, site)
        return replace(message, tensors={**message.tensors, "losses": known.losses_M})

    def _heard(self, lab: Lab, message: Message, who: str, site: str | None = None) -> Knowledge:
        self._check_losses(lab, who, message)
        logits = replace(message, tensors={name: t for name, t in message.tensors.items() if name != "losses"})
        return Knowledge(self.read(lab, logits, who, site), message.tensor("losses"))

    def _check_losses(self, lab: Lab, who: str, message: Message) -> None:
        """Raises MessageError unless there is a cross-entropy from 0 for each public text."""
        losses = message.tensor("losses")
        lab.guards.form(who, "losses", losses, (len(lab.public),), lab.model.dtype)
        if float(losses.min()) < 0:
            raise MessageError(f"{who} sent a cross-entropy of {float(losses.min()):.3g}; it must not be below 0")


def knowledge(lab: Lab, adapter: Adapter) -> Knowledge:
    """A model's logits on the public texts, and its mean cross-entropy on each; 0 for a text without a target."""
    logits, targets, counts = lab.predict(adapter), lab.public.targets, lab.public_rows
    assert isinstance(targets, list)
    wanted = torch.from_numpy(np.concatenate([t[1:][t[1:] != IGNORE] for t in targets])).to(logits.device)
    losses = F.cross_entropy(logits, wanted, reduction="none").split(counts)
    return Knowledge(logits, torch.stack([loss.sum() / max(1, len(loss)) for loss in losses]))


def least_loss(parties: Mapping[str, Knowledge], counts: Sequence[int]) -> Knowledge:
    """For each text what the party with the least cross-entropy says; of equals the first by name."""
    names = sorted(parties)
    losses_KM = torch.stack([parties[name].losses_M.cpu() for name in names])
    losses_M, best_M = losses_KM.min(0)
    parts = [parties[name].logits.split(list(counts)) for name in names]
    return Knowledge(torch.cat([parts[best][m] for m, best in enumerate(best_M.tolist())]), losses_M)


def mixture(parties: Mapping[str, Knowledge], counts: Sequence[int]) -> Tensor:
    """log Σ_k w_{k,m} q_k of each row of text m, [rows, V]; w_m is the softmax over parties of their rewards e^−CE."""
    names = sorted(parties)
    rewards_KM = torch.stack([parties[name].losses_M.cpu().double() for name in names]).neg().exp()
    w_KR = rewards_KM.softmax(0).repeat_interleave(torch.tensor(list(counts)), dim=1)
    logits = [parties[name].logits.cpu() for name in names]
    mixed = sum(w_R[:, None] * z.double().softmax(-1) for w_R, z in zip(w_KR, logits, strict=True))
    assert isinstance(mixed, Tensor)
    return mixed.log().clamp(min=torch.finfo(torch.float32).min / 4).to(logits[0].dtype)
