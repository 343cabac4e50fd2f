"""How the public set decides what KD-FedLLM reaches: where its texts come from, and how many there are.

    python benchmarks/public_set.py --data shared/data --out runs/public-set
    python benchmarks/public_set.py --data shared/data --out runs/public-set --sources off-domain --sizes 200 --seeds 0

DATA holds banking77/ (train_10shot.csv, test.csv, public_2000.csv) and clinc150/ (train.csv), the files that
configs/banking77-10shot.yaml names. The public texts are other questions to a bank (in-domain), questions to an
assistant about anything, money among it (off-domain), or half and half (mixed). FedLLM and each site alone stand
beside them, once for each seed. A finished run is kept, so the same command goes on where it was broken off; the table
is of what there is.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from fedtrio import compare, load_config

ROOT = Path(__file__).parents[1]
SOURCES = {
    "in-domain": ["banking77/public_2000.csv"],
    "off-domain": ["clinc150/train.csv"],
    "mixed": ["banking77/public_2000.csv", "clinc150/train.csv"],
}
KD = ["kd.aggregation=probabilities", "kd.temperature=1.0", "kd.server_epochs=4"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with banking77 and clinc150")
    parser.add_argument("--out", type=Path, default=Path("runs/public-set"))
    parser.add_argument("--sources", nargs="+", choices=list(SOURCES), default=list(SOURCES))
    parser.add_argument("--sizes", nargs="+", type=int, default=[50, 100, 200, 400, 800, 1600])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], dest="extra", help="further settings, for all")
    args = parser.parse_args()
    banking = args.data.resolve() / "banking77"
    common = [f"data.train={banking / 'train_10shot.csv'}", f"data.test={banking / 'test.csv'}"]
    common += ["threads=1", *KD, *args.extra]

    print("| public texts | number | framework | accuracy | ± | payload up, a site | seeds |\n|-|-:|-|-:|-:|-:|-:|")
    for source in args.sources:
        files = [str(args.data.resolve() / name) for name in SOURCES[source]]
        for size in args.sizes:
            runs = []
            for seed in args.seeds:
                settings = [f"data.public={files}", f"data.max_public={size}", f"seeds=[{seed}]", "frameworks=[kd]"]
                runs += _runs([*common, *settings], args.out / f"{source}-{size}-{seed}")
            print(_row(source, str(size), runs), flush=True)
    for name in ("fedllm", "local"):
        runs = []
        for seed in args.seeds:
            settings = [f"data.public={banking / 'public_2000.csv'}", f"seeds=[{seed}]", f"frameworks=[{name}]"]
            runs += _runs([*common, *settings], args.out / f"{name}-{seed}")
        print(_row("", "", runs), flush=True)


def _runs(settings: list[str], out: Path) -> list[dict[str, Any]]:
    """One run folder's entries; a finished one is only read."""
    return compare(load_config(ROOT / "configs" / "banking77-10shot.yaml", settings), out)["runs"]


def _row(source: str, size: str, runs: list[dict[str, Any]]) -> str:
    """Mean accuracy of the common model, and its standard deviation over seeds."""
    scores = [100 * run["accuracy"] for run in runs]
    spread = f"{statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    sent = statistics.mean(run["payload_up"] / len(run["sites"]) for run in runs) / 1e6
    cells = [source, size, runs[0]["framework"], f"{statistics.mean(scores):.1f}", spread, f"{sent:.2f} MB", len(runs)]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
