"""A partitioner of your own: sizes by Zipf's law, so that one site has much and many have little.

python examples/own_partitioner.py [FOLDER]     runs it on a little of the built-in data
"""

from __future__ import annotations

import sys
import tempfile

import numpy as np

from fedtrio import extend
from fedtrio.compare import compare
from fedtrio.config_file import load_config
from fedtrio.data.load import Rows


def zipf(rows: Rows, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    """The indices of each client: site k gets a share in proportion to 1/(k + 1), drawn at random."""
    share_K = 1 / np.arange(1, clients + 1)
    ends_K = np.round(np.cumsum(share_K / share_K.sum()) * len(rows)).astype(int)
    return np.split(rng.permutation(len(rows)), ends_K[:-1])


extend.partitioner("zipf", zipf)

if __name__ == "__main__":
    settings = ["partition.name=zipf", "clients=5", "frameworks=[fedllm]", "rounds=2", "threads=1"]
    settings += ["data.max_train=120", "data.max_test=60", "data.max_public=8"]
    with tempfile.TemporaryDirectory() as folder:
        out = sys.argv[1] if len(sys.argv) > 1 else folder
        results = compare(load_config(settings=settings), out, jobs=1)
        sizes = [site["examples"] for site in results["data"]["partitions"][0]["sites"]]
        print(f"examples {sizes}, accuracy {results['runs'][0]['accuracy']:.3f}")
