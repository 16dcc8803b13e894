"""A registered version becomes the champion when it beats the champion on the same rows, and says
why it did or did not.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from canvastune import tracking
from canvastune.config import parse_config
from canvastune.evaluation.result import EvaluationResult
from canvastune.tracking.client import load_mlflow
from canvastune.tracking.model_registry import promote, score_of
from tools.report_sample import sample_result

pytestmark = pytest.mark.usefixtures("own_mlflow")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workspace")


class Runs:
    """Runs that register versions of one model; each call returns the result of its version."""

    def __init__(self, workspace: Path, name: str) -> None:
        self.workspace, self.name, self.count = workspace, name, 0
        uri = f"sqlite:///{workspace}/mlflow.db"
        self.client = load_mlflow().MlflowClient(uri, registry_uri=uri)

    def begin(self, when: str = "better") -> tracking.PipelineRun:
        """Train and merge: the version is there, and not yet judged."""
        self.count += 1
        tree = {
            "name": "tiny_lora",
            "data": {"source": "openai/gsm8k"},
            "tracking": {"registered_model": self.name, "promote": when},
        }
        run = tracking.PipelineRun(
            parse_config(tree), self.workspace / "runs" / f"{self.name}-{self.count}", "job"
        )
        (run.folder / "model").mkdir(parents=True)
        (run.folder / "model" / "model.safetensors").write_bytes(b"weights")
        with tracking.step_run(run, "merge_lora") as record:
            record.model(run.folder / "model", "merged")
        return run

    def judge(
        self, run: tracking.PipelineRun, before: float | None, after: float | None, **asked: Any
    ) -> str:
        """Report: the version is judged; returns the outcome in the run's tag."""
        parent = tracking.start(run)
        with tracking.step_run(run, "report") as record:
            record.promotion(score_of(evaluation(before, after, **asked)), "better", "the figures")
        return str(self.client.get_run(parent).data.tags["canvastune.promotion"])

    def __call__(
        self, before: float | None, after: float | None, when: str = "better", **asked: Any
    ) -> str:
        return self.judge(self.begin(when), before, after, **asked)

    def aliases(self) -> dict[str, int]:
        return {
            alias: int(version)
            for alias, version in self.client.get_registered_model(self.name).aliases.items()
        }


def evaluation(before: float | None, after: float | None, **asked: Any) -> EvaluationResult:
    result = sample_result()
    return replace(
        result,
        before=replace(result.before, exact_match=before),
        after=replace(result.after, exact_match=after),
        **asked,
    )


def reason(outcome: str) -> tuple[str, ...]:
    """Return whether a model was promoted, and the figures, versions and keys that decided it."""
    return (
        outcome.partition(":")[0],
        *re.findall(r"[\d.]+%|version \d+|tracking\.promote", outcome),
    )


def test_the_champion_is_the_best_on_the_same_rows(workspace: Path) -> None:
    runs = Runs(workspace, "best")
    no, yes = "not promoted", "promoted to champion"
    assert reason(runs(0.5, 0.4)) == (no, "40.0%", "50.0%"), "below the base"
    assert runs.aliases() == {"candidate": 1}
    assert reason(runs(0.5, 0.5)) == (yes, "50.0%", "50.0%"), "the first one"
    assert reason(runs(0.5, 0.75)) == (yes, "75.0%", "version 2", "50.0%")
    as_good = runs(0.5, 0.75)
    assert reason(as_good) == (no, "75.0%", "75.0%", "version 3")
    assert reason(runs(0.5, 0.7)) == (no, "70.0%", "75.0%", "version 3")
    for other in ({"asked": "other rows"}, {"answer_pattern": "(..)"}, {"max_new_tokens": 32}):
        assert reason(runs(0.5, 0.9, **other)) == (no, "version 3"), "they cannot be compared"
    assert reason(runs(0.5, 0.9, when="never")) == (no, "tracking.promote")
    assert reason(runs(None, None, scored=0)) == (no,)
    assert runs.aliases() == {"candidate": 10, "champion": 3}
    version = runs.client.get_model_version("best", "4")
    assert version.description == f"{as_good[0].upper()}{as_good[1:]}.\n\nthe figures"
    assert version.tags["canvastune.exact_match"] == "0.75"
    assert "`champion`" in runs.client.get_registered_model("best").description


def test_a_repeated_step_changes_nothing_and_does_not_undo_what_a_person_has_set(
    workspace: Path,
) -> None:
    runs = Runs(workspace, "repeated")
    first = runs.begin()
    outcome = runs.judge(first, 0.5, 0.6)
    second = runs.begin()
    runs.judge(second, 0.5, 0.7)
    assert runs.judge(first, 0.5, 0.6) == outcome
    assert runs.aliases() == {"candidate": 2, "champion": 2}
    runs.client.set_registered_model_alias("repeated", "champion", "1")
    runs.judge(second, 0.5, 0.7)
    with tracking.step_run(first, "merge_lora") as record:
        record.model(first.folder / "model", "merged")
    assert runs.aliases() == {
        "candidate": 2,
        "champion": 1,
    }, "a person's choice was undone, or the candidate is an older version"
    assert len(runs.client.search_model_versions("name = 'repeated'")) == 2


@pytest.mark.parametrize(
    "killed_at", ["canvastune.exact_match", "champion", "canvastune.promotion"]
)
def test_a_step_that_was_killed_while_it_judged_is_judged_again(
    workspace: Path, killed_at: str
) -> None:
    runs = Runs(workspace, f"killed-{killed_at.rpartition('.')[2]}")
    run = runs.begin()
    (version,) = runs.client.search_model_versions(f"name = '{runs.name}'")
    with pytest.raises(KeyboardInterrupt):
        promote(
            _Stopping(runs.client, killed_at),  # type: ignore[arg-type]
            runs.name,
            version,
            score_of(evaluation(0.5, 0.6)),
            "better",
        )
    assert runs.judge(run, 0.5, 0.6).startswith("promoted to champion: ")
    assert runs.aliases() == {"candidate": 1, "champion": 1}


class _Stopping:
    """MLflow's client in a process that is killed just before it sets a tag or an alias."""

    def __init__(self, client: Any, at: str) -> None:
        self._client, self._at = client, at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def set_model_version_tag(self, name: str, version: str, key: str, value: str) -> None:
        self._stop(key)
        self._client.set_model_version_tag(name, version, key, value)

    def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
        self._stop(alias)
        self._client.set_registered_model_alias(name, alias, version)

    def _stop(self, at: str) -> None:
        if at == self._at:
            raise KeyboardInterrupt
