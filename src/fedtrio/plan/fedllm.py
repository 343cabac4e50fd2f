"""FedLLM, rehearsed: what travels is what the aggregation's rule would share, and what its guard would expect back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..aggregation.lora import core_name, pairs, remainder
from ..codecs import Spec
from ..frameworks import FedLLM
from ..frameworks.fedllm import KINDS
from ..frameworks.fedllm_client import CONTROL, split_control
from ..frameworks.fedllm_merged import note_ended
from ..frameworks.lab import State
from ..models.cut import WHOLE
from .rehearsal import Place, Rehearsal, tensor_bytes
from .weightless import How

FROZEN = {"ffa": "A", "fedsvd": "A", "fedsb": "AB"}


def setup(run: Rehearsal, method: FedLLM) -> State:
    """The server's state before the first round."""
    lab = run.lab
    if method.upload == "seeds":
        return {}
    if method.aggregation == "fedsb":
        cores = {
            core_name(p): lab.initial[p.a].new_empty(lab.model.rank, lab.model.rank)
            for p in pairs(lab.initial).values()
        }
        state: State = {"adapter": {**cores, **remainder(lab.initial)}}
    else:
        state = method.rule.setup(lab)
    if method.scaffold:
        state["control"] = method.rule.sends(lab, state["adapter"], 1)
    return state


def round(run: Rehearsal, method: FedLLM, state: State, cohort: Sequence[str]) -> None:
    """One round."""
    if method.upload == "seeds":
        return _seeds(run, method, cohort)
    lab, rule = run.lab, method.rule
    outbox = method.shared(rule.share(lab, state, cohort), state)
    sent: dict[str, Mapping[str, Tensor]] = {}
    for name in cohort:
        site, message = run.sites[name], outbox[name]
        run.down(name, message.kind, message.tensors, message.facts)
        tensors, control = split_control(message)
        sent[name] = rule.expected(lab, replace(message, tensors=tensors))
        with site.meter.at(name):
            _train(site, method, lab.round, sent[name])
        answer = method.kept(sent[name]) | {CONTROL + n: t for n, t in control.items()}
        run.up(name, KINDS[method.upload], answer, {"weight": site.data.weight}, done=True)
    with run.server.meter.at(run.server.name):
        run.server.meter.hold(sum(map(tensor_bytes, sent.values())) + sum(map(tensor_bytes, state.values())))
    if rule.merges:
        rule.aggregate(lab, state, sent, {name: float(run.sites[name].data.weight) for name in cohort})
    if rule.remembers:
        note_ended(lab, state, cohort)


def _train(site: Place, method: FedLLM, round: int, expected: Mapping[str, Tensor]) -> None:
    """A site's round on what it was sent; what trains is what comes back, and what it keeps to itself."""
    own = (
        site.lab.initial if method.aggregation == "fedsa" else remainder(site.lab.initial) if method.local_heads else {}
    )
    frozen = FROZEN.get(method.aggregation, "")
    if method.aggregation == "rolora":
        frozen = "A" if site.lab.round % 2 else "B"
    data = replace(site.data, epochs=1) if method.upload == "gradients" else site.data
    place = replace(site, data=data)
    place.fit({**own, **expected}, place.loads(round), How(frozen, rank=site.lab.rank(site.name)))


def _seeds(run: Rehearsal, method: FedLLM, cohort: Sequence[str]) -> None:
    """FedKSeed: the sums of all candidate seeds down, those that were touched up; two forward passes for each batch."""
    lab, number = run.lab, method.candidate_seeds
    for name in cohort:
        site, dtype = run.sites[name], lab.model.dtype
        run.down(name, "seed sums", {"sums": Spec("sums", dtype, (number,))})
        loads = site.loads(lab.round)
        with site.meter.at(name):
            site.meter.hold(site.model.held_bytes(WHOLE) + 2 * tensor_bytes(site.model.initial))
            for load in loads:
                site.forward(load, grad=False)
                site.forward(load, grad=False)
        touched = len({lab.seed_of(lab.round, f"seeds {name}", step) % number for step in range(len(loads))})
        told = {"seeds": Spec("seeds", torch.int32, (touched,)), "sums": Spec("sums", dtype, (touched,))}
        run.up(name, "seed sums", told if touched else {}, {"weight": site.data.weight}, done=True)
