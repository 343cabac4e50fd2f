"""KD-FedLLM, rehearsed: adapters stay, logits on the public set travel as `kd.logits` encodes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..codecs import Spec
from ..frameworks import KD
from ..frameworks.kd import logits_spec
from ..frameworks.lab import Lab
from .rehearsal import Place, Rehearsal, tensor_bytes


def round(run: Rehearsal, method: KD, cohort: Sequence[str]) -> None:
    """One round."""
    if method.protocol == "feddf":
        return _feddf(run, method, cohort)
    lab = method.of_round(run.lab, run.lab.round)
    for name in cohort:
        run.down(name, "start")
        site = run.sites[name]
        with site.meter.at(name):
            told = _site(run, method, site)
        weight = {"weight": site.data.weight}
        if told:
            run.up(name, "logits", _logits(method, lab, name), weight)
    if not len(lab.public):
        for name in cohort:
            run.up(name, "done", {}, {"weight": run.sites[name].data.weight}, done=True)
        return
    _student(run, method, lab, cohort)
    for name in cohort:
        run.down(name, "aggregated logits", _logits(method, lab, None))
        run.up(name, "done", done=True)


def _site(run: Rehearsal, method: KD, site: Place) -> bool:
    """A site's work in a round; whether it sends logits."""
    lab, round = method.of_round(site.lab, run.lab.round), run.lab.round
    digests = bool(method.distill_weight and method.distill_epochs)
    if method.protocol != "fedmd" or site.new:
        site.fit(site.model.initial, site.loads(round))
    site.new = False
    if len(lab.public):
        site.predict(lab.public)
        if method.protocol == "fedmkt":
            digests = bool(method.distill_epochs and (method.distill_weight or method.public_weight))
            if digests:
                site.predict(lab.public)
        if digests:
            site.distil(lab, round, method.distill_epochs)
    if method.protocol == "fedmd":
        site.fit(site.model.initial, site.loads(round))
    return bool(len(lab.public))


def _student(run: Rehearsal, method: KD, lab: Lab, cohort: Sequence[str]) -> None:
    """The server's work: its student learns from the aggregate; all sites' logits are held meanwhile."""
    server = run.server  # what the sites sent, and of dense logits the sum in fp64 and the teacher
    sent = [spec for name in cohort for spec in _logits(method, lab, name).values()]
    held = sum(spec.bytes for spec in sent) + 3 * logits_spec(lab).bytes
    learns = bool(method.server_epochs)
    with server.meter.at(server.name):
        if method.protocol == "fedmkt" and learns and (method.distill_weight or method.public_weight):
            server.predict(lab.public)
        server.distil(lab, lab.round, method.server_epochs, more=held)
        if method.protocol == "fedmkt":
            server.predict(lab.public)


def _logits(method: KD, lab: Lab, site: str | None) -> Mapping[str, Spec]:
    """What travels for the logits of a site, or for the aggregate."""
    spec = logits_spec(lab)
    sent = method.codec(lab, site).layout({"logits": spec})
    losses = {"losses": Spec("losses", lab.model.dtype, (len(lab.public),))} if method.protocol == "fedmkt" else {}
    return {**sent, **losses}


def _feddf(run: Rehearsal, method: KD, cohort: Sequence[str]) -> None:
    """Adapters travel; the server runs each of them on the public set, and distils."""
    lab, server = method.of_round(run.lab, run.lab.round), run.server
    for name in cohort:
        site = run.sites[name]
        run.down(name, "adapter", site.model.initial)
        with site.meter.at(name):
            site.fit(site.model.initial, site.loads(lab.round))
        run.up(name, "adapter", site.model.initial, {"weight": site.data.weight}, done=True)
    students = {id(each.model): each for each in (server, *(replace(server, lab=run.sites[s].lab) for s in cohort))}
    with server.meter.at(server.name):
        held = [run.sites[name].model.initial for name in cohort] + [each.model.initial for each in students.values()]
        adapters = sum(map(tensor_bytes, held))
        server.meter.hold(adapters)
        if len(lab.public) and method.server_epochs:
            for name in cohort:
                its = run.sites[name].lab
                students[id(its.model)].predict(method.of_round(its, lab.round).public)
            logits = (len(cohort) + 1) * logits_spec(lab).bytes
            for each in students.values():
                shared = method.of_round(each.lab, lab.round)
                each.distil(shared, lab.round, method.server_epochs, more=adapters + logits)
