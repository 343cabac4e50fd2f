"""What finished runs tell: scores of settings that were run, and which of them can be told apart.

Settings of one study are compared pair by pair on the seeds that both were run with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import Config
from ..config_file import PLAIN, load_config
from ..errors import ConfigError
from ..report.tables import Score, score_of
from ..report.units import finite, mean, names_text
from ..report.verdict import Scored, paired

DATA = ("task", "model", "data", "clients", "partition", "participation", "rounds")  # what settings are compared on


@dataclass(frozen=True)
class Measured:
    """One framework at settings that were run; scores by seed, None where a run diverged."""

    framework: str
    config: Mapping[str, Any]
    scores: Mapping[int, float | None]
    score: Score
    tests: int
    point: str = ""  # of a study
    runs: Sequence[Mapping[str, Any]] = ()  # their entries in results.json, for which texts they answered right

    @property
    def mean(self) -> float | None:
        """Over the seeds; None where a seed diverged."""
        known = [finite(value) for value in self.scores.values()]
        return mean(known) if None not in known else None

    @property
    def worth(self) -> float:
        """The higher the better."""
        value = self.mean
        return -math.inf if value is None else value if self.score.higher_is_better else -value


@dataclass(frozen=True)
class Gap:
    """How much better one is than another, and what gap the evidence leaves open; None where that is not known."""

    by: float
    open: float | None
    seeds: int

    @property
    def clear(self) -> bool:
        """Whether the two can be told apart."""
        return self.open is not None and abs(self.by) > self.open


def gap(a: Measured, b: Measured) -> Gap:
    """By how much a is better than b, on the seeds that both have; left open is half the report's 95 % interval."""
    if a.mean is None or b.mean is None:
        return Gap(a.worth - b.worth if a.mean != b.mean else 0.0, 0.0, 0)  # one that diverged is behind
    of_a, of_b = (replace(Scored.of(m.runs, m.score.key), scores=m.scores) for m in (a, b))
    found = paired(of_a, of_b, a.tests if a.score.key == "accuracy" else 0, a.score)
    if found is None:
        return Gap(a.worth - b.worth, None, 0)
    by, half, seeds = found
    return Gap(by, half, len(seeds))


def levels(measured: Sequence[Measured]) -> list[list[Measured]]:
    """Best first, in groups: the best that is left, and all down to the last that can't be told from it."""
    left, found = sorted(measured, key=lambda one: -one.worth), []
    while left:
        close = [place for place, one in enumerate(left) if place == 0 or not gap(left[0], one).clear]
        found.append(left[: max(close) + 1])
        left = left[max(close) + 1 :]
    return found


def load_source(
    source: Path | None, settings: Sequence[str], plain: bool = False
) -> tuple[Config, list[Measured], list[str]]:
    """The configuration of a file, of a run folder, or of a study's first point; scores; and what was left out.

    Without a source it is the demo's, or, `plain`, each key's default.

    Raises ConfigError where a folder holds no finished run.
    """
    if source is None and plain:
        config = load_config(PLAIN, settings)
        config._base = Path.cwd()
        return config, [], []
    if source is None or not source.is_dir():
        return load_config(source, settings), [], []
    found = [source] if (source / "results.json").is_file() else []
    if not found and (source / "study.json").is_file():
        found = sorted(file.parent for file in source.glob("*/results.json"))
    if not found:
        raise ConfigError(f"{source} is no run folder and no study: it holds no results.json and no study.json")
    every = [(folder, results) for folder in found if (results := _read(folder / "results.json"))["runs"]]
    if not every:
        raise ConfigError(f"{source} holds no finished run")
    config, measured, notes = load_config(every[0][0] / "config.yaml", settings), [], []
    base = config.model_dump(mode="json")
    for folder, results in every:
        name = folder.name if len(found) > 1 else ""
        if other := [key for key in DATA if results["config"].get(key) != base[key]]:
            notes.append(f"what {folder.name} measured was left out, as it has another {names_text(other)}")
        else:
            measured += _scores(results, name)
    return config, measured, notes


def _scores(results: Mapping[str, Any], point: str) -> list[Measured]:
    score, tests = score_of(dict(results)), int(results["data"].get("test") or 0)
    found = []
    for framework in dict.fromkeys(run["framework"] for run in results["runs"]):
        runs = [run for run in results["runs"] if run["framework"] == framework]
        by_seed = {int(run["seed"]): finite(run.get(score.key)) for run in runs}
        found.append(Measured(framework, results["config"], by_seed, score, tests, point, runs))
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        return {key: results[key] for key in ("config", "data", "runs")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} can't be read as results of fedtrio: {error}") from error


def differing(base: Mapping[str, Any], other: Mapping[str, Any], framework: str) -> dict[str, Any]:
    """Settings of `other` that a framework's results depend on and that are not those of `base`, as `--set` keys."""
    sections = ("train", "lora", "fedllm", "kd", "split")
    ours = [name for name in sections if name in ("train", "lora", framework)]
    found = {
        f"{name}.{key}": value for name in ours for key, value in other[name].items() if value != base[name].get(key)
    }
    return found | {
        f"wire.{way}": other["wire"][way] for way in ("up", "down") if other["wire"][way] != base["wire"][way]
    }
