"""What users add from Python, by the example files as they stand."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtrio import extend
from fedtrio.codecs import Crossing, parse
from fedtrio.compare import compare
from fedtrio.config import Config
from fedtrio.config_file import load_config
from fedtrio.data.load import Rows
from fedtrio.data.partition import PartitionConfig, partition
from fedtrio.errors import ConfigError, DataError, MessageError
from fedtrio.export import export
from fedtrio.report.page import render

FOLDER = Path(__file__).parent.parent / "examples"
SMALL = ["data.max_train=24", "data.max_test=10", "data.max_public=8", "rounds=2", "threads=1", "train.precision=fp32"]


pytestmark = pytest.mark.usefixtures("nothing_added")


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(FOLDER / name))


def test_own_framework_with_one_site_is_fedllm(tmp_path: Path) -> None:
    example("own_framework.py")
    one = ["partition.name=iid", "clients=1", "frameworks=[fedllm, cyclic]"]
    results = compare(load_config(settings=[*SMALL, *one]), tmp_path / "one", jobs=1)
    fedllm, cyclic = results["runs"]
    assert fedllm["adapter_sha256"] == cyclic["adapter_sha256"]
    assert cyclic["messages"] == 4 and cyclic["left_sites"] == ["adapter"]
    assert "cyclic" in render(results)
    assert load_config(tmp_path / "one" / "config.yaml").frameworks == ["fedllm", "cyclic"]
    extend.FRAMEWORKS.clear()  # as on the command line
    export(tmp_path / "one", tmp_path / "out", "cyclic")
    assert "cyclic" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_own_framework_goes_from_site_to_site() -> None:
    """After a round all sites have trained, each from what the one before it sent."""
    example("own_framework.py")
    config = load_config(settings=[*SMALL, "rounds=1", "partition.name=iid", "clients=3", "frameworks=[cyclic]"])
    (run,) = compare(config, jobs=1)["runs"]
    assert run["messages"] == 6 and {site["messages"] for site in run["sites"]} == {2}


def test_own_partitioner_deals(tmp_path: Path) -> None:
    example("own_partitioner.py")
    rows = Rows([f"text {i}" for i in range(110)])
    config = PartitionConfig.model_validate({"name": "zipf"})
    sizes = [len(share.indices) for share in partition(config, rows, 3, seed=0)]
    assert sizes == [60, 30, 20]  # 1 : 1/2 : 1/3 of 110
    assert config.model_dump(mode="json") == {"name": "zipf", "min_examples": 1}
    with pytest.raises(DataError, match="the smallest site has 20 examples"):
        partition(PartitionConfig.model_validate({"name": "zipf", "min_examples": 25}), rows, 3, seed=0)
    with pytest.raises(ValueError, match="'zipf' has no 'alpha'"):
        PartitionConfig.model_validate({"name": "zipf", "alpha": 1})


@pytest.mark.parametrize(
    ("parts", "said"),
    [([[0, 1], [2]], "1 to none"), ([[0, 1, 2], [2, 3]], "1 to several"), ([[0, 1, 2, 3]], "1 parts for 2 clients")],
)
def test_what_is_no_partition_is_refused(parts: list[list[int]], said: str) -> None:
    extend.partitioner("wrong", lambda rows, clients, rng: [np.array(part) for part in parts])
    with pytest.raises(DataError, match=said):
        partition(PartitionConfig.model_validate({"name": "wrong"}), Rows(["a", "b", "c", "d"]), 2, seed=0)


def test_own_codec_by_hand() -> None:
    example("own_codec.py")
    codec = parse("sign", "adapter", small=0)
    x = torch.tensor([[1.0, -2.0, 0.5], [-0.5, 4.0, -1.0]])
    state: dict[str, torch.Tensor] = {}
    sent = codec.encode({"w": x}, Crossing(0, 1, "a", "up"), state)
    assert sum(t.numel() * t.element_size() for t in sent.values()) == codec.payload_bytes({"w": x}) == 1 + 4
    back = codec.decode(sent)["w"]
    assert torch.equal(back, x.sign() * 1.5)  # ‖x‖₁ / d = 9 / 6
    assert torch.equal(state["w"], x - back)  # goes with the next update
    step = next(name for name in sent if name.endswith("step"))
    with pytest.raises(MessageError, match="a step that is not negative"):
        codec.decode({**sent, step: -sent[step]})
    with pytest.raises(ConfigError, match="not for logits"):
        parse("sign", "logits")


def test_names_that_are_taken_or_unknown() -> None:
    for add in (extend.framework, extend.partitioner):
        with pytest.raises(ConfigError, match="is built in"):
            add("fedllm" if add is extend.framework else "iid", object())  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="can't be a name"):
            add("my:own", object())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="is built in"):
        extend.codec("int8", object, "")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Input should be 'fedllm', 'kd'"):
        Config.model_validate({"frameworks": ["cyclic"]})
