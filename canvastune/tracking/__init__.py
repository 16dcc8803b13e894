"""metrics.jsonl first, MLflow behind it: what a run did is in its own files, and MLflow gets to know when it can.

Nothing in this room raises into a step because of MLflow, and nothing waits long for it; each kind of problem is said once.
What MLflow does not take waits in the run's folder, and is sent by a later step, or by `sync`.
"""

from canvastune.tracking.contents import StepRun
from canvastune.tracking.ids import PipelineRun
from canvastune.tracking.metrics import MetricsWriter
from canvastune.tracking.records import read_metrics
from canvastune.tracking.runs import finish, log_data, start, step_run, sync, training_run
from canvastune.tracking.sending import FindRun
from canvastune.tracking.server import tracking_uri

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
