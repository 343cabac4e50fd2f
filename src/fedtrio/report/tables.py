"""From the dictionary of `results.json` to rows in words; shared by the terminal and the page."""

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
    finite,
    flops_text,
    mean,
    memory_text,
    percent_text,
    seconds_text,
)

Results = dict[str, Any]
Grid = tuple[list[str], list[list[str]]]  # heads and rows of a table in words

TITLES = {
    "fedllm": "FedLLM",
    "kd": "KD-FedLLM",
    "split": "Split-FedLLM",
    "centralized": "Centralized",
    "local": "Local",
}
LONGEST = 24  # letters of a framework's name, where it is none of these
YARDSTICKS = ("centralized", "local")
SKEWED = ("dirichlet", "length")  # partitions that have an alpha
ASCII = str.maketrans({"±": "+-", "–": "-", "·": "-", "×": "x", "…": "..."})


def title_of(framework: str) -> str:
    """The name in the field's spelling."""
    words = TITLES.get(framework, framework)
    return words if len(words) <= LONGEST else words[: LONGEST - 1] + "…"


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
        return title_of(self.framework)

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
