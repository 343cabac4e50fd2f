"""How long a run would take over a line: a model from what was measured and counted, and the numbers for the slider.

A site needs `seconds / speed + 8 bytes / rate + messages / 2 · round trip`: its computing as measured, its bytes over a
line of its own, and a round trip for each message and its answer. Sites work side by side, so a run lasts as long as
the one that needs most, in Split-FedLLM's `sequential` as long as all together; the server's measured seconds come on
top. Between rounds the share of that site is as in the whole run. `link.js` computes the same in the browser.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedtrio.report.tables import YARDSTICKS, Results, frameworks_of, score_of, title_of
from fedtrio.report.units import finite, mean

RATES = [digit * 10.0**power for power in range(-1, 4) for digit in (1, 2, 5)] + [10_000.0]  # Mbit/s
TRIPS = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0]  # ms
SPEEDS = [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]
POINTS = 40  # of a curve at most

Load = tuple[float, float, float]  # seconds of computing, bytes of both directions, messages of both directions


@dataclass(frozen=True)
class Line:
    """A line in Mbit/s each way and ms for a round trip; how many times as fast as here a site computes."""

    rate: float = 100.0
    trip: float = 20.0
    speed: float = 1.0

    def parts(self, load: Load) -> tuple[float, float, float]:
        """Seconds of computing, of bytes on the line, and of round trips."""
        seconds, nbytes, messages = load
        return seconds / self.speed, 8e-6 * nbytes / self.rate, messages / 2 * self.trip / 1000

    def need(self, load: Load) -> float:
        """All three together."""
        return sum(self.parts(load))


DEFAULT = Line()


@dataclass(frozen=True)
class Timed:
    """One run: each evaluated round (score, load of all sites so far, server's seconds), and the loads at its end."""

    rounds: list[tuple[int, float, Load, float]]
    whole: Load
    worst: list[Load]  # of the sites that may need most; where they take turns, of all together
    server: float

    def critical(self, line: Line) -> Load:
        """The load that decides how long the run lasts."""
        return max(self.worst, key=line.need)

    def total(self, line: Line) -> float:
        """Seconds of the whole run."""
        return line.need(self.critical(line)) + self.server

    def until(self, line: Line, load: Load, server: float) -> float:
        """Seconds to the end of a round."""
        whole = line.need(self.whole)
        return server + (line.need(load) * line.need(self.critical(line)) / whole if whole else 0.0)


def _load(entry: dict[str, Any]) -> Load:
    number = {key: finite(entry.get(key)) or 0.0 for key in ("client_seconds", "bytes_up", "bytes_down", "messages")}
    return number["client_seconds"], number["bytes_up"] + number["bytes_down"], number["messages"]


def _may_need_most(loads: list[Load]) -> list[Load]:
    """Those that no other one reaches in all three, the only ones that can need most on any line."""
    kept: list[Load] = []
    for load in sorted(set(loads), reverse=True):
        if not any(all(a <= b for a, b in zip(load, other, strict=True)) for other in kept):
            kept.append(load)
    return kept


def _timed(results: Results, run: dict[str, Any]) -> Timed:
    split = (results["config"].get("split") or {}) if run["framework"] == "split" else {}
    whole, loads = _load(run), [_load(site) for site in run.get("sites") or []]
    worst = [whole] if split.get("variant") == "sequential" or not loads else _may_need_most(loads)
    server, score, rounds = finite(run.get("server_seconds")) or 0.0, score_of(results).key, []
    for entry in run.get("curve") or []:
        value = finite(entry.get(score))
        if value is not None and {"client_seconds", "messages", "server_seconds"} <= entry.keys():
            rounds.append((int(entry["round"]), value, _load(entry), finite(entry["server_seconds"]) or 0.0))
    return Timed(rounds, whole, worst, server)


def timed(results: Results) -> dict[str, list[Timed]]:
    """The runs of each framework but the yardsticks'."""
    names = [name for name in frameworks_of(results) if name not in YARDSTICKS]
    runs = {name: [_timed(results, run) for run in results["runs"] if run["framework"] == name] for name in names}
    return {name: found for name, found in runs.items() if any(run.whole[0] for run in found)}


def thinned(count: int) -> list[int]:
    """Places of a curve's points that are kept, the last always."""
    every = -(-count // POINTS)
    return [place for place in range(count) if place % every == (count - 1) % every]


def series(runs: Sequence[Timed], line: Line = DEFAULT) -> list[tuple[float, float, int]]:
    """(seconds, score, round), means over the seeds, of the rounds that all seeds have."""
    seeds = [{number: (score, load, server) for number, score, load, server in run.rounds} for run in runs]
    shared = sorted(set.intersection(*map(set, seeds))) if seeds else []
    points = []
    for number in [shared[place] for place in thinned(len(shared))]:
        at = [run.until(line, *seed[number][1:]) for run, seed in zip(runs, seeds, strict=True)]
        points.append((sum(at) / len(at), sum(seed[number][0] for seed in seeds) / len(seeds), number))
    return points


def breakdown(runs: Sequence[Timed], line: Line = DEFAULT) -> list[float]:
    """Seconds of computing, bytes, round trips, server, and all; means over the seeds."""
    rows = [[*line.parts(run.critical(line)), run.server, run.total(line)] for run in runs]
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def sites(results: Results, framework: str) -> list[tuple[str, Load]]:
    """Each site's load, mean over the seeds, the heaviest first."""
    loads: dict[str, list[Load]] = {}
    for run in results["runs"]:
        if run["framework"] == framework:
            for site in run.get("sites") or []:
                loads.setdefault(str(site["name"]), []).append(_load(site))
    means = {name: tuple(sum(column) / len(of) for column in zip(*of, strict=True)) for name, of in loads.items()}
    return sorted(means.items(), key=lambda item: -DEFAULT.need(item[1]))  # type: ignore[arg-type,return-value]


def waited(results: Results) -> list[tuple[str, str, float, float]]:
    """Framework, site, its own seconds and those it waited, measured, where the sites were real; means over the seeds.

    It waited from the first message of each round to the last, but while it worked: for the others, server and line.
    """
    if not (results["config"].get("wire") or {}).get("sites"):
        return []
    rows = []
    for framework in frameworks_of(results):
        runs = [run for run in results["runs"] if run["framework"] == framework]
        lasted = mean(run.get("round_seconds") for run in runs)
        for name, (own, *_) in sites(results, framework) if lasted else ():
            rows.append((title_of(framework), name, own, max(0.0, (lasted or 0.0) - own)))
    return rows
