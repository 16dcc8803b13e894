"""Write the outputs of a sample run: a noisy training of 300 steps with a falling loss."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np

from canvastune.config import RunConfig, parse_config
from canvastune.data.data_profile import DataProfile
from canvastune.evaluation.result import EvaluationResult, ModelFigures
from canvastune.evaluation.scoring import mcnemar, paired_test, wilson
from canvastune.io.provenance import write_provenance
from canvastune.report.summary import RunArtifacts

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
_NOISE = (" the", "7", " of", "<eos>", " apples", "</", "<b>", "ing", " left", "=")
PLAN_NOTE = "On CPU, the estimated time is a lower bound."
HOSTILE = '<script>document.title = "taken"</script><img src=x onerror="alert(1)">'


def sample_config(**sections: Any) -> RunConfig:
    """Return the recipe of the sample run; `sections` replace its own."""
    recipe = {"name": "tiny_lora", "data": {"source": "problems.jsonl"}, "train": {"steps": 300}}
    return parse_config({**recipe, **sections})


def sample_result(
    rows: int = 64, before: int = 6, after: int = 52, lost: int = 1, **fields: Any
) -> EvaluationResult:
    """Return the result of an evaluation; `before` and `after` are numbers of correct rows.

    Without typography one more row of each model is right. With no rows, none was scored.
    """

    def model(correct: int, loss: float, speed: float, per_forward: float) -> ModelFigures:
        return ModelFigures(
            **_exact_match(correct, rows, ""),
            **_exact_match(correct + 1, rows, "_normalized"),
            tokens=1500,
            seconds=1500 / speed,
            tokens_per_second=speed,
            tokens_per_forward=per_forward,
            cut=0,
            validation_loss=loss,
            validation_loss_by_level={str(level): loss * (0.5 + level) for level in LEVELS},
            **_score(correct, rows),
        )

    gained = after - before + lost
    values: dict[str, Any] = {
        "rows": rows or 64,
        "scored": rows,
        "before": model(before, 5.6, 611.2, 2.11),
        "after": model(after, 0.6, 842.7, 3.87),
        "gained": gained if rows else None,
        "lost": lost if rows else None,
        "p_value": mcnemar(gained, lost) if rows else None,
        "verdict": paired_test([1] * gained + [-1] * lost)[1] if rows else None,
        "gained_normalized": gained if rows else None,
        "lost_normalized": lost if rows else None,
        "validation_rows": 64,
        "answer_pattern": r"#### (\S+)",
        "asked": "a1" * 32,
        "batch_size": 16,
        "max_new_tokens": 256,
        "max_denoising_steps": 48,
        "seed": 42,
        "device": "cpu",
        "base_reused": 0,
        "sampler": {"steps": 48, "entropy_bound": 0.1},
    }
    return EvaluationResult(**values | fields)


def _exact_match(correct: int, rows: int, kind: str) -> dict[str, Any]:
    low, high = wilson(correct / rows, rows) if rows else (None, None)
    return {
        f"correct{kind}": correct if rows else None,
        f"exact_match{kind}": correct / rows if rows else None,
        f"exact_match{kind}_low": low,
        f"exact_match{kind}_high": high,
    }


def _score(correct: int, rows: int) -> dict[str, Any]:
    exact = _exact_match(correct, rows, "")
    ends = ("", "_low", "_high")
    by_seed = (correct / rows,) if rows else ()
    return {f"score{end}": exact[f"exact_match{end}"] for end in ends} | {"score_by_seed": by_seed}


def write_metrics(
    folder: Path, *, seed: int = 0, steps: int = 300, floor: float = 0.55, events: bool = True
) -> Path:
    """Write metrics.jsonl as the trainer does; return its path."""
    draw = random.Random(seed)
    records: list[dict[str, Any]] = []
    now = 1_795_500_000.0

    def validate(step: int) -> None:
        decay = math.exp(-step / (steps / 4))
        levels = {
            str(t): floor * (0.3 + 1.3 * t) + 6.0 * decay * (0.6 + 0.5 * t) + draw.gauss(0, 0.01)
            for t in LEVELS
        }
        mean = sum(levels.values()) / len(levels)
        validation = {
            "loss": mean,
            "levels": levels,
            "blocks": {
                str(t): [levels[str(t)] * (0.8 + 0.08 * block) for block in range(6)]
                for t in LEVELS
            },
            "autoregressive_loss": 0.9 + 6.5 * decay,
            "seconds": 1.1,
        }
        records.append({"kind": "validation", "step": step, "time": now, **validation})

    def log_event(step: int, event: str, detail: str, **more: Any) -> None:
        records.append(
            {"kind": "event", "step": step, "time": now, "event": event, "detail": detail, **more}
        )

    devices = {"ranks": 2, "device": "cpu", "threads": 1}
    log_event(0, "started", "on 2 x CPU, threads of each: 1", **devices)
    validate(0)
    for step in range(1, steps + 1):
        seconds = 0.42 + abs(draw.gauss(0, 0.03)) + (0.5 if step in (1, 148) else 0)
        now += seconds
        decay = math.exp(-step / (steps / 4))
        level = draw.random()
        diffusion = max(
            0.05,
            floor * (0.3 + 1.3 * level) + 6.0 * decay * (0.6 + 0.5 * level) + draw.gauss(0, 0.15),
        )
        autoregressive = 0.9 + 6.5 * decay + draw.gauss(0, 0.05)
        warm = min(1.0, step / 25)
        train = {
            "loss": diffusion + autoregressive,
            "diffusion_loss": diffusion,
            "autoregressive_loss": autoregressive,
            "grad_norm": (0.3 + 5 * decay) * math.exp(draw.gauss(0, 0.3)),
            "lr": warm * (1.5e-5 + 1.35e-4 * 0.5 * (1 + math.cos(math.pi * step / steps))),
            "seconds": seconds,
            "tokens": (tokens := draw.randint(3800, 4300)),
            "tokens_per_second": tokens / seconds,
            "tflops": 3.1e-6 * tokens / seconds,
            "memory_bytes": int(1.42e9 + 4e7 * min(1.0, step / 20)),
        }
        records.append({"kind": "train", "step": step, "time": now, **train})
        if step % 25 == 0 or step == steps:
            validate(step)
        if step % 50 == 0:
            log_event(step, "checkpoint", "")
        if events and step == 147:
            now += 95
            log_event(
                step,
                "resumed",
                "from the checkpoint of step 147, after the node was lost",
                **devices,
            )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_data(folder: Path, config: RunConfig, *, first_row: int = 0, response: int = 22) -> Path:
    """Write card and profile of a prepared dataset of 1,804 rows; return its folder.

    Args:
        first_row: number of the first row, for data that share only some rows.
        response: median length of the responses, and the token that most of them consist of.
    """
    folder.mkdir(parents=True)
    rows = np.arange(first_row, first_row + 1804, dtype=np.uint64)
    counts = np.bincount([7] * 1000 + [response] * 2000)
    DataProfile(rows[64:], rows[:64], prompt=np.ones(512, np.int64), response=counts).write(folder)
    spread = {"min": 21, "mean": 48.2, "median": 47, "p95": 71, "max": 96, "sum": 87_000}
    card = {
        "source": "problems.jsonl",
        "format": "gsm8k",
        "fingerprint": "5f" * 32,
        "content_hash": f"{first_row:032x}{response:032x}",
        "rows_read": 1840,
        "kept": 1804,
        "train": 1740,
        "validation": 64,
        "dropped": {"bad row": 2, "duplicate of an earlier row": 34},
        "bad": 2,
        "bad_rows": [
            {"file": "problems.jsonl", "row": 17, "reason": "the answer is empty"},
            {"file": "problems.jsonl", "row": 903, "reason": "not JSON: Expecting ',' delimiter"},
        ],
        "cut": 3,
        "seq_length": 128,
        "canvas_length": 16,
        "tokenizer": "GemmaTokenizer",
        "vocab_size": 512,
        "prefix_tokens": spread,
        "response_tokens": spread | {"median": response, "p95": response + 9, "max": response + 18},
        "seconds": 1.4,
    }
    (folder / "card.json").write_text(json.dumps(card), encoding="utf-8")
    write_provenance(folder, "prepare_data", config, {})
    return folder


def write_evaluation(
    folder: Path,
    config: RunConfig,
    *,
    rows: int = 64,
    before: int = 6,
    after: int = 52,
    lost: int = 1,
    scored: bool = True,
    answer_pattern: str | None = r"#### (\S+)",
) -> Path:
    """Write the answers of both models, some of them hostile; return the folder.

    Args:
        scored: False: the answers have no exact match.
    """
    folder.mkdir(parents=True)
    answers: list[dict[str, Any]] = []
    for row in range(rows):
        apples, given = 12 + row, 3 + row % 7
        right_after = row < after
        right_before = row < before - lost or after <= row < after + lost
        truth = f"She has {apples} - {given} = {apples - given} apples left.\n#### {apples - given}"
        judged = {
            "correct_before": right_before,
            "correct_after": right_after,
            "correct_normalized_before": right_before,
            "correct_normalized_after": right_after,
            "judge": "pattern",
            "score_before": float(right_before),
            "score_after": float(right_after),
        }
        wrong = f"She has {apples} + {given} = {apples + given} apples.\n#### {apples + given}"
        answers.append(
            {
                "id": f"{row:016x}",
                "prompt": f"Mia has {apples} apples and gives {given} of them to her neighbor. "
                "How many apples does she have left?",
                "reference": truth,
                "before": truth
                if right_before
                else (
                    HOSTILE if row % 9 == 8 else "#### 4 4 4 the apples apples " + "of " * (row % 5)
                ),
                "after": truth if right_after else wrong,
                "source": "problems.jsonl",
                "origin": f"problems.jsonl:{row + 1}",
                "reference_tokens": 24,
                **(judged if scored else dict.fromkeys(judged)),
            }
        )
    counts = (rows, before, after, lost) if scored else (0, 0, 0, 0)
    sample_result(*counts, answer_pattern=answer_pattern).write(folder)
    (folder / "answers.jsonl").write_text(
        "".join(json.dumps(answer) + "\n" for answer in answers), encoding="utf-8"
    )
    traced = answers[rows // 3]
    film = {key: traced[key] for key in ("id", "prompt", "reference")}
    film |= {
        side: _frames(traced[side], steps)
        for side, steps in (("before", (0, 9, 23, 47)), ("after", (0, 2, 5)))
    }
    (folder / "film.json").write_text(json.dumps(film), encoding="utf-8")
    write_provenance(folder, "evaluate", config, {"answers": folder / "answers.jsonl"})
    return folder


def _frames(answer: str, steps: tuple[int, ...], canvas: int = 16) -> list[dict[str, Any]]:
    """Return the frames of an answer: random tokens at first, the answer and end tokens at last."""
    draw = random.Random(answer)
    tokens = [*re.findall(r" ?\w+|\s|[^\w\s]", answer), "<turn|>"]
    tokens += ["<eos>"] * (-len(tokens) % canvas)
    frames = []
    for block in range(len(tokens) // canvas):
        wanted = tokens[block * canvas : (block + 1) * canvas]
        shown: list[str] = []
        for index, step in enumerate(steps):
            settled = index / (len(steps) - 1)
            now = [
                token if draw.random() < settled else draw.choice([*_NOISE, *wanted])
                for token in wanted
            ]
            changed = [
                int(not shown or token != before)
                for token, before in zip(now, shown or now, strict=True)
            ]
            frames.append(
                {
                    "block": block,
                    "step": step,
                    "tokens": [list(each) for each in zip(now, changed, strict=True)],
                }
            )
            shown = now
    return frames


def write_plan(folder: Path) -> Path:
    """Write a plan; return its folder."""
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(
        json.dumps({"step_seconds": 0.4, "memory_bytes": 1.5e9, "notes": [PLAN_NOTE]}),
        encoding="utf-8",
    )
    (folder / "plan.txt").write_text(
        "parameters   1.5 M in all, 0.1 M trained\nmemory       1.50 GB a rank\n", encoding="utf-8"
    )
    return folder


def write_merge(folder: Path, *, passed: bool = True) -> Path:
    """Write the proof of a merge; return its folder."""
    folder.mkdir(parents=True)
    proof = {
        "passed": passed,
        "method": "logits and weights",
        "prompts": 4,
        "max_abs_difference": 3.1e-6,
        "max_abs_logit": 27.4,
    }
    (folder / "merge_proof.json").write_text(json.dumps(proof), encoding="utf-8")
    return folder


def sample_run(root: Path, config: RunConfig) -> RunArtifacts:
    """Write the output of every step of a run below `root`."""
    return RunArtifacts(
        config.name,
        config,
        metrics=write_metrics(root / "train"),
        data=write_data(root / "data", config),
        plan=write_plan(root / "plan"),
        evaluation=write_evaluation(root / "evaluation", config),
        merge=write_merge(root / "merged"),
        folder=root,
        pages=(
            (
                "MLflow",
                "http://127.0.0.1:5000/#/experiments/1/runs/2?workflowType=machine_learning",
            ),
            ("<b>Kubeflow", "https://kubeflow.example/#/runs/details/3"),
            ("not a page", "javascript:alert(1)"),
        ),
        step_seconds=(("prepare_data", 12.0), ("train", 660.0), ("evaluate", 90.0)),
    )
