"""`python -m benchmarks.saving [--gb 2]`: training while a checkpoint is written.

One rank saves a state in the background, with torch's own writer of safetensors shards and with
ours, while this thread computes small steps. Writes benchmarks/results/saving.json.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from benchmarks.instruments.ranks import run_ranks
from benchmarks.measure import command_parser, say, work_folder, write_result
from canvastune.checkpoint.resume import Checkpoints
from canvastune.config import parse_config

FILE_BYTES = 2**30
STEP_SECONDS = 0.005


def main() -> int:
    parser = command_parser("saving", __doc__)
    parser.add_argument("--gb", type=float, default=2.0, help="size of the state, 1e9 bytes")
    gigabytes = parser.parse_args().gb
    with work_folder("saving", None, 2.2 * gigabytes) as work:
        run_ranks(_measure, 1, work, gigabytes)
        result = json.loads((work / "result.json").read_text(encoding="utf-8"))
    write_result("saving", result)
    print(json.dumps(result, indent=2))
    return 0


def _measure(work: Path, gigabytes: float) -> None:
    tensors = round(gigabytes * 1e9 / 2**26)
    state = {f"w{index}": nn.Parameter(torch.full((2**24,), 1.0)) for index in range(tensors)}
    config = parse_config({"name": "saving", "model": {"id": "."}, "data": {"source": "none"}})
    checkpoints = Checkpoints(work / "ours", config, "none")

    def torch_writer() -> Future[Any]:
        files = {name: 1 + index * 2**26 // FILE_BYTES for index, name in enumerate(state)}
        writer = dcp.HuggingFaceStorageWriter(str(work / "torch"), files, save_distributed=True)
        saving = dcp.async_save(
            {name: value.data for name, value in state.items()}, storage_writer=writer
        )
        assert isinstance(saving, Future)
        return saving

    def ours() -> Future[Any]:
        checkpoints.save(1, state, None, {"validation": None})
        return ThreadPoolExecutor(1).submit(checkpoints.wait)

    result: dict[str, Any] = {"bytes": tensors * 2**26}
    for name, save in (("torch", torch_writer), ("ours", ours)):
        say("saving", name)
        result[name] = _beside(save)
    checkpoints.close()
    dist.barrier()
    (work / "result.json").write_text(json.dumps(result), encoding="utf-8")


def _beside(save: Callable[[], Future[Any]]) -> dict[str, float]:
    """Compute steps while a state is saved; return what the save took from them.

    Returns:
        Seconds: until the call returned, until the state was written, of the longest pause between
        two steps, and of all pauses longer than two steps.
    """
    started = time.perf_counter()
    saving = save()
    returned = last = time.perf_counter()
    pauses = []
    while not saving.done():
        time.sleep(STEP_SECONDS)  # as a thread that waits for a GPU
        now = time.perf_counter()
        pauses.append(now - last)
        last = now
    saving.result()
    return {
        "returned": returned - started,
        "seconds": last - started,
        "longest_pause": max(pauses),
        "paused": sum(pause for pause in pauses if pause > 2 * STEP_SECONDS),
    }


if __name__ == "__main__":
    sys.exit(main())
