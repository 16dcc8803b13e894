"""`python -m benchmarks.data`: preparation against `datasets.map`, its memory, and how evenly the
ranks of a step work.

Rows per second from a JSON lines file to tokens on disk: `prepare_data`, and
`datasets.load_dataset` with `map` and a plain tokenizer call, which renders no chat template,
checks nothing, finds no repeats and makes no split or card. Then conversations with tools (two
declarations, a call, its response and the answer; a sentence each, or long), against rows of
GSM8K's form; with `--baseline`, rows of GSM8K's form against another checkout; the memory of
preparing five times the rows; and the tokens of the busiest rank over the mean in each forward.
Writes benchmarks/results/data.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.measure import (
    alternate,
    command_parser,
    commit_of,
    python_module,
    say,
    write_result,
)
from benchmarks.resident import run_watched
from canvastune.config import RunConfig
from canvastune.data.packing import balance_microbatches, step_cost
from canvastune.preparation.prepare import prepare_data
from canvastune.tiny_model import make_tiny_model

GOAL = 1.0  # rows per second over those of datasets.map
WORDS = (
    *(
        "how",
        "many",
        "more",
        "than",
        "there",
        "are",
        "each",
        "bought",
        "sold",
        "week",
        "morning",
        "total",
        "price",
        "dollars",
        "apples",
    ),
    *(
        "half",
        "twice",
        "friends",
        "because",
        "left",
        "and",
        "the",
        "of",
        "in",
        "to",
        "is",
        "was",
        "her",
        "his",
        "every",
        "students",
    ),
)
LAYOUTS = (
    (2, 4, 1),
    (8, 4, 1),
    (8, 8, 1),
    (8, 2, 4),
    (64, 4, 1),
)  # ranks, examples of a rank and forward, forwards
STEPS = 500


def main() -> int:
    parser = command_parser("benchmarks.data", __doc__)
    parser.add_argument(
        "--rows",
        type=int,
        default=20_000,
        help="of one process against one, and of the smaller memory figure",
    )
    parser.add_argument(
        "--many",
        type=int,
        default=100_000,
        help="of two processes against two, and of the larger memory figure",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--baseline", type=Path, metavar="CHECKOUT", help="the root of another checkout"
    )
    parser.add_argument(
        "--prepare", nargs=3, metavar=("FILE", "MODEL", "OUT"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.prepare:
        file, model, out = map(Path, options.prepare)
        prepare_data(_config(file), model, out, 2)
        return 0
    datasets.utils.disable_progress_bars()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process is a core, on both sides
    with tempfile.TemporaryDirectory(prefix="benchmark-data-") as work:
        result = _measure(Path(work), options.rows, options.many, options.rounds)
        if options.baseline:
            result["baseline"] = _against(
                Path(work), options.many, options.rounds, options.baseline
            )
    write_result("data", result)
    print(json.dumps(result, indent=2))
    return int(min(result["one_process"]["ratio"], result["two_processes"]["ratio"]) < GOAL)


def _measure(work: Path, rows: int, many: int, rounds: int) -> dict[str, Any]:
    make_tiny_model(work / "model")
    files = {count: _write_rows(work / f"{count}.jsonl", count) for count in (rows, many)}
    result: dict[str, Any] = {
        "characters_a_row": round(files[rows].stat().st_size / rows),
        "rounds": rounds,
    }
    result["one_process"] = _compare(work, files[rows], rows, 1, rounds)
    result["two_processes"] = _compare(work, files[many], many, 2, rounds)
    tools = _write_tool_rows(work / "tools.jsonl", many)
    long = _write_tool_rows(work / "long_tools.jsonl", many, long=True)
    result["tools"] = _compare_tools(work, files[many], tools, long, many, rounds)
    result["memory"] = {}
    for name, file in {
        **{str(count): file for count, file in files.items()},
        "tools": tools,
    }.items():
        say("data", f"memory of {name} rows, two processes")
        command = _prepare_command(file, work / "model", work / "out")
        peaks = run_watched(f"the preparation of {file}", command, dict(os.environ))
        shutil.rmtree(work / "out")
        result["memory"][name] = {
            "anonymous_bytes": [peak.anonymous for peak in peaks]
        }  # of each process, the largest first
    result["balance"] = [_balance(*layout) for layout in LAYOUTS]
    return result


def _compare(work: Path, file: Path, rows: int, processes: int, rounds: int) -> dict[str, Any]:
    """Rows per second of both sides, and of the usual call of a chat template for each row."""
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    sides: dict[str, Callable[[], object]] = {
        "prepare_data": lambda: _prepare(work, file, processes),
        "map": lambda: _map(
            work, file, functools.partial(_plain, tokenizer=tokenizer), processes, batched=True
        ),
    }
    if processes == 1:
        sides["map_chat_template"] = lambda: _map(
            work, file, functools.partial(_chat, tokenizer=tokenizer), processes, batched=False
        )
    seconds = alternate(sides, rounds)
    speed = {name: round(rows / value) for name, value in seconds.items()}
    ratio = seconds["map"] / seconds["prepare_data"]
    say(
        "data",
        f"{processes} process(es), {rows:,} rows: {speed} rows/s; prepare_data over map "
        f"{ratio:.2f}",
    )
    return {"rows": rows, "rows_per_second": speed, "ratio": ratio}


def _compare_tools(
    work: Path, plain: Path, tools: Path, long: Path, rows: int, rounds: int
) -> dict[str, Any]:
    """Rows per second of conversations with tools, over those of GSM8K's form."""
    files = {"gsm8k": plain, "tools": tools, "long_tools": long}
    seconds = alternate(
        {name: functools.partial(_prepare, work, file, 2) for name, file in files.items()}, rounds
    )
    speed = {name: round(rows / value) for name, value in seconds.items()}
    ratios = {name: seconds["gsm8k"] / seconds[name] for name in ("tools", "long_tools")}
    shown = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    say("data", f"two processes, {rows:,} rows: {speed} rows/s; over gsm8k: {shown}")
    return {
        "rows": rows,
        "characters_a_row": {
            name: round(file.stat().st_size / rows) for name, file in files.items()
        },
        "rows_per_second": speed,
        "ratios": ratios,
    }


