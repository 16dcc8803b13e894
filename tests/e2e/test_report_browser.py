"""The report page in a real browser: its charts are interactive, nothing is fetched, and a phone
shows all of it.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from playwright import sync_api

from canvastune.evaluation.result import EvaluationResult, Slice
from canvastune.report.build import build_report
from canvastune.report.summary import RunArtifacts
from tools.report_sample import (
    sample_config,
    sample_run,
    write_data,
    write_evaluation,
    write_metrics,
)

_CHROMIUM = shutil.which("chromium")
_FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
pytestmark = pytest.mark.skipif(
    _CHROMIUM is None,
    reason="no `chromium` on the PATH to open the page in (Debian: apt install chromium)",
)
_CHARTS = 10
_RIGHT_ENDS = "(elements) => elements.map((element) => element.getBoundingClientRect().right)"
# The most lines that a part of a key is on, between the places at which it may break.
_LINES_OF_WORDS = """(keys) => Math.max(...keys.flatMap((key) => [...key.childNodes]).map((node) => {
    const range = document.createRange();
    range.selectNodeContents(node);
    return node.nodeType === 3 ? range.getClientRects().length : 0;
}))"""
_IMAGE = "(chart) => chart.querySelector('canvas').toDataURL()"


class _Tab:
    """The report in its own tab, with its console messages and requests."""

    def __init__(
        self, browser: sync_api.Browser, report: Path, width: int = 1280, **options: Any
    ) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.address = report.as_uri()
        self.page.goto(self.address)

    def chart(self, name: str) -> sync_api.Locator:
        return self.page.locator(f"[data-chart={name}]")

    def point(self, name: str, share: float) -> tuple[float, float]:
        """Return a point at half of a plot's height, at a share of its width."""
        over = self.chart(name).locator(".u-over")
        over.scroll_into_view_if_needed()
        box = over.bounding_box()
        assert box is not None
        return box["x"] + share * box["width"], box["y"] + box["height"] / 2

    def hover(self, name: str, share: float) -> str:
        self.page.mouse.move(*self.point(name, share))
        tip = self.chart(name).locator(".tip")
        tip.wait_for(state="visible")
        return str(tip.inner_text())

    def step(self, name: str, share: float) -> int:
        return int(self.hover(name, share).splitlines()[0].removeprefix("step "))

    def zoom(self, name: str, start: float, stop: float) -> None:
        self.page.mouse.move(*self.point(name, start))
        self.page.mouse.down()
        self.page.mouse.move(*self.point(name, stop), steps=5)
        self.page.mouse.up()

    def until(self, condition: str, seconds: float = 20) -> None:
        """Wait for a JavaScript condition.

        Playwright's `wait_for_function` evaluates text in the page, which its policy forbids.
        """
        deadline = time.monotonic() + seconds
        while not self.page.evaluate(condition):
            assert time.monotonic() < deadline, f"still false after {seconds} seconds: {condition}"
            time.sleep(0.05)

    def reset_button(self, name: str) -> sync_api.Locator:
        return self.chart(name).get_by_text("Reset zoom")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the report of a run of 300 steps and four others: one has answered the same rows, and
    one has a hostile name.
    """
    root = tmp_path_factory.mktemp("run")
    config = sample_config(parallel={"nproc_per_node": 2}, cluster={"gpu_hour_price": 2.5})
    others = []
    for seed, name in enumerate(("rank8", "rank32", "<b>x", "sft"), 1):
        settings = sample_config(lora={"rank": 8 * seed}, train={"steps": 60})
        others.append(RunArtifacts(name, settings, write_metrics(root / name, seed=seed, steps=60)))
    answered = write_evaluation(root / "rank8" / "evaluation", others[0].config, after=30)
    other_data = write_data(root / "rank8" / "data", others[0].config, first_row=804, response=44)
    others[0] = replace(others[0], evaluation=answered, data=other_data)
    run = sample_run(root, config)
    assert run.evaluation is not None
    counts = (1, 63, 0.5, 0.4, 0.6, 0.9, 0.8, 0.95, 29, 3, 0.001, "better")
    part = Slice("column", "shop: books", 64, counts[1], ("pattern",), *counts[2:])
    replace(EvaluationResult.read(run.evaluation), slices=(part,)).write(run.evaluation)
    return build_report(run, root / "report", others)


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_CHROMIUM, args=list(_FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def tab(browser: sync_api.Browser, report: Path) -> Iterator[_Tab]:
    """Open the page, wide and light; whatever a test does there, it logs no message and fetches
    nothing.
    """
    tab = _Tab(browser, report)
    yield tab
    assert tab.messages == []
    assert tab.requests == [tab.address], "the page is one file"
    tab.page.close()


def test_hovering_reads_every_run_at_a_step(tab: _Tab) -> None:
    lines = tab.hover("total_loss", 0.1).splitlines()
    assert lines[0].startswith("step ")
    assert [line.split(":")[0] for line in lines[1:]] == [
        "tiny_lora",
        "rank8",
        "rank32",
        "<b>x",
        "sft",
    ]
    assert "(single step " in lines[1]
    ended = tab.hover("total_loss", 0.9)
    assert "tiny_lora" in ended
    assert "rank8" not in ended, "a run of 60 steps has no loss there"


def test_the_readout_is_what_was_recorded(tab: _Tab) -> None:
    assert tab.hover("memory", 0.9).splitlines()[1] == "tiny_lora: 1.46"
    assert "t = 0.5: " in tab.hover("validation_loss", 0.5)
    assert tab.hover("validation_loss_by_block", 0.99).splitlines()[0] == "block 6"


def test_dragging_zooms_and_a_double_click_shows_everything(tab: _Tab) -> None:
    assert tab.step("total_loss", 0.01) < 10
    tab.zoom("total_loss", 0.5, 0.75)
    assert tab.reset_button("total_loss").is_enabled()
    assert tab.step("total_loss", 0.02) > 140
    assert tab.step("total_loss", 0.98) < 235
    tab.page.mouse.dblclick(*tab.point("total_loss", 0.5))
    assert tab.reset_button("total_loss").is_disabled()
    assert tab.step("total_loss", 0.01) < 10


def test_losses_open_on_the_scale_that_shows_them(tab: _Tab) -> None:
    on = {
        name: tab.chart(name).get_by_label("Log scale").is_checked()
        for name in ("total_loss", "validation_loss", "learning_rate", "memory")
    }
    assert on == {
        "total_loss": True, "validation_loss": True, "learning_rate": False, "memory": False
    }  # fmt: skip


def test_the_log_scale_is_each_charts_own_and_keeps_the_zoom(tab: _Tab) -> None:
    chart, other = tab.chart("total_loss"), tab.chart("diffusion_loss")
    tab.zoom("total_loss", 0.5, 0.75)
    before, others = chart.evaluate(_IMAGE), other.evaluate(_IMAGE)
    chart.get_by_label("Log scale").uncheck()
    assert chart.evaluate(_IMAGE) != before
    assert other.evaluate(_IMAGE) == others
    assert tab.step("total_loss", 0.02) > 140
    chart.get_by_label("Log scale").check()
    tab.page.mouse.move(0, 0)
    assert chart.evaluate(_IMAGE) == before, "there and back is the same picture"


def test_smoothing_moves_the_strong_line_and_leaves_the_recorded_one(tab: _Tab) -> None:
    slider, output = tab.page.get_by_label("Smoothing"), tab.page.locator("output[for=smoothing]")
    assert output.inner_text() == "20 steps", "by default as in the images"
    before, recorded = (
        tab.chart(name).evaluate(_IMAGE) for name in ("diffusion_loss", "learning_rate")
    )
    slider.focus()
    slider.press("End")
    assert output.inner_text() == "100 steps"
    assert tab.chart("diffusion_loss").evaluate(_IMAGE) != before
    assert tab.chart("learning_rate").evaluate(_IMAGE) == recorded, (
        "what is not noisy is not smoothed"
    )
    assert "(single step " in tab.hover("diffusion_loss", 0.5)
    slider.press("Home")
    assert output.inner_text() == "off"
    assert "(single step " not in tab.hover("diffusion_loss", 0.5)


def test_runs_can_be_switched_off_and_on(tab: _Tab) -> None:
    button = tab.chart("total_loss").get_by_role("button", name="rank32")
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    shown = tab.hover("total_loss", 0.1)
    assert "rank32" not in shown
    assert "rank8" in shown
    button.press("Enter")
    assert "rank32" in tab.hover("total_loss", 0.1)


def test_the_keyboard_reads_and_zooms(tab: _Tab) -> None:
    plot = tab.chart("diffusion_loss").get_by_role(
        "group", name="Diffusion loss. Left and right arrow"
    )
    plot.focus()
    plot.press("ArrowRight")
    plot.press("ArrowRight")
    assert tab.page.locator("#status").inner_text().startswith("step 2, tiny_lora: ")
    plot.press("+")
    assert tab.reset_button("diffusion_loss").is_enabled()
    plot.press("Escape")
    assert tab.reset_button("diffusion_loss").is_disabled()


def test_every_chart_has_its_figures_as_a_table(tab: _Tab) -> None:
    details = tab.page.locator("details.figures")
    assert details.count() == _CHARTS
    details.first.locator("summary").click()
    assert "tiny_lora" in details.first.locator("tbody tr").first.inner_text()


def test_answers_are_filtered_by_outcome_and_by_text(tab: _Tab) -> None:
    rows = tab.page.locator(".answers tbody tr")
    assert sum(row.is_visible() for row in rows.all()) == 12, "the others are folded away at first"
    tab.page.locator("#filter select").select_option("right")
    assert sum(row.is_visible() for row in rows.all()) == 5
    tab.page.get_by_label("containing").fill("APPLES AND gives 5")
    found = [row.inner_text() for row in rows.all() if row.is_visible()]
    shown = re.findall(r"\d+", tab.page.locator("#filter output").inner_text())
    assert shown == [str(len(found)), "64"]
    assert 0 < len(found) < 5
    assert all("gives 5" in text for text in found)
    tab.page.get_by_label("containing").fill("")
    tab.page.locator("#filter select").select_option("all")
    assert sum(row.is_visible() for row in rows.all()) == 12


def test_what_to_do_next_and_where_the_run_is_are_on_the_first_screen(tab: _Tab) -> None:
    section = tab.page.get_by_role("region", name="Next")
    box = section.bounding_box()
    assert box is not None
    assert box["y"] < 900
    assert section.locator("pre").inner_text().startswith("canvastune serve ")
    assert re.search(r"Try it: canvastune ask \S+ \"your question\"", section.inner_text())
    assert re.search(r"Model: /\S+/model\b", section.inner_text())
    assert section.locator("a").first.get_attribute("rel") == "noopener"
    assert section.locator("a").first.get_attribute("target") == "_blank"
    links = {link.inner_text(): link.get_attribute("href") for link in section.locator("a").all()}
    assert list(links) == ["MLflow", "<b>Kubeflow"], "an address that is no page became a link"
    assert links["MLflow"] == (
        "http://127.0.0.1:5000/#/experiments/1/runs/2?workflowType=machine_learning"
    )


def test_the_verdict_and_the_warnings_come_first(tab: _Tab) -> None:
    sentence = tab.page.locator(".verdict .sentence")
    assert re.search(r"9\.4% to 81\.\d% on 64 .* 47 gained, 1 lost", sentence.inner_text())
    warnings = tab.page.get_by_role("region", name="Warnings")
    places = [each.bounding_box() for each in (sentence, warnings, tab.chart("total_loss"))]
    heights = [place["y"] for place in places if place is not None]
    assert heights == sorted(heights)
    assert len(heights) == 3
    assert "could not be read" in warnings.inner_text()


def test_figures_by_part_and_by_level_open_and_close(tab: _Tab) -> None:
    parts, levels = tab.page.locator("#slices"), tab.page.locator("#validation-losses")
    cells = parts.locator("tbody tr").inner_text().split("\t")
    assert [cells[0], cells[2], *cells[5:]] == ["shop: books", "63 of 64", "29", "3", "p = 0.001"]
    parts.locator("summary").click()
    assert not parts.locator("table").is_visible()
    assert not levels.locator("table").is_visible(), "open, though the answers are scored"
    levels.locator("summary").click()
    assert levels.locator("tbody tr").last.inner_text().split("\t") == ["Mean", "5.600", "0.600"]


def test_an_answer_is_found_by_its_row_in_the_data(tab: _Tab) -> None:
    tab.page.get_by_label("containing").fill("problems.jsonl:64")
    (row,) = tab.page.locator(".answers tbody tr:visible").all()
    assert row.locator(".origin").inner_text() == "problems.jsonl:64"
    tab.page.get_by_label("containing").fill("")
    assert not tab.page.locator("#more-answers table").is_visible()
    tab.page.locator("#more-answers summary").click()
    assert tab.page.locator(".answers tbody tr:visible").count() == 64


def test_answers_of_another_run_are_below_those_that_differ(tab: _Tab) -> None:
    tab.page.locator("#filter select").select_option("gained")
    others = tab.page.locator(".answers tbody tr:visible .other")
    assert others.count() == 22, "each that the other run did not gain"
    assert others.first.inner_text().startswith("rank8")
    tab.page.locator("#filter select").select_option("right")
    assert tab.page.locator(".answers tbody tr:visible .other").count() == 0
    table = tab.page.get_by_role("table").filter(has_text="This run, row by row")
    row = table.get_by_role("row").filter(has=tab.page.get_by_role("rowheader", name="rank8"))
    assert re.search(r"22 gained, 0 lost of 64 rows", row.inner_text())
    row = table.get_by_role("row").filter(has_text="rank32")
    assert "not evaluated" in row.inner_text()


def test_the_data_of_other_runs_are_compared(tab: _Tab) -> None:
    verdicts = tab.page.locator("[data-drift]")
    assert verdicts.count() == 4, "not every other run has a verdict"
    found = tab.page.locator("[data-drift=rank8]").inner_text()
    assert re.fullmatch(r"804 of 1,804 rows are new, .*, responses are half as long, .*", found)
    assert tab.page.locator("#data-drift tbody tr").count() == 2


def test_a_wrong_answer_shows_how_it_differs_from_the_reference(tab: _Tab) -> None:
    tab.page.locator("#filter select").select_option("wrong")
    row = tab.page.locator(".answers tbody tr:visible").first
    assert row.locator("[data-label=After] ins").count()
    assert row.locator("[data-label=Reference] del").count()
    tab.page.locator("#filter select").select_option("gained")
    row = tab.page.locator(".answers tbody tr:visible").first
    assert not row.locator("[data-label=After] ins").count(), "what is right needs no mark"


def test_each_step_has_its_time_and_its_hours(tab: _Tab) -> None:
    rows = tab.page.locator("#step-costs tbody tr")
    assert [row.inner_text().split("\t") for row in rows.all()] == [
        ["prepare_data", "12 s", "none", "", ""],
        ["train", "11 min 0 s", "2", "0.367", "0.92"],
        ["evaluate", "1 min 30 s", "1", "0.025", "0.062"],
    ]
    assert "0.98 USD" in tab.page.locator("#price").inner_text()


def numbers(text: str | None) -> list[int]:
    return list(map(int, re.findall(r"\d+", text or "")))


def test_the_trace_shows_one_moment_of_both_sides_and_keeps_finished_blocks(tab: _Tab) -> None:
    trace, slider = tab.page.locator("#trace"), tab.page.get_by_label("Frame")

    def shown(side: str) -> list[list[int]]:
        """Return of each block: its number, their number, the step, and new tokens."""
        notes = trace.get_by_role("group", name=side).locator("li .note")
        return [numbers(note.inner_text()) for note in notes.all() if note.is_visible()]

    opened = slider.get_attribute("aria-valuetext")
    assert numbers(opened) == [1, 47, 5], "it opens where something forms"
    slider.focus()
    slider.press("Home")
    assert shown("Before") == [[1, 1, 0, 16]]
    slider.press("ArrowRight")
    read_aloud = numbers(slider.get_attribute("aria-valuetext"))
    assert read_aloud == [1, 9, 2], "not the block, and the step of each side"
    slider.press("ArrowRight")
    slider.press("ArrowRight")
    assert [note[:3] for note in shown("After")] == [[1, 2, 5]], "it has fewer steps, and waits"
    slider.press("ArrowRight")
    assert [note[:3] for note in shown("After")] == [[1, 2, 5], [2, 2, 0]]
    assert [note[:3] for note in shown("Before")] == [[1, 1, 47]], "its answer was shorter"
    height = trace.bounding_box()
    slider.press("End")
    assert trace.bounding_box() == height, "the page moves while the slider does"
    assert [note[:3] for note in shown("After")] == [[1, 2, 5], [2, 2, 5]]
    assert (
        trace.locator(".shown mark").first.evaluate(
            "(mark) => getComputedStyle(mark).textDecorationLine"
        )
        == "underline"
    )


class _Phone(_Tab):
    """The report on a touch screen; several fingers need the browser's own protocol."""

    def __init__(self, browser: sync_api.Browser, report: Path) -> None:
        super().__init__(browser, report, width=400, has_touch=True, is_mobile=True)
        self._protocol = self.page.context.new_cdp_session(self.page)

    def fingers(self, kind: str, *points: tuple[float, float]) -> None:
        touches = [{"x": x, "y": y, "id": finger} for finger, (x, y) in enumerate(points)]
        self._protocol.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})


