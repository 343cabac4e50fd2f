"""What the varied setting of a study does: score, bytes, operations and memory against it, framework by framework.

A number that was varied is joined to a line, with one line for each choice of the other settings that were varied.
Where the points differ in no such number, each stands by its name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from fedtrio.report.curves import Point, boxes, brief, curve, marker, place_label, y_axis_of
from fedtrio.report.points import Line, Study, lines_of, score_in
from fedtrio.report.svg import BOTTOM, HEIGHT, LETTER, RIGHT, TOP, WIDTH, Axis, line, short, svg, text, tone
from fedtrio.report.tables import YARDSTICKS, Score
from fedtrio.report.units import bytes_text, finite, flops_text

NAMES = {
    "clients": "Sites",
    "data.max_public": "Public texts",
    "lora.r": "LoRA rank",
    "partition.alpha": "Dirichlet α",
    "rounds": "Rounds",
    "split.cut": "Cut (blocks at the site)",
}
LEFT = 64  # room for numbers with their units
DASHES = ("", ' class="dashed"', ' class="dotted"')  # lines of one framework
GROUPS = 4  # of lines at most, by settings
LETTERS, ANGLE, TICK = 26, 60, 5.8  # of a name aslant: letters at most, degrees, and a letter's mean width in px


@dataclass(frozen=True)
class Places:
    """Where the points of a study stand on the x axis, and which are joined: `at` and `groups` by point."""

    name: str  # of the axis
    words: Sequence[str]  # at its ticks
    at: Mapping[str, int]
    groups: Mapping[str, str]
    joined: bool

    @property
    def aslant(self) -> float:
        """Room in px for names that are too long to stand side by side; 0 where they are not."""
        longest = max(map(len, self.words))
        fits = TICK * (longest + 1) < (WIDTH - LEFT - 90) / len(self.words)
        return 0 if fits else TICK * min(longest, LETTERS) * math.sin(math.radians(ANGLE))


@dataclass(frozen=True)
class Panel:
    """One of the charts: what its y axis shows."""

    key: str
    title: str
    of: Callable[[Line], float | None]
    write: Callable[[float | None], str]


COSTS = (
    Panel("bytes", "Bytes of a site", lambda line: line.row.bytes_per_site, bytes_text),
    Panel("flops", "Operations of a site", lambda line: line.row.flops_per_site, flops_text),
    Panel("memory", "Peak memory of a site", lambda line: line.row.client_peak_bytes / 2**20, lambda x: f"{x:.3g} MiB"),
)

# Where points stand ---------------------------------------------------------------------------------------------------


def places(study: Study) -> Places:
    """By the number that was varied and leaves the fewest groups; else by name, in the order of the study."""
    found = [by for key in study["varied"] if (by := _by_number(study["points"], key, study["varied"])) is not None]
    names = [point["name"] for point in study["points"]]
    by_name = Places("", names, {name: place for place, name in enumerate(names)}, dict.fromkeys(names, ""), False)
    return min(found, key=lambda by: len(set(by.groups.values())), default=by_name)


def _by_number(points: Sequence[Mapping[str, Any]], key: str, varied: Sequence[str]) -> Places | None:
    """None where a point has no such number, or groups are many, short, nameless, or have two points at one place."""
    values = {point["name"]: _setting(point, key) for point in points}
    if any(isinstance(value, bool) or finite(value) is None for value in values.values()):
        return None
    others: dict[str, list[str]] = {}
    for point in points:
        rest = json.dumps([_setting(point, other) for other in varied if other != key], sort_keys=True)
        others.setdefault(rest, []).append(point["name"])
    distinct = sorted(set(values.values()))
    twice = any(len({values[name] for name in names}) < len(names) for names in others.values())
    if len(distinct) < 2 or len(others) > min(len(points) / 2, GROUPS) or twice:
        return None
    at = {name: distinct.index(value) for name, value in values.items()}
    shared = set.intersection(*(set(name.split(", ")) for name in values))
    groups, labels = {}, set()
    for names in others.values():
        said = {f"{key}={values[names[0]]}", f"{values[names[0]]}", *shared}
        words = [word.rpartition("=")[2] for word in names[0].split(", ") if word not in said]
        label = ", ".join(words) if len(others) > 1 else ""
        groups |= dict.fromkeys(names, label)
        labels.add(label)
    if len(labels) < len(others):  # names do not tell them apart
        return None
    return Places(NAMES.get(key, key), [f"{value:g}" for value in distinct], at, groups, True)


def _setting(point: Mapping[str, Any], key: str) -> Any:
    """The value in the whole configuration where that is known, as a point need not set what it leaves as it is."""
    value: Any = point.get("config") or {}
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return point["settings"].get(key) if value is None else value


# What is drawn --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """One framework with one choice of the other settings; x of a point is its place, low to high the seeds' range."""

    framework: str
    label: str
    points: list[Point]


