"""The table of accelerators, from the vendors' public datasheets.

Dense bfloat16 and float32 TFLOP/s (no sparsity, no TF32), memory in GB, memory bandwidth and links
in GB/s. `link` is what one GPU sends to others of its node, one way (half of the datasheets'
bidirectional figure); `network` is its share of the node's adapters.

- h100, h200: NVIDIA H100 and H200 Tensor Core GPU datasheets, SXM: 989 TFLOP/s (1,979 with
  sparsity), 67 in float32, NVLink 900 GB/s both ways; 80 GB at 3.35 TB/s, 141 GB at 4.8 TB/s. One
  400 Gb/s adapter per GPU (DGX H100 datasheet).
- a100: NVIDIA A100 80GB SXM datasheet: 312 TFLOP/s, 19.5 in float32, 2,039 GB/s, NVLink 600 GB/s;
  200 Gb/s adapters (DGX A100).
- b200: NVIDIA HGX B200 and DGX B200 datasheets, per GPU: 2.25 PFLOP/s (4.5 with sparsity), 75
  TFLOP/s in float32, 180 GB at 8 TB/s, NVLink 1.8 TB/s.
- l40s: NVIDIA L40S datasheet: 362 TFLOP/s (733 with sparsity), 91.6 in float32, 48 GB at 864 GB/s,
  PCIe 4.0 x16 at 64 GB/s.
- cpu: one core per rank of a server with AVX-512, measured: a 1,024-wide matmul, a large copy, gloo
  over loopback. Call overhead dominates the time of small models; it is not counted.

`host_link` is what a GPU writes to pinned host memory, in GB/s, over 16 lanes of PCIe:
- Gen 4 (a100, l40s): 25, as nvbandwidth measures on an A100 (NVIDIA/nvbandwidth#53, #42); Azure
  accepts its A100 nodes from 24 on (azurehpc-health-checks, nd96amsr_a100_v4.conf). Two GPUs behind
  one switch of PCIe, as in an HGX A100, copy at half of it when both do.
- Gen 5 (h100, h200, b200): 45, measured on eight H800 that copy at once; one copies at 55 (53 on an H100,
  NVIDIA/nvbandwidth#24). Azure accepts its H100 and H200 nodes from 48 on.
- cpu: half of `bandwidth`: a copy reads and writes.
Into pageable memory, PyTorch copies at a ninth of it (1.4 instead of 12.6, pytorch#138018).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from canvastune.errors import UserError
from canvastune.perf_model.architecture import FLOAT, Architecture
from canvastune.perf_model.launches import LAUNCH_SECONDS

# Of the peak, over a whole step: what well-tuned mixture-of-experts training reaches.
MATMUL_SHARE = 0.45
BANDWIDTH_SHARE = 0.8  # of memory bandwidth
LINK_SHARE = 0.7  # of a link
FRAGMENTATION = 0.04  # of the peak: what the allocator cannot reuse


@dataclass(frozen=True)
class Accelerator:
    """A row of the table."""

    title: str
    bfloat16: float  # TFLOP/s
    float32: float  # TFLOP/s
    memory: float | None  # GB; None: what the recipe says
    bandwidth: float  # GB/s
    link: float  # GB/s
    network: float  # GB/s
    host_link: float  # GB/s
    per_node: int
    outside: float  # GB outside the allocator: driver context, buffers of collectives
    launch: float = LAUNCH_SECONDS  # the host's seconds for one kernel
    # GB of interpreter and libraries, if memory is measured as that of the process.
    process: float = 0.0
    loops_over_experts: bool = False  # no kernel of torch's multiplies all experts at once

    def loops(self, architecture: Architecture) -> bool:
        """Return whether a grouped matmul is a loop over experts: in float32 it is on every GPU."""
        return self.launch > 0 and (self.loops_over_experts or architecture.compute_bytes == FLOAT)


ACCELERATORS = {
    "h100": Accelerator("NVIDIA H100 SXM", 989, 67, 80, 3350, 450, 50, 45, 8, 1.5),
    "h200": Accelerator("NVIDIA H200 SXM", 989, 67, 141, 4800, 450, 50, 45, 8, 1.5),
    "a100": Accelerator(
        "NVIDIA A100 80GB SXM",
        312,
        19.5,
        80,
        2039,
        300,
        25,
        25,
        8,
        1.5,
        loops_over_experts=True,
    ),
    "b200": Accelerator("NVIDIA B200", 2250, 75, 180, 8000, 900, 50, 45, 8, 1.5),
    "l40s": Accelerator(
        "NVIDIA L40S", 362, 91.6, 48, 864, 32, 12.5, 25, 8, 1.0, loops_over_experts=True
    ),
    "cpu": Accelerator(
        "CPU, one core per rank",
        0.2,
        0.094,
        None,
        20,
        1,
        1,
        10,
        1024,
        outside=0.0,
        launch=0.0,
        process=0.55,
    ),
}


def find_accelerator(name: str) -> Accelerator:
    """Look up an accelerator by its key.

    Raises:
        UserError: unknown key.
    """
    found = ACCELERATORS.get(name.lower())
    if found is None:
        close = difflib.get_close_matches(name.lower(), ACCELERATORS, n=1)
        raise UserError(
            f"hardware.accelerator: found {name!r}, expected one of {', '.join(ACCELERATORS)}",
            hint=f"Did you mean {close[0]!r}?" if close else "Choose one of these.",
        )
    return found


def accelerator_of(device: str) -> Accelerator | None:
    """Look up a CUDA device by the name that its driver reports.

    Returns None for a part of a GPU (MIG), a slower variant (PCIe, NVL) or any other device.
    """
    if re.search(r"\b(MIG|PCIe|NVL)\b", device, re.IGNORECASE):
        return None
    return next(
        (
            row
            for name, row in ACCELERATORS.items()
            if re.search(rf"\b{name}\b", device, re.IGNORECASE)
        ),
        None,
    )


def peak_rate(architecture: Architecture, accelerator: Accelerator) -> float:
    """Return the FLOP/s of a matmul in the compute dtype."""
    return (accelerator.bfloat16 if architecture.compute_bytes == 2 else accelerator.float32) * 1e12
