"""One page of several studies: the points of all of them in one table and one accuracy-against-cost figure.

    python benchmarks/front.py runs/split runs/kd runs/fedllm --out runs/front

Each folder is one that `fedtrio sweep` wrote, of the same task and data.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fedtrio.report.study import csv_text, render


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path, nargs="+", help="folders of studies")
    parser.add_argument("--out", type=Path, default=Path("runs/front"))
    args = parser.parse_args()
    found = [json.loads((folder / "study.json").read_text(encoding="utf-8")) for folder in args.studies]
    points = [point for study in found for point in study["points"]]
    whole = {"study": " and ".join(study["study"] for study in found), "varied": [], "points": points}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table.csv").write_text(csv_text(whole), encoding="utf-8")
    (args.out / "report.html").write_text(render(whole), encoding="utf-8")
    print(args.out / "report.html")


if __name__ == "__main__":
    main()
