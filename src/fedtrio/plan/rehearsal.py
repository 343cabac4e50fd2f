"""What the rehearsal of a run is made of: messages that are measured and passes that are counted, but never made.

Ledger and meter are those of a run, so their totals are added up and named by `result.costs` as those of a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from ..codecs import Spec
from ..coding import Coding
from ..data.batches import IGNORE, Encoded, length_sorted_batches
from ..data.private import PrivateData
from ..frameworks.lab import Lab
from ..ledger import Ledger
from ..message import Fact
from ..meter import Cost, Meter
from ..models.cut import WHOLE, Span
from ..models.train import Adapter
from .frames import frame_bytes, payload_bytes
from .weightless import How, Weightless

SERVER = "server"
NOTHING: Mapping[str, Any] = {}
PLAIN = How()


class Costs(dict[Any, Cost]):
    """What passes cost, by the meter's keys; those that nobody has asked for yet are found when they are."""

    def __contains__(self, key: object) -> bool:
        if not super().__contains__(key):
            assert isinstance(key, tuple)
            _, span, shape, grad, how, model = key
            forward, backward = model.cost(shape, span, how) if span else model.auxiliary_cost(shape)
            self["forward", *key[1:]] = forward if grad else Cost(forward.flops, 0)
            self["backward", *key[1:]] = Cost(backward, 0)
        return True


@dataclass(frozen=True)
class Load:
    """One mini-batch as far as costs go: lengths of its texts, which they are, and how many targets it has."""

    lengths: tuple[int, ...]
    texts: tuple[int, ...] = ()
    targets: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return len(self.lengths), max(self.lengths)

    @property
    def tokens(self) -> int:
        """Without padding."""
        return sum(self.lengths)


def loads_of(encoded: Encoded, orders: Iterable[np.ndarray]) -> Iterator[Load]:
    """The mini-batches of these orders."""
    lengths, targets = encoded.lengths, targets_of(encoded)
    for indices in orders:
        yield Load(tuple(lengths[indices].tolist()), tuple(indices.tolist()), int(targets[indices].sum()))


def targets_of(encoded: Encoded) -> np.ndarray:
    """What each example adds to the number that a mean loss is over."""
    if not isinstance(encoded.targets, list):
        return np.ones(len(encoded), dtype=np.int64)
    return np.array([int((target[1:] != IGNORE).sum()) for target in encoded.targets], dtype=np.int64)


class DryLab(Lab):
    """A lab whose tensors have shapes and no values."""

    model: Weightless  # type: ignore[reportIncompatibleVariableOverride]

    @property
    def initial(self) -> dict[str, Tensor]:
        """The adapter that all start from."""
        return self.model.initial


@dataclass
class Place:
    """A site, or the server: its model and settings, its examples, and what it keeps between rounds."""

    name: str
    lab: DryLab
    data: PrivateData
    meter: Meter
    new: bool = True  # whether it has taken part in no round yet
    cached: int = 0  # of which round its copy at the server is

    @property
    def model(self) -> Weightless:
        """Its model."""
        return self.lab.model

    def loads(self, round: int) -> list[Load]:
        """Its mini-batches of a round."""
        return list(loads_of(self.data.encoded, self.data.orders(round)))

    # Work, as `Lab` would have it done ------------------------------------------------------------------------------

    def hold(self, trained: Adapter, *spans: Span, more: int = 0) -> None:
        """It is about to train these tensors."""
        self.meter.hold(self.model.held_bytes(*(spans or (WHOLE,))) + self.lab.train.state_bytes(trained) + more)

    def forward(self, load: Load, span: Span | None = WHOLE, how: How = PLAIN, grad: bool = True) -> None:
        """A forward pass over a span; None: the auxiliary head of split.local_loss."""
        with self.meter.work(("forward", span, load.shape, grad, how, self.model), set):
            pass

    def backward(self, load: Load, span: Span | None = WHOLE, how: How = PLAIN) -> None:
        """The backward pass of the same."""
        with self.meter.work(("backward", span, load.shape, True, how, self.model), set):
            pass

    def fit(self, trained: Adapter, loads: Iterable[Load], how: How = PLAIN, more: int = 0) -> None:
        """Train on mini-batches, forward and backward; `more` bytes are held beside."""
        self.hold(trained, more=more)
        for load in loads:
            self.forward(load, how=how)
            self.backward(load, how=how)

    def predict(self, public: Encoded) -> None:
        """Logits on the public set."""
        for load in loads_of(public, length_sorted_batches(public, self.lab.train.batch_size)):
            self.forward(load, grad=False)

    def distil(self, lab: Lab, round: int, epochs: int, more: int = 0) -> None:
        """Train on the public set of a round."""
        loads = loads_of(lab.public, lab.public_batches(round, self.name, epochs))
        self.fit(self.model.initial, loads, more=more)


def tensor_bytes(tensors: Adapter) -> int:
    """Bytes of the tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@dataclass
class Rehearsal:
    """One run of one framework, rehearsed."""

    lab: DryLab
    sites: dict[str, Place]
    server: Place
    coding: Coding
    ledger: Ledger = field(default_factory=Ledger)
    bounds: set[str] = field(default_factory=set)  # why some numbers are upper bounds

    def down(
        self, site: str, kind: str, tensors: Mapping[str, Tensor | Spec] = NOTHING, facts: Mapping[str, Fact] = NOTHING
    ) -> None:
        """The server says something to a site."""
        self._crosses(site, "down", kind, tensors, facts)

    def up(
        self, site: str, kind: str, tensors: Mapping[str, Tensor | Spec] = NOTHING,
        facts: Mapping[str, Fact] = NOTHING, done: bool = False,
    ) -> None:  # fmt: skip
        """A site says something; `done`: its last word of the round."""
        self._crosses(site, "up", kind, tensors, facts, done)

    def _crosses(
        self, site: str, way: str, kind: str, tensors: Mapping[str, Tensor | Spec], facts: Mapping[str, Fact],
        done: bool = False,
    ) -> None:  # fmt: skip
        codec = self.coding.codec(kind, way)
        sent = codec.layout(tensors) if codec is not None else tensors
        specs = tuple(t if isinstance(t, Spec) else Spec.of(name, t) for name, t in sent.items())
        specs = tuple(replace(spec, name=name) for name, spec in zip(sent, specs, strict=True))
        nbytes = frame_bytes(specs, kind, self.lab.round, done, facts)
        self.ledger.count(self.lab.round, site, way, kind, nbytes, payload_bytes(specs))
