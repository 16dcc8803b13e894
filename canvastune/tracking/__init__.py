"""metrics.jsonl first, MLflow behind it: what a run did is in its own files, and MLflow gets to know when it can.

Nothing in this room raises into a step because of MLflow, and nothing waits long for it; each kind of problem is said once.
What MLflow does not take waits in the run's folder, and is sent by a later step, or by `sync`.
"""

from canvastune.tracking.client import tracking_uri
from canvastune.tracking.contents import StepRun
from canvastune.tracking.lifecycle import finish, log_data, start, step_run, sync, training_run
from canvastune.tracking.metrics_file import MetricsWriter
from canvastune.tracking.records import read_metrics
from canvastune.tracking.run_lookup import PipelineRun
from canvastune.tracking.sending import FindRun

__all__ = [
    "FindRun",
    "MetricsWriter",
    "PipelineRun",
    "StepRun",
    "finish",
    "log_data",
    "read_metrics",
    "start",
    "step_run",
    "sync",
    "tracking_uri",
    "training_run",
]
