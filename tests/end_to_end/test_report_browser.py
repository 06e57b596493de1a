"""The report in a real headless Chromium: it draws, it answers, it asks for nothing, and nothing hostile runs."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_run import HOSTILE, write_run
from tests.headless_chromium import Chromium, find_chromium
from trace_ds.run.directory import RunDirectory
from trace_ds.stages.report import report

NAME = "wmdp_cyber-qwen1_5_moe_a2_7b"  # as long as a recipe makes it

pytestmark = [
    pytest.mark.slow,
    # CI installs Chromium and must not skip these tests by accident.
    pytest.mark.skipif(
        find_chromium() is None and not os.environ.get("CI"), reason="no Chromium (apt-get install chromium)"
    ),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_run(tmp_path_factory.mktemp("browser") / "run", name=NAME, hostile=HOSTILE)
    return report(RunDirectory.at(path))


@pytest.fixture(scope="module")
def large_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_run(tmp_path_factory.mktemp("large") / "run", layers=48, experts=128, top_k=8)
    return report(RunDirectory.at(path))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    with Chromium() as result:
        yield result


@pytest.fixture
def browser(chromium: Chromium) -> Chromium:
    """One browser for all, as if it had just been opened."""
    chromium.open_nothing()
    return chromium


@pytest.fixture(scope="module")
def telephone() -> Iterator[Chromium]:
    with Chromium(390, 844, phone=True) as result:
        yield result


@pytest.fixture
def phone(telephone: Chromium) -> Chromium:
    telephone.open_nothing()
    return telephone


def rows_of(page: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((page.parent / f"{name}.csv").read_text())))


def choose(browser: Chromium, name: str, value: str, event: str = "change") -> None:
    """Give the control ``name`` a value, as a user would."""
    browser.run(
        f"(() => {{ const s = document.getElementById('{name}'); s.value = '{value}';"
        f"s.dispatchEvent(new Event('{event}')); }})()"
    )


def focus(browser: Chromium, selector: str) -> None:
    browser.run(f"document.querySelector('{selector}').focus()")


def cell_at(browser: Chromium, column: float) -> tuple[float, float]:
    """Where on the screen a place in the first row of the first map (of eight experts) is."""
    browser.show("#chart-routing canvas")
    left, top, width = browser.run(
        "(() => { const b = document.querySelector('#chart-routing canvas').getBoundingClientRect();"
        "return [b.left, b.top, b.width]; })()"
    )
    return left + column * width / 8, top + 12


TIP = "document.getElementById('tip').hidden ? null : document.getElementById('tip').textContent"


def test_it_draws_without_errors_or_requests(browser: Chromium, page: Path) -> None:
    browser.open(page)
    assert browser.messages == []
    assert browser.requests == [page.resolve().as_uri()]
    assert browser.run("window.hacked === undefined")
    assert browser.run("document.querySelectorAll('#chart-routing canvas[tabindex]').length") == 3
    for chart in ("frontier", "curves", "drift"):
        assert browser.run(f"document.querySelectorAll('#chart-{chart} svg path, #chart-{chart} svg rect').length") > 1


def test_the_map_and_the_charts_answer_to_pointer_and_keyboard(browser: Chromium, page: Path) -> None:
    browser.open(page)
    browser.mouse(*cell_at(browser, 3.5))
    text = browser.run(TIP)
    assert text.startswith("Layer 0, expert 3")
    assert f"{int(rows_of(page, 'routing')[3]['forget_count']):,} of " in text
    browser.mouse(2, 2)
    assert browser.run(TIP) is None
    focus(browser, "#chart-routing canvas")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        browser.key(key)
    assert browser.run(TIP).startswith("Layer 1, expert 1")
    browser.key("Escape")
    assert browser.run(TIP) is None
    focus(browser, "#chart-frontier svg")
    browser.key("ArrowRight")
    assert f"{NAME} (TRACE), step 0" in browser.run(TIP)


def test_the_frontier_says_its_axes_steps_and_direction(browser: Chromium, page: Path) -> None:
    browser.open(page)
    chart = "document.querySelector('#chart-frontier svg')"
    texts = lambda css: browser.run(f"[...{chart}.querySelectorAll('{css}')].map((n) => n.textContent)")  # noqa: E731
    assert texts(".axis-y") == ["utility, 0 … 1 (more kept →)"]
    assert texts(".axis-x") == ["forget score, 0 … 1 (← more forgotten)"]
    assert {"60", "80", "100"} <= set(texts(".step"))
    assert browser.run(f"{chart}.querySelectorAll('path.way').length") > 0
    ticks = browser.run(
        f"[...{chart}.querySelectorAll('text:not([class])')].filter((n) => n.getAttribute('text-anchor') === 'middle')"
        ".map((n) => [Number(n.textContent), Number(n.getAttribute('x'))])"
    )
    assert sorted(ticks) == sorted(ticks, key=lambda tick: tick[1]) and len(ticks) > 2  # more to the right


@pytest.mark.parametrize(
    ("place", "word"),
    [("#result", "TRACE"), ("#curves .legend", "gold"), ("#run", "raking"), ("#weights", "tempering λ")],
)
def test_a_term_of_art_is_explained_where_it_stands(browser: Chromium, page: Path, place: str, word: str) -> None:
    browser.open(page)
    link = f"[...document.querySelectorAll('{place} a.word')].find((node) => node.textContent === '{word}')"
    meaning = browser.run(f"document.querySelector({link}.getAttribute('href')).nextElementSibling.textContent")
    assert len(meaning) > 20 and browser.run(f"{link}.title") == meaning


def test_questions_can_be_searched_and_filtered(browser: Chromium, page: Path) -> None:
    browser.open(page)
    rows, count = (
        "document.querySelectorAll('#item-table tbody tr').length",
        "document.getElementById('item-count').textContent",
    )
    assert browser.run(rows) == 12
    assert browser.run("document.querySelector('#item-table').textContent").count(HOSTILE) == 1
    browser.click("#item-more")
    assert browser.run(rows) == 62
    choose(browser, "item-search", "number 80 ", "input")
    assert browser.run(rows) == 1 and browser.run(count) == "1 question"
    choose(browser, "item-search", "", "input")
    choose(browser, "item-task", "near facts", "input")
    browser.click("#item-differ")
    models = ("original", "gold", "unlearned", "uniform", "loss_weighting")
    requested = [row for row in rows_of(page, "items") if row["task"] == "near facts"]
    differing = sum(len({row[f"{model} score"] for model in models}) > 1 for row in requested)
    assert 0 < differing < len(requested)
    assert browser.run(count) == f"{differing} questions" and browser.messages == []


@pytest.mark.parametrize("size", ["small", "large"])
def test_phone_has_no_sideways_scrolling(phone: Chromium, page: Path, large_page: Path, size: str) -> None:
    phone.open({"small": page, "large": large_page}[size])
    assert phone.run("document.documentElement.scrollWidth") <= 390
    assert phone.messages == []


@pytest.mark.parametrize("width", [1280, 390])
def test_no_column_is_cut_off(browser: Chromium, page: Path, width: int) -> None:
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    browser.open(page)
    cut = "[...document.querySelectorAll('.fit')].filter((n) => n.scrollWidth > n.clientWidth).length"
    assert browser.run("document.querySelectorAll('.fit').length") == 3 and browser.run(cut) == 0


@pytest.fixture(scope="module")
def axe() -> str:
    """The source of axe-core, kept in the user's cache; skipped where npm cannot fetch it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "trace_ds_tests"
    archive = cache / "axe-core-4.14.1.tgz"
    if not archive.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", "axe-core@4.14.1"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(command, cwd=cache, check=True, capture_output=True, timeout=120)
    if not archive.is_file():
        pytest.skip("npm cannot fetch axe-core")
    with tarfile.open(archive) as packed:
        source = packed.extractfile("package/axe.min.js")
        assert source is not None
        return source.read().decode()


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_axe_finds_no_serious_fault(page: Path, axe: str, width: int, dark: bool) -> None:
    with Chromium(width, 900, dark=dark, phone=width < 500) as browser:
        browser.open(page)
        red = int(browser.run("getComputedStyle(document.body).backgroundColor").split("(")[1].split(",")[0])
        assert (red < 60) == dark  # the system's theme is followed
        browser.run("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
        browser.run(axe + ";undefined")
        faults = browser.run(
            "axe.run().then((found) => found.violations.filter((v) => ['serious', 'critical'].includes(v.impact))"
            ".map((v) => [v.id, ...v.nodes.slice(0, 3).map((n) => n.html.slice(0, 200))]))"
        )
        assert faults == []


def test_tables_are_there_without_script(page: Path) -> None:
    with Chromium() as browser:
        browser.call("Emulation.setScriptExecutionDisabled", value=True)
        browser.call("Page.navigate", url=page.resolve().as_uri())
        text = ""
        for _ in range(200):
            with contextlib.suppress(AssertionError):  # the document changes while it loads
                root = browser.call("DOM.getDocument")["root"]["nodeId"]
                text = browser.call("DOM.getOuterHTML", nodeId=root)["outerHTML"]
            if "Configuration and versions" in text:
                break
            time.sleep(0.05)
        assert "The charts need the page's own script" in text
        assert "Forget-critical experts" in text and "0.970" in text