def test_fingers_read_pinch_and_reset(browser: sync_api.Browser, report: Path) -> None:
    tab = _Phone(browser, report)
    assert tab.page.locator(".toolbar .only-touch").is_visible()
    tip, reset = tab.chart("total_loss").locator(".tip"), tab.reset_button("total_loss")

    def at(share: float) -> tuple[float, float]:
        return tab.point("total_loss", share)

    tab.fingers("touchStart", at(0.3))
    tab.fingers("touchMove", at(0.5))
    tab.fingers("touchEnd")
    assert 140 < int(tip.inner_text().splitlines()[0].removeprefix("step ")) < 160
    assert not reset.is_visible()
    tab.fingers("touchStart", at(0.4), at(0.6))
    tab.fingers("touchMove", at(0.25), at(0.75))
    tab.fingers("touchMove", at(0.1), at(0.9))
    tab.fingers("touchEnd")
    assert reset.is_visible()
    box = reset.bounding_box()
    assert box is not None
    assert box["height"] >= 40, "a finger needs room"
    tab.page.touchscreen.tap(*at(0.05))
    assert int(tip.inner_text().splitlines()[0].removeprefix("step ")) > 100
    reset.tap()
    assert not reset.is_visible()
    assert (
        tab.chart("total_loss")
        .locator(".live-plot")
        .evaluate("(plot) => getComputedStyle(plot).touchAction")
        == "pan-y"
    ), "a finger that goes up or down would not scroll the page"
    tab.page.touchscreen.tap(*at(0.05))
    assert int(tip.inner_text().splitlines()[0].removeprefix("step ")) < 30
    assert tab.messages == []
    tab.page.close()


