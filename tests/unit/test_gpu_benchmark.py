"""`python -m benchmarks.gpu`, its parts at a small size on the CPU."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_page, gpu_steps, made_model
from benchmarks.gpu_steps import (
    DEFAULT,
    PLAIN,
    SMALL_LENGTHS,
    Models,
    described_row,
    measured_steps,
)
from benchmarks.profile import LARGEST
from canvastune.model import attention
from canvastune.model import moe as experts

CPU, MEMORY = torch.device("cpu"), 12e9
HEADERS = 200_000  # bytes of a small checkpoint's names


@pytest.fixture(scope="module", autouse=True)
def two_layers() -> Iterator[None]:
    """A sliding one and a full one: the profiler takes longest, and by the number of calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made_model, "SMALL_LAYERS", 2)
        yield


@pytest.fixture(
    scope="module",
    params=[(torch.float32, SMALL_LENGTHS), (torch.bfloat16, SMALL_LENGTHS[:1])],
    ids=["float32", "bfloat16"],
)
def steps(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    dtype, lengths = request.param
    folder = tmp_path_factory.mktemp("steps")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_steps, "SMALL_LENGTHS", lengths)
        if dtype == torch.bfloat16:  # 50 times as slow on a CPU without its instructions
            patch.setitem(made_model._SMALL, "vocabulary", 1024)
        measured = measured_steps(folder, CPU, MEMORY, small=True, dtype=dtype, rounds=1)
    return {"dtype": dtype, "asked": lengths, **measured}


def test_every_length_has_every_figure_of_every_side(steps: dict[str, Any]) -> None:
    assert [row["seq_length"] for row in steps["lengths"]] == list(steps["asked"])
    for row in steps["lengths"]:
        assert {"ours", DEFAULT, *PLAIN} == row["sides"].keys(), "flex is only for a GPU"
        for name, side in row["sides"].items():
            assert side["utilisation"] > 0, name
            # A CPU without bfloat16 instructions multiplies large matrices slower than small ones.
            assert side["utilisation"] < 1 or steps["dtype"] == torch.bfloat16, name
            assert side["memory_bytes"] > 0, name
            assert side["seconds"] * side["tokens_per_second"] == pytest.approx(row["tokens"]), name
        assert "tokens/s" in described_row(row)


def test_our_step_and_the_plain_one_compute_the_same(steps: dict[str, Any]) -> None:
    exact = steps["dtype"] == torch.float32
    for row in steps["lengths"]:
        plain = row["sides"]["chosen block"]["loss"]
        for name, side in row["sides"].items():
            assert side["loss"] == pytest.approx(plain, rel=1e-5 if exact else 1e-2), name
            if name not in PLAIN:
                assert side["gradient_difference"] < (1e-4 if exact else 0.1), name


def test_each_kind_of_attention_call_is_counted_with_its_backend(steps: dict[str, Any]) -> None:
    for row in steps["lengths"]:
        kinds = {tuple(call["query"][-1:]) for call in row["attention"]}
        assert len(kinds) == 2, "sliding and full layers have other head sizes"
        assert all(call["calls"] > 0 and call["backend"] for call in row["attention"])
        assert {call["table"] for call in row["attention"]} == {None}, "the table is of sm_90"
        calls = sum(call["calls"] for call in row["attention"])
        assert sum(row["attention_seen"].values()) == calls, "the profiler sees each"


def test_the_plain_step_is_hugging_faces_own_on_our_weights(tmp_path: Path) -> None:
    models = Models(tmp_path, CPU, MEMORY, torch.float32, small=True)
    for module in models.plain.modules():
        config = getattr(module, "config", None)
        assert getattr(config, "_attn_implementation", None) != attention.NAME, (
            f"{type(module).__name__} attends as ours does"
        )
        assert getattr(config, "_experts_implementation", None) != experts.NAME, (
            f"{type(module).__name__} multiplies as ours does"
        )
    held = {parameter.data_ptr() for parameter in models.ours.parameters()}
    assert {parameter.data_ptr() for parameter in models.plain.parameters()} == held


def test_the_page_has_every_figure_and_says_where_a_part_is_missing(steps: dict[str, Any]) -> None:
    machine = {"device": "a GPU", "commit": "abc1234", "date": "2026-01-02", "torch": "2.13.0"}
    lengths = [*steps["lengths"][1:], {**steps["lengths"][0], "sides": {"all": {"failed": "no"}}}]
    run = {"layers": 2, "tokens_per_second": 9876.0, "step_seconds": 1.0, "utilisation": 0.5}
    run |= {"planned_step_seconds": 2.0, "measured_bytes": 3e9, "planned_bytes": 4e9}
    whole = {"machine": machine, "steps": {**steps, "lengths": lengths}, "runs": {"lora": run}}
    text = gpu_page.gpu_section(whole)
    assert "| lora | 2 | 9,876 | 1.00 | 2.00 | 3.00 | 4.00 | 50% |" in text
    assert "| 128 | all | no |" in text
    del whole["runs"]
    assert "not finished" in gpu_page.gpu_section(whole)


