"""The charts of the page as inline SVG, drawn by our own code: no library, no script, no network.

Colours come from the page's CSS (`--fedllm`, `--grid`, ...), so one drawing serves light, dark and paper.
Every chart has a title and a description for screen readers; marks carry their numbers as tooltips.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

from fedtrio.report.svg import LETTER, Axis, line, short, svg, text, tone
from fedtrio.report.tables import (
    TITLES,
    YARDSTICKS,
    Results,
    Score,
    frameworks_of,
    score_of,
    sites_of,
    summary,
)
from fedtrio.report.units import bytes_text, count_text, finite, flops_text, mean, percent_text

WIDTH, HEIGHT = 480, 330
LEFT, RIGHT, TOP, BOTTOM = 50, 18, 16, 46
# -- quality against rounds, bytes, operations


@dataclass(frozen=True)
class Point:
    """One evaluation: where it stands on the x axis, and the mean and the range over the seeds."""

    x: float
    y: float
    low: float
    high: float
    round: int


def _x_of(run: dict[str, Any], entry: dict[str, Any], x: str, sites: int) -> float | None:
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
            value = finite(entry.get(score.key))
            place = _x_of(run, entry, x, sites_of(results, run))
            if value is not None and place is not None:
                rounds.setdefault(int(entry["round"]), []).append((place, value))
    points = []
    for number, found in sorted(rounds.items()):
        values = [value for _, value in found]
        place, middle = mean(place for place, _ in found), mean(values)
        if place is not None and middle is not None and (x == "round" or place > 0):
            points.append(Point(place, middle, min(values), max(values), number))
    return points


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
    """The axis of `round`, `bytes` or `flops`; costs are logarithmic."""
    low, high = min(values), max(values)
    if x == "round":
        return Axis(low - (low == high), high + (low == high), LEFT + 8, right)
    ratio = (high / low) ** 0.06 if high > low else 2.0
    return Axis(low / ratio, high * ratio, LEFT, right, log=True)


def grid(x: str, x_axis: Axis, y_axis: Axis, score: Score) -> Iterable[str]:
    """Lines, ticks and names of both axes."""
    right = WIDTH - RIGHT
    for mark in y_axis.ticks():
        words = percent_text(mark, 0 if abs(100 * mark - round(100 * mark)) < 1e-6 else 1)
        yield line(LEFT, y_axis.at(mark), right, y_axis.at(mark), "grid")
        words = words if score.key == "accuracy" else f"{mark:,.4g}"
        yield text(LEFT - 7, y_axis.at(mark) + 4, words, "end", ' class="tick"')
    marks = x_axis.ticks(5 if x == "round" else 4)
    write: Callable[[float], str] = {"round": count_text, "bytes": bytes_text, "flops": flops_text}[x]
    for mark in marks if x != "round" else [mark for mark in marks if mark == int(mark)]:
        words = write(mark).replace(".0 ", " ").replace(".00 ", " ")
        yield line(x_axis.at(mark), HEIGHT - BOTTOM, x_axis.at(mark), HEIGHT - BOTTOM + 4, "axis")
        yield text(x_axis.at(mark), HEIGHT - BOTTOM + 18, words, "middle", ' class="tick"')
    yield line(LEFT, HEIGHT - BOTTOM, right, HEIGHT - BOTTOM, "axis")
    names = {
        "round": "Round",
        "bytes": "Bytes of one site, both directions (log)",
        "flops": "Operations of one site (log)",
    }
    yield text((LEFT + right) / 2, HEIGHT - 8, names[x], "middle", ' class="name"')


def marker(framework: str, x: float, y: float) -> str:
    """A shape as well as a colour, so that the frameworks differ in grey too."""
    shapes = {
        "kd": f"M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6-6z",
        "split": f"M{x:.1f} {y - 6:.1f}l5.6 10h-11.2z",
        "local": f"M{x - 4.5:.1f} {y - 4.5:.1f}h9v9h-9z",
    }
    circle = f"M{x - 5:.1f} {y:.1f}a5 5 0 1 0 10 0a5 5 0 1 0-10 0z"
    return f'<path class="mark" d="{shapes.get(framework, circle)}"/>'


def _curve(framework: str, points: list[Point], x_axis: Axis, y_axis: Axis, tell: Callable[[Point], str]) -> str:
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
            mark = marker(framework, x, y) if last else f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>'
            parts.append(f"<g><title>{escape(tell(points[place]))}</title>{mark}</g>")
    return f'<g style="--c:{tone(framework)}">{"".join(parts)}</g>'


Box = tuple[float, float, float, float]


def _place(words: str, x: float, y: float, taken: list[Box], right: float) -> tuple[float, float]:
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


def _boxes(points: list[Point], x_axis: Axis, y_axis: Axis) -> list[Box]:
    """Small boxes along a curve, which labels should not cover."""
    spots = [(x_axis.at(point.x), y_axis.at(point.y)) for point in points]
    dense = [
        (x0 + (x1 - x0) * part / 8, y0 + (y1 - y0) * part / 8)
        for (x0, y0), (x1, y1) in pairwise(spots)
        for part in range(8)
    ]
    return [(x - 4, y - 4, x + 4, y + 4) for x, y in [*dense, spots[-1]]]


def quality(results: Results, x: str) -> str:
    """Accuracy (or perplexity) against `round`, `bytes` or `flops`; the yardsticks are dashed lines."""
    score = score_of(results)
    finals = {row.framework: row.score for row in summary(results) if row.score is not None}
    curves = {name: series(results, name, x) for name in frameworks_of(results) if name not in YARDSTICKS}
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return ""
    right = WIDTH - RIGHT - LETTER * max(len(TITLES.get(name, name)) for name in curves)
    every = [point for points in curves.values() for point in points]
    yards = {name: finals[name] for name in YARDSTICKS if name in finals}
    y_axis = y_axis_of(score, [v for point in every for v in (point.low, point.high)] + list(yards.values()))
    x_axis = x_axis_of(x, [point.x for point in every], right)
    taken = [box for points in curves.values() for box in _boxes(points, x_axis, y_axis)]
    lines = [
        _yardstick(name, f"{TITLES[name]} {score.text(value)}", value, y_axis, taken) for name, value in yards.items()
    ]

    def tell(name: str) -> Callable[[Point], str]:
        unit: Callable[[float], str] = {"bytes": bytes_text, "flops": flops_text}.get(x, lambda _: "")
        return lambda point: (
            f"{TITLES.get(name, name)}, round {point.round}: {score.text(point.y)} {unit(point.x)}".rstrip()
        )

    drawn = [_curve(name, points, x_axis, y_axis, tell(name)) for name, points in curves.items()]
    labels = []
    for name, points in curves.items():
        words = TITLES.get(name, name)
        spot = _place(words, x_axis.at(points[-1].x), y_axis.at(points[-1].y), taken, WIDTH - 2)
        labels.append(text(*spot, words, "start", f' class="label" style="--c:{tone(name)}"'))
    ends = "; ".join(f"{TITLES.get(name, name)} ends at {score.text(p[-1].y)}" for name, p in curves.items())
    against = {"round": "rounds", "bytes": "bytes of one site", "flops": "operations of one site"}[x]
    body = [*grid(x, x_axis, y_axis, score), *lines, *drawn, *labels]
    return svg(f"quality-{x}", f"{score.name} against {against}", ends + ".", (WIDTH, HEIGHT), body)


# -- what travels


def _kinds(results: Results, framework: str, direction: str) -> list[tuple[str, float]]:
    """Bytes of each kind in one direction, mean over the seeds, the largest first."""
    runs = [run for run in results["runs"] if run["framework"] == framework]
    sizes: dict[str, float] = {}
    for kind in (kind for run in runs for kind in run.get("kinds") or []):
        if kind["direction"] == direction and kind["bytes"]:
            sizes[kind["kind"]] = sizes.get(kind["kind"], 0.0) + kind["bytes"] / len(runs)
    return sorted(sizes.items(), key=lambda item: -item[1])


def _bar(name: str, kinds: list[tuple[str, float]], y: float, longest: float) -> Iterable[str]:
    """The kinds end to end in shades of the framework's colour, and their names and shares below."""
    total, x, room = sum(size for _, size in kinds), 116.0, WIDTH - 190
    for shade, (kind, size) in enumerate(kinds):
        width, opacity = max(1.0, room * size / longest), (1, 0.55, 0.32, 0.18)[min(shade, 3)]
        yield (
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="18" class="bar" style="--c:{tone(name)}"'
            f' fill-opacity="{opacity}"><title>{escape(f"{kind}: {bytes_text(size)}")}</title></rect>'
        )
        x += width
    yield text(x + 6, y + 13, bytes_text(total), "start", ' class="value"')
    shares = " · ".join(f"{kind} {percent_text(size / total, 0)}" for kind, size in kinds[:3])
    words = kinds[0][0] if len(kinds) == 1 else shares
    yield text(116, y + 32, short(words, 54), "start", ' class="tick"')


