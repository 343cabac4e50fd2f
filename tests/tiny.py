"""Tiny random models, examples and federations for tests; plain functions, and everything is a function of its seed.

>>> run = play(FedLLM(), adapted("gpt2"), sizes=(5, 3), n=2)   # run.state, run.ledger, run.sites, run.lab

`adapted` is cached: the same arguments give the same object. That is safe, since adapters live outside of it; only
`observe` is set anew by each `federation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from fedtrio.data.batches import IGNORE, Encoded
from fedtrio.data.private import PrivateData
from fedtrio.frameworks.lab import Framework, Lab, State
from fedtrio.ledger import Ledger
from fedtrio.meter import Meter
from fedtrio.models.adapter import AdaptedModel, adapt
from fedtrio.models.lora import LoraConfig
from fedtrio.models.train import TrainConfig
from fedtrio.program import Site, drive
from fedtrio.wires.loopback import Loopback

KINDS = ("gpt2", "llama", "qwen3", "bert")
DECODERS = ("gpt2", "llama", "qwen3")  # BERT has no causal-lm
PAD, VOCAB, WIDTH, DEPTH, LABELS = 1, 97, 32, 4, 5

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()


def config_of(kind: str, dropout: float = 0.0, labels: int = LABELS, tied: bool | None = None) -> Any:
    """The configuration of a tiny model of that kind: the four KINDS, or another architecture for cut tests."""
    t = transformers
    rest = {"num_labels": labels, "pad_token_id": PAD, "attn_implementation": "eager", "use_cache": False}
    if tied is not None:
        rest["tie_word_embeddings"] = tied
    size = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 4}
    wide = size | {"intermediate_size": 48, "max_position_embeddings": 32}
    grouped = wide | {"num_key_value_heads": 2, "attention_dropout": dropout}
    encoder = wide | {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    match kind:
        case "gpt2":
            drops = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
            shape = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": DEPTH, "n_head": 4, "n_positions": 32}
            return t.GPT2Config(**shape, **drops, bos_token_id=0, eos_token_id=0, **rest)
        case "llama":
            return t.LlamaConfig(**grouped, **rest)
        case "qwen3":
            return t.Qwen3Config(**grouped, head_dim=8, **{"tie_word_embeddings": True} | rest)
        case "bert":
            return t.BertConfig(**encoder, **rest)
        case "roberta":
            return t.RobertaConfig(**encoder | {"max_position_embeddings": 40}, **rest)
        case "distilbert":
            shape = {"vocab_size": VOCAB, "dim": WIDTH, "hidden_dim": 48, "n_layers": DEPTH, "n_heads": 4}
            return t.DistilBertConfig(
                **shape, dropout=dropout, attention_dropout=dropout, max_position_embeddings=32, **rest
            )
        case "opt":
            shape = size | {"ffn_dim": 48, "max_position_embeddings": 32, "word_embed_proj_dim": WIDTH}
            return t.OPTConfig(**shape, dropout=dropout, **rest)
        case "gpt_neox":
            return t.GPTNeoXConfig(**wide, attention_dropout=dropout, hidden_dropout=dropout, **rest)
        case "gemma2":
            return t.Gemma2Config(**grouped, head_dim=8, sliding_window=4, **rest)
        case "mixtral":
            return t.MixtralConfig(**grouped, num_local_experts=4, num_experts_per_tok=2, **rest)
        case "qwen2_moe" | "qwen3_moe":
            routed = grouped | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
            if kind == "qwen3_moe":
                return t.Qwen3MoeConfig(**routed, head_dim=8, **rest)
            return t.Qwen2MoeConfig(**routed, shared_expert_intermediate_size=40, **rest)
    raise ValueError(kind)


def tiny(
    kind: str, task: str = "classification", dropout: float = 0.0, labels: int = LABELS, tied: bool | None = None
) -> nn.Module:
    """A random model of 4 blocks, width 32; its weights come from torch's global generator."""
    auto = (
        transformers.AutoModelForSequenceClassification
        if task == "classification"
        else transformers.AutoModelForCausalLM
    )
    return auto.from_config(config_of(kind, dropout, labels, tied), attn_implementation="eager")


@cache
def adapted(
    kind: str,
    task: str = "classification",
    precision: str = "fp64",
    seed: int = 0,
    dropout: float = 0.0,
    lora_dropout: float = 0.0,
    labels: int = LABELS,
    r: int = 4,
    target_modules: str | tuple[str, ...] = "all-linear",
    modules_to_save: tuple[str, ...] | None = None,
    tied: bool | None = None,
) -> AdaptedModel:
    """The tiny model with LoRA, whose A and B, and head, start from small random values, so that nothing is zero."""
    torch.manual_seed(seed)
    lora = LoraConfig(
        r=r,
        lora_alpha=2 * r,
        dropout=lora_dropout,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        modules_to_save=list(modules_to_save) if modules_to_save else None,
    )
    peft_model = adapt(tiny(kind, task, dropout, labels, tied), lora, task)  # type: ignore[arg-type]
    model = AdaptedModel(peft_model, task, precision)  # type: ignore[arg-type]
    model.initial = shaken(model.initial, seed)
    return model


