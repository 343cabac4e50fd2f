"""An aggregation rule of your own: one function, named in the configuration.

fedtrio compare --set "frameworks=[fedllm]" --set fedllm.aggregation=examples/own_aggregation.py:trimmed

python examples/own_aggregation.py [FOLDER]     runs it on a little of the built-in data
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping

import torch
from torch import Tensor

from fedtrio.compare import compare
from fedtrio.config_file import load_config


def trimmed(adapters: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Of each element the mean without the least and the greatest of the sites' values; all sites count alike."""
    found = {}
    for name in adapters[min(adapters)]:
        values_K = torch.stack([adapter[name] for adapter in adapters.values()]).sort(0).values
        found[name] = values_K[1:-1].mean(0) if len(values_K) > 2 else values_K.mean(0)
    return found


if __name__ == "__main__":
    settings = [f"fedllm.aggregation={__file__}:trimmed", "frameworks=[fedllm]", "rounds=2", "threads=1"]
    settings += ["data.max_train=120", "data.max_test=60", "data.max_public=8"]
    with tempfile.TemporaryDirectory() as folder:
        (run,) = compare(load_config(settings=settings), out=sys.argv[1] if len(sys.argv) > 1 else folder)["runs"]
        print(f"accuracy {run['accuracy']:.3f}, aggregation error {run['curve'][-1]['aggregation_error']:.2g}")
