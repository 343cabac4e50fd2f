"""The points of a study: what each framework reached at each of them, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedtrio.report import link
from fedtrio.report.tables import Row, Score, score_of, summary
from fedtrio.report.units import mean
from fedtrio.report.verdict import Scored

Study = Mapping[str, Any]
KNOWN = {"round", "accuracy", "loss", "perplexity", "bytes_up", "bytes_down", "client_flops"}  # in a curve's entries
KNOWN |= {"messages", "client_seconds", "server_seconds"}


@dataclass(frozen=True)
class Line:
    """One framework at one point: what was set there, and what came of it, means over the seeds."""

    point: str
    settings: Mapping[str, Any]
    row: Row
    server_seconds: float | None
    lasts: float  # seconds over the default line
    scored: Scored
    tests: int  # test texts, 0 where unknown
    more: dict[str, float] = field(default_factory=dict)  # what else the last round told, as aggregation_error


def lines_of(study: Study) -> list[Line]:
    """All lines, in the order of the points and of their frameworks."""
    found, key = [], score_in(study).key
    for point in study["points"]:
        results = {"config": {**point.get("config", {}), "task": task_of(study)}, "runs": point["runs"]}
        timed = link.timed(results)
        for row in summary(results):
            runs = [run for run in point["runs"] if run["framework"] == row.framework]
            last = [run["curve"][-1] for run in runs if run.get("curve")]
            names = dict.fromkeys(name for entry in last for name in entry if name not in KNOWN)
            told = {name: mean(entry.get(name) for entry in last) for name in names}
            more = {name: value for name, value in told.items() if value is not None}
            seconds = mean(run.get("server_seconds") for run in runs)
            lasts = link.breakdown(timed[row.framework])[-1] if row.framework in timed else 0.0
            tests = (point.get("tests") or 0) if key == "accuracy" else 0
            found.append(Line(point["name"], point["settings"], row, seconds, lasts, Scored.of(runs, key), tests, more))
    return found


def task_of(study: Study) -> str:
    """As in a configuration."""
    entries = (run for point in study["points"] for run in point["runs"])
    return "causal-lm" if any("perplexity" in run for run in entries) else "classification"


def score_in(study: Study) -> Score:
    """What the runs of a study are judged by."""
    return score_of({"config": {"task": task_of(study)}})
