"""Start and end a pipeline run and its steps, and record what MLflow shows of them."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from canvastune import __version__
from canvastune.config import RunConfig
from canvastune.config.data import MixtureSource
from canvastune.config.unread import informative_settings
from canvastune.evaluation.result import ANSWERS
from canvastune.io.json_text import write_json
from canvastune.tracking import steps
from canvastune.tracking.client import connect, log
from canvastune.tracking.descriptions import NOTE
from canvastune.tracking.live_metrics import FindRun, follow_metrics, numbers
from canvastune.tracking.model_registry import Score
from canvastune.tracking.publish import Publisher, content_hash
from canvastune.tracking.run_lookup import PIPELINE_RUN, PipelineRun, RunIds, origin
from canvastune.tracking.shared_store import STORE
from canvastune.tracking.steps import (
    FAILED,
    FINISHED,
    KILLED,
    RUNNING,
    Attempt,
    Step,
    StepRecord,
    format_reason,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Where a step's outputs are kept that are otherwise only in its own container.
_KEPT = {"prepare_data": "data", "plan": "plan", "evaluate": "evaluation"}
# In a run on this machine, by the step `train` while its ranks start.
_SENT_LATER = ("resolve", "plan", "prepare_data")
_BEGIN_UNSENT = ("train", "report")  # the former sends it then, too; the latter ends in seconds
_TOKENS = {"input_ids": "list<int32>", "prefix_length": "int32", "complete": "bool"}
_PREVIEWED_ROWS = 6  # of a dataset: of one source, the card has three
_LONGEST_PREVIEW = 300  # characters of a text; MLflow's page shows 80
_COLUMNS = _TOKENS | dict.fromkeys(("id", "prompt", "answer"), "string")


class StepRun:
    """Record what a step shows in MLflow in the run directory. Without a run: nothing."""

    def __init__(
        self, step: Step | None = None, run: PipelineRun | None = None, own: bool = True
    ) -> None:
        """
        Args:
            own: the MLflow run that Kubeflow's plugin gives this process is this step's.
        """
        self.pipeline_run = run
        self._step: Step = step or "resolve"
        self._began = time.monotonic()
        self._publisher = Publisher(run, step if own else None) if run else None

    @property
    def run_id(self) -> str | None:
        """Id of the step's run; None while MLflow is down."""
        return self._publisher.ids.known.get(self._step) if self._publisher else None

    @property
    def pipeline_run_id(self) -> str | None:
        """Id of the pipeline run's run; None while MLflow is down."""
        return self._publisher.ids.known.get("") if self._publisher else None

    def environment(self) -> dict[str, str]:
        """Return variables for a process that logs into this run."""
        here = {"MLFLOW_TRACKING_URI": self.pipeline_run.uri} if self.pipeline_run else {}
        return here | ({"MLFLOW_RUN_ID": self.run_id} if self.run_id else {})

    def arguments(self) -> tuple[str, ...]:
        """Return the trainer's options for this run; while MLflow is down, to find it later."""
        if self.run_id:
            return "--mlflow-run", self.run_id
        return ("--mlflow-job", self.pipeline_run.job) if self.pipeline_run else ()

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Log parameters, nested ones as dotted names. They are immutable, but may be repeated."""
        self.show("parameters", {content_hash(values): values})

    def tags(self, values: Mapping[str, str], *, of: str = "") -> None:
        """Set tags, which a later call may change."""
        self.show(f"{of}tags", values)

    def note(self, text: str) -> None:
        """Describe the run, in Markdown."""
        self.tags({NOTE: text})

    def metrics(self, values: Mapping[str, Any]) -> None:
        """Log the finite numbers of a mapping, as `group/name`."""
        self.show("metrics", _timed(values, self._shown("metrics")))

    def summary(self, values: Mapping[str, Any], dataset: Path) -> None:
        """Log the figures that pipeline runs and models are compared by, with the prepared data."""
        if self.pipeline_run:
            about = _dataset_fields(self.pipeline_run.config, dataset, "training")
            of = {f"dataset_{name}": about[name] for name in ("name", "digest")}
            known = self._shown("run/summary").get("values", {})
            self.show("run/summary", {"values": _timed(values, known), "dataset": of})

    @contextlib.contextmanager
    def live_curves(self, metrics_file: Path) -> Iterator[None]:
        """Send metrics.jsonl to the run while the block's processes write it, and system metrics."""
        if self.pipeline_run is None:
            yield
            return
        run, find_later = self.pipeline_run, training_run(self.pipeline_run)

        @functools.cache
        def find(client: MlflowClient) -> str:
            self.publish()  # what the steps before left to this one
            return self.run_id or find_later(client)

        with follow_metrics(metrics_file, run.uri, find):
            yield

    def curves(self, metrics_file: Path) -> None:
        """Send what the run lacks of metrics.jsonl; the pipeline run gets the curves as well."""
        self.show("curves", {"path": self._relative(metrics_file)})

    def outputs(self, folder: Path) -> None:
        """Upload what people read at the top of a step's output: config, card, pictures, answers.

        The run directory gets a copy if the folder is elsewhere.
        """
        if self.pipeline_run is not None:
            self.show("outputs", {"path": self._relative(self._kept(folder))})

    def file(self, path: Path, *, of: str = "") -> None:
        """Upload a file of the run directory."""
        self.show(f"{of}files", {path.name: self._relative(path)})

    def answers(self, folder: Path) -> None:
        """Show the answers.jsonl of an evaluation as traces, where MLflow shows evaluations.

        The run directory gets a copy of the folder if it is elsewhere.
        """
        if self.pipeline_run is not None:
            self.show("answers", {"path": self._relative(self._kept(folder) / ANSWERS)})

    def table(
        self,
        rows: Sequence[Mapping[str, Any]],
        name: str = "answers.json",
        *,
        of: Sequence[str] = ("",),
    ) -> None:
        """Log rows as a table that MLflow's UI shows and compares. A repeated step replaces it."""
        if rows and self.pipeline_run:
            columns = list(rows[0])
            path = steps.tracking_directory(self.pipeline_run.folder) / self._step / name
            data = [[row.get(column) for column in columns] for row in rows]
            try:
                write_json(path, {"columns": columns, "data": data}, indent=1)
            except OSError as error:
                log.warning("%s: cannot be written (%s). MLflow will lack it", path, error)
            for owner in of:
                self.show(f"{owner}table", {name: self._relative(path)})

    def dataset(self, folder: Path, context: str, *, of: str = "") -> None:
        """Log a prepared data set (its card.json) as an input: name, source, digest, sizes, preview.

        Args:
            context: "training", or "evaluation" for its held-out rows: a separate data set, as a
                run shows each one only once.
        """
        if self.pipeline_run:
            fields = _dataset_fields(self.pipeline_run.config, folder, context)
            self.show(f"{of}dataset", {context: fields})

    def model(self, folder: Path, kind: str) -> None:
        """Log an adapter or a checkpoint as a LoggedModel, and register it if the recipe says so.

        A folder above 200 MB is not uploaded: the model then holds its path, its size and its small
        files. A registered version gets the alias `candidate`.

        Args:
            folder: is on the workspace, since it may have to wait there for MLflow.
            kind: "adapter", "merged" or "full"; an adapter needs its base and is not registered.
        """
        self.show("model", {kind: self._relative(folder)})

    def evaluated_model(self) -> None:
        """Name the pipeline run's complete model as an input of this run."""
        self.show("evaluated_model", {})

    def promotion(self, score: Score | None, verdict: str | None, note: str) -> None:
        """Describe the pipeline run, and decide whether its registered model becomes the champion.

        Args:
            verdict: tag to filter by: "better", "worse" or "undecided"; None: "not scored".
            note: Markdown, for the pipeline run and the registered version.
        """
        self.tags({NOTE: note, "canvastune.verdict": verdict or "not scored"}, of="run/")
        self.show("run/promotion", {"score": asdict(score) if score else None, "note": note})

    def publish(self) -> None:
        """Send what MLflow lacks of the run.

        In a run on this machine, the first steps leave it to the step `train`, seconds later: they
        would wait for MLflow's import longer than they take.
        """
        if self._publisher and not (STORE in os.environ and self._step in _SENT_LATER):
            self._publisher.publish()

    def set_status(self, status: str, error: str = "") -> None:
        """Record that the step, or another attempt at it, starts or ends now."""

        def change(record: StepRecord) -> None:
            record.status, record.error = status, error or record.error
            # The clock may have gone back since the start.
            record.ended = None if status == RUNNING else max(time.time(), record.started)
            record.seconds += 0.0 if status == RUNNING else time.monotonic() - self._began

        self._update(f"the status {status}", change)

    def show(self, name: str, value: Mapping[str, Any]) -> None:
        """Record what MLflow shows, by kind (see publish.py), added to what it has."""

        def change(record: StepRecord) -> None:
            record.shows[name] = {**record.shows.get(name, {}), **value}

        self._update(name.rpartition("/")[2], change)

    def _shown(self, name: str) -> dict[str, Any]:
        """Return what an earlier call or attempt has recorded to be shown."""
        if self.pipeline_run is None:
            return {}
        records = steps.read_records(self.pipeline_run.folder, self.pipeline_run.job)
        return records.steps[self._step].shows.get(name, {}) if self._step in records.steps else {}

    def _update(self, what: str, change: Callable[[StepRecord], None]) -> None:
        if self.pipeline_run:
            steps.update_step(
                self.pipeline_run.folder, self.pipeline_run.job, self._step, change, what
            )

    def _kept(self, folder: Path) -> Path:
        """Return a step's output folder, or its copy in the run directory if it is elsewhere."""
        if self.pipeline_run is None or folder.is_relative_to(self.pipeline_run.folder):
            return folder
        return _copy_files(folder, self.pipeline_run.folder / _KEPT.get(self._step, self._step))

    def _relative(self, path: Path) -> str:
        folder = self.pipeline_run.folder.absolute() if self.pipeline_run else path
        path = path.absolute()
        return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def start(
    run: PipelineRun, tags: Mapping[str, str] | None = None, attempt: Attempt | None = None
) -> str:
    """Start a pipeline run, or another attempt at it: tags, the config as a file, and what it sets
    as parameters.

    All attempts at a run are one run in MLflow. An attempt before that has no end was killed, as
    were its steps: none of them counts as running.

    Args:
        tags: more to find the run by, such as its address in Kubeflow.
        attempt: default: one of the run's job.

    Returns:
        Id of its run in MLflow, which Kubeflow's plugin or an earlier step may have created; "" if
        MLflow is down, after a warning that says why, or a later step creates it.
    """
    record, tree = StepRun("resolve", run), run.config.model_dump(mode="json")
    key = f"{run.folder.name}/{run.job}"
    steps.begin_attempt(run.folder, run.job, attempt or Attempt(run.job, time.time()))
    about = {**origin(run), **_about(run.config), **(tags or {})}
    record.tags({PIPELINE_RUN: key, **about}, of="run/")
    record.show("run/text", {"config.yaml": yaml.safe_dump(tree, sort_keys=False)})
    settings = informative_settings(run.config)
    first = record._shown("run/config").get("first", settings)
    record.show("run/config", {"config": settings, "first": first})
    record.set_status(FINISHED)
    record.publish()
    return record.pipeline_run_id or ""


