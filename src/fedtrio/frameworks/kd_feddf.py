"""FedDF: sites send adapters; the server distils their ensemble into their mean.

"Ensemble Distillation for Robust Model Fusion in Federated Learning" (FedDF, arXiv:2006.07242): the student starts from
θ̄ = Σ p_k θ_k and learns on unlabelled texts from the sites' aggregated logits (in the paper their plain mean), which
never leave the server. Without distillation (`server_epochs: 0`) it is FedLLM.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..aggregation.adapters import weighted_mean
from ..message import Message, Reply
from ..models.train import Adapter
from .kd import KD, Protocol
from .lab import Lab, ServerProgram, Site, State, weights_of


class FedDF(KD):
    """A server ensemble from uploaded adapters."""

    protocol: Protocol = "feddf"

    def server(self, lab: Lab, state: State, cohort: Sequence[str]) -> ServerProgram:
        """Broadcast, let them train, average, and distil the ensemble into the average."""
        inbox = yield dict.fromkeys(cohort, Message("adapter", state["student"]))
        adapters = {site: reply.tensors for site, reply in inbox.items()}
        student: Adapter = weighted_mean(adapters, weights_of(inbox))
        lab = self.of_round(lab, lab.round)
        if len(lab.public) and self.server_epochs:
            logits = {site: lab.predict(self._on_device(lab, adapter)) for site, adapter in adapters.items()}
            teacher = self.aggregate(lab, logits, dict.fromkeys(logits, 1.0))
            student = self.distil(lab, student, teacher, lab.round, "server", self.server_epochs)
        state["student"] = student

    def client(self, lab: Lab, site: Site, first: Reply) -> Message:
        """Train the received adapter on the site's data and send it back."""
        return Message("adapter", lab.fit(first.tensors, site), {"weight": site.data.weight})

    def check(self, lab: Lab, site: str, sent: Message, reply: Reply) -> None:
        """An adapter like the one that was sent, and its weight."""
        lab.guards.kind(site, reply, "adapter")
        lab.guards.like(site, reply.tensors, sent.tensors)
        lab.guards.weight(site, reply)

    def own_adapter(self, lab: Lab, site: Site) -> Adapter | None:
        """All hold the common one."""
        return None

    def _on_device(self, lab: Lab, adapter: Adapter) -> Adapter:
        return {name: lab.to_device(tensor) for name, tensor in adapter.items()}