def _against(work: Path, rows: int, rounds: int, baseline: Path) -> dict[str, Any]:
    """Rows per second of this checkout over another one's, as each card says."""
    file = work / f"{rows}.jsonl"
    seconds: dict[str, list[float]] = {"this": [], "baseline": []}
    for _ in range(rounds):
        for name, root in (("this", Path.cwd()), ("baseline", baseline)):
            out = work / f"out-{name}"
            subprocess.run(
                _prepare_command(file, work / "model", out),
                cwd=root,
                env={**os.environ, "PYTHONPATH": str(root)},
                check=True,
            )
            card = json.loads((out / "card.json").read_text(encoding="utf-8"))
            seconds[name].append(card["seconds"])
            shutil.rmtree(out)
    best = {name: min(values) for name, values in seconds.items()}
    speed = {name: round(rows / value) for name, value in best.items()}
    ratio = best["baseline"] / best["this"]
    say("data", f"two processes, {rows:,} rows: {speed} rows/s; over the baseline {ratio:.2f}")
    commit = commit_of(baseline)
    return {"commit": commit, "rows": rows, "rows_per_second": speed, "ratio": ratio}


def _prepare_command(file: Path, model: Path, out: Path) -> list[str]:
    return python_module("benchmarks.data", "--prepare", file, model, out)


def _prepare(work: Path, file: Path, processes: int) -> None:
    prepare_data(_config(file), work / "model", work / "out", processes)
    shutil.rmtree(work / "out")


def _map(
    work: Path, file: Path, function: Callable[..., Any], processes: int, *, batched: bool
) -> None:
    data = datasets.load_dataset(
        "json", data_files=str(file), split="train", cache_dir=str(work / "cache")
    )
    data.map(
        function,
        batched=batched,
        num_proc=processes if processes > 1 else None,
        load_from_cache_file=False,
    )
    del data
    shutil.rmtree(work / "cache")


def _plain(rows: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase) -> Any:
    return tokenizer(
        [
            f"{question}\n{answer}"
            for question, answer in zip(rows["question"], rows["answer"], strict=True)
        ]
    )


def _chat(row: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> Any:
    messages = [
        {"role": "user", "content": row["question"]},
        {"role": "assistant", "content": row["answer"]},
    ]
    return tokenizer.apply_chat_template(messages, return_dict=True)


def _config(file: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "benchmark",
            "data": {"source": str(file), "seq_length": 1024, "validation_fraction": 0.02},
        }
    )


