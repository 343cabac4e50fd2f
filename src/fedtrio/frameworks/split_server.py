"""The server's side of the cut: its blocks with their optimizer, one for each site in sflv1, one for all else."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import MessageError
from ..message import Message, Reply
from ..models.cut import pack, unpack
from ..models.train import Adapter, Learner, task_loss
from .lab import Inbox, Lab, Outbox
from .split_settings import NORMS, Layout, SplitSettings

Pass = tuple[Tensor, Tensor, tuple[int, int]]  # activations received, what the server's blocks made of them, (B, T)


class ServerHalf:
    """The server's blocks and the tensors in them that train; `answer` goes on with one site, batch by batch.

    With one cut for each site a shared half holds all that lies above the lowest, and each site passes through what
    lies above its own.
    """

    def __init__(self, split: SplitSettings, lab: Lab, tensors: Adapter) -> None:
        self._split, self._lab = split, lab
        self._open: dict[str, Pass | Reply] = {}  # the U-shape's forward passes, or what to run them again from
        self._below: dict[Layout, bool] = {}  # whether anything trains at the site
        self._pending: float | None = None  # progress of a step that waits for the sites' norms
        self.learner = Learner({name: lab.to_device(t) for name, t in tensors.items()}, lab.train)
        self.clips = split.exchanges_norms(lab.train)
        self.losses: list[Tensor] = []  # of each batch, where the labels are here

    def answer(self, site: str, reply: Reply) -> Message:
        """Go on with a site's batch: forward, backward or both, whatever its message allows."""
        if reply.kind == "activations":
            self._open[site] = one = self._forward(site, reply)
            return Message("activations", {"h": one[1]})
        return self._step({site: reply}, {site: self._backward(site, reply)})[site]

    def answer_together(self, inbox: Inbox) -> Outbox:
        """One step over the batches of all, whose loss is the mean over their union: Σ_k Σ_i ℓ_i / Σ_k B_k.

        They pass one after the other and their gradients add up, which is what one large batch would give; so but one
        is in memory at a time. In the U-shape, where gradients come a message later, the forward pass runs again then.
        """
        if all(reply.kind == "activations" for reply in inbox.values()):
            outbox = {}
            shares = shares_of({site: int(reply.fact("targets")) for site, reply in inbox.items()})
            for site, reply in inbox.items():
                self._open[site] = reply
                with torch.no_grad():
                    outbox[site] = Message("activations", {"h": self._forward(site, reply)[1]}, {"share": shares[site]})
            return outbox
        if all(reply.kind == "activation gradients" for reply in inbox.values()):
            return self._step(inbox, {site: self._backward(site, reply) for site, reply in inbox.items()})
        shares = shares_of({site: self._targets(site, reply) for site, reply in inbox.items()})
        return self._step(inbox, {site: self._backward(site, reply, shares[site]) for site, reply in inbox.items()})

    def settle(self, *replies: Reply | None) -> None:
        """Take the step that waited for the sites' norms; where no site replies its gradients are dropped."""
        if self._pending is not None:
            norms = [reply.tensor(NORMS) for reply in replies if reply is not None]
            if norms:
                self.learner.step(self._pending, torch.cat(norms))
            else:
                self.learner.drop()
        self._pending = None

    def take_over(self, tensors: Adapter) -> None:
        """Go on from a site's values in layers that this half holds too."""
        with torch.no_grad():
            for name in self.learner.tensors.keys() & tensors.keys():
                self.learner.tensors[name].copy_(self._lab.to_device(tensors[name]))

    def _forward(self, site: str, reply: Reply) -> Pass:
        lab, layout = self._lab, self._split.layout(self._lab, site)
        lengths_B = lengths_of(site, reply)
        if layout not in self._below:
            self._below[layout] = bool(lab.model.part(lab.model.initial, layout.bottom))
        wanted = self._below[layout] and not self._split.local_loss
        h_ND = lab.to_device(reply.tensor("h")).requires_grad_(wanted)
        if len(h_ND) != int(lengths_B.sum()):
            raise MessageError(f"{site} sent {len(h_ND)} activations for lengths that sum to {int(lengths_B.sum())}")
        seed = lab.dropout_seed(lab.round, site, int(reply.fact("step")))
        tensors, span = self.learner.tensors, layout.server
        output = lab.model.forward(tensors, lengths_B, h_ND=h_ND, span=span, dropout_seed=seed)
        return h_ND, output, (len(lengths_B), int(lengths_B.max()))

    def _backward(self, site: str, reply: Reply, share: float = 1.0) -> Tensor:
        """Gradients into the learner; the activations, with theirs."""
        lab, span = self._lab, self._split.layout(self._lab, site).server
        if reply.kind == "activation gradients":
            if site not in self._open:
                raise MessageError(f"{site} sent gradients for a batch that is not open")
            opened = self._open.pop(site)
            h_ND, output, shape = self._forward(site, opened) if isinstance(opened, Reply) else opened
            if output.requires_grad:
                lab.model.backward(output, shape, lab.to_device(reply.tensor("dh")), span)
            return h_ND
        h_ND, output, shape = self._forward(site, reply)
        targets = reply.tensor("labels").long()
        if lab.model.task == "causal-lm":
            targets = unpack(targets[:, None] + 100, lengths_of(site, reply))[:, :, 0] - 100  # padding gets -100
        loss = task_loss(output, lab.to_device(targets))
        lab.model.backward(share * loss, shape, span=span)
        self.losses.append(loss.detach())
        return h_ND

    def _step(self, replies: Mapping[str, Reply], h_of: Mapping[str, Tensor]) -> Outbox:
        """Step, or wait with it for the other sides' norms; then each site's gradient at the cut."""
        longest = max(replies.values(), key=lambda reply: int(reply.fact("steps")))
        progress = self._lab.progress(self._lab.round, int(longest.fact("step")), int(longest.fact("steps")))
        norms = {NORMS: self.learner.squared_norms()} if self.clips else {}
        if self.clips:
            self._pending = progress
        else:
            self.learner.step(progress)
        return {site: _gradients(h_ND, norms) for site, h_ND in h_of.items()}

    def _targets(self, site: str, reply: Reply) -> int:
        """What the batch's mean loss is over: texts, or target tokens after the shift."""
        labels = reply.tensor("labels")
        if self._lab.model.task == "classification":
            return len(labels)
        first_B = lengths_of(site, reply).cumsum(0) - lengths_of(site, reply)
        return int((labels != -100).sum() - (labels[first_B] != -100).sum())


def _gradients(h_ND: Tensor, norms: Mapping[str, Tensor]) -> Message:
    if h_ND.grad is None:
        return Message("step taken", norms)
    return Message("activation gradients", {"dh": h_ND.grad, **norms})


def shares_of(targets: Mapping[str, int]) -> dict[str, float]:
    """By what each site's mean loss counts in the mean over the union; a mean over nothing is over one, as the loss."""
    total = max(1, sum(targets.values()))
    return {site: max(1, number) / total for site, number in targets.items()}


def lengths_of(site: str, reply: Message) -> Tensor:
    """[B] as the message says them. Raises MessageError where they are no lengths."""
    try:
        lengths = [int(word) for word in str(reply.fact("lengths")).split()]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 1 or max(lengths) > 2**31:
        raise MessageError(
            f"{site} sent lengths of a batch that are no whole numbers above 0: {reply.fact('lengths')!r:.80}"
        )
    return torch.tensor(lengths)


def pack_targets(targets: Tensor | None, lengths_B: Tensor) -> Tensor:
    """Labels as they travel, int32: [B], or for causal-lm one for each real token."""
    assert targets is not None
    packed = targets if targets.dim() == 1 else pack(targets[:, :, None], lengths_B)[:, 0]
    return packed.int()
