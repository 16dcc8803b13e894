"""What a step's run holds in MLflow: parameters, metrics, files, the data set, answers, models."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from canvastune.config import RunConfig
from canvastune.tracking.descriptions import NOTE
from canvastune.tracking.model_registry import Score
from canvastune.tracking.outbox import Entry, Outbox
from canvastune.tracking.run_lookup import PipelineRun, RunIds
from canvastune.tracking.sending import is_number

_LARGEST_FILE = 20 * 10**6  # bytes: an output file above this is data, and stays where it is
_READABLE = {".json", ".jsonl", ".yaml", ".txt", ".html", ".png", ".svg"}
_COLUMNS = {
    "input_ids": "list<int32>",
    "prefix_length": "int32",
    "complete": "bool",
    "id": "string",
    "prompt": "string",
    "answer": "string",
}


class StepRun:
    """The MLflow run of a step. What MLflow does not take now waits in the run's folder; without a pipeline run nothing is kept."""

    def __init__(self, step: str = "", ids: RunIds | None = None, outbox: Outbox | None = None) -> None:
        self._step, self._ids, self._outbox = step, ids, outbox

    @property
    def run_id(self) -> str | None:
        """Id of the run; None as long as MLflow is away."""
        return self._ids.known.get(self._step) if self._ids else None

    @property
    def pipeline_run(self) -> PipelineRun | None:
        """The pipeline run that the step is of; None if there is none."""
        return self._ids.run if self._ids else None

    @property
    def pipeline_run_id(self) -> str | None:
        """Id of the pipeline run's run; None as long as MLflow is away."""
        return self._ids.known.get("") if self._ids else None

    def environment(self) -> dict[str, str]:
        """Variables for a process that is to log into this run: MLFLOW_TRACKING_URI, and MLFLOW_RUN_ID unless MLflow is away."""
        here = {"MLFLOW_TRACKING_URI": self._ids.server.uri} if self._ids else {}
        return here | ({"MLFLOW_RUN_ID": self.run_id} if self.run_id else {})

    def arguments(self) -> tuple[str, ...]:
        """What the trainer is told to log into this run; while MLflow is away, by what it is found there later."""
        if self.run_id:
            return "--mlflow-run", self.run_id
        return ("--mlflow-job", self._ids.run.job) if self._ids else ()

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Log parameters, branches flattened to dotted names. They are immutable: the same values again are no error."""
        self.tell("parameters", values)

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags, which a later call may change."""
        self.tell("tags", values)

    def note(self, text: str) -> None:
        """Describe the run, in Markdown."""
        self.tags({NOTE: text})

    def metrics(self, values: Mapping[str, Any], step: int = 0) -> None:
        """Log the numbers of a mapping, as `group/name`; what is not a finite number is left out."""
        self.tell("metrics", {"values": _numbers(values), "step": step})

    def summary(self, values: Mapping[str, Any], dataset: Path) -> None:
        """Log the figures that pipeline runs are compared by: on the parent, and on its models, linked with the prepared data set."""
        about = data_set(self._ids.run.config, dataset) if self._ids else {}
        named = {f"dataset_{name}": about[name] for name in ("name", "digest") if name in about}
        self.tell("summary", {"values": _numbers(values), "dataset": named}, whole=True)

    def curves(self, metrics_file: Path) -> None:
        """Send what the run lacks of metrics.jsonl, since a server was away in training; the parent gets the curves as well."""
        self.tell("curves", {"path": str(metrics_file)})

    def outputs(self, folder: Path) -> None:
        """Upload what people read at the top of a step's output folder: config, provenance, card, report, pictures, answers."""
        for file in sorted(folder.iterdir()):
            if file.is_file() and file.suffix in _READABLE and file.stat().st_size <= _LARGEST_FILE:
                self.tell("file", {"path": str(file.absolute())})

    def table(self, rows: Sequence[Mapping[str, Any]], name: str = "answers.json") -> None:
        """Log rows as a table that MLflow's page shows and compares between runs. A repeated step replaces its table."""
        if rows:
            columns = list(rows[0])
            data = [[row.get(column) for column in columns] for row in rows]
            self.tell("table", {"name": name, "columns": columns, "data": data})

    def dataset(self, folder: Path, context: str, whole: bool = False) -> None:
        """Log a prepared data set (its card.json) as an input of this run, or of the whole pipeline run: name, source, digest, sizes."""
        if self._ids is not None:
            self.tell("data set", {"context": context, **data_set(self._ids.run.config, folder)}, whole)

    def model(self, folder: Path, kind: str) -> None:
        """Log an adapter or a checkpoint as a LoggedModel, and register the latter if the recipe names a registered model.

        A folder above 200 MB is not uploaded: the model then holds its path and size, and its small files. The registered
        version gets the alias `candidate`.

        Args:
            folder: stands on the workspace: the model may have to wait there for MLflow.
            kind: "adapter", "merged" or "full"; an adapter is not registered, since it is no model without its base.
        """
        self.tell("model", {"path": str(folder.absolute()), "kind": kind})

    def judged_model(self) -> None:
        """Name the pipeline run's whole model as an input of this run."""
        self.tell("judged model", {})

    def verdict(self, score: Score | None, word: str, note: str) -> None:
        """Say what became of the pipeline run, and judge whether its registered model becomes the champion.

        Args:
            word: tag to filter by: "better", "worse" or "undecided".
            note: the pipeline run's description, in Markdown; the registered version gets it too.
        """
        self.tell("tags", {NOTE: note, "canvastune.verdict": word}, whole=True)
        self.tell("verdict", {"score": asdict(score) if score else None, "note": note}, whole=True)

    def tell(self, kind: str, what: Mapping[str, Any], whole: bool = False) -> None:
        """Tell MLflow an entry (telling.py) for this run, or for the whole pipeline run."""
        if self._outbox is not None:
            self._outbox.send(Entry(kind, "" if whole else self._step, time.time(), dict(what)))


def data_set(config: RunConfig, folder: Path) -> dict[str, str]:
    """The fields of MLflow's Dataset for prepared data."""
    card, data = json.loads((folder / "card.json").read_text(encoding="utf-8")), config.data
    local = Path(data.source).exists()
    hub = {"path": data.source, "config_name": data.config, "revision": data.revision, "split": data.split}
    return {
        "name": Path(data.source).name if local else data.source,
        "digest": str(card["content_hash"])[:16],
        "source_type": "local" if local else "hf",
        "source": json.dumps({"uri": str(Path(data.source).absolute())} if local else hub),
        "schema": json.dumps({"mlflow_colspec": [{"name": name, "type": kind, "required": True} for name, kind in _COLUMNS.items()]}),
        "profile": json.dumps({"num_rows": card["kept"], "train": card["train"], "validation": card["validation"]}),
    }


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if is_number(value)}
