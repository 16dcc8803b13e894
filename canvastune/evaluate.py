"""The step `evaluate`: answers to held-out prompts by the base and by the tuned model, with stock `generate()`.

`python -m canvastune.evaluate -c RECIPE --data PREPARED --tuned MODEL --output DIR` does it alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from transformers import PreTrainedTokenizerBase

from canvastune.config import RunConfig, load_config
from canvastune.data.tokenizer import load_tokenizer
from canvastune.errors import UserError
from canvastune.model.source import resolve_model
from canvastune.model.stock import load_stock
from canvastune.outputs import whole_folder, write_provenance

_PROGRESS_SECONDS = 2.0
_SHOWN = 3  # answers that are shown at once; all of them are in the report


@dataclass(frozen=True)
class Question:
    """One held-out row as the model is asked."""

    id: str
    text: str  # the prompt, as a person reads it
    tokens: list[int]  # the prompt through the chat template, header of the answer's turn included
    reference: str


@dataclass(frozen=True)
class Answers:
    """What one model said."""

    texts: list[str]  # one per question, in their order
    tokens: int  # generated over all questions, the one that ends an answer included
    seconds: float  # of generation alone
    tokens_per_forward: float  # mean over questions; forwards of the decoder, as `generate` counts them


def evaluate(config: RunConfig, dataset: Path, base: Path, tuned: Path, out: Path) -> dict[str, Any]:
    """Ask base and tuned model the same held-out questions and write `evaluation.json` and `answers.jsonl` into `out`.

    Every batch is denoised from the same seed before and after. Exact match compares what `evaluate.answer_pattern` finds
    last in the answer and in the reference; rows whose reference holds no such thing are answered and not scored.

    Args:
        dataset: a prepared data set; `evaluate.rows` of its validation split are asked, chosen by their content hash.
        base: checkpoint folder; its tokenizer and chat template serve both models.
        tuned: checkpoint folder of the merged or fully tuned model.

    Returns:
        What evaluation.json holds.

    Raises:
        UserError: no prepared data set, a checkpoint that cannot be loaded, a pattern that is not one or that no reference
            matches, an `out` that is not empty.
    """
    pattern = _compile(config.evaluate.answer_pattern)
    with whole_folder(out) as folder:
        tokenizer = load_tokenizer(base).tokenizer
        questions = _questions(dataset, tokenizer, config.evaluate.rows)
        references = [find_answer(pattern, question.reference) for question in questions]
        if not any(references):
            example = questions[0].reference[-80:]
            raise UserError(
                f"evaluate.answer_pattern: {pattern.pattern!r} matches none of the {len(questions)} references of {dataset}; "
                f"one of them ends with {example!r}. Give a pattern whose group 1 is the answer"
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        sides = {}
        for side, checkpoint in (("before", base), ("after", tuned)):
            _say(f"{side}: loading {checkpoint}")
            sides[side] = _ask(load_stock(checkpoint, device), questions, tokenizer, config, side)
        answers: list[dict[str, Any]] = [
            {
                "id": question.id,
                "prompt": question.text,
                "reference": question.reference,
                **{side: said.texts[row] for side, said in sides.items()},
                **{f"correct_{side}": _correct(pattern, said.texts[row], references[row]) for side, said in sides.items()},
            }
            for row, question in enumerate(questions)
        ]
        with (folder / "answers.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        result = _result(config, answers, sides, device)
        (folder / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        write_provenance(folder, "evaluate", config, {"data": dataset, "base": base, "tuned": tuned})
    for answer in answers[:_SHOWN]:
        _say(f"asked {_short(answer['prompt'])}, before {_short(answer['before'])}, after {_short(answer['after'])}")
    _say(f"exact match {result['exact_match_before']:.1%} before, {result['exact_match_after']:.1%} after, {result['scored']} rows: {out}")
    return result


def find_answer(pattern: re.Pattern[str], text: str) -> str | None:
    """Group 1 of the pattern's last match, without thousands separators, dollar sign and full stop (GSM8K's convention); None: no match."""
    matches = list(pattern.finditer(text))
    if not matches or matches[-1].group(1) is None:
        return None
    return matches[-1].group(1).replace(",", "").replace("$", "").strip().rstrip(".")


def _ask(model: Any, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, config: RunConfig, side: str) -> Answers:
    """Answer every question with a stock model.

    Prompts of a batch are padded on the left, which stock `generate` masks exactly, sliding layers included (a test compares).
    """
    stops, pad = _end_tokens(model)
    device = model.lm_head.weight.device
    # Of like length together: padding is computed like any other token.
    order = sorted(range(len(questions)), key=lambda row: (len(questions[row].tokens), questions[row].id))
    size = config.evaluate.batch_size
    texts, tokens, forwards = [""] * len(questions), 0, 0.0
    started = shown = time.monotonic()
    for at in range(0, len(order), size):
        rows = order[at : at + size]
        batch = [questions[row] for row in rows]
        width = max(len(question.tokens) for question in batch)
        ids = torch.tensor([[pad] * (width - len(question.tokens)) + question.tokens for question in batch])
        mask = torch.tensor([[0] * (width - len(question.tokens)) + [1] * len(question.tokens) for question in batch])
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(_seed(config.seed, batch))  # `generate` draws from the global generators
            output = model.generate(
                ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=config.evaluate.max_new_tokens,
                max_denoising_steps=config.evaluate.max_denoising_steps,
                eos_token_id=stops,
                pad_token_id=pad,
            )
        forwards += float(output.tokens_per_forward.sum())
        for row, generated in zip(rows, output.sequences[:, width:].tolist(), strict=True):
            end = next((position for position, token in enumerate(generated) if token in stops), len(generated))
            texts[row] = str(tokenizer.decode(generated[:end], skip_special_tokens=True)).strip()
            tokens += min(end + 1, len(generated))
        done, now = at + len(rows), time.monotonic()
        if now - shown > _PROGRESS_SECONDS or done == len(order):
            shown, left = now, round((now - started) / done * (len(order) - done))
            _say(f"{side}: {done} of {len(order)} rows answered, {left // 60}:{left % 60:02d} left")
    return Answers(texts, tokens, time.monotonic() - started, forwards / len(questions))


def _questions(dataset: Path, tokenizer: PreTrainedTokenizerBase, count: int) -> list[Question]:
    folder = dataset / "validation"
    if not (folder / "state.json").is_file():
        raise UserError(f"{dataset}: no prepared data set: expected a folder `validation` in it. Give the output of `prepare_data`")
    rows: Any = load_from_disk(str(folder))
    # By content hash: the first rows of a file may be all of one kind.
    chosen = sorted(range(len(rows)), key=rows["id"].__getitem__)[:count]
    picked = rows.select(chosen)
    prompts = [json.loads(prompt) for prompt in picked["prompt"]]
    encoded: Any = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=True, return_dict=True)
    return [
        Question(id=row["id"], text=_readable(prompt), tokens=list(tokens), reference=row["answer"])
        for row, prompt, tokens in zip(picked, prompts, encoded["input_ids"], strict=True)
    ]


def _readable(prompt: list[dict[str, str]]) -> str:
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _result(config: RunConfig, answers: list[dict[str, Any]], sides: dict[str, Answers], device: torch.device) -> dict[str, Any]:
    scored = [answer for answer in answers if answer["correct_before"] is not None]
    result: dict[str, Any] = {"rows": len(answers), "scored": len(scored)}
    for side, said in sides.items():
        correct = sum(answer[f"correct_{side}"] for answer in scored)
        result |= {
            f"correct_{side}": correct,
            f"exact_match_{side}": correct / len(scored),
            f"tokens_{side}": said.tokens,
            f"seconds_{side}": said.seconds,
            f"tokens_per_second_{side}": said.tokens / said.seconds,
            f"tokens_per_forward_{side}": said.tokens_per_forward,
        }
    return result | {
        "gained": sum(answer["correct_after"] and not answer["correct_before"] for answer in scored),
        "lost": sum(answer["correct_before"] and not answer["correct_after"] for answer in scored),
        "answer_pattern": config.evaluate.answer_pattern,
        "max_new_tokens": config.evaluate.max_new_tokens,
        "max_denoising_steps": config.evaluate.max_denoising_steps,
        "seed": config.seed,
        "device": device.type,
    }


def _correct(pattern: re.Pattern[str], text: str, reference: str | None) -> bool | None:
    return None if reference is None else find_answer(pattern, text) == reference


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"evaluate.answer_pattern: {pattern!r} is not a regular expression ({error}). Correct it") from None
    if compiled.groups < 1:
        raise UserError(f"evaluate.answer_pattern: {pattern!r} has no group. Put the answer in parentheses, as in '####\\s*(.+)'")
    return compiled


def _end_tokens(model: Any) -> tuple[list[int], int]:
    """(tokens that end an answer, the padding token) of a checkpoint: its generation config's, else its configuration's."""
    stops, pad = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    text = model.config.text_config
    stops = text.eos_token_id if stops is None else stops
    pad = text.pad_token_id if pad is None else pad
    return stops if isinstance(stops, list) else [stops], pad or 0


def _seed(seed: int, batch: Sequence[Question]) -> int:
    """A seed for a batch, from the run's seed and the rows in it: the same before and after."""
    # 32 bits: torch's CPU generator ignores the rest.
    digest = hashlib.blake2b("\0".join([str(seed), *(question.id for question in batch)]).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def _short(text: str) -> str:
    quoted = repr(text)
    return quoted if len(quoted) <= 100 else f"{quoted[:97]}..."


def _say(line: str) -> None:
    print(f"evaluate: {line}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Evaluate once; 1 and a line of words where that cannot be."""
    parser = argparse.ArgumentParser(prog="python -m canvastune.evaluate", description="Answer held-out rows before and after tuning.")
    parser.add_argument("-c", "--config", required=True, type=Path, metavar="RECIPE", help="the run's recipe")
    parser.add_argument("--data", required=True, type=Path, help="prepared data, as `canvastune prepare` leaves it")
    parser.add_argument("--tuned", required=True, type=Path, metavar="MODEL", help="folder of the merged or fully tuned model")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="gets evaluation.json and answers.jsonl")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config)
        evaluate(config, options.data, resolve_model(config.model), options.tuned, options.output)
    except UserError as error:
        print(f"canvastune: error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
