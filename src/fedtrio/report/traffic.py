"""What crosses between sites and server: bytes by kind and direction, and what a reader of them may learn."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from fedtrio.report.svg import WIDTH, short, svg, text, tone
from fedtrio.report.tables import Grid, Results, frameworks_of, title_of
from fedtrio.report.units import bytes_text, count_text, percent_text


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
    total, x, room = sum(size for _, size in kinds), 116.0, WIDTH - 186
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
    yield text(116, y + 32, short(words, 48), "start", ' class="tick"')


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
            body.append(text(0, y + 13, title_of(name), "start", extra))
        seen = name
        body.append(text(110, y + 13, "↑" if direction == "up" else "↓", "end", ' class="value"'))
        body += _bar(name, kinds, y, longest)
        told.append(f"{title_of(name)} {direction}: {bytes_text(sum(size for _, size in kinds))}")
    return svg("traffic", "What travels, by kind", "; ".join(told), (WIDTH, 12 + row * len(bars)), body)


def table(results: Results) -> Grid:
    """The bars in words: each kind in each direction, of all sites in one run."""
    rows = []
    for name in frameworks_of(results):
        for direction in ("up", "down"):
            kinds = _kinds(results, name, direction)
            total = sum(size for _, size in kinds)
            way = "to the server" if direction == "up" else "to the sites"
            title = title_of(name)
            rows += [[title, way, kind, bytes_text(size), percent_text(size / total)] for kind, size in kinds]
    return ["Framework", "Way", "Kind", "Bytes", "Share"], rows


# What leaves a site ---------------------------------------------------------------------------------------------------

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
