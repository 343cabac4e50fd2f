"""Split-FedLLM: the model is cut; sites run the first blocks, the server the rest, batch by batch.

"SplitFed: When Federated Learning Meets Split Learning" (arXiv:2004.12088): `sflv1` keeps a server half for each site
and averages them with the sites' halves at the end of a round, which is FedAvg to the last bit; `sflv2` has one server
half that learns from the sites in turn, batch by batch; `sequential` passes the sites' half from site to site
("Split learning for health", arXiv:1812.00564). With `labels: client` the head stays at the site too (the U-shape), and
neither labels nor logits ever leave it.

Gradients k and activations k+1 share one exchange, so N batches cost N+1 exchanges (2N+1 in the U-shape).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..aggregation.adapters import weighted_mean
from ..errors import MessageError
from ..message import Message, Reply
from ..models.cut import Span, pack, unpack
from ..models.train import Adapter, Learner, task_loss
from .lab import ClientDialogue, Framework, Inbox, Lab, Outbox, ServerProgram, Site, State, weights_of

NORMS = "squared norms"


class Split(Framework):
    """Split federated learning."""

    cut: int = Field(default=2, ge=0, description="blocks that run at the site; 0: the embeddings alone")
    variant: Literal["sflv1", "sflv2", "sequential"] = Field(default="sflv1", description="how the server half is kept")
    labels: Literal["auto", "server", "client"] = Field(
        default="auto", description="who has labels and head; auto: server for classification, client for causal-lm"
    )

    def setup(self, lab: Lab) -> State:
        """Both halves of the adapter that all frameworks start from."""
        at_site = lab.model.part(lab.model.initial, *self._site_spans(lab))
        at_server = {name: t for name, t in lab.model.initial.items() if name not in at_site}
        return {"site": at_site, "server": at_server}

    def server(self, lab: Lab, state: State, cohort: Sequence[str]) -> ServerProgram:
        """One round: serve the sites, then average what is to be averaged."""
        site_half: Adapter = state["site"]
        finals: Inbox = {}
        shared = None if self.variant == "sflv1" else ServerHalf(self, lab, state["server"])
        halves: dict[str, ServerHalf] = {}
        for wave in self._waves(lab.shuffled(cohort), lab.abreast):
            halves |= {site: shared or ServerHalf(self, lab, state["server"]) for site in wave}
            inbox = yield dict.fromkeys(wave, Message("adapter", site_half))
            while inbox:
                finals |= {site: reply for site, reply in inbox.items() if reply.done}
                inbox = yield from self._serve(halves, {s: r for s, r in inbox.items() if not r.done})
            if self.variant == "sequential" and wave[0] in finals:
                site_half = self._site_half(finals[wave[0]], site_half)
        weights = weights_of(finals)
        if self.variant != "sequential":
            site_half = weighted_mean({s: self._site_half(r, site_half) for s, r in finals.items()}, weights)
        state["site"] = site_half
        state["server"] = (
            shared.learner.values()
            if shared
            else weighted_mean({site: halves[site].learner.values() for site in finals}, weights)
        )

    def client(self, lab: Lab, site: Site, first: Reply) -> ClientDialogue:
        """Run the first blocks on each batch, learn from the gradients that come back, return the site's half."""
        learner = lab.learner(first.tensors, *self._site_spans(lab))
        bottom, head = self._site_spans(lab)[0], (lab.model.depth, None)
        norms: dict[str, Tensor] = {}
        for step, batch in enumerate(site.data.batches(site.round)):
            seed = lab.dropout_seed(site.round, site.name, step)
            lengths = batch.lengths_B
            facts = {"step": step, "steps": site.data.steps, "lengths": " ".join(map(str, lengths.tolist()))}
            h_ND = lab.model.forward(learner.tensors, lengths, batch.ids_BT, span=bottom, dropout_seed=seed)
            if self.labels == "server":
                sent = {"h": h_ND, "labels": _pack_targets(batch.targets, lengths)}
                answer = yield Message("activations and labels", sent | norms, facts)
            else:
                answer = yield Message("activations", {"h": h_ND} | norms, facts)
                top_ND = lab.to_device(answer.tensor("h")).requires_grad_()
                logits = lab.model.forward(learner.tensors, lengths, h_ND=top_ND, span=head, dropout_seed=seed)
                lab.model.backward(task_loss(logits, lab.to_device(batch.targets)), batch.shape, span=head)
                answer = yield Message("activation gradients", {"dh": lab.to_device(top_ND.grad)}, facts)
            if h_ND.requires_grad:
                lab.model.backward(h_ND, batch.shape, lab.to_device(answer.tensor("dh")), bottom)
            if lab.train.max_grad_norm is not None:
                norms = {NORMS: learner.squared_norms()}
            learner.step(lab.progress(site.round, step, site.data.steps), answer.tensors.get(NORMS))
        return Message("adapter", learner.values() | norms, {"weight": site.data.weight})

    def check(self, lab: Lab, site: str, sent: Message, reply: Reply) -> None:
        """Activations that fit their lengths, gradients that fit what was sent, or the site's half of the adapter."""
        guards, names = lab.guards, reply.tensors.keys() - {NORMS}
        norms: tuple[str, ...] = ()
        if NORMS in reply.tensors:
            guards.form(site, NORMS, reply.tensor(NORMS), (None,), torch.float64)
            if float(reply.tensor(NORMS).min()) < 0:
                raise MessageError(f"{site} sent {NORMS} below 0")
        if lab.train.max_grad_norm is not None and sent.kind in ("activation gradients", "step taken"):
            norms = (NORMS,)  # of the step before
        if reply.done:
            guards.kind(site, reply, "adapter")
            wanted = lab.model.part(lab.model.initial, *self._site_spans(lab))
            guards.names(site, reply, *wanted, *norms)
            guards.like(site, {name: reply.tensor(name) for name in names}, wanted)
            return guards.weight(site, reply)
        guards.count(site, reply, "step", "steps")
        if int(reply.fact("step")) >= int(reply.fact("steps")):
            raise MessageError(f"{site} sent step {reply.fact('step')} of {reply.fact('steps')}")
        if sent.kind == "activations":
            guards.kind(site, reply, "activation gradients")
            guards.names(site, reply, "dh")
            guards.form(site, "dh", reply.tensor("dh"), sent.tensor("h").shape, lab.model.dtype)
            return guards.values(site, "dh", reply.tensor("dh"))
        with_labels = self.labels == "server"
        guards.kind(site, reply, "activations and labels" if with_labels else "activations")
        guards.names(site, reply, "h", *(["labels"] if with_labels else []), *norms)
        lengths_B = _lengths(site, reply)
        if len(lengths_B) > lab.train.batch_size or int(lengths_B.max()) > lab.train.max_length:
            raise MessageError(
                f"{site} sent a batch of {len(lengths_B)} texts of up to {int(lengths_B.max())} tokens; train allows "
                f"{lab.train.batch_size} of {lab.train.max_length}"
            )
        guards.form(site, "h", reply.tensor("h"), (int(lengths_B.sum()), lab.model.width), lab.model.dtype)
        guards.values(site, "h", reply.tensor("h"))
        if with_labels:
            rows = len(lengths_B) if lab.model.task == "classification" else int(lengths_B.sum())
            guards.form(site, "labels", reply.tensor("labels"), (rows,), torch.int32)
            labels = reply.tensor("labels")
            if lab.model.task == "causal-lm":
                labels = labels[labels != -100]  # no targets
            if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= lab.model.classes):
                raise MessageError(f"{site} sent labels outside of 0 to {lab.model.classes - 1}")

    def adapter(self, lab: Lab, state: State) -> Adapter:
        """Both halves joined."""
        return {**state["site"], **state["server"]}

    def cuts(self, depth: int) -> tuple[int, ...]:
        """Where the model is cut: once, or twice in the U-shape."""
        return (self.cut,) if self.labels == "server" else (self.cut, depth)

    def _site_spans(self, lab: Lab) -> tuple[Span, ...]:
        bottom: Span = (-1, self.cut)
        return (bottom,) if self.labels == "server" else (bottom, (lab.model.depth, None))

    def _waves(self, order: list[str], abreast: int | None) -> list[list[str]]:
        """Who is served at the same time. In sflv1 sites don't meet before the end, so any grouping is the same."""
        size = {"sequential": 1, "sflv2": len(order), "sflv1": abreast or len(order)}[self.variant]
        return [order[i : i + size] for i in range(0, len(order), size)]

    def _serve(self, halves: dict[str, ServerHalf], inbox: Inbox) -> Generator[Outbox, Inbox, Inbox]:
        """Answer one message of each site; what they say next.

        A shared half whose step needs a second message must finish with one site before it turns to the next.
        """
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

    def _site_half(self, final: Reply, like: Adapter) -> Adapter:
        return {name: final.tensor(name) for name in like}