def traffic(results: Results) -> str:
    """Bytes of one run by direction and kind, a bar for each direction of each framework."""
    bars = [
        (name, direction, kinds)
        for name in frameworks_of(results)
        for direction in ("up", "down")
        if (kinds := _kinds(results, name, direction))
    ]
    if not bars:
        return ""
    longest = max(sum(size for _, size in kinds) for _, _, kinds in bars)
    body, told, row, seen = [], [], 44, ""
    for place, (name, direction, kinds) in enumerate(bars):
        y = 12 + place * row
        if name != seen:
            extra = f' class="label" style="--c:{tone(name)}"'
            body.append(text(0, y + 13, TITLES.get(name, name), "start", extra))
        seen = name
        body.append(text(110, y + 13, "↑" if direction == "up" else "↓", "end", ' class="value"'))
        body += _bar(name, kinds, y, longest)
        told.append(f"{TITLES.get(name, name)} {direction}: {bytes_text(sum(size for _, size in kinds))}")
    return svg("traffic", "What travels, by kind", "; ".join(told), (WIDTH, 12 + row * len(bars)), body)


# -- who holds what


def _cells(counts: Sequence[float], peak: float, labels: Sequence[str], tips: bool) -> str:
    """One row of the heatmap in units of a cell; a tooltip for each cell only where there are few of them."""
    shades: dict[int, list[str]] = {}
    for place, count in enumerate(counts):
        if count > 0:
            tip = escape(f"{labels[place]}: {count_text(count)}") if tips else ""
            cell = (
                f'<path d="M{place} 0h.94v.92h-.94z"><title>{tip}</title></path>'
                if tips
                else f"M{place} 0h.94v.9h-.94z"
            )
            shades.setdefault(max(1, math.ceil(8 * math.sqrt(count / peak))), []).append(cell)
    if tips:
        return "".join(f'<g class="h{shade}">{"".join(found)}</g>' for shade, found in sorted(shades.items()))
    return "".join(f'<path class="h{shade}" d="{"".join(found)}"/>' for shade, found in sorted(shades.items()))


