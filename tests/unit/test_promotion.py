"""A registered version becomes the champion when the paired test says that it beats the champion on
the same rows; it says why it did or did not.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from inline_snapshot import snapshot

from canvastune import tracking
from canvastune.config import parse_config
from canvastune.evaluation.scoring import paired_test
from canvastune.tracking.client import load_mlflow
from canvastune.tracking.model_registry import Score, promote, score_of
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
            record.promotion(judged(before, after, **asked), "better", "the figures")
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


def judged(before: float | None, after: float | None, **asked: Any) -> Score | None:
    """Return the score of 64 rows, of which the first ones are answered correctly."""
    if before is None or after is None:
        return score_of(sample_result(rows=0), [])
    shares = {"before": before, "after": after}
    sides = {side: [float(row < share * 64) for row in range(64)] for side, share in shares.items()}
    p, verdict = paired_test([new - old for old, new in zip(*sides.values(), strict=True)])
    changed = round(64 * (after - before))
    result = sample_result(64, round(64 * before), round(64 * after), max(0, -changed))
    result = replace(result, gained=max(0, changed), p_value=p, verdict=verdict)
    rows = [{"score_after": score} for score in sides["after"]]
    return score_of(replace(result, **asked), rows)


def test_the_champion_is_clearly_better_on_the_same_rows(workspace: Path) -> None:
    runs = Runs(workspace, "best")
    assert runs(0.75, 0.5) == snapshot(
        "not promoted: exact match 50.0%, clearly below the base's 75.0% (0 gained, 16 lost, "
        "p = 3.1e-05)"
    )
    for after in (0.5, 0.53125):  # nothing changed; 2 of 64 rows
        assert re.match(r"not promoted: .*\bbase's 50\.0%", runs(0.5, after))
    assert runs.aliases() == {"candidate": 3}, "chance made a champion"
    assert runs(0.25, 0.5) == snapshot(
        "promoted to champion: the first one, exact match 50.0%, clearly above the base's 25.0% "
        "(16 gained, 0 lost, p = 3.1e-05)"
    )
    assert runs(0.25, 0.75) == snapshot(
        "promoted to champion: exact match 75.0%, clearly above the 50.0% of version 4 before it "
        "(16 gained, 0 lost, p = 3.1e-05)"
    )
    assert runs(0.25, 0.8125) == snapshot(
        "not promoted: exact match 81.2%, not clearly different from the 75.0% of version 5, the "
        "champion (4 gained, 0 lost, p = 0.12)"
    )
    assert runs(0.25, 0.5) == snapshot(
        "not promoted: exact match 50.0%, clearly below the 75.0% of version 5, the champion "
        "(0 gained, 16 lost, p = 3.1e-05)"
    )
    for other in (
        {"asked": "other rows"},
        {"answer_pattern": "(..)"},
        {"max_new_tokens": 32},
        {"judges": ("chrf",)},
        {"repeats": 4},
    ):
        assert runs(0.25, 0.96875, **other) == snapshot(
            "not promoted: version 5, the champion, was not evaluated on the same rows in the "
            "same way. If this one is better, set the alias by hand"
        )
    assert re.match(
        r"not promoted: .*\btracking\.promote\b.* never$", runs(0.25, 0.96875, when="never")
    )
    assert re.match(r"not promoted: .*\bno score\b", runs(None, None, scored=0))
    assert runs.aliases() == {"candidate": 14, "champion": 5}
    version = runs.client.get_model_version("best", "6")
    assert re.match(r"Not promoted: \D+81\.2%", version.description)
    assert version.description.endswith("\n\nthe figures")
    assert version.tags["canvastune.score"] == "0.8125"
    assert "`champion`" in runs.client.get_registered_model("best").description


def test_a_champion_of_an_earlier_version_has_no_rows_to_compare(workspace: Path) -> None:
    runs = Runs(workspace, "earlier")
    runs(0.25, 0.5)
    runs.client.delete_model_version_tag("earlier", "1", "canvastune.row_scores")
    assert re.match(r"not promoted: version 1\b.* scores\b.* row\b", runs(0.25, 0.9375))
    assert runs.aliases() == {"candidate": 2, "champion": 1}


def test_scores_between_right_and_wrong_are_compared_row_by_row(workspace: Path) -> None:
    runs = Runs(workspace, "graded")
    first = judged(0.25, 0.5, measure="chrF", judges=("chrf",))
    assert first is not None

    def say(scores: list[float | None]) -> str:
        run = runs.begin()
        parent = tracking.start(run)
        with tracking.step_run(run, "report") as record:
            mean = sum(each or 0 for each in scores) / 63
            record.promotion(replace(first, rows=tuple(scores), after=mean), "better", "")
        return str(runs.client.get_run(parent).data.tags["canvastune.promotion"])

    base: list[float | None] = [None, *(row / 63 for row in range(63))]
    say(base)
    better = [each if each is None else min(1.0, each + 0.01) for each in base]
    assert re.match(r"promoted\b.* chrF 50\.2%, .* 49\.2%", say(better))
    mixed = [
        each if each is None else each + (-1) ** row * 0.001 for row, each in enumerate(better)
    ]
    assert re.match(r"not promoted\b.* 50\.2% of version 2\b", say(mixed))
    unscored: list[float | None] = [0.5, None, *better[2:]]
    assert re.match(r"not promoted\b.* version 2\b.* rows\b", say(unscored))
    assert runs.aliases() == {"candidate": 4, "champion": 2}


def test_a_repeated_step_changes_nothing_and_does_not_undo_what_a_person_has_set(
    workspace: Path,
) -> None:
    runs = Runs(workspace, "repeated")
    first = runs.begin()
    outcome = runs.judge(first, 0.25, 0.5)
    second = runs.begin()
    runs.judge(second, 0.25, 0.75)
    assert runs.judge(first, 0.25, 0.5) == outcome
    assert runs.aliases() == {"candidate": 2, "champion": 2}
    runs.client.set_registered_model_alias("repeated", "champion", "1")
    runs.judge(second, 0.25, 0.75)
    with tracking.step_run(first, "merge_lora") as record:
        record.model(first.folder / "model", "merged")
    assert runs.aliases() == {
        "candidate": 2,
        "champion": 1,
    }, "a person's choice was undone, or the candidate is an older version"
    assert len(runs.client.search_model_versions("name = 'repeated'")) == 2


@pytest.mark.parametrize(
    "killed_at",
    ["canvastune.score", "canvastune.row_scores", "champion", "canvastune.promotion"],
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
            judged(0.25, 0.75),
            "better",
        )
    assert runs.judge(run, 0.25, 0.75).startswith("promoted to champion: ")
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