def test_hostile_text_is_text_and_a_foreign_request_is_refused(
    browser: sync_api.Browser, report: Path
) -> None:
    tab = _Tab(browser, report)
    assert tab.page.title() == "tiny_lora: Canvastune report", (
        "an answer that holds a script did not run"
    )
    tab.page.evaluate(
        "document.body.append(Object.assign(new Image(), { src: 'http://127.0.0.1:9/' }))"
    )
    tab.until("performance.now() > 0")
    assert any("Content Security Policy" in line for line in tab.messages)
    tab.page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(
    scheme: str, browser: sync_api.Browser, report: Path
) -> None:
    tab = _Tab(browser, report, width=400, color_scheme=scheme)
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 400
    hashes = tab.page.locator(".hash").evaluate_all(_RIGHT_ENDS)
    assert hashes, "no input of a step"
    assert max(hashes) <= 400, "a hash is off the screen"
    assert tab.page.locator(".changed th code").evaluate_all(_LINES_OF_WORDS) == 1, "a key breaks"
    for canvas in tab.page.locator(".live-plot").all():
        box = canvas.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert 280 <= box["width"] <= 400 - box["x"]
    tab.page.set_viewport_size({"width": 1280, "height": 900})
    tab.until("document.querySelector('[data-chart=validation_loss] .uplot').clientWidth > 600")
    assert tab.messages == []
    tab.page.close()


