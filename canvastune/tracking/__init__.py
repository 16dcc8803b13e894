"""metrics.jsonl and steps.json first, MLflow second: it shows what the run directory holds.

Nothing here raises into a step because of MLflow, and nothing waits long for it; each kind of
problem is logged once. What MLflow lacks is sent by a later step, or by `canvastune sync`.
"""

from canvastune.tracking.client import tracking_uri
from canvastune.tracking.lifecycle import (
    StepRun,
    finish,
    log_data,
    pending,
    run_id,
    run_page,
    start,
    step_run,
    sync,
    training_run,
)
from canvastune.tracking.live_metrics import FindRun, open_metrics
from canvastune.tracking.metrics_file import MetricsWriter, lost_energy, mean_by_block, read_metrics
from canvastune.tracking.run_lookup import PipelineRun
from canvastune.tracking.steps import Step

__all__ = [
    "FindRun",
    "MetricsWriter",
    "PipelineRun",
    "Step",
    "StepRun",
    "finish",
    "log_data",
    "lost_energy",
    "mean_by_block",
    "open_metrics",
    "pending",
    "read_metrics",
    "run_id",
    "run_page",
    "start",
    "step_run",
    "sync",
    "tracking_uri",
    "training_run",
]
