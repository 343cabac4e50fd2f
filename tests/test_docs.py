"""The documentation agrees with the code: `pytest tests/test_docs.py`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedtrio.config_file import load_config
from fedtrio.sweep import load_study

ROOT = Path(__file__).parent.parent
STUDIES = sorted(path for path in ROOT.glob("configs/**/*.yaml") if "base:" in path.read_text(encoding="utf-8"))
CONFIGS = sorted({*ROOT.glob("configs/**/*.yaml"), ROOT / "src/fedtrio/data/demo/config.yaml"} - {*STUDIES})
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("src/**/*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def test_configuration_page_is_up_to_date() -> None:
    command = [sys.executable, ROOT / "tools/configuration_page.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configuration_loads_and_is_written_as_an_equal_one(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    (tmp_path / "again.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml").model_dump() == config.model_dump()


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_each_point_of_a_study_is_a_configuration(path: Path) -> None:
    study, configs = load_study(path)
    assert len(configs) == len(study.all_points()) > 0


EXTENDING = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", EXTENDING, re.DOTALL)
OWN = sorted(ROOT.glob("examples/own_*.py"))


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("(")[0])
def test_code_on_the_page_stands_in_an_example(block: str) -> None:
    """Which tests/test_examples.py runs."""
    assert any(block in path.read_text(encoding="utf-8") for path in OWN)


def test_every_example_of_an_extension_is_on_the_page() -> None:
    assert OWN and all(f"(../examples/{path.name})" in EXTENDING for path in OWN)


def anchors(page: Path) -> set[str]:
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_local_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name}: {link}"
