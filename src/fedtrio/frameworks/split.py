"""Split-FedLLM: the model is cut; sites run the first blocks, the server the rest, batch by batch.

"SplitFed: When Federated Learning Meets Split Learning" (arXiv:2004.12088): `sflv1` keeps a server half for each site
and averages them with the sites' halves at the end of a round, which is FedAvg to the last bit; `sflv2` has one server
half that learns from the sites in turn, batch by batch; `sequential` passes the sites' half from site to site
("Split learning for health", arXiv:1812.00564); `concatenated` takes one server step over the batches of all sites.
With `labels: client` the head stays at the site too (the U-shape), and neither labels nor logits ever leave it.

Gradients k and activations k+1 share one exchange, so N batches cost N+1 exchanges (2N+1 in the U-shape).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from torch import Tensor

from ..aggregation.holders import mean_over_holders
from ..message import Message, Reply
from ..models.train import Adapter, task_loss
from .lab import ClientDialogue, Inbox, Lab, Outbox, ServerProgram, Site, State, weights_of
from .split_check import check
from .split_noise import protected
from .split_server import ServerHalf, pack_targets
from .split_settings import NORMS, SplitSettings

Halves = dict[str, ServerHalf]


class Split(SplitSettings):
    """Split federated learning."""

    def setup(self, lab: Lab) -> State:
        """The adapter that all frameworks start from: what some site may hold, and what only the server does."""
        at_site = lab.model.part(lab.model.initial, *self.spans(lab.model.depth))
        at_server = {name: t for name, t in lab.model.initial.items() if name not in at_site}
        return {"site": at_site, "server": at_server}

    def server(self, lab: Lab, state: State, cohort: Sequence[str]) -> ServerProgram:
        """One round: serve the sites, then average what is to be averaged."""
        whole = self.adapter(lab, state)
        shared = None if self.variant == "sflv1" else ServerHalf(self, lab, self._above(lab, whole, *cohort))
        halves: Halves = {}
        finals: dict[str, Adapter] = {}
        replies: Inbox = {}
        for wave in self._waves(lab.shuffled(cohort), lab.abreast):
            halves |= {site: shared or ServerHalf(self, lab, self._above(lab, whole, site)) for site in wave}
            inbox = yield self._start(lab, whole, wave)
            while inbox:
                done = {site: reply for site, reply in inbox.items() if reply.done}
                finals |= {site: self._half(lab, site, reply.tensors) for site, reply in done.items()}
                replies |= done
                inbox = yield from self._serve(halves, {s: r for s, r in inbox.items() if s not in done})
            if self.variant == "sequential" and shared and wave[0] in finals:
                shared.take_over(finals[wave[0]])
                whole = {**whole, **finals[wave[0]]}
            if self.variant == "sequential" and shared:
                whole = {**whole, **shared.learner.values()}
        weights = weights_of(replies)
        if self.variant == "sflv1":
            whole = mean_over_holders({s: {**finals[s], **halves[s].learner.values()} for s in finals}, weights)
        elif self.variant != "sequential" and shared:
            whole = mean_over_holders(finals, weights, shared.learner.values())
        state |= {group: {name: whole[name] for name in state[group]} for group in ("site", "server")}

    def client(self, lab: Lab, site: Site, first: Reply) -> ClientDialogue:
        """Run the first blocks on each batch, learn from the gradients that come back, return the site's half."""
        layout = self.layout(lab, site.name)
        bottom, top = layout.bottom, layout.top
        learner = lab.learner(first.tensors, *layout.site)
        norms: dict[str, Tensor] = {}
        for step, batch in enumerate(site.data.batches(site.round)):
            seed = lab.dropout_seed(site.round, site.name, step)
            lengths = batch.lengths_B
            facts = {"step": step, "steps": site.data.steps, "lengths": " ".join(map(str, lengths.tolist()))}
            h_ND = lab.model.forward(learner.tensors, lengths, batch.ids_BT, span=bottom, dropout_seed=seed)
            h_out_ND = protected(self, lab, site, step, h_ND)
            if top is None:
                sent = {"h": h_out_ND, "labels": pack_targets(batch.targets, lengths)}
                answer = yield Message("activations and labels", sent | norms, facts)
            else:
                counted = {"targets": batch.target_tokens()} if self.variant == "concatenated" else {}
                answer = yield Message("activations", {"h": h_out_ND} | norms, facts | counted)
                top_ND = lab.to_device(answer.tensor("h")).requires_grad_()
                logits = lab.model.forward(learner.tensors, lengths, h_ND=top_ND, span=top, dropout_seed=seed)
                loss = task_loss(logits, lab.to_device(batch.targets)) * float(answer.facts.get("share", 1.0))
                lab.model.backward(loss, batch.shape, span=top)
                answer = yield Message("activation gradients", {"dh": lab.to_device(top_ND.grad)}, facts)
            if h_out_ND.requires_grad:
                lab.model.backward(h_out_ND, batch.shape, lab.to_device(answer.tensor("dh")), bottom)
            if lab.train.max_grad_norm is not None:
                norms = {NORMS: learner.squared_norms()}
            learner.step(lab.progress(site.round, step, site.data.steps), answer.tensors.get(NORMS))
        return Message("adapter", learner.values() | norms, {"weight": site.data.weight})

    def check(self, lab: Lab, site: str, sent: Message, reply: Reply) -> None:
        """Activations that fit their lengths, gradients that fit what was sent, or the site's half of the adapter."""
        check(self, lab, site, sent, reply)

    def adapter(self, lab: Lab, state: State) -> Adapter:
        """Both halves joined."""
        return {**state["site"], **state["server"]}

    # Parts of a round ------------------------------------------------------------------------------------------------

    def _start(self, lab: Lab, whole: Adapter, wave: Sequence[str]) -> Outbox:
        """Each site's half; one message for all that cut at the same block, as it is encoded but once."""
        messages = {}
        for site in wave:
            layout = self.layout(lab, site)
            if layout not in messages:
                messages[layout] = Message("adapter", self._half(lab, site, whole))
        return {site: messages[self.layout(lab, site)] for site in wave}

    def _waves(self, order: list[str], abreast: int | None) -> list[list[str]]:
        """Who is served at the same time. In sflv1 sites don't meet before the end, so any grouping is the same."""
        size = {"sequential": 1, "sflv1": abreast or len(order)}.get(self.variant, len(order))
        return [order[i : i + size] for i in range(0, len(order), size)]

    def _serve(self, halves: Halves, inbox: Inbox) -> Generator[Outbox, Inbox, Inbox]:
        """Answer one message of each site; what they say next.

        A shared half whose step needs a second message must finish with one site before it turns to the next, unless
        it steps for all of them at once.
        """
        if not inbox:
            return {}
        if self.variant == "concatenated":
            half = halves[next(iter(inbox))]
            inbox = yield half.answer_together(inbox)
            half.settle(*inbox.values())
            return inbox
        two_messages = self.labels == "client" or any(half.clips for half in halves.values())
        if self.variant != "sflv2" or not two_messages:
            outbox = {site: halves[site].answer(site, reply) for site, reply in inbox.items()}
            inbox = yield outbox
            for site in outbox:
                halves[site].settle(inbox.get(site))
            return inbox
        after: Inbox = {}
        for site, reply in inbox.items():
            for _ in range(2 if self.labels == "client" else 1):
                reply = (yield {site: halves[site].answer(site, reply)}).get(site)
                if reply is None:
                    break
            halves[site].settle(reply)
            after |= {site: reply} if reply else {}
        return after

    def _half(self, lab: Lab, site: str, tensors: Adapter) -> dict[str, Tensor]:
        """What of these tensors the site holds."""
        held = lab.model.part(lab.model.initial, *self.layout(lab, site).site)
        return {name: lab.to_device(tensors[name]) for name in held}

    def _above(self, lab: Lab, whole: Adapter, *sites: str) -> Adapter:
        """What the server holds for these sites: all that some of them does not hold."""
        held = [self._half(lab, site, whole).keys() for site in sites]
        return {name: t for name, t in whole.items() if not all(name in names for names in held)}
