"""Pretrain nano, the built-in 2.6 M-parameter GPT-2-architecture language model, and export it.

    python tools/pretrain_nano.py --corpus ../shared/corpus --work build/nano --seconds 3900 --threads 1

The same command run again resumes from the last checkpoint in --work; with --export-only it writes the model
folder from that checkpoint without training.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

EOT, PAD, EOT_ID, PAD_ID, VOCAB, POSITIONS = "<|endoftext|>", "<|pad|>", 0, 1, 4096, 128
BIG_SOURCES = ("books_pd", "self_dialogue", "sgd")  # the tokenizer is trained on a third of these
SNAP = 32  # a training row starts at a document's start if one lies at most this many tokens before it
WARMUP_STEPS, MUON_LR, ADAMW_LR, FINAL_LR = 100, 0.02, 2e-3, 0.05
OUT = Path(__file__).resolve().parent.parent / "src" / "fedtrio" / "models" / "nano"


def read_corpus(folder: Path, seed: int) -> tuple[dict[str, list[str]], list[str]]:
    """Training documents by source, and the held-out ones: 1 % of the documents of each source."""
    rng = np.random.default_rng(seed)
    train: dict[str, list[str]] = {}
    held_out: list[str] = []
    for path in sorted(folder.glob("*.txt.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            documents = [d.strip() for d in file.read().split("\n\n") if d.strip()]
        order = rng.permutation(len(documents))
        n_val = max(1, round(len(documents) / 100))
        held_out += [documents[i] for i in order[:n_val]]
        train[path.name.removesuffix(".txt.gz")] = [documents[i] for i in order[n_val:]]
    if not train:
        raise SystemExit(f"no *.txt.gz files in {folder}")
    return train, held_out


def train_tokenizer(train: dict[str, list[str]]) -> Tokenizer:
    """Byte-level BPE; special tokens are added as `<|endoftext|> text newline`: the reply comes next."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    options = {"vocab_size": VOCAB, "min_frequency": 2, "show_progress": False, "initial_alphabet": alphabet}
    trainer = trainers.BpeTrainer(special_tokens=[EOT, PAD], **options)
    texts = (d for name, docs in train.items() for d in docs[:: 3 if name in BIG_SOURCES else 1])
    tokenizer.train_from_iterator(texts, trainer)
    newline = tokenizer.token_to_id("Ċ")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{EOT} $A Ċ", pair=f"{EOT} $A Ċ $B:1 Ċ:1", special_tokens=[(EOT, EOT_ID), ("Ċ", newline)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> NDArray[np.uint16]:
    """All documents as one stream, `<|endoftext|>` before each and one at the end."""
    stream: list[int] = []
    for start in range(0, len(documents), 2000):
        for encoding in tokenizer.encode_batch(documents[start : start + 2000], add_special_tokens=False):
            stream.append(EOT_ID)
            stream.extend(encoding.ids)
    return np.array([*stream, EOT_ID], dtype=np.uint16)


def prepare(corpus: Path, work: Path, seed: int) -> None:
    """Tokenizer and token streams, made once and kept in the work folder."""
    if (work / "data.json").exists():
        return
    train, held_out = read_corpus(corpus, seed)
    tokenizer = train_tokenizer(train)
    tokenizer.save(str(work / "tokenizer.json"))
    documents = [d for docs in train.values() for d in docs]
    documents = [documents[i] for i in np.random.default_rng(seed).permutation(len(documents))]
    streams = {"train": encode(tokenizer, documents), "val": encode(tokenizer, held_out)}
    info = {"val_bytes": sum(len(d.encode()) for d in held_out)}
    for name, stream in streams.items():
        np.save(work / f"{name}.npy", stream)
        info[f"{name}_tokens"] = len(stream)
    (work / "data.json").write_text(json.dumps(info))


def epoch_rows(stream: NDArray[np.uint16], seed: int, epoch: int) -> NDArray[np.int64]:
    """Shuffled starts of this epoch's rows: every 128 tokens from a random offset, snapped to documents."""
    rng = np.random.default_rng([seed, epoch])
    starts = np.arange(rng.integers(POSITIONS), len(stream) - POSITIONS - 1, POSITIONS)
    positions = np.where(stream == EOT_ID, np.arange(len(stream)), 0)
    documents = np.maximum.accumulate(positions)[starts]
    return rng.permutation(np.where(starts - documents <= SNAP, documents, starts))