def _text(rng: random.Random, characters: float) -> str:
    words: list[str] = []
    while characters > 0:
        words.append(rng.choice(WORDS) if rng.random() < 0.85 else str(rng.randint(1, 500)))
        characters -= len(words[-1]) + 1
    return " ".join(words)


def _write_tool_rows(file: Path, count: int, *, long: bool = False) -> Path:
    """Conversations with two declarations, a call, its response and the answer: a sentence each, or
    question and answer as long as those of GSM8K's form.
    """
    rng = random.Random(1)
    number = {"type": "number", "description": "in dollars"}
    parameters = {"type": "object", "properties": {"price": number}, "required": ["price"]}
    tools = [
        {
            "type": "function",
            "function": {"name": name, "description": "from the shop", "parameters": parameters},
        }
        for name in ("find_price", "find_total")
    ]
    with file.open("w", encoding="utf-8") as stream:
        for row in range(count):
            question, answer = (5.4, 5.55) if long else (4.2, 4.5)
            call = {"name": rng.choice(("find_price", "find_total")), "arguments": {"price": row}}
            messages = [
                {
                    "role": "user",
                    "content": f"{row} {_text(rng, rng.lognormvariate(question, 0.4))}",
                },
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "1", "type": "function", "function": call}],
                },
                {"role": "tool", "tool_call_id": "1", "content": str(rng.randint(1, 999))},
                {"role": "assistant", "content": _text(rng, rng.lognormvariate(answer, 0.5))},
            ]
            stream.write(json.dumps({"messages": messages, "tools": tools}) + "\n")
    return file


def _write_rows(file: Path, count: int) -> Path:
    """Rows of GSM8K's form, lengths and their spread: log-normal, about 235 characters of a
    question and 290 of an answer.
    """
    rng = random.Random(0)
    text = functools.partial(_text, rng)
    with file.open("w", encoding="utf-8") as stream:
        for number in range(count):
            question = f"{number} {text(rng.lognormvariate(5.4, 0.4))}"
            answer = f"{text(rng.lognormvariate(5.55, 0.5))}\n#### {rng.randint(1, 999)}"
            stream.write(json.dumps({"question": question, "answer": answer}) + "\n")
    return file


def _balance(ranks: int, size: int, forwards: int) -> dict[str, Any]:
    """Return the busiest rank's tokens over the mean in each forward, weighted by its tokens: by
    position and balanced.

    `one_pass` counts every token once; `step` weighs what a step costs: forward, recomputation and
    backward are four times the forward of pass 1, in which ranks wait for each other again.
    """
    rng = np.random.default_rng(0)
    sums = {name: np.zeros(2) for name in ("by_position", "shared_out")}
    ideal = np.zeros(2)
    for _ in range(STEPS):
        count = ranks * size * forwards
        # GSM8K's tokens with the fill of the last block, and the canvas of 256: 88 + 137 tokens in
        # the mean, the longest cut.
        prefix, response = rng.lognormal(4.4, 0.4, count), rng.lognormal(4.8, 0.6, count)
        tokens = [
            int(p) + 256 * int(np.ceil(r / 256)) + 256
            for p, r in zip(prefix, response, strict=True)
        ]
        coins = rng.random(count) < 0.5
        again = [t if twice else 0 for t, twice in zip(tokens, coins, strict=True)]
        starts = range(0, count, ranks * size)
        plain = [
            [list(range(start + rank * size, start + (rank + 1) * size)) for rank in range(ranks)]
            for start in starts
        ]
        for name, forward in (
            ("by_position", plain),
            ("shared_out", balance_microbatches(tokens, again, ranks, size)),
        ):
            sums[name] += _busiest(forward, tokens, again)
        every = sum(tokens)
        ideal += np.array([every, 4 * every + sum(again)]) / ranks
    found = {
        name: {"one_pass": float(one), "step": float(step)}
        for name, (one, step) in ((n, s / ideal) for n, s in sums.items())
    }
    say("data", f"{ranks} ranks x {size} examples x {forwards} forwards: busiest over mean {found}")
    return {"ranks": ranks, "micro_batch": size, "forwards": forwards, **found}


def _busiest(shares: list[list[list[int]]], tokens: list[int], again: list[int]) -> np.ndarray:
    """[tokens of one pass, weighted cost of a step], each the sum over forwards of the busiest
    rank's.
    """
    return np.array(
        [
            sum(max(sum(tokens[at] for at in own) for own in forward) for forward in shares),
            step_cost(shares, tokens, again),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
