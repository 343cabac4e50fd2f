"""Tables of a plan and of a dry run, in the style of a comparison's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from .tables import TITLES, plain
from .units import bytes_text, count_text, flops_text, memory_text, names_text, seconds_text

Run = Mapping[str, Any]
AUTO = "split.cut auto: at the cut that the numbers of device, line and server give."
MINOR = ("Server compute", "Server memory", "Messages", "Down / site")  # left out first on a narrow terminal


def energy_text(joules: float) -> str:
    """`12.3 J`, `4.5 kJ`."""
    return f"{joules:.3g} J" if joules < 1000 else f"{joules / 1000:,.3g} kJ"


def cells(run: Run) -> dict[str, str]:
    """A prediction in words; `≤` stands before an upper bound."""
    sites = max(1, len(run["sites"]))
    least = "≤ " if run["bounds"] else ""
    pooled = run["framework"] == "centralized"
    title = str(TITLES.get(run["framework"], run["framework"]))
    return {
        "": f"{title}, {run['option']}" if run.get("option") else title,
        "Up / site": "raw data" if pooled else least + bytes_text(run["bytes_up"] / sites),
        "Down / site": "–" if pooled else least + bytes_text(run["bytes_down"] / sites),
        "Compute / site": flops_text(run["client_flops"] / sites),
        "Memory / site": memory_text(run["client_peak_bytes"]),
        "Server compute": flops_text(run["server_flops"]),
        "Server memory": memory_text(run["server_peak_bytes"]),
        "Messages": "–" if pooled else count_text(run["messages"]),
    }


def print_runs(runs: Sequence[Run], console: Console) -> None:
    """A row for each run; on a narrow terminal without the server's columns, on a narrower one a block for each."""
    rows = [cells(run) for run in runs]
    for leave_out in ((), MINOR):
        heads = [head for head in rows[0] if head not in leave_out]
        if _shown(heads, [[row[head] for head in heads] for row in rows], console):
            break
    else:
        for row in rows:
            console.print(Text(plain(row[""], console), style="bold"))
            for head, value in list(row.items())[1:]:
                console.print(Text(plain(f"  {head:<15} {value:>18}", console)))
    for reason in sorted({reason for run in runs for reason in run["bounds"]}):
        console.print(plain(f"≤ {reason}.", console), markup=False)
    for line in dict.fromkeys(line for run in runs for line in cuts_lines(run)):
        console.print(plain(line, console), markup=False, soft_wrap=True)


def cuts_lines(run: Run) -> list[str]:
    """With `split.cut: auto`, which sites get which cut, and from which numbers."""
    found, groups = [], run.get("cuts", [])
    for group in groups:
        memory = group["memory_bytes"]
        found.append(
            f"split.cut auto takes cut {group['cut']} for {_sites(group['sites'], len(groups) == 1)}: "
            f"{flops_text(group['flops_per_second'])}/s, a line of {bytes_text(group['bytes_per_second'])}/s, "
            f"{memory_text(memory) if memory else 'any'} memory; server "
            f"{flops_text(group['server_flops_per_second'])}/s."
        )
    if groups and run["how"]["cuts"].startswith("counted as for eager"):
        found.append("These cuts are counted as for eager attention: a run with another may take others.")
    return found


def _sites(names: Sequence[str], all_of_them: bool) -> str:
    """A few names, and how many more."""
    if all_of_them:
        return f"all {len(names)} sites" if len(names) > 1 else "the site"
    return names_text(names if len(names) < 5 else [*names[:3], f"{len(names) - 3} more"])


def print_times(runs: Sequence[Run], console: Console) -> None:
    """Seconds and joules of a round at the slowest site, one row for each device and line that something fits."""
    if not runs or not runs[0]["times"]:
        return
    if any("cut" in run["times"][0] for run in runs):
        console.print(AUTO, style="dim")
    heads = ["Device", "Line", *(TITLES.get(run["framework"], run["framework"]) for run in runs)]
    grid = [[run["times"][i] for run in runs] for i in range(len(runs[0]["times"]))]
    rows = [
        [found[0]["device"], found[0]["link"], *map(_time, found)]
        for found in grid
        if any(one["fits"] for one in found)
    ]
    small = dict.fromkeys(found[0]["device"] for found in grid if not any(one["fits"] for one in found))
    if small:
        console.print(plain(f"Too little memory for any of them: {names_text(small)}.", console), markup=False)
    if rows and not _shown(heads, rows, console):
        for row in rows:
            console.print(Text(plain(f"{row[0]}, {row[1]}", console), style="bold"))
            for head, value in zip(heads[2:], row[2:], strict=True):
                console.print(Text(plain(f"  {head:<15} {value:>24}", console)))


def _time(found: Mapping[str, Any]) -> str:
    if not found["fits"]:
        return "too little memory"
    cut = f"cut {found['cut']}: " if "cut" in found else ""
    return cut + f"{seconds_text(found['seconds_per_round'])}, {energy_text(found['joules_per_site_and_round'])}"


def _shown(heads: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> bool:
    """Print a table, if the terminal is wide enough for it."""
    table = Table(pad_edge=False, show_edge=False, header_style="bold", box=box.SIMPLE_HEAD)
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(plain(word, console)) for word in row))
    wide = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    if wide <= console.width:
        console.print(table)
    return wide <= console.width
