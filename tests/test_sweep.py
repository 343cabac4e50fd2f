"""Studies: which points there are, what their table says, and that nothing finished is run again."""

from __future__ import annotations

import csv
import html
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from made_up import made_up

from fedtrio import sweep as module
from fedtrio.compare import compare
from fedtrio.errors import ConfigError, DataError
from fedtrio.report import curves, tables, varied
from fedtrio.report.curves import front
from fedtrio.report.folders import together, written_anew
from fedtrio.report.study import columns, csv_text, latex, markdown, render
from fedtrio.sweep import Study, load_study, sweep

SMALL = "data.max_train: 60, data.max_test: 20, data.max_public: 8, rounds: 1, seeds: [0, 1], threads: 1"


def written(folder: Path, text: str) -> Path:
    path = folder / "small.yaml"
    path.write_text(text)
    return path


def test_points_times_grid() -> None:
    study = Study(set={"rounds": 2}, points={"a": {"x": 1}, "b": {}}, grid={"lora.r": [2, 4], "rounds": [3]})
    assert study.all_points() == {
        "a, lora.r=2, rounds=3": {"rounds": 3, "x": 1, "lora.r": 2},
        "a, lora.r=4, rounds=3": {"rounds": 3, "x": 1, "lora.r": 4},
        "b, lora.r=2, rounds=3": {"rounds": 3, "lora.r": 2},
        "b, lora.r=4, rounds=3": {"rounds": 3, "lora.r": 4},
    }
    assert Study().all_points() == {"base": {}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pionts: {}", "pionts is no key of a study; did you mean 'points'? (known: base, set, points, grid)"),
        ("grid: {lora.r: []}", "grid: lora.r must have at least one value"),
        ("grid: {lora.r: 4}", "grid.lora.r: Input should be a valid list"),
        ("grid: {lora.r: [2, 2]}", "each once"),
        ("grid: {lora.rr: [2]}", "point 'lora.rr=2': --set: lora.rr is no setting; did you mean 'r'?"),
        ("points: {bad: {rounds: 0}}", "point 'bad': --set: rounds: "),
        ("base: nowhere.yaml", "nowhere.yaml: No such file"),
        ("points: [", "can't be read as a study"),
    ],
)
def test_a_study_that_cannot_be(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_study(written(tmp_path, text))
    assert said in str(caught.value) and str(caught.value).startswith(str(tmp_path / "small.yaml"))


def test_settings_stand_above_the_file(tmp_path: Path) -> None:
    _, configs = load_study(written(tmp_path, "set: {rounds: 2}\npoints: {a: {lora.r: 4}, b: {}}"), ["rounds=3"])
    assert [(config.rounds, config.lora.r) for config in configs.values()] == [(3, 4), (3, 8)]


def test_points_that_would_share_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two points would share a folder"):
        sweep(written(tmp_path, "points: {a b: {}, a_b: {}}"), tmp_path / "out")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("study")
    text = f"set: {{{SMALL}, frameworks: [fedllm, local]}}\npoints: {{plain: {{}}, int8: {{wire.up: int8}}}}"
    path = written(folder, text)
    return path, folder / "out", sweep(path, folder / "out", jobs=1)


def test_a_study_is_its_comparisons(whole: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    path, out, found = whole
    _, configs = load_study(path)
    alone = compare(configs["int8"], tmp_path, jobs=1)["runs"]
    hashes = lambda runs: [(run["framework"], run["seed"], run["adapter_sha256"]) for run in runs]  # noqa: E731
    assert [point["name"] for point in found["points"]] == ["plain", "int8"] and found["varied"] == ["wire.up"]
    assert hashes(found["points"][1]["runs"]) == hashes(alone) != hashes(found["points"][0]["runs"])
    assert json.loads((out / "study.json").read_text()) == found
    assert (out / "int8" / "report.html").is_file() and (out / "report.html").read_text().count("<svg") == 7


def test_the_pages_of_a_study_can_be_written_anew(whole: tuple[Path, Path, dict[str, Any]]) -> None:
    _, out, _ = whole
    again = written_anew(out)
    assert {str(path.relative_to(out)) for path in again} == {
        "report.html", "table.csv", "table.tex", "plain/report.html", "int8/report.html"
    }  # fmt: skip
    assert all(path.read_text(encoding="utf-8") == text for path, text in again.items())
    page = together([out, out / "plain"])
    assert "out/int8" in page and "out/plain" in page and "wire.up" in page


def test_the_table_says_what_the_runs_say(whole: tuple[Path, Path, dict[str, Any]]) -> None:
    *_, found = whole
    rows = list(csv.DictReader(io.StringIO(csv_text(found))))
    assert [(row["point"], row["framework"]) for row in rows] == [
        (point, name) for point in ("plain", "int8") for name in ("fedllm", "local")
    ]
    for row, point in zip(rows[::2], found["points"], strict=True):
        runs = [run for run in point["runs"] if run["framework"] == "fedllm"]
        sites = len(runs[0]["sites"])
        assert float(row["accuracy"]) == pytest.approx(sum(run["accuracy"] for run in runs) / 2)
        assert float(row["bytes_up"]) == pytest.approx(sum(run["bytes_up"] for run in runs) / 2 / sites)
        assert row["seeds"] == "2" and float(row["server_seconds"]) > 0 and row["wire.up"] in ("", "int8")
    assert (
        float(rows[2]["bytes_up"]) < float(rows[0]["bytes_up"]) / 2 and rows[2]["bytes_down"] == rows[0]["bytes_down"]
    )
    heads, lines = columns(found)
    assert all(len(line) == len(heads) for line in lines)
    assert latex(found).count(r"\\") == 5 and markdown(found).count("\n") == 6


def test_what_is_finished_is_not_run_again(
    whole: tuple[Path, Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out, found = whole
    monkeypatch.setattr(module, "compare", lambda *_, **__: pytest.fail("it was run again"))
    assert sweep(path, out) == found
    (out / "plain" / "results.json").unlink()
    started: list[Path] = []
    monkeypatch.setattr(module, "compare", lambda config, folder, jobs: started.append(folder) or {"runs": []})
    sweep(path, out, jobs=1)
    assert started == [out / "plain"]


def test_a_point_that_fails_is_named_and_stops_no_other(tmp_path: Path) -> None:
    small = SMALL.replace("[0, 1]", "[0], frameworks: [local]")
    path = written(tmp_path, f"set: {{{small}}}\npoints: {{bad: {{data.train: no.csv}}, good: {{}}}}")
    told: list[tuple[str, bool]] = []
    with pytest.raises(DataError, match=r"^point 'bad': .*no\.csv: no such file"):
        sweep(path, tmp_path / "out", 1, lambda name, _, of, came: told.append((name, isinstance(came, DataError))))
    assert told == [("bad", True), ("good", False)]
    (point,) = json.loads((tmp_path / "out" / "study.json").read_text())["points"]
    assert point["name"] == "good" and len(point["runs"]) == 1


def test_names_are_escaped() -> None:
    run = {"framework": "fedllm", "seed": 0, "accuracy": 0.5, "bytes_up": 5, "bytes_down": 5, "client_flops": 9}
    page = render({"study": "<b>", "varied": [], "points": [{"name": "<i>&", "settings": {}, "runs": [run]}]})
    assert "<b>" not in page and "<i>" not in page and "&lt;i&gt;&amp;" in page


# What the varied setting does -----------------------------------------------------------------------------------------


def standing(name: str) -> tuple[varied.Places, list[str]]:
    """Where the points of one of the paper's studies stand, and their names; nothing is run."""
    study, configs = load_study(Path(__file__).parent.parent / "configs" / "paper" / f"{name}.yaml")
    settings = study.all_points()
    points = [{"name": n, "settings": settings[n], "config": configs[n].model_dump(mode="json")} for n in configs]
    return varied.places({"points": points, "varied": module._varied(settings)}), [*configs]


def test_a_number_that_was_varied_is_the_axis() -> None:
    by, names = standing("rank")
    assert (by.joined, by.name, by.words) == (True, "LoRA rank", ["2", "4", "8", "16"])
    assert [by.at[name] for name in names] == [0, 1, 2, 3] and {*by.groups.values()} == {""}


def test_the_other_settings_part_the_points_into_lines() -> None:
    by, names = standing("cut")
    assert [(by.groups[name], by.at[name]) for name in names] == [(v, c) for v in ("sflv1", "sflv2") for c in range(5)]
    by, names = standing("public-set")  # most points leave data.max_public or data.public as the base has it
    assert by.words == ["50", "100", "200", "400"] and [(by.groups[name], by.at[name]) for name in names] == [
        ("in-domain", 0), ("in-domain", 1), ("in-domain", 2), ("in-domain", 3),
        ("off-domain", 2), ("off-domain", 3), ("mixed", 2),
    ]  # fmt: skip


def test_points_that_differ_in_no_number_stand_by_name() -> None:
    by, names = standing("heterogeneity")
    assert not by.joined and by.words == names == ["Dirichlet 0.1", "Dirichlet 0.5", "IID"] and not by.aslant


def ranked(*scores: tuple[float, float]) -> dict[str, Any]:
    """A study of ranks 8, 2 and 4, with two seeds each."""
    points = []
    for rank, pair in zip((8, 2, 4), scores, strict=True):
        runs = made_up(finals={"fedllm": 0.5, "local": 0.4}, seeds=(0, 1))["runs"]
        for run in runs:
            run["accuracy"] = pair[run["seed"]] if run["framework"] == "fedllm" else 0.25
        points.append({"name": f"lora.r={rank}", "settings": {"lora.r": rank}, "runs": runs})
    return {"study": "ranks", "varied": ["lora.r"], "points": points}


def test_charts_show_means_and_ranges_in_the_order_of_the_axis() -> None:
    quality, *costs = varied.charts(ranked((0.75, 0.85), (0.5, 0.6), (0.6, 0.7)))
    said = re.findall("<title>(.*?)</title>", "".join(quality.body))
    assert said == [f"FedLLM: {y} % at {x}" for x, y in ((2, "55.0"), (4, "65.0"), (8, "80.0"))] + [
        f"Local: 25.0 % at {x}" for x in (2, 4, 8)
    ]
    band = re.search('class="band" d="M(.*?)z"', "".join(quality.body))
    assert band is not None
    heights = [float(spot.split()[1]) for spot in band[1].split("L")]
    axis = curves.y_axis_of(tables.Score("accuracy", True), [0.25, 0.85])
    assert heights == pytest.approx([axis.at(y) for y in (0.6, 0.7, 0.85, 0.75, 0.6, 0.5)], abs=0.06)
    assert [chart.key for chart in costs] == ["bytes", "flops", "memory"]
    assert "Local" not in "".join(line for chart in costs for line in chart.body)  # it sends nothing
    alone = ranked((0.7, 0.8), (0.5, 0.6), (0.6, 0.7))
    del alone["points"][1:]
    assert varied.charts(alone) == [] and varied.figure(alone) == ""


def test_endless_and_hostile_names_stay_inside(tmp_path: Path) -> None:
    study = ranked((0.7, 0.8), (0.5, 0.6), (0.6, 0.7))
    for number, point in enumerate(study["points"]):
        point |= {"name": f"</svg><script>{'long & ' * 40}{number}", "settings": {"lora.r": "as <b>"}}
    drawing = varied.figure(study)
    ElementTree.fromstring(drawing)
    assert "<script" not in drawing and "<b>" not in drawing and "rotate(60" in drawing
    said = re.findall(r"rotate\(60[^>]*>(.*?)</text>", drawing)[:3]
    assert all(len(html.unescape(words)) == varied.LETTERS and words[-1] == str(n) for n, words in enumerate(said))


def test_the_figure_of_a_studys_folder(whole: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    *_, found = whole
    (tmp_path / "study.json").write_text(json.dumps(found), encoding="utf-8")
    tool = [sys.executable, Path(__file__).parent.parent / "tools" / "figures.py"]
    subprocess.run([*tool, tmp_path, tmp_path / "figures"], check=True, timeout=120)
    (drawing,) = (tmp_path / "figures").iterdir()
    assert drawing.name == "small.svg" and ElementTree.parse(drawing).getroot().tag.endswith("svg")
    shown = drawing.read_text(encoding="utf-8")
    for row in csv.DictReader(io.StringIO(csv_text(found))):
        name = tables.TITLES[row["framework"]]
        assert f"<title>{name}: {100 * float(row['accuracy']):.1f} % at {row['point']}</title>" in shown
    refused = subprocess.run([*tool, tmp_path / "figures", tmp_path], capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2 and "results.json can't be read" in refused.stderr


def test_the_front() -> None:
    spots = [(1.0, 0.3), (2.0, 0.2), (2.0, 0.5), (4.0, 0.5), (8.0, 0.9)]
    assert front(spots, True) == [(1.0, 0.3), (2.0, 0.5), (8.0, 0.9)]
    assert front(spots, False) == [(1.0, 0.3), (2.0, 0.2)]
