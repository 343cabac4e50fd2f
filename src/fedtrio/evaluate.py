"""Evaluation of an adapter on the test set."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .data.batches import IGNORE, Encoded, collate, length_sorted_batches
from .models.adapter import AdaptedModel
from .models.train import Adapter


@dataclass(frozen=True)
class Scores:
    """Accuracy and mean cross-entropy: over examples, or for causal-lm over target tokens.

    `right` has a bit for each example, in their order and from the highest of the first byte on: 1 where it was
    answered right. Empty for causal-lm, and in what a message says.
    """

    accuracy: float
    loss: float
    counted: int
    right: bytes = b""

    @property
    def perplexity(self) -> float:
        """e^loss."""
        return math.exp(min(self.loss, 700.0))

    def facts(self) -> dict[str, float]:
        """As a message says it: a loss that is no number is left out."""
        loss = {"loss": self.loss} if math.isfinite(self.loss) else {}
        return {"accuracy": self.accuracy, "counted": self.counted} | loss

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Scores:
        """Back from `facts`."""
        return cls(float(facts["accuracy"]), float(facts.get("loss", math.nan)), int(facts["counted"]))


def evaluate(model: AdaptedModel, adapter: Adapter, test: Encoded, pad_id: int, batch_size: int = 64) -> Scores:
    """Run the test set through the model without dropout; sums are kept in fp64."""
    hits, loss, counted = 0, 0.0, 0
    right = np.zeros(len(test) if model.task == "classification" else 0, dtype=bool)
    with torch.no_grad():
        for indices in length_sorted_batches(test, batch_size):
            batch = collate(test, indices, pad_id)
            logits = model.forward(adapter, batch.lengths_B, batch.ids_BT)
            assert batch.targets is not None
            targets = batch.targets.to(logits.device)
            if logits.dim() == 3:
                kept = targets[:, 1:] != IGNORE
                logits, targets = logits[:, :-1][kept], targets[:, 1:][kept]
            hit = logits.argmax(-1) == targets
            if len(right):
                right[indices] = hit.cpu().numpy()
            hits += int(hit.sum())
            loss += float(F.cross_entropy(logits, targets, reduction="sum"))
            counted += len(targets)
    return Scores(hits / max(1, counted), loss / max(1, counted), counted, np.packbits(right).tobytes())