def batches(stream: NDArray[np.uint16], seed: int, size: int, done: int) -> Iterator[torch.Tensor]:
    """Batches of rows of 129 tokens without end; `done` batches of the same sequence are skipped."""
    epoch = 0
    while True:
        rows = epoch_rows(stream, seed, epoch)
        count = len(rows) // size
        for i in range(min(done, count), count):
            index = rows[i * size : (i + 1) * size, None] + np.arange(POSITIONS + 1)
            yield torch.from_numpy(stream[index].astype(np.int64))
        done, epoch = max(0, done - count), epoch + 1


def build_model() -> GPT2LMHeadModel:
    ids = {"bos_token_id": EOT_ID, "eos_token_id": EOT_ID, "pad_token_id": PAD_ID}
    config = GPT2Config(vocab_size=VOCAB, n_positions=POSITIONS, n_embd=192, n_layer=4, n_head=3, **ids)
    config.activation_function = "gelu_pytorch_tanh"
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    config._attn_implementation = "eager"  # faster than sdpa on a CPU at this size
    return GPT2LMHeadModel(config)


def build_optimizers(model: GPT2LMHeadModel) -> list[torch.optim.Optimizer]:
    """Muon on the 2-D weights of the blocks, AdamW on embeddings, biases and layer norms."""
    named = dict(model.named_parameters())
    matrices = {n: p for n, p in named.items() if ".h." in n and p.ndim == 2}
    rest = [p for n, p in named.items() if n not in matrices]
    wide = {"params": [p for p in rest if p.ndim == 2], "weight_decay": 0.01}
    flat = {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}
    options = {"lr": MUON_LR, "momentum": 0.95, "weight_decay": 0.01, "adjust_lr_fn": "original"}
    muon = torch.optim.Muon(list(matrices.values()), **options)
    adamw = torch.optim.AdamW([wide, flat], lr=ADAMW_LR, betas=(0.9, 0.95))
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adamw]


def lm_loss(model: GPT2LMHeadModel, rows: torch.Tensor) -> torch.Tensor:
    with torch.autocast(rows.device.type, dtype=torch.bfloat16):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@torch.inference_mode()
