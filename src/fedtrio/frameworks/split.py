"""Split-FedLLM: the model is cut; sites run the first blocks, the server the rest, batch by batch.

"SplitFed: When Federated Learning Meets Split Learning" (arXiv:2004.12088): `sflv1` keeps a server half for each site
and averages them with the sites' halves at the end of a round, which is FedAvg to the last bit; `sflv2` has one server
half that learns from the sites in turn, batch by batch; `sequential` passes the sites' half from site to site
("Split learning for health", arXiv:1812.00564); `concatenated` takes one server step over the batches of all sites.
With `labels: client` the head stays at the site too (the U-shape), and neither labels nor logits ever leave it.

Gradients k and activations k+1 share one exchange, so N batches cost N+1 exchanges (2N+1 in the U-shape).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from statistics import fmean

from torch import Tensor

from ..aggregation.holders import mean_over_holders
from ..data.batches import Batch
from ..message import Fact, Message, Reply
from ..models.train import Adapter, task_loss
from .lab import ClientDialogue, Inbox, Lab, Outbox, ServerProgram, Site, State, weights_of
from .split_cache import GROUP, ServerCache, SiteCache
from .split_check import check
from .split_local import NAME as AUXILIARY
from .split_local import auxiliary, local_gradient
from .split_noise import protected
from .split_server import ServerHalf, pack_targets
from .split_settings import NORMS, SplitSettings

Halves = dict[str, ServerHalf]
Facts = Mapping[str, Fact]
NOTHING: Adapter = {}


class Split(SplitSettings):
    """Split federated learning."""

    def setup(self, lab: Lab) -> State:
        """The adapter that all frameworks start from: what some site may hold, and what only the server does."""
        at_site = lab.model.part(lab.model.initial, *self.spans(lab.model.depth))
        at_server = {name: t for name, t in lab.model.initial.items() if name not in at_site}
        own = auxiliary(lab) if self.local_loss else {}
        memory = ServerCache.setup(self) if self.cache != "none" else {}
        return {"site": {**at_site, **own}, "server": at_server, **memory}

    def server(self, lab: Lab, state: State, cohort: Sequence[str]) -> ServerProgram:
        """One round: serve the sites, then average what is to be averaged."""
        whole, cache = {**state["site"], **state["server"]}, ServerCache(self, lab, state)
        shared = None if self.variant == "sflv1" else ServerHalf(self, lab, self._above(lab, whole, *cohort))
        halves: Halves = {}
        finals: dict[str, Adapter] = {}
        replies: Inbox = {}
        for wave in self._waves(lab.shuffled(cohort), lab.abreast):
            halves |= {site: shared or ServerHalf(self, lab, self._above(lab, whole, site)) for site in wave}
            inbox = yield self._start(lab, whole, wave, cache)
            while inbox:
                done = {site: reply for site, reply in inbox.items() if reply.done}
                finals |= {site: self._half(lab, site, reply.tensors) for site, reply in done.items()}
                replies |= done
                inbox = yield from self._serve(halves, cache.filled({s: r for s, r in inbox.items() if s not in done}))
            if self.variant == "sequential" and shared and wave[0] in finals:
                shared.take_over(finals[wave[0]])
                whole = {**whole, **finals[wave[0]]}
            if self.variant == "sequential" and shared:
                whole = {**whole, **shared.learner.values()}
        if not finals:
            return
        weights = weights_of(replies)
        if self.variant == "sflv1":
            whole = mean_over_holders({s: {**finals[s], **halves[s].learner.values()} for s in finals}, weights)
        elif self.variant != "sequential" and shared:
            whole = mean_over_holders(finals, weights, shared.learner.values())
        state |= {group: {name: whole[name] for name in state[group]} for group in ("site", "server")}
        cache.commit(state, finals, self._mean_loss(halves, replies, weights))

    def client(self, lab: Lab, site: Site, first: Reply) -> ClientDialogue:
        """Run the first blocks on each batch, learn from the gradients that come back, return the site's half."""
        layout = self.layout(lab, site.name)
        learner = lab.learner(first.tensors, *layout.site)
        tensors = {name: t for name, t in learner.tensors.items() if name in lab.model.initial}
        cache = SiteCache(site, first) if self.cache != "none" else None
        if cache:
            lab.hold(lab.model.held_bytes(*layout.site) + learner.nbytes + cache.nbytes(site, lab.model))
        losses: list[Tensor] = []
        norms: dict[str, Tensor] = {}
        for step, batch in enumerate(site.data.batches(site.round)):
            seed = lab.dropout_seed(site.round, site.name, step)
            lengths = batch.lengths_B
            facts = {"step": step, "steps": site.data.steps, "lengths": " ".join(map(str, lengths.tolist()))}
            calm = None if cache else seed  # what dropout makes differ can't be compared
            h_ND = lab.model.forward(tensors, lengths, batch.ids_BT, span=layout.bottom, dropout_seed=calm)
            out_ND = protected(self, lab, site, step, h_ND)
            if self.local_loss:
                if step % self.send_every == 0:
                    yield self._activations(batch, h_ND, out_ND, cache, facts)
                out_ND, answer = h_ND, Message("", {"dh": local_gradient(lab, learner.tensors, h_ND, batch)})
            else:
                answer = yield self._activations(batch, h_ND, out_ND, cache, facts, norms)
            if layout.top is not None:
                top_ND = lab.to_device(answer.tensor("h")).requires_grad_()
                logits = lab.model.forward(tensors, lengths, h_ND=top_ND, span=layout.top, dropout_seed=seed)
                loss = task_loss(logits, lab.to_device(batch.targets))
                losses.append(loss.detach())
                lab.model.backward(loss * float(answer.facts.get("share", 1.0)), batch.shape, span=layout.top)
                answer = yield Message("activation gradients", {"dh": lab.to_device(top_ND.grad)}, facts)
            if out_ND.requires_grad:
                lab.model.backward(out_ND, batch.shape, lab.to_device(answer.tensor("dh")), layout.bottom)
            if self.exchanges_norms(lab.train):
                norms = {NORMS: learner.squared_norms()}
            learner.step(lab.progress(site.round, step, site.data.steps), answer.tensors.get(NORMS))
        told = {"loss": mean(losses)} if self.cache == "adaptive" and layout.top else {}
        if cache:
            site.memory[GROUP] = cache.kept
        return Message("adapter", learner.values() | norms, {"weight": site.data.weight} | told)

    def check(self, lab: Lab, site: str, sent: Message, reply: Reply) -> None:
        """Activations that fit their lengths, gradients that fit what was sent, or the site's half of the adapter."""
        check(self, lab, site, sent, reply)

    def adapter(self, lab: Lab, state: State) -> Adapter:
        """Both halves joined."""
        return {name: t for name, t in {**state["site"], **state["server"]}.items() if name in lab.model.initial}

    # Parts of a round ------------------------------------------------------------------------------------------------

    def _start(self, lab: Lab, whole: Adapter, wave: Sequence[str], cache: ServerCache) -> Outbox:
        """Each site's half; one message for all to whom the same is said, as it is encoded but once."""
        messages: dict[object, Message] = {}
        keys = {}
        for site in wave:
            facts = cache.start(site)
            keys[site] = (self.layout(lab, site), *facts.items())
            if keys[site] not in messages:
                messages[keys[site]] = Message("adapter", self._half(lab, site, whole), facts)
        return {site: messages[keys[site]] for site in wave}

    def _activations(
        self,
        batch: Batch,
        h_ND: Tensor,
        out_ND: Tensor,
        cache: SiteCache | None,
        facts: Facts,
        norms: Adapter = NOTHING,
    ) -> Message:
        """What a site says of a batch: its activations, or those that have moved, and its labels where they belong."""
        sent = {"h": out_ND}
        if cache:
            sent, which = cache.only_moved(h_ND, out_ND, batch.lengths_B.tolist(), batch.texts)
            facts = {**facts, **which}
        if self.labels == "server":
            labels = {"labels": pack_targets(batch.targets, batch.lengths_B)}
            return Message("activations and labels", {**sent, **labels, **norms}, facts)
        counted = {"targets": batch.target_tokens()} if self.variant == "concatenated" else {}
        return Message("activations", {**sent, **norms}, {**facts, **counted})

    def _mean_loss(self, halves: Halves, replies: Inbox, weights: Mapping[str, float]) -> float | None:
        """Of the round, by which an adaptive threshold moves: where the labels are, it is known."""
        if self.cache != "adaptive":
            return None
        if self.labels != "server":
            return sum(weights[s] * float(r.fact("loss")) for s, r in replies.items()) / sum(weights.values())
        return mean([loss for half in dict.fromkeys(halves.values()) for loss in half.losses])

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
        return {name: lab.to_device(tensors[name]) for name in [*held, *([AUXILIARY] if self.local_loss else [])]}

    def _above(self, lab: Lab, whole: Adapter, *sites: str) -> Adapter:
        """What the server holds for these sites: all that some of them does not hold."""
        held = [self._half(lab, site, whole).keys() for site in sites]
        return {name: t for name, t in whole.items() if not all(name in names for names in held)}


def mean(losses: Sequence[Tensor]) -> float:
    """Of no loss it is 0: of a round without a step there is nothing to go by."""
    return fmean(float(loss) for loss in losses) if losses else 0.0