def _site_tip(site: dict[str, Any], labels: Sequence[str]) -> str:
    counts = site["label_counts"]
    top = sorted(range(len(labels)), key=lambda place: -counts[place])[:3]
    most = ", ".join(f"{short(labels[place], 30)} {count_text(counts[place])}" for place in top if counts[place])
    return f"{site['name']}: {count_text(site['examples'])} examples, most: {most or 'none'}"


def _heads(labels: Sequence[str], left: float, top: float, pitch: float) -> Iterable[str]:
    """The labels, upright above their columns; in a crowd only every n-th, by number."""
    every = math.ceil(9.5 / pitch)
    for place in range(0, len(labels), every):
        x = left + (place + 0.5) * pitch + 3.2
        words = short(labels[place], 24) if every == 1 else str(place)
        yield text(x, top - 5, words, "start", f' class="head" transform="rotate(-90 {x:.1f} {top - 5:.1f})"')


def heatmap(results: Results) -> str:
    """Examples of each label at each site, first seed; the square root of the count sets the shade."""
    labels = [str(label) for label in results["data"].get("labels") or []]
    partition = (results["data"].get("partitions") or [{}])[0]
    sites = [site for site in partition.get("sites") or [] if len(site.get("label_counts") or []) == len(labels)]
    if not labels or not sites:
        return ""
    peak = max(1, *(count for site in sites for count in site["label_counts"]))
    left, after = 14 + 6.2 * min(18, max(len(str(site["name"])) for site in sites)), 116
    pitch = max(3.0, min(44.0, (1000 - left - after) / len(labels)))
    row = 22 if len(sites) <= 16 else 15 if len(sites) <= 32 else 11.5
    crowded = pitch < 9.5
    top = 18 + 5.6 * (4 if crowded else min(24, max(map(len, labels))))
    end = left + pitch * len(labels)
    body = list(_heads(labels, left, top, pitch))
    body += [text(end + 52, top - 5, "examples", "end", ' class="head"')]
    body += [text(end + 112, top - 5, "eff. labels", "end", ' class="head"')]
    for place, site in enumerate(sites):
        y, effective = top + place * row, finite(site.get("effective_labels"))
        base = y + row / 2 + 3.4
        body.append(f"<g><title>{escape(_site_tip(site, labels))}</title>")
        body.append(text(left - 7, base, short(site["name"], 18), "end", ' class="head"'))
        room = f'x="{left:.1f}" y="{y:.1f}" width="{end - left:.1f}" height="{row * 0.92:.1f}"'
        body.append(f'<rect {room} class="h0"/>')
        body.append(f'<g transform="translate({left:.1f} {y:.1f}) scale({pitch:.3f} {row})">')
        body.append(_cells(site["label_counts"], peak, labels, len(sites) * len(labels) <= 400) + "</g>")
        body.append(text(end + 52, base, count_text(site["examples"]), "end", ' class="head"'))
        body.append(text(end + 112, base, "–" if effective is None else f"{effective:.1f}", "end", ' class="head"'))
        body.append("</g>")
    told = f"{len(sites)} sites, {len(labels)} labels; the darkest cell holds {count_text(peak)} examples."
    return svg(
        "heatmap",
        "Examples of each label at each site",
        told,
        (end + after, top + row * len(sites) + 4),
        body,
    )


def holdings(results: Results) -> str:
    """Where there are no labels: how many examples each site holds, first seed."""
    sites = ((results["data"].get("partitions") or [{}])[0]).get("sites") or []
    if not sites:
        return ""
    peak, row = max(1, *(site["examples"] for site in sites)), 22 if len(sites) <= 20 else 14
    body = []
    for place, site in enumerate(sites):
        y, width = 4 + place * row, 300 * site["examples"] / peak
        body.append(text(108, y + row / 2 + 3.4, short(site["name"], 18), "end", ' class="head"'))
        body.append(f'<rect x="116" y="{y + 2}" width="{width:.1f}" height="{row - 4}" class="h6"/>')
        body.append(text(124 + width, y + row / 2 + 3.4, count_text(site["examples"]), "start", ' class="head"'))
    told = f"{len(sites)} sites; the largest holds {count_text(peak)} examples."
    return svg("holdings", "Examples at each site", told, (WIDTH, 8 + row * len(sites)), body)
