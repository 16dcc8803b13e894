"""A status is read as its state: one test per row of the launcher's table, for both kinds of job."""

from __future__ import annotations

from typing import Any

import pytest

from components.jobs.states import ROWS, Action, State, transition_for


def _true(*types: str) -> dict[str, Any]:
    return {"conditions": [{"type": name, "status": "True"} for name in types]}


def _counted(**counts: int) -> dict[str, Any]:
    return {"jobsStatus": [{"name": "node", **counts}]}


_TABLE: dict[State, tuple[dict[str, Any], dict[str, Any]]] = {
    State.CREATED: ({}, {}),
    State.QUEUED: (_true("Created", "Suspended"), _true("Suspended")),
    State.PENDING: (_true("Created"), _counted(active=1)),
    State.RUNNING: (_true("Created", "Running"), _counted(active=1, ready=1)),
    State.RESTARTING: (_true("Created", "Restarting"), _counted(active=1, failed=1)),
    State.SUCCEEDED: (_true("Created", "Succeeded"), _true("Complete")),
    State.FAILED: (_true("Created", "Running", "Failed"), _true("Failed")),
    State.UNKNOWN: (_true("Dreaming"), _true("Dreaming")),
}
_DOES = {
    State.CREATED: Action.WAIT_FOR_PODS,
    State.QUEUED: Action.WAIT_FOR_PODS,
    State.PENDING: Action.WAIT_FOR_PODS,
    State.RESTARTING: Action.WAIT_FOR_PODS,
    State.UNKNOWN: Action.WAIT_FOR_PODS,
    State.RUNNING: Action.WAIT_FOR_END,
    State.SUCCEEDED: Action.TAKE_RESULT,
    State.FAILED: Action.EXPLAIN,
    State.DELETED: Action.SAY_DELETED,
}


@pytest.mark.parametrize("which", [0, 1], ids=["pytorchjob", "trainjob"])
@pytest.mark.parametrize("state", _TABLE)
def test_a_status_is_read_as_its_state(state: State, which: int) -> None:
    row = transition_for({"metadata": {"uid": "1"}, "spec": {}, "status": _TABLE[state][which]}, "1")
    assert (row.state, row.then) == (state, _DOES[state])


def test_a_job_that_is_gone_or_replaced_is_deleted() -> None:
    assert transition_for(None).state is State.DELETED
    assert transition_for({"metadata": {"uid": "2"}, "spec": {}}, "1").then is Action.SAY_DELETED


def test_every_state_has_a_row_and_a_test() -> None:
    assert {row.state for row in ROWS} == set(State) == set(_DOES)
