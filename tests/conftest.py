"""What all tests share: one thread, this folder on the path (for `tiny`), and the assets beside the project."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[1] / "shared"
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture
def nothing_added():
    """What a test adds to `fedtrio.extend` is gone after it."""
    yield
    from fedtrio import extend

    for name in extend.KINDS.keys() - extend.CODECS:
        del extend.KINDS[name]
    extend.FRAMEWORKS.clear()
    extend.PARTITIONERS.clear()


@pytest.fixture(scope="session")
def shared():
    """`shared("models/gpt2_tokenizer")` is that path beside the project; without it the test is skipped."""

    def find(name: str = "") -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"no {path}")
        return path

    return find
