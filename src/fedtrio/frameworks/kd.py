"""KD-FedLLM: sites share logits on a public set; knowledge moves by distillation, and no parameter does.

After "FedMD: Heterogenous Federated Learning via Model Distillation" (arXiv:1910.03581) with a student at the server:
each site trains on its own data, then sends its logits on the public texts; the server aggregates them, distils its
student from the aggregate and sends the aggregate back; each site distils its own model from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from ..aggregation.logits import aggregate
from ..errors import MessageError
from ..message import Message, Reply
from ..models.train import Adapter
from .lab import ClientDialogue, Framework, Lab, ServerProgram, Site, State, weights_of


class KD(Framework):
    """Federated distillation. The public set bears no labels, so the cross-entropy part is the private training."""

    temperature: float = Field(default=2.0, gt=0, description="T of the softmax in distillation")
    aggregation: Literal["logits", "probabilities"] = Field(default="logits", description="what is averaged over sites")
    distill_weight: float = Field(default=1.0, ge=0, description="λ of λ·T²·KL; 0: sites don't distil")
    distill_epochs: int = Field(default=1, ge=0, description="passes of a site over the public set in a round")
    server_epochs: int = Field(
        default=1, ge=0, description="passes of the server's student over the public set in a round"
    )
    distill_learning_rate: float | None = Field(default=None, ge=0, description="null: those of train")

    def setup(self, lab: Lab) -> State:
        """The student starts from the same adapter as the sites."""
        return {"student": lab.model.initial}

    def server(self, lab: Lab, state: State, cohort: Sequence[str]) -> ServerProgram:
        """Ask for logits, aggregate, distil the student, send the aggregate."""
        inbox = yield dict.fromkeys(cohort, Message("start"))
        if not len(lab.public):
            return
        rows = {site: reply.tensor("logits") for site, reply in inbox.items()}
        for site, logits in rows.items():
            lab.check_public(logits, site)
        teacher = aggregate(self.aggregation, rows, weights_of(inbox))
        state["student"] = lab.distil(
            state["student"],
            teacher,
            lab.round,
            "server",
            self.server_epochs,
            self.temperature,
            learning_rate=self.distill_learning_rate,
        )
        yield dict.fromkeys(inbox, Message("aggregated logits", {"logits": teacher}))

    def client(self, lab: Lab, site: Site, first: Reply) -> ClientDialogue:
        """Train on private data, send logits, distil from their aggregate. The adapter stays in the site's memory."""
        adapter = lab.fit(site.memory.get("adapter", lab.model.initial), site)
        site.memory["adapter"] = adapter
        facts = {"weight": site.data.weight}
        if not len(lab.public):
            return Message("done", {}, facts)
        answer = yield Message("logits", {"logits": lab.predict(adapter)}, facts)
        lab.check_public(answer.tensor("logits"), "the server")
        if self.distill_weight and self.distill_epochs:
            site.memory["adapter"] = lab.distil(
                adapter,
                answer.tensor("logits"),
                site.round,
                site.name,
                self.distill_epochs,
                self.temperature,
                weight=self.distill_weight,
                learning_rate=self.distill_learning_rate,
            )
        return Message("done")

    def check(self, lab: Lab, site: str, sent: Message, reply: Reply) -> None:
        """A row of logits for each row of the public set, then nothing more."""
        if sent.kind != "start" or not len(lab.public):
            lab.guards.kind(site, reply, "done")
            return lab.guards.names(site, reply)
        lab.guards.kind(site, reply, "logits")
        lab.guards.names(site, reply, "logits")
        if reply.done:
            raise MessageError(f"{site} sent 'logits'; expected that they are not its last word")
        logits = reply.tensor("logits")
        lab.check_public(logits, site)
        lab.guards.form(site, "logits", logits, logits.shape, lab.model.dtype)
        lab.guards.values(site, "logits", logits)
        lab.guards.weight(site, reply)

    def adapter(self, lab: Lab, state: State) -> Adapter:
        """The server's student."""
        return state["student"]

    def own_adapter(self, lab: Lab, site: Site) -> Adapter:
        """The site's own; one that never took part still has the common start."""
        return site.memory.get("adapter", lab.model.initial)
