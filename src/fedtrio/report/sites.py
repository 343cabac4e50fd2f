"""The sites one by one: what each gains over training alone, and how long it computes and waits.

Up to `EACH` sites are shown one by one; of more, the curve over all and those at both ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from json import dumps

from fedtrio.report import link
from fedtrio.report.curves import marker
from fedtrio.report.svg import BOTTOM, HEIGHT, LEFT, LETTER, RIGHT, TOP, WIDTH, Axis, line, short, svg, text, tone
from fedtrio.report.tables import YARDSTICKS, Grid, Results, frameworks_of, title_of
from fedtrio.report.units import count_text, finite, mean, names_text, percent_text, seconds_text

EACH, ENDS, BARS = 24, 5, 12

Gains = dict[str, dict[str, float]]  # by framework and site


def _accuracies(results: Results, framework: str) -> dict[tuple[int, str], float]:
    """Accuracy of the model that a site ends up with, by seed and site."""
    runs = [run for run in results["runs"] if run["framework"] == framework]
    found = {(run["seed"], str(s["name"])): finite(s.get("accuracy")) for run in runs for s in run.get("sites") or []}
    return {place: accuracy for place, accuracy in found.items() if accuracy is not None}


def gains(results: Results) -> Gains:
    """Each site's accuracy with a framework minus its own local one, of the same seed; means over the seeds."""
    floor, found = _accuracies(results, "local"), {}
    for framework in (name for name in frameworks_of(results) if name not in YARDSTICKS):
        at: dict[str, list[float]] = {}
        for (seed, site), accuracy in _accuracies(results, framework).items():
            if (seed, site) in floor:
                at.setdefault(site, []).append(accuracy - floor[seed, site])
        if at:
            found[framework] = {site: sum(values) / len(values) for site, values in at.items()}
    return found


def verdict(found: Gains) -> str:
    """How many sites gain with each framework."""
    parts = []
    for framework, by_site in found.items():
        ahead = sum(gain > 0 for gain in by_site.values())
        parts.append(f"{count_text(ahead)} of {count_text(len(by_site))} with {title_of(framework)}")
    return f"Sites that gain over training alone: {names_text(parts)}." if parts else ""


def _points(value: float) -> str:
    return f"{'+' if value > 0 else '−' if value < 0 else ''}{abs(100 * value):.1f}"


def table(found: Gains) -> Grid:
    """Gains in points of accuracy: all sites, or of many those at both ends of each framework."""
    names = list(dict.fromkeys(site for by_site in found.values() for site in by_site))
    if len(names) > EACH:
        ends = [sorted(by_site, key=by_site.__getitem__) for by_site in found.values()]
        names = list(dict.fromkeys(name for ordered in ends for name in (*ordered[-ENDS:][::-1], *ordered[:ENDS])))
    order = sorted(names, key=lambda name: -max(by_site.get(name, -9) for by_site in found.values()))
    rows = [[short(n, 40), *(_points(by[n]) if n in by else "–" for by in found.values())] for n in order]
    return ["Site", *(title_of(framework) for framework in found)], rows


def gains_chart(found: Gains) -> str:
    """Few sites: a row for each with a mark for each framework. Many: their gains in order, from best to worst."""
    values = [gain for by_site in found.values() for gain in by_site.values()]
    if not values:
        return ""
    low, high = min(0.0, *values), max(0.0, *values)
    pad = 0.06 * (high - low) or 0.01
    names = list(dict.fromkeys(site for by_site in found.values() for site in by_site))
    draw = _rows if len(names) <= EACH else _ordered
    size, body = draw(found, names, low - pad, high + pad)
    told = "; ".join(
        f"{title_of(f)}: {_points(min(by.values()))} to {_points(max(by.values()))} points" for f, by in found.items()
    )
    return svg("gains", "Gain of each site over training alone", told, size, body)


def _rows(found: Gains, names: Sequence[str], low: float, high: float) -> tuple[tuple[float, float], list[str]]:
    row, left = 26, 20 + LETTER * min(16, max(map(len, names)))
    axis, bottom = Axis(low, high, left, WIDTH - 24), 30 + row * len(names)
    body = [
        piece
        for mark in axis.ticks(5)
        for piece in (
            line(axis.at(mark), 26, axis.at(mark), bottom, "axis" if abs(mark) < 1e-12 else "grid"),
            text(axis.at(mark), bottom + 16, _points(mark).replace(".0", ""), "middle", ' class="tick"'),
        )
    ]
    x = left
    for framework in found:  # the key, above the rows
        title = title_of(framework)
        body.append(f'<g style="--c:{tone(framework)}">{marker(framework, x + 5, 10)}')
        body.append(text(x + 16, 14, title, "start", ' class="label"') + "</g>")
        x += 30 + 7.5 * len(title)
    first = next(iter(found.values()))
    for place, name in enumerate(sorted(names, key=lambda name: -first.get(name, -9))):
        y = 30 + row * (place + 0.5)
        body.append(text(left - 8, y + 4, short(name, 16), "end", ' class="tick"'))
        body.append(line(left, y, WIDTH - 24, y, "grid"))
        for step, (framework, by_site) in enumerate(found.items()):
            if name in by_site:
                tip = escape(f"{short(name, 60)}, {title_of(framework)}: {_points(by_site[name])} points")
                mark = marker(framework, axis.at(by_site[name]), y + 5 * (step - (len(found) - 1) / 2))
                body.append(f'<g style="--c:{tone(framework)}"><title>{tip}</title>{mark}</g>')
    body.append(text((left + WIDTH) / 2, bottom + 36, "Points of accuracy", "middle", ' class="name"'))
    return (WIDTH, bottom + 42), body


