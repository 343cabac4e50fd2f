"""The report, on results that are plainly made up: every number here is invented."""

from __future__ import annotations

import io
import math
import re
import subprocess
import sys

import pytest
from rich.console import Console

from fedtrio.report import charts, tables, units
from fedtrio.report.page import render

FINALS = {"fedllm": 0.82, "kd": 0.70, "split": 0.76, "centralized": 0.86, "local": 0.58}
COSTS = {  # bytes up, bytes down, operations of all sites in a round
    "fedllm": (8e6, 8e6, 3e12),
    "kd": (2e5, 2e5, 9e12),
    "split": (9e7, 9e7, 8e11),
    "centralized": (0, 0, 0),
    "local": (0, 0, 3e12),
}
KINDS = {
    "fedllm": [("up", "adapter", 1.0), ("down", "adapter", 1.0)],
    "kd": [("up", "logits", 1.0), ("down", "logits", 1.0)],
    "split": [
        ("up", "activations", 0.95),
        ("up", "labels", 0.01),
        ("up", "adapter", 0.04),
        ("down", "activation gradients", 0.96),
        ("down", "adapter", 0.04),
    ],
}


def made_up_run(framework, seed, names, rounds, final, causal):
    up, down, flops = COSTS[framework]
    curve = []
    for number in range(1, rounds + 1):
        value = 0.3 + (final - 0.3) * (1 - math.exp(-3 * number / rounds)) / (1 - math.exp(-3))
        value += 0.004 * (seed - 1) * (1 + math.sin(number))
        entry = {"round": number, "accuracy": value, "loss": 1.0}
        entry |= {"bytes_up": up * number, "bytes_down": down * number, "client_flops": flops * number}
        if framework == "local" and number < rounds:
            entry["accuracy"] = None
        if causal:
            entry |= {"accuracy": None, "perplexity": None if entry["accuracy"] is None else 8 / value}
        curve.append(entry)
    last = curve[-1]
    share = 1 / len(names)
    sums = {"bytes_up": up * rounds, "bytes_down": down * rounds, "client_flops": flops * rounds}
    sums |= {
        "client_seconds": 40.0 * rounds,
        "client_peak_bytes": 700 * 2**20,
        "messages": 2 * rounds * len(names) * bool(up),
    }
    sites = [
        {"name": name, "examples": 100, "accuracy": None, **{k: v * share for k, v in sums.items()}} for name in names
    ]
    kinds = []
    for direction, kind, part in KINDS.get(framework, []):
        size = part * sums[f"bytes_{direction}"]
        kinds.append({"direction": direction, "kind": kind, "messages": 10, "bytes": size, "payload": 0.98 * size})
    extra = {"perplexity": last["perplexity"]} if causal else {}
    return {
        "framework": framework,
        "seed": seed,
        "accuracy": None if causal else last["accuracy"],
        "loss": 1.0,
        "rounds": rounds,
        **extra,
        **sums,
        "payload_up": sums["bytes_up"],
        "payload_down": sums["bytes_down"],
        "client_accuracy": {"mean": None if causal else final - 0.01, "min": None if causal else final - 0.1},
        "adapter": f"{framework}-{seed}/adapter",
        "adapter_sha256": "0123456789abcdef" * 4,
        "sites": sites,
        "kinds": kinds,
        "how": {
            "bytes": "measured",
            "client_flops": "counted",
            "client_seconds": "measured",
            "client_peak_bytes": "modelled",
        },
        "curve": curve,
    }


def made_up(
    labels=5,
    sites=8,
    seeds=(0, 1, 2),
    rounds=10,
    finals=FINALS,
    task="classification",
    test=2000,
    prefix="site",
):
    """Results in the shape of results.json; all numbers invented."""
    names = [f"{prefix}-{place:02}" for place in range(sites)]
    words = [f"made_up_label_{place}" for place in range(labels)]
    held = []
    for place, name in enumerate(names):
        counts = [max(0, (place * 13 + label * 29) % 47 - 20) for label in range(labels)]
        total = sum(counts) if labels else 50 + 37 * place % 90
        far = {"emd": 0.6 + 0.01 * place, "effective_labels": 0.4 * labels or None}
        held.append({"name": name, "examples": total, "label_counts": counts, **far})
    causal = task == "causal-lm"
    return {
        "schema_version": 1,
        "config": {
            "task": task,
            "model": "made-up/tiny-model",
            "data": {"train": "data/made-up-intents.csv"},
            "clients": sites,
            "participation": 1.0,
            "partition": {"name": "dirichlet", "alpha": 0.3},
            "rounds": rounds,
            "seeds": list(seeds),
            "frameworks": list(finals),
            "train": {"batch_size": 16, "learning_rate": 0.0005, "local_epochs": 1},
            "lora": {"rank": 8, "alpha": 16, "targets": ["q_proj", "v_proj"]},
            "fedllm": {"server_optimizer": "average"},
            "kd": {"temperature": 2.0, "distill_epochs": 2},
            "split": {"cut": 2, "variant": "sequential", "labels": "server"},
        },
        "environment": {
            "fedtrio": "0.1.0",
            "python": "3.11.2",
            "torch": "2.6",
            "device": "cpu",
            "threads": 2,
        },
        "warnings": ["12 made-up texts were cut at 64 tokens."],
        "data": {
            "labels": words,
            "train": 1000,
            "test": test,
            "public": 400,
            "truncated": 12,
            "partitions": [{"seed": seed, "sites": held} for seed in seeds],
        },
        "runs": [
            made_up_run(name, seed, names, rounds, final, causal) for name, final in finals.items() for seed in seeds
        ],
    }


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


