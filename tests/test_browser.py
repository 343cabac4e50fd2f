"""The pages in a headless Chromium whose network is blocked: `make test-browser`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
from made_up import made_up

from fedtrio.report import link, tables
from fedtrio.report.folders import together
from fedtrio.report.link import Line
from fedtrio.report.page import render
from fedtrio.report.units import seconds_text

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(browser.find() is None, reason=browser.MISSING),
]
EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'`${alert(1)}\u202e</svg></title></style>"


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Browser]:
    with browser.Browser() as one:
        yield one


def written(folder: Path, page: str) -> Path:
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    return path


def hostile() -> tables.Results:
    results = made_up(prefix=EVIL, sites=3, rounds=3)
    results["data"]["labels"] = [EVIL] * 5
    results["config"] |= {"model": EVIL, "note": {EVIL: EVIL}, "wire": {"sites": [EVIL]}}
    results["warnings"] = [EVIL]
    for run in results["runs"]:
        run["events"] = [{"event": "refused", "round": 1, "site": EVIL, "reason": EVIL}]
        for kind in run["kinds"]:
            kind["kind"] = EVIL
    results["runs"] += [{**run, "framework": EVIL} for run in results["runs"] if run["framework"] == "kd"]
    return results


PAGES = {
    "plain": lambda: render(made_up()),
    "hostile": lambda: render(hostile()),
    "thousand": lambda: render(made_up(labels=77, sites=1000, rounds=100)),
    "language": lambda: render(made_up(task="causal-lm", labels=0, sites=30)),
    "one seed, no sites told": lambda: render(made_up(seeds=(0,)) | {"data": {"labels": None, "partitions": []}}),
}


def clean(chromium: browser.Browser) -> None:
    assert chromium.requests() == [] and chromium.complaints() == []


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, True)])
def test_a_page_asks_for_nothing_says_nothing_and_fits(
    chromium: browser.Browser, tmp_path: Path, name: str, width: int, dark: bool
) -> None:
    page = PAGES[name]()
    assert len(page.encode()) < 500_000
    chromium.open(written(tmp_path, page), width=width, dark=dark)
    clean(chromium)
    assert chromium.value("document.documentElement.scrollWidth") <= width  # no scrolling sideways
    wide = "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre, svg, .unseen')"
    assert chromium.value(f"{wide} && e.getBoundingClientRect().right > {width} + .5).map(e => e.outerHTML)") == []
    colour = chromium.value("getComputedStyle(document.body).backgroundColor")
    assert colour == ("rgb(19, 22, 26)" if dark else "rgb(255, 255, 255)")


def test_hostile_names_stay_words(chromium: browser.Browser, tmp_path: Path) -> None:
    chromium.open(written(tmp_path, PAGES["hostile"]()))
    clean(chromium)  # no dialog, no error, no picture asked for
    assert chromium.value("document.querySelectorAll('img, iframe, object, [onerror], [onload]').length") == 0
    assert chromium.value("document.scripts.length") == 2 and not chromium.value("'alert(1)' in window")
    assert "<script>alert(1)" in chromium.value("document.querySelector('h1').textContent + document.body.innerText")
    assert "\u202e" not in chromium.value("document.documentElement.textContent")
    assert chromium.value("document.querySelectorAll('svg').length") == len(
        re.findall(r"<svg", PAGES["hostile"]().split("<body>")[1])
    )


def test_the_policy_stops_what_is_not_ours(chromium: browser.Browser, tmp_path: Path) -> None:
    """The proof that it is on: a script and a picture that got in do nothing."""
    page = render(made_up()).replace("</main>", "<script>window.bad = 1</script><img src='http://x.test/y'></main>")
    chromium.open(written(tmp_path, page))
    assert chromium.value("window.bad") is None and len(chromium.complaints()) == 2


def cells(chromium: browser.Browser) -> dict[str, list[str]]:
    """The table of where the time goes, as it stands."""
    rows = "[...document.querySelectorAll('tr[data-of]')].map(r => [r.dataset.of, [...r.cells].slice(1)"
    return dict(chromium.value(f"{rows}.map(c => c.textContent)])"))


def set_slider(chromium: browser.Browser, name: str, place: int) -> None:
    chromium.value(
        f"{{const s = document.getElementById('{name}'); s.value = {place}; s.dispatchEvent(new Event('input'))}}"
    )


def test_the_slider_recomputes_what_python_computes(chromium: browser.Browser, tmp_path: Path) -> None:
    results = made_up(sites=3, rounds=4)
    chromium.open(written(tmp_path, render(results)))
    runs = link.timed(results)
    for rate, trip, speed in ((6, 4, 3), (0, 8, 0), (15, 0, 9), (3, 2, 5), (9, 4, 3)):
        for name, place in (("rate", rate), ("trip", trip), ("speed", speed)):
            set_slider(chromium, name, place)
        line = Line(link.RATES[rate], link.TRIPS[trip], link.SPEEDS[speed])
        wanted = {name: [seconds_text(part) for part in link.breakdown(of, line)] for name, of in runs.items()}
        assert cells(chromium) == wanted
    clean(chromium)


def test_the_slider_by_hand_and_by_keyboard(chromium: browser.Browser, tmp_path: Path) -> None:
    """KD-FedLLM: 400 s of computing, of which the heaviest of three sites has half, 4 MB of both ways, likewise."""
    chromium.open(written(tmp_path, render(made_up(sites=3))))
    before = cells(chromium)["kd"]
    assert before == ["3.3 min", "0.16 s", "0.30 s", "5 s", "3.4 min"]
    chromium.value("document.getElementById('rate').focus()")
    for _ in range(3):  # 100, 50, 20, 10 Mbit/s
        for kind in ("keyDown", "keyUp"):
            chromium.call(
                "Input.dispatchKeyEvent", type=kind, key="ArrowLeft", code="ArrowLeft", windowsVirtualKeyCode=37
            )
    assert chromium.value("document.getElementById('rate-value').textContent") == "10 Mbit/s"
    assert chromium.value("document.getElementById('rate').getAttribute('aria-valuetext')") == "10 Mbit/s"
    assert cells(chromium)["kd"] == ["3.3 min", "1.60 s", "0.30 s", "5 s", "3.4 min"]
    clean(chromium)


def test_the_chart_and_the_bars_move_with_the_slider(chromium: browser.Browser, tmp_path: Path) -> None:
    chromium.open(written(tmp_path, render(made_up(sites=3))))
    chart = "document.getElementById('quality-seconds-t').parentNode"
    paths = f"[...{chart}.querySelectorAll('.curve')].map(p => p.getAttribute('d'))"
    bars = "[...document.querySelectorAll('g[data-load] .wire')].map(r => Number(r.getAttribute('width')))"
    before, narrow = chromium.value(paths), chromium.value(bars)
    set_slider(chromium, "rate", 9)
    same = chromium.value(paths)
    assert same == before  # Python and the browser draw the same
    set_slider(chromium, "rate", 0)
    assert chromium.value(paths) != before
    assert all(a < b for a, b in zip(narrow, chromium.value(bars), strict=True))
    spans = f"[...{chart}.querySelectorAll('text')].map(t => t.getBBox()).map(b => [b.x, b.x + b.width])"
    assert all(left >= -1 and right < 430 for left, right in chromium.value(spans))
    clean(chromium)


def test_without_scripts_the_first_line_stands(chromium: browser.Browser, tmp_path: Path) -> None:
    path = written(tmp_path, render(made_up()))
    chromium.open(path, script=False)
    chromium.call("Emulation.setScriptExecutionDisabled", value=False)  # ours may look
    assert chromium.value("getComputedStyle(document.getElementById('line')).display") == "none"
    assert "Shown: a line of 100 Mbit/s each way" in chromium.value("document.body.innerText")
    assert len(cells(chromium)["kd"]) == 5


def test_it_prints_in_light_on_few_pages(chromium: browser.Browser, tmp_path: Path) -> None:
    chromium.open(written(tmp_path, render(made_up())), dark=True)
    pdf = chromium.pdf()
    pages = len(re.findall(rb"/Type\s*/Page\b", pdf))
    assert pdf.startswith(b"%PDF") and 2 <= pages <= 12
    scheme = {"name": "prefers-color-scheme", "value": "dark"}
    chromium.call("Emulation.setEmulatedMedia", media="print", features=[scheme])
    assert chromium.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert chromium.value("getComputedStyle(document.querySelector('details')).display") == "none"
    chromium.call("Emulation.setEmulatedMedia", media="")


def test_everything_that_acts_is_reached_by_tab(chromium: browser.Browser, tmp_path: Path) -> None:
    chromium.open(written(tmp_path, render(made_up())))
    acting = "[...document.querySelectorAll('a[href], summary, input, .scroll, pre')].filter(e => e.checkVisibility())"
    number, reached = chromium.value(f"{acting}.length"), []
    for _ in range(number):
        for kind in ("keyDown", "keyUp"):
            chromium.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        reached.append(chromium.value(f"{acting}.indexOf(document.activeElement)"))
        assert chromium.value("getComputedStyle(document.activeElement).outlineWidth") != "0px"  # one sees where one is
    assert number > 15 and reached == list(range(number))


def test_names_for_screen_readers(chromium: browser.Browser, tmp_path: Path) -> None:
    """As the browser computes them: no chart, slider, table or region without a name."""
    chromium.open(written(tmp_path, render(made_up())))
    chromium.call("Accessibility.enable")
    nodes = chromium.call("Accessibility.getFullAXTree")["nodes"]
    named = {"image": 0, "slider": 0, "region": 0}
    for node in nodes:
        role = (node.get("role") or {}).get("value")
        if role in named and not node.get("ignored"):
            assert (node.get("name") or {}).get("value"), node
            named[role] += 1
    assert named["slider"] == 3 and named["image"] >= 11 and named["region"] >= 5


def test_the_page_of_several_runs(chromium: browser.Browser, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(made_up(sites=4)))
    chromium.open(written(tmp_path, together([tmp_path / "a", tmp_path / "b"])), width=360)
    clean(chromium)
    assert chromium.value("document.documentElement.scrollWidth") <= 360
