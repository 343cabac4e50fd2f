"""What a server checks in a site's answer before `Split` sees it: exact names, shapes, dtypes, lengths and bounds."""

from __future__ import annotations

import torch

from ..errors import MessageError
from ..message import Message, Reply
from .lab import Lab
from .split_cache import check_texts
from .split_local import auxiliary
from .split_server import lengths_of
from .split_settings import NORMS, SplitSettings


def check(split: SplitSettings, lab: Lab, site: str, sent: Message, reply: Reply) -> None:
    """Raises MessageError unless this may be the answer of that site, which has a cut of its own, to what was sent."""
    norms: tuple[str, ...] = ()
    if NORMS in reply.tensors:
        lab.guards.form(site, NORMS, reply.tensor(NORMS), (None,), torch.float64)
        if float(reply.tensor(NORMS).min()) < 0:
            raise MessageError(f"{site} sent {NORMS} below 0")
    if split.exchanges_norms(lab.train) and sent.kind in ("activation gradients", "step taken"):
        norms = (NORMS,)  # of the step before
    if reply.done:
        return _half(split, lab, site, reply, norms)
    lab.guards.count(site, reply, "step", "steps")
    if int(reply.fact("step")) >= int(reply.fact("steps")):
        raise MessageError(f"{site} sent step {reply.fact('step')} of {reply.fact('steps')}")
    if sent.kind == "activations":
        lab.guards.kind(site, reply, "activation gradients")
        lab.guards.names(site, reply, "dh")
        lab.guards.form(site, "dh", reply.tensor("dh"), sent.tensor("h").shape, lab.model.dtype)
        return lab.guards.values(site, "dh", reply.tensor("dh"))
    _activations(split, lab, site, reply, norms)


def _half(split: SplitSettings, lab: Lab, site: str, reply: Reply, norms: tuple[str, ...]) -> None:
    """The site's half of the adapter and its weight."""
    lab.guards.kind(site, reply, "adapter")
    wanted = lab.model.part(lab.model.initial, *split.layout(lab, site).site)
    wanted |= auxiliary(lab) if split.local_loss else {}
    lab.guards.names(site, reply, *wanted, *norms)
    lab.guards.like(site, {name: t for name, t in reply.tensors.items() if name != NORMS}, wanted)
    lab.guards.weight(site, reply)
    if split.cache == "adaptive" and split.labels != "server":
        loss = reply.fact("loss")
        if isinstance(loss, str) or loss < 0:
            raise MessageError(f"{site} sent the loss {loss!r:.40}; it must be a number from 0")


def _activations(split: SplitSettings, lab: Lab, site: str, reply: Reply, norms: tuple[str, ...]) -> None:
    """A row for each real token of a batch of the size and length that `train` allows."""
    guards, with_labels = lab.guards, split.labels == "server"
    guards.kind(site, reply, "activations and labels" if with_labels else "activations")
    lengths_B = lengths_of(site, reply)
    if len(lengths_B) > lab.train.batch_size or int(lengths_B.max()) > lab.train.max_length:
        raise MessageError(
            f"{site} sent a batch of {len(lengths_B)} texts of up to {int(lengths_B.max())} tokens; train allows "
            f"{lab.train.batch_size} of {lab.train.max_length}"
        )
    tokens = rows = int(lengths_B.sum())
    if split.cache != "none":
        rows = check_texts(site, reply, lengths_B, int(reply.fact("steps")) * lab.train.batch_size)
    guards.names(site, reply, *(["h"] if rows else []), *(["labels"] if with_labels else []), *norms)
    if rows:
        guards.form(site, "h", reply.tensor("h"), (rows, lab.model.width), lab.model.dtype)
        guards.values(site, "h", reply.tensor("h"))
    most = len(lengths_B) if lab.model.task == "classification" else tokens
    if with_labels:
        _labels(lab, site, reply, most)
    elif split.variant == "concatenated":
        guards.count(site, reply, "targets")
        if int(reply.fact("targets")) > most:
            raise MessageError(f"{site} sent {reply.fact('targets')} targets of a batch with at most {most}")


def _labels(lab: Lab, site: str, reply: Reply, rows: int) -> None:
    lab.guards.form(site, "labels", reply.tensor("labels"), (rows,), torch.int32)
    labels = reply.tensor("labels")
    if lab.model.task == "causal-lm":
        labels = labels[labels != -100]  # no targets
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= lab.model.classes):
        raise MessageError(f"{site} sent labels outside of 0 to {lab.model.classes - 1}")
