"""Descriptions in Markdown, as MLflow's pages show them: of a pipeline run at its start and at its end, and of its steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from canvastune.config import RunConfig
from canvastune.evaluation.result import EvaluationResult, ModelFigures

NOTE = "mlflow.note.content"  # the tag that MLflow's page shows as a run's description
STEPS = {
    "prepare_data": "Rows to tokens: the train and validation split, with a data card.",
    "plan": "What the run needs of its hardware: memory by part, FLOPs, time, communication.",
    "train": "Losses of every step, validation loss by corruption level, and what the machine did.",
    "merge_lora": "The adapter merged into the base, shard by shard, with a proof.",
    "evaluate": "Held-out rows answered by the base and by the tuned model.",
    "report": "One page with the curves, the answers and the figures.",
}
_AGAIN = """**Again**

`config.yaml`, a file of this run, is the whole recipe:

```sh
canvastune run config.yaml      # on this machine
canvastune submit config.yaml   # on Kubeflow
```"""


def begun(config: RunConfig, folder: Path) -> str:
    """What a pipeline run is about to do."""
    return f"{_what(config)}\n\n{_table(_about(config, folder))}\n\nWhile it trains, the curves are in the nested run `train`.\n\n{_AGAIN}"


def reported(config: RunConfig, folder: Path, figures: Mapping[str, float], evaluation: EvaluationResult) -> str:
    """What a pipeline run did: verdict, figures, where its files are, how to do it again.

    Args:
        figures: the run's summary, by MLflow's names.
    """
    rows = [("", "before", "after"), ("---", "---:", "---:")]
    if evaluation.scored:
        named = f"exact match on {evaluation.scored} held-out rows (95% interval)"
        rows.append((named, _with_interval(evaluation.before), _with_interval(evaluation.after)))
    judged_loss = ("eval/validation_loss_before", "eval/validation_loss_after")  # of the weights as they are used
    losses = judged_loss if judged_loss[0] in figures else ("val/loss_first", "val/loss_last")
    for label, before, after in (("validation loss", *losses), ("training loss, first and last", "train/loss_first", "train/loss_last")):
        if before in figures and after in figures:
            rows.append((label, f"{figures[before]:.3f}", f"{figures[after]:.3f}"))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    weights = {"adapter": folder / "train/adapter", "merged model": folder / "model"}
    places = {
        "report": f"{_code(folder / 'report/report.html')}, also a file of the nested run `report`",
        **{name: _code(path) for name, path in (weights if config.train.method == "lora" else {"model": folder / "train/model"}).items()},
        "checkpoints": _code(folder / "train/checkpoints"),
    }
    return f"{judged(evaluation)}\n\n{_what(config)}\n\n{table}\n\n**Where**\n\n{_table(_about(config, folder) | places)}\n\n{_AGAIN}"


def judged(evaluation: EvaluationResult) -> str:
    """The evaluation in a sentence."""
    if not evaluation.scored:
        return "**Not judged**: no held-out row was scored."
    before, after = evaluation.before.exact_match, evaluation.after.exact_match
    words = {"better": "Better", "worse": "Worse", "undecided": "No clear difference"}
    word = words[evaluation.verdict]
    change = f"{evaluation.gained} gained, {evaluation.lost} lost of {evaluation.scored} rows"
    return f"**{word}**: exact match {before:.1%} before, {after:.1%} after ({change})."


def _with_interval(model: ModelFigures) -> str:
    return f"{model.exact_match:.1%} ({model.exact_match_low:.1%} to {model.exact_match_high:.1%})"


def _what(config: RunConfig) -> str:
    train = config.train
    method = f"LoRA of rank {config.lora.rank}" if train.method == "lora" else "Full fine-tuning"
    length = f"{train.steps} steps of {train.global_batch_size} examples"
    return f"{method} of {_code(config.model.id)} on {_code(config.data.source)}, {length}."


def _about(config: RunConfig, folder: Path) -> dict[str, str]:
    where = "this machine" if config.cluster.backend == "local" else f"{config.cluster.backend}, {config.cluster.nodes} nodes"
    return {
        "recipe": _code(config.name),
        "ranks": f"{config.world_size} (expert parallel {config.parallel.ep}), {where}",
        "run folder": _code(folder),
    }


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _code(value: object) -> str:
    """A person's text, which may hold Markdown's signs, as code in a table's cell."""
    return f"`{' '.join(str(value).split())}`".replace("|", "\\|") if "`" not in str(value) else repr(str(value)).replace("|", "\\|")
