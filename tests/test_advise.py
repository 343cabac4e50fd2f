"""`fedtrio advise`: the choice is the best of all that fits, limits rule out what breaks them, flips are real."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fedtrio import cli
from fedtrio.config import Config
from fedtrio.errors import ConfigError
from fedtrio.plan import profiles
from fedtrio.plan.advise import answer
from fedtrio.plan.advise_choice import Candidate, barred, flips, loosenings, misses, rank
from fedtrio.plan.advise_grid import applied, options
from fedtrio.plan.advise_limits import KINDS, Costs, Limits
from fedtrio.plan.advise_measured import Measured, gap, levels, load_source
from fedtrio.plan.advise_price import Pricer, Where
from fedtrio.plan.amounts import BYTES, FLOPS, MEMORY, SECONDS
from fedtrio.plan.predict import Assumed, predict
from fedtrio.report.tables import Score

LEFT = {"fedllm": ["adapter"], "kd": ["logits"], "split": ["adapter", "activations", "labels"]}


def candidate(framework: str, order: float, *costs: float, **more: Any) -> Candidate:
    given = {"settings": {"x": order}, "rounded": 0.0, "left": LEFT[framework], "unlike": framework == "kd"}
    given |= {"public": framework == "kd", "reduced": order, "costs": Costs(*costs)}
    return Candidate(framework, **{**given, **more})


def bound(**given: Any) -> Limits:
    return Limits.model_validate(given)


def world(seed: int, number: int = 30) -> list[Candidate]:
    """Candidates with whole, often equal costs."""
    rng = random.Random(seed)
    return [
        candidate(rng.choice([*LEFT]), rng.randint(0, 9), *(float(rng.randint(1, 99)) for _ in KINDS))
        for _ in range(number)
    ]


def brute(candidates: list[Candidate], limits: Limits) -> Candidate | None:
    """The first in order that keeps every limit, with each comparison written out."""
    fitting = [
        c
        for c in candidates
        if (limits.max_up is None or c.costs.bytes_up <= limits.max_up)
        and (limits.max_down is None or c.costs.bytes_down <= limits.max_down)
        and (limits.client_memory is None or c.costs.peak_bytes <= limits.client_memory)
        and (limits.client_flops is None or c.costs.flops <= limits.client_flops)
        and (limits.deadline is None or c.costs.seconds <= limits.deadline)
        and (limits.server_memory is None or c.costs.server_peak_bytes <= limits.server_memory)
        and not (limits.labels_stay and "labels" in c.left)
        and not (limits.activations_stay and "activations" in c.left)
        and not (limits.logits_stay and "logits" in c.left)
        and not (limits.parameters_stay and "adapter" in c.left)
        and not (limits.unlike_models and c.framework != "kd")
        and not (limits.no_public_set and c.framework == "kd")
    ]
    return min(fitting, key=lambda c: c.order) if fitting else None


def some_limits(seed: int) -> Limits:
    rng = random.Random(1000 + seed)
    numbers = {kind.key: float(rng.randint(20, 99)) for kind in KINDS if rng.random() < 0.5}
    flags = {key: True for key in ("labels_stay", "no_public_set", "unlike_models") if rng.random() < 0.15}
    return bound(**numbers, **flags)


@pytest.mark.parametrize("seed", range(12))
def test_the_leader_is_the_best_of_all_that_fits(seed: int) -> None:
    candidates, limits = world(seed), some_limits(seed)
    places, best = rank(candidates, limits), brute(candidates, limits)
    assert (places[0].candidate if places else None) is best
    for place in places:
        assert place.candidate is brute([c for c in candidates if c.framework == place.candidate.framework], limits)
    assert [p.candidate.order for p in places] == sorted(p.candidate.order for p in places)
    out = {one.framework for one in barred(candidates, limits)}
    assert out | {p.candidate.framework for p in places} == {c.framework for c in candidates}
    assert not out & {p.candidate.framework for p in places}


@pytest.mark.parametrize("seed", range(12))
def test_flips_are_the_nearest_and_real(seed: int) -> None:
    """Against a scan over every whole limit, which all costs are."""
    candidates, limits = world(seed), some_limits(seed)
    if (best := brute(candidates, limits)) is None:
        assert flips(candidates, limits) == []
        return
    told = {(flip.key, flip.loosens): flip for flip in flips(candidates, limits)}
    for kind in KINDS:
        limit = getattr(limits, kind.key)

        def leader(value: float, key: str = kind.key) -> str | None:
            found = brute(candidates, limits.model_copy(update={key: value}))
            return found.framework if found else None

        ways = {True: range(int(limit) + 1, 101) if limit else [], False: range(int(limit or 101) - 1, 0, -1)}
        for up, values in ways.items():
            turned = next((v for v in values if leader(v) not in (None, best.framework)), None)
            flip = told.pop((kind.key, up), None)
            assert (flip is None) == (turned is None)
            if flip and turned:
                assert flip.at == (turned if up else turned + 1)
                assert isinstance(flip.to, str) and leader(kind.unit.read(flip.to)) == flip.leader.framework
    for (key, loosens), flip in told.items():
        assert flip.to is (not loosens) and getattr(limits, key) is loosens
        found = brute(candidates, limits.model_copy(update={key: flip.to}))
        assert found is flip.leader and found.framework != best.framework


@pytest.mark.parametrize("seed", range(12))
def test_where_nothing_fits_it_says_what_would_let_something_in(seed: int) -> None:
    candidates = world(seed)
    limits = bound(**{kind.key: 12.0 for kind in KINDS[:2]}, labels_stay=True, client_flops=60)
    if brute(candidates, limits) is not None:
        return
    told = {one.key: one for one in loosenings(candidates, limits)}
    for key, value in limits:
        if not value:
            continue
        lifted = limits.model_copy(update={key: False if value is True else None})
        assert (key in told) == (brute(candidates, lifted) is not None)
        if key in told and (to := told[key].to) is not None:
            unit = next(kind.unit for kind in KINDS if kind.key == key)
            assert brute(candidates, limits.model_copy(update={key: unit.read(to)})) is told[key].leader
            needed = told[key].times * value
            assert brute(candidates, limits.model_copy(update={key: needed * (1 - 1e-9)})) is None


def test_each_constraint_rules_out_what_breaks_it() -> None:
    all_three = [candidate(name, 0, 10, 20, 30, 40, 50, 60) for name in LEFT]
    broken = {
        "labels_stay": ["split"],
        "activations_stay": ["split"],
        "logits_stay": ["kd"],
        "parameters_stay": ["fedllm", "split"],
        "unlike_models": ["fedllm", "split"],
        "no_public_set": ["kd"],
    }
    for key, names in broken.items():
        out = barred(all_three, bound(**{key: True}))
        assert [one.framework for one in out] == names and all(one.by == (key,) for one in out)
    for kind, cost in zip(KINDS, (10, 20, 30, 40, 50, 60), strict=True):
        assert not barred(all_three, bound(**{kind.key: cost}))
        (first, *_) = barred(all_three, bound(**{kind.key: cost / 2}))
        assert first.by == (kind.key,) and first.misses[0].times == 2
    both = barred(
        [candidate("kd", 0, 1, 9, 1, 1, 1, 1), candidate("kd", 0, 9, 1, 1, 1, 1, 1)], bound(max_up=5, max_down=5)
    )
    assert both[0].by == () and len(misses(both[0].nearest, bound(max_up=5, max_down=5))) == 1


# Accuracies ----------------------------------------------------------------------------------------------------------

ACCURACY = Score("accuracy", True)


def scored(framework: str, *values: float | None, tests: int = 10_000, score: Score = ACCURACY) -> Measured:
    return Measured(framework, {}, dict(enumerate(values)), score, tests)


def test_the_gap_is_paired_over_seeds() -> None:
    a, b = scored("fedllm", 0.80, 0.60, 0.70), scored("kd", 0.77, 0.56, 0.68)
    found = gap(a, b)
    spread = (((0.0) ** 2 + 0.01**2 + 0.01**2) / 2) ** 0.5  # of 0.03, 0.04, 0.02
    assert found.by == pytest.approx(0.03) and found.seeds == 3
    assert found.open == pytest.approx(max(4.303 * spread / 3**0.5, 2 * ((0.7 * 0.3 + 0.67 * 0.33) / 10_000) ** 0.5))
    assert found.clear and not gap(a, scored("kd", 0.80, 0.60, 0.70)).clear
    assert not gap(a, scored("kd", 0.9, 0.4, 0.5)).clear  # far apart in the mean, and not in every seed
    other = Measured("kd", {}, {7: 0.1}, ACCURACY, 10_000)
    assert gap(a, other).open is None and not gap(a, other).clear
    perplexity = Score("perplexity", False)
    low, high = scored("fedllm", 20.0, 21.0, score=perplexity), scored("kd", 30.0, 31.2, score=perplexity)
    assert gap(low, high).by == pytest.approx(10.1) and gap(low, high).clear


def test_measured_accuracies_reorder_and_close_ones_are_a_group() -> None:
    cheap = candidate("kd", 0, 1, 1, 1, 1, 1, 1, measured=scored("kd", 0.5))
    dear = candidate("fedllm", 0, 9, 9, 9, 9, 9, 9, measured=scored("fedllm", 0.8))
    dearest = candidate("split", 0, 99, 99, 9, 9, 99, 9, measured=scored("split", 0.805))
    unknown = candidate("fedllm", 1, 0.5, 1, 1, 1, 1, 1)
    places = rank([cheap, unknown, dearest, dear], Limits())
    assert [(p.candidate.framework, p.level) for p in places] == [("fedllm", 0), ("split", 0), ("kd", 1)]
    assert places[0].candidate is dear  # what was measured is before what was not
    tight = rank([cheap, unknown, dearest, dear], bound(max_up=5))
    assert [(p.candidate, p.level) for p in tight] == [(cheap, 0), (unknown, None)]
    plain = [candidate(c.framework, 0, *vars(c.costs).values()) for c in (cheap, dearest, dear)]
    assert [p.candidate.framework for p in rank(plain, Limits())] == ["kd", "fedllm", "split"]


def test_one_that_diverged_is_last() -> None:
    lost, found = scored("kd", 0.9, None), scored("fedllm", 0.2, 0.2)
    assert levels([lost, found]) == [[found], [lost]]


# A tiny model, priced ------------------------------------------------------------------------------------------------

SHAPE = {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 97, "n_positions": 32}
SHAPE |= {"bos_token_id": 0, "eos_token_id": 0}
ASSUMED = Assumed(examples=20, tokens=8, classes=5, public=12)
WHERE = Where("laptop", "dsl", "hospital-server")


def config(**more: Any) -> Config:
    train = {"batch_size": 8, "precision": "fp32"}
    return Config(**{"clients": 2, "rounds": 2, "train": train, "lora": {"r": 4}, **more})  # type: ignore[arg-type]


@cache
def priced() -> tuple[list[tuple[str, dict[str, Any], Costs, set[str], tuple[float, float]]], Pricer]:
    """Every option of the grid by a prediction of its own, round by round, and the pricer that shares predictions."""
    pricer, found = Pricer(config(), ASSUMED, SHAPE), []
    at, over, server = profiles.device(WHERE.device), profiles.link(WHERE.link), profiles.device(WHERE.server)
    for framework in LEFT:
        for option in options(pricer.config, framework, depth=3, classes=5, public=12):
            made = applied(pricer.config, framework, option.settings)
            assert made is not None
            (entry,) = predict(made.model_copy(update={"rounds": 1}), ASSUMED, SHAPE)  # all rounds are alike here
            worst = {key: max(site[key] for site in entry["sites"]) for key in entry["sites"][0] if key != "name"}
            seconds = profiles.timed(entry, at, over, server)["seconds_per_round"]
            spent = worst["bytes_up"], worst["bytes_down"], worst["client_peak_bytes"], worst["client_flops"]
            costs = Costs(*map(float, spent), seconds, float(entry["server_peak_bytes"]))
            left, given_up = set(entry["left_sites"]), (option.reduced, option.rounded)
            found.append((framework, dict(option.settings), costs, left, given_up))
    return found, pricer


def test_shared_predictions_price_each_option_as_its_own_would() -> None:
    alone, pricer = priced()
    shared = [one.at(WHERE) for one in pricer.priced()]
    assert [(c.framework, dict(c.settings), c.costs, set(c.left), (c.reduced, c.rounded)) for c in shared] == alone
    assert pricer.predictions < len(alone) / 2 and pricer.refused == 0


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_all_options_go_with_the_configuration(task: str) -> None:
    base = config(task=task).resolved()
    for framework in LEFT:
        found = list(options(base, framework, depth=3, classes=97, public=12))
        assert len(found) > 40
        for option in found:
            made = applied(base, framework, option.settings)
            assert made is not None and made.resolved().frameworks == [framework]


def told(limits: Limits, where: Where = WHERE) -> dict[str, Any]:
    return answer(priced()[1], limits, where)


def by_hand(limits: Limits) -> dict[str, list[tuple[Any, ...]]]:
    """Of each framework all settings that fit, best first: what is given up, seconds, bytes."""
    found: dict[str, list[tuple[Any, ...]]] = {}
    for framework, settings, costs, left, given_up in priced()[0]:
        most = list(dict(limits).values())[: len(KINDS)]
        if any(bound is not None and now > bound for now, bound in zip(vars(costs).values(), most, strict=True)):
            continue
        if not (limits.labels_stay and "labels" in left) and not (limits.parameters_stay and "adapter" in left):
            found.setdefault(framework, []).append(
                (*given_up, costs.seconds, costs.bytes_up + costs.bytes_down, str(settings))
            )
    return {framework: sorted(rows) for framework, rows in found.items()}


LIMITS = [
    Limits(),
    bound(max_up="9kB", max_down="9kB"),
    bound(max_up="3kB", labels_stay=True),
    bound(client_flops="20MFLOP", labels_stay=True),
    bound(client_memory="200KiB"),
    bound(parameters_stay=True, max_up="100B"),
    bound(server_memory="200KiB"),
    bound(server_memory="20KiB", client_memory="400KiB"),
]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_the_best_settings_are_those_of_brute_force(limits: Limits) -> None:
    advice, right = told(limits), by_hand(limits)
    assert {one["framework"]: str(one["settings"]) for one in advice["ranking"]} == {
        framework: rows[0][-1] for framework, rows in right.items()
    }
    order = sorted(right, key=lambda framework: right[framework][0])
    assert [one["framework"] for one in advice["ranking"]] == order
    assert {one["framework"] for one in advice["ruled_out"]} == LEFT.keys() - right.keys()
    assert (advice["answer"] or {}).get("framework") == (order[0] if order else None)
    for flip in advice["flips"]:
        key, to = flip["constraint"], flip["to"]
        if key in ("device", "link"):
            other = told(limits, Where(**{**vars(WHERE), key: to}))["answer"]
        else:
            moved = Limits.model_validate({**dict(limits), key: to})
            other = told(moved)["answer"]
        assert other["framework"] == flip["leader"]["framework"] != order[0]
        assert other["settings"] == flip["leader"]["settings"]
        if flip["at"]:  # a little before, the answer is the same
            still = flip["at"] * (1 - 1e-9) if flip["loosens"] else flip["at"]
            assert told(Limits.model_validate({**dict(limits), key: still}))["answer"]["framework"] == order[0]


def test_some_of_these_limits_matter() -> None:
    advice = [told(limits) for limits in LIMITS]
    leaders = {one["answer"]["framework"] for one in advice if one["answer"]}
    assert len(leaders) == 3 and sum(len(one["flips"]) for one in advice) > 10
    assert any(one["ruled_out"] for one in advice)
    assert any(one["ranking"][0]["settings"] for one in advice if one["ranking"])


# Finished runs -------------------------------------------------------------------------------------------------------


def finished(folder: Path, accuracies: Mapping[str, list[float]], tests: int = 10_000, **more: Any) -> Path:
    """A run folder as far as advice reads it: configuration, and scores by framework and seed."""
    made = config(seeds=[0, 1, 2], **more).resolved()
    scores = [(name, seed, value) for name, values in accuracies.items() for seed, value in enumerate(values)]
    runs = [{"framework": name, "seed": seed, "accuracy": value} for name, seed, value in scores]
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(made.to_yaml())
    results = {"config": made.model_dump(mode="json"), "data": {"test": tests}, "runs": runs}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def of_runs(folder: Path, limits: Limits = Limits()) -> tuple[dict[str, Any], list[str]]:  # noqa: B008
    chosen, measured, notes = load_source(folder, [])
    return answer(Pricer(chosen, ASSUMED, SHAPE), limits, WHERE, measured), notes


def test_a_finished_comparison_decides_by_its_accuracies(tmp_path: Path) -> None:
    scores = {"fedllm": [0.70, 0.71, 0.72], "kd": [0.81, 0.83, 0.82], "split": [0.70, 0.71, 0.72], "local": [0.3] * 3}
    folder = finished(tmp_path / "runs", scores)
    advice, _ = of_runs(folder)
    assert [(one["framework"], one["level"]) for one in advice["ranking"]] == [("kd", 0), ("fedllm", 1), ("split", 1)]
    fedllm, split = advice["ranking"][1:]
    assert split["score"]["mean"] == pytest.approx(0.71) and split["words"] == "cut 1"  # run at cut 2: the same model
    assert fedllm["reason"].startswith("too close to call with Split-FedLLM (0.0 points apart")
    assert not [note for note in advice["notes"] if "accuracy is unknown" in note]
    tight, _ = of_runs(folder, bound(logits_stay=True, max_up="9kB"))
    assert [one["score"] for one in tight["ranking"]] == [None, None]
    assert any(note.startswith("accuracy is unknown for Split-FedLLM and FedLLM") for note in tight["notes"])
    turned = next(flip for flip in advice["flips"] if flip["constraint"] == "logits_stay")
    assert turned["leader"]["framework"] == "fedllm"


def test_close_accuracies_are_said_to_be_and_cost_decides(tmp_path: Path) -> None:
    scores = {"kd": [0.80, 0.82, 0.84], "fedllm": [0.81, 0.81, 0.81]}
    advice, _ = of_runs(finished(tmp_path / "runs", scores))
    first, second, third = advice["ranking"]
    assert (first["framework"], first["level"], second["framework"], second["level"]) == ("fedllm", 0, "kd", 0)
    assert "too close to call" in first["reason"] and "too close to call" in advice["answer"]["sentence"]
    assert third["framework"] == "split" and third["score"] is None and "unknown" in third["reason"]


def test_a_study_adds_the_settings_that_it_ran(tmp_path: Path) -> None:
    finished(tmp_path / "a", {"fedllm": [0.60, 0.61, 0.60]})
    finished(tmp_path / "b", {"fedllm": [0.80, 0.81, 0.80]}, lora={"r": 16})
    finished(tmp_path / "c", {"fedllm": [0.95, 0.96, 0.95]}, clients=3)
    (tmp_path / "study.json").write_text("{}")
    advice, notes = of_runs(tmp_path)
    assert advice["answer"]["settings"] == {"lora.r": 16} and advice["ranking"][0]["score"]["point"] == "b"
    assert notes == ["what c measured was left out, as it has another clients"]
    within, _ = of_runs(tmp_path, bound(max_up="40kB"))  # rank 16 sends more
    assert within["answer"]["settings"] == {} and within["ranking"][0]["score"]["mean"] == pytest.approx(
        0.6033, abs=1e-3
    )


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run folder and no study"):
        load_source(tmp_path, [])
    finished(tmp_path / "runs", {})
    with pytest.raises(ConfigError, match="holds no finished run"):
        load_source(tmp_path / "runs", [])


# Amounts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "text", "value"),
    [
        (BYTES, "5MB", 5e6),
        (BYTES, "1.5 kb", 1500),
        (BYTES, "12", 12),
        (BYTES, 12, 12),
        (MEMORY, "2GiB", 2 << 30),
        (MEMORY, "2GB", 2e9),
        (FLOPS, "1TFLOP", 1e12),
        (FLOPS, "3e9", 3e9),
        (SECONDS, "10min", 600),
        (SECONDS, "0.5h", 1800),
    ],
)
def test_amounts_are_read_as_they_are_written(unit: Any, text: Any, value: float) -> None:
    assert unit.read(text) == value and unit.read(unit.text(value)) == pytest.approx(value)


@pytest.mark.parametrize("text", ["5 XB", "MB", "", "-1", "0", True, "1e400", "nan", "5MB/s"])
def test_what_is_no_amount_is_said(text: Any) -> None:
    with pytest.raises(ValueError, match=r"as 5MB"):
        BYTES.read(text)


@pytest.mark.parametrize("unit", [BYTES, MEMORY, FLOPS, SECONDS])
def test_amounts_beside_a_value_are_near_and_on_their_side(unit: Any) -> None:
    rng = random.Random(0)
    for value in [1000.0, 999.5, 3_250_000.0, *(10 ** rng.uniform(0.5, 12) for _ in range(300))]:
        assert value <= unit.read(unit.above(value)) <= 1.011 * value
        assert 0.979 * value <= unit.read(unit.below(value)) < value


# The command ---------------------------------------------------------------------------------------------------------

TINY = ["--shape", ",".join(f"{key}={value}" for key, value in SHAPE.items()), "--examples", 20, "--tokens", 8]
TINY += ["--classes", 5, "--public", 12, "--set", "clients=2", "--set", "lora.r=4", "--set", "train.batch_size=8"]
TINY += ["--set", "train.precision=fp32", "--link", "dsl", "--server", "hospital-server"]
Said = Callable[..., tuple[Any, str, str]]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Said:
    """Exit code, standard output and error of `fedtrio advise …`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: object) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedtrio", "advise", *map(str, words)])
        capsys.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return call


