"""Scores and paired differences with their 95 % intervals, as a line with whiskers for each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from fedtrio.report.curves import marker
from fedtrio.report.svg import WIDTH, Axis, line, short, svg, text, tone
from fedtrio.report.tables import Grid, Results, score_of, summary, title_of
from fedtrio.report.verdict import differences, interval

NAMES, WORDS = 100, 122  # room before and after the whiskers, where they share a line with them


@dataclass(frozen=True)
class Mark:
    """One row: its name, its value with an interval where one is known, and the words at its end."""

    framework: str
    name: str
    value: float
    ends: tuple[float, float] | None
    words: str
    pale: bool = False


def _row(mark: Mark, axis: Axis, y: float, above: bool) -> Iterable[str]:
    tip, css = escape(f"{mark.name}: {mark.words}"), "pale" if mark.pale else "firm"
    yield f'<g class="{css}" style="--c:{tone(mark.framework)}"><title>{tip}</title>'
    yield text(0, y - 11 if above else y + 4, short(mark.name, 40 if above else 14), "start", ' class="label"')
    if mark.ends is not None:
        left, right = axis.at(mark.ends[0]), axis.at(mark.ends[1])
        yield f'<path class="whisker" d="M{left:.1f} {y - 5}v10m0-5H{right:.1f}m0-5v10"/>'
    yield marker(mark.framework, axis.at(mark.value), y)
    yield text(WIDTH, y - 11 if above else y + 4, mark.words, "end", ' class="value"') + "</g>"


def _drawing(name: str, title: str, marks: Sequence[Mark], percent: bool, above: bool) -> str:
    """`above`: the words stand above the whiskers, and zero belongs to the axis."""
    places = [place for mark in marks for place in (mark.value, *(mark.ends or ()))] + [0.0] * above
    low, high = min(places), max(places)
    pad, row = 0.04 * (high - low) or 0.05 * abs(high) or 0.01, 44 if above else 28
    axis = Axis(low - pad, high + pad, 6 if above else NAMES, WIDTH - (6 if above else WORDS))
    bottom, body = 8 + row * len(marks), []
    for tick in axis.ticks(5):
        shown = f"{100 * tick:.4g}{'' if above else ' %'}" if percent else f"{tick:.4g}"
        css = "axis" if above and abs(tick) < 1e-12 else "grid"
        body.append(line(axis.at(tick), 4, axis.at(tick), bottom, css))
        body.append(text(axis.at(tick), bottom + 15, shown.replace("-", "−"), "middle", ' class="tick"'))
    for place, mark in enumerate(marks):
        body += _row(mark, axis, 4 + row * place + (30 if above else row / 2), above)
    told = "; ".join(f"{mark.name}: {mark.words}" for mark in marks)
    return svg(name, title, told, (WIDTH, bottom + 22), body)


def scores(results: Results) -> str:
    """Every framework's score with its interval, in the order of the table."""
    score, marks = score_of(results), []
    for row in summary(results):
        if row.score is None:
            continue
        ends = interval(results, row)
        words = score.text(row.score)
        if ends is not None:
            words += f"  [{score.text(ends[0], False)}, {score.text(ends[1], False)}]"
        marks.append(Mark(row.framework, row.title, row.score, ends, words))
    if not marks:
        return ""
    return _drawing("scores", f"{score.name} with 95 % intervals", marks, score.key == "accuracy", above=False)


def pairs(results: Results) -> str:
    """Every paired difference with its interval; what is not separable is pale."""
    score, marks = score_of(results), []
    for found in differences(results):
        half = found.half
        ends = None if half is None else (found.gain - half, found.gain + half)
        verdict = "separable" if found.separable else "same adapter" if found.same else "not separable"
        words = f"{_signed(score.gap(found.gain), found.gain)} · {verdict}"
        name = f"{found.a.title} {'−' if score.higher_is_better else 'over'} {found.b.title}"
        marks.append(Mark(found.a.framework, name, found.gain, ends, words, not found.separable))
    if not marks:
        return ""
    title = f"Paired differences in {score.key} with 95 % intervals"
    return _drawing("pairs", title, marks, score.key == "accuracy", above=True)


def _signed(words: str, value: float) -> str:
    return f"+{words}" if value > 0 else words.replace("-", "−")


def table(results: Results) -> Grid:
    """The paired differences in words."""
    score, rows = score_of(results), []
    unit = "points" if score.key == "accuracy" else score.key
    for found in differences(results):
        shown = [_signed(score.gap(found.gain).removesuffix(" points"), found.gain), "–"]
        if found.half is not None:
            low, high = (
                score.gap(end).removesuffix(" points") for end in (found.gain - found.half, found.gain + found.half)
            )
            shown[1] = f"{low.replace('-', '−')} to {high.replace('-', '−')}"
        verdict = "same adapter" if found.same else "separable" if found.separable else "not separable"
        rows.append([found.a.title, title_of(found.b.framework), *shown, str(found.seeds), verdict])
    return ["Framework", "Better than", f"By ({unit})", "95 % interval", "Common seeds", ""], rows
