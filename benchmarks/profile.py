"""Where a step's time goes: its operators by their own time on the device, and how much of the step
the device was busy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import timed

LARGEST = 5


def largest_costs(run: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Profile one call of `run`, which was called before.

    Returns:
        `seconds` with the profiler on, `busy_seconds` of the device, and `costs`, the operators
        that take most of the latter: each its
        own time and share, how often it was called, and the shapes of its inputs that take most of
        its time.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, record_shapes=True) as found:
        seconds = timed(run)
    by_name: dict[str, list[tuple[float, int, list[Any]]]] = defaultdict(list)
    for event in found.key_averages(group_by_input_shape=True):
        if (
            event.device_type == DeviceType.CPU
        ):  # the operators: a GPU's kernels are their time, and would count twice
            own = event.self_device_time_total if cuda else event.self_cpu_time_total
            by_name[event.key].append((own / 1e6, event.count, event.input_shapes))
    totals = {name: sum(own for own, _, _ in calls) for name, calls in by_name.items()}
    busy = sum(totals.values())
    return {
        "seconds": seconds,
        "busy_seconds": busy,
        "costs": [
            {
                "name": name,
                "seconds": totals[name],
                "share": totals[name] / busy,
                "calls": sum(count for _, count, _ in by_name[name]),
                "shapes": max(by_name[name], key=lambda call: call[0])[2],
            }
            for name in sorted(totals, key=lambda name: -totals[name])[:LARGEST]
        ],
    }


def costs_table(found: dict[str, Any]) -> str:
    """Return the costs as text, one per line."""
    lines = [f"  {'operator':<60} {'ms':>9} {'share':>6} {'calls':>6}  largest inputs"]
    lines += [
        f"  {cost['name'][:60]:<60} {cost['seconds'] * 1e3:>9.2f} {cost['share']:>6.1%}"
        f" {cost['calls']:>6}  {_shapes(cost['shapes'])}"
        for cost in found["costs"]
    ]
    lines.append(
        f"  busy for {found['busy_seconds']:.3f} s of {found['seconds']:.3f} s, the profiler included"
    )
    return "\n".join(lines)


def _shapes(shapes: list[Any]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes if shape)[:60]
