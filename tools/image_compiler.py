"""Have Triton build its launcher with an image's C compiler; run by `tools.images` in the image.

A library without symbols stands in for the driver's, which is on machines with a GPU only.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path

NAME = "libcuda.so.1"


def main() -> None:
    """Build and load the launcher; print what did it."""
    with tempfile.TemporaryDirectory() as folder:
        driver = Path(folder) / NAME
        empty = ("-shared", f"-Wl,-soname,{NAME}", "-x", "c", "/dev/null", "-o", str(driver))
        subprocess.run(["gcc", *empty], check=True)
        ctypes.CDLL(str(driver))
        os.environ["TRITON_LIBCUDA_PATH"] = folder
        sys.setdlopenflags(os.RTLD_LAZY)  # the driver's functions are not called
        import torch
        import triton
        from triton.backends.nvidia.driver import CudaUtils

        assert callable(CudaUtils().launch)
    compiler = subprocess.run(
        ["gcc", "-dumpfullversion"], stdout=subprocess.PIPE, text=True, check=True
    )
    assert torch.version.cuda is not None
    print(
        f"Python {sys.version.split()[0]}, torch {torch.__version__} for CUDA {torch.version.cuda}, "
        f"Triton {triton.__version__}, gcc {compiler.stdout.strip()}"
    )


if __name__ == "__main__":
    main()
