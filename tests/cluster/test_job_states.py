"""A status maps to its state: one test per row of the launcher's table, for both kinds of job."""

from __future__ import annotations

from typing import Any

import pytest

from components.jobs.states import TRANSITIONS, Action, State, transition_for


def _conditions(*types: str) -> dict[str, Any]:
    return {"conditions": [{"type": name, "status": "True"} for name in types]}


def _counted(**counts: int) -> dict[str, Any]:
    return {"jobsStatus": [{"name": "node", **counts}]}


_TABLE: dict[State, tuple[dict[str, Any], dict[str, Any]]] = {
    State.CREATED: ({}, {}),
    State.QUEUED: (_conditions("Created", "Suspended"), _conditions("Suspended")),
    State.PENDING: (_conditions("Created"), _counted(active=1)),
    State.RUNNING: (_conditions("Created", "Running"), _counted(active=1, ready=1)),
    State.RESTARTING: (_conditions("Created", "Restarting"), _counted(active=1, failed=1)),
    State.SUCCEEDED: (_conditions("Created", "Succeeded"), _conditions("Complete")),
    State.FAILED: (_conditions("Created", "Running", "Failed"), _conditions("Failed")),
    State.UNKNOWN: (_conditions("Dreaming"), _conditions("Dreaming")),
}
_ACTIONS = {
    State.CREATED: Action.WAIT_FOR_PODS,
    State.QUEUED: Action.WAIT_FOR_PODS,
    State.PENDING: Action.WAIT_FOR_PODS,
    State.RESTARTING: Action.WAIT_FOR_PODS,
    State.UNKNOWN: Action.WAIT_FOR_PODS,
    State.RUNNING: Action.WAIT_FOR_END,
    State.SUCCEEDED: Action.COLLECT_RESULT,
    State.FAILED: Action.EXPLAIN_FAILURE,
    State.DELETED: Action.REPORT_DELETED,
}


@pytest.mark.parametrize("which", [0, 1], ids=["pytorchjob", "trainjob"])
@pytest.mark.parametrize("state", _TABLE)
def test_a_status_maps_to_its_state(state: State, which: int) -> None:
    row = transition_for(
        {"metadata": {"uid": "1"}, "spec": {}, "status": _TABLE[state][which]}, "1"
    )
    assert (row.state, row.action) == (state, _ACTIONS[state])


def test_a_job_that_is_missing_or_replaced_counts_as_deleted() -> None:
    assert transition_for(None).state is State.DELETED
    assert (
        transition_for({"metadata": {"uid": "2"}, "spec": {}}, "1").action is Action.REPORT_DELETED
    )


def test_every_state_has_a_row_and_a_test() -> None:
    assert {row.state for row in TRANSITIONS} == set(State) == set(_ACTIONS)
