"""Draw the figures of the documentation from a run folder, by the report's own charts.

fedtrio compare --out runs/demo
python tools/figures.py runs/demo docs/figures
"""

from __future__ import annotations

import argparse
import json
import re
from functools import partial
from pathlib import Path

from fedtrio.report import curves, holdings, traffic
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


def main() -> None:
    """Every figure that the results have something for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("out", type=Path, help="folder for the figures")
    given = parser.parse_args()
    results = json.loads((given.run / "results.json").read_text(encoding="utf-8"))
    given.out.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        if drawing := draw(results):
            (given.out / f"{name}.svg").write_text(standalone(drawing), encoding="utf-8")


if __name__ == "__main__":
    main()
