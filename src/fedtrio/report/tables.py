"""From the dictionary of `results.json` to rows, units and sentences; shared by the terminal and the page.

No framework is called better than another unless the difference exceeds the margin of `margin()`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fedtrio.report.units import (
    bytes_text,
    count_text,
    factor_text,
    finite,
    flops_text,
    mean,
    memory_text,
    names_text,
    percent_text,
    seconds_text,
)

Results = dict[str, Any]

TITLES = {
    "fedllm": "FedLLM",
    "kd": "KD-FedLLM",
    "split": "Split-FedLLM",
    "centralized": "Centralized",
    "local": "Local",
}
YARDSTICKS = ("centralized", "local")
SKEWED = ("dirichlet", "length")  # partitions that have an alpha
ASCII = str.maketrans({"±": "+-", "–": "-", "·": "-", "×": "x", "…": "..."})


@dataclass(frozen=True)
class Score:
    """What the runs are judged by: accuracy, or perplexity for causal language models."""

    key: str
    higher_is_better: bool

    @property
    def name(self) -> str:
        """`Accuracy` or `Perplexity`."""
        return self.key.capitalize()

    def text(self, value: float | None, unit: bool = True) -> str:
        """The value as the reader sees it."""
        if value is None:
            return "–"
        if self.key == "accuracy":
            return percent_text(value) if unit else f"{100 * value:.1f}"
        return f"{value:,.{2 if value < 100 else 1 if value < 1000 else 0}f}"

    def gap(self, difference: float) -> str:
        """A difference of two values: points of per cent, or plain."""
        return f"{100 * difference:.1f} points" if self.key == "accuracy" else f"{difference:.3g}"


def score_of(results: Results) -> Score:
    """Perplexity for causal language modelling, else accuracy."""
    causal = results["config"].get("task") == "causal-lm"
    return Score("perplexity", False) if causal else Score("accuracy", True)


@dataclass(frozen=True)
class Row:
    """One framework: means over its seeds of sums over all sites and rounds."""

    framework: str
    seeds: int
    score: float | None
    score_sd: float | None
    client_mean: float | None
    client_min: float | None
    sites: int
    bytes_up: float
    bytes_down: float
    client_flops: float
    client_seconds: float
    client_peak_bytes: float
    messages: float

    @property
    def title(self) -> str:
        """The name in the field's spelling."""
        return TITLES.get(self.framework, self.framework)

    @property
    def bytes_per_site(self) -> float:
        """Both directions, whole run, mean over the sites."""
        return (self.bytes_up + self.bytes_down) / self.sites

    @property
    def flops_per_site(self) -> float:
        """Whole run, mean over the sites."""
        return self.client_flops / self.sites


def deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation; one value has none."""
    if len(values) < 2:
        return None
    middle = sum(values) / len(values)
    return math.sqrt(sum((value - middle) ** 2 for value in values) / (len(values) - 1))


def frameworks_of(results: Results) -> list[str]:
    """The frameworks that ran, in the order of the configuration."""
    ran = list(dict.fromkeys(run["framework"] for run in results["runs"]))
    asked = [name for name in results["config"].get("frameworks", []) if name in ran]
    return asked + [name for name in ran if name not in asked]


def sites_of(results: Results, run: dict[str, Any]) -> int:
    """How many sites took part in a run, at least one."""
    return max(1, len(run.get("sites") or []) or int(results["config"].get("clients") or 1))


def _row(results: Results, framework: str) -> Row:
    runs = [run for run in results["runs"] if run["framework"] == framework]
    scores = [finite(run.get(score_of(results).key)) for run in runs]
    kept = [score for score in scores if score is not None]
    clients = [run.get("client_accuracy") or {} for run in runs]
    sums = ("bytes_up", "bytes_down", "client_flops", "client_seconds", "client_peak_bytes", "messages")
    return Row(
        framework=framework,
        seeds=len(runs),
        score=mean(kept) if len(kept) == len(runs) else None,  # a seed that diverged is not averaged away
        score_sd=deviation(kept),
        client_mean=mean(client.get("mean") for client in clients),
        client_min=mean(client.get("min") for client in clients),
        sites=max(sites_of(results, run) for run in runs),
        **{key: mean(run.get(key) for run in runs) or 0.0 for key in sums},
    )


def summary(results: Results) -> list[Row]:
    """One row for each framework, in the order of the configuration."""
    return [_row(results, framework) for framework in frameworks_of(results)]


def cells(row: Row, score: Score) -> dict[str, str]:
    """A row in words: the columns of the table, the same in the terminal and on the page."""
    spread = f" ± {score.text(row.score_sd, unit=False)}" if row.score_sd is not None else ""
    central = row.framework == "centralized"
    unit = " %" if score.key == "accuracy" and row.score is not None else ""
    columns = {
        score.name: score.text(row.score, unit=False) + spread + unit,
        "Weakest site": percent_text(row.client_min),
        "Up / site": "raw data" if central else bytes_text(row.bytes_up / row.sites),
        "Down / site": "–" if central else bytes_text(row.bytes_down / row.sites),
        "All sites": "raw data" if central else bytes_text(row.bytes_up + row.bytes_down),
        "Compute / site": "–" if central else flops_text(row.flops_per_site),
        "Time / site": "–" if central else seconds_text(row.client_seconds / row.sites),
        "Peak memory": "–" if central else memory_text(row.client_peak_bytes),
        "Messages": "–" if central else count_text(row.messages),
    }
    if not score.higher_is_better and row.client_min is None:
        del columns["Weakest site"]
    return columns


def _table(results: Results, write: Callable[[str], str], leave_out: Collection[str] = ()) -> Table:
    table = Table(pad_edge=False, show_edge=False, header_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    lines = [
        (
            row.title,
            {head: cell for head, cell in cells(row, score_of(results)).items() if head not in leave_out},
        )
        for row in summary(results)
    ]
    for head in lines[0][1] if lines else ():
        table.add_column(head, justify="right", no_wrap=True)
    for title, row in lines:
        table.add_row(*(Text(write(word)) for word in (title, *row.values())))
    return table


def plain(text: str, console: Console) -> str:
    """The text as this console can print it: as it is, or in ASCII."""
    unicode = console.encoding.lower().startswith("utf")
    return text if unicode else text.translate(ASCII).encode("ascii", "replace").decode()


def print_table(results: Results, console: Console) -> None:
    """The summary: a table as wide as the console allows; on a narrow one a block for each framework."""

    def words(text: str) -> str:
        return plain(text, console)

    unbounded = console.options.update(max_width=10_000)
    for leave_out in ((), ("Weakest site", "All sites", "Time / site", "Peak memory", "Messages")):
        table = _table(results, words, leave_out)
        if Measurement.get(console, unbounded, table).maximum <= console.width:
            console.print(table)
            break
    else:
        for row in summary(results):
            console.print(Text(words(row.title), style="bold"))
            for head, value in cells(row, score_of(results)).items():
                console.print(Text(words(f"  {head:<15} {value:>18}")))
    console.print(Text("Means over seeds; sums over all rounds.", style="dim"))


def margin(results: Results, a: Row, b: Row) -> float | None:
    """Twice the standard error of a - b: over the seeds or over the test texts, whichever is larger.

    Over the seeds, the deviation is pooled over all frameworks, as two or three seeds alone say little. Over
    the n test texts, an accuracy a has the binomial error sqrt(a(1-a)/n). None where neither can be known.
    """
    errors = []
    pooled = [row.score_sd for row in summary(results) if row.score_sd is not None]
    if pooled:
        variance = sum(sd**2 for sd in pooled) / len(pooled)
        errors.append(math.sqrt(variance / a.seeds + variance / b.seeds))
    tests = results["data"].get("test") or 0
    if score_of(results).key == "accuracy" and tests and a.score is not None and b.score is not None:
        errors.append(math.sqrt((a.score * (1 - a.score) + b.score * (1 - b.score)) / tests))
    return 2 * max(errors) if errors else None


def _ahead(results: Results, a: Row, b: Row) -> float | None:
    """By how much a is better than b; None inside the spread or where the spread is unknown."""
    limit = margin(results, a, b)
    if a.score is None or b.score is None or limit is None:
        return None
    gain = a.score - b.score if score_of(results).higher_is_better else b.score - a.score
    return gain if gain > limit else None


def _ranked(results: Results) -> list[Row]:
    rows = [row for row in summary(results) if row.framework not in YARDSTICKS and row.score is not None]
    return sorted(rows, key=lambda row: row.score or 0.0, reverse=score_of(results).higher_is_better)


def _leaders(results: Results) -> list[Row]:
    """The best framework and all that cannot be told from it."""
    ranked = _ranked(results)
    level = [place for place, row in enumerate(ranked) if place and _ahead(results, ranked[0], row) is None]
    return ranked[: max(level, default=0) + 1]


def _evidence(results: Results) -> str:
    seeds = max(row.seeds for row in summary(results))
    words = "one seed" if seeds == 1 else f"{seeds} seeds"
    tests = results["data"].get("test")
    return f"{words} and {count_text(tests)} test texts" if tests else words


def _quality(results: Results) -> str:
    score, ranked, leaders = score_of(results), _ranked(results), _leaders(results)
    shown = names_text(f"{row.title} ({score.text(row.score)})" for row in leaders)
    if len(ranked) == 1:
        return f"{shown} ran alone, with {_evidence(results)}."
    limits = [margin(results, ranked[0], row) for row in leaders[1:] or ranked[1:2]]
    limit = max((limit for limit in limits if limit is not None), default=None)
    if limit is None:
        return f"{shown}: with {_evidence(results)} the spread is unknown, so this order is no ranking."
    if len(leaders) == 1:
        second, lead = ranked[1], _ahead(results, ranked[0], ranked[1]) or 0.0
        return (
            f"{shown} is ahead: {score.gap(lead)} better than {second.title} ({score.text(second.score)}), "
            f"more than the {score.gap(limit)} that {_evidence(results)} leave open."
        )
    rest = names_text(f"{row.title} ({score.text(row.score)})" for row in ranked[len(leaders) :])
    return (
        f"{shown} lie too close to call: {_evidence(results)} cannot separate frameworks closer than "
        f"{score.gap(limit)}{f'. Behind them: {rest}' if rest else ''}."
    )


def _least(rows: list[Row], key: str, words: str, verb: str) -> str | None:
    ranked = sorted(rows, key=lambda row: getattr(row, key))
    low = getattr(ranked[0], key)
    if low <= 0:
        return None
    times = [f"{row.title} {verb} {factor_text(getattr(row, key) / low)}× as much" for row in ranked[1:]]
    return f"{ranked[0].title} {words}; {names_text(times)}."


def _costs(results: Results) -> list[str]:
    rows = [row for row in summary(results) if row.framework not in YARDSTICKS]
    if len(rows) < 2:
        return []
    wire = f"moves the fewest bytes ({bytes_text(min(row.bytes_per_site for row in rows))} per site)"
    compute = f"asks the least compute of a site ({flops_text(min(row.flops_per_site for row in rows))})"
    lines = [_least(rows, "bytes_per_site", wire, "moves"), _least(rows, "flops_per_site", compute, "asks")]
    return [line for line in lines if line]


def _against(results: Results, yardstick: Row) -> str | None:
    """How the frameworks stand against a yardstick; None where no margin is known."""
    groups: dict[str, list[str]] = {"better": [], "level": [], "worse": []}
    for row in _ranked(results):
        if margin(results, row, yardstick) is None:
            return None
        better, worse = _ahead(results, row, yardstick), _ahead(results, yardstick, row)
        groups["better" if better else "worse" if worse else "level"].append(row.title)
    verbs = {
        "better": ("does better", "do better"),
        "level": ("is within the spread", "are within the spread"),
        "worse": ("does worse", "do worse"),
    }
    everyone = len(_ranked(results))
    return names_text(
        f"{'all' if len(names) == everyone > 1 else names_text(names)} {verbs[group][len(names) > 1]}"
        for group, names in groups.items()
        if names
    )


def _yardsticks(results: Results) -> str | None:
    rows = {row.framework: row for row in summary(results) if row.score is not None}
    words = {"local": "training alone, the floor", "centralized": "all data in one place, the ceiling"}
    parts = []
    for name in (name for name in words if name in rows):
        value, stand = score_of(results).text(rows[name].score), _against(results, rows[name])
        known = f"Against {words[name]} ({value}), {stand}."
        parts.append(known if stand else f"{words[name].capitalize()}, reaches {value}.")
    return " ".join(parts) or None


def reading(results: Results) -> list[str]:
    """The results in two or three sentences, naming no winner inside the spread."""
    if not results["runs"]:
        return ["No run has finished yet."]
    lost = [row.title for row in summary(results) if row.score is None]
    lines = [
        _quality(results) if _ranked(results) else None,
        " ".join(_costs(results)),
        _yardsticks(results),
        f"{names_text(lost)} ended without a finite {score_of(results).key}." if lost else None,
    ]
    return [line for line in lines if line]


def asides(results: Results) -> list[str]:
    """What the table has no column for: what averaging lost, and how models of sites' own are spread."""
    lines = []
    for framework in frameworks_of(results):
        runs, title = [r for r in results["runs"] if r["framework"] == framework], TITLES.get(framework, framework)
        curves = [[finite(entry.get("aggregation_error")) for entry in run.get("curve") or []] for run in runs]
        known = [[error for error in curve if error is not None] for curve in curves]
        if any(known):
            last, most = mean(curve[-1] for curve in known if curve), max(max(c, default=0.0) for c in known)
            lines.append(
                f"{title}, aggregation error: the server’s update of the weights missed the exact mean of the sites’ "
                f"updates by {percent_text(last)} of its norm in the last round, by {percent_text(most)} at most."
            )
        if any(run.get("adapters") for run in runs):
            spread = {
                key: mean((r.get("client_accuracy") or {}).get(key) for r in runs) for key in ("mean", "p10", "jain")
            }
            if None not in spread.values():
                lines.append(
                    f"{title}, a model for each site: accuracy {percent_text(spread['mean'])} in the mean and "
                    f"{percent_text(spread['p10'])} at the 10th percentile of sites; Jain’s index {spread['jain']:.3f} "
                    "(1: all equal)."
                )
    return lines


def next_command(results: Results) -> str:
    """The next command worth typing: more seeds inside the spread, else harder data or more rounds."""
    config = results["config"]
    seeds = list(config.get("seeds") or [0])
    rounds = int(config.get("rounds") or 1)
    close = len(_ranked(results)) > 1 and len(_leaders(results)) > 1
    if close and len(seeds) < 5:
        more = seeds + [seed for seed in range(max(seeds) + 5) if seed not in seeds]
        wish = f"seeds={more[: 3 if len(seeds) < 3 else 5]}".replace(" ", "")
    else:
        partition = config.get("partition") or {}
        alpha = finite(partition.get("alpha")) if partition.get("name") in SKEWED else None
        wish = "partition.alpha=0.1" if alpha and alpha > 0.1 else f"rounds={2 * rounds}"
    return f'fedtrio compare … --set "{wish}"'