@dataclass(frozen=True)
class Chart:
    """A chart before it is a drawing of its own."""

    key: str
    title: str
    told: str
    height: float
    body: Sequence[str]


def charts(study: Study) -> list[Chart]:
    """Those that there is something for; none where nothing varies."""
    score, lines, by = score_in(study), lines_of(study), places(study)
    quality = Panel("score", score.name, lambda line: line.row.score, score.text)
    shown = [(panel, _series(lines, by, panel)) for panel in (quality, *COSTS) if len(by.words) > 1]
    return [_chart(score, by, panel, found) for panel, found in shown if found]


def drawings(study: Study) -> list[tuple[str, str]]:
    """Titles and drawings, for the page."""
    return [
        (each.title, svg(f"varied-{each.key}", each.title, each.told, (WIDTH, each.height), each.body))
        for each in charts(study)
    ]


def figure(study: Study) -> str:
    """All charts in one drawing, two side by side; empty where nothing varies."""
    found, body = charts(study), []
    if not found:
        return ""
    wide, high = WIDTH + 28, max(each.height for each in found) + 44
    for number, each in enumerate(found):
        head = text(0, 18, each.title, "start", ' class="label" style="--c:var(--ink)"')
        inner = f'<g transform="translate(0 28)">{"".join(each.body)}</g>'
        body.append(f'<g transform="translate({14 + number % 2 * wide} {number // 2 * high:.0f})">{head}{inner}</g>')
    title = f"{study['study']}: {'; '.join(each.title for each in found)}"
    told = " ".join(f"{each.title}. {each.told}." for each in found)
    return svg("varied", title, told, (2 * wide, -(-len(found) // 2) * high), body)


def _series(lines: Sequence[Line], by: Places, panel: Panel) -> list[Series]:
    """What there is to draw; yardsticks cost nothing on the wire and have no place among costs."""
    kept = [each for each in lines if panel.key == "score" or each.row.framework not in YARDSTICKS]
    many, found = len({each.row.framework for each in kept}) > 1, {}
    for each in kept:
        value, group = finite(panel.of(each)), by.groups[each.point]
        if value is None:
            continue
        words = [each.row.title] * (many or not group) + [short(group, 16)] * bool(group)
        own = found.setdefault((each.row.framework, group), Series(each.row.framework, " · ".join(words), []))
        spread = [*each.scored.scores.values()] if panel.key == "score" else [value]
        place = by.at[each.point]
        own.points.append(Point(place, value, min(spread), max(spread), place))
    for own in found.values():
        own.points.sort(key=lambda point: point.x)
    return [*found.values()]


# Drawing --------------------------------------------------------------------------------------------------------------


def _chart(score: Score, by: Places, panel: Panel, found: Sequence[Series]) -> Chart:
    every = [value for own in found for point in own.points for value in (point.low, point.high)]
    y_axis = y_axis_of(score, every) if panel.key == "score" else _cost_axis(every)
    room = LETTER * max(len(own.label) for own in found) + 12
    x_axis = Axis(-0.5, len(by.words) - 0.5, LEFT, WIDTH - RIGHT - room)
    body, taken, ends = [*_grid(by, x_axis, y_axis, panel)], [], []
    frameworks = [*dict.fromkeys(own.framework for own in found)]
    for number, own in enumerate(found):
        # side by side, as frameworks may end in the same weights
        shift = 5 * (frameworks.index(own.framework) - (len(frameworks) - 1) / 2) / (x_axis.at(1) - x_axis.at(0))
        points = [replace(point, x=point.x + shift) for point in own.points]
        earlier = sum(other.framework == own.framework for other in found[:number])
        body.append(f"<g{DASHES[earlier % len(DASHES)]}>{_drawn(own, points, by, panel, x_axis, y_axis)}</g>")
        taken += boxes(points, x_axis, y_axis)
        ends.append((own, x_axis.at(points[-1].x), y_axis.at(points[-1].y)))
    for own, x, y in ends:
        spot = place_label(own.label, x, y, taken, WIDTH - 2)
        body.append(text(*spot, own.label, "start", f' class="label" style="--c:{tone(own.framework)}"'))
    said = [f"{own.label}: " + ", ".join(_said(point, by, panel) for point in own.points[:20]) for own in found[:20]]
    title = f"{panel.title} (log)" if y_axis.log else panel.title
    return Chart(panel.key, title, f"{by.name or 'Points'}: {'; '.join(said)}", HEIGHT + by.aslant, body)


def _said(point: Point, by: Places, panel: Panel) -> str:
    return f"{panel.write(point.y)} at {by.words[point.round]}"


def _drawn(own: Series, points: list[Point], by: Places, panel: Panel, x_axis: Axis, y_axis: Axis) -> str:
    """A line, or a mark with a whisker for each point."""

    def tell(point: Point) -> str:
        return f"{own.label}: {_said(point, by, panel)}"

    if by.joined:
        return curve(own.framework, points, x_axis, y_axis, tell)
    marks = []
    for point in points:
        x, high, low = x_axis.at(point.x), y_axis.at(point.high), y_axis.at(point.low)
        ends = f"M{x - 3:.1f} {high:.1f}h6m-3 0V{low:.1f}m-3 0h6"
        whisker = f'<path class="whisker" d="{ends}"/>' if point.high > point.low else ""
        mark = marker(own.framework, x, y_axis.at(point.y))
        marks.append(f"<g><title>{escape(tell(point))}</title>{whisker}{mark}</g>")
    return f'<g style="--c:{tone(own.framework)}">{"".join(marks)}</g>'


def _cost_axis(values: Sequence[float]) -> Axis:
    """From nought, or logarithmic where the most is over ten times the least."""
    low, high = min(values), max(values)
    if 0 < 10 * low < high:
        return Axis(low / 1.6, high * 1.6, HEIGHT - BOTTOM, TOP, log=True)
    return Axis(0.0, 1.1 * high or 1.0, HEIGHT - BOTTOM, TOP)


def _shortened(names: Sequence[str]) -> list[str]:
    """Each name's beginning, or where these are not all different, its end."""
    heads = [short(name, LETTERS) for name in names]
    tails = [name if len(name) <= LETTERS else f"…{name[1 - LETTERS :]}" for name in names]
    return heads if len(set(heads)) == len(names) else tails


def _grid(by: Places, x_axis: Axis, y_axis: Axis, panel: Panel) -> Iterator[str]:
    bottom = HEIGHT - BOTTOM
    for mark in y_axis.ticks():
        yield line(LEFT, y_axis.at(mark), WIDTH - RIGHT, y_axis.at(mark), "grid")
        yield text(LEFT - 7, y_axis.at(mark) + 4, brief(panel.write(mark)), "end", ' class="tick"')
    every, step = 1, x_axis.at(1) - x_axis.at(0)
    while every * step < 13:  # a line of words
        every += 1
    for place, words in enumerate(_shortened(by.words)):
        x = x_axis.at(place)
        yield line(x, bottom, x, bottom + 4, "axis")
        if by.aslant and place % every == 0:
            turn = f' class="tick" transform="rotate({ANGLE} {x - 3:.1f} {bottom + 15})"'
            yield text(x - 3, bottom + 15, words, "start", turn)
        elif not by.aslant:
            yield text(x, bottom + 18, words, "middle", ' class="tick"')
    yield line(LEFT, bottom, WIDTH - RIGHT, bottom, "axis")
    yield text((LEFT + x_axis.end) / 2, HEIGHT - 8 + by.aslant, by.name, "middle", ' class="name"')