@contextlib.contextmanager
def step_run(run: PipelineRun | None, step: Step, *, own: bool = True) -> Iterator[StepRun]:
    """Run the block as a step: a nested run that ends FINISHED, or FAILED with the error as a tag.

    Another attempt at a step continues in the run of the first. Without a pipeline run, or with
    MLflow down, the block runs all the same.

    Args:
        own: see StepRun.
    """
    record = StepRun(step, run, own)
    record.set_status(RUNNING)
    if not (STORE in os.environ and step in _BEGIN_UNSENT):
        record.publish()
    try:
        yield record
    except BaseException as error:
        status = FAILED if isinstance(error, Exception) else KILLED
        record.set_status(status, f"{type(error).__name__}: {format_reason(error)}"[:5000])
        raise
    else:
        record.set_status(FINISHED)
    finally:
        record.publish()


def finish(run: PipelineRun, status: str, step: str = "", reason: str = "") -> list[str]:
    """End a pipeline run and what still counts as running of it; return what MLflow lacks.

    Args:
        status: FINISHED, FAILED or KILLED.
        step: the one that failed or was interrupted, if no step's record says so.
        reason: why, if no step's record says so.
    """
    StepRun("finish", run).set_status(FINISHED)
    steps.end_attempt(run.folder, run.job, status, step, reason)
    StepRun("finish", run).publish()
    return pending(run)


