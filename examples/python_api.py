"""fedtrio from Python: compare two frameworks on a little of the built-in data, then use one of the adapters.

python examples/python_api.py [FOLDER]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedtrio import Config, compare
from fedtrio.models.load import BUILT_IN


def main(out: Path) -> None:
    config = Config.model_validate(
        {
            "frameworks": ["fedllm", "split"],
            "partition": {"name": "column"},
            "rounds": 1,
            "threads": 1,
            "data": {"max_train": 120, "max_test": 60, "max_public": 40},
            "train": {"learning_rate": 5e-3, "head_learning_rate": 2e-3, "max_length": 48},
        }
    )
    results = compare(config, out=out)
    for run in results["runs"]:
        print(f"{run['framework']:<8} accuracy {run['accuracy']:.3f}, {run['bytes_up']:,} bytes up")

    # Averaging whole adapters and averaging both halves of a cut model is the same computation.
    fedllm, split = results["runs"]
    assert fedllm["loss"] == split["loss"]

    # An adapter is an ordinary PEFT folder, the classification head included.
    labels = results["data"]["labels"]
    base = AutoModelForSequenceClassification.from_pretrained(BUILT_IN["nano"], num_labels=len(labels))
    tokenizer = AutoTokenizer.from_pretrained(BUILT_IN["nano"])
    base.config.pad_token_id = tokenizer.pad_token_id
    model = PeftModel.from_pretrained(base, str(out / fedllm["adapter"])).eval()
    with torch.no_grad():
        logits_C = model(**tokenizer("I forgot my password", return_tensors="pt")).logits[0]
    print("forgotten password →", labels[int(logits_C.argmax())])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else folder))
