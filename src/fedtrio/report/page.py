"""`report.html`: one self-contained page, answer first. Every name is escaped; nothing is fetched."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from fedtrio.report import charts
from fedtrio.report.svg import printable
from fedtrio.report.tables import (
    SKEWED,
    TITLES,
    Results,
    asides,
    cells,
    frameworks_of,
    next_command,
    reading,
    score_of,
    sites_of,
    summary,
)
from fedtrio.report.units import bytes_text, count_text, percent_text

QUANTITIES = {
    "bytes": "Bytes on the wire",
    "client_flops": "Operations of a site",
    "client_seconds": "Time of a site",
    "client_peak_bytes": "Peak memory of a site",
}
REVEALS = {
    "fedllm": "Adapter parameters, trained on the site's texts. Texts and labels stay; a reader of the "
    "parameters may still infer traces of what they were trained on.",
    "kd": "Predictions (logits) on the shared public texts. The site's own texts, labels and parameters stay.",
    "centralized": "The raw texts and labels themselves: all data would have to move to one place. "
    "This yardstick does not count those bytes.",
    "local": "Nothing. Each site trains for itself.",
}
SPLIT = (
    "Activations of every training text at the cut, batch by batch, and the site's part of the adapter. {} "
    "Activations of early blocks can be close to the text itself."
)
LABELS = {
    "server": "Labels go to the server too.",
    "text": "Labels go to the server too, and here the labels are the text itself.",
    "client": "Labels and head stay at the site.",
}


def _reveals(results: Results, framework: str) -> str:
    if framework == "split":
        labels = (results["config"].get("split") or {}).get("labels")
        causal = results["config"].get("task") == "causal-lm"
        return SPLIT.format(LABELS["client" if labels == "client" else "text" if causal else "server"])
    if framework == "kd" and results["config"].get("kd", {}).get("protocol") == "feddf":
        framework = "fedllm"  # adapters go up, and logits stay at the server
    return REVEALS.get(framework, "See the kinds of message.")


def leaves(results: Results) -> list[dict[str, Any]]:
    """What goes up from all sites in one run of each framework, kind by kind, means over the seeds."""
    blocks = []
    for framework in frameworks_of(results):
        runs = [run for run in results["runs"] if run["framework"] == framework]
        sums: dict[str, list[float]] = {}
        for kind in (kind for run in runs for kind in run.get("kinds") or [] if kind["direction"] == "up"):
            entry = sums.setdefault(kind["kind"], [0.0, 0.0, 0.0])
            for place, key in enumerate(("messages", "bytes", "payload")):
                entry[place] += (kind.get(key) or 0) / len(runs)
        total = sum(size for _, size, _ in sums.values())
        kinds = [
            {
                "kind": name,
                "messages": count_text(messages),
                "bytes": bytes_text(size),
                "share": percent_text(size / total) if total else "–",
                "payload": percent_text(payload / size) if size else "–",
            }
            for name, (messages, size, payload) in sorted(sums.items(), key=lambda item: -item[1][1])
        ]
        blocks.append({"framework": framework, "reveals": _reveals(results, framework), "kinds": kinds})
    return blocks


def left_sites(results: Results) -> list[dict[str, str]]:
    """What left the sites in the runs of each framework, what came to them, and what was done to it before it left.

    From the kinds of message that hold tensors, as the ledger has them: `activations and labels` are both.
    """
    rows = []
    for framework in frameworks_of(results):
        kinds = [kind for run in results["runs"] if run["framework"] == framework for kind in run.get("kinds") or []]
        full = {way: [k["kind"] for k in kinds if k["direction"] == way and k["payload"]] for way in ("up", "down")}
        ways = {way: sorted({part for kind in found for part in kind.split(" and ")}) for way, found in full.items()}
        settings = (results["config"].get("split") or {}) if framework == "split" else {}
        shield = f"clipped to norm {settings['clip']:g}" if settings.get("clip") else ""
        shield += f", noise of {settings['noise']:g} times that" if settings.get("noise") else ""
        words = {way: ", ".join(parts) or "nothing" for way, parts in ways.items()}
        if framework == "centralized":
            words["up"] = "labels, texts"  # as if, for it sends nothing here
        rows.append({"framework": framework, **words, "shield": shield or "nothing"})
    return rows


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
    line = f"{len(sites)} sites hold {count_text(min(sizes))} to {count_text(max(sizes))} examples"
    labels = [site["effective_labels"] for site in sites if site.get("effective_labels") is not None]
    far = [site["emd"] for site in sites if site.get("emd") is not None]
    if not results["data"].get("labels"):
        labels = far = []
    if labels:
        line += f", with {min(labels):.1f} to {max(labels):.1f} effective labels"
    if far:
        line += f"; distance of a site's labels from the whole (EMD) {min(far):.2f} to {max(far):.2f}"
    seed = results["data"]["partitions"][0].get("seed")
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
            what = f"was refused: {event['reason']}" if event.get("reason") else "fell silent"
            yield f"{run['framework']}, seed {run['seed']}, round {event['round']}: {event['site']} {what}"


def _last(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _context(results: Results) -> dict[str, Any]:
    config, score = results["config"], score_of(results)
    model, source = str(config.get("model", "model")), (config.get("data") or {}).get("train")
    data = "the demo data" if source is None else _last(str(source)).removesuffix(".jsonl").removesuffix(".csv")
    warnings = [str(warning) for warning in results.get("warnings") or []] + list(_events(results))
    return {
        "title": f"{_last(model)} on {data}",
        "facts": facts(results),
        "reading": [line.replace("-FedLLM", "\u2011FedLLM") for line in reading(results)],  # no break inside
        "command": next_command(results),
        "score": score,
        "table": _table(results),
        "asides": asides(results),
        "titles": TITLES,
        "quality": [(x, Markup(charts.quality(results, x))) for x in ("round", "bytes", "flops")],
        "traffic": Markup(charts.traffic(results)),
        "leaves": leaves(results),
        "left": left_sites(results),
        "heatmap": Markup(charts.heatmap(results)),
        "holdings": Markup(charts.holdings(results)),
        "spread": _spread(results),
        "settings": flat(config),
        "warnings": warnings[:20],
        "more_warnings": max(0, len(warnings) - 20),
        "environment": flat(results.get("environment") or {}),
        "runs": results["runs"],
        "names": frameworks_of(results),
        "how": _how(results),
    }


def render(results: Results) -> str:
    """The whole page as one string of HTML."""
    return filled("page.html.j2", _context(all_printable(results)))


def filled(template: str, context: dict[str, Any]) -> str:
    """One of this package's templates with what it shows."""
    loader = FunctionLoader(lambda name: files("fedtrio.report").joinpath(name).read_text(encoding="utf-8"))
    options = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    return Environment(loader=loader, **options).get_template(template).render(context)


def all_printable(value: Any) -> Any:
    """The same results, in whose names nothing but letters and white space is left."""
    if isinstance(value, dict):
        return {all_printable(key): all_printable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [all_printable(inner) for inner in value]
    return printable(value) if isinstance(value, str) else value