def test_the_command_says_what_the_function_finds(said: Said, tmp_path: Path) -> None:
    (tmp_path / "limits.yaml").write_text("max_up: 1kB\nmax_down: 9kB\nlabels_stay: true\n")
    code, out, _ = said(*TINY, "--constraints", "limits.yaml", "--max-up", "9kB", "--json")
    found, right = json.loads(out), told(bound(max_up="9kB", max_down="9kB", labels_stay=True))
    for advice in (found, right):
        del advice["predictions"], advice["notes"]
    assert code == 0 and found == json.loads(json.dumps(right))
    code, out, _ = said(*TINY, "--max-up", "1kB")
    assert code == 0 and out.startswith("KD-FedLLM, as configured: fits without giving up anything")
    assert (
        "Ruled out\n  FedLLM by --max-up 1kB: its nearest settings (rank 1, bf16 up) need 7.35 kB up (7.4× the limit)"
        in out
    )
    assert "with --max-up 28.1kB in place of 1kB: FedLLM, as configured" in out
    assert (
        "accuracy is unknown: no run was named" in out and 'Run it:  fedtrio compare … --set "frameworks=[kd]"' in out
    )


def test_where_nothing_fits_the_code_is_8_and_the_way_out_is_named(said: Said) -> None:
    code, out, _ = said(*TINY, "--client-memory", "200KiB", "--max-up", "1MB")
    assert code == 8 and out.startswith("Nothing fits all constraints.")
    assert "--client-memory 200KiB, kept by the fewest settings, is the tightest" in out
    assert "with --client-memory 332KiB in place of 200KiB: Split-FedLLM, rank 1, cut 1" in out
    code, out, _ = said(*TINY, "--server-memory", "20KiB")
    assert code == 0 and "memory of the server: FedLLM 19.9 KiB" in out
    assert "KD-FedLLM by --server-memory 20KiB" in out and "Split-FedLLM by --server-memory 20KiB" in out
    assert said(*TINY, "--client-memory", "332KiB")[0] == 0 and said(*TINY, "--client-memory", "331KiB")[0] == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-up", "5 pigeons"], "--max-up: '5 pigeons' is no amount of bytes: write it as 5MB"),
        (["--max-up", "-5MB"], "--max-up: bytes must be a number above 0, as 5MB"),
        (["--deadline", "soon"], "--deadline: 'soon' is no amount of time: write it as 10min"),
        (["--constraints", "nowhere.yaml"], "nowhere.yaml: can't be read as constraints: No such file or directory\n"),
        (["--constraints", "maybe.yaml"], "maybe.yaml: labels_stay: 'maybe' is neither true nor false"),
        (["--constraints", "odd.yaml"], "odd.yaml: max_upp is no constraint; did you mean 'max_up'?"),
        ([*TINY, "--link", "5gg"], "link '5gg' is unknown; did you mean '5g'?"),
        ([*TINY, "--set", "frameworks=[local]"], "frameworks names none of fedllm, kd, split"),
        (["nowhere"], "nowhere: No such file or directory"),
        (["."], ". is no run folder and no study"),
    ],
)
def test_faults_are_named(said: Said, tmp_path: Path, words: list[object], message: str) -> None:
    (tmp_path / "odd.yaml").write_text("max_upp: 3\n")
    (tmp_path / "maybe.yaml").write_text("labels_stay: maybe\n")
    code, out, err = said(*words)
    assert code == 2 and message in err and not out.strip()


def test_without_public_texts_there_is_no_distillation(said: Said) -> None:
    code, out, _ = said(*TINY, "--public", 0, "--json")
    advice = json.loads(out)
    assert code == 0 and advice["constraints"] == {"no_public_set": True}
    assert [(one["framework"], one["by"]) for one in advice["ruled_out"]] == [("kd", ["no_public_set"])]
