"""The examples run as they stand: `pytest tests/test_examples.py`."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
SMALL = {
    "own_aggregation.py": [],
    "own_codec.py": [],
    "own_framework.py": [],
    "own_partitioner.py": [],
    "poisoned_site.py": ["--rules", "none", "median", "--rounds", "1", "--sites", "3", "--train", "48"],
}
EXAMPLES = sorted(path for path in FOLDER.glob("*.py") if path.name not in {*SMALL, "unlike_models.py"})


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, path, tmp_path / "run"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "accuracy" in done.stdout
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.usefixtures("nothing_added")
@pytest.mark.parametrize("name", SMALL)
def test_example_of_a_method_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, which has imported all that they need."""
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path / "run"), *SMALL[name]])
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    assert "accuracy" in capsys.readouterr().out
    assert list(tmp_path.glob("run/**/adapter_model.safetensors"))


def test_unlike_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, which has imported what takes longer than the example itself."""
    runpy.run_path(str(FOLDER / "unlike_models.py"))["main"](tmp_path / "run")
    student, *sites = capsys.readouterr().out.splitlines()
    assert "accuracy" in student and [line.split()[0] for line in sites] == sorted(line.split()[0] for line in sites)
    assert len(sites) == 6 and (tmp_path / "run" / "report.html").is_file()


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
