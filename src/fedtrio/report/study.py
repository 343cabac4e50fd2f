"""The table of a study in CSV, LaTeX and words, and its page."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from markupsafe import Markup

from fedtrio.report import link, varied
from fedtrio.report.curves import AXES, front, grid, marker, place_label, steps, x_axis_of, y_axis_of
from fedtrio.report.page import all_printable, filled
from fedtrio.report.points import Line, Study, lines_of, score_in
from fedtrio.report.svg import HEIGHT, RIGHT, WIDTH, Axis, short, svg, text, tone
from fedtrio.report.tables import YARDSTICKS, Grid, Score
from fedtrio.report.units import bytes_text, finite, flops_text, memory_text, percent_text, seconds_text
from fedtrio.report.verdict import paired

KEYS = 30  # settings that differ, shown at most


def columns(study: Study) -> tuple[list[str], list[list[object]]]:
    """Heads and rows of plain numbers: bytes, FLOPs, seconds; costs of the mean site over the whole run."""
    lines, key = lines_of(study), score_in(study).key
    more = list(dict.fromkeys(name for each in lines for name in each.more))
    varied = list(study["varied"])
    heads = ["point", *varied, "framework", "seeds", key, f"{key}_sd", "client_accuracy_min", "bytes_up", "bytes_down"]
    heads += ["client_flops", "client_peak_bytes", "messages", "client_seconds", "server_seconds", *more]
    rows: list[list[object]] = []
    for each in lines:
        row, sites = each.row, each.row.sites
        settings = [_plain(each.settings.get(name, "")) for name in varied]
        numbers = [row.score, row.score_sd, row.client_min, row.bytes_up / sites, row.bytes_down / sites]
        numbers += [row.client_flops / sites, row.client_peak_bytes, row.messages, row.client_seconds / sites]
        numbers += [each.server_seconds, *(each.more.get(name) for name in more)]
        rows.append([each.point, *settings, row.framework, row.seeds, *("" if n is None else n for n in numbers)])
    return heads, rows


def csv_text(study: Study) -> str:
    """The table for a spreadsheet or a program."""
    out = io.StringIO()
    heads, rows = columns(study)
    csv.writer(out, lineterminator="\n").writerows([heads, *rows])
    return out.getvalue()


def words(study: Study) -> tuple[list[str], list[list[str]]]:
    """The table for people: heads and rows of text."""
    score, lines = score_in(study), lines_of(study)
    more = list(dict.fromkeys(name for each in lines for name in each.more))
    heads = ["Point", "Framework", score.name, "Weakest site", "Up / site", "Down / site", "Compute / site"]
    heads += ["Peak memory", "Server time", *(name.replace("_", " ").capitalize() for name in more)]
    rows = []
    for each in lines:
        row = each.row
        spread = f" ± {score.text(row.score_sd, unit=False)}" if row.score_sd is not None else ""
        quality = [score.text(row.score, unit=False) + spread, percent_text(row.client_min)]
        costs = [bytes_text(row.bytes_up / row.sites), bytes_text(row.bytes_down / row.sites)]
        costs += [flops_text(row.flops_per_site), memory_text(row.client_peak_bytes), seconds_text(each.server_seconds)]
        if row.framework in YARDSTICKS:
            costs[:2] = "–", "–"
        told = [f"{each.more[name]:.3g}" if name in each.more else "–" for name in more]
        rows.append([each.point, row.title, *quality, *costs, *told])
    return heads, rows


def latex(study: Study) -> str:
    """The table for a paper, with booktabs."""
    heads, rows = words(study)
    body = [" & ".join(map(_tex, row)) + r" \\" for row in rows]
    top = " & ".join(map(_tex, heads)) + r" \\"
    form = "ll" + "r" * (len(heads) - 2)
    lines = [rf"\begin{{tabular}}{{{form}}}", r"\toprule", top, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def markdown(study: Study) -> str:
    """The table for a document."""
    heads, rows = words(study)
    rule = ["-", "-", *["-:"] * (len(heads) - 2)]
    cells = ([*map(str, row)] for row in [heads, rule, *rows])
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in cells) + "\n"


def pages(study: Study) -> dict[str, str]:
    """What stands beside `study.json`, by file name."""
    return {"table.csv": csv_text(study), "table.tex": latex(study), "report.html": render(study)}


def render(study: Study) -> str:
    """The study's page as one string of HTML."""
    study = all_printable(study)
    heads, rows = words(study)
    lines = lines_of(study)
    shown = [(name, Markup(_scatter(lines, score_in(study), name))) for name in _COSTS]
    seeds = sum(len(point["runs"]) for point in study["points"])
    context = {"title": study["study"], "heads": heads, "rows": [*zip(lines, rows, strict=True)]}
    context |= {"answer": answer(study), "notes": study.get("notes") or [], "differ": differ(study), "slider": None}
    context["varied"] = [(title, Markup(chart)) for title, chart in varied.drawings(study)]
    context["files"] = not study.get("folders")
    facts = [("Points", len(study["points"])), ("Runs", seeds), ("Varied", ", ".join(study["varied"]) or "nothing")]
    captions = {"bytes": "bytes of a site", "flops": "operations of a site"}
    captions["seconds"] = f"time over {link.DEFAULT.rate:g} Mbit/s, {link.DEFAULT.trip:g} ms"
    return filled(
        "study.html.j2", context | {"facts": facts, "charts": shown, "captions": captions, "score": score_in(study)}
    )