def test_the_charts_follow_the_color_scheme(tab: _Tab) -> None:
    picture = "document.querySelector('[data-chart=total_loss] canvas').toDataURL()"
    tab.page.evaluate(f"window.light = {picture}")
    tab.page.emulate_media(color_scheme="dark")
    tab.until(f"{picture} !== window.light")  # drawn again some frames later


@pytest.mark.parametrize("way", ["scripts are off", "print"])
def test_without_scripts_and_in_print_every_chart_is_an_image(
    way: str, browser: sync_api.Browser, report: Path
) -> None:
    tab = _Tab(browser, report, java_script_enabled=way == "print")
    if way == "print":
        tab.page.emulate_media(media="print")
    tab.page.locator("img.still").first.wait_for(state="visible")
    assert sum(image.is_visible() for image in tab.page.locator("img.still").all()) == _CHARTS
    widths = tab.page.locator("img.still").evaluate_all(
        "(images) => images.map((image) => image.naturalWidth)"
    )
    assert min(widths) > 0, "an image cannot be decoded"
    assert not any(
        control.is_visible()
        for control in tab.page.locator(".live-plot, .controls, .toolbar, .toggles").all()
    )
    assert all(frame.is_visible() for frame in tab.page.locator(".frames li").all())
    tab.page.close()
