"""A site's own examples, as batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .batches import Batch, Encoded, collate, epoch_batches


@dataclass(frozen=True)
class PrivateData:
    """The examples of one site and how it goes through them; only what a framework sends ever leaves."""

    encoded: Encoded
    site: str
    seed: int
    batch_size: int
    epochs: int
    pad_id: int
    group_by_length: bool = False

    def __len__(self) -> int:
        return len(self.encoded)

    @property
    def weight(self) -> int:
        """What p_k counts: examples, or for causal-lm the target tokens that its mean loss is over."""
        return self.encoded.target_tokens()

    @property
    def steps(self) -> int:
        """Mini-batches in a round."""
        return self.epochs * -(-len(self) // self.batch_size)

    def batches(self, round: int) -> Iterator[Batch]:
        """The mini-batches of a round, a pure function of (seed, round, site)."""
        for indices in self.orders(round):
            yield collate(self.encoded, indices, self.pad_id)

    def orders(self, round: int) -> Iterator[np.ndarray]:
        """Which examples are in each mini-batch of a round."""
        lengths = self.encoded.lengths if self.group_by_length else None
        order = {"seed": self.seed, "round": round, "site": self.site}
        for epoch in range(self.epochs):
            yield from epoch_batches(len(self), self.batch_size, **order, epoch=epoch, lengths=lengths)