# The answer -----------------------------------------------------------------------------------------------------------


def answer(study: Study) -> list[str]:
    """Which framework at which point leads, what is not separable from it, and which of that moves the fewest bytes."""
    score = score_in(study)
    lines = [each for each in lines_of(study) if each.row.framework not in YARDSTICKS and each.row.score is not None]
    if not lines:
        return []
    best = (max if score.higher_is_better else min)(lines, key=lambda each: each.row.score or 0.0)
    others = [each for each in lines if each is not best]
    found = [paired(best.scored, each.scored, min(best.tests, each.tests), score) for each in others]
    head = f"{best.row.title} at {best.point} ({score.text(best.row.score)})"
    if not others:
        return [f"{head} ran alone."]
    if not any(pair and pair[1] is not None for pair in found):
        return [f"{head} is the best; the spread is unknown, so this order is no ranking. More seeds would tell."]
    level = [
        each for each, pair in zip(others, found, strict=True) if pair is None or pair[1] is None or pair[0] <= pair[1]
    ]
    if not level:
        rest = f"all {len(others)} others are" if len(others) > 1 else f"{others[0].row.title} at {others[0].point} is"
        return [f"{head} leads; {rest} separably behind."]
    verb = "is" if len(level) == 1 else "are"
    told = [f"{head} is the best; {len(level)} of {len(others)} others {verb} not separable from it."]
    cheap = min((each for each in [best, *level] if each.row.bytes_per_site), key=_bytes, default=best)
    if cheap is not best:
        told.append(
            f"Of these {cheap.row.title} at {cheap.point} ({score.text(cheap.row.score)}) moves the fewest bytes: "
            f"{bytes_text(_bytes(cheap))} per site against {bytes_text(_bytes(best))}."
        )
    return told


def _bytes(line: Line) -> float:
    return line.row.bytes_per_site


def differ(study: Study) -> Grid:
    """The settings that are not the same in all runs; at the points of a study their names say them."""
    names = list(study["varied"])[:KEYS]
    rows = [[p["name"], *(str(_plain(p["settings"].get(name, "–"))) for name in names)] for p in study["points"]]
    return ["Point", *names], rows if names and study.get("folders") else []


# Quality against cost -------------------------------------------------------------------------------------------------

_COSTS: dict[str, Callable[[Line], float]] = {
    "bytes": _bytes,
    "flops": lambda line: line.row.flops_per_site,
    "seconds": lambda line: line.lasts,
}


def _scatter(lines: Sequence[Line], score: Score, cost: str) -> str:
    """One mark for each framework at each point, and the front as steps."""
    of, write = _COSTS[cost], AXES[cost].write
    marks = [(each, of(each), finite(each.row.score)) for each in lines if each.row.framework not in YARDSTICKS]
    kept = [(each, x, y) for each, x, y in marks if x > 0 and y is not None]
    if not kept:
        return ""
    x_axis = x_axis_of(cost, [x for _, x, _ in kept], WIDTH - RIGHT)
    y_axis = y_axis_of(score, [y for *_, y in kept])
    body = [*grid(cost, x_axis, y_axis, score)]
    best = front([(x, y) for _, x, y in kept], score.higher_is_better)
    body.append(steps(best, x_axis, y_axis))
    for each, x, y in kept:
        told = escape(f"{each.point}, {each.row.title}: {score.text(y)}, {write(x)}")
        mark = marker(each.row.framework, x_axis.at(x), y_axis.at(y))
        body.append(f'<g style="--c:{tone(each.row.framework)}"><title>{told}</title>{mark}</g>')
    body += _names(kept, best, x_axis, y_axis)
    return svg(
        f"study-{cost}",
        f"{score.name} against {AXES[cost].title}",
        "One mark for each framework at each point; the table holds the numbers. On the front: "
        + "; ".join(f"{score.text(y)} at {write(x)}" for x, y in best[:20]),
        (WIDTH, HEIGHT),
        body,
    )


def _names(
    kept: Sequence[tuple[Line, float, float]], best: Sequence[tuple[float, float]], x_axis: Axis, y_axis: Axis
) -> list[str]:
    """Points on the front by name, beside all marks."""
    taken = [(x_axis.at(x) - 6, y_axis.at(y) - 6, x_axis.at(x) + 6, y_axis.at(y) + 6) for _, x, y in kept]
    found = []
    for each, x, y in kept:
        if (x, y) in best:
            label = short(each.point, 28)
            spot = place_label(label, x_axis.at(x), y_axis.at(y), taken, WIDTH - 2)
            extra = f' class="label" style="--c:{tone(each.row.framework)}"'
            found.append(text(*spot, label, "start", extra))
    return found


def _plain(value: Any) -> object:
    return value if isinstance(value, str | int | float) else json.dumps(value)


def _tex(words: str) -> str:
    special = {
        "\\": r"\textbackslash{}",
        "±": r"$\pm$",
        "–": "--",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
    }
    special |= {letter: "\\" + letter for letter in "&%$#_{}"}
    return "".join(special.get(letter, letter) for letter in words)
