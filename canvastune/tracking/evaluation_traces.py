"""Answers of an evaluation as MLflow shows evaluations: traces with an expectation and a score.

MLflow's own exporter names a trace at random and hides what fails. Here the names depend on run, row
and answer, so that what is sent again replaces what is there, and a failure is the caller's. What
people say of an answer stays with it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from canvastune.tracking.client import load_mlflow

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Assessment, Span, TraceInfo

ROWS = 100  # of an evaluation: a trace is two requests, and `answers.json` has all of them
EVALUATION_RUN = {"mlflow.runType": "genai_evaluate"}  # the tag by which MLflow finds these runs
_NOT_IN_NAME = r"[^\w\-. /+]"  # of a data set, which is searched for between quotes
_LONGEST_PREVIEW = 1000  # characters: MLflow's limit
_EXPECTED = "expected_response"  # as MLflow's own judges name it
_ROW = "canvastune.row"  # tag of a trace: the row's id
_SUPERSEDED = "canvastune.superseded"  # tag of a trace that people assessed: its answer is replaced
_OURS = ("correct", "score")  # names of the judge's feedback
_SPANS = "mlflow.trace.spansLocation"  # tag of a trace; absent: the server has no spans of it


def log_answers(
    client: MlflowClient,
    uri: str,
    run_id: str,
    side: str,
    answers: Sequence[Mapping[str, Any]],
    model_id: str | None,
) -> list[str]:
    """Log one model's answers to the first `ROWS` rows as traces of an evaluation run.

    Return the ids of the traces. Repeating this changes nothing. Traces of answers that are no longer
    among these are deleted; those that people assessed are tagged and kept, unless there are no
    answers at all.

    Args:
        side: "before" or "after".
        answers: the lines of answers.jsonl.
        model_id: of the model that answered, if MLflow has it.
    """
    load_mlflow()
    from mlflow.entities import TraceData
    from mlflow.tracing.client import TracingClient

    info = client.get_run(run_id).info
    traces = [
        _Trace(run_id, info.experiment_id, info.start_time, side, row, model_id)
        for row in answers[:ROWS]
    ]
    tracing = TracingClient(uri)
    found = client.search_traces(
        locations=[info.experiment_id], run_id=run_id, include_spans=False, max_results=500
    )
    known = {each.info.trace_id: each.info for each in found if _ROW in each.info.tags}
    # First: from spans that come later, MLflow computes a time of each trace, of which nothing is known.
    stored = not traces or _log_spans(tracing, info.experiment_id, [each.span() for each in traces])
    for trace in traces:
        made = trace.info()
        if earlier := known.pop(trace.name, None):
            _keep_assessments(tracing, earlier, made)
            if _SUPERSEDED in earlier.tags:  # the answer is given again
                client.delete_trace_tag(trace.name, _SUPERSEDED)
        sent = tracing.start_trace(made)
        if not stored and sent.tags.get(_SPANS) is None:
            tracing._upload_trace_data(sent, TraceData(spans=[trace.span()]))
    assessed = [name for name, each in known.items() if traces and _of_people(each)]
    for name in assessed:
        client.set_trace_tag(name, _SUPERSEDED, "true")
    if stale := [name for name in known if name not in assessed]:
        client.delete_traces(info.experiment_id, trace_ids=stale)
    return [trace.name for trace in traces]


def _of_people(trace: TraceInfo) -> set[str | None]:
    """Return the ids of what others said of an answer, or changed of what was logged with it."""
    return {
        each.assessment_id
        for each in trace.assessments
        if each.assessment_id not in _own_ids(trace.trace_id)
        or each.last_update_time_ms != each.create_time_ms
        or each.valid is False  # overridden
    }


def _own_ids(trace_id: str) -> set[str]:
    """Return the ids of the assessments that an evaluation may log with an answer."""
    digest = trace_id.removeprefix("tr-")
    return {_assessment_id(digest, name) for name in (_EXPECTED, *_OURS)}


def _keep_assessments(tracing: Any, earlier: TraceInfo, made: TraceInfo) -> None:
    """Leave what people changed as it is, and delete what the judge no longer says."""
    of_people = _of_people(earlier)
    judged = {each.assessment_id for each in made.assessments}
    for each in earlier.assessments:
        if each.assessment_id not in of_people | judged:
            tracing.delete_assessment(earlier.trace_id, each.assessment_id)
    made.assessments = [each for each in made.assessments if each.assessment_id not in of_people]


def log_questions(
    client: MlflowClient, uri: str, experiment_id: str, dataset: str, answers: Sequence[Any]
) -> None:
    """Log the first `ROWS` questions and references as a data set for MLflow's own evaluation.

    Evaluations of the same rows share one; repeating this changes nothing.

    Args:
        dataset: name of the held-out rows.
    """
    mlflow = load_mlflow()
    mlflow.set_tracking_uri(uri)  # a data set's records are sent to the process's default store
    rows = answers[:ROWS]
    digest = _hash(*(text for row in rows for text in (row["prompt"], row["reference"])))[:8]
    name = f"{re.sub(_NOT_IN_NAME, '_', dataset)} {digest}"
    found = client.search_datasets([experiment_id], f"name = '{name}'")
    logged = found[0] if found else client.create_dataset(name, experiment_id)
    logged.merge_records(
        [
            {
                "inputs": {"question": row["prompt"]},
                "expectations": {_EXPECTED: row["reference"]},
                "tags": {_ROW: row["id"]},
                "source": {"source_type": "CODE", "source_data": {}},
            }
            for row in rows
        ]
    )


def _log_spans(tracing: Any, experiment_id: str, spans: list[Span]) -> bool:
    """Store spans in MLflow's database; return whether its server can."""
    from mlflow.exceptions import MlflowException

    try:
        tracing.log_spans(experiment_id, spans)
    except NotImplementedError:  # a server older than 3.4, or a store of files
        return False
    except MlflowException as error:
        if error.get_http_status_code() not in (404, 501):
            raise
        return False  # a server that runs without FastAPI has no such address
    return True


