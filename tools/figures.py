"""Draw the figures of the documentation from a run folder or a study's, by the report's own charts.

fedtrio compare --out runs/demo
python tools/figures.py runs/demo docs/figures

fedtrio sweep configs/paper/rank.yaml --out runs/rank
python tools/figures.py runs/rank docs/figures/paper       # one figure, rank.svg: what the varied setting does
"""

from __future__ import annotations

import argparse
import re
from functools import partial
from pathlib import Path

from fedtrio.errors import ConfigError
from fedtrio.report import curves, holdings, traffic, varied
from fedtrio.report.folders import results_of, study_of
from fedtrio.report.page import filled

FIGURES = {
    "quality-round": partial(curves.quality, x="round"),
    "quality-bytes": partial(curves.quality, x="bytes"),
    "quality-flops": partial(curves.quality, x="flops"),
    "traffic": traffic.traffic,
    "sites": holdings.heatmap,
}


def style() -> str:
    """What the page's style sheet says of drawings and their colours, light and dark."""
    sheet = filled("style.css.j2", {}).partition("@media (max-width")[0]
    rules = re.findall(r"^(?::root \{.*?^\}|@media \(prefers.*?^\}|svg.*?\})$", sheet, re.MULTILINE | re.DOTALL)
    return "\n".join([*rules, "svg { background: var(--bg); font-family: system-ui, sans-serif; overflow: hidden; }"])


def standalone(drawing: str) -> str:
    """A drawing of the page as a file of its own."""
    width, height = re.findall(r'viewBox="0 0 (\d+) (\d+)"', drawing)[0]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
    return drawing.replace("<svg", head, 1).replace("</desc>", f"</desc><style>\n{style()}\n</style>", 1) + "\n"


def figures(folder: Path) -> dict[str, str]:
    """Every drawing that a folder has something for, by name. Raises ConfigError for what is no such folder."""
    if (folder / "study.json").is_file():
        study = study_of(folder)
        return {study["study"]: varied.figure(study)}
    results = results_of(folder)
    return {name: draw(results) for name, draw in FIGURES.items()}


def main() -> None:
    """One file for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder, or that of a study")
    parser.add_argument("out", type=Path, help="folder for the figures")
    given = parser.parse_args()
    try:
        found = {name: drawing for name, drawing in figures(given.run).items() if drawing}
    except ConfigError as error:
        parser.error(str(error))
    if not found:
        parser.error(f"{given.run} has nothing to draw; of a study whose points do not differ, name one of them")
    given.out.mkdir(parents=True, exist_ok=True)
    for name, drawing in found.items():
        (given.out / f"{name}.svg").write_text(standalone(drawing), encoding="utf-8")


if __name__ == "__main__":
    main()
