"""metrics.jsonl first, MLflow behind it: what a run did is in its own files, and MLflow gets to know when it can.

Nothing in this room raises into a step because of MLflow, and nothing waits long for it; each kind of problem is said once.
"""

from canvastune.tracking.contents import StepRun
from canvastune.tracking.metrics import MetricsWriter
from canvastune.tracking.records import read_metrics
from canvastune.tracking.runs import finish_parent, log_data, start_parent, step_run
from canvastune.tracking.sending import sync_metrics
from canvastune.tracking.server import tracking_uri

__all__ = [
    "MetricsWriter",
    "StepRun",
    "finish_parent",
    "log_data",
    "read_metrics",
    "start_parent",
    "step_run",
    "sync_metrics",
    "tracking_uri",
]
