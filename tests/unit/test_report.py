"""The report shows what happened, hides nothing, is self-contained, and shows hostile text as text."""

from __future__ import annotations

import json
import re
from base64 import b64decode
from html import unescape
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import canvastune.report
from canvastune.config import RunConfig
from canvastune.errors import UserError
from canvastune.report.build import build_report
from canvastune.report.charts import (
    build_charts,
    charts_json,
    content_security_policy,
    draw_chart_image,
    smooth,
    thin,
    tick,
)
from canvastune.report.formatting import duration, hours, mark_differences, short
from canvastune.report.summary import Cost, RunArtifacts
from canvastune.tracking import read_metrics
from tools.report_sample import (
    HOSTILE,
    PLAN_NOTE,
    sample_config,
    sample_result,
    sample_run,
    write_data,
    write_evaluation,
    write_metrics,
)

PNGS = {
    "total_loss.png",
    "diffusion_loss.png",
    "autoregressive_loss.png",
    "validation_loss.png",
    "validation_loss_by_block.png",
    "gradient_norm.png",
    "learning_rate.png",
    "throughput.png",
    "memory.png",
    "utilisation.png",
}
MISCALCULATED = 8765  # in the working of an answer whose end is right


class _Page(HTMLParser):
    """Every element with its attributes, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._texts: list[str] = []
        self._hidden = False
        self.feed(html.replace("<wbr>", ""))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._hidden = tag in {"style", "script"}

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self._texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self._texts)).replace(" ,", ",").replace(" .", ".")


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return sample_config(parallel={"nproc_per_node": 2})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, config: RunConfig) -> Path:
    """Write the output of every step, two earlier runs to compare with, and the report in
    `report/`.
    """
    root = tmp_path_factory.mktemp("run")
    rank8 = write_metrics(root / "rank8", seed=3, steps=60, events=False)
    rank32 = write_metrics(root / "rank32", seed=4, steps=60, events=False)
    others = [
        RunArtifacts(
            "<b>rank8", sample_config(lora={"rank": 8}, parallel={"nproc_per_node": 2}), rank8
        ),
        RunArtifacts(
            "tiny_lora",
            config,
            rank32.parent,
            evaluation=write_evaluation(root / "other", config, before=6, after=40),
        ),
    ]
    run = sample_run(root, config)
    answers = root / "evaluation" / "answers.jsonl"
    first, *rest = answers.read_text(encoding="utf-8").splitlines(keepends=True)
    right = json.loads(first)
    right["after"] = right["after"].replace(" = 9 ", f" = {MISCALCULATED} ")
    answers.write_text(json.dumps(right) + "\n" + "".join(rest), encoding="utf-8")
    build_report(run, root / "report", others)
    return root


@pytest.fixture(scope="module")
def page(folder: Path) -> _Page:
    return _Page((folder / "report" / "report.html").read_text(encoding="utf-8"))


def test_the_verdict_is_one_sentence_with_its_uncertainty(page: _Page) -> None:
    sentence = (
        "Exact match rose from 9.4% to 81.2% on 64 held-out rows (95% intervals 4.4% to 19.0% and"
        " 70.0% to 88.9%; row by row 47 gained, 1 lost, p < 0.001), validation loss fell from 5.619"
        " to 0.613 after 300 steps, for 0.0826 CPU-hours and 1.22 M tokens."
    )
    assert sentence in page.text, page.text[:900]


def test_every_chart_is_an_image_on_the_page_and_a_file(folder: Path, page: _Page) -> None:
    pictures = {path.name for path in (folder / "report").glob("*.png")}
    assert pictures == PNGS
    for path in (folder / "report").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG"), f"{path.name} cannot be opened"
    images = [str(attributes["src"]) for tag, attributes in page.elements if tag == "img"]
    assert len(images) == len(PNGS)
    assert all(
        b64decode(image.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
        for image in images
    )
    for title in (
        "Total loss",
        "Diffusion loss",
        "Autoregressive loss",
        "Validation loss by corruption level",
        "Gradient norm",
    ):
        assert title in page.text
    assert {"config.yaml", "provenance.json", "report.html"} <= {
        path.name for path in (folder / "report").iterdir()
    }


def test_the_images_of_the_page_keep_the_color_of_every_line(folder: Path) -> None:
    runs = [
        (name, read_metrics(folder / name / "metrics.jsonl"))
        for name in ("train", "rank8", "rank32")
    ]
    chart = build_charts(runs)[0]
    image = Image.open(
        BytesIO(b64decode(draw_chart_image(chart, []).removeprefix("data:image/png;base64,")))
    )
    found: Any = [color for _, color in image.convert("RGB").getcolors() or []]
    for wanted in ("#1f5fd0", "#b4540a", "#0b7a75"):
        parts = [int(wanted[at : at + 2], 16) for at in (1, 3, 5)]
        nearest = min(
            max(abs(one - other) for one, other in zip(color, parts, strict=True))
            for color in found
        )
        assert nearest <= 4, f"no line of the color {wanted}"


def test_the_page_asks_the_network_for_nothing(page: _Page) -> None:
    for tag, attributes in page.elements:
        assert tag not in {
            "iframe",
            "object",
            "embed",
            "base",
        }, f"<{tag}> can run or fetch something"
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{tag} {name} runs a script"
            followed = tag == "a" and str(value).startswith("http")  # by a reader who clicks
            local = followed or str(value).startswith(("#", "data:"))
            assert name not in {"src", "href", "xlink:href", "srcset"} or local, (
                f"<{tag} {name}={value!r}> leaves the page"
            )
            assert "url(" not in str(value) or "url(#" in str(value), (
                f"<{tag} {name}={value!r}> leaves the page"
            )
    policies = [
        attributes.get("content")
        for _, attributes in page.elements
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policies
    assert "default-src 'none'" in str(policies[0])


def test_the_policy_lets_the_pages_own_script_run_and_no_other(folder: Path) -> None:
    html = (folder / "report" / "report.html").read_text(encoding="utf-8")
    scripts = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    assert len(scripts) == 1
    given = unescape(re.findall(r'Content-Security-Policy" content="([^"]*)"', html)[0])
    assert given == content_security_policy(scripts[0]), (
        "a browser would refuse the script, or run another"
    )
    assert "unsafe" not in given.replace("style-src 'unsafe-inline'", "")
    assert "Permission is hereby granted" in scripts[0], "uPlot's license goes where uPlot goes"


def test_charts_keep_every_peak_and_the_mean_of_each_stretch() -> None:
    steps = 30_000
    records: list[dict[str, Any]] = [
        {"kind": "train", "step": step, "loss": 1.0 + (step % 100 == 0)}
        for step in range(1, steps + 1)
    ]
    records[12_344]["loss"] = 99.0
    text = charts_json(build_charts([("</script>", records)]), [7, 7], steps)
    assert "<" not in text, "a name could end the element that holds the curves"
    content = json.loads(text)
    line = content["charts"][0]["lines"][0]
    assert (content["events"], line["label"]) == ([7], "</script>")
    assert len(line["raw"][0]) <= 2402
    assert max(line["raw"][1]) == 99.0
    assert len(line["means"][0]) == 1200
    assert sum(line["means"][1]) / 1200 == pytest.approx(
        sum(record["loss"] for record in records) / steps, rel=1e-3
    )


def test_hostile_answers_and_names_are_shown_as_text(page: _Page) -> None:
    assert re.sub(r"\s+", " ", HOSTILE) in page.text, "the answer is shown as it was"
    sources = [str(attributes["src"]) for tag, attributes in page.elements if tag == "img"]
    assert all(source.startswith("data:image/png;base64,") for source in sources), (
        "an answer's image is one of the page"
    )
    assert "<b>rank8" in page.text, "the name of a run is the user's text too"


def test_failures_come_first_and_the_lost_before_all(page: _Page) -> None:
    tags = [
        attributes["class"]
        for tag, attributes in page.elements
        if tag == "span" and str(attributes.get("class")).startswith("tag")
    ]
    assert tags == ["tag lost"] + ["tag wrong"] * 11 + ["tag gained"] * 47 + ["tag right"] * 5
    assert re.search(r"\b64\D+47\D+gained\D+1 lost\D+5 right\D+11 wrong", page.text)


def test_differing_words_of_similar_answers_are_marked() -> None:
    before, after = mark_differences("Mia has 9 - 4 = <5> apples.", "Mia has 9 + 4 = <13> apples.")
    assert before == "Mia has 9 <del>-</del> 4 = &lt;<del>5</del>&gt; apples."
    assert after == "Mia has 9 <ins>+</ins> 4 = &lt;<ins>13</ins>&gt; apples."
    assert mark_differences("of of & of", "She has 13 apples left.") == (
        "of of &amp; of",
        "She has 13 apples left.",
    )
    assert mark_differences("", "") == ("", "")


def test_a_right_answer_with_wrong_working_is_marked(folder: Path) -> None:
    html = (folder / "report" / "report.html").read_text(encoding="utf-8")
    (row,) = [row for row in html.split("<tr")[1:] if str(MISCALCULATED) in row]
    assert row.startswith(' data-outcome="right"')
    assert re.findall(r"<(ins|del)>([^<]*)</", row) == [("del", "9"), ("ins", str(MISCALCULATED))]


@pytest.mark.usefixtures("without_images")
def test_the_figures_in_a_charts_corner_have_its_unit(tmp_path: Path, config: RunConfig) -> None:
    values = {"loss": 2.0, "tokens_per_second": 950.0, "tokens": 9, "seconds": 1.0}
    records = [{"kind": "train", "step": step, "time": 0.0, **values} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    html = build_report(RunArtifacts("run", config, tmp_path), tmp_path / "out").read_text()
    charts = re.findall(r'data-chart="(\w+)">.*?class="ends">.*?</span> (.*?)</p>', html, re.DOTALL)
    assert charts == [("total_loss", "2 nats per token"), ("throughput", "950 tokens per second")]


def test_changed_settings_are_shown_next_to_their_defaults(page: _Page) -> None:
    assert re.search(
        r" name \"tiny_lora\" none data\.source \"problems\.jsonl\" none train\.steps 300 \d+ ",
        page.text,
    )
    assert "parallel.nproc_per_node 2 8 Full configuration" in page.text, "a default is listed"


def test_restarts_and_invalid_rows_are_warned_of_at_the_top(folder: Path, page: _Page) -> None:
    top = page.text[: page.text.index("Charts")]
    assert re.search(r"resumed\D+ 147\.", top)
    assert re.search(r"\b2 rows\b", top), "card.json has two bad rows"
    events = read_metrics(folder / "train" / "metrics.jsonl")
    (resumed,) = [record["detail"] for record in events if record.get("event") == "resumed"]
    assert resumed in page.text


def test_planned_values_are_shown_next_to_measured_ones(page: _Page) -> None:
    assert re.search(r"Step time 0\.4 s 0\.4\d s 1\.\d\d", page.text)
    assert re.search(r"Memory per accelerator\b\D+1\.50 GB 1\.46 GB 0\.97", page.text)
    told = page.text.partition("0.97 ")[2]
    assert told.startswith(PLAN_NOTE), "a ratio far from 1 without a word"


def test_config_seed_and_versions_are_shown(page: _Page) -> None:
    assert "max_grad_norm: 1.0" in page.text
    assert re.search(r"prepare_data \S+Z 42", page.text)
    assert "torch 2." in page.text


def test_compared_runs_are_overlaid_and_listed(folder: Path, page: _Page) -> None:
    runs = [
        ("own", read_metrics(folder / "train" / "metrics.jsonl")),
        ("rank32", read_metrics(folder / "rank32" / "metrics.jsonl")),
    ]
    named = re.findall(
        r"(\S+) 60 \d+\.\d+ \d\.\d+ (not evaluated|[\d.]+% [\d.]+% to [\d.]+%)", page.text
    )
    assert named == [
        ("<b>rank8", "not evaluated"),
        ("(2)", "62.5% 50.3% to 73.3%"),
    ], "two runs of one name have the same label"
    assert "Key tiny_lora <b>rank8 tiny_lora (2) lora.rank 16 8 16 " in page.text
    charts = {chart.name: chart for chart in build_charts(runs)}
    assert [line.label for line in charts["total_loss"].lines] == ["own", "rank32"]
    assert charts["total_loss"].recorded[:300] == charts["total_loss"].lines[0].values, (
        "single steps of the run itself"
    )
    assert charts["total_loss"].recorded[300:] == charts["total_loss"].lines[1].shown, (
        "and of no other"
    )
    assert [line.label for line in charts["validation_loss"].lines][-2:] == [
        "own, mean",
        "rank32, mean",
    ]
    assert "tiny_lora (this run) 300" in page.text


def test_what_compared_runs_cost_is_the_end_of_their_rows(
    folder: Path, config: RunConfig, page: _Page
) -> None:
    table = page.text[page.text.index("tiny_lora (this run) 300") :]
    told = re.findall(r"([\d.]+) (CPU-hours)", table)[:3]
    records = [
        read_metrics(folder / name / "metrics.jsonl") for name in ("train", "rank8", "rank32")
    ]
    costs = [Cost.from_records(each, config) for each in records]
    assert told == [(hours(cost.hours), cost.unit) for cost in costs]


def test_the_loss_is_charted_by_block_where_validation_has_it(folder: Path, page: _Page) -> None:
    records = read_metrics(folder / "train" / "metrics.jsonl")
    by_name = {chart.name: chart for chart in build_charts([("own", records), ("other", records)])}
    chart = by_name["validation_loss_by_block"]
    last = [record for record in records if record["kind"] == "validation"][-1]
    assert [line.label for line in chart.lines] == [
        *(f"t = {level}" for level in last["blocks"]),
        "mean",
        "other, mean",
    ]
    assert chart.lines[0].steps == [1, 2, 3, 4, 5, 6], "blocks are not counted from 1"
    assert chart.lines[0].values == last["blocks"]["0.1"]
    of_block = [losses[1] for losses in last["blocks"].values()]
    assert chart.lines[5].values[1] == pytest.approx(sum(of_block) / len(of_block))
    assert re.search(r"t = 0\.1 \S+ block 1 \S+ block 1 \S+ block 6", page.text)
    unscored = {**last, "blocks": {level: [1.0, None, 3.0] for level in last["blocks"]}}
    (gap,) = [c for c in build_charts([("own", [*records, unscored])]) if c.across == "block"]
    assert [line.steps for line in gap.lines[:5]] == [[1, 3]] * 5, "a block without rows is drawn"
    bare = [{key: value for key, value in r.items() if key != "blocks"} for r in records]
    assert all(chart.across == "step" for chart in build_charts([("own", bare)]))


@pytest.mark.usefixtures("without_images")
def test_missing_steps_are_named_and_nothing_is_invented(tmp_path: Path) -> None:
    config = sample_config(train={"method": "full", "steps": 40})
    data = write_data(tmp_path / "data", config)
    metrics = write_metrics(tmp_path / "train", steps=20, events=False)
    page = _Page(
        build_report(
            RunArtifacts("sft", config, metrics.parent, data), tmp_path / "out"
        ).read_text()
    )
    assert "not evaluated;" in page.text
    assert "step 20 of 40." in page.text
    names = [attributes.get("id") for _, attributes in page.elements]
    assert any(names)
    assert "trace" not in names, "no trace was recorded"
    bare = _Page(
        build_report(RunArtifacts("sft", config, metrics.parent), tmp_path / "bare").read_text()
    )
    assert "data card" in bare.text
    assert "Not planned." in page.text
    assert "no adapter " in page.text
    assert "no skipped step" in page.text
    assert "%" not in page.text.split("Charts")[0], "there is no exact match to show"


def test_ten_thousand_steps_and_endless_answers_stay_under_two_megabytes(
    tmp_path: Path, config: RunConfig
) -> None:
    record: dict[str, Any] = {
        "kind": "train",
        "time": 0.0,
        "diffusion_loss": 1.0,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "seconds": 1.0,
        "tokens": 9,
    }
    lines = (
        json.dumps({**record, "step": step, "loss": 1 + (step * 7919 % 101) / 50}) + "\n"
        for step in range(1, 10_001)
    )
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    evaluation = write_evaluation(tmp_path / "evaluation", config, rows=400, before=40, after=200)
    answers = [json.loads(line) for line in (evaluation / "answers.jsonl").read_text().splitlines()]
    endless = "".join(
        json.dumps(
            {**answer, "prompt": "<" * 50_000, "before": "&" * 50_000, "after": '"' * 50_000}
        )
        + "\n"
        for answer in answers
    )
    (evaluation / "answers.jsonl").write_text(endless)
    data = write_data(tmp_path / "data", config)
    report = build_report(
        RunArtifacts("long", config, tmp_path, data, evaluation=evaluation), tmp_path / "out"
    )
    assert report.stat().st_size < 2_000_000
    text = _Page(report.read_text()).text
    assert re.search(r"shown: \d+, answers\.jsonl\b", text)
    assert "more characters]" in text


def test_a_report_never_overwrites_another(folder: Path, config: RunConfig) -> None:
    before = (folder / "report" / "report.html").read_bytes()
    with pytest.raises(UserError, match=re.escape(str(folder / "report"))):
        build_report(RunArtifacts("tiny_lora", config, folder / "train"), folder / "report")
    assert (folder / "report" / "report.html").read_bytes() == before


@pytest.mark.usefixtures("without_images")
def test_invalid_inputs_are_refused_by_name(tmp_path: Path, config: RunConfig) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"kind": "event", "step": 0, "time": 0.0, "event": "checkpoint"}) + "\n"
    )
    metrics = write_metrics(tmp_path / "train", steps=3)
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        build_report(RunArtifacts("none", config, tmp_path), tmp_path / "out")
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        build_report(
            RunArtifacts("one", config, metrics),
            tmp_path / "out",
            [RunArtifacts("none", config, tmp_path)],
        )
    with pytest.raises(UserError, match=r"card\.json"):
        build_report(RunArtifacts("no card", config, metrics, data=tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists(), "a report that failed leaves nothing behind"


@pytest.mark.usefixtures("without_images")
@pytest.mark.parametrize("reused", [None, 0, 5, 64])
def test_base_answers_of_an_earlier_run_are_said(
    config: RunConfig, tmp_path: Path, reused: int | None
) -> None:
    sample_result(base_reused=reused).write(tmp_path)
    metrics = write_metrics(tmp_path / "train", steps=20, events=False)
    run = RunArtifacts("run", config, metrics, evaluation=tmp_path)
    page = _Page(build_report(run, tmp_path / "out").read_text())
    found = [a["data-base-reused"] for _, a in page.elements if "data-base-reused" in a]
    assert found == ([str(reused)] if reused else [])


@pytest.mark.usefixtures("without_images")
def test_no_scored_row_is_no_percentage(config: RunConfig, tmp_path: Path) -> None:
    sample_result(0, 0, 0, 0).write(tmp_path)
    metrics = write_metrics(tmp_path / "train", steps=20, events=False)
    page = _Page(
        build_report(
            RunArtifacts("run", config, metrics, evaluation=tmp_path), tmp_path / "out"
        ).read_text()
    )
    assert "evaluate.answer_pattern" in page.text.split("Charts")[0]
    assert "%" not in page.text.split("Charts")[0]


def test_smoothing_does_not_lag_and_thinning_keeps_every_peak() -> None:
    falling = [float(300 - step) for step in range(300)]
    assert smooth(falling)[100:200] == pytest.approx([value + 0.5 for value in falling[100:200]]), (
        "the average is around its step"
    )
    values = [1.0] * 5000
    values[3333] = 99.0
    steps, thinned = thin(list(range(5000)), values)
    assert len(steps) <= 602
    assert (steps[0], steps[-1], max(thinned)) == (0, 4999, 99.0)


def test_numbers_are_formatted_for_reading() -> None:
    assert [tick(value) for value in (0, 1.5e-4, 0.25, 12_000, 2.5e6)] == [
        "0",
        "1.5e-4",
        "0.25",
        "12k",
        "2.5M",
    ]
    assert [duration(value) for value in (0.25, 41, 192, 7500)] == [
        "0.25 s",
        "41 s",
        "3 min 12 s",
        "2 h 5 min",
    ]
    assert [short(value) for value in (1.5e-5, 0.8123, 1234.5, 1.23e6)] == [
        "1.5e-5",
        "0.812",
        "1,234",
        "1.23 M",
    ]
    assert [hours(value) for value in (0.0071, 0.0826, 12.44)] == ["under 0.01", "0.0826", "12.4"]


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_and_lines_can_be_read_in_light_and_in_dark(mode: str) -> None:
    css = (Path(canvastune.report.__file__).parent / "report.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", css, flags=re.DOTALL)
    colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", blocks[0 if mode == "light" else 1]))
    text = [(ink, back) for ink in ("ink", "soft", "link") for back in ("page", "card")]
    text += [
        ("warn", "warn-back"),
        ("good", "good-back"),
        ("bad", "bad-back"),
        ("soft", "plain-back"),
        ("ink", "mark-back"),
    ]
    for ink, back in text:
        assert _contrast(colors[ink], colors[back]) >= 4.5, f"--{ink} on --{back} in {mode}"
    for line in (name for name in colors if re.fullmatch(r"[sl]\d", name)):
        assert _contrast(colors[line], colors["card"]) >= 3, f"--{line} on --card in {mode}"


def _contrast(one: str, other: str) -> float:
    """Return WCAG's contrast ratio of two colors."""

    def luminance(color: str) -> float:
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