class ServerHalf:
    """The server's blocks with their optimizer: one for each site in sflv1, one for all else."""

    def __init__(self, split: Split, lab: Lab, tensors: Adapter) -> None:
        self._lab = lab
        self._span: Span = (split.cut, None if split.labels == "server" else lab.model.depth)
        self._gradient_wanted = bool(lab.model.part(lab.model.initial, (-1, split.cut)))
        self._open: dict[str, tuple[Tensor, Tensor, tuple[int, int]]] = {}  # the U-shape's forward passes
        self._pending: float | None = None  # progress of a step that waits for the site's norms
        self.learner = Learner({name: lab.to_device(t) for name, t in tensors.items()}, lab.train)
        self.clips = lab.train.max_grad_norm is not None

    def answer(self, site: str, reply: Reply) -> Message:
        """Go on with a site's batch: forward, backward or both, whatever its message allows."""
        if reply.kind == "activation gradients":
            return self._backward(site, reply)
        lengths_B, step = _lengths(site, reply), int(reply.fact("step"))
        h_ND = self._lab.to_device(reply.tensor("h")).requires_grad_(self._gradient_wanted)
        if len(h_ND) != int(lengths_B.sum()):
            raise MessageError(f"{site} sent {len(h_ND)} activations for lengths that sum to {int(lengths_B.sum())}")
        seed = self._lab.dropout_seed(self._lab.round, site, step)
        output = self._lab.model.forward(self.learner.tensors, lengths_B, h_ND=h_ND, span=self._span, dropout_seed=seed)
        shape = (len(lengths_B), int(lengths_B.max()))
        if reply.kind == "activations":
            self._open[site] = (h_ND, output, shape)
            return Message("activations", {"h": output})
        targets = reply.tensor("labels").long()
        if self._lab.model.task == "causal-lm":
            targets = unpack(targets[:, None] + 100, lengths_B)[:, :, 0] - 100  # padding gets -100
        loss = task_loss(output, self._lab.to_device(targets))
        self._lab.model.backward(loss, shape, span=self._span)
        return self._finish(reply, h_ND)

    def _backward(self, site: str, reply: Reply) -> Message:
        if site not in self._open:
            raise MessageError(f"{site} sent gradients for a batch that is not open")
        h_ND, output, shape = self._open.pop(site)
        if output.requires_grad:
            self._lab.model.backward(output, shape, self._lab.to_device(reply.tensor("dh")), self._span)
        return self._finish(reply, h_ND)

    def _finish(self, reply: Reply, h_ND: Tensor) -> Message:
        """Step, or wait with it for the other side's norms; then the gradient at the cut."""
        progress = self._lab.progress(self._lab.round, int(reply.fact("step")), int(reply.fact("steps")))
        tensors = {"dh": h_ND.grad} if h_ND.grad is not None else {}
        if self.clips:
            self._pending = progress
            tensors[NORMS] = self.learner.squared_norms()
        else:
            self.learner.step(progress)
        return Message("activation gradients" if "dh" in tensors else "step taken", tensors)

    def settle(self, reply: Reply | None) -> None:
        """Take the step that waited for the site's norms; without a reply its gradients are dropped."""
        if self._pending is not None:
            if reply is None:
                self.learner.drop()
            else:
                self.learner.step(self._pending, reply.tensor(NORMS))
        self._pending = None


def _lengths(site: str, reply: Reply) -> Tensor:
    try:
        lengths = [int(word) for word in str(reply.fact("lengths")).split()]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 1 or max(lengths) > 2**31:
        raise MessageError(
            f"{site} sent lengths of a batch that are no whole numbers above 0: {reply.fact('lengths')!r:.80}"
        )
    return torch.tensor(lengths)


def _pack_targets(targets: Tensor | None, lengths_B: Tensor) -> Tensor:
    """Labels as they travel, int32: [B], or for causal-lm one for each real token."""
    assert targets is not None
    packed = targets if targets.dim() == 1 else pack(targets[:, :, None], lengths_B)[:, 0]
    return packed.int()
