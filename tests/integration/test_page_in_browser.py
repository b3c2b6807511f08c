"""The page in headless Chromium: nothing on the console, nothing from the network, films that play in step, and a
keyboard that reaches every control; on a desktop and a phone, light and dark."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from planted_run import plant_run

from titan_distill.validation.report.page import write_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
TIMEOUT_MS = 240_000
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
CONTROLS = "button, input, summary, a[href], select, textarea"
LIT = "document.documentElement.dataset.ready === 'true'"
TIMES = "[...document.querySelectorAll('video')].map((film) => film.currentTime)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api").sync_playwright().start()
    chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=TIMEOUT_MS)
    yield chromium
    chromium.close()
    playwright.stop()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of one run, and of two."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [plant_run(folder / name, name=name) for name in ("one", "two")]
    pages = {"one": folder / "one.html", "two": folder / "two.html"}
    write_page(runs[:1], pages["one"], is_running=False)
    write_page(runs, pages["two"], is_running=False)
    return pages


def opened(browser: Any, file: Path, size: str, scheme: str) -> tuple[Any, list[str], list[str]]:
    """Opens a page. Returns it, its console and errors, and the addresses that it asked for."""
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    context.set_default_timeout(TIMEOUT_MS)
    tab, said, asked = context.new_page(), [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(file.as_uri())
    tab.wait_for_function(LIT)
    return tab, said, asked


def check(browser: Any, file: Path, size: str, scheme: str) -> None:
    tab, said, asked = opened(browser, file, size, scheme)
    plays_in_step(tab)
    keyboard_reaches_every_control(tab)
    charts_are_drawn(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
    assert not said
    assert not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]
    tab.context.close()


def plays_in_step(tab: Any) -> None:
    tab.wait_for_function(f"{TIMES}.every((time) => time > 0)")
    tab.click("#play")
    assert tab.evaluate("[...document.querySelectorAll('video')].every((film) => film.paused)")
    tab.focus("#frame")
    tab.keyboard.press("Home")
    for _ in range(3):
        tab.keyboard.press("ArrowRight")
    assert tab.input_value("#frame") == "3"
    tab.wait_for_function("document.getElementById('frame-number').textContent === '4 of 9'")
    times = tab.evaluate(TIMES)
    assert len(times) == 4 and {round(time * 8 - 0.5) for time in times} == {3}


def keyboard_reaches_every_control(tab: Any) -> None:
    visible = f"[...document.querySelectorAll('{CONTROLS}')].filter((control) => control.checkVisibility())"
    tab.evaluate(f"{visible}.forEach((control, index) => (control.dataset.number = index))")
    num_controls, reached, stops = tab.evaluate(f"{visible}.length"), set(), 0
    tab.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    while len(reached) < num_controls and stops < 3 * num_controls + 60:
        tab.keyboard.press("Tab")
        stops += 1
        found = tab.evaluate(
            "[document.activeElement.dataset.number, getComputedStyle(document.activeElement).outlineStyle]"
        )
        if found[0] is not None:
            reached.add(found[0])
            assert found[1] != "none", "focus can be seen"
    assert num_controls > 10 and len(reached) == num_controls


def charts_are_drawn(tab: Any) -> None:
    drawn = tab.evaluate("[...document.querySelectorAll('.chart .plot')].map((plot) => plot.data.length)")
    assert len(drawn) >= 6 and all(drawn)
    tab.fill("#first", "5")
    tab.keyboard.press("Enter")
    ranges = tab.evaluate("[...document.querySelectorAll('.chart .plot')].map((plot) => plot.layout.xaxis.range[0])")
    assert set(ranges) == {5}
    key = ".keys button >> nth=0"
    tab.focus(key)
    tab.keyboard.press("Space")
    assert tab.get_attribute(key, "aria-pressed") == "false"


def test_a_page_in_the_browser(browser: Any, files: dict[str, Path]) -> None:
    check(browser, files["one"], "desktop", "light")


@pytest.mark.nightly
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [*SIZES])
@pytest.mark.parametrize("runs", ["one", "two"])
def test_every_page_in_the_browser(browser: Any, files: dict[str, Path], runs: str, size: str, scheme: str) -> None:
    check(browser, files[runs], size, scheme)
