"""What a framework works with: the model, the public set and the settings of one run, and what a framework is."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ..data.batches import IGNORE, Batch, Encoded, collate, epoch_batches, length_sorted_batches
from ..data.private import PrivateData
from ..errors import MessageError
from ..message import Message, Reply
from ..models.adapter import AdaptedModel
from ..models.cut import WHOLE, Span
from ..models.lora import LoraConfig
from ..models.train import Adapter, Learner, TrainConfig, distillation_loss, task_loss
from .guards import Guards

State = dict[str, Adapter]
Outbox = dict[str, Message]
Inbox = dict[str, Reply]
ServerProgram = Generator[Outbox, Inbox, None]
ClientDialogue = Generator[Message, Reply, Message]
ClientProgram = Message | ClientDialogue


class Site(Protocol):
    """A client as its framework sees it; `memory` lasts from round to round and never leaves the site."""

    name: str
    data: PrivateData
    memory: dict[str, Any]
    round: int
    secret: bytes  # known to no one else; empty in a simulation


class Framework(BaseModel):
    """A framework is its hyper-parameters and four methods; every `yield` is one crossing of the wire."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    federated: ClassVar[bool] = True  # False for the yardsticks, in which nothing would cross a wire
    pooled: ClassVar[bool] = False  # True where all data lie in one place
    needs_models: ClassVar[bool] = False  # True where the server runs the models of sites that hold another one

    @property
    def wants_weights(self) -> bool:
        """Whether the server must know what all sites weigh before the first round."""
        return False

    def setup(self, lab: Lab) -> State:
        """The server's state before the first round, as named groups of named tensors."""
        raise NotImplementedError

    def server(self, lab: Lab, state: State, cohort: Sequence[str]) -> ServerProgram:
        """One round at the server."""
        raise NotImplementedError

    def client(self, lab: Lab, site: Site, first: Reply) -> ClientProgram:
        """One round at a site: an answer, or a generator that holds a dialogue and returns its last answer."""
        raise NotImplementedError

    def check(self, lab: Lab, site: str, sent: Message, reply: Reply) -> None:
        """Raises MessageError for an answer to `sent` that the server's program must not see."""

    def adapter(self, lab: Lab, state: State) -> Adapter | None:
        """What is evaluated, saved and shipped; None where each site keeps its own."""
        raise NotImplementedError

    def own_adapter(self, lab: Lab, site: Site) -> Adapter | None:
        """The model that a site keeps to itself; None where all hold the common one."""
        return None

    def adapter_of(self, state: State, site: str) -> Adapter | None:
        """What the server has for a site that holds another model than the common one; None where it has nothing."""
        return None

    def shipped(self, lab: Lab, state: State) -> Adapter | None:
        """What is saved: an adapter that alone, beside the base, gives what `adapter` gives."""
        return self.adapter(lab, state)

    def check_sites(self, sites: Sequence[str], cohort: int) -> None:
        """Raises ConfigError where the method can't work with these sites, of which `cohort` meet in a round."""

    def cuts(self, depth: int) -> tuple[int, ...]:
        """Blocks before which the model is cut."""
        return ()

    def foresee(self, lab: Lab, sites: Sequence[str]) -> list[str]:
        """What a user should know before a run with these sites."""
        return []

    def model_of(self, site: str) -> tuple[str, LoraConfig | None] | None:
        """Model and adapter of a site that holds another than the common one."""
        return None

    def admit(self, model: AdaptedModel, train: TrainConfig, sites: Sequence[str]) -> None:
        """Raises ConfigError where the settings don't fit the model, at these sites (empty: not known yet)."""


