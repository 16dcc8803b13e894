"""Starts the training processes of a run, shows what they say, and tells why they failed. They run here, under torchrun."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from canvastune.config import RunConfig, write_config
from canvastune.errors import UserError
from canvastune.tracking import StepRun, log_data
from components.run_folder import workspace_of
from components.step import error_in

_LAST_LINES = 50
_STOPPED = 3  # exit code of a rank that saved its state because it was asked to stop
_FAREWELL = 10  # seconds beyond the ranks' grace in which torchrun itself ends
_FIRST_RANK = "[default0]:"  # torchrun's mark on what the first rank says; the rest is its own
_ROOT_CAUSE = re.compile(r"Root Cause.*?rank\s*: (\d+).*?exitcode\s*: (-?\d+)", re.DOTALL)  # of its summary of a failure


def train(config: RunConfig, dataset: Path | None, output: Path, record: StepRun) -> Path:
    """Train in `parallel.nproc_per_node` processes on this machine; returns the folder of the trained weights.

    Args:
        dataset: a prepared data set; None: the trainer prepares its own.
        output: the training run's folder. Checkpoints that stand there are resumed from, and a finished run is kept as it is.
        record: the step's run in MLflow, which gets the metrics and the adapter.

    Raises:
        UserError: training failed; its words are the failing rank's last ones.
    """
    output.mkdir(parents=True, exist_ok=True)
    if dataset is not None:
        log_data(config, record.parent, dataset, workspace=workspace_of(output.parent))
        record.dataset(dataset, "training")
    write_config(config, output / "recipe.yaml")
    logs = Path(tempfile.mkdtemp(prefix="logs-", dir=output))
    processes = config.parallel.nproc_per_node
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [f"--shutdown-timeout={config.train.stop_grace}"]  # torchrun kills the ranks of a stopped run after that, by default 30 s
    command += [f"--log-dir={logs}", "--redirects=3", "--tee=0:3"]  # every rank's words on disk, the first one's shown as well
    command += ["-m", "canvastune.train", "-c", str(output / "recipe.yaml"), "--output", str(output)]
    command += ["--data", str(dataset)] if dataset else []
    command += ["--mlflow-run", record.run_id] if record.run_id else []
    # torchrun would set one thread, whatever the machine has.
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)), **os.environ, **record.environment()}
    own_words: list[str] = []
    with _running(command, environment, config.train.stop_grace + _FAREWELL) as torchrun:
        for line in torchrun.stdout or ():
            if line.startswith(_FIRST_RANK):
                print(line.removeprefix(_FIRST_RANK), end="", flush=True)
            else:
                own_words.append(line)
    if torchrun.returncode:
        raise UserError(_why(torchrun.returncode, "".join(own_words), logs))
    shutil.rmtree(logs)
    weights = output / json.loads((output / "result.json").read_text(encoding="utf-8"))["export"]
    record.training_metrics(output / "metrics.jsonl")
    record.outputs(output)
    record.model(weights, "adapter" if config.train.method == "lora" else "full")
    return weights


@contextlib.contextmanager
def _running(command: list[str], environment: dict[str, str], grace: float) -> Iterator[subprocess.Popen[str]]:
    """A child that ends before we do, and whose children do: asked to by one SIGTERM, and killed if they do not in `grace` seconds."""
    # In a session of its own: Ctrl-C reaches us alone, since torchrun loses its children if a second signal interrupts its farewell.
    child = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1, start_new_session=True
    )
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield child
        child.wait()
    except BaseException:  # also a closed pipe: Kubeflow's local runner stops listening before it asks anyone to stop
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(grace)
        raise
    finally:
        if child.poll() is None:
            for process in [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]:
                process.kill()
            child.wait()
        if child.stdout is not None:
            child.stdout.close()
        signal.signal(signal.SIGTERM, before)


def _why(code: int, torchrun: str, logs: Path) -> str:
    """The reason of a failure: a rank's own error if there is one, else the last lines of the rank that failed first."""
    said = {int(file.parent.name): file.read_text(encoding="utf-8", errors="replace") for file in logs.rglob("attempt_0/*/stderr.log")}
    for rank in sorted(said):
        reason = error_in(said[rank])
        if reason is not None:
            return reason
    cause = _ROOT_CAUSE.search(torchrun)
    if cause is None:
        return f"torchrun ended with exit code {code}:\n" + _tail(torchrun)
    rank, exit_code = int(cause[1]), int(cause[2])
    if exit_code == _STOPPED:
        return "training was asked to stop, and its state is saved: the same run goes on from there"
    return f"rank {rank} ended with exit code {exit_code}; its last lines:\n{_tail(said.get(rank, ''))}\nEvery rank's output: {logs}"


def _tail(text: str) -> str:
    return "\n".join(text.rstrip().splitlines()[-_LAST_LINES:])