def test_the_five_largest_costs_are_named_with_their_shares(steps: dict[str, Any]) -> None:
    for row in steps["lengths"]:
        costs = row["profile"]["costs"]
        assert len(costs) == LARGEST
        shares = [cost["share"] for cost in costs]
        assert shares == sorted(shares, reverse=True)
        assert 0.3 < sum(shares) < 1
        assert all(cost["name"] and cost["calls"] > 0 for cost in costs)
        assert row["profile"]["busy_seconds"] > 0


def test_a_step_that_does_not_fit_is_said_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 96.00 GiB.\nmore")

    monkeypatch.setattr(gpu_steps, "SMALL_LENGTHS", SMALL_LENGTHS[:1])
    monkeypatch.setattr(gpu_steps, "plain_step", too_large)
    (row,) = measured_steps(tmp_path, CPU, MEMORY, small=True, dtype=torch.float32, rounds=1)[
        "lengths"
    ]
    for name in PLAIN:
        (failed,) = row["sides"][name].values()
        assert "96.00 GiB" in failed
    assert row["sides"]["ours"]["utilisation"] > 0
    assert "gradient_difference" not in row["sides"]["ours"]
    assert "all blocks" in capsys.readouterr().err


def test_what_falls_short_is_named() -> None:
    def result(**changes: Any) -> dict[str, Any]:
        side = {
            "ours": {"utilisation": 0.5, "loss": 12.01, "gradient_difference": 0.01},
            "chosen block": {"loss": 12.0},
            "all blocks": {"failed": "out of memory: 96 GB"},
        } | changes.pop("sides", {})
        call = {"query": (1, 4, 9, 8), "key": (1, 4, 9, 8), "backend": "flash", "table": "flash"}
        call |= {"calls": 3} | changes.pop("call", {})
        seen = changes.pop("seen", {call["backend"]: 3})
        run = {"finite": True, "planned_over_measured": 1.05} | changes
        row = {"seq_length": 512, "sides": side, "attention": [call], "attention_seen": seen}
        return {"steps": {"lengths": [row]}, "runs": {"lora": run}}

    def found(**changes: Any) -> list[str]:
        return list(gpu.shortcomings(result(**changes), goals=True))

    assert found() == []
    for changes, said in (
        ({"finite": False}, r"^lora: .*\bfinite\b"),
        ({"planned_over_measured": 1.3}, r"\bmemory\b.* 1\.30\b"),
        ({"sides": {"ours": {"utilisation": 0.4}}}, r"\b40% "),
        ({"sides": {"ours, flex": {"failed": "InductorError"}}}, r"^S 512: ours, flex "),
        ({"sides": {"ours, flex": {"loss": 11.0}}}, r"^S 512: ours, flex: .*\b11\.0"),
        ({"sides": {"ours, flex": {"loss": math.nan}}}, r"^S 512: ours, flex: .*\bnan\b"),
        ({"sides": {"ours, flex": {"gradient_difference": 0.3}}}, r"^S 512: .*\b3\.0e-01\b"),
        ({"seen": {"flash": 2, "math": 1}}, r"^S 512: .*\bmath\b"),
    ):
        (line,) = found(**changes)
        assert re.search(said, line), line
    assert found(call={"table": None}) == [], "another device than the table's"
    (line,) = found(call={"backend": "efficient"})
    assert "efficient" in line
    assert "flash" in line
    (line,) = found(call={"backend": "math", "table": "math"})
    assert "(1, 4, 9, 8)" in line


def test_the_trainers_steps_stand_beside_their_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "STEPS", 3)
    monkeypatch.setattr(gpu, "WARM_UP", 1)
    kept: list[list[str]] = []
    runs = gpu.trained(
        *(tmp_path, CPU, int(MEMORY)),
        small=True,
        seq_length=128,
        rate=1e13,
        keep=lambda found: kept.append(list(found)),
    )
    assert kept == [["lora"], ["lora", "full"]], "what was measured when the time was up"
    assert runs.keys() == {"lora", "full"}
    for run in runs.values():
        assert run["finite"]
        assert len(run["losses"]) == 3
        assert run["planned_bytes"] > 0
        assert 0 < run["utilisation"] < 1
        assert run["measured_bytes"] > 0
    files = (tmp_path / "lora").glob("**/step-*/*.safetensors")
    written = sum(file.stat().st_size for file in files)
    for saved in runs["lora"]["saves"]:
        assert 0 < saved["copied_seconds"] < saved["written_seconds"]
        assert saved["bytes"] <= written <= saved["bytes"] + HEADERS
