"""The examples run as they stand: `pytest tests/test_examples.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
SMALL = {"poisoned_site.py": ["--rules", "none", "median", "--rounds", "1", "--sites", "3", "--train", "48"]}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, path, tmp_path / "run", *SMALL.get(path.name, [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "accuracy" in done.stdout
    assert (tmp_path / "run" / "report.html").is_file() or path.name in SMALL


def three_sites(*cases: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"FEDTRIO": str(Path(sys.executable).parent / "fedtrio")}
    command = [FOLDER / "three_sites.sh", *cases]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_three_sites_over_https_equal_one_process() -> None:
    done = three_sites("fedllm", "kd", "split")
    assert done.returncode == 0, done.stdout + done.stderr
    _, *lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["fedllm", "kd", "split"]
    assert all(line.endswith("the same") for line in lines)
    assert len({line.split()[2] for line in lines}) == 3  # ledgers


@pytest.mark.slow
def test_three_sites_with_the_labels_at_the_client() -> None:
    done = three_sites("labels-at-client")
    assert done.returncode == 0 and "U-shape" in done.stdout, done.stdout + done.stderr


def test_three_sites_says_what_it_does_not_know() -> None:
    done = three_sites("gossip")
    assert done.returncode == 2 and "gossip is none of fedllm" in done.stderr
