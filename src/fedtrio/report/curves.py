"""Quality against rounds, bytes, operations and time, as inline SVG drawn by our own code.

Colours come from the page's CSS (`--fedllm`, `--grid`, ...), so one drawing serves light, dark and paper.
Every chart has a title and a description for screen readers; marks carry their numbers as tooltips.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

from fedtrio.report import link
from fedtrio.report.svg import BOTTOM, HEIGHT, LEFT, LETTER, RIGHT, TOP, WIDTH, Axis, line, svg, text, tone
from fedtrio.report.tables import (
    TITLES,
    YARDSTICKS,
    Grid,
    Results,
    Score,
    frameworks_of,
    score_of,
    sites_of,
    summary,
    title_of,
)
from fedtrio.report.units import bytes_text, count_text, finite, flops_text, mean, percent_text, seconds_text

Box = tuple[float, float, float, float]
ROWS = 20  # of the table behind a chart at most
CLOCK = [s * 10.0**p for p in (-3, -2, -1) for s in (1, 2, 5)]
CLOCK += [1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 18000, 43200, 86400, 172800, 432000]
CLOCK += [86400 * s * 10.0**p for p in (1, 2, 3) for s in (1, 2, 5)]


@dataclass(frozen=True)
class Against:
    """What the x axis of a chart shows."""

    title: str  # against what
    name: str  # of the axis
    write: Callable[[float | None], str]


AXES = {
    "round": Against("rounds", "Round", count_text),
    "bytes": Against("bytes of one site", "Bytes of one site, both directions (log)", bytes_text),
    "flops": Against("operations of one site", "Operations of one site (log)", flops_text),
    "seconds": Against("time over this line", "Time from the first message on (log)", seconds_text),
}


@dataclass(frozen=True)
class Point:
    """One evaluation: where it stands on the x axis, and the mean and the range over the seeds."""

    x: float
    y: float
    low: float
    high: float
    round: int


def _x_of(entry: dict[str, Any], x: str, sites: int) -> float | None:
    if x == "round":
        return finite(entry.get("round"))
    if x == "bytes":
        return ((finite(entry.get("bytes_up")) or 0) + (finite(entry.get("bytes_down")) or 0)) / sites
    return (finite(entry.get("client_flops")) or 0) / sites


def series(results: Results, framework: str, x: str) -> list[Point]:
    """The curve of a framework: one point for each round in which at least one seed was evaluated."""
    score, rounds = score_of(results), {}
    for run in results["runs"]:
        if run["framework"] != framework:
            continue
        for entry in run.get("curve") or []:
            value, place = finite(entry.get(score.key)), _x_of(entry, x, sites_of(results, run))
            if value is not None and place is not None:
                rounds.setdefault(int(entry["round"]), []).append((place, value))
    points = []
    for number, found in sorted(rounds.items()):
        values = [value for _, value in found]
        place, middle = mean(place for place, _ in found), mean(values)
        if place is not None and middle is not None and (x == "round" or place > 0):
            points.append(Point(place, middle, min(values), max(values), number))
    return points


def _all(results: Results, x: str) -> dict[str, list[Point]]:
    """The curve of each framework but the yardsticks."""
    if x == "seconds":
        found = {name: link.series(runs) for name, runs in link.timed(results).items()}
        curves = {name: [Point(t, y, y, y, number) for t, y, number in at if t > 0] for name, at in found.items()}
    else:
        curves = {name: series(results, name, x) for name in frameworks_of(results) if name not in YARDSTICKS}
    return {name: points for name, points in curves.items() if points}


def numbers(results: Results, x: str) -> Grid:
    """The table behind a chart: at each round, or some of them, the place and the score of each framework."""
    curves, score, write = _all(results, x), score_of(results), AXES[x].write
    rounds = sorted({point.round for points in curves.values() for point in points})
    every = -(-len(rounds) // ROWS)
    kept = [number for place, number in enumerate(rounds) if place % every == (len(rounds) - 1) % every]
    at = {name: {point.round: point for point in points} for name, points in curves.items()}

    def cell(point: Point | None) -> str:
        if point is None:
            return "–"
        span = f" ({score.text(point.low, False)}–{score.text(point.high, False)})" if point.high > point.low else ""
        return f"{score.text(point.y)}{span}" if x == "round" else f"{write(point.x)}: {score.text(point.y)}"

    rows = [[str(number), *(cell(points.get(number)) for points in at.values())] for number in kept]
    return ["Round", *(title_of(name) for name in curves)], rows


# Axes -----------------------------------------------------------------------------------------------------------------


def y_axis_of(score: Score, values: Sequence[float]) -> Axis:
    """The axis of a quality; logarithmic for a perplexity that falls far."""
    low, high = min(values), max(values)
    if not score.higher_is_better and low > 0 and high / low > 6:
        return Axis(low / 1.15, high * 1.15, HEIGHT - BOTTOM, TOP, log=True)
    pad = 0.08 * (high - low) or 0.05 * abs(high) or 0.05
    low, high = low - pad, high + pad
    if score.key == "accuracy":
        low, high = max(0.0, low), min(1.0, high)
    return Axis(low, high, HEIGHT - BOTTOM, TOP)


def x_axis_of(x: str, values: Sequence[float], right: float) -> Axis:
    """The axis of one of `AXES`; costs are logarithmic."""
    low, high = min(values), max(values)
    if x == "round":
        return Axis(low - (low == high), high + (low == high), LEFT + 8, right)
    ratio = (high / low) ** 0.06 if high > low else 2.0
    return Axis(low / ratio, high * ratio, LEFT, right, log=True)


def brief(words: str) -> str:
    """A number with its unit, without zeros at its end: `1.50 MB` is `1.5 MB`."""
    return re.sub(r"(\.\d*?)0+ ", r"\1 ", words).replace(". ", " ")


def _marks(x: str, axis: Axis) -> Iterator[tuple[float, str]]:
    """Ticks of the x axis and their words, without those for which there is no room."""
    found = [mark for mark in CLOCK if axis.low <= mark <= axis.high] if x == "seconds" else axis.ticks(5)
    until = -1.0
    for mark in found:
        words = brief(AXES[x].write(mark))
        half = LETTER * len(words) / 2
        if axis.at(mark) - half > until and (x != "round" or mark == int(mark)):
            until = axis.at(mark) + half + 4
            yield mark, words


def grid(x: str, x_axis: Axis, y_axis: Axis, score: Score) -> Iterable[str]:
    """Lines, ticks and names of both axes."""
    right = WIDTH - RIGHT
    for mark in y_axis.ticks():
        words = percent_text(mark, 0 if abs(100 * mark - round(100 * mark)) < 1e-6 else 1)
        yield line(LEFT, y_axis.at(mark), right, y_axis.at(mark), "grid")
        words = words if score.key == "accuracy" else f"{mark:,.4g}"
        yield text(LEFT - 7, y_axis.at(mark) + 4, words, "end", ' class="tick"')
    yield '<g class="ticks">'
    for mark, words in _marks(x, x_axis):
        yield line(x_axis.at(mark), HEIGHT - BOTTOM, x_axis.at(mark), HEIGHT - BOTTOM + 4, "axis")
        yield text(x_axis.at(mark), HEIGHT - BOTTOM + 18, words, "middle", ' class="tick"')
    yield "</g>" + line(LEFT, HEIGHT - BOTTOM, right, HEIGHT - BOTTOM, "axis")
    yield text((LEFT + right) / 2, HEIGHT - 8, AXES[x].name, "middle", ' class="name"')


# Curves and their names -----------------------------------------------------------------------------------------------


def marker(framework: str, x: float, y: float) -> str:
    """A shape as well as a colour, so that the frameworks differ in grey too."""
    shapes = {
        "kd": f"M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6-6z",
        "split": f"M{x:.1f} {y - 6:.1f}l5.6 10h-11.2z",
        "local": f"M{x - 4.5:.1f} {y - 4.5:.1f}h9v9h-9z",
    }
    circle = f"M{x - 5:.1f} {y:.1f}a5 5 0 1 0 10 0a5 5 0 1 0-10 0z"
    return f'<path class="mark" d="{shapes.get(framework, circle)}"/>'


def front(spots: Sequence[tuple[float, float]], higher_is_better: bool) -> list[tuple[float, float]]:
    """The (cost, quality) that no other one beats in both, cheapest first."""
    best: list[tuple[float, float]] = []
    sign = -1 if higher_is_better else 1
    for cost, quality in sorted(spots, key=lambda spot: (spot[0], sign * spot[1])):
        if not best or sign * quality < sign * best[-1][1]:
            best.append((cost, quality))
    return best


def steps(best: Sequence[tuple[float, float]], x_axis: Axis, y_axis: Axis) -> str:
    """A front as steps, to the right edge."""
    start = f"M{x_axis.at(best[0][0]):.1f} {y_axis.at(best[0][1]):.1f}"
    outline = "".join(f"H{x_axis.at(x):.1f}V{y_axis.at(y):.1f}" for x, y in best[1:])
    return f'<path class="front" d="{start}{outline}H{WIDTH - RIGHT}"/>'


def curve(framework: str, points: list[Point], x_axis: Axis, y_axis: Axis, tell: Callable[[Point], str]) -> str:
    """A line through the points, their range over the seeds as a band, and marks with what `tell` says of each."""
    spots = [(x_axis.at(point.x), y_axis.at(point.y)) for point in points]
    parts = []
    if len(points) > 1 and any(point.high > point.low for point in points):
        upper = [(x, y_axis.at(point.high)) for (x, _), point in zip(spots, points, strict=True)]
        lower = [(x, y_axis.at(point.low)) for (x, _), point in zip(spots, points, strict=True)]
        outline = "L".join(f"{x:.1f} {y:.1f}" for x, y in upper + lower[::-1])
        parts.append(f'<path class="band" d="M{outline}z"/>')
    parts.append(f'<path class="curve" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in spots)}"/>')
    every = math.ceil(len(points) / 40)
    for place, (x, y) in enumerate(spots):
        last = place == len(spots) - 1
        if last or place % every == 0:
            mark = marker(framework, 0, 0) if last else '<circle class="dot" r="2.4"/>'
            where = f'transform="translate({x:.1f} {y:.1f})"'
            parts.append(f"<g {where}><title>{escape(tell(points[place]))}</title>{mark}</g>")
    return f'<g data-of="{escape(framework)}" style="--c:{tone(framework)}">{"".join(parts)}</g>'


def place_label(words: str, x: float, y: float, taken: list[Box], right: float) -> tuple[float, float]:
    """The first free spot near an end marker: right, above, below, left; remembered in `taken`."""
    width, tries = LETTER * len(words), []
    for step in range(8):
        for left, dy in ((x + 10, 0), (x - width / 2, -13), (x - width / 2, 15), (x - width - 10, 0)):
            for sign in (1, -1) if step else (1,):
                tries.append((left, y + dy + sign * 8 * step))
    for left, middle in tries:
        box = (left, middle - 8, left + width, middle + 8)
        inside = box[0] > LEFT + 2 and box[2] < right and box[1] > 0 and box[3] < HEIGHT - BOTTOM
        if inside and all(box[2] < a or c < box[0] or box[3] < b or d < box[1] for a, b, c, d in taken):
            taken.append(box)
            return left, middle + 4
    return max(LEFT, min(x - width, right - width)), y - 9


def _yardstick(framework: str, words: str, value: float, y_axis: Axis, taken: list[Box]) -> str:
    """A dashed line, named at the first spot that the curves leave free."""
    y, width = y_axis.at(value), LETTER * len(words)
    spots = [(float(x), dy) for dy in (-18, 2) for x in range(LEFT + 4, int(WIDTH - RIGHT - width), 12)]

    def crowd(spot: tuple[float, float]) -> float:
        x, top = spot[0], y + spot[1]
        outside = 99 if top < 0 or top + 16 > HEIGHT - BOTTOM else 0
        return outside + sum(a < x + width and c > x and b < top + 16 and d > top for a, b, c, d in taken)

    x, dy = min(spots, key=crowd)
    taken.append((x, y + dy, x + width, y + dy + 16))
    extra = f' style="--c:{tone(framework)}"'
    return line(LEFT, y, WIDTH - RIGHT, y, "yard", extra) + text(
        x, y + dy + 12.5, words, "start", f' class="label"{extra}'
    )


def boxes(points: list[Point], x_axis: Axis, y_axis: Axis) -> list[Box]:
    """Small boxes along a curve, which labels should not cover."""
    spots = [(x_axis.at(point.x), y_axis.at(point.y)) for point in points]
    dense = [
        (x0 + (x1 - x0) * part / 8, y0 + (y1 - y0) * part / 8)
        for (x0, y0), (x1, y1) in pairwise(spots)
        for part in range(8)
    ]
    return [(x - 4, y - 4, x + 4, y + 4) for x, y in [*dense, spots[-1]]]


def _axes(results: Results, x: str, curves: dict[str, list[Point]], yards: dict[str, float]) -> tuple[Axis, Axis]:
    right = WIDTH - RIGHT - LETTER * max(len(title_of(name)) for name in curves)
    every = [point for points in curves.values() for point in points]
    values = [v for point in every for v in (point.low, point.high)] + list(yards.values())
    return x_axis_of(x, [point.x for point in every], right), y_axis_of(score_of(results), values)


def quality(results: Results, x: str) -> str:
    """Accuracy (or perplexity) against one of `AXES`; the yardsticks are dashed lines, and costs have their front."""
    score, curves = score_of(results), _all(results, x)
    if not curves:
        return ""
    finals = {row.framework: row.score for row in summary(results) if row.score is not None}
    yards = {name: finals[name] for name in YARDSTICKS if name in finals}
    x_axis, y_axis = _axes(results, x, curves, yards)
    taken = [box for points in curves.values() for box in boxes(points, x_axis, y_axis)]
    body = [*grid(x, x_axis, y_axis, score)]
    if x in ("bytes", "flops"):
        best = front([(p.x, p.y) for points in curves.values() for p in points], score.higher_is_better)
        body.append(steps(best, x_axis, y_axis))
    body += [
        _yardstick(name, f"{TITLES[name]} {score.text(value)}", value, y_axis, taken) for name, value in yards.items()
    ]

    def tell(name: str) -> Callable[[Point], str]:
        place = (lambda _: "") if x == "round" else AXES[x].write
        return lambda point: f"{title_of(name)}, round {point.round}: {score.text(point.y)} {place(point.x)}".rstrip()

    body += [curve(name, points, x_axis, y_axis, tell(name)) for name, points in curves.items()]
    for name, points in curves.items():
        words = title_of(name)
        spot = place_label(words, x_axis.at(points[-1].x), y_axis.at(points[-1].y), taken, WIDTH - 2)
        body.append(text(*spot, words, "start", f' class="label" data-of="{escape(name)}" style="--c:{tone(name)}"'))
    ends = "; ".join(f"{title_of(name)} ends at {score.text(p[-1].y)}" for name, p in curves.items())
    return svg(f"quality-{x}", f"{score.name} against {AXES[x].title}", ends + ".", (WIDTH, HEIGHT), body)


def _brief(numbers: Sequence[float]) -> list[float]:
    """To seven digits, whole numbers as such: what a reader of the page can't see need not be sent."""
    return [int(number) if number == int(number) else float(f"{number:.7g}") for number in numbers]


def slider(results: Results) -> dict[str, Any] | None:
    """What the browser needs to draw the chart against time anew: loads, scores as pixels, the width of the plot."""
    curves = _all(results, "seconds")
    if not curves:
        return None
    finals = {row.framework: row.score for row in summary(results) if row.score is not None}
    x_axis, y_axis = _axes(results, "seconds", curves, {n: finals[n] for n in YARDSTICKS if n in finals})
    loads = {}
    for name, runs in link.timed(results).items():
        rounds = [p.round for p in curves.get(name, [])]
        loads[name] = {
            "title": title_of(name),
            "y": [round(y_axis.at(p.y), 1) for p in curves.get(name, [])],
            "runs": [
                {
                    "rounds": [_brief([*load, server]) for number, _, load, server in run.rounds if number in rounds],
                    "whole": _brief(run.whole),
                    "worst": [_brief(load) for load in run.worst],
                    "server": run.server,
                }
                for run in runs
            ],
        }
    scales = {"rates": link.RATES, "trips": link.TRIPS, "speeds": link.SPEEDS, "clock": CLOCK}
    return {"left": LEFT, "right": x_axis.end, "width": WIDTH, "bottom": HEIGHT - BOTTOM, **scales, "of": loads}
