"""What the results say, and how sure that is: intervals, paired differences, sentences, the next command.

No framework is called better than another unless the 95 % interval of their difference leaves zero out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, count, islice, product
from typing import Any

from fedtrio.report.tables import (
    SKEWED,
    YARDSTICKS,
    Results,
    Row,
    Score,
    deviation,
    frameworks_of,
    score_of,
    summary,
    title_of,
)
from fedtrio.report.units import (
    bytes_text,
    count_text,
    factor_text,
    finite,
    flops_text,
    mean,
    names_text,
    percent_text,
)

# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_T += (2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; above 30 degrees of freedom by the first terms of its expansion."""
    return _T[freedom - 1] if freedom <= len(_T) else 1.95996 + 2.3723 / freedom + 2.8225 / freedom**2


# How sure a number is -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """What runs of one framework reached, by seed: each finite score, and which test texts were answered right.

    `right` has for each seed which texts these were (SHA-256), how many, and a number with a bit for each; runs that
    do not tell are not in it.
    """

    scores: Mapping[int, float]
    right: Mapping[int, tuple[str, int, int]]

    @classmethod
    def of(cls, runs: Sequence[Mapping[str, Any]], key: str) -> Scored:
        """From entries of results.json; `key` is that of the score."""
        scores = {run["seed"]: score for run in runs if (score := finite(run.get(key))) is not None}
        told = {run["seed"]: run["right"] for run in runs if run.get("right") and run["seed"] in scores}
        return cls(scores, {seed: (right["sha256"], right["texts"], _bits(right)) for seed, right in told.items()})


def _bits(right: Mapping[str, Any]) -> int:
    digits = "".join(right["bits"])
    return int(digits, 16) >> (4 * len(digits) - right["texts"])


def _scored(results: Results, framework: str) -> Scored:
    return Scored.of([run for run in results["runs"] if run["framework"] == framework], score_of(results).key)


def _tests(results: Results) -> int:
    return (results["data"].get("test") or 0) if score_of(results).key == "accuracy" else 0


def interval(results: Results, row: Row) -> tuple[float, float] | None:
    """The 95 % interval of a score: over the seeds or over the test texts, whichever is wider.

    Over n seeds it is the mean ± t s/√n; over the test texts it is Wilson's ("Probable inference, the law of
    succession, and statistical inference", 1927). None where neither is known.
    """
    scores, found = [*_scored(results, row.framework).scores.values()], []
    if row.score is None:
        return None
    spread = deviation(scores)
    if spread is not None:
        half = student(len(scores) - 1) * spread / math.sqrt(len(scores))
        low, high = row.score - half, row.score + half
        found.append((max(0.0, low), min(1.0, high) if score_of(results).key == "accuracy" else high))
    if tests := _tests(results):
        z = 1.96**2
        middle = (row.score + z / (2 * tests)) / (1 + z / tests)
        half = 1.96 / (1 + z / tests) * math.sqrt(row.score * (1 - row.score) / tests + z / (4 * tests**2))
        found.append((min(row.score, middle - half), max(row.score, middle + half)))
    return max(found, key=lambda ends: ends[1] - ends[0], default=None)


def paired(a: Scored, b: Scored, tests: int, score: Score) -> tuple[float, float | None, list[int]] | None:
    """By how much a is better than b, the half width of the 95 % interval of that, and the common seeds.

    The interval is over the seeds, mean ± t s/√n of the differences seed by seed, or over the test texts, whichever is
    wider; the half width is None where neither is known. Over the texts it is `matched` where all these runs tell which
    of the same texts they answered right. Else the two accuracies are taken as found on `tests` texts of their own,
    each with one success and one failure added (Agresti and Caffo, "Simple and effective confidence intervals for
    proportions", 2000), which is rather too wide than too narrow.
    """
    seeds = sorted(a.scores.keys() & b.scores.keys())
    if not seeds:
        return None
    sign = 1 if score.higher_is_better else -1
    gains = [sign * (a.scores[seed] - b.scores[seed]) for seed in seeds]
    halves, spread = [], deviation(gains)
    if spread is not None:
        halves.append(student(len(seeds) - 1) * spread / math.sqrt(len(seeds)))
    told = [side.right.get(seed) for side in (a, b) for seed in seeds]
    answers = [each for each in told if each is not None]
    if len(answers) == len(told) and len({(sha256, texts) for sha256, texts, _ in answers}) == 1:
        bits = [each[2] for each in answers]
        halves.append(matched(bits[: len(seeds)], bits[len(seeds) :], answers[0][1]))
    elif tests:
        means = [sum(side.scores[seed] for seed in seeds) / len(seeds) for side in (a, b)]
        shares = [(mean * tests + 1) / (tests + 2) for mean in means]
        halves.append(1.96 * math.sqrt(sum(share * (1 - share) for share in shares) / (tests + 2)))
    return sum(gains) / len(gains), max(halves, default=None), seeds


def matched(of_a: Sequence[int], of_b: Sequence[int], tests: int) -> float:
    """Half width of the 95 % interval of a difference of two accuracies on the same texts; bits by seed, 1 for right.

    d_i is the mean over the seeds of (right of a) − (right of b) on text i of n. With one seed it is 1, 0 or −1, and
    Agresti and Min ("Simple improved confidence intervals for comparing matched proportions", 2005) add half a text to
    each of the four cells: one more in which the two agree, and half a one each for d = 1 and d = −1. The same texts
    are added for several seeds, so that N = n + 2, the middle is m = Σd / N, and the half width

        1.96 · √((Σd² + 1) / N − m²) / √N.

    The report shows Σd / n as the middle, so their distance, which is |m| · 2 / n, is added: the end nearer to zero is
    exactly Agresti and Min's. Seeds count as fixed: what another seed would do, the interval over the seeds says.
    """
    signed = [(1, bits) for bits in of_a] + [(-1, bits) for bits in of_b]
    total = sum(sign * bits.bit_count() for sign, bits in signed) / len(of_a)
    # (Σ over seeds)² on each text, summed over the texts, is counted pair by pair
    squares = sum(s * t * (x & y).bit_count() for (s, x), (t, y) in product(signed, repeat=2)) / len(of_a) ** 2
    middle = total / (tests + 2)
    return 1.96 * math.sqrt(((squares + 1) / (tests + 2) - middle**2) / (tests + 2)) + abs(middle) * 2 / tests


@dataclass(frozen=True)
class Difference:
    """By how much `a` is better than `b`, and the half width of the 95 % interval, None where that is unknown."""

    a: Row
    b: Row
    gain: float
    half: float | None
    seeds: int
    same: bool  # both ended in the same adapter, to the last bit, with each seed

    @property
    def separable(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.half is not None and abs(self.gain) > self.half


def difference(results: Results, a: Row, b: Row) -> Difference | None:
    """The paired difference over the seeds that both have run; None where a score or a common seed is missing."""
    of_a, of_b = _scored(results, a.framework), _scored(results, b.framework)
    found = paired(of_a, of_b, _tests(results), score_of(results))
    if found is None or a.score is None or b.score is None:
        return None
    gain, half, seeds = found
    hashes = [
        {r["seed"]: r.get("adapter_sha256") for r in results["runs"] if r["framework"] == row.framework}
        for row in (a, b)
    ]
    same = all(hashes[0][seed] == hashes[1][seed] is not None for seed in seeds)
    return Difference(a, b, gain, half, len(seeds), same)


def differences(results: Results) -> list[Difference]:
    """All pairs of frameworks, then each framework against each yardstick; the first of a pair is the better one."""
    ranked, rows = _ranked(results), {row.framework: row for row in summary(results)}
    pairs = [*combinations(ranked, 2)]
    pairs += [(row, rows[name]) for name in YARDSTICKS[::-1] if name in rows for row in ranked]
    return [found for pair in pairs if (found := difference(results, *pair)) is not None]


# Who leads ------------------------------------------------------------------------------------------------------------


def _ranked(results: Results) -> list[Row]:
    rows = [row for row in summary(results) if row.framework not in YARDSTICKS and row.score is not None]
    return sorted(rows, key=lambda row: row.score or 0.0, reverse=score_of(results).higher_is_better)


def leaders(results: Results) -> list[Row]:
    """The best framework and all that cannot be told from it."""
    ranked = _ranked(results)
    against = [difference(results, ranked[0], row) for row in ranked[1:]]
    level = [place for place, found in enumerate(against, 1) if found is None or not found.separable]
    return ranked[: max(level, default=0) + 1]


def evidence(results: Results) -> str:
    """`3 seeds and 480 test texts`."""
    seeds = max(row.seeds for row in summary(results))
    words = "one seed" if seeds == 1 else f"{seeds} seeds"
    tests = _tests(results)
    return f"{words} and {count_text(tests)} test text{'s' * (tests != 1)}" if tests else words


def headline(results: Results) -> str:
    """Which framework leads, by how much, and how sure that is; empty where none ended with a score."""
    score, ranked = score_of(results), _ranked(results)
    if not ranked:
        return ""
    best = leaders(results)
    shown = names_text(f"{row.title} ({score.text(row.score)})" for row in best)
    if len(ranked) == 1:
        return f"{shown} ran alone, with {evidence(results)}."
    behind = ranked[len(best) :]
    first = difference(results, ranked[0], behind[0]) if behind else None
    lead = ""
    if first is not None and first.half is not None:
        ends = score.gap(first.gain - first.half), score.gap(first.gain + first.half)
        lead = (
            f"{score.gap(first.gain)} better than {first.b.title} ({score.text(first.b.score)}); "
            f"95 % interval {ends[0].removesuffix(' points')} to {ends[1]}, from {evidence(results)}"
        )
    if len(best) == 1:
        return f"{shown} leads, {lead}."
    pairs = [difference(results, best[0], row) for row in best[1:]]
    if all(pair is not None and pair.same for pair in pairs):
        names = names_text(row.title for row in best)
        together = f"{names} end in the same adapter, to the last bit ({score.text(best[0].score)})"
        return f"{together}: {lead}." if lead else f"{together}, with {evidence(results)}."
    halves = [pair.half for pair in pairs if pair is not None and pair.half is not None]
    if not halves:
        return f"{shown}: with {evidence(results)} the spread is unknown, so this order is no ranking."
    rest = names_text(f"{row.title} ({score.text(row.score)})" for row in behind)
    return (
        f"{shown} are not separable: {evidence(results)} leave ±{score.gap(max(halves))} open"
        f"{f'. Behind them: {rest}' if rest else ''}."
    )


def _least(rows: list[Row], key: str, words: str, verb: str) -> str | None:
    ranked = sorted(rows, key=lambda row: getattr(row, key))
    low = getattr(ranked[0], key)
    if low <= 0:
        return None
    times = [f"{row.title} {verb} {factor_text(getattr(row, key) / low)}× as much" for row in ranked[1:]]
    return f"{ranked[0].title} {words}; {names_text(times)}."


def _costs(results: Results) -> list[str]:
    rows = [row for row in summary(results) if row.framework not in YARDSTICKS]
    if len(rows) < 2:
        return []
    wire = f"moves the fewest bytes ({bytes_text(min(row.bytes_per_site for row in rows))} per site)"
    compute = f"asks the least compute of a site ({flops_text(min(row.flops_per_site for row in rows))})"
    lines = [_least(rows, "bytes_per_site", wire, "moves"), _least(rows, "flops_per_site", compute, "asks")]
    return [line for line in lines if line]


def _against(results: Results, yardstick: Row) -> str | None:
    """How the frameworks stand against a yardstick; None where no interval is known."""
    groups: dict[str, list[str]] = {"better": [], "level": [], "worse": []}
    for row in _ranked(results):
        found = difference(results, row, yardstick)
        if found is None or found.half is None:
            return None
        groups["level" if not found.separable else "better" if found.gain > 0 else "worse"].append(row.title)
    verbs = {
        "better": ("does better", "do better"),
        "level": ("is not separable", "are not separable"),
        "worse": ("does worse", "do worse"),
    }
    everyone = len(_ranked(results))
    return names_text(
        "none is separable"
        if group == "level" and len(names) == everyone > 1
        else f"{'all' if len(names) == everyone > 1 else names_text(names)} {verbs[group][len(names) > 1]}"
        for group, names in groups.items()
        if names
    )


def _yardsticks(results: Results) -> str | None:
    rows = {row.framework: row for row in summary(results) if row.score is not None}
    words = {"local": "training alone, the floor", "centralized": "all data in one place, the ceiling"}
    parts = []
    for name in (name for name in words if name in rows):
        value, stand = score_of(results).text(rows[name].score), _against(results, rows[name])
        known = f"Against {words[name]} ({value}), {stand}."
        parts.append(known if stand else f"{words[name].capitalize()}, reaches {value}.")
    return " ".join(parts) or None


def quality(results: Results) -> list[str]:
    """The answer in sentences: the headline, the yardsticks, and what was lost."""
    if not results["runs"]:
        return ["No run has finished yet."]
    lost = [row.title for row in summary(results) if row.score is None]
    lines = [
        headline(results),
        _yardsticks(results),
        f"{names_text(lost)} ended without a finite {score_of(results).key}." if lost else None,
    ]
    return [line for line in lines if line]


def reading(results: Results) -> list[str]:
    """The results in a few sentences, the costs included, naming no winner that is not separable."""
    head, *more = quality(results)
    return [line for line in (head, " ".join(_costs(results)), *more) if line]


def asides(results: Results) -> list[str]:
    """What the table has no column for: what averaging lost, and how models of sites' own are spread."""
    lines = []
    for framework in frameworks_of(results):
        runs, title = [r for r in results["runs"] if r["framework"] == framework], title_of(framework)
        curves = [[finite(entry.get("aggregation_error")) for entry in run.get("curve") or []] for run in runs]
        known = [[error for error in curve if error is not None] for curve in curves]
        if any(known):
            last, most = mean(curve[-1] for curve in known if curve), max(max(c, default=0.0) for c in known)
            lines.append(
                f"{title}, aggregation error: the server’s update of the weights missed the exact mean of the sites’ "
                f"updates by {percent_text(last)} of its norm in the last round, by {percent_text(most)} at most."
            )
        if any(run.get("adapters") for run in runs):
            spread = {
                key: mean((r.get("client_accuracy") or {}).get(key) for r in runs) for key in ("mean", "p10", "jain")
            }
            if None not in spread.values():
                lines.append(
                    f"{title}, a model for each site: accuracy {percent_text(spread['mean'])} in the mean and "
                    f"{percent_text(spread['p10'])} at the 10th percentile of sites; Jain’s index {spread['jain']:.3f} "
                    "(1: all equal)."
                )
    return lines


def next_command(results: Results) -> str:
    """The next command worth typing: more seeds where the best are not separable, else harder data or more rounds."""
    config = results["config"]
    if not results["runs"]:
        return "fedtrio resume …"
    seeds: Sequence[int] = list(config.get("seeds") or [0])
    rounds = int(config.get("rounds") or 1)
    level = leaders(results) if _ranked(results) else []
    pairs = [difference(results, level[0], row) for row in level[1:]]
    open_ = any(pair is None or not pair.same for pair in pairs)
    if len(seeds) < (5 if open_ else 3):
        more = [*seeds, *islice((seed for seed in count() if seed not in seeds), 5)]
        wish = f"seeds={more[: 3 if len(seeds) < 3 else 5]}".replace(" ", "")
    else:
        partition = config.get("partition") or {}
        alpha = finite(partition.get("alpha")) if partition.get("name") in SKEWED else None
        wish = "partition.alpha=0.1" if alpha and alpha > 0.1 else f"rounds={2 * rounds}"
    between_machines = bool((config.get("wire") or {}).get("sites"))
    return f'fedtrio {"serve" if between_machines else "compare"} … --set "{wish}"'