def shaken(adapter: Mapping[str, Tensor], seed: int = 0, by: float = 0.1) -> dict[str, Tensor]:
    """The adapter plus small random values."""
    generator = torch.Generator().manual_seed(seed + 1)
    noise = {n: torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in sorted(adapter.items())}
    return {name: (t.double() + by * noise[name]).to(t.dtype) for name, t in adapter.items()}


def examples(task: str = "classification", n: int = 8, seed: int = 0, labels: int = LABELS) -> Encoded:
    """Random ids (never the pad id) of lengths 2 … 11; in causal-lm some lead with a prompt that is no target."""
    rng = np.random.default_rng([seed, 7])
    ids = [rng.integers(2, VOCAB, rng.integers(2, 12)) for _ in range(n)]
    if task == "classification":
        return Encoded(ids, rng.integers(0, labels, n))
    targets = [i.copy() for i in ids]
    for target in targets:
        target[: rng.integers(0, len(target))] = IGNORE  # the last token always stays a target
    return Encoded(ids, targets)


def public_set(task: str = "classification", n: int = 7, seed: int = 99) -> Encoded:
    """Unlabelled public texts (for causal-lm texts whose tokens are all targets)."""
    ids = examples(task, n, seed).input_ids
    return Encoded(ids, None if task == "classification" else [i.copy() for i in ids])


def lab(
    model: AdaptedModel, rounds: int = 2, seed: int = 0, public: Encoded | None = None, abreast: int | None = None,
    **train: Any,
) -> Lab:  # fmt: skip
    """A run's settings; `train` are fields of TrainConfig (default: AdamW, batches of 4, 2 epochs, high rates)."""
    defaults = {"batch_size": 4, "epochs": 2, "learning_rate": 1e-2, "head_learning_rate": 2e-2, "weight_decay": 0.01}
    config = TrainConfig(**{**defaults, **train}, precision=model.precision)  # type: ignore[arg-type]
    return Lab(model, config, public_set(model.task) if public is None else public, seed, rounds, PAD, abreast)


def federation(
    method: Framework, lab: Lab, sizes: Sequence[int] = (5, 8, 3), meter: Meter | None = None, data_seed: int = 0
) -> tuple[dict[str, Site], Loopback]:
    """Sites `site-1` … with so many examples each, and the wire to them; `meter` observes the model."""
    lab.hold = meter.hold if meter else lambda nbytes: None
    lab.model.observe = meter.work if meter else lambda key, weights: nullcontext()
    sites = {}
    for index, n in enumerate(sizes):
        name, train = f"site-{index + 1}", lab.train
        encoded = examples(lab.model.task, n, seed=1000 * data_seed + index)
        shape = (train.batch_size, train.epochs, lab.pad_id, train.group_by_length)
        data = PrivateData(encoded, name, lab.seed, *shape)
        sites[name] = Site(name, data, method, lab, meter)
    return sites, Loopback(sites)


def rounds(
    method: Framework, lab: Lab, wire: Loopback, n: int = 2, ledger: Ledger | None = None, state: State | None = None
) -> tuple[State, Ledger]:
    """Drive n rounds with all sites; the server's state and the ledger."""
    ledger = Ledger() if ledger is None else ledger
    state = method.setup(lab) if state is None else state
    for _ in range(n):
        lab.round += 1
        drive(method.server(lab, state, wire.sites), wire, lab.round, ledger)
    return state, ledger


@dataclass
class Played:
    """What `play` leaves behind."""

    method: Framework
    lab: Lab
    sites: dict[str, Site]
    wire: Loopback
    state: State
    ledger: Ledger

    @property
    def adapter(self) -> dict[str, Tensor]:
        """The method's common adapter."""
        adapter = self.method.adapter(self.lab, self.state)
        assert adapter is not None
        return dict(adapter)


def play(
    method: Framework,
    model: AdaptedModel,
    sizes: Sequence[int] = (5, 8, 3),
    n: int = 2,
    meter: Meter | None = None,
    frames: Path | None = None,
    **settings: Any,
) -> Played:
    """A whole run in one line: `settings` are those of `lab`."""
    setting = lab(model, **{"rounds": n, **settings})
    sites, wire = federation(method, setting, sizes, meter)
    state, ledger = rounds(method, setting, wire, n, Ledger(frames))
    return Played(method, setting, sites, wire, state, ledger)


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether both have the same names and every tensor is equal to the last bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def distance(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """The largest difference of any element."""
    assert left.keys() == right.keys()
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)
