"""The training processes in the step's own container, under torchrun."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from canvastune.config import RunConfig
from canvastune.errors import UserError
from components.jobs.pod_diagnostics import failure_reason

_FAREWELL = 10  # seconds beyond the ranks' grace in which torchrun itself ends
_FIRST_RANK = "[default0]:"  # torchrun's mark on what the first rank says; the rest is its own


def run(config: RunConfig, dataset: Path | None, output: Path, mlflow: Sequence[str], environment: Mapping[str, str]) -> None:
    """Train in `parallel.nproc_per_node` processes on this machine, and pass on what the first one says.

    Args:
        output: the training run's folder, with the config as recipe.yaml.
        mlflow: arguments that name the run that gets the metrics.
        environment: variables that say where MLflow is.

    Raises:
        UserError: training failed; its words are the failing rank's last ones.
    """
    logs = Path(tempfile.mkdtemp(prefix="logs-", dir=output))
    processes = config.parallel.nproc_per_node
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [f"--shutdown-timeout={config.train.stop_grace}"]  # torchrun kills the ranks of a stopped run after that, by default 30 s
    command += [f"--log-dir={logs}", "--redirects=3", "--tee=0:3"]  # every rank's words on disk, the first one's shown as well
    command += ["-m", "canvastune.train", "-c", str(output / "recipe.yaml"), "--output", str(output)]
    command += ["--data", str(dataset)] if dataset else []
    command += mlflow
    # torchrun would set one thread, whatever the machine has.
    everything = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)), **os.environ, **environment}
    own_words: list[str] = []
    with _running(command, everything, config.train.stop_grace + _FAREWELL) as torchrun:
        for line in torchrun.stdout or ():
            if line.startswith(_FIRST_RANK):
                print(line.removeprefix(_FIRST_RANK), end="", flush=True)
            else:
                own_words.append(line)
    if torchrun.returncode:
        raise UserError(_why(torchrun.returncode, "".join(own_words), logs))
    shutil.rmtree(logs)


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
    said: dict[int, str] = {}
    for file in sorted(logs.rglob("attempt_0/*/std*.log"), reverse=True):  # JSON events are on standard output, text on standard error
        rank = int(file.parent.name)
        said[rank] = said.get(rank, "") + file.read_text(encoding="utf-8", errors="replace")
    reason = failure_reason(code, torchrun, said)
    return f"{reason}\nEvery rank's output: {logs}" if reason.startswith("rank ") else reason
