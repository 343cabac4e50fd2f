"""How sure the report is, and how long a run takes over a line: numbers made by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from made_up import made_up

from fedtrio.report import link, sites, study, tables, verdict
from fedtrio.report.link import Line
from fedtrio.report.page import render


def student_by_sums(t: float, freedom: int) -> float:
    """P(|T| < t), by the finite sums for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cos, sin = math.cos(angle), math.sin(angle)
    if freedom % 2:
        total, term = 0.0, cos
        for k in range(1, (freedom - 1) // 2 + 1):
            total += term
            term *= cos**2 * 2 * k / (2 * k + 1)
        return 2 / math.pi * (angle + sin * total)
    total, term = 0.0, 1.0
    for k in range(1, freedom // 2 + 1):
        total += term
        term *= cos**2 * (2 * k - 1) / (2 * k)
    return sin * total


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 15, 30, 31, 40, 99, 1000])
def test_student(freedom: int) -> None:
    assert student_by_sums(verdict.student(freedom), freedom) == pytest.approx(0.95, abs=1e-4)


def scored(**scores: list[float | None]) -> tables.Results:
    """Results in which each framework has these scores, seed by seed."""
    results = made_up(finals=dict.fromkeys(scores, 0.5), seeds=range(len(next(iter(scores.values())))), test=0)
    for name, values in scores.items():
        runs = [run for run in results["runs"] if run["framework"] == name]
        for run, value in zip(runs, values, strict=True):
            run["accuracy"] = value
    return results


def pair(results: tables.Results) -> verdict.Difference:
    a, b, *_ = tables.summary(results)
    found = verdict.difference(results, a, b)
    assert found is not None
    return found


def test_a_paired_difference_by_hand() -> None:
    """Differences 0.02, 0.03, 0.04: mean 0.03, s = 0.01, half width 4.303 · 0.01 / √3."""
    found = pair(scored(fedllm=[0.50, 0.70, 0.60], kd=[0.48, 0.67, 0.56]))
    assert (found.gain, found.half) == (pytest.approx(0.03), pytest.approx(4.303 * 0.01 / math.sqrt(3)))
    assert found.separable and found.seeds == 3  # though the scores themselves are 0.1 apart from seed to seed


def test_the_wider_of_seeds_and_test_texts_counts() -> None:
    results = scored(fedllm=[0.80, 0.80], kd=[0.50, 0.50])
    assert pair(results).half == 0.0
    results["data"]["test"] = 400
    a, b = (0.8 * 400 + 1) / 402, (0.5 * 400 + 1) / 402
    assert pair(results).half == pytest.approx(1.96 * math.sqrt((a * (1 - a) + b * (1 - b)) / 402))


def told(run: dict[str, Any], answers: Sequence[bool], sha256: str = "of these texts") -> None:
    """The run as it is where these texts were answered right."""
    digits = np.packbits(answers).tobytes().hex()
    lines = [digits[start : start + 64] for start in range(0, len(digits), 64)]
    run["accuracy"] = sum(answers) / len(answers)
    run["right"] = {"texts": len(answers), "sha256": sha256, "bits": lines}


def answering(*answers: list[Sequence[bool]]) -> tables.Results:
    """Results of FedLLM and KD-FedLLM, each with what it answered right, seed by seed."""
    n, seeds = len(answers[0][0]), len(answers[0])
    results = made_up(finals={"fedllm": 0.5, "kd": 0.5}, seeds=range(seeds), test=n)
    for run, own in zip(results["runs"], itertools.chain(*answers), strict=True):
        told(run, own)
    return results


def table(both: int, only_a: int, only_b: int, neither: int) -> list[list[Sequence[bool]]]:
    """Answers of a and of b, of one seed, from a two by two table."""
    cells = ((1, 1, both), (1, 0, only_a), (0, 1, only_b), (0, 0, neither))
    return [[[bool(cell[side]) for cell in cells for _ in range(cell[2])]] for side in (0, 1)]


def test_matched_pairs_by_hand() -> None:
    """40 texts both, 20 only a, 10 only b, 30 neither. Half a text more in each cell: 20.5 and 10.5 of 102 differ, so
    that the middle is 10/102 and the variance (31 − 100/102) / 102²."""
    found = pair(answering(*table(40, 20, 10, 30)))
    middle, half = 10 / 102, 1.96 * math.sqrt(31 - 100 / 102) / 102
    assert found.half is not None and found.gain == pytest.approx(0.1)
    assert found.gain - found.half == pytest.approx(middle - half)  # the end that decides
    assert found.gain + found.half == pytest.approx(middle + half + 2 * (0.1 - middle))
    assert half == pytest.approx(0.10528, abs=1e-5) and not found.separable


