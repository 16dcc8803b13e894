"""Create or migrate MLflow's database before the server starts. In a new one, describe the default
experiment.
"""

import os

import mlflow.db
from mlflow.entities import ExperimentTag
from mlflow.store.db.utils import create_sqlalchemy_engine_with_retry
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from sqlalchemy import inspect

uri = os.environ["MLFLOW_BACKEND_STORE_URI"]  # not in a command line: it may hold a password
new = not inspect(create_sqlalchemy_engine_with_retry(uri)).get_table_names()
mlflow.db.upgrade.callback(uri)
if new:
    note = (
        "Runs of programs that name no experiment appear here. Canvastune's are in the experiment "
        "`canvastune`, or the one that a recipe names as `tracking.experiment`."
    )
    # The artifact root is that of the server with --serve-artifacts.
    store = SqlAlchemyStore(uri, "mlflow-artifacts:/")
    store.set_experiment_tag(
        store.DEFAULT_EXPERIMENT_ID, ExperimentTag("mlflow.note.content", note)
    )
