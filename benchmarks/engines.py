"""What each wire costs: seconds and memory of a FedLLM round, the way of a frame, and Ray's overhead at equal cores.

    python benchmarks/engines.py [--sites 8 64 512] [--pairs 3] [--only rounds frames ratio] [--keep FILE] [--json]

* **rounds**: one round of FedLLM on a small Llama with 8 texts a site and one torch thread for each worker: the median
  of three (of one from 512 sites on) after the first, in which workers load the model and FLOPs are counted; and the
  memory of all processes together (proportional set size). Over HTTPS each site is a process, so only with the fewest.
* **frames**: a worker that sends back what it gets: turns a second of 1 kB, and MB a second both ways at 1 MB.
  `benchmarks/wire.py` has the same for HTTPS.
* **ratio**: Ray with one worker against loopback with 64 sites, everything that either starts held to one core: rounds
  of both alternate, and the median of the pairs' ratios counts. The ratio of CPU seconds, which other work on the
  machine changes less, stands beside it: of this process, and of all that was started.

Each line is measured in processes of its own and kept in FILE, so what was broken off goes on; remove it to start anew.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
EACH = 8  # texts of a site, one mini-batch
LIMIT_RATIO = 1.15
WIRES = {  # name: settings of the wire
    "loopback": "{name: loopback}",
    "process, 1 worker": "{name: process, workers: 1}",
    "process, 2 workers": "{name: process, workers: 2}",
    "Ray, 1 worker": "{name: ray, workers: 1}",
    "Ray, 2 workers": "{name: ray, workers: 2}",
    "HTTPS, a process a site": "https",
}
ECHOES = ("loopback", "process", "Ray")


# A round --------------------------------------------------------------------------------------------------------------


def config_of(folder: Path, model: str, sites: int, wire: str) -> Any:
    """FedLLM on the demo's texts, again and again until all sites have some."""
    from fedtrio.config_file import load_config

    demo = ROOT / "src" / "fedtrio" / "data" / "demo"
    with (demo / "train.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    with (folder / "train.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([rows[0], *(rows[1 + i % (len(rows) - 1)] for i in range(sites * EACH))])
    data = (
        f"{{train: {folder}/train.csv, test: {demo}/test.csv, public: {demo}/public.csv, max_test: 8, max_public: 8}}"
    )
    labels = sorted({row[1] for row in rows[1:]})
    settings = [
        f"model={model}",
        f"data={data}",
        f"data.labels=[{', '.join(labels)}]",
        f"clients={sites}",
        "partition={name: iid}",
        "frameworks=[fedllm]",
    ]
    settings += ["threads=1", "train.precision=fp32", f"train.batch_size={EACH}", "train.pad_to_multiple_of=8"]
    settings += ["lora.target_modules=all-linear"]
    return load_config(None, [*settings, f"wire={wire}"])


class Rounds:
    """The rounds of one run, one by one; `over(bench)` may give a wire of its own."""

    def __init__(self, config: Any, over: Callable[[Any], Any] | None = None) -> None:
        from fedtrio.bench import Bench
        from fedtrio.ledger import Ledger
        from fedtrio.meter import Meter
        from fedtrio.run import _wire

        self.bench = Bench(config)
        self.method, self.meter = config.framework("fedllm"), Meter(self.bench.costs)
        self.lab = self.bench.lab(self.method, 0, self.meter)
        self.wire = over(self.bench) if over else _wire(self.bench, "fedllm", self.lab, self.meter, None)
        self.lab.abreast, self.lab.sites = self.wire.abreast, self.wire.sites
        self.state, self.ledger = self.method.setup(self.lab), Ledger()

    def seconds(self) -> float:
        """Of the next round: from the common adapter to the next one, and what the sites say that they have spent."""
        from fedtrio.program import ACCOUNT, ask, drive

        self.lab.round += 1
        start = time.perf_counter()
        self.wire.start_round("fedllm-0", self.lab.round, None)
        drive(self.method.server(self.lab, self.state, self.wire.sites), self.wire, self.lab.round, self.ledger)
        assert len(ask(self.wire, ACCOUNT, self.wire.sites, self.lab.round)) == len(self.wire.sites)
        return time.perf_counter() - start


def memory() -> int:
    """Bytes of this process and all that it has started, pages that several share counted once."""
    this = psutil.Process()
    return sum(process.memory_full_info().pss for process in (this, *this.children(recursive=True)))


def a_wire(wire: str, model: str, sites: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(Path(folder), model, sites, "{}" if wire == "https" else wire)
        rounds = Rounds(config, partial(over_https, Path(folder)) if wire == "https" else None)
        measured = [rounds.seconds() for _ in range(4 if sites < 512 else 2)]
        found = {"seconds": statistics.median(measured[1:]), "bytes": memory()}
        getattr(rounds.wire, "finish", rounds.wire.close)()
        return found


def over_https(folder: Path, bench: Any) -> Any:
    from fedtrio.certs import make_certs
    from fedtrio.wires.https import Https

    names = [share.name for share in bench.shares(0)]
    certs = make_certs(names, folder / "certs")
    wire = Https(certs["server"], names, lambda site, greeting: {}, host="127.0.0.1", port=0)
    context = multiprocessing.get_context("spawn")
    for name in names:
        there = f"https://127.0.0.1:{wire.port}", certs[name]
        context.Process(target=a_site, args=(bench.config, name, *there), daemon=True).start()
    wire.wait_for(len(names), 300)
    return wire


def a_site(config: Any, name: str, url: str, certs: Path) -> None:
    from split_over_https import Door

    from fedtrio.run import sites_of_worker
    from fedtrio.wires.dial import dial

    dial(url, certs, Door(sites_of_worker(config, "fedllm", 0, None, [name])[name]))


# A frame --------------------------------------------------------------------------------------------------------------


class Echo:
    """A site that sends back what it gets."""

    def answer(self, frame: bytes) -> bytes:
        return frame

    def reset(self) -> None: ...

    def recall(self, versions: Mapping[int, bytes]) -> None: ...

    def learnt(self) -> bytes:
        return b""


class Nothing:
    """The memory of a site that has none."""

    def add(self, round: int, version: bytes) -> None: ...

    def saved(self) -> dict[int, bytes]:
        return {}


def echoes(names: Iterable[str]) -> dict[str, Echo]:
    return {name: Echo() for name in names}


def a_frame(name: str) -> dict[str, float]:
    from wire import rate

    from fedtrio.wires.loopback import Loopback
    from fedtrio.wires.process import Process
    from fedtrio.wires.ray import Ray

    make = {
        "loopback": lambda: Loopback(echoes(["site"])),
        "process": lambda: Process(echoes, ["site"], 1),
        "Ray": lambda: Ray(echoes, {"site": Nothing()}, 1, {"num_cpus": 1}, cores=1),
    }
    wire = make[name]()
    wire.start_round("echo-0", 1, None)

    def turns(size: int) -> float:
        frame = bytes(size)
        return rate(lambda: [len(answer or b"") for _, answer in wire.exchange([("site", frame)])], 2.0)

    small, large = turns(1_000), turns(1_000_000)
    wire.close()
    return {"turns_per_s": small, "mb_per_s": 2 * large}


# Ray against loopback -------------------------------------------------------------------------------------------------


def a_ratio(model: str, sites: int, pairs: int) -> dict[str, Any]:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # ours, and of all that we start
    with tempfile.TemporaryDirectory() as folder:
        sides = [Rounds(config_of(Path(folder), model, sites, WIRES[name])) for name in ("loopback", "Ray, 1 worker")]
        for side in sides:
            side.seconds()
        measured, spent = [], []
        for pair in range(pairs):
            took: dict[int, tuple[float, float]] = {}
            for index in (1, 0) if pair % 2 else (0, 1):
                before = cpu_seconds(children=bool(index))
                took[index] = sides[index].seconds(), cpu_seconds(children=bool(index)) - before
            measured.append([took[index][0] for index in (0, 1)])
            spent.append([took[index][1] for index in (0, 1)])
        same = all((sides[0].state[g][n] == t).all() for g in sides[0].state for n, t in sides[1].state[g].items())
        assert same, "the two wires end in different adapters"
        sides[1].wire.close()
    ratios, of_cpu = ([ray / loopback for loopback, ray in pairs] for pairs in (measured, spent))
    loopback = statistics.median(pair[0] for pair in measured)
    return {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "cpu": statistics.median(of_cpu),
        "loopback_s": loopback,
    }


def cpu_seconds(children: bool) -> float:
    """Of this process, and of all that it has started."""
    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *(this.children(recursive=True) if children else ()))]
    return sum(each.user + each.system for each in times)