def test_margin_is_the_binomial_error_of_a_difference_with_one_seed():
    results = made_up(finals={"fedllm": 0.8, "kd": 0.5}, seeds=(1,), test=400)
    a, b = tables.summary(results)
    assert tables.margin(results, a, b) == pytest.approx(2 * math.sqrt((0.8 * 0.2 + 0.5 * 0.5) / 400))


def test_the_reading_names_a_winner_outside_the_spread():
    first = tables.reading(made_up())[0]
    assert first.startswith("FedLLM (82.") and "is ahead" in first


def test_the_next_command_outside_the_spread_is_unlike_sites_or_more_rounds():
    results = made_up()
    assert tables.next_command(results) == 'fedtrio compare … --set "partition.alpha=0.1"'
    results["config"]["partition"]["name"] = "iid"
    assert tables.next_command(results) == 'fedtrio compare … --set "rounds=20"'
    assert "α" not in render(results)


@pytest.mark.parametrize("seeds", [(1,), (0, 1, 2)])
def test_the_reading_names_no_winner_inside_the_spread(seeds):
    close = made_up(finals={"fedllm": 0.81, "kd": 0.805, "split": 0.80}, seeds=seeds, test=400)
    first = tables.reading(close)[0]
    assert "too close to call" in first and "ahead" not in first
    assert f"{'one seed' if len(seeds) == 1 else '3 seeds'} and 400 test texts" in first
    wanted = {1: "seeds=[1,0,2]", 3: "seeds=[0,1,2,3,4]"}[len(seeds)]
    assert wanted in tables.next_command(close)


def test_the_reading_says_who_is_cheap_and_how_the_yardsticks_stand():
    text = " ".join(tables.reading(made_up()))
    assert "KD-FedLLM moves the fewest bytes" in text and "FedLLM moves 40× as much" in text
    assert "Split-FedLLM asks the least compute" in text and "FedLLM asks 3.8× as much" in text
    assert "Against training alone, the floor (58.0 %), all do better." in text
    assert "Against all data in one place, the ceiling (86.0 %), all do worse." in text


def test_perplexity_with_one_seed_is_no_ranking():
    results = made_up(task="causal-lm", labels=0, seeds=(1,))
    assert "no ranking" in tables.reading(results)[0]


def test_lower_perplexity_wins():
    first = tables.reading(made_up(task="causal-lm", labels=0))[0]
    assert first.startswith("FedLLM (9.") and "is ahead" in first


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
    assert len(page.encode()) < 300_000
    assert "http" not in page and "<script" not in page and "@import" not in page and "url(" not in page
    assert not re.search(r"\b(src|href)\s*=\s*[\"'](?!#)", page)
    assert page.count("<svg") == 5 and page.count("<svg") == page.count("</svg>") == page.count('role="img"')


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
    assert "<script" not in page and '"onload="' not in page
    assert "&lt;script&gt;" in page and "and 10 more" in page


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
    assert "KD-FedLLM ended without a finite accuracy." in tables.reading(results)
    assert "NaN" not in render(results) and ">nan" not in render(results)
    assert printed(results, 40)
    empty = made_up() | {"runs": []}
    assert tables.reading(empty) == ["No run has finished yet."] and "No run has finished" in render(empty)
    assert printed(empty, 40) and tables.next_command(empty)


def test_one_round_one_site_one_framework():
    page = render(made_up(labels=1, sites=1, rounds=1, seeds=(1,), finals={"split": 0.5}))
    assert "Split-FedLLM" in page and "Labels go to the server too" in page


def test_a_curve_is_the_mean_of_the_seeds():
    points = charts.series(made_up(rounds=3), "fedllm", "bytes")
    assert [point.round for point in points] == [1, 2, 3]
    assert points[0].x == 16e6 / 8 and points[0].low < points[0].y < points[0].high
    assert charts.series(made_up(), "centralized", "bytes") == []


@pytest.mark.parametrize("low, high", [(0.4, 0.9), (0.801, 0.802), (0, 1)])
def test_ticks_are_few_and_inside(low, high):
    marks = charts.Axis(low, high, 0, 100).ticks()
    assert 2 <= len(marks) <= 7 and all(low - 1e-9 <= mark <= high + 1e-9 for mark in marks)


def test_the_page_needs_no_torch():
    code = "import sys, fedtrio.report.page; assert 'torch' not in sys.modules and 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_refused_answers_and_silent_sites_are_named() -> None:
    results = made_up()
    results["runs"][0]["events"] = [
        {"event": "refused", "round": 2, "site": "site-1", "reason": "site-1 sent <b>NaN</b>"},
        {"event": "lost", "round": 1, "site": "site-0"},
    ]
    page = render(results)
    assert "round 2: site-1 was refused: site-1 sent &lt;b&gt;NaN" in page and "round 1: site-0 fell silent" in page


def test_what_averaging_lost_and_own_models() -> None:
    results = made_up()
    assert tables.asides(results) == []
    for run in results["runs"]:
        if run["framework"] == "fedllm":
            for entry in run["curve"]:
                entry["aggregation_error"] = 0.25 / entry["round"]
            run["adapters"], run["client_accuracy"] = {"a": "x"}, {"mean": 0.8, "min": 0.5, "p10": 0.55, "jain": 0.97}
    error, own = tables.asides(results)
    assert "missed the exact mean of the sites’ updates by 2.5 % of its norm in the last round, by 25.0 %" in error
    assert "accuracy 80.0 % in the mean and 55.0 % at the 10th percentile of sites; Jain’s index 0.970" in own
    assert error in render(results)
