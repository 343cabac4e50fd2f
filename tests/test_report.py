"""The report's tables and pages, on results that are plainly made up."""

from __future__ import annotations

import html
import io
import itertools
import math
import re
import subprocess
import sys
from importlib.resources import files

import pytest
from made_up import made_up
from rich.console import Console

from fedtrio.report import curves, tables, units, verdict
from fedtrio.report.page import render
from fedtrio.report.svg import Axis


def printed(results, width, encoding="utf-8"):
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding=encoding, errors="strict", newline="\n")
    tables.print_table(results, Console(file=out, width=width, force_terminal=False, legacy_windows=False))
    out.flush()
    return raw.getvalue().decode(encoding)


def test_units():
    assert [units.bytes_text(n) for n in (0, 812, 1e3, 12_345, 999_960, 1.23e9)] == [
        "0 B",
        "812 B",
        "1.00 kB",
        "12.3 kB",
        "1.00 MB",
        "1.23 GB",
    ]
    assert units.memory_text(512 * 2**20) == "512 MiB"
    assert units.flops_text(3.4e9) == "3.40 GFLOP"
    assert [units.seconds_text(s) for s in (0.8, 90, 600, 9000)] == ["0.80 s", "90 s", "10.0 min", "2.5 h"]
    assert [units.factor_text(f) for f in (1.26, 12.4, 3412)] == ["1.3", "12", "3,400"]
    assert units.names_text(["a", "b", "c"]) == "a, b and c"


def test_summary_by_hand():
    row = tables.summary(made_up(sites=4, rounds=2, finals={"fedllm": 0.8}, seeds=(1,)))[0]
    assert (row.seeds, row.sites, row.score_sd) == (1, 4, None)
    assert row.score == pytest.approx(0.8)
    assert row.bytes_per_site == 2 * 16e6 / 4
    assert tables.deviation([1.0, 2.0, 3.0]) == pytest.approx(1.0)


def test_the_reading_names_a_winner_outside_the_spread():
    first = verdict.reading(made_up())[0]
    assert first.startswith("FedLLM (82.") and "leads, 6.0 points better than Split-FedLLM" in first


def test_the_next_command_outside_the_spread_is_unlike_sites_or_more_rounds():
    results = made_up()
    assert verdict.next_command(results) == 'fedtrio compare … --set "partition.alpha=0.1"'
    results["config"]["partition"]["name"] = "iid"
    assert verdict.next_command(results) == 'fedtrio compare … --set "rounds=20"'
    assert "α" not in render(results)


@pytest.mark.parametrize("seeds", [(1,), (0, 1, 2)])
def test_the_reading_names_no_winner_inside_the_spread(seeds):
    close = made_up(finals={"fedllm": 0.81, "kd": 0.805, "split": 0.80}, seeds=seeds, test=400)
    first = verdict.reading(close)[0]
    assert "not separable" in first and "leads" not in first and "better" not in first
    assert f"{'one seed' if len(seeds) == 1 else '3 seeds'} and 400 test texts" in first
    wanted = {1: "seeds=[1,0,2]", 3: "seeds=[0,1,2,3,4]"}[len(seeds)]
    assert wanted in verdict.next_command(close)


def test_the_reading_says_who_is_cheap_and_how_the_yardsticks_stand():
    text = " ".join(verdict.reading(made_up()))
    assert "KD-FedLLM moves the fewest bytes" in text and "FedLLM moves 40× as much" in text
    assert "Split-FedLLM asks the least compute" in text and "FedLLM asks 3.8× as much" in text
    assert "Against training alone, the floor (58.0 %), all do better." in text
    assert "Against all data in one place, the ceiling (86.0 %), all do worse." in text


def test_perplexity_with_one_seed_is_no_ranking():
    results = made_up(task="causal-lm", labels=0, seeds=(1,))
    assert "no ranking" in verdict.reading(results)[0]


def test_lower_perplexity_wins():
    first = verdict.reading(made_up(task="causal-lm", labels=0))[0]
    assert first.startswith("FedLLM (9.") and "leads, 0.77 better than Split-FedLLM" in first


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("width", [40, 80, 160])
def test_the_table_prints_anywhere(encoding, width):
    text = printed(made_up(), width, encoding)
    assert all(name in text for name in tables.TITLES.values())
    assert max(map(len, text.splitlines())) <= width
    assert "raw data" in text and "…" not in text


