"""How much pretraining helps LoRA on BANKING77: nano against the same network with random weights.

    python benchmarks/nano_transfer.py --threads 1

Both starts get the same search: two learning-rate pairs, with and without the newline after the text, scored
on 1,000 training rows that are not trained on. The best setting of each start is then trained on the 10-shot
set with three seeds and scored on the test set. On the full training set the two best may be compared again.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    logging,
)

ROOT = Path(__file__).resolve().parent.parent
NOTE = """
BANKING77, LoRA r 8 alpha 16 on every linear layer of the blocks plus the head; mean over seeds, each in
brackets. Learning rate and newline were chosen per start, over the same grid, on 1,000 training rows that are
not trained on; with `--full-choices 1` the full set takes the 10-shot choice. Measured by
`{}`."""
MODEL = ROOT / "src" / "fedtrio" / "models" / "nano"
LEARNING_RATES = [(2e-3, 2e-3), (5e-3, 2e-3)]  # (body, head)
BATCH, MAX_TOKENS, N_HELD_OUT, CLASSES, PAD_ID = 32, 48, 1000, 77, 1

Rows = list[tuple[list[int], int]]


@dataclass(frozen=True)
class Setting:
    """A start (pretrained or random), the learning rates, and whether a newline ends the text."""

    start: str
    body: float
    head: float
    newline: bool

    def __str__(self) -> str:
        suffix = "newline" if self.newline else "no newline"
        return f"{self.start}, lr {self.body:g} / {self.head:g}, {suffix}"


def read_rows(path: Path) -> list[tuple[str, int]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [(row["text"], int(row["label"])) for row in csv.DictReader(file)]


def build(setting: Setting, seed: int) -> PreTrainedModel:
    """A classifier with LoRA on every linear layer of the blocks and a trained head."""
    torch.manual_seed(seed)
    kwargs = {"num_labels": CLASSES, "attn_implementation": "eager", "dtype": torch.float32}
    if setting.start == "pretrained":
        model = AutoModelForSequenceClassification.from_pretrained(MODEL, **kwargs)
    else:
        config = AutoConfig.from_pretrained(MODEL, num_labels=CLASSES)
        model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    lora = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
        modules_to_save=["score"],
        task_type="SEQ_CLS",
    )
    return get_peft_model(model, lora)


def collate(rows: Rows, newline: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    texts = [torch.tensor(ids if newline else ids[:-1]) for ids, _ in rows]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=PAD_ID)
    return ids, (ids != PAD_ID).long(), torch.tensor([label for _, label in rows])


def epoch_batches(rows: Rows, rng: np.random.Generator) -> Iterator[Rows]:
    """Shuffled batches of texts of like length."""
    order = rng.permutation(len(rows))
    pools = [sorted(pool, key=lambda i: len(rows[i][0])) for pool in np.split(order, range(640, len(order), 640))]
    batches = [pool[i : i + BATCH] for pool in pools for i in range(0, len(pool), BATCH)]
    for b in rng.permutation(len(batches)):
        yield [rows[i] for i in batches[b]]


def train(setting: Setting, rows: Rows, epochs: int, seed: int) -> PreTrainedModel:
    model, rng = build(setting, seed), np.random.default_rng(seed)
    head = [p for n, p in model.named_parameters() if p.requires_grad and "score" in n]
    body = [p for n, p in model.named_parameters() if p.requires_grad and "score" not in n]
    groups = [{"params": body, "lr": setting.body}, {"params": head, "lr": setting.head}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
    total = epochs * sum(1 for _ in epoch_batches(rows, np.random.default_rng(0)))
    warmup = max(1, round(0.06 * total))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, (total - s) / max(1, total - warmup))
    )
    model.train()
    for _ in range(epochs):
        for batch in epoch_batches(rows, rng):
            ids, mask, labels = collate(batch, setting.newline)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(input_ids=ids, attention_mask=mask).logits
            F.cross_entropy(logits.float(), labels).backward()
            torch.nn.utils.clip_grad_norm_(body + head, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model


@torch.inference_mode()
def accuracy(model: PreTrainedModel, rows: Rows, newline: bool) -> float:
    model.eval()
    rows, right = sorted(rows, key=lambda row: len(row[0])), 0
    for start in range(0, len(rows), 128):
        ids, mask, labels = collate(rows[start : start + 128], newline)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids, attention_mask=mask).logits
        right += int((logits.argmax(-1) == labels).sum())
    return 100 * right / len(rows)


def score(setting: Setting, rows: Rows, test: Rows, epochs: int, seed: int, what: str) -> float:
    begin = time.monotonic()
    model = train(setting, rows, epochs, seed)
    seconds, value = time.monotonic() - begin, accuracy(model, test, setting.newline)
    print(f"{what}: {setting}, seed {seed}, {epochs} epochs: {value:.1f} % ({seconds:.0f} s)", flush=True)
    return value


def measure(data: dict[str, Rows], epochs: dict[str, int], seeds: dict[str, int], full_choices: int) -> list[str]:
    """Choose on held-out training rows, then measure on the test set; the result as a Markdown table."""
    lines = [
        "| training rows | start | lr body / head | newline | test accuracy |",
        "| --- | --- | --- | --- | ---: |",
    ]
    chosen: dict[str, list[Setting]] = {}
    for size in ("10-shot", "full"):
        for start in ("pretrained", "random"):
            grid = [Setting(start, b, h, nl) for b, h in LEARNING_RATES for nl in (True, False)]
            tried = chosen[start][:full_choices] if size == "full" else grid
            if len(tried) > 1:
                found = [score(s, data[size], data["held-out"], epochs[size], 0, f"{size}, choice") for s in tried]
                tried = [tried[i] for i in np.argsort(found)[::-1]]
            chosen[start] = tried
            best = chosen[start][0]
            values = [
                score(best, data[size], data["test"], epochs[size], seed, f"{size}, test")
                for seed in range(seeds[size])
            ]
            spread = f"{statistics.mean(values):.1f} % ({', '.join(f'{v:.1f}' for v in values)})"
            rates, newline = f"{best.body:g} / {best.head:g}", "yes" if best.newline else "no"
            rows = f"{size} ({len(data[size]):,}), {epochs[size]} epochs"
            lines.append(f"| {rows} | {start} | {rates} | {newline} | {spread} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "banking77")
    parser.add_argument("--seeds", type=int, default=3, help="seeds on the 10-shot set")
    parser.add_argument("--full-seeds", type=int, default=2, help="seeds on the full training set")
    parser.add_argument("--full-choices", type=int, default=2, help="settings compared on the full set")
    parser.add_argument("--epochs", type=int, default=20, help="epochs on the 10-shot set")
    parser.add_argument("--full-epochs", type=int, default=4, help="epochs on the full training set")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--card", type=Path, help="a model card to put the table into, e.g. that of nano")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = {name: read_rows(args.data / f"{name}.csv") for name in ("train", "train_10shot", "test")}
    few = set(texts["train_10shot"])
    rest = [row for row in texts["train"] if row not in few]
    held_out = [rest[i] for i in np.random.default_rng(0).permutation(len(rest))[:N_HELD_OUT]]
    texts |= {"held-out": held_out, "10-shot": texts["train_10shot"]}
    texts["full"] = [row for row in texts["train"] if row not in set(held_out)]
    data = {
        name: [(tokenizer(t, truncation=True, max_length=MAX_TOKENS).input_ids, label) for t, label in rows]
        for name, rows in texts.items()
    }
    options = f"--seeds {args.seeds} --full-seeds {args.full_seeds} --full-choices {args.full_choices}"
    note = NOTE.format(f"python benchmarks/nano_transfer.py {options}")
    epochs = {"10-shot": args.epochs, "full": args.full_epochs}
    seeds = {"10-shot": args.seeds, "full": args.full_seeds}
    table = "\n".join([*measure(data, epochs, seeds, args.full_choices), note])
    print(table)
    if args.card:
        head, rest_of_card = args.card.read_text(encoding="utf-8").split("<!-- transfer -->\n", 1)
        tail = rest_of_card.split("<!-- /transfer -->", 1)[1]
        card = f"{head}<!-- transfer -->\n{table}\n<!-- /transfer -->{tail}"
        args.card.write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