@dataclass
class Lab:
    """One run's model and settings, the same at the server and at every site."""

    model: AdaptedModel
    train: TrainConfig
    public: Encoded
    seed: int
    rounds: int
    pad_id: int
    abreast: int | None = None  # sites that may hold a dialogue at once, a matter of memory alone; None: all
    round: int = 0
    sites: Sequence[str] = ()  # all that belong to the run; only a server knows them …
    ranks: Mapping[str, int] = field(default_factory=dict)  # … the ranks of those that have their own …
    weights: Mapping[str, float] = field(default_factory=dict)  # … and what each of them weighs
    guards: Guards = field(default_factory=Guards)
    hold: Callable[[int], None] = field(default=lambda nbytes: None)  # tells the meter what a site holds
    unlike: Callable[[str], Lab | None] = field(default=lambda site: None)  # of a site that holds another model

    def of_site(self, site: str) -> Lab:
        """The lab of the model that a site holds."""
        return self.unlike(site) or self

    # Training ----------------------------------------------------------------------------------------------------

    def learner(self, tensors: Adapter, *spans: Span, learning_rate: float | None = None) -> Learner:
        """Tensors about to be trained by a side that holds those spans of the model (default: all of it)."""
        tensors = {name: self.to_device(tensor) for name, tensor in tensors.items()}
        learner = Learner(tensors, self.train, learning_rate)
        self.hold(self.model.held_bytes(*(spans or (WHOLE,))) + learner.nbytes)
        return learner

    def progress(self, round: int, step: int, steps: int) -> float:
        """The share of the whole run that is done before this step."""
        return (round - 1 + step / max(1, steps)) / self.rounds

    def dropout_seed(self, round: int, site: str, step: int) -> int | None:
        """Names the dropout masks of one step, the same at both sides of a cut; None where there is no dropout."""
        return self.seed_of(round, site, step) if self.model.has_dropout else None

    def seed_of(self, round: int, what: str, step: int) -> int:
        """A pure function of the run's seed and these words."""
        words = [self.seed, round, step, *what.encode()]
        return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(16))

    def fit(self, adapter: Adapter, site: Site) -> dict[str, Tensor]:
        """Train a whole model on a site's data for one round; an adapter like the one given."""
        learner = self.learner(adapter)
        self.descend(learner, site)
        return learner.values()

    def descend(
        self,
        learner: Learner,
        site: Site,
        runs: Callable[[Adapter], Adapter] = lambda trained: trained,
        correct: Callable[[Learner], None] = lambda learner: None,
    ) -> None:
        """One round of steps on a site's data.

        `runs` gives what the model runs with from what trains, and `correct` changes gradients before a step.
        """
        for step, batch in enumerate(site.data.batches(site.round)):
            loss = self.loss(runs(learner.tensors), batch, site, step)
            self.model.backward(loss, batch.shape)
            correct(learner)
            learner.step(self.progress(site.round, step, site.data.steps))

    def loss(self, adapter: Adapter, batch: Batch, site: Site, step: int) -> Tensor:
        """The mean loss of one of a site's batches, with the dropout of that step."""
        seed = self.dropout_seed(site.round, site.name, step)
        logits = self.model.forward(adapter, batch.lengths_B, batch.ids_BT, dropout_seed=seed)
        return task_loss(logits, self.to_device(batch.targets))

    # The public set ------------------------------------------------------------------------------------------------

    def predict(self, adapter: Adapter) -> Tensor:
        """Logits on the public set without dropout: [M, C], or for causal-lm a row for each target token."""
        rows: dict[int, Tensor] = {}
        with torch.no_grad():
            for indices in length_sorted_batches(self.public, self.train.batch_size):
                batch = collate(self.public, indices, self.pad_id)
                logits = self._predicted(self.model.forward(adapter, batch.lengths_B, batch.ids_BT), batch)
                rows.update(zip(indices.tolist(), logits.split(self._rows_of(batch)), strict=True))
        return torch.cat([rows[i] for i in range(len(self.public))])

    def distil(
        self,
        adapter: Adapter,
        teacher: Tensor,
        round: int,
        who: str,
        epochs: int,
        temperature: float,
        weight: float | Tensor = 1.0,
        learning_rate: float | None = None,
        on_targets: float = 0.0,
        rest: bool = False,
    ) -> dict[str, Tensor]:
        """Train towards the teacher's logits (as `predict` lays them out) by weight · T²·KL; an adapter.

        A weight for each row (a tensor) is also one for each text's part in the mean. `on_targets` is the weight of
        the cross-entropy on the public texts themselves, for causal-lm; of `rest` see `distillation_loss`.
        """
        learner = self.learner(adapter, learning_rate=learning_rate)
        batch_size = self.train.batch_size
        steps = epochs * -(-len(self.public) // batch_size)
        rows_of = torch.arange(len(teacher)).split(self.public_rows)
        for step, indices in enumerate(self.public_batches(round, who, epochs)):
            batch = collate(self.public, indices, self.pad_id)
            rows = torch.cat([rows_of[i] for i in indices])
            wanted = teacher[rows].to(self.model.device)
            seed = self.dropout_seed(round, f"public {who}", step)
            logits = self.model.forward(learner.tensors, batch.lengths_B, batch.ids_BT, dropout_seed=seed)
            student = self._predicted(logits, batch)
            if isinstance(weight, Tensor):
                loss = distillation_loss(student, wanted, temperature, self.to_device(weight[rows]), rest)
            else:
                loss = weight * distillation_loss(student, wanted, temperature, rest=rest)
            if on_targets:
                loss = loss + on_targets * task_loss(logits, self.to_device(batch.targets))
            self.model.backward(loss, batch.shape)
            learner.step(self.progress(round, step, steps))
        return learner.values()

    def public_batches(self, round: int, who: str, epochs: int) -> Iterator[np.ndarray]:
        """Which public texts are in each mini-batch of distillation."""
        lengths = self.public.lengths if self.train.group_by_length else None
        for epoch in range(epochs):
            order = {"seed": self.seed, "round": round, "epoch": epoch}
            yield from epoch_batches(
                len(self.public), self.train.batch_size, **order, site=f"public {who}", lengths=lengths
            )

    @property
    def public_rows(self) -> list[int]:
        """Rows of logits for each public text: one, or for causal-lm one for each target token."""
        targets = self.public.targets
        return [int((t[1:] != IGNORE).sum()) for t in targets] if isinstance(targets, list) else [1] * len(self.public)

    def _rows_of(self, batch: Batch) -> list[int]:
        """Rows of logits for each example: one, or for causal-lm one for each target token."""
        if batch.targets is None or batch.targets.dim() == 1:
            return [1] * len(batch)
        return (batch.targets[:, 1:] != -100).sum(1).tolist()

    def _predicted(self, logits: Tensor, batch: Batch) -> Tensor:
        """Logits as rows: unchanged for classification, those that predict a target token for causal-lm."""
        if logits.dim() == 2:
            return logits
        assert batch.targets is not None
        return logits[:, :-1][self.to_device(batch.targets)[:, 1:] != -100]

    def check_public(self, logits: Tensor, who: str) -> None:
        """Raises MessageError unless there is a row of logits for each row of the public set."""
        expected = (self.public.target_tokens(), self.model.classes)
        if logits.shape != expected:
            raise MessageError(f"{who} sent logits {tuple(logits.shape)}; this public set wants {expected}")

    # What servers and sites share -------------------------------------------------------------------------------------

    @property
    def initial(self) -> dict[str, Tensor]:
        """The adapter that all start from, where messages and states are: on the CPU."""
        return {name: tensor.cpu() for name, tensor in self.model.initial.items()}

    def rank(self, site: str) -> int:
        """The rank of a site's adapter."""
        return self.ranks.get(site, self.model.rank)

    def scale(self, site: str) -> float:
        """The scale of a site's adapter."""
        return self.model.scale(self.rank(site))

    # Small things ----------------------------------------------------------------------------------------------------

    def to_device(self, tensor: Tensor | None) -> Tensor:
        """The tensor where the model is."""
        assert tensor is not None
        return tensor.to(self.model.device)

    def shuffled(self, sites: Sequence[str]) -> list[str]:
        """The sites in an order that is a pure function of (seed, round)."""
        order = np.random.default_rng([self.seed, self.round, 0x6F72]).permutation(len(sites))
        return [sorted(sites)[i] for i in order]


def weights_of(inbox: Mapping[str, Reply]) -> dict[str, float]:
    """The `weight` fact of each site. Raises MessageError where one is no number above 0."""
    weights = {site: reply.fact("weight") for site, reply in inbox.items()}
    for site, weight in weights.items():
        if isinstance(weight, str) or weight <= 0:
            raise MessageError(f"{site} sent the weight {weight!r}; it must be a number above 0")
    return {site: float(weight) for site, weight in weights.items()}
