"""Tokens, targets and padding, by hand with a tokenizer of nine words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedtrio.data.batches import (
    IGNORE,
    Encoded,
    collate,
    encode,
    epoch_batches,
    length_sorted_batches,
)
from fedtrio.data.load import Rows

torch.set_num_threads(1)

PAD, BOS, EOS, CLS, SEP = range(5)
A, B, C = 6, 7, 8
VOCABULARY = {
    "[PAD]": PAD,
    "[BOS]": BOS,
    "[EOS]": EOS,
    "[CLS]": CLS,
    "[SEP]": SEP,
    "[UNK]": 5,
    "a": A,
    "b": B,
    "c": C,
}


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if "cls_token" in special:
        words.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", **special)


@pytest.fixture(scope="module")
def encoder_tokenizer():
    return make_tokenizer(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


@pytest.fixture(scope="module")
def decoder_tokenizer():
    return make_tokenizer(bos_token="[BOS]", eos_token="[EOS]")


def lists(arrays) -> list[list[int]]:
    return [a.tolist() for a in arrays]


class TestEncode:
    def test_classification(self, encoder_tokenizer):
        rows = Rows(["a b", "c", "a b c a b"], labels=np.array([1, 0, 1]))
        encoded = encode(rows, encoder_tokenizer, "classification", max_length=5)
        assert lists(encoded.input_ids) == [[CLS, A, B, SEP], [CLS, C, SEP], [CLS, A, B, C, SEP]]
        assert encoded.targets is rows.labels
        assert (encoded.truncated, encoded.target_tokens(), len(encoded)) == (1, 3, 3)

    def test_public_classification_has_no_targets(self, encoder_tokenizer):
        encoded = encode(Rows(["a", "b"]), encoder_tokenizer, "classification", 8)
        assert encoded.targets is None
        assert collate(encoded, [0, 1], PAD).targets is None
        assert encoded.take([1]).targets is None

    def test_plain_text(self, decoder_tokenizer):
        encoded = encode(Rows(["a b", "c"]), decoder_tokenizer, "causal-lm", 8)
        assert lists(encoded.input_ids) == [[BOS, A, B, EOS], [BOS, C, EOS]]
        assert lists(encoded.targets) == lists(encoded.input_ids)
        assert encoded.target_tokens() == 3 + 2

    def test_the_prompt_is_no_target(self, decoder_tokenizer):
        rows = Rows(["a b", "", "a b c"], ["c", "c", "a"])
        encoded = encode(rows, decoder_tokenizer, "causal-lm", max_length=4)
        assert lists(encoded.input_ids) == [[BOS, A, B, C], [BOS, C, EOS], [BOS, A, B, C]]
        none = [IGNORE] * 4
        assert lists(encoded.targets) == [[*none[:3], C], [IGNORE, C, EOS], none]
        assert (encoded.truncated, encoded.target_tokens()) == (2, 3)

    def test_no_special_tokens_at_all(self):
        encoded = encode(Rows(["a b", "   "]), make_tokenizer(), "causal-lm", 8)
        assert lists(encoded.input_ids) == [[A, B], [0]]
        assert lists(encoded.targets) == [[A, B], [IGNORE]]

    def test_never_empty(self):
        tokenizer = make_tokenizer(eos_token="[EOS]")
        assert lists(encode(Rows([" "]), tokenizer, "classification", 8).input_ids) == [[EOS]]
        assert lists(encode(Rows([" "]), tokenizer, "causal-lm", 8).input_ids) == [[EOS]]

    def test_no_rows(self, encoder_tokenizer, decoder_tokenizer):
        assert len(encode(Rows([]), encoder_tokenizer, "classification", 8)) == 0
        assert len(encode(Rows([], []), decoder_tokenizer, "causal-lm", 8)) == 0

    def test_the_tokenizer_is_called_for_all_rows_at_once(self, encoder_tokenizer):
        calls = []

        class Counting:
            pad_token_id, eos_token_id = PAD, None

            def __call__(self, texts, **options):
                calls.append(len(texts))
                return encoder_tokenizer(texts, **options)

        encode(Rows(["a b c"] * 50), Counting(), "classification", 4)
        assert calls == [50, 50]  # the second time for those that are too long


class TestCollate:
    encoded = Encoded([np.array([1, 2, 3]), np.array([4]), np.array([5, 6])], np.array([7, 8, 9]))

    def test_classification(self):
        batch = collate(self.encoded, [2, 1], pad_id=99)
        assert batch.ids_BT.tolist() == [[5, 6], [4, 99]]
        assert batch.lengths_B.tolist() == [2, 1]
        assert batch.mask_BT.tolist() == [[1, 1], [1, 0]]
        assert batch.targets.tolist() == [9, 8]
        assert {t.dtype for t in (batch.ids_BT, batch.lengths_B, batch.targets, batch.mask_BT)} == {torch.int64}
        assert len(batch) == 2

    def test_causal_lm_targets_are_padded_with_ignore(self):
        encoded = Encoded(self.encoded.input_ids, [np.array([IGNORE, 2, 3]), np.array([4]), np.array([5, 6])])
        batch = collate(encoded, np.array([0, 1]), pad_id=99)
        assert batch.targets.tolist() == [[IGNORE, 2, 3], [4, IGNORE, IGNORE]]
        assert encoded.target_tokens() == 2 + 0 + 1

    def test_a_batch_is_a_copy(self):
        batch = collate(self.encoded, [0], pad_id=0)
        batch.ids_BT[0, 0] = 55
        batch.targets[0] = 55
        assert self.encoded.input_ids[0][0] == 1
        assert self.encoded.targets[0] == 7

    def test_to(self):
        moved = collate(self.encoded, [0, 1], pad_id=0).to("meta")
        assert {moved.ids_BT.device.type, moved.lengths_B.device.type, moved.targets.device.type} == {"meta"}
        assert moved.mask_BT.shape == (2, 3)


WHERE = {"seed": 1, "round": 2, "site": "site-0", "epoch": 0}


class TestBatches:
    def test_every_index_once_and_the_last_smaller(self):
        batches = epoch_batches(10, 4, **WHERE)
        assert [len(b) for b in batches] == [4, 4, 2]
        assert sorted(np.concatenate(batches).tolist()) == list(range(10))
        assert epoch_batches(0, 4, **WHERE) == []

    def test_a_function_of_seed_round_site_and_epoch(self):
        def order(**change):
            return np.concatenate(epoch_batches(50, 8, **(WHERE | change))).tolist()

        changes = [{}, {"seed": 2}, {"round": 3}, {"site": "site-1"}, {"site": "site-00"}, {"epoch": 1}]
        orders = [order(**change) for change in changes]
        assert orders == [order(**change) for change in changes]
        assert len({tuple(o) for o in orders}) == len(changes)
        assert order(seed=2, round=1) != order(seed=1, round=2)

    def test_length_sorted_is_stable(self):
        encoded = Encoded([np.zeros(n, np.int64) for n in (3, 1, 2, 1, 3)], None)
        assert lists(length_sorted_batches(encoded, 2)) == [[1, 3], [2, 0], [4]]
