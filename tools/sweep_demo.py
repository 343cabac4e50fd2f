"""Choose the demo's hyper-parameters on held-out training rows (every fifth); the test set is not looked at.

    python tools/sweep_demo.py --framework fedllm "train.learning_rate=3e-3,5e-3" "train.head_learning_rate=2e-3,1e-2"

Runs the grid of the given values over the embedded default and prints one row for each point.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import tempfile
import time
from pathlib import Path

from fedtrio import load_config, run

DEMO = Path(__file__).parents[1] / "src" / "fedtrio" / "data" / "demo"


def hold_out(folder: Path) -> list[str]:
    """Settings that train on four fifths of the demo's training rows and test on the fifth."""
    with (DEMO / "train.csv").open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    for name, part in {"train": [r for i, r in enumerate(rows) if i % 5], "validation": rows[::5]}.items():
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([head, *part])
    files = {"train": folder / "train.csv", "test": folder / "validation.csv", "public": DEMO / "public.csv"}
    return [f"data.{name}={path}" for name, path in files.items()] + ["data.site=site"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", nargs="*", help="KEY=VALUE,VALUE,…")
    parser.add_argument("--framework", action="append", default=[])
    parser.add_argument("--set", action="append", default=[], dest="fixed", help="KEY=VALUE for all points")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    axes = [[f"{axis.split('=')[0]}={value}" for value in axis.split("=")[1].split(",")] for axis in args.grid]
    print("| settings | framework | validation accuracy by round | seconds |\n|-|-|-|-:|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        data = hold_out(Path(folder))
        for point in itertools.product(*axes):
            config = load_config(None, [*data, *args.fixed, *point])
            for framework in args.framework or ["fedllm"]:
                start = time.perf_counter()
                curve = run(config, framework, args.seed)["curve"]
                shown = ", ".join("–" if c["accuracy"] is None else f"{100 * c['accuracy']:.1f}" for c in curve)
                seconds = time.perf_counter() - start
                print(f"| {' '.join(point)} | {framework} | {shown} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
