"""Seconds a round and memory with two sites over Flower (TLS, registered keys, loopback), beside our HTTPS wire.

    python benchmarks/flower_round.py [--model nano] [--rounds 4] [--settings key=value …]

A round is the time between two commits of FedLLM, evaluation and checkpoint included; the median is shown, and the
first round, in which models warm up, does not count. Memory is PSS (`/proc/PID/smaps_rollup`), sampled twice a second,
of each group of processes at its highest. It needs `fedtrio[flower]` in the environment that runs it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from flowers import Garden
from remotes import Launch, World


class Watch:
    """When rounds are committed, and how much memory groups of processes take, until it is left."""

    def __init__(self, out: Path, groups: Callable[[], Mapping[str, int]]) -> None:
        self.commits: list[float] = []
        self.peaks: dict[str, float] = {}
        self._journal, self._groups, self._over = out / "fedllm-0" / "rounds" / "journal.jsonl", groups, False
        self._threads = [threading.Thread(target=self._commits), threading.Thread(target=self._memory)]

    @property
    def seconds(self) -> float:
        """The median round, without the first."""
        return statistics.median(b - a for a, b in zip(self.commits, self.commits[1:], strict=False))

    def _commits(self) -> None:
        while not self._over:
            lines = self._journal.read_bytes().count(b"\n") if self._journal.exists() else 0
            if lines > len(self.commits):
                self.commits.append(time.monotonic())
            time.sleep(0.01)

    def _memory(self) -> None:
        while not self._over:
            for name, pid in self._groups().items():
                self.peaks[name] = max(self.peaks.get(name, 0.0), pss(pid))
            time.sleep(0.5)

    def __enter__(self) -> Watch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        for thread in self._threads:
            thread.join()


def pss(pid: int) -> float:
    """MB of a process and all that it has started."""
    total = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return 0.0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except (psutil.Error, AttributeError):
            continue
    return total / 1e6


def over_flower(world: World, settings: list[str]) -> Watch:
    with Garden(world, settings, name="flower") as garden:
        garden.plant()
        pids = {name: child.pid for name, child in garden.children.items()}
        roles = {"link": "SuperLink, ServerApp", "ada": "SuperNode, ClientApp", "ada worker": "worker"}
        with Watch(garden.out, lambda: {roles[name]: pids[name] for name in roles}) as watch:
            garden.run(1200)
    return watch


def over_https(world: World, settings: list[str]) -> Watch:
    with Launch(world, settings, name="https") as run:
        run.start(fork=False)
        with Watch(run.out, lambda: {"server": run.pid("server"), "site": run.pid("ada")}) as watch:
            run.wait("server", 600)
    return watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--settings", nargs="*", default=[])
    told: Any = parser.parse_args()
    model = str(Path(told.model).resolve()) if Path(told.model).exists() else told.model
    settings = ["frameworks=[fedllm]", f"rounds={told.rounds}", f"model={model}", *told.settings]
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder) / "world")
        for name, run in (("Flower", over_flower), ("HTTPS", over_https)):
            watch = run(world, settings)
            print(f"{name:<8} {watch.seconds:6.2f} s a round ({len(watch.commits) - 1} rounds)")
            for role, peak in watch.peaks.items():
                print(f"         {peak:6.0f} MB  {role}")


if __name__ == "__main__":
    main()