# All of it ------------------------------------------------------------------------------------------------------------


def lines(only: list[str], sites: list[int], pairs: int) -> Iterator[tuple[str, list[str]]]:
    """Name and arguments of each measurement."""
    if "ratio" in only:
        yield "ratio", ["--ratio", str(pairs)]
    if "frames" in only:
        yield from ((f"frames: {name}", ["--frame", name]) for name in ECHOES)
    if "rounds" in only:
        for number in sites:
            for name in WIRES:
                if WIRES[name] != "https" or number == min(sites):
                    yield f"{number} sites: {name}", ["--round", name, str(number)]


def shown(name: str, found: Mapping[str, Any]) -> str:
    if "ratio" in found:
        each = ", ".join(f"{ratio:.3f}" for ratio in found["ratios"])
        met = "yes" if found["ratio"] <= LIMIT_RATIO else "NO"
        text = f"{found['ratio']:.3f} (pairs {each}; CPU {found['cpu']:.3f}; loopback {found['loopback_s']:.2f} s)"
        return f"Ray / loopback, 64 sites, one core: {text}; limit {LIMIT_RATIO}, met: {met}"
    if "turns_per_s" in found:
        turn = 1000 / found["turns_per_s"]
        return f"{name:<36} {turn:>8.3f} ms a turn of 1 kB {found['mb_per_s']:>9,.0f} MB/s at 1 MB"
    return f"{name:<36} {found['seconds']:>8.2f} s a round {found['bytes'] / 1e6:>9,.0f} MB"


