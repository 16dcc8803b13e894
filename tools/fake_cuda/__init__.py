"""A process with eight H100 on a machine that has none: fake tensors on `cuda`, and an account of
what the real device would be asked.

The wheels of torch, for the CPU and for CUDA, carry fake CUDA tensors through autograd (with a
device thread), FSDP2, checkpointing and DTensor once a library of 30 lines registers a device guard
and hooks that have eight devices. Tensors on `cuda` then have shapes, strides, types and devices,
but neither memory nor values. What is real is everything that the host does: the engine, FSDP's
hooks and streams, autograd, and every check of the operators' meta kernels. Integers do have values
(routing, sizes), made up where they come from fake floats, so that ragged splits are what they would be.

Counted, by line of the engine: waits of the host for the device, kernels that calls launch,
attention calls by the backend that the CUDA wheel takes, calls that the CUDA build compiles just in
time, collectives, live bytes. `tools.gpu_dry_run` runs training steps on it.

Import this package before torch, and call `pretend()` before the engine asks for devices.
"""

from __future__ import annotations

import sys

from tools.fake_cuda.library import GPUS, load_library, missing

if "torch" not in sys.modules:
    load_library()

from tools.fake_cuda.device import FakeDevice
from tools.fake_cuda.stand_ins import pretend

__all__ = ["GPUS", "FakeDevice", "load_library", "missing", "pretend"]
