"""FedDF: sites send adapters; the server distils their ensemble into their mean.

"Ensemble Distillation for Robust Model Fusion in Federated Learning" (FedDF, arXiv:2006.07242): the student starts from
θ̄ = Σ p_k θ_k and learns on unlabelled texts from the sites' aggregated logits (in the paper their plain mean), which
never leave the server. Without distillation (`server_epochs: 0`) it is FedLLM.

Where sites hold unlike models (its Algorithm 3) the server has a student for each of them, the paper's prototypes: each
starts from the mean over those who hold its model, or where none of them was in the round from where it was; all learn
from the one ensemble of all sites. A site trains what its own student has become.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from ..aggregation.adapters import weighted_mean
from ..message import Message, Reply
from ..models.train import Adapter
from .kd import KD, Protocol
from .lab import Lab, ServerProgram, Site, State, weights_of

COMMON = "student"


class FedDF(KD):
    """A server ensemble from uploaded adapters."""

    needs_models: ClassVar[bool] = True

    protocol: Protocol = "feddf"

    def server(self, lab: Lab, state: State, cohort: Sequence[str]) -> ServerProgram:
        """Broadcast, let them train, average, and distil the ensemble into the averages."""
        labs = {self.student_of(site): lab.of_site(site) for site in {*lab.sites, *cohort}} | {COMMON: lab}
        students = {name: state.get(name, labs[name].model.initial) for name in sorted(labs)}
        sent = {name: Message("adapter", student) for name, student in students.items()}
        inbox = yield {site: sent[self.student_of(site)] for site in cohort}
        adapters, weights = {site: reply.tensors for site, reply in inbox.items()}, weights_of(inbox)
        for name in students:
            held = {site: adapter for site, adapter in adapters.items() if self.student_of(site) == name}
            if held:
                students[name] = weighted_mean(held, {site: weights[site] for site in held})
        shared = {name: self.of_round(its, lab.round) for name, its in labs.items()}
        if len(shared[COMMON].public) and self.server_epochs:
            logits = {s: _predicted(shared[self.student_of(s)], adapter) for s, adapter in adapters.items()}
            teacher = self.aggregate(lab, logits, dict.fromkeys(logits, 1.0))
            for name, student in students.items():
                students[name] = self.distil(shared[name], student, teacher, lab.round, "server", self.server_epochs)
        state |= students

    def client(self, lab: Lab, site: Site, first: Reply) -> Message:
        """Train the received adapter on the site's data and send it back."""
        return Message("adapter", lab.fit(first.tensors, site), {"weight": site.data.weight})

    def check(self, lab: Lab, site: str, sent: Message, reply: Reply) -> None:
        """An adapter like the one that was sent, and its weight."""
        lab.guards.kind(site, reply, "adapter")
        lab.guards.like(site, reply.tensors, sent.tensors)
        lab.guards.weight(site, reply)

    def own_adapter(self, lab: Lab, site: Site) -> Adapter | None:
        """The server has them all."""
        return None

    def adapter_of(self, state: State, site: str) -> Adapter | None:
        """The student that has the site's model."""
        name = self.student_of(site)
        return None if name == COMMON else state.get(name)

    def student_of(self, site: str) -> str:
        """Under which name the server keeps the student of a site: one for each model of `kd.models`."""
        own = self.model_of(site)
        return COMMON if own is None else f"{COMMON} {1 + list(dict.fromkeys(self.models.values())).index(own[0])}"


def _predicted(lab: Lab, adapter: Adapter) -> Tensor:
    return lab.predict({name: lab.to_device(tensor) for name, tensor in adapter.items()})
