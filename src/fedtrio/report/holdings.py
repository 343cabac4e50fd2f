"""Who holds what: the map of sites and labels, or where there are no labels the sizes of the sites."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from fedtrio.report.svg import WIDTH, short, svg, text
from fedtrio.report.tables import Grid, Results
from fedtrio.report.units import count_text, finite

SITES, GROUPS, LABELS = 64, 40, 120  # sites in rows of their own, else rows of sites alike; columns at most


@dataclass(frozen=True)
class Band:
    """One row of the map: a site, or sites alike."""

    name: str
    counts: list[float]
    examples: float
    effective: float | None
    tip: str


def sites_of_first(results: Results) -> list[dict[str, Any]]:
    """What each site holds, first seed; empty where the server was not told."""
    return ((results["data"].get("partitions") or [{}])[0]).get("sites") or []


def _bands(sites: Sequence[dict[str, Any]], labels: Sequence[str]) -> list[Band]:
    """A row for each site, or where there are too many, for each group of those with the same labels in front."""
    if len(sites) <= SITES:
        return [
            Band(str(s["name"]), s["label_counts"], s["examples"], finite(s.get("effective_labels")), _tip(s, labels))
            for s in sites
        ]

    def peak(site: dict[str, Any]) -> tuple[int, float]:
        counts = site["label_counts"]
        top = max(range(len(counts)), key=counts.__getitem__)
        return top, -counts[top] / max(1, site["examples"])

    alike, size, bands = sorted(sites, key=peak), math.ceil(len(sites) / GROUPS), []
    for first in range(0, len(alike), size):
        group = alike[first : first + size]
        counts = [sum(column) / len(group) for column in zip(*(s["label_counts"] for s in group), strict=True)]
        known = [effective for s in group if (effective := finite(s.get("effective_labels"))) is not None]
        name, examples = f"{first + 1}–{first + len(group)}", sum(s["examples"] for s in group) / len(group)
        tip = f"sites {name}, among them {short(group[0]['name'], 30)}: {examples:,.1f} examples each"
        bands.append(Band(name, counts, examples, sum(known) / len(known) if known else None, tip))
    return bands


def _columns(labels: Sequence[str]) -> list[tuple[str, int, int]]:
    """Name, first label and last of each column: one label, or several neighbours where there are too many."""
    size = math.ceil(len(labels) / LABELS)
    if size == 1:
        return [(label, place, place + 1) for place, label in enumerate(labels)]
    starts = range(0, len(labels), size)
    return [(f"{start}–{min(start + size, len(labels)) - 1}", start, start + size) for start in starts]


def _tip(site: dict[str, Any], labels: Sequence[str]) -> str:
    counts = site["label_counts"]
    top = sorted(range(len(labels)), key=lambda place: -counts[place])[:3]
    most = ", ".join(f"{short(labels[place], 30)} {count_text(counts[place])}" for place in top if counts[place])
    return f"{short(site['name'], 60)}: {count_text(site['examples'])} examples, most: {most or 'none'}"


def _cells(counts: Sequence[float], peak: float, names: Sequence[str], tips: bool) -> str:
    """One row in units of a cell; a tooltip for each cell only where there are few of them."""
    shades: dict[int, list[str]] = {}
    for place, count in enumerate(counts):
        if count > 0:
            cell = f"M{place} 0h.94v.9h-.94z"
            if tips:
                cell = f'<path d="{cell}"><title>{escape(f"{names[place]}: {count_text(count)}")}</title></path>'
            shades.setdefault(max(1, math.ceil(8 * math.sqrt(count / peak))), []).append(cell)
    if tips:
        return "".join(f'<g class="h{shade}">{"".join(found)}</g>' for shade, found in sorted(shades.items()))
    return "".join(f'<path class="h{shade}" d="{"".join(found)}"/>' for shade, found in sorted(shades.items()))


def _heads(names: Sequence[str], left: float, top: float, pitch: float) -> Iterable[str]:
    """The labels, upright above their columns; in a crowd only every n-th, by number."""
    every = math.ceil(9.5 / pitch)
    for place in range(0, len(names), every):
        x = left + (place + 0.5) * pitch + 3.2
        words = short(names[place], 24) if every == 1 else str(place)
        yield text(x, top - 5, words, "start", f' class="head" transform="rotate(-90 {x:.1f} {top - 5:.1f})"')


def heatmap(results: Results) -> str:
    """Examples of each label at each site, first seed; the square root of the count sets the shade."""
    labels = [str(label) for label in results["data"].get("labels") or []]
    sites = [site for site in sites_of_first(results) if len(site.get("label_counts") or []) == len(labels)]
    if not labels or not sites:
        return ""
    bands, columns = _bands(sites, labels), _columns(labels)
    names = [name for name, _, _ in columns]
    rows = [[sum(band.counts[first:last]) for _, first, last in columns] for band in bands]
    peak = max(1e-9, *(count for row in rows for count in row)) or 1
    left, after = 14 + 6.2 * min(18, max(len(band.name) for band in bands)), 116
    pitch = max(3.0, min(44.0, (1000 - left - after) / len(columns)))
    height = 22 if len(bands) <= 16 else 15 if len(bands) <= 32 else 11.5
    top = 18 + 5.6 * (4 if pitch < 9.5 else min(24, max(map(len, names))))
    end = left + pitch * len(columns)
    body = list(_heads(names, left, top, pitch))
    body += [text(end + 52, top - 5, "examples", "end", ' class="head"')]
    body += [text(end + 112, top - 5, "eff. labels", "end", ' class="head"')]
    for place, (band, counts) in enumerate(zip(bands, rows, strict=True)):
        y, base = top + place * height, top + place * height + height / 2 + 3.4
        body.append(f"<g><title>{escape(band.tip)}</title>")
        body.append(text(left - 7, base, short(band.name, 18), "end", ' class="head"'))
        room = f'x="{left:.1f}" y="{y:.1f}" width="{end - left:.1f}" height="{height * 0.92:.1f}"'
        body.append(f'<rect {room} class="h0"/>')
        body.append(f'<g transform="translate({left:.1f} {y:.1f}) scale({pitch:.3f} {height})">')
        body.append(_cells(counts, peak, names, len(bands) * len(columns) <= 400) + "</g>")
        body.append(text(end + 52, base, count_text(band.examples), "end", ' class="head"'))
        words = "–" if band.effective is None else f"{band.effective:.1f}"
        body.append(text(end + 112, base, words, "end", ' class="head"') + "</g>")
    size = (end + after, top + height * len(bands) + 4)
    told = f"{len(sites)} sites, {len(labels)} labels; the darkest cell stands for {peak:,.4g} examples."
    return svg("heatmap", "Examples of each label at each site", told, size, body)


def table(results: Results) -> Grid:
    """The map in words: for each row of it, examples, effective labels and the labels it holds most of."""
    labels = [str(label) for label in results["data"].get("labels") or []]
    sites = [site for site in sites_of_first(results) if len(site.get("label_counts") or []) == len(labels)]
    rows = []
    for band in _bands(sites, labels) if labels and sites else ():
        top = sorted(range(len(labels)), key=lambda place: -band.counts[place])[:3]
        most = ", ".join(f"{short(labels[place], 24)} {band.counts[place]:,.4g}" for place in top if band.counts[place])
        effective = "–" if band.effective is None else f"{band.effective:.1f}"
        rows.append([short(band.name, 40), count_text(band.examples), effective, most or "none"])
    return [f"Site{'s (mean of each)' if len(sites) > SITES else ''}", "Examples", "Effective labels", "Most"], rows


def sizes(results: Results) -> str:
    """Where there are no labels: how many examples each site holds, first seed; of many sites those between too."""
    sites = sites_of_first(results)
    if not sites:
        return ""
    if len(sites) > SITES:
        ordered = sorted(sites, key=lambda site: -site["examples"])
        sites = [ordered[round(place * (len(ordered) - 1) / (GROUPS - 1))] for place in range(GROUPS)]
    peak, row = max(1, *(site["examples"] for site in sites)), 22 if len(sites) <= 20 else 14
    body = []
    for place, site in enumerate(sites):
        y, width = 4 + place * row, (WIDTH - 180) * site["examples"] / peak
        body.append(text(108, y + row / 2 + 3.4, short(site["name"], 18), "end", ' class="head"'))
        body.append(f'<rect x="116" y="{y + 2}" width="{width:.1f}" height="{row - 4}" class="h6"/>')
        body.append(text(124 + width, y + row / 2 + 3.4, count_text(site["examples"]), "start", ' class="head"'))
    told = f"{len(sites_of_first(results))} sites; the largest holds {count_text(peak)} examples."
    return svg("holdings", "Examples at each site", told, (WIDTH, 8 + row * len(sites)), body)
