"""FedMD: digest the consensus, then revisit one's own data.

"FedMD: Heterogenous Federated Learning via Model Distillation" (arXiv:1910.03581). A site that is new trains on its
own data first. Then in each round: communicate (class scores on the public set), aggregate, digest, revisit. So a
round ends with private training, where the standard protocol ends with distillation. FedMD's own server has no model;
`server_epochs` of a student are an addition, and with 0 there is none.
"""

from __future__ import annotations

from ..message import Message, Reply
from ..models.train import Adapter
from .kd import KD, Protocol
from .lab import ClientDialogue, Lab, Site, State


class FedMD(KD):
    """Digest and revisit."""

    protocol: Protocol = "fedmd"

    def client(self, lab: Lab, site: Site, first: Reply) -> ClientDialogue:
        """Communicate, digest, revisit."""
        adapter = site.memory.get("adapter")
        if adapter is None:
            adapter = lab.fit(lab.model.initial, site)
        facts, shared = {"weight": site.data.weight}, self.of_round(lab, site.round)
        if len(shared.public):
            answer = yield self.message(shared, "logits", shared.predict(adapter), site.round, site.name, facts)
            adapter, facts = self.digest(shared, site, adapter, self.read(shared, answer, "the server")), {}
        site.memory["adapter"] = lab.fit(adapter, site)
        return Message("done", {}, facts)

    def adapter(self, lab: Lab, state: State) -> Adapter | None:
        """The student, if there is one."""
        return state["student"] if self.server_epochs else None
