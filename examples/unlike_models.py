"""Sites with models of their own: a help desk shared by six organisations, two of which bring another architecture.

    python examples/unlike_models.py [FOLDER]

The bank holds a BERT, the council and the factory a small Llama, the others and the server's student the built-in
GPT-2. What they share is predictions on public texts, so that nobody need know what the others run. The two models are
made here from random weights, to need no network; name folders or Hub ids of trained ones in `kd.models` instead.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from fedtrio import Config
from fedtrio.compare import compare
from fedtrio.models.load import BUILT_IN


def make_models(folder: Path) -> dict[str, Path]:
    """Two small models that read the built-in tokenizer's words; in classification each may have its own."""
    tokenizer = AutoTokenizer.from_pretrained(BUILT_IN["nano"])
    size: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    size |= {"num_attention_heads": 4, "max_position_embeddings": 128}
    torch.manual_seed(0)
    bert = BertModel(BertConfig(**size, hidden_size=128, num_hidden_layers=2, intermediate_size=256))
    llama = LlamaForCausalLM(LlamaConfig(**size, hidden_size=64, num_hidden_layers=3, intermediate_size=128))
    for name, model in (("bert", bert), ("llama", llama)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in ("bert", "llama")}


def main(out: Path) -> None:
    models = make_models(out.with_name(out.name + "-models"))
    config = Config.model_validate(
        {
            "frameworks": ["kd"],
            "partition": {"name": "column"},
            "rounds": 2,
            "threads": 1,
            "data": {"max_train": 90, "max_test": 40, "max_public": 40},
            "train": {"learning_rate": 4e-3, "head_learning_rate": 1.5e-2, "max_length": 48},
            "kd": {
                "aggregation": "probabilities",
                "temperature": 1.0,
                "server_epochs": 4,
                "logits": "topk:8:logits+fp16",  # of 20 classes the eight likeliest, and what is left for the others
                "models": {"bank": str(models["bert"]), "[cf]*": str(models["llama"])},  # names or patterns
            },
        }
    )
    results = compare(config, out=out)
    (run,) = results["runs"]
    print(f"the student: accuracy {run['accuracy']:.3f}")
    for site in run["sites"]:
        cost = f"{site['client_flops'] / 1e9:.2f} GFLOP, {site['bytes_up']:,} bytes up"
        print(f"{site['name']:<12} accuracy {site['accuracy']:.3f}, {cost}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "run")
