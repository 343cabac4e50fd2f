"""`report.html`: one self-contained page, answer first. Every name is escaped; nothing is fetched."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from fedtrio.report import curves, forest, holdings, link, sites, traffic
from fedtrio.report.svg import printable, short, tone
from fedtrio.report.tables import (
    SKEWED,
    YARDSTICKS,
    Results,
    cells,
    frameworks_of,
    score_of,
    sites_of,
    summary,
    title_of,
)
from fedtrio.report.units import bytes_text, count_text, factor_text, flops_text, names_text, seconds_text
from fedtrio.report.verdict import asides, difference, interval, leaders, next_command, quality

QUANTITIES = {
    "bytes": "Bytes on the wire",
    "client_flops": "Operations of a site",
    "client_seconds": "Time of a site",
    "server_seconds": "Time of the server",
    "client_peak_bytes": "Peak memory of a site",
}
LONGEST = 200  # letters of a name that are shown
SETTINGS, EVENTS = 300, 20  # rows at most


@dataclass(frozen=True)
class Card:
    """One respect in which frameworks differ: which is best, its number, and how the others stand."""

    head: str
    framework: str
    value: str
    note: str


def _best(head: str, costs: dict[str, float], value: Callable[[float], str]) -> list[Card]:
    """The card of a cost: the least, and how many times as much the others take."""
    ranked = sorted((cost, name) for name, cost in costs.items() if cost > 0)
    if not ranked:
        return []
    low, best = ranked[0]
    others = names_text(f"{title_of(name)} {factor_text(cost / low)}×" for cost, name in ranked[1:])
    return [Card(head, best, value(low), _unbroken(others))]


def cards(results: Results) -> list[Card]:
    """The verdict at a glance: the best score with its interval, and the least of each cost."""
    score, rows = score_of(results), [row for row in summary(results) if row.framework not in YARDSTICKS]
    found, best = [], leaders(results)
    if best:
        ends = interval(results, best[0])
        note = f"95 % interval {score.text(ends[0], False)} to {score.text(ends[1])}" if ends else "interval unknown"
        pairs = [(row, difference(results, best[0], row)) for row in best[1:]]
        for same, words in ((True, "the same adapter as"), (False, "not separable from")):
            of = [row.title for row, pair in pairs if (pair is not None and pair.same) == same]
            note += f"; {words} {names_text(of)}" if of else ""
        found.append(Card(score.name, best[0].framework, score.text(best[0].score), _unbroken(note)))
    line, lasts = link.DEFAULT, {name: link.breakdown(runs)[-1] for name, runs in link.timed(results).items()}
    found += _best("Traffic of a site", {row.framework: row.bytes_per_site for row in rows}, bytes_text)
    found += _best("Compute of a site", {row.framework: row.flops_per_site for row in rows}, flops_text)
    return found + _best(f"Time over {line.rate:g} Mbit/s, {line.trip:g} ms", lasts, seconds_text)


def flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names and short values, in their order."""
    rows: list[tuple[str, str]] = []
    for key, value in settings.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{key}.")
        else:
            words = ", ".join(map(str, value)) if isinstance(value, list) else "–" if value is None else str(value)
            rows.append((f"{prefix}{key}", words if len(words) <= 120 else words[:119] + "…"))
    return rows


def _partition(config: dict[str, Any]) -> str:
    rule = config.get("partition") or {}
    name = str(rule.get("name", "–"))
    return f"{name}, α\u00a0=\u00a0{rule['alpha']}" if name in SKEWED and "alpha" in rule else name


def facts(results: Results) -> list[tuple[str, str]]:
    """The line under the title: what was compared on what."""
    config, data = results["config"], results["data"]
    held = (data.get("partitions") or [{}])[0].get("sites") or []
    sites = len(held) or max((sites_of(results, run) for run in results["runs"]), default=config.get("clients"))
    seeds = config.get("seeds") or []
    rows = [
        ("Task", str(config.get("task", "–"))),
        ("Sites", str(sites)),
        ("Partition", _partition(config)),
        ("Rounds", str(config.get("rounds", "–"))),
        ("Participation", str(config.get("participation", "–"))),
        ("Seeds", ", ".join(map(str, seeds)) or "–"),
        (
            "Texts to train, test, share",
            " / ".join(count_text(data.get(k)) for k in ("train", "test", "public")),
        ),
    ]
    return rows + ([("Texts cut short", count_text(data["truncated"]))] if data.get("truncated") else [])


def _table(results: Results) -> list[dict[str, Any]]:
    score, rows = score_of(results), summary(results)
    return [{"framework": row.framework, "cells": cells(row, score)} for row in rows]


