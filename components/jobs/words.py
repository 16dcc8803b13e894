"""What the training processes say, and the reason of a failure found in it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from components.step import error_in

LAST_LINES = 50
_STOPPED = 3  # exit code of a rank that saved its state because it was asked to stop
_ROOT_CAUSE = re.compile(r"Root Cause.*?rank\s*: (\d+).*?exitcode\s*: (-?\d+)", re.DOTALL)  # of torchrun's summary of a failure


def why(code: int, torchrun: str, said: Mapping[int, str]) -> str:
    """The reason of a failure: a rank's own error if there is one, else the last lines of the rank that failed first.

    Args:
        code: torchrun's exit code.
        torchrun: what it said itself.
        said: what each rank said.
    """
    for rank in sorted(said):
        reason = error_in(said[rank])
        if reason is not None:
            return reason
    cause = _ROOT_CAUSE.search(torchrun)
    if cause is None:
        return f"torchrun ended with exit code {code}:\n" + tail(torchrun or "\n".join(said.values()))
    rank, exit_code = int(cause[1]), int(cause[2])
    if exit_code == _STOPPED:
        return "training was asked to stop, and its state is saved: the same run goes on from there"
    return f"rank {rank} ended with exit code {exit_code}; its last lines:\n{tail(said.get(rank, ''))}"


def tail(text: str) -> str:
    """The last lines."""
    return "\n".join(text.rstrip().splitlines()[-LAST_LINES:])