def measured(arguments: list[str], model: str) -> dict[str, Any]:
    """This file again in a fresh process."""
    command = [sys.executable, __file__, "--model", model, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} ended with code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--pairs", type=int, default=9, help="of rounds, for the ratio")
    parser.add_argument(
        "--only", nargs="+", choices=("rounds", "frames", "ratio"), default=["ratio", "frames", "rounds"]
    )
    parser.add_argument("--keep", type=Path, default=ROOT / "runs" / "engines.jsonl", help="what was measured already")
    parser.add_argument("--model", default=str(ROOT.parent / "shared" / "models" / "stories260k"))
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--round", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--frame", help=argparse.SUPPRESS)
    parser.add_argument("--ratio", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if chosen.round:
        return print(json.dumps(a_wire(WIRES[chosen.round[0]], chosen.model, int(chosen.round[1]))))
    if chosen.frame:
        return print(json.dumps(a_frame(chosen.frame)))
    if chosen.ratio:
        return print(json.dumps(a_ratio(chosen.model, 64, chosen.ratio)))
    chosen.keep.parent.mkdir(parents=True, exist_ok=True)
    text = chosen.keep.read_text(encoding="utf-8") if chosen.keep.is_file() else ""
    kept = dict(json.loads(line) for line in text.splitlines())
    for name, arguments in lines(chosen.only, chosen.sites, chosen.pairs):
        if name not in kept:
            kept[name] = measured(arguments, chosen.model)
            with chosen.keep.open("a", encoding="utf-8") as file:
                file.write(json.dumps([name, kept[name]]) + "\n")
        if not chosen.json:
            print(shown(name, kept[name]), flush=True)
    if chosen.json:
        print(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()