def validate(model: GPT2LMHeadModel, stream: NDArray[np.uint16], n_bytes: int) -> dict[str, float]:
    """Loss in nats a token over the held-out stream, with its perplexity and bits per byte of text."""
    device = next(model.parameters()).device
    starts = np.arange(0, len(stream) - POSITIONS, POSITIONS)
    model.eval()
    total = 0.0
    for chunk in np.array_split(starts, math.ceil(len(starts) / 64)):
        rows = torch.from_numpy(stream[chunk[:, None] + np.arange(POSITIONS + 1)].astype(np.int64))
        total += lm_loss(model, rows.to(device)).item() * len(chunk)
    loss = total / len(starts)
    bits_per_byte = loss * len(stream) / n_bytes / math.log(2)
    return {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": bits_per_byte}


def train(args: argparse.Namespace) -> None:
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    model = build_model().to(device)
    optimizers = build_optimizers(model)
    info = json.loads((args.work / "data.json").read_text())
    stream, held_out = np.load(args.work / "train.npy"), np.load(args.work / "val.npy")
    step, before, history = 0, 0.0, []
    if (args.work / "state.pt").exists():
        state = torch.load(args.work / "state.pt", weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, before, history = state["step"], state["elapsed"], state["history"]
        print(f"resumed at step {step}, {before:.0f} s", flush=True)
    start, per_step = time.monotonic() - before, args.batch * POSITIONS
    elapsed = last_save = before
    for rows in batches(stream, args.seed, args.batch, step):
        used = step * per_step / args.tokens if args.tokens else elapsed / args.seconds
        done = used >= 1
        if done or elapsed - last_save >= args.save_every:
            history.append({"tokens": step * per_step} | validate(model, held_out, info["val_bytes"]))
            print(f"{elapsed:.0f} s, step {step}: {history[-1]}", flush=True)
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            state |= {"step": step, "elapsed": elapsed, "history": history}
            torch.save(state, args.work / "state.tmp")
            os.replace(args.work / "state.tmp", args.work / "state.pt")
            last_save = elapsed
        if done:
            break
        scale = min(1.0, (step + 1) / WARMUP_STEPS)
        scale *= FINAL_LR + (1 - FINAL_LR) * (1 + math.cos(math.pi * used)) / 2
        model.train()
        loss = lm_loss(model, rows.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * scale
            optimizer.step()
            optimizer.zero_grad()
        step, elapsed = step + 1, time.monotonic() - start
        if step % 100 == 0:
            rate = step * per_step / elapsed
            print(f"{elapsed:.0f} s, step {step}: loss {loss.item():.3f}, {rate:.0f} tokens/s", flush=True)


def export(work: Path, out: Path, seed: int) -> None:
    """Write the model folder: first to a temporary folder beside it, then move file by file into place."""
    state = torch.load(work / "state.pt", weights_only=True, map_location="cpu")
    model = build_model()
    special = {"bos_token": EOT, "eos_token": EOT, "pad_token": PAD, "clean_up_tokenization_spaces": False}
    sides = {"padding_side": "right", "truncation_side": "right", "model_max_length": POSITIONS}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(work / "tokenizer.json"), **special, **sides)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".nano") as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        model.config.architectures = ["GPT2LMHeadModel"]
        model.config.dtype = "float32"  # what plain from_pretrained loads the bf16 file as
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        weights = {k: v.bfloat16().contiguous() for k, v in state["model"].items() if k != "lm_head.weight"}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        card = (out if (out / "README.md").exists() else OUT) / "README.md"
        text = numbers(state, json.loads((work / "data.json").read_text()), seed)
        if text.strip() not in (filled := card.read_text(encoding="utf-8")):
            filled = fill_card(filled, "numbers", text)
            filled = fill_card(filled, "transfer", "Not measured with these weights.")
        (folder / "README.md").write_text(filled, encoding="utf-8")
        for file in sorted(folder.iterdir()):
            file.chmod(0o644)
            os.replace(file, out / file.name)


def fill_card(card: str, block: str, text: str) -> str:
    """The model card with the text between `<!-- block -->` and `<!-- /block -->` replaced."""
    head, rest = card.split(f"<!-- {block} -->\n", 1)
    tail = rest.split(f"<!-- /{block} -->", 1)[1]
    return f"{head}<!-- {block} -->\n{text.strip()}\n<!-- /{block} -->{tail}"


def numbers(state: dict[str, Any], info: dict[str, int], seed: int) -> str:
    """What this training run saw and reached, as Markdown."""
    last, minutes = state["history"][-1], state["elapsed"] / 60
    seen, epochs = last["tokens"] / 1e6, last["tokens"] / info["train_tokens"]
    quality = f"{last['perplexity']:.2f} | {last['bits_per_byte']:.3f}"
    return f"""
| tokens seen | epochs | training time | validation perplexity | bits per byte |
| ---: | ---: | ---: | ---: | ---: |
| {seen:.1f} M | {epochs:.2f} | {minutes:.0f} min | {quality} |

Seed {seed}; {info["train_tokens"] / 1e6:.1f} M training tokens. Validation: {info["val_tokens"]:,} tokens
({info["val_bytes"]:,} bytes), 1 % of the documents of each source, in no part of the training."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("../shared/corpus"), help="folder of *.txt.gz files")
    parser.add_argument("--work", type=Path, required=True, help="folder for token caches and checkpoints")
    parser.add_argument("--out", type=Path, default=OUT, help="folder the model is exported to")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--seconds", type=float, default=3900.0, help="wall-clock training budget")
    budget.add_argument("--tokens", type=int, help="token budget (instead of --seconds)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32, help="rows of 128 tokens in a step")
    parser.add_argument("--save-every", type=float, default=240.0, help="seconds between validated checkpoints")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--export-only", action="store_true", help="export the last checkpoint, do not train")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if not args.export_only:
        prepare(args.corpus, args.work, args.seed)
        train(args)
    export(args.work, args.out, args.seed)


if __name__ == "__main__":
    main()
