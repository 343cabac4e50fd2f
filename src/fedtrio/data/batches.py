"""From texts to tensors: tokenize once, then collate batches as short as their longest text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from fedtrio.data.load import Rows, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = list[list[int]]

IGNORE = -100  # the target that torch's cross entropy skips


@dataclass(frozen=True)
class Encoded:
    """N tokenized examples.

    `input_ids`: N arrays int64 [T_i], T_i ≥ 1.
    `targets`: in classification int64 [N], or None on the public set; in causal-lm N arrays int64 [T_i],
    the ids themselves (not shifted) with -100 where there is no target.
    `truncated` counts the examples that were longer than the maximum.
    """

    input_ids: list[np.ndarray]
    targets: np.ndarray | list[np.ndarray] | None
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    def take(self, indices: Sequence[int] | np.ndarray) -> Encoded:
        """The examples at `indices`, in that order; `truncated` stays that of the whole."""
        targets = self.targets
        if isinstance(targets, np.ndarray):
            targets = targets[np.asarray(indices, dtype=np.int64)]
        elif targets is not None:
            targets = [targets[i] for i in indices]
        return replace(self, input_ids=[self.input_ids[i] for i in indices], targets=targets)

    @property
    def lengths(self) -> np.ndarray:
        """T_i of each example, int64 [N]."""
        return np.array([len(ids) for ids in self.input_ids], dtype=np.int64)

    def target_tokens(self) -> int:
        """What a mean loss averages over: causal-lm the targets left after the shift, else the examples."""
        if isinstance(self.targets, list):
            return sum(int((target[1:] != IGNORE).sum()) for target in self.targets)
        return len(self)


@dataclass(frozen=True)
class Batch:
    """B examples, padded on the right.

    `ids_BT` and `lengths_B` are int64; `targets` is [B], [B,T] with -100 on padding, or None (see `Encoded`);
    `texts` says which examples they are.
    """

    ids_BT: Tensor
    lengths_B: Tensor
    targets: Tensor | None
    texts: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.ids_BT)

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return self.ids_BT.shape[0], self.ids_BT.shape[1]

    def target_tokens(self) -> int:
        """What the batch's mean loss is over, as `Encoded.target_tokens`."""
        if self.targets is None or self.targets.dim() == 1:
            return len(self)
        return int((self.targets[:, 1:] != IGNORE).sum())

    @property
    def mask_BT(self) -> Tensor:
        """The attention mask, int64: 1 on tokens, 0 on padding."""
        positions_T = torch.arange(self.ids_BT.shape[1], device=self.ids_BT.device)
        return (positions_T < self.lengths_B[:, None]).long()

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        targets = None if self.targets is None else self.targets.to(device)
        return Batch(self.ids_BT.to(device), self.lengths_B.to(device), targets, self.texts)


def encode(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    max_length: int,
) -> Encoded:
    """Tokenize all rows, each to at most `max_length` tokens.

    Classification: the tokenizer's own special tokens; targets are `rows.labels`.
    causal-lm: bos, prompt, completion, eos (bos and eos where the tokenizer has them), cut on the right.
    Where there are completions, the prompt is no target. So a prompt that fills `max_length` leaves an
    example without any target, and a batch of such examples has none at all: check `target_tokens()`.
    """
    if task == "classification":
        ids, truncated = _classification_ids(rows.prompts, tokenizer, max_length)
        return Encoded([_never_empty(i, tokenizer) for i in ids], rows.labels, truncated)
    prompts = _ids(tokenizer, rows.prompts)
    completions = _ids(tokenizer, rows.completions) if rows.completions is not None else None
    bos, eos = _as_ids(tokenizer.bos_token_id), _as_ids(tokenizer.eos_token_id)
    input_ids, targets, truncated = [], [], 0
    for n, prompt in enumerate(prompts):
        whole = bos + prompt + (completions[n] if completions else []) + eos
        given = len(bos) + len(prompt) if completions else 0
        ids = _never_empty(whole[:max_length], tokenizer)
        target = ids.copy()
        target[: given if whole else 1] = IGNORE
        input_ids.append(ids)
        targets.append(target)
        truncated += len(whole) > max_length
    return Encoded(input_ids, targets, truncated)


def collate(encoded: Encoded, indices: Sequence[int] | np.ndarray, pad_id: int) -> Batch:
    """One batch of the examples at `indices`, padded to the longest of them."""
    chosen = encoded.take(indices)
    lengths = [len(ids) for ids in chosen.input_ids]
    targets = chosen.targets
    if isinstance(targets, list):
        targets = _padded(targets, max(lengths), IGNORE)
    return Batch(
        ids_BT=torch.from_numpy(_padded(chosen.input_ids, max(lengths), pad_id)),
        lengths_B=torch.tensor(lengths),
        targets=None if targets is None else torch.from_numpy(targets),
        texts=[int(i) for i in indices],
    )


def epoch_batches(
    n: int, batch_size: int, *, seed: int, round: int, site: str, epoch: int, lengths: np.ndarray | None = None
) -> list[np.ndarray]:
    """Indices 0..n-1 shuffled and cut into batches, one of them possibly smaller.

    With `lengths` [n], every eight shuffled batches are sorted by length before the cut, and the batches then shuffled:
    texts of like length meet, and little is padded. A pure function of its arguments: no order of sites, no resumed
    run and no other process can change it.
    """
    rng = np.random.default_rng([seed, round, epoch, *site.encode()])
    order = rng.permutation(n)
    if lengths is None:
        return _cut(order, batch_size)
    windows = [window[np.argsort(lengths[window], kind="stable")] for window in _cut(order, 8 * batch_size)]
    batches = [batch for window in windows for batch in _cut(window, batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def length_sorted_batches(encoded: Encoded, batch_size: int) -> list[np.ndarray]:
    """All indices, shortest examples first (stable), so that batches hold little padding; for evaluation."""
    return _cut(np.argsort(encoded.lengths, kind="stable"), batch_size)


def _classification_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[Ids, int]:
    """Texts that are too long are tokenized again: truncation knows which special tokens must stay."""
    ids = _ids(tokenizer, texts, add_special_tokens=True)
    long = [n for n, tokens in enumerate(ids) if len(tokens) > max_length]
    if long:
        cut = tokenizer([texts[n] for n in long], truncation=True, max_length=max_length)["input_ids"]
        for n, tokens in zip(long, cast(Ids, cut), strict=True):
            ids[n] = tokens
    return ids, len(long)


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], add_special_tokens: bool = False) -> Ids:
    if not texts:
        return []
    # verbose=False: texts longer than the model's context are cut by us, no need to warn of each
    return cast(Ids, tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])


def _as_ids(special: Any) -> list[int]:
    """The special token as a sequence, empty where the tokenizer has none."""
    return [] if special is None else [int(special)]


def _never_empty(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """A model needs at least one token: pad, or eos, or whatever id 0 is."""
    ids = ids or _as_ids(tokenizer.pad_token_id) or _as_ids(tokenizer.eos_token_id) or [0]
    return np.array(ids, dtype=np.int64)


def _padded(rows: list[np.ndarray], width: int, fill: int) -> np.ndarray:
    padded_BT = np.full((len(rows), width), fill, dtype=np.int64)
    for padded_T, row in zip(padded_BT, rows, strict=True):
        padded_T[: len(row)] = row
    return padded_BT


def _cut(order: np.ndarray, batch_size: int) -> list[np.ndarray]:
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
