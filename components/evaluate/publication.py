"""What MLflow is told of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from canvastune.tracking import StepRun
from canvastune.tracking.notes import judged


def publish(figures: Mapping[str, float], evaluation: Path, record: StepRun) -> None:
    """Give the step's run the figures, a sentence, the answers as a table, and the files.

    Args:
        figures: what was measured; `eval/NAME` in MLflow.
        evaluation: the folder with evaluation.json and answers.jsonl.
    """
    record.metrics({f"eval/{name}": value for name, value in figures.items()})
    record.note(judged(figures))
    record.table([json.loads(line) for line in (evaluation / "answers.jsonl").read_text(encoding="utf-8").splitlines()])
    record.outputs(evaluation)
