"""`fedtrio report`: pages from run folders alone, without torch, and short words for what is no run folder."""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from made_up import made_up

from fedtrio.errors import ConfigError
from fedtrio.report.folders import results_of, together, written_anew

GONE = object()
HEAVY = {"torch", "transformers", "peft", "datasets", "pyarrow", "safetensors", "numpy"}


def kept(folder: Path, **changes: Any) -> Path:
    results = made_up(sites=4, rounds=3)
    results["config"] |= changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder


def command(*arguments: object) -> tuple[int, str, set[str]]:
    """Exit code, what was said, and the modules that were loaded."""
    words = ["fedtrio", "report", *map(str, arguments)]
    script = f"import sys, json, atexit\nsys.argv = {words!r}\nfrom fedtrio.cli import main\n"
    script += "atexit.register(lambda: print(json.dumps(sorted(m.split('.')[0] for m in sys.modules))))\nmain()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    *said, modules = done.stdout.splitlines()
    return done.returncode, "\n".join(said) + done.stderr, set(json.loads(modules))


def test_one_folder_without_torch(tmp_path: Path) -> None:
    folder = kept(tmp_path / "one")
    code, said, modules = command(folder)
    assert code == 0 and said.strip() == f"Report:  {folder / 'report.html'}" and not modules & HEAVY
    assert {folder / "report.html": (folder / "report.html").read_text(encoding="utf-8")} == written_anew(folder)


def test_several_folders_make_one_page(tmp_path: Path) -> None:
    folders = [kept(tmp_path / "a" / "run", rounds=3), kept(tmp_path / "b" / "run", rounds=7, model="made-up/other")]
    code, said, modules = command(*folders, "--out", tmp_path / "both.html")
    page = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert code == 0 and "both.html" in said and not modules & HEAVY
    assert "a/run" in page and "b/run" in page and ">rounds</th>" in page and "not all of the same model" in page
    assert not (tmp_path / "a" / "run" / "report.html").exists()


def test_the_page_of_several_names_the_best_and_what_is_not_separable(tmp_path: Path) -> None:
    page = together([kept(tmp_path / "a"), kept(tmp_path / "b")])
    assert "FedLLM at a (82.0 %) is the best; 1 of 5 others is not separable from it." in page


def test_tasks_that_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a is classification and b is causal-lm: their scores can't stand on one"):
        together([kept(tmp_path / "a"), kept(tmp_path / "b", task="causal-lm")])
    with pytest.raises(ConfigError, match="named twice"):
        together([tmp_path / "a", tmp_path / "a"])


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    code, said, _ = command(kept(tmp_path / "one"), "--out", tmp_path / "none" / "page.html")
    assert code == 2 and said.endswith("page.html can't be written: No such file or directory; choose another --out\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no results.json is in it"),
        ("{", "can't be read as results of fedtrio: Expecting property name"),
        ("[" * 100_000, "can't be read as results of fedtrio"),
        ("\xff", "can't be read as results of fedtrio: 'utf-8'"),
        ("[]", "can't be read as results of fedtrio"),
        ('{"schema_version": 1}', "results of fedtrio: config: Field required"),
    ],
)
def test_folders_of_others(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "results.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError) as caught:
        written_anew(tmp_path)
    assert said in str(caught.value) and len(str(caught.value).splitlines()) <= 2


def test_a_newer_schema_and_a_folder_above(tmp_path: Path) -> None:
    kept(tmp_path / "inner")
    with pytest.raises(ConfigError, match=r"it holds run folders, as .*inner"):
        written_anew(tmp_path)
    results = results_of(tmp_path / "inner") | {"schema_version": 2}
    (tmp_path / "inner" / "results.json").write_text(json.dumps(results))
    with pytest.raises(ConfigError, match="has schema 2, and this version of fedtrio reads 1"):
        written_anew(tmp_path / "inner")


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of the tree; of a list the first alone, as its elements are alike."""
    items = tree.items() if isinstance(tree, dict) else list(enumerate(tree))[:1] if isinstance(tree, list) else ()
    return [place for key, inner in items for place in ((*path, key), *places(inner, (*path, key)))]


def test_whatever_is_damaged_makes_a_page_or_two_lines(tmp_path: Path) -> None:
    """Values missing, null, a word, a list or negative, in turn: never a bug of ours."""
    results = made_up(sites=2, rounds=2, seeds=(0,), labels=2, finals={"fedllm": 0.8, "split": 0.7, "local": 0.5})
    results["runs"][0]["events"] = [{"event": "lost", "round": 1, "site": "site-00"}]
    for run in results["runs"][:2]:
        run["right"] = {"texts": 12, "sha256": "0", "bits": ["ff", "00"]}
    pages = refused = 0
    for number, (place, wrong) in enumerate(itertools.product(places(results), (GONE, None, "word", [], -1))):
        if number % 4:  # each place gets one or two of the five
            continue
        broken = copy.deepcopy(results)
        inner = broken
        for key in place[:-1]:
            inner = inner[key]
        if wrong is GONE:
            inner.pop(place[-1])
        else:
            inner[place[-1]] = wrong
        (tmp_path / "results.json").write_text(json.dumps(broken))
        try:
            pages += all("</html>" in text for text in written_anew(tmp_path).values())
        except ConfigError as error:
            refused += 1
            assert len(str(error).splitlines()) <= 2
    assert pages > 30 and refused > 80
