"""What a person sees while training: a bar on a terminal, a line per log interval everywhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingProgress:
    """Lines on standard error, with a bar below them where that is a terminal. On the first rank only."""

    def __init__(self, steps: int, log_every: int) -> None:
        self._steps, self._log_every = steps, log_every
        self._started, self._first_step = time.monotonic(), None
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("training", total=steps)
            self._bar.start()

    def show(self, record: dict[str, Any]) -> None:
        """Print a record of metrics.jsonl where it is due."""
        step = record["step"]
        if record["kind"] == "train":
            if self._first_step is None:
                self._first_step, self._started = step - 1, time.monotonic() - record["seconds"]
            if self._bar is not None:
                self._bar.update(self._task, completed=step)
            if step == 1 or step % self._log_every == 0 or step == self._steps:
                self._print(
                    f"step {step:>{len(str(self._steps))}}/{self._steps}  loss {record['loss']:.4f}  "
                    f"diffusion {record['diffusion_loss']:.4f}  autoregressive {record['autoregressive_loss']:.4f}  "
                    f"grad norm {record['grad_norm']:.3g}  lr {record['lr']:.3g}  "
                    f"{record['tokens_per_second']:,.0f} tokens/s  {self._left(step)}"
                )
        elif record["kind"] == "validation":
            levels = "  ".join(f"t={level} {loss:.4f}" for level, loss in record["levels"].items())
            self._print(f"step {step}: validation loss {record['loss']:.4f}  ({levels})")
        elif record["event"] != "checkpoint" or record["detail"]:
            self._print(f"step {step}: {record['event']} {record['detail']}".rstrip())

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()

    def _left(self, step: int) -> str:
        seconds = (time.monotonic() - self._started) / (step - (self._first_step or 0)) * (self._steps - step)
        return f"{int(seconds // 60)}:{int(seconds % 60):02d} left"

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False)
