"""The backend that `scaled_dot_product_attention` takes in the locked CUDA wheel, on sm_90.

The rules were read in that wheel (the selector's disassembly and the headers it ships) and hold for
it only: `WHEEL` is its hash in docker/requirements-torch-cuda.txt, and a test fails for any other,
until the rules have been read again:

- on sm_90 with cuDNN above 9.15 (the wheel has 9.20) the order is cuDNN, flash, efficient, math;
- cuDNN takes half types with head sizes up to 256, masks and grouped heads, and more than one key.
  It compiles a plan per shape and stride;
- flash takes half types with head sizes up to 256 and grouped heads, but no mask, and causal calls
  only with as many queries as keys;
- efficient takes any type, any head size that is a multiple of 8, and masks, but no grouped heads, whether
  keys are repeated by `enable_gqa` or not;
- math takes everything, in float32, with keys repeated and every score in memory.
"""

from __future__ import annotations

from typing import Any

import torch

VERSION = "2.13.0"
# torch-2.13.0-cp312-cp312-manylinux_2_28_x86_64.whl
WHEEL = "sha256:796633c4"
_WIDEST = 256  # head size


def backend_of(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, causal: bool, gqa: bool
) -> tuple[str, str]:
    """Return the backend of a call, and why it is not a faster one."""
    width = max(query.shape[-1], value.shape[-1])
    grouped = query.shape[-3] != key.shape[-3]
    half = query.dtype in (torch.float16, torch.bfloat16)
    aligned = width % 8 == 0 and all(t.stride(-1) == 1 for t in (query, key, value))
    heads = not grouped or (gqa and query.shape[-3] % key.shape[-3] == 0)
    enabled, reasons = torch.backends.cuda, []
    wide = f"head size {width} > {_WIDEST}" if width > _WIDEST else ""
    fits = half and aligned and heads and not wide
    if enabled.cudnn_sdp_enabled() and fits and key.shape[-2] > 1:
        return "cudnn", ""
    reasons.append(f"cudnn: {wide or ('one key' if key.shape[-2] == 1 else 'off, type or heads')}")
    square = not causal or query.shape[-2] == key.shape[-2]
    if enabled.flash_sdp_enabled() and fits and mask is None and square:
        return "flash", "; ".join(reasons)
    reasons.append(f"flash: {wide or ('mask' if mask is not None else 'off, type or heads')}")
    if enabled.mem_efficient_sdp_enabled() and aligned and not grouped:
        return "efficient", "; ".join(reasons)
    reasons.append(f"efficient: {'grouped heads' if grouped else 'off, type or head size'}")
    return "math", "; ".join(reasons)