class _Trace:
    """One answer to one row."""

    def __init__(
        self,
        run_id: str,
        experiment_id: str,
        time: int,
        side: str,
        row: Mapping[str, Any],
        model_id: str | None,
    ) -> None:
        self._run, self._experiment, self._time = run_id, experiment_id, time
        self._side, self._row, self._model = side, row, model_id
        self._digest = _hash(run_id, side, row["id"], row[side])
        self.name = f"tr-{self._digest}"

    def span(self) -> Span:
        """Return the question and the answer as the trace's only span."""
        from mlflow.entities import Span

        # An evaluation records no time of a single answer.
        times = dict.fromkeys(("start_time_unix_nano", "end_time_unix_nano"), self._time * 10**6)
        attributes = {
            "mlflow.traceRequestId": self.name,
            "mlflow.spanType": "LLM",
            "mlflow.spanInputs": {"question": self._row["prompt"]},
            "mlflow.spanOutputs": self._row[self._side],
        }
        return Span.from_dict(
            {
                "trace_id": _base64(self._digest),
                "span_id": _base64(self._span_id),
                "parent_span_id": None,
                "name": "answer",
                **times,
                "status": {"code": "STATUS_CODE_OK", "message": ""},
                "attributes": {
                    key: json.dumps(value, ensure_ascii=False) for key, value in attributes.items()
                },
            }
        )

    def info(self) -> TraceInfo:
        """Return all but the spans."""
        from mlflow.entities import TraceInfo, TraceLocation, TraceState

        about = {"mlflow.sourceRun": self._run, "mlflow.trace_schema.version": "3"}
        if self._model is not None:
            about["mlflow.modelId"] = self._model
        return TraceInfo(
            trace_id=self.name,
            trace_location=TraceLocation.from_experiment_id(self._experiment),
            request_time=self._time,
            state=TraceState.OK,
            request_preview=self._row["prompt"][:_LONGEST_PREVIEW],
            response_preview=self._row[self._side][:_LONGEST_PREVIEW],
            trace_metadata=about,
            tags={
                "mlflow.traceName": "answer",
                _ROW: self._row["id"],
                "canvastune.model": "base" if self._side == "before" else "tuned",
                "canvastune.change": _change(self._row),
            },
            assessments=self._assessments(),
        )

    @property
    def _span_id(self) -> str:
        return self._digest[:16]

    def _assessments(self) -> list[Assessment]:
        """Return the reference, and what the judge says of the answer, if it does."""
        from mlflow.entities import AssessmentSource, Expectation, Feedback

        row, judge = self._row, self._row.get("judge") or "no judge"
        common: dict[str, Any] = {
            "trace_id": self.name,
            "span_id": self._span_id,
            "create_time_ms": self._time,
            "last_update_time_ms": self._time,
        }  # no run: MLflow then shows them in the pipeline run as well
        found: list[Assessment] = [
            Expectation(
                name=_EXPECTED,
                value=row["reference"],
                source=AssessmentSource("CODE", "data"),
                **common,
            )
        ]
        source = AssessmentSource("CODE", judge)
        for name in _OURS:
            value = row.get(f"{name}_{self._side}")
            if value is not None:
                told = f"by the judge {judge}"
                found.append(
                    Feedback(name=name, value=value, source=source, rationale=told, **common)
                )
        for each in found:
            each.assessment_id = _assessment_id(self._digest, each.name)
        return found


def _change(row: Mapping[str, Any]) -> str:
    """Return whether the tuned model's answer is better than the base's: a tag to filter by."""
    before, after = row.get("score_before"), row.get("score_after")
    if before is None or after is None:
        return "not scored"
    return "gained" if after > before else "lost" if after < before else "same"


def _assessment_id(digest: str, name: str) -> str:
    return f"a-{_hash(digest, name)}"


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _base64(digits: str) -> str:
    return base64.b64encode(bytes.fromhex(digits)).decode()
