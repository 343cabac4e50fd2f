"""Split-FedLLM, rehearsed batch by batch: activations up, gradients down, and a site's half at both ends of a round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..codecs import Spec
from ..frameworks import Split
from ..frameworks.split_local import NAME as AUXILIARY
from ..frameworks.split_server import shares_of
from ..frameworks.split_settings import NORMS, Layout
from ..message import Fact
from ..models.train import Adapter
from .rehearsal import Load, Place, Rehearsal
from .weightless import How

BOUND = 0.1234567890123456789  # printed as long as any loss or threshold is, at most
CACHED = "split.cache: as if no text's activations were still good, so bytes are an upper bound"


@dataclass
class Dialogue:
    """What is open with one site in a round."""

    site: Place
    layout: Layout
    loads: list[Load]
    half: Adapter  # what of the adapter the site holds
    below: bool  # whether anything trains under the cut
    norms: dict[str, Spec] = field(default_factory=dict)  # of the site's last step, sent with what comes next


def round(run: Rehearsal, method: Split, cohort: Sequence[str]) -> None:
    """One round. Sites are served one after the other, but for `concatenated`, whose shares tie them together."""
    talks = {name: _open(run, method, run.sites[name]) for name in cohort}
    steps = max((len(talk.loads) for talk in talks.values()), default=0)
    _serve_memory(run, method, talks)
    for step in range(steps):
        there = {name: talk for name, talk in talks.items() if step < len(talk.loads)}
        shares = shares_of({name: talk.loads[step].targets for name, talk in there.items()})
        for name, talk in there.items():
            share = {"share": shares[name]} if method.variant == "concatenated" and talk.layout.top else {}
            _step(run, method, talk, step, share)
    for name, talk in talks.items():
        told = {"loss": BOUND} if method.cache == "adaptive" and talk.layout.top else {}
        half = {**talk.half, **talk.norms}
        run.up(name, "adapter", half, {"weight": talk.site.data.weight, **told}, done=True)


def chosen(run: Rehearsal, method: Split) -> list[dict[str, Any]]:
    """With `split.cut: auto` which cut goes to which sites, and by which numbers; the chooser is the run's own."""
    groups: dict[Any, list[str]] = {}
    for name in sorted(run.sites) if method.cut == "auto" else ():
        groups.setdefault((method.layout(run.lab, name).bottom[1], method.device_of(name)), []).append(name)
    server = {"server_flops_per_second": method.server_flops_per_second}
    return [{"cut": cut, "sites": names, **asdict(at), **server} for (cut, at), names in groups.items()]


def _open(run: Rehearsal, method: Split, site: Place) -> Dialogue:
    """The site's half goes down, and the site prepares to train it."""
    lab, model = run.lab, site.model
    layout = method.layout(lab, site.name)
    trained = model.part(lab.initial, *layout.site)
    half = {**trained, **(_auxiliary(lab) if method.local_loss else {})}
    facts: dict[str, Fact] = {}
    if method.cache != "none":
        threshold = BOUND if method.cache == "adaptive" and not site.new else method.cache_threshold
        facts = {"cached": site.cached, "threshold": threshold}
        site.cached = lab.round
        if method.cache_threshold <= 1:
            run.bounds.add(CACHED)
    site.new = False
    run.down(site.name, "adapter", half, facts)
    cached = int(site.data.encoded.lengths.sum()) * model.width * model.dtype.itemsize if method.cache != "none" else 0
    with site.meter.at(site.name):
        site.hold(half, *layout.site, more=cached)
    return Dialogue(site, layout, site.loads(lab.round), half, bool(model.part(lab.initial, layout.bottom)))


def _step(run: Rehearsal, method: Split, talk: Dialogue, step: int, share: Mapping[str, Fact]) -> None:
    """One mini-batch: what both sides say and do."""
    site, load, name = talk.site, talk.loads[step], talk.site.name
    calm, top = How(dropout=method.cache == "none"), talk.layout.top
    facts: dict[str, Fact] = {"step": step, "steps": len(talk.loads), "lengths": " ".join(map(str, load.lengths))}
    with site.meter.at(name):
        site.forward(load, talk.layout.bottom, calm)
        if method.local_loss:
            site.forward(load, None)
            site.backward(load, None)
    if not method.local_loss or step % method.send_every == 0:
        _exchange(run, method, talk, load, facts, share)
    with site.meter.at(name):
        if top is not None:
            site.forward(load, top)
            site.backward(load, top)
        if talk.below:
            site.backward(load, talk.layout.bottom, calm)
    if method.exchanges_norms(run.lab.train):
        talk.norms = _norms(len(talk.half))


def _exchange(
    run: Rehearsal, method: Split, talk: Dialogue, load: Load, facts: dict[str, Fact], share: Mapping[str, Fact]
) -> None:
    """The messages of a mini-batch, and the server's work on it."""
    lab, name, causal = run.lab, talk.site.name, run.lab.model.task == "causal-lm"
    h = Spec("h", lab.model.dtype, (load.tokens, lab.model.width))
    down = {"dh": Spec("dh", h.dtype, h.shape)} if talk.below and not method.local_loss else {}
    norms = (
        _norms(len(run.server.model.part(lab.initial, talk.layout.server))) if method.exchanges_norms(lab.train) else {}
    )
    kind = "activation gradients" if down else "step taken"
    moved: dict[str, Fact] = {}
    if method.cache != "none":
        moved = {"texts": " ".join(map(str, load.texts)), "fresh": "1" * len(load.lengths)}
    if method.labels == "server":
        labels = Spec("labels", torch.int32, (load.tokens if causal else len(load.lengths),))
        run.up(name, "activations and labels", {"h": h, "labels": labels, **talk.norms}, {**facts, **moved})
    else:
        counted: dict[str, Fact] = {"targets": load.targets} if method.variant == "concatenated" else {}
        run.up(name, "activations", {"h": h, **talk.norms}, {**facts, **moved, **counted})
        run.down(name, "activations", {"h": h}, share)
        run.up(name, "activation gradients", {"dh": Spec("dh", h.dtype, h.shape)}, facts)
    run.down(name, kind, {**down, **norms})
    how = How(below=talk.below and not method.local_loss)
    with run.server.meter.at(run.server.name):
        if share:  # the U-shape's forward pass runs again when its gradients come
            run.server.forward(load, talk.layout.server, how, grad=False)
        run.server.forward(load, talk.layout.server, how)
        run.server.backward(load, talk.layout.server, how)


def _serve_memory(run: Rehearsal, method: Split, talks: Mapping[str, Dialogue]) -> None:
    """What the server holds: its blocks once, and the tensors that train in them once for each half."""
    model, lab = run.server.model, run.lab
    above = {name: set(lab.initial) - set(talk.half) for name, talk in talks.items()}
    halves = list(above.values()) if method.variant == "sflv1" else [set().union(*above.values())]
    with run.server.meter.at(run.server.name):
        trained = sum(lab.train.state_bytes({name: lab.initial[name] for name in half}) for half in halves)
        run.server.meter.hold(model.held_bytes(*{talk.layout.server for talk in talks.values()}) + trained)


def _norms(tensors: int) -> dict[str, Spec]:
    """Squared norms of so many gradients; of none, one zero."""
    return {NORMS: Spec(NORMS, torch.float64, (max(1, tensors),))}


def _auxiliary(lab) -> dict[str, torch.Tensor]:
    rows = lab.model.width if lab.model.task == "causal-lm" else lab.model.classes
    return {AUXILIARY: torch.empty(rows, lab.model.width, dtype=lab.model.dtype, device="meta")}
