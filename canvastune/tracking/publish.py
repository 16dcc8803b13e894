"""Show a run directory in MLflow. Idempotent: repeated until MLflow has everything."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from canvastune.evaluation.result import read_answers
from canvastune.io.hashing import hash_path
from canvastune.io.json_text import write_json
from canvastune.tracking import descriptions, steps
from canvastune.tracking import model_registry as registry
from canvastune.tracking.client import TrackingError, connect, file_lock, load_mlflow, log
from canvastune.tracking.descriptions import NOTE
from canvastune.tracking.evaluation_traces import EVALUATION_RUN, log_answers, log_questions
from canvastune.tracking.live_metrics import FindRun, MetricsSender, metric_name
from canvastune.tracking.run_lookup import PARENT, PipelineRun, RunIds
from canvastune.tracking.steps import FINISHED, KILLED, PIPELINE_STEPS, RUNNING, Attempt, Step
from canvastune.tracking.system_metrics import SYSTEM

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

_LARGEST_FILE = 20 * 10**6  # bytes: an output file above this is data and is not uploaded
_READABLE = {".json", ".jsonl", ".yaml", ".txt", ".html", ".png", ".svg"}
_LONGEST_TAG = 5000  # characters, of those that people read
_PARAMETERS_IN_A_BATCH = 100  # MLflow's limit
_FILES = ("curves", "table", "model", "outputs", "files", "answers")  # kinds: values are paths
# What has texts of the data, and is not sent if `tracking.log_texts` is false.
_WITH_TEXTS = {"card.html", "card.json", "answers.jsonl", "film.json", "report.html"}
_MODEL_STEPS = ("train", "merge_lora")
# next to the run of `evaluate`: MLflow compares evaluations by their runs
_BASE_RUN = "evaluate_base"
_CHANGED = "canvastune.changed_settings"  # the tag with what a later attempt set otherwise
_UNSET = "not set"
_TABLES = "mlflow.loggedArtifacts"  # the tag by which MLflow's UI finds tables


class Item(NamedTuple):
    """One thing that MLflow shows. Sending it again changes nothing."""

    kind: str
    step: Step | str  # whose run shows it; "" the pipeline run
    value: Any
    digest: str  # of all that is sent
    started: float  # Unix seconds: start of the run that shows it, if that has to be created

    def __str__(self) -> str:
        return f"{self.kind} of {self.step or 'the run'}"


class Publisher:
    """Send what MLflow lacks of one pipeline run. Every item's `_send_KIND` may be repeated."""

    def __init__(self, run: PipelineRun, step: Step | None = None) -> None:
        """
        Args:
            step: what this process does; None: none of the run's steps.
        """
        self.run, self._step = run, step
        self._texts = run.config.tracking.log_texts
        self.server = connect(run.uri)
        self.ids = RunIds(self.server, run, step)
        self._path = steps.tracking_directory(run.folder) / "published.json"

    def publish(self) -> list[str]:
        """Send what MLflow lacks; return a reason for each step that is still incomplete."""
        try:
            with file_lock(self._path.with_name("publish.lock")):
                return self._publish()
        except TrackingError as error:
            return [self._fail("the run", error)]
        except OSError as error:
            log.warning("%s: cannot be written (%s)", self._path, error)
            return [f"{self._path}: cannot be written ({error})"]

    def pending(self) -> list[str]:
        """Return what MLflow lacks, without asking it."""
        sent = self._read_published()["sent"]
        return [str(item) for key, item in self._items() if sent.get(key) != item.digest]

    def run_id(self) -> str:
        """Return the id of the pipeline run, without asking MLflow; "": it has none yet."""
        return str(self._read_published()["run"])

    def page(self) -> str | None:
        """Return the page of the pipeline run below MLflow's address; None: it has none yet.

        Without the last part, MLflow opens on its pages for agents, which are empty.
        """
        tree = self._read_published()
        if not tree["run"] or not tree["experiment"]:
            return None
        place = f"experiments/{tree['experiment']}/runs/{tree['run']}"
        return f"/#/{place}?workflowType=machine_learning"

    def _publish(self) -> list[str]:
        reasons: dict[str, str] = {}
        items, tree, sent, down = dict(self._items()), self._read_published(), 0, False
        try:
            # Also if nothing is to be sent: this MLflow may not be the one that has it.
            self.server.request(self._find_runs)
            if self.ids.known.get("", tree["run"]) != tree["run"]:  # another server
                run = self.ids.known[""]
                info = self.server.request(lambda client: client.get_run(run).info)
                tree |= {"run": run, "experiment": str(info.experiment_id), "sent": {}}
            # What another attempt records again is sent again.
            tree["sent"] = {key: digest for key, digest in tree["sent"].items() if key in items}
            for key, item in items.items():
                if tree["sent"].get(key) == item.digest:
                    continue
                try:
                    self.server.request(partial(self._send, item))
                except TrackingError as error:
                    step = key.partition("/")[0]
                    reasons.setdefault(step, self._fail(str(item), error, item.kind))
                    if not error.final:
                        down = True
                        break
                else:
                    tree["sent"][key] = item.digest
                    sent += 1
        except TrackingError as error:
            reasons["run"], down = self._fail("the run", error), True
        if tree["late"] and sent:
            log.warning(
                "MLflow at %s is reachable again: %d records were sent late", self.server, sent
            )
        tree["late"] = down
        write_json(self._path, tree, indent=1)
        return list(reasons.values())

    def _read_published(self) -> dict[str, Any]:
        tree = steps.read_json(self._path)
        if tree.get("job") != self.run.job:
            tree = {}
        empty = {"job": self.run.job, "run": "", "experiment": "", "late": False, "sent": {}}
        return empty | tree

    def _read_records(self) -> steps.RunRecords:
        return steps.read_records(self.run.folder, self.run.job)

    def _fail(self, what: str, error: TrackingError, kind: str = "") -> str:
        command = f"`canvastune sync {self.run.folder}`"
        if error.final:
            self.server.warn(error, f"It lacks {what}; {command} tries again", what=kind)
        else:
            self.server.warn(
                error, f"The step continues; a later step, or {command}, sends the rest"
            )
        return f"{what}: MLflow at {self.server} {error}"

    def _items(self) -> Iterator[tuple[str, Item]]:
        """Yield all that the run directory has to show, with a key that is unique in the run."""
        records = self._read_records()
        if records.running:  # first: the report may already have described the run
            yield from self._attempts(records)
        for step, record in records.steps.items():
            for name, value in record.shows.items():
                owner, _, kind = name.rpartition("/")
                for suffix, item_kind, content, files in self._parts(kind, value):
                    digest = content_hash(content, files)
                    item = Item(item_kind, "" if owner else step, content, digest, record.started)
                    yield f"{step}/{name}{suffix}", item
            if step not in PIPELINE_STEPS:
                status = {"status": record.status, "ended": record.ended, "error": record.error}
                yield (
                    f"{step}/status",
                    Item("status", step, status, content_hash(status), record.started),
                )
        if not records.running:
            yield from self._attempts(records)

    def _attempts(self, records: steps.RunRecords) -> Iterator[tuple[str, Item]]:
        if records.attempts:
            attempts = {"attempts": [asdict(attempt) for attempt in records.attempts]}
            digest, started = content_hash(attempts), records.attempts[0].started
            yield "attempts", Item("attempts", "", attempts, digest, started)

    def _parts(
        self, kind: str, value: Mapping[str, Any]
    ) -> Iterator[tuple[str, str, Any, list[Path]]]:
        """Yield an item's parts, each sent separately: key, kind, value and files."""
        named = value.values() if kind in _FILES else ()
        files = [self.run.folder / str(path) for path in named]
        if kind == "files":
            for name, file in zip(value, files, strict=True):
                if self._texts or name not in _WITH_TEXTS:
                    yield f"/{name}", "file", str(file), [file]
            return
        if kind == "outputs":  # what people read: config, card, report, pictures, answers
            for file in sorted(file for path in files for file in path.glob("*")):
                readable = file.suffix in _READABLE and file.stat().st_size <= _LARGEST_FILE
                if readable and (self._texts or file.name not in _WITH_TEXTS):
                    yield f"/{file.name}", "file", str(file), [file]
            return
        if kind == "table" and not self._texts:
            return
        if kind == "answers" and not self._texts:  # the evaluations have figures all the same
            value = {**value, "texts": False}
        if kind == "curves":
            files += [file.with_name(SYSTEM) for file in files]
        yield "", kind, value, files

    # `_send_KIND` sends an item of that kind. It may be repeated, and raises what MLflow raises.

    def _find_runs(self, client: MlflowClient) -> None:
        started = {step: record.started for step, record in self._read_records().steps.items()}
        self.ids.forget_missing(client)
        self.ids.find(client, "", min(started.values(), default=0))
        if self._step in started and self._step not in PIPELINE_STEPS:
            self.ids.find(client, self._step, started[self._step])

    def _send(self, item: Item, client: MlflowClient) -> None:
        send = getattr(self, f"_send_{item.kind}")
        send(client, self.ids.find(client, item.step, item.started), item.value)

    def _send_tags(self, client: MlflowClient, run_id: str, tags: dict[str, str]) -> None:
        tag = load_mlflow().entities.RunTag
        client.log_batch(run_id, tags=[tag(name, value) for name, value in tags.items()])

    def _send_config(self, client: MlflowClient, run_id: str, value: dict[str, Any]) -> None:
        """Log the settings, and in a tag what the newest attempt changes: no parameter can change.

        A setting that the first attempt had not set gets a parameter from the one that sets it.
        """
        data = client.get_run(run_id).data
        known, tags = data.params, data.tags
        newest, first = (
            {metric_name(name): text for name, text in registry.flatten_parameters(tree).items()}
            for tree in (value["config"], value.get("first", value["config"]))
        )
        new = {name: text for name, text in {**newest, **first}.items() if name not in known}
        self._send_parameters(client, run_id, {"new": new})
        changes = []
        for name in {**newest, **first}:
            before = known.get(name, first[name]) if name in first else _UNSET
            if before != (after := newest.get(name, _UNSET)):
                changes.append(f"{name}: {before} -> {after}")
        if changes:
            client.set_tag(run_id, _CHANGED, "; ".join(changes)[:_LONGEST_TAG])
        elif _CHANGED in tags:
            client.delete_tag(run_id, _CHANGED)

    def _send_parameters(self, client: MlflowClient, run_id: str, batches: dict[str, Any]) -> None:
        param = load_mlflow().entities.Param
        for values in map(registry.flatten_parameters, batches.values()):
            found = [param(metric_name(name), value) for name, value in values.items()]
            for first in range(0, len(found), _PARAMETERS_IN_A_BATCH):
                client.log_batch(run_id, params=found[first : first + _PARAMETERS_IN_A_BATCH])

    def _send_metrics(
        self, client: MlflowClient, run_id: str, values: dict[str, list[float]], **of: str
    ) -> None:
        metric = load_mlflow().entities.Metric
        found = [
            metric(metric_name(name), value, int(time * 1000), 0, **of)
            for name, (value, time) in values.items()
        ]
        client.log_batch(run_id, metrics=found)

    def _send_curves(self, client: MlflowClient, run_id: str, value: dict[str, str]) -> None:
        parent = self.ids.find(client, "", 0)  # pipeline runs are compared by their curves, too
        finders: list[FindRun] = [lambda _: run_id, lambda _: parent]
        for file in (self.run.folder / path for path in value.values()):
            for finder in finders:
                MetricsSender(self.server.uri, finder, file).send()

    def _send_text(self, client: MlflowClient, run_id: str, texts: dict[str, str]) -> None:
        for name, text in texts.items():
            client.log_text(run_id, text, name)

    def _send_file(self, client: MlflowClient, run_id: str, path: str) -> None:
        client.log_artifact(run_id, path)

    def _send_table(self, client: MlflowClient, run_id: str, paths: dict[str, str]) -> None:
        # MLflow's own log_table would append to what an earlier attempt has logged.
        for path in paths.values():
            client.log_artifact(run_id, str(self.run.folder / path))
        tables = [{"path": name, "type": "table"} for name in paths]
        client.set_tag(run_id, _TABLES, json.dumps(tables))

    def _send_answers(self, client: MlflowClient, run_id: str, value: dict[str, str]) -> None:
        """Show both models' answers as MLflow shows evaluations: a run for each of them."""
        folder = (self.run.folder / value["path"]).parent
        answers = read_answers(folder) if self._texts else []
        info = client.get_run(run_id).info
        base = self.ids.find(client, _BASE_RUN, info.start_time / 1000)
        tuned = next((m.model_id for m in self._models(client) if m.model_type != "adapter"), None)
        shows = self._read_records().steps["evaluate"].shows
        data = shows.get("dataset", {})
        self._send_dataset(client, base, data)
        for shown, side, model in ((base, "before", None), (run_id, "after", tuned)):
            # Under the same names in both runs: MLflow compares them by these.
            metrics = {
                name.removesuffix(f"_{side}"): value
                for name, value in shows.get("metrics", {}).items()
                if name.endswith(f"_{side}")
            }
            # The first that are sent are the first columns of MLflow's list.
            first = sorted(metrics, key=lambda name: not name.startswith("eval/score"))
            self._send_metrics(client, shown, {name: metrics[name] for name in first})
            self._send_tags(client, shown, EVALUATION_RUN)
            traces = log_answers(client, self.server.uri, shown, side, answers, model)
        client.set_terminated(base, FINISHED)
        # The pipeline run shows the tuned model's, which came last.
        parent = self.ids.find(client, "", 0)
        self._send_tags(client, parent, EVALUATION_RUN)
        name = next((each["name"] for each in data.values()), self.run.config.data.label)
        if answers:
            log_questions(client, self.server.uri, info.experiment_id, name, answers)
            client.link_traces_to_run(traces, parent)

    def _send_dataset(self, client: MlflowClient, run_id: str, contexts: dict[str, Any]) -> None:
        entities = load_mlflow().entities
        for context, fields in contexts.items():
            tag = entities.InputTag("mlflow.data.context", context)
            dataset = entities.DatasetInput(entities.Dataset(**fields), [tag])
            client.log_inputs(run_id, [dataset])

    def _send_model(self, client: MlflowClient, run_id: str, folders: dict[str, str]) -> None:
        for kind, folder in folders.items():
            path = self.run.folder / folder
            model = registry.log_model(client, run_id, self.run, path, kind)
            name = self.run.config.tracking.registered_model
            if name and kind != "adapter":
                registry.register(client, self.server.uri, name, model)

    def _send_evaluated_model(self, client: MlflowClient, run_id: str, value: Any) -> None:
        entity = load_mlflow().entities.LoggedModelInput
        models = [model for model in self._models(client) if model.model_type != "adapter"]
        client.log_inputs(run_id, models=[entity(model.model_id) for model in models])

    def _send_summary(self, client: MlflowClient, run_id: str, value: dict[str, Any]) -> None:
        """Log the figures by which runs are compared, on the run and its models, with the data.

        The evaluated model is the run's input, and an output of the step that made it: MLflow's list
        of evaluations leaves out a run that has a model as output, and every run below it.
        """
        entity, models = load_mlflow().entities.LoggedModelInput, self._models(client)
        self._send_metrics(client, run_id, value["values"])
        # Only what was evaluated: the list shows one of a run's models, in no order.
        complete = [model for model in models if model.model_type != "adapter"] or models
        client.log_inputs(run_id, models=[entity(model.model_id) for model in complete])
        for model in models:
            of = {"model_id": model.model_id, **value["dataset"]}
            self._send_metrics(client, run_id, value["values"], **of)

    def _send_promotion(self, client: MlflowClient, run_id: str, value: dict[str, Any]) -> None:
        """Decide whether the run's registered version becomes the champion, and say so there."""
        tracking, note, models = self.run.config.tracking, value["note"], self._models(client)
        score = registry.Score(**value["score"]) if value["score"] else None
        for model in models:
            client.set_logged_model_tags(model.model_id, {NOTE: note})
        name = tracking.registered_model
        if not name:
            return
        for version in filter(None, (registry.version_of(client, name, m) for m in models)):
            result = registry.promote(client, name, version, score, tracking.promote)
            text, number = f"{result[0].upper()}{result[1:]}.", version.version
            client.update_model_version(name, number, f"{text}\n\n{note}")
            tags = {"model_version": f"{name}/{number}", "promotion": result}
            registered = f"{note}\n\n**Registered** as version {number} of `{name}`. {text}"
            named = {f"canvastune.{key}": tag for key, tag in tags.items()}
            self._send_tags(client, run_id, {**named, NOTE: registered})

    def _send_status(self, client: MlflowClient, run_id: str, value: dict[str, Any]) -> None:
        if value["error"]:
            client.set_tag(run_id, "canvastune.error", value["error"])
        if value["status"] == RUNNING:
            client.update_run(run_id, status=RUNNING)
        else:
            client.set_terminated(run_id, value["status"], int(value["ended"] * 1000))

    def _send_attempts(self, client: MlflowClient, run_id: str, value: dict[str, Any]) -> None:
        """Show the attempts at a run, its state and, if it failed, in which step and why."""
        attempts = [Attempt(**each) for each in value["attempts"]]
        tags, last = descriptions.attempt_tags(attempts), attempts[-1]
        if last.status != FINISHED:  # a report describes a finished run
            tags[NOTE] = descriptions.describe_attempt(self.run.config, self.run.folder, attempts)
        known = client.get_run(run_id).data.tags
        for name in descriptions.FAILURE_TAGS:
            if name in known and name not in tags:
                client.delete_tag(run_id, name)
        self._send_tags(client, run_id, tags)
        if last.status == RUNNING:
            client.update_run(run_id, status=RUNNING)
        else:
            self._send_finish(client, run_id, {"status": last.status, "time": last.ended})

    def _send_finish(self, client: MlflowClient, run_id: str, value: dict[str, Any]) -> None:
        """End a pipeline run, and each of its steps that still counts as running: it was killed."""
        experiment, end = client.get_run(run_id).info.experiment_id, int(value["time"] * 1000)
        running = f"tags.`{PARENT}` = '{run_id}' and attributes.status = 'RUNNING'"
        for run in client.search_runs([experiment], running):
            client.set_terminated(run.info.run_id, KILLED, end)
        client.set_terminated(run_id, value["status"], end)

    def _models(self, client: MlflowClient) -> list[LoggedModel]:
        found = (self.ids.existing(client, step) for step in _MODEL_STEPS)
        return registry.models_of(client, [run_id for run_id in found if run_id])


def content_hash(value: Any, files: Iterable[Path] = ()) -> str:
    """Return a hash of a value and of files' contents; of a directory its file sizes."""
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode())
    for path in files:
        if path.is_file():
            digest.update(hash_path(path).encode())
        else:
            sizes = {str(f.relative_to(path)): f.stat().st_size for f in path.rglob("*")}
            digest.update(json.dumps(sizes, sort_keys=True).encode())
    return digest.hexdigest()