def pending(run: PipelineRun) -> list[str]:
    """Return what MLflow lacks of a run, without asking it."""
    return Publisher(run).pending()


def run_id(run: PipelineRun) -> str:
    """Return the id of a run in MLflow, without asking it; "": MLflow does not have it yet."""
    return Publisher(run).run_id()


def run_page(run: PipelineRun) -> str | None:
    """Return the page of a run below MLflow's address; None: MLflow does not have it yet."""
    return Publisher(run).page()


def sync(run: PipelineRun) -> list[str]:
    """Send what MLflow lacks of a run; return a reason for each step that is still incomplete."""
    return Publisher(run).publish()


def log_data(run: PipelineRun | None, dataset: Path) -> None:
    """Show the prepared data as step prepare_data: if cached, it did not run in this pipeline."""
    with step_run(run, "prepare_data", own=False) as record:
        card = json.loads((dataset / "card.json").read_text(encoding="utf-8"))
        named = ["source", "format", "fingerprint", "content_hash", "seq_length", "canvas_length"]
        named += ["tokenizer", "vocab_size"]
        record.parameters({name: card[name] for name in named if name in card})
        counted = ("rows_read", "kept", "train", "validation", "cut", "seconds")
        counts = {name: card[name] for name in counted if name in card}
        dropped = card.get("dropped", {})
        counts |= {f"dropped/{reason}": count for reason, count in dropped.items()}
        record.metrics({f"data/{name}": count for name, count in counts.items()})
        record.dataset(dataset, "training", of="run/")
        record.dataset(dataset, "training")
        record.outputs(dataset)
        train, held_out = (f"{card[split]:,}" for split in ("train", "validation"))
        record.note(
            f"{card['kept']:,} examples of {card['rows_read']:,} rows: {train} to train on, "
            f"{held_out} held out."
        )