def test_matched_pairs_of_several_seeds_are_the_plain_sum_over_texts() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.random((3, 203)) < share for share in (0.7, 0.6))  # seeds, texts; no whole number of bytes
    differences = (a.astype(float) - b).mean(0)
    padded = np.concatenate([differences, [1.0, -1.0, 0.0]])  # half a text each of the first two, one of the last
    weights = np.array([1.0] * 203 + [0.5, 0.5, 1.0])
    middle = (weights * padded).sum() / 205
    half = 1.96 * math.sqrt((weights * (padded - middle) ** 2).sum() / 205 / 205)
    bits = [[int("".join(str(int(x)) for x in seed), 2) for seed in side] for side in (a, b)]
    assert verdict.matched(*bits, tests=203) - abs(differences.mean() - middle) == pytest.approx(half)
    results = answering(list(a), list(b))
    over_seeds = 4.303 * tables.deviation([*(a.mean(1) - b.mean(1))]) / math.sqrt(3)  # type: ignore[operator]
    assert pair(results).half == pytest.approx(max(over_seeds, verdict.matched(*bits, tests=203)))


def test_the_same_texts_answered_alike_tell_more_than_as_many_of_other_answers() -> None:
    alike, at_odds = answering(*table(1500, 30, 0, 470)), answering(*table(0, 1015, 985, 0))
    old = answering(*table(1500, 30, 0, 470))
    for run in old["runs"]:
        del run["right"]
    gains = [(pair(results).gain, pair(results).half) for results in (alike, old, at_odds)]
    assert {round(gain, 6) for gain, _ in gains} == {0.015}
    (_, near), (_, plain), (_, far) = gains
    assert near is not None and plain is not None and far is not None and near < 0.5 * plain < plain < far
    assert pair(alike).separable and not pair(old).separable  # and 500 digits reach the page whole:
    assert "are not separable" in render(old) and "are not separable" not in render(alike)


def test_equal_answers_make_no_difference() -> None:
    found = pair(answering(*table(250, 0, 0, 150)))
    assert (found.gain, found.separable) == (0.0, False) and found.half == pytest.approx(1.96 / 402)


@pytest.mark.parametrize("other", [None, {"sha256": "of others"}])
def test_without_the_same_texts_the_old_interval_stands(other: dict[str, Any] | None) -> None:
    results = answering(*table(300, 20, 0, 80))
    run = results["runs"][1]
    run["right"] = run["right"] | other if other else None
    a, b = (321 / 402, 301 / 402)
    assert pair(results).half == pytest.approx(1.96 * math.sqrt((a * (1 - a) + b * (1 - b)) / 402))
    assert "text by text" in render(results)


def test_points_of_a_study_with_one_seed_are_compared_text_by_text() -> None:
    runs = answering(*table(300, 20, 0, 80))["runs"]
    points = [{"name": name, "settings": {}, "runs": [run]} for name, run in zip("xy", runs, strict=True)]
    told_of = {"study": "two", "varied": [], "points": points}
    assert study.answer(told_of) == ["FedLLM at x (80.0 %) leads; KD-FedLLM at y is separably behind."]
    runs[1]["right"]["sha256"] = "of others"
    assert "the spread is unknown" in study.answer(told_of)[0]


def test_only_common_seeds_are_paired_and_a_lost_one_makes_no_difference() -> None:
    results = scored(fedllm=[0.5, 0.6, 0.9], kd=[0.4, 0.4, 0.4])
    results["runs"].pop()  # kd, the last seed
    found = pair(results)
    assert found.seeds == 2 and found.gain == pytest.approx(0.15)
    lost = scored(fedllm=[0.5, None], kd=[0.4, 0.4])
    assert verdict.difference(lost, *tables.summary(lost)[:2]) is None


def test_one_seed_and_no_test_set_separate_nothing() -> None:
    results = scored(fedllm=[0.9], kd=[0.1])
    assert pair(results).half is None and not pair(results).separable
    assert "this order is no ranking" in verdict.headline(results)
    assert verdict.next_command(results) == 'fedtrio compare … --set "seeds=[0,1,2]"'
    results["config"]["wire"] = {"sites": ["a", "b"]}
    assert verdict.next_command(results).startswith("fedtrio serve … ")
    assert verdict.next_command({**results, "runs": []}) == "fedtrio resume …"


def test_the_next_seeds_are_the_least_that_are_free() -> None:
    results = scored(fedllm=[0.9], kd=[0.1])
    results["config"]["seeds"] = [10**12]  # not a list of as many
    assert verdict.next_command(results) == f'fedtrio compare … --set "seeds=[{10**12},0,1]"'


def test_intervals_by_hand() -> None:
    results = scored(fedllm=[0.50, 0.60, 0.70])
    low, high = verdict.interval(results, tables.summary(results)[0]) or (0, 0)
    assert (low, high) == (pytest.approx(0.6 - 4.303 * 0.1 / math.sqrt(3)), pytest.approx(0.6 + 4.303 * 0.1 / 3**0.5))
    wilson = scored(fedllm=[1.0])
    wilson["data"]["test"] = 100
    low, high = verdict.interval(wilson, tables.summary(wilson)[0]) or (0, 0)
    assert (low, high) == (pytest.approx(100 / (100 + 1.96**2)), 1.0)  # Wilson's at p = 1