def _spread(results: Results) -> str:
    """One line on how unlike the sites are."""
    sites = ((results["data"].get("partitions") or [{}])[0]).get("sites") or []
    if not sites:
        return ""
    sizes = [site["examples"] for site in sites]
    line = f"{count_text(len(sites))} sites hold {count_text(min(sizes))} to {count_text(max(sizes))} examples"
    labels = [site["effective_labels"] for site in sites if site.get("effective_labels") is not None]
    far = [site["emd"] for site in sites if site.get("emd") is not None]
    if not results["data"].get("labels"):
        labels = far = []
    if labels:
        line += f", with {min(labels):.1f} to {max(labels):.1f} effective labels"
    if far:
        line += f"; distance of a site's labels from the whole (EMD) {min(far):.2f} to {max(far):.2f}"
    seed = results["data"]["partitions"][0].get("seed")
    if labels and len(sites) > holdings.SITES:
        line += ". Each row stands for sites in order of the label that they hold most of, and shows their mean"
    return f"{line}. Shown: seed {seed}."


def _how(results: Results) -> list[tuple[str, list[str]]]:
    names = frameworks_of(results)
    first = {name: next(run for run in results["runs"] if run["framework"] == name) for name in names}
    return [
        (words, [str((first[name].get("how") or {}).get(key, "–")) for name in names])
        for key, words in QUANTITIES.items()
    ]


def _events(results: Results) -> Iterator[str]:
    """A sentence for each answer that was refused and each site that fell silent."""
    for run in results["runs"]:
        for event in run.get("events") or []:
            what = "fell silent" if event.get("event") == "lost" else "was refused"
            what += f": {event['reason']}" if event.get("reason") else ""
            yield f"{run['framework']}, seed {run['seed']}, round {event['round']}: {event['site']} {what}"


def _last(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _context(results: Results) -> dict[str, Any]:
    config, score = results["config"], score_of(results)
    model, source = str(config.get("model", "model")), (config.get("data") or {}).get("train")
    data = "the demo data" if source is None else _last(str(source)).removesuffix(".jsonl").removesuffix(".csv")
    warnings, events, settings = [*map(str, results.get("warnings") or [])], [*_events(results)], flat(config)
    gained, slider = sites.gains(results), curves.slider(results)
    return {
        "title": f"{_last(model)} on {data}",
        "facts": facts(results),
        "answer": [_unbroken(line) for line in quality(results)],
        "cards": cards(results),
        "command": next_command(results),
        "score": score,
        "scores": Markup(forest.scores(results)),
        "table": _table(results),
        "asides": asides(results),
        "pairs": (Markup(forest.pairs(results)), forest.table(results)),
        "quality": [(x, Markup(curves.quality(results, x)), curves.numbers(results, x)) for x in curves.AXES],
        "slider": slider,
        "default": link.DEFAULT,
        "times": {name: link.breakdown(runs) for name, runs in link.timed(results).items()},
        "clock": seconds_text,
        "waiting": [(name, Markup(chart)) for name, chart in sites.waiting(results)],
        "waiting_table": sites.waiting_table(results),
        "measured": sites.measured(results),
        "gained": _unbroken(sites.verdict(gained)),
        "gains": (Markup(sites.gains_chart(gained)), sites.table(gained)),
        "many": max((sites_of(results, run) for run in results["runs"]), default=0) > sites.EACH,
        "traffic": (Markup(traffic.traffic(results)), traffic.table(results)),
        "leaves": traffic.leaves(results),
        "left": traffic.left_sites(results),
        "heatmap": (Markup(holdings.heatmap(results)), holdings.table(results)),
        "sizes": Markup(holdings.sizes(results)),
        "spread": _spread(results),
        "settings": settings[:SETTINGS],
        "more_settings": max(0, len(settings) - SETTINGS),
        "warnings": warnings[:EVENTS],
        "more_warnings": max(0, len(warnings) - EVENTS),
        "events": events[:EVENTS],
        "more_events": max(0, len(events) - EVENTS),
        "environment": flat(results.get("environment") or {}),
        "runs": results["runs"],
        "names": frameworks_of(results),
        "how": _how(results),
    }


def _unbroken(words: str) -> str:
    """No line ends inside a framework's name."""
    return words.replace("-FedLLM", "\u2011FedLLM")


def render(results: Results) -> str:
    """The whole page as one string of HTML."""
    return filled("page.html.j2", _context(all_printable(results)))


def filled(template: str, context: dict[str, Any]) -> str:
    """One of this package's templates with what it shows.

    The page's own policy lets nothing be fetched, and no script run but ours, which it knows by its hash.
    """

    script = _read("link.js") if context.get("slider") else ""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; base-uri 'none'"
    )
    return (
        _templates()
        .get_template(template)
        .render({**context, "policy": f"{policy}; form-action 'none'", "script": Markup(script)})
    )


def _read(name: str) -> str:
    return files("fedtrio.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _templates() -> Environment:
    options = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=FunctionLoader(_read), **options)
    environment.filters |= {"title_of": title_of, "tone": tone}
    return environment


def all_printable(value: Any) -> Any:
    """The same results, in whose names nothing but letters and white space is left, and none of them is endless."""
    if isinstance(value, dict):
        return {all_printable(key): all_printable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [all_printable(inner) for inner in value]
    return short(printable(value), LONGEST) if isinstance(value, str) else value