def training_run(run: PipelineRun) -> FindRun:
    """Return what finds the run of the step `train` for the trainer, once MLflow is back."""
    started = time.time()
    ids = RunIds(connect(run.uri), run)
    return lambda client: ids.find(client, "train", started)


def _timed(
    values: Mapping[str, Any], known: Mapping[str, Sequence[float]]
) -> dict[str, tuple[float, float]]:
    """Return the finite numbers with the time at which they were logged, in Unix seconds.

    MLflow shows the value with the latest time: a value is later than the known one that it replaces,
    even if the clock has gone back.
    """
    now = time.time()
    return {
        name: (value, max(now, known[name][1] + 0.01) if name in known else now)
        for name, value in numbers(values).items()
    }


def _copy_files(source: Path, target: Path) -> Path:
    """Copy the files of a directory, but not its subdirectories, and return the copy."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        for file in source.iterdir():
            if file.is_file():
                partial = target / f".{file.name}.partial-{os.getpid()}"
                shutil.copyfile(file, partial)
                partial.replace(target / file.name)
    except OSError as error:
        log.warning("%s: cannot be written (%s). MLflow will lack it", target, error)
    return target


def _dataset_fields(config: RunConfig, folder: Path, context: str) -> dict[str, str]:
    """Return the fields of MLflow's Dataset for prepared data."""
    card, data = json.loads((folder / "card.json").read_text(encoding="utf-8")), config.data
    named = {key: _dataset_source(source) for key, source in data.source_keys.items()}
    if len(named) == 1:
        ((kind, place),) = named.values()
    else:
        kind, place = "external", {key: place for key, (_, place) in named.items()}
    names = [
        Path(source.source).name if Path(source.source).exists() else source.source
        for source in data.sources
    ]
    columns = [{"name": n, "type": kind, "required": True} for n, kind in _COLUMNS.items()]
    name, digest = " + ".join(names), str(card["content_hash"])[:16]
    profile = {"num_rows": card["kept"], "train": card["train"], "validation": card["validation"]}
    if config.tracking.log_texts:
        profile |= _preview(card.get("samples", []))
    if context == "evaluation":
        name, digest = f"{name} held out", content_hash({"held out": card["content_hash"]})[:16]
        profile = {"num_rows": card["validation"]}
    return {
        "name": name,
        "digest": digest,
        "source_type": kind,
        "source": json.dumps(place),
        "schema": json.dumps({"mlflow_colspec": columns}),
        "profile": json.dumps(profile, ensure_ascii=False),
    }


def _preview(samples: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the beginning of the data card's first rows, as the model sees them, by what they are."""
    return {
        f"row {number} {name}": _shorten(sample[key])
        for number, sample in enumerate(samples[:_PREVIEWED_ROWS], 1)
        for key, name in (("prefix", "prompt"), ("response", "response"))
    }


def _shorten(text: str) -> str:
    """Return the beginning of a text, with three periods if more follows."""
    return text if len(text) <= _LONGEST_PREVIEW else f"{text[:_LONGEST_PREVIEW]}..."


def _dataset_source(source: MixtureSource) -> tuple[str, dict[str, Any]]:
    """Return the type and the place of one source, as MLflow has them."""
    path = Path(source.source)
    if path.exists():
        return "local", {"uri": str(path.absolute())}
    return "hf", {
        "path": source.source,
        "config_name": source.config,
        "revision": source.revision,
        "split": source.split,
    }


def _about(config: RunConfig) -> dict[str, str]:
    """Return tags that runs are filtered by."""
    tags = {
        "canvastune.version": __version__,
        "canvastune.recipe": config.name,
        "canvastune.method": config.train.method,
        "canvastune.model": config.model.id,
        "canvastune.model_revision": config.model.revision or "unspecified",
        "canvastune.data": config.data.label,
        "canvastune.backend": config.cluster.backend,
        "canvastune.ranks": str(config.world_size),
    }
    if config.cluster.backend != "local":
        tags["canvastune.trainer_image"] = config.cluster.image
    return tags
