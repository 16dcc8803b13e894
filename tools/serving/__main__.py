"""Try a tiny run's model with real servers on this CPU.

Each is installed into a separate environment, once. `mlx` and `transformers` start by `canvastune
serve --run`, as their user starts them, and are asked the held-out questions of the run's evaluation
over HTTP by the `openai` client: exact match has to be that of the evaluation, but for chance. vLLM
answers only on a GPU; `vllm` has its own loader set every parameter of the model, and compares them
with the file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tools.serving import openai_servers, vllm_loading
from tools.serving.environment import Run, tiny_run

CHECKS: Mapping[str, Callable[[Run], bool]] = {
    "mlx": lambda run: openai_servers.check("mlx", run),
    "transformers": lambda run: openai_servers.check("transformers", run),
    "vllm": vllm_loading.check,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check each backend; return 0 if all of them do as docs/serving.md says."""
    parser = argparse.ArgumentParser("python -m tools.serving", description=__doc__)
    parser.add_argument(
        "backends", nargs="*", metavar="BACKEND", help=f"{', '.join(CHECKS)} (default: mlx)"
    )
    parser.add_argument(
        "--run",
        type=Path,
        metavar="DIR",
        help="a finished run with an evaluation (default: the newest tiny one, made if there is none)",
    )
    options = parser.parse_args(arguments)
    backends = options.backends or ["mlx"]
    if unknown := set(backends) - CHECKS.keys():
        parser.error(f"found {', '.join(sorted(unknown))}, expected some of {', '.join(CHECKS)}")
    run = Run.read(options.run or tiny_run())
    passed = [CHECKS[backend](run) for backend in backends]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
