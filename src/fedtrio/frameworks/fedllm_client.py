"""The site's side of FedLLM beyond plain training: FedProx, SCAFFOLD, optimizers that remember, and mean gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from pydantic import Field
from torch import Tensor

from ..aggregation.sites import control, corrected, proximal
from ..data.batches import IGNORE
from ..message import Message
from ..models.train import Adapter, Learner, TrainConfig
from .fedllm_rules import Start
from .lab import Framework, Lab, Outbox, Site

CONTROL = "control."


@dataclass(frozen=True)
class Trained:
    """What a site has after its round: the tensors, and by how much its control variate moved."""

    tensors: dict[str, Tensor]
    control: dict[str, Tensor]


class Client(Framework):
    """How a site trains."""

    proximal_mu: float = Field(default=0.0, ge=0, description="μ of FedProx, which holds sites to what they were sent")
    scaffold: bool = Field(default=False, description="SCAFFOLD: control variates; for sgd at constant rates")
    keep_optimizer: bool = Field(default=False, description="sites keep their optimizer's moments from round to round")

    def trained(self, lab: Lab, site: Site, start: Start, common: Adapter) -> Trained:
        """One round of training; `common` is the server's control variate, if there is one."""
        learner = lab.learner(start.trained)
        before = learner.values() if self.proximal_mu or self.scaffold else {}
        before = {name: tensor.clone() for name, tensor in before.items()}
        own = site.memory.get("control", {}) if self.scaffold else {}
        if self.keep_optimizer:
            learner.recall(site.memory.get("optimizer", {}))
        lab.descend(learner, site, start.runs, self._correction(lab, before, own, common))
        if self.keep_optimizer:
            site.memory["optimizer"] = {**site.memory.get("optimizer", {}), **learner.memory()}
        moved: dict[str, Tensor] = {}
        if self.scaffold:
            held = {name: own.get(name, torch.zeros_like(c)).to(c) for name, c in common.items()}
            fresh = _controls(lab.train, held, common, before, learner.values(), site.data.steps)
            site.memory["control"] = fresh
            moved = {name: fresh[name] - held[name] for name in fresh}
        return Trained(learner.values(), moved)

    def _correction(self, lab: Lab, start: Adapter, own: Adapter, common: Adapter) -> Callable[[Learner], None]:
        """What is done to gradients before each step."""

        def nothing(learner: Learner) -> None:
            pass

        def hold(learner: Learner) -> None:
            for name, tensor in learner.tensors.items():
                if tensor.grad is not None:
                    tensor.grad = proximal(tensor.grad, tensor.detach(), start[name], self.proximal_mu)

        def steer(learner: Learner) -> None:
            for name, tensor in learner.tensors.items():
                if tensor.grad is not None:
                    c = lab.to_device(common[name])
                    mine = lab.to_device(own[name]) if name in own else torch.zeros_like(c)
                    tensor.grad = corrected(tensor.grad, mine, c)

        return hold if self.proximal_mu else steer if self.scaffold else nothing


def _controls(
    train: TrainConfig, own: Adapter, common: Adapter, start: Adapter, end: Adapter, steps: int
) -> dict[str, Tensor]:
    """c_k⁺ of each tensor at its own rate; without a step it stays."""
    found = {}
    for name, c in own.items():
        rate = train.rate(name)
        if steps and rate:
            x, y = start[name].to(c), end[name].to(c)
            c = control({name: c}, {name: common[name].to(c)}, {name: x}, {name: y}, steps, rate)[name]
        found[name] = c
    return found


def with_control(outbox: Outbox, common: Adapter) -> Outbox:
    """Each message with the server's control variate."""
    beside = {CONTROL + name: tensor for name, tensor in common.items()}
    made = {id(m): replace(m, tensors={**m.tensors, **beside}) for m in outbox.values()}
    return {site: made[id(message)] for site, message in outbox.items()}


def split_control(message: Message) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A message's adapter and its control variate."""
    beside = {n.removeprefix(CONTROL): t for n, t in message.tensors.items() if n.startswith(CONTROL)}
    return {name: t for name, t in message.tensors.items() if not name.startswith(CONTROL)}, beside


def mean_gradient(lab: Lab, site: Site, start: Start) -> dict[str, Tensor]:
    """The gradient of the mean loss over all of a site's data at what it was sent, for FedSGD (arXiv:1602.05629)."""
    learner = lab.learner(start.trained)
    total = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in start.trained.items()}
    for step, batch in enumerate(replace(site.data, epochs=1).batches(site.round)):
        lab.model.backward(lab.loss(start.runs(learner.tensors), batch, site, step), batch.shape)
        targets = lab.to_device(batch.targets)
        counted = len(batch) if targets.dim() == 1 else int((targets[:, 1:] != IGNORE).sum())
        for name, tensor in learner.tensors.items():
            if tensor.grad is not None:
                total[name] += tensor.grad.double().cpu() * (counted / site.data.weight)
        learner.drop()
    return {name: tensor.to(start.trained[name].dtype) for name, tensor in total.items()}
