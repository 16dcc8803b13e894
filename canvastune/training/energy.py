"""The energy that GPUs take while they train, by NVML's counter of each board."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
import torch.distributed as dist

from canvastune.distributed.sync import gather_results

logger = logging.getLogger(__name__)

ReadJoules = Callable[[], float]


class CounterError(Exception):
    """A GPU's energy cannot be read; the message says why."""


class EnergyMeter:
    """Measure what the GPUs of all ranks take; every rank makes one at the same time.

    If one rank cannot measure, none does: a sum over some of the ranks would be too low.
    """

    def __init__(self, device: torch.device) -> None:
        self._read: ReadJoules | None = None
        self._last = 0.0
        self.place: dict[str, str] = {}  # what records say of why the GPUs are not measured
        self._measures = device.type != "cpu"
        if not self._measures:
            return
        reason = ""
        try:
            self._read = open_counter(device)
            self._last = self._read()
        except CounterError as error:
            reason = str(error)
        reasons = gather_results(lambda: reason)
        if any(reasons):
            self._measures, self._read = False, None
            self.place = {"energy_unmeasured": next(filter(None, reasons))}
            if dist.get_rank() == 0:
                why = self.place["energy_unmeasured"]
                logger.warning(f"canvastune: the GPUs' energy is not measured: {why}")

    def joules(self) -> float:
        """Return what this rank's GPU took since the last call; NaN: that is not known."""
        if self._read is None:
            return math.nan
        try:
            now = self._read()
        except CounterError as error:  # as of a GPU that fell off the bus; training may continue
            logger.warning(f"canvastune: the GPUs' energy is no longer measured: {error}")
            self._read = None
            return math.nan
        taken, self._last = now - self._last, now
        return taken if taken >= 0 else math.nan  # the driver was loaded again

    def field(self, joules: float) -> dict[str, float]:
        """Return what a record says of the energy that all ranks took; nothing if none measures."""
        return {"energy_joules": joules} if self._measures else {}


def open_counter(device: torch.device) -> ReadJoules:
    """Return what reads a GPU's counter: joules since its driver was loaded, of all its processes.

    Raises:
        CounterError: no nvidia-ml-py, no NVIDIA driver, or a GPU without a counter, as before Volta
            or a MIG slice. The returned function raises it, too.
    """
    try:
        import pynvml
    except ImportError:
        raise CounterError("the package nvidia-ml-py is not installed") from None
    try:
        pynvml.nvmlInit()
        # By id: torch numbers the GPUs that CUDA_VISIBLE_DEVICES leaves, NVML all of the machine.
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError as error:
        raise CounterError(f"NVML: {error}") from error

    def read() -> float:
        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000
        except pynvml.NVMLError as error:
            raise CounterError(f"NVML: {error}") from error

    return read