def _ordered(found: Gains, names: Sequence[str], low: float, high: float) -> tuple[tuple[float, float], list[str]]:
    axis, x_axis = Axis(low, high, HEIGHT - BOTTOM, TOP), Axis(0, 100, LEFT + 8, WIDTH - 104)
    body = []
    for mark in axis.ticks():
        css = "axis" if abs(mark) < 1e-12 else "grid"
        body.append(line(LEFT, axis.at(mark), WIDTH - RIGHT, axis.at(mark), css))
        body.append(text(LEFT - 7, axis.at(mark) + 4, _points(mark).replace(".0", ""), "end", ' class="tick"'))
    for mark in range(0, 101, 25):
        body.append(text(x_axis.at(mark), HEIGHT - BOTTOM + 18, f"{mark} %", "middle", ' class="tick"'))
    body.append(text((LEFT + WIDTH) / 2, HEIGHT - 8, "Sites, from the greatest gain", "middle", ' class="name"'))
    taken: list[float] = []
    for framework, by_site in found.items():
        ordered = sorted(by_site.values(), reverse=True)
        parts = sorted({round(place * (len(ordered) - 1) / 100) for place in range(101)})
        spots = [(x_axis.at(100 * place / max(1, len(ordered) - 1)), axis.at(ordered[place])) for place in parts]
        y = spots[-1][1]
        while any(abs(y - other) < 15 for other in taken):
            y -= 15
        taken.append(y)
        body.append(f'<g style="--c:{tone(framework)}">')
        body.append(f'<path class="curve" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in spots)}"/>')
        body.append(text(spots[-1][0] + 8, y + 4, title_of(framework), "start", ' class="label"'))
        body.append("</g>")
    return (WIDTH, HEIGHT), body


# Computing and waiting ------------------------------------------------------------------------------------------------


def _shown(loads: list[tuple[str, link.Load]]) -> list[tuple[str, link.Load]]:
    """All, or of many the heaviest, the lightest and those between, evenly."""
    if len(loads) <= EACH:
        return loads
    return [loads[round(place * (len(loads) - 1) / (BARS - 1))] for place in range(BARS)]


def waiting(results: Results) -> list[tuple[str, str]]:
    """Framework and chart: for each site the share of the run in which it computes, sends or receives, and waits."""
    charts = []
    for number, (framework, runs) in enumerate(link.timed(results).items()):
        lasts, room, left, row = link.breakdown(runs)[-1], WIDTH - 170.0, 124.0, 18
        loads, body = _shown(link.sites(results, framework)), []
        if not loads or lasts <= 0:
            continue
        for place, (name, load) in enumerate(loads):
            work, wire, trips = (room * part / lasts for part in link.DEFAULT.parts(load))
            y, waits = 2 + row * place, max(0.0, lasts - link.DEFAULT.need(load)) / lasts
            facts = f'data-of="{escape(framework)}" data-load="{dumps(load)}" data-room="{room:.0f}"'
            body.append(f'<g {facts} style="--c:{tone(framework)}">')
            body.append(text(left - 8, y + 11, short(name, 16), "end", ' class="tick"'))
            body.append(f'<rect class="h0" x="{left}" y="{y}" width="{room:.0f}" height="13"/>')
            body.append(f'<rect class="work" x="{left}" y="{y}" width="{work:.1f}" height="13"/>')
            body.append(f'<rect class="wire" x="{left + work:.1f}" y="{y}" width="{wire + trips:.1f}" height="13"/>')
            body.append(text(left + room + 8, y + 11, percent_text(waits, 0), "start", ' class="value"') + "</g>")
        idle = [1 - link.DEFAULT.need(load) / lasts for _, load in link.sites(results, framework)]
        told = (
            f"Sites wait {percent_text(max(0.0, min(idle)), 0)} to {percent_text(max(0.0, max(idle)), 0)} of the run."
        )
        title = f"{title_of(framework)}: computing, sending and waiting of each site"
        charts.append((framework, svg(f"waiting-{number}", title, told, (WIDTH, 4 + row * len(loads)), body)))
    return charts


def waiting_table(results: Results) -> Grid:
    """The bars in words, for the line that the page opens with."""
    rows = []
    for framework, runs in link.timed(results).items():
        lasts = link.breakdown(runs)[-1]
        for name, load in _shown(link.sites(results, framework)):
            work, wire, trips = link.DEFAULT.parts(load)
            waits = max(0.0, lasts - link.DEFAULT.need(load))
            words = [seconds_text(part) for part in (work, wire + trips, waits)]
            rows.append([title_of(framework), short(name, 40), *words])
    return ["Framework", "Site", "Computing", "Sending and receiving", "Waiting"], rows


def measured(results: Results) -> Grid:
    """Computing and waiting as they were over HTTPS; of many sites those at both ends, and the mean."""
    rows = []
    found = link.waited(results)
    for title in dict.fromkeys(row[0] for row in found):
        own = [row for row in found if row[0] == title]
        means = (title, "mean of all", mean(row[2] for row in own) or 0.0, mean(row[3] for row in own) or 0.0)
        shown = own if len(own) <= EACH else [*own[:ENDS], *own[-ENDS:]]
        for _, name, work, waits in [*shown, means]:
            share = percent_text(waits / (work + waits)) if work + waits else "–"
            rows.append([title, short(name, 40), seconds_text(work), seconds_text(waits), share])
    return ["Framework", "Site", "Computing", "Waiting", "Share"], rows