def test_the_page_is_small_and_fetches_nothing():
    results = made_up(labels=77, sites=64, rounds=100)
    results["data"]["labels"] = [f"a_rather_long_made_up_label_name_{place}" for place in range(77)]
    page = render(results)
    assert len(page.encode()) < 350_000
    assert "https://" not in page and "@import" not in page and "url(" not in page and page.count("<script") == 2
    assert set(re.findall(r"http://[^\"' ]*", page)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"\b(src|href)\s*=\s*[\"'](?!#|data:,)", page)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy and html.unescape(policy[1]).startswith("default-src 'none'; style-src 'unsafe-inline'; script-src")


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
@pytest.mark.parametrize("sites", [3, 40])
def test_every_chart_has_a_name_and_a_description(task, sites):
    labels = 5 if task == "classification" else 0
    page = render(made_up(task=task, labels=labels, sites=sites))
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(charts) >= 10 and len(charts) == page.count("<svg") == page.count('role="img"')
    names = set()
    for chart in charts:
        title, desc = re.search(r'aria-labelledby="(\S+) (\S+)"', chart).groups()
        assert re.search(rf'<title id="{title}">[^<]{{8,}}</title><desc id="{desc}">[^<]{{8,}}</desc>', chart)
        names.add(title)
    assert len(names) == len(charts)
    shown = re.findall(r"<(?:input|pre)\b[^>]*", page) + re.findall(r'<div class="scroll[^>]*', page)
    assert all("tabindex" in tag or "type=" in tag for tag in shown)  # what scrolls can be reached by key


def test_hostile_names_are_words_only():
    evil = "<script>alert('&')</script>\"onload=\"x"
    results = made_up(prefix=evil)
    results["data"]["labels"] = [evil] * 5
    results["config"] |= {"model": evil, "task": evil, "note": {evil: evil}}
    results["warnings"] = [evil] * 30
    for run in results["runs"]:
        run["adapter_sha256"] = evil
        for kind in run["kinds"]:
            kind["kind"] = evil
    results["runs"].append(results["runs"][0] | {"framework": evil})
    page = render(results)
    assert page.count("<script") == 2 and "alert(" not in html.unescape(page).split("<script>")[-1]
    assert '"onload="' not in page and "&lt;script&gt;" in page and "and 10 more" in page


def test_endless_and_turned_names() -> None:
    results = made_up(prefix="x" * 10_000, sites=30)
    results["data"]["labels"] = ["\u202e" + "y" * 10_000, "\x1b[31m\x00", "z\u2066", "\ud800", "ok"]
    results["warnings"] = ["w" * 100_000]
    page = render(results)
    assert len(page.encode()) < 300_000 and "x" * 201 not in page
    assert not re.search("[\x00\x1b\u202e\u2066\ud800]", page) and "\ufffd[31m\ufffd" in page


def test_a_thousand_sites_stay_small_and_readable() -> None:
    results = made_up(labels=77, sites=1000, rounds=100, seeds=(0, 1, 2, 3, 4))
    page = render(results)
    assert len(page.encode()) < 500_000
    assert "1,000 of 1,000 with FedLLM" in page or "of 1,000 with FedLLM" in page
    assert page.count("<tr") < 400  # no list of a thousand
    assert ">1–25</text>" in page and ">976–1000</text>" in page  # forty groups of sites alike


def test_a_page_for_language_models_speaks_of_perplexity():
    page = render(made_up(task="causal-lm", labels=0))
    assert "Perplexity against rounds" in page and "lower is better" in page
    assert "Accuracy against" not in page and "the labels are the text itself" in page
    assert 'id="heatmap-t"' not in page and 'id="holdings-t"' in page


def test_missing_values_break_nothing():
    results = made_up(rounds=4)
    results["runs"][0]["curve"] = []
    results["runs"][1]["curve"] = [{"round": 1, "accuracy": None, "loss": None}]
    for run in results["runs"]:
        if run["framework"] == "kd":
            run["accuracy"] = float("nan")
            run["curve"][-1]["accuracy"] = float("inf")
    assert "KD-FedLLM ended without a finite accuracy." in verdict.reading(results)
    assert "NaN" not in render(results) and ">nan" not in render(results)
    assert printed(results, 40)
    empty = made_up() | {"runs": []}
    assert verdict.reading(empty) == ["No run has finished yet."] and "No run has finished" in render(empty)
    assert printed(empty, 40) and verdict.next_command(empty)


def test_one_round_one_site_one_framework():
    page = render(made_up(labels=1, sites=1, rounds=1, seeds=(1,), finals={"split": 0.5}))
    assert "Split-FedLLM" in page and "Labels go to the server too" in page


def test_a_curve_is_the_mean_of_the_seeds():
    points = curves.series(made_up(rounds=3), "fedllm", "bytes")
    assert [point.round for point in points] == [1, 2, 3]
    assert points[0].x == 16e6 / 8 and points[0].low < points[0].y < points[0].high
    assert curves.series(made_up(), "centralized", "bytes") == []


