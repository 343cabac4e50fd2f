"""FedLLM: sites train adapters on their own data and send them; the server averages them.

"Communication-Efficient Learning of Deep Networks from Decentralized Data" (FedAvg, arXiv:1602.05629) on the LoRA
tensors and the head, as in "Towards Building the Federated GPT" (FedIT, arXiv:2305.05644).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..aggregation.adapters import weighted_mean
from ..message import Message, Reply
from ..models.train import Adapter
from .lab import Framework, Lab, ServerProgram, Site, State, weights_of


class FedLLM(Framework):
    """FedAvg of adapters. A site sends its adapter and how many examples (or target tokens) it trained on."""

    def setup(self, lab: Lab) -> State:
        """All start from the same adapter."""
        return {"adapter": lab.model.initial}

    def server(self, lab: Lab, state: State, cohort: Sequence[str]) -> ServerProgram:
        """Broadcast, let them train, average by weight."""
        inbox = yield dict.fromkeys(cohort, Message("adapter", state["adapter"]))
        state["adapter"] = weighted_mean({site: reply.tensors for site, reply in inbox.items()}, weights_of(inbox))

    def client(self, lab: Lab, site: Site, first: Reply) -> Message:
        """Train the received adapter on the site's data and send it back."""
        adapter = lab.fit(first.tensors, site)
        return Message("adapter", adapter, {"weight": site.data.weight})

    def check(self, lab: Lab, site: str, sent: Message, reply: Reply) -> None:
        """An adapter like the one that was sent, and its weight."""
        lab.guards.kind(site, reply, "adapter")
        lab.guards.like(site, reply.tensors, sent.tensors)
        lab.guards.weight(site, reply)

    def adapter(self, lab: Lab, state: State) -> Adapter:
        """The averaged adapter."""
        return state["adapter"]