def test_the_same_adapter_is_said_to_be_the_same() -> None:
    results = scored(fedllm=[0.6, 0.7], split=[0.6, 0.7], kd=[0.1, 0.2])
    for run in results["runs"]:
        run["adapter_sha256"] = f"{run['seed']}{run['framework'] == 'kd'}"
    told = verdict.headline(results)
    assert told.startswith(
        "FedLLM and Split-FedLLM end in the same adapter, to the last bit (65.0 %): 50.0 points better"
    )
    results["runs"][0]["adapter_sha256"] = "another"
    assert "end in the same" not in verdict.headline(results)


# Time over a line -----------------------------------------------------------------------------------------------------


def test_a_site_needs_its_work_its_bytes_and_its_round_trips() -> None:
    assert Line(rate=100, trip=20, speed=2).parts((10.0, 25e6, 8)) == (5.0, pytest.approx(2.0), pytest.approx(0.08))


def test_a_run_lasts_as_long_as_the_site_that_needs_most() -> None:
    results = made_up(sites=3, rounds=4, seeds=(0,), finals={"fedllm": 0.8, "split": 0.7})
    (run,) = link.timed(results)["fedllm"]
    heaviest = results["runs"][0]["sites"][-1]  # half of all: shares are 1/6, 2/6, 3/6
    needs = 160 / 2 + 8 * 64e6 / 2 / 100e6 + heaviest["messages"] / 2 * 0.02
    assert run.total(Line()) == pytest.approx(needs + 2.0)
    done = link.series([run])
    assert [number for *_, number in done] == [1, 2, 3, 4] and done[-1][0] == pytest.approx(run.total(Line()))
    assert done[0][0] == pytest.approx(run.total(Line()) / 4)  # rounds are alike here
    assert sum(link.breakdown([run])[:4]) == pytest.approx(link.breakdown([run])[4]) == pytest.approx(run.total(Line()))


def test_sites_in_turn_take_the_sum() -> None:
    results = made_up(sites=3, rounds=4, seeds=(0,), finals={"split": 0.7})
    lasts = {}
    for variant in ("sequential", "sflv1"):
        results["config"]["split"]["variant"] = variant
        lasts[variant] = link.timed(results)["split"][0].total(Line(rate=1e9, trip=0))
    assert (lasts["sequential"], lasts["sflv1"]) == (pytest.approx(162, abs=0.01), pytest.approx(82, abs=0.01))


def test_who_needs_most_depends_on_the_line() -> None:
    results = made_up(sites=2, rounds=1, seeds=(0,), finals={"fedllm": 0.7})
    slow, far = results["runs"][0]["sites"]
    slow |= {"client_seconds": 10.0, "bytes_up": 1e6, "bytes_down": 0}
    far |= {"client_seconds": 1.0, "bytes_up": 1e8, "bytes_down": 0}
    (run,) = link.timed(results)["fedllm"]
    assert run.critical(Line(rate=1000))[0] == 10.0 and run.critical(Line(rate=10))[0] == 1.0


def test_waiting_is_measured_only_between_real_sites() -> None:
    results = made_up(sites=2, rounds=2, seeds=(0, 1), finals={"fedllm": 0.7})
    assert link.waited(results) == [] and sites.measured(results)[1] == []
    results["config"]["wire"] = {"sites": ["site-00", "site-01"]}
    waited = {name: (own, rest) for _, name, own, rest in link.waited(results)}
    assert waited["site-01"] == (pytest.approx(80 * 2 / 3), pytest.approx(120 - 80 * 2 / 3))
    assert sites.measured(results)[1][-1][1:] == ["mean of all", "40 s", "80 s", "66.7 %"]


# Gains ----------------------------------------------------------------------------------------------------------------


def test_gains_are_over_each_sites_own_floor_of_the_same_seed() -> None:
    results = made_up(sites=2, seeds=(0, 1), finals={"fedllm": 0.8, "local": 0.5})
    values = iter([0.8, 0.6, 0.9, 0.7, 0.5, 0.65, 0.7, 0.85])  # fedllm 0, fedllm 1, local 0, local 1
    for run in results["runs"]:
        for site in run["sites"]:
            site["accuracy"] = next(values)
    found = sites.gains(results)
    assert found == {"fedllm": {"site-00": pytest.approx(0.25), "site-01": pytest.approx(-0.10)}}
    assert sites.verdict(found) == "Sites that gain over training alone: 1 of 2 with FedLLM."
    assert sites.table(found) == (["Site", "FedLLM"], [["site-00", "+25.0"], ["site-01", "−10.0"]])
    del results["runs"][2:]
    assert sites.gains(results) == {} and sites.gains_chart({}) == ""
