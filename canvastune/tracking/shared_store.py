"""Open an embedded store once, in a process that is forked for those that use it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from canvastune.tracking.client import TrackingError, connect, database_file, is_plain_file
from canvastune.tracking.mlmodel import requirements

if TYPE_CHECKING:
    from mlflow import MlflowClient

STORE = "CANVASTUNE_STORE"  # in the steps of a run on this machine: its embedded store


def open_for_forks(uri: str) -> bool:
    """Do what MLflow does once in a process that uses a store; return whether the store is there.

    A fork gets the client, the schema that was checked and the queries that were compiled. No
    connection is left open: a fork cannot use its parent's.
    """
    if not is_plain_file(uri) or not database_file(uri).is_file():
        return False
    try:
        connect(uri).request(_ask)
    except TrackingError:
        connect.cache_clear()  # a fork finds out by itself what is wrong
        return False
    finally:
        _close_connections()
    return True


def list_packages_for_forks() -> None:
    """List the installed packages, as MLflow does when a process describes its first model."""
    from mlflow.utils.requirements_utils import warn_dependency_requirement_mismatches

    warn_dependency_requirement_mismatches(requirements())


def _ask(client: MlflowClient) -> None:
    """Ask what a step asks first."""
    client.search_registered_models(max_results=1)
    experiments = [each.experiment_id for each in client.search_experiments()]
    query, order = "tags.`a` = 'b' and tags.`c` = 'd'", ["attributes.start_time ASC"]
    client.search_runs(experiments, query, max_results=1, order_by=order)
    for run in client.search_runs(experiments, max_results=1):
        client.get_run(run.info.run_id)


def _close_connections() -> None:
    from mlflow.store.model_registry import sqlalchemy_store as registry
    from mlflow.store.tracking import sqlalchemy_store as tracking

    for store in (registry.SqlAlchemyStore, tracking.SqlAlchemyStore):
        for engine in store._engine_map.values():
            engine.dispose()