@pytest.mark.parametrize("low, high", [(0.4, 0.9), (0.801, 0.802), (0, 1)])
def test_ticks_are_few_and_inside(low, high):
    marks = Axis(low, high, 0, 100).ticks()
    assert 2 <= len(marks) <= 7 and all(low - 1e-9 <= mark <= high + 1e-9 for mark in marks)


def test_the_page_needs_no_torch():
    code = "import sys, fedtrio.report.page; assert 'torch' not in sys.modules and 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_refused_answers_and_silent_sites_are_named() -> None:
    results = made_up()
    results["runs"][0]["events"] = [
        {"event": "refused", "round": 2, "site": "site-1", "reason": "site-1 sent <b>NaN</b>"},
        {"event": "lost", "round": 1, "site": "site-0"},
        {"event": "lost", "round": 3, "site": "site-2", "reason": "its worker died"},
    ]
    page = render(results)
    assert "round 3: site-2 fell silent: its worker died" in page
    assert "round 2: site-1 was refused: site-1 sent &lt;b&gt;NaN" in page and "round 1: site-0 fell silent" in page


def test_what_averaging_lost_and_own_models() -> None:
    results = made_up()
    assert verdict.asides(results) == []
    for run in results["runs"]:
        if run["framework"] == "fedllm":
            for entry in run["curve"]:
                entry["aggregation_error"] = 0.25 / entry["round"]
            run["adapters"], run["client_accuracy"] = {"a": "x"}, {"mean": 0.8, "min": 0.5, "p10": 0.55, "jain": 0.97}
    error, own = verdict.asides(results)
    assert "missed the exact mean of the sites’ updates by 2.5 % of its norm in the last round, by 25.0 %" in error
    assert "accuracy 80.0 % in the mean and 55.0 % at the 10th percentile of sites; Jain’s index 0.970" in own
    assert error in render(results)


# Colours --------------------------------------------------------------------------------------------------------------

STYLE = (files("fedtrio.report") / "style.css.j2").read_text(encoding="utf-8")
PALETTES = {
    name: dict(re.findall(r"--([a-z]+): (#[0-9a-f]+)", block))
    for name, block in zip(("light", "dark", "print"), re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL), strict=True)
}
NAMES = ("fedllm", "kd", "split", "centralized", "local", "other")


def linear(colour: str) -> list[float]:
    """Red, green, blue of a colour as light, from 0 to 1 (sRGB, IEC 61966-2-1)."""
    digits = "".join(2 * digit for digit in colour[1:]) if len(colour) == 4 else colour[1:]
    parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def contrast(one: str, other: str) -> float:
    """The ratio of WCAG 2.2."""
    low, high = sorted(0.2126 * red + 0.7152 * green + 0.0722 * blue for red, green, blue in map(linear, (one, other)))
    return (high + 0.05) / (low + 0.05)


def test_the_ratio_of_contrast() -> None:
    assert contrast("#fff", "#000") == pytest.approx(21) and contrast("#777777", "#fff") == pytest.approx(
        4.48, abs=0.01
    )


@pytest.mark.parametrize("name", PALETTES)
def test_all_words_pass_aa(name: str) -> None:
    palette = PALETTES[name]
    for ground in ("bg", "panel"):
        for colour in ("ink", "muted", *NAMES):
            assert contrast(palette[colour], palette[ground]) >= 4.5, (colour, ground)


@pytest.mark.parametrize("name", PALETTES)
def test_the_colour_blind_can_tell_the_frameworks(name: str) -> None:
    """Machado, Oliveira, Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency", 2009."""
    deficiencies = {
        "protan": ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
        "deutan": ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
        "tritan": ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),
    }
    for rows in deficiencies.values():
        seen = []
        for framework in ("fedllm", "kd", "split"):
            light = linear(PALETTES[name][framework])
            red, green, blue = (max(0.0, sum(map(math.prod, zip(row, light, strict=True)))) for row in rows)
            x, y, z = (
                (0.4124 * red + 0.3576 * green + 0.1805 * blue) / 0.9505,
                0.2126 * red + 0.7152 * green + 0.0722 * blue,
                (0.0193 * red + 0.1192 * green + 0.9505 * blue) / 1.089,
            )
            x, y, z = (part ** (1 / 3) if part > 0.008856 else 7.787 * part + 16 / 116 for part in (x, y, z))
            seen.append((116 * y - 16, 500 * (x - y), 200 * (y - z)))
        assert all(math.dist(a, b) > 15 for a, b in itertools.combinations(seen, 2))  # CIE 1976; 2.3 is just noticed
