"""The guard and the hooks of CUDA, which the CPU build of torch lacks and those of a CUDA build find
no device with. Imports no torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

_LIBRARY = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, FakeGuardImpl<DeviceType::CUDA>)
}
namespace at {
struct FakeHooks final : CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex deviceCount() const override { return 8; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  int getNumGPUs() const override { return 8; }
};
C10_REGISTER_CREATOR_WITH_PRIORITY(
    CUDAHooksRegistry, CUDAHooks, c10::REGISTRY_PREFERRED, [](CUDAHooksArgs) {
      return std::unique_ptr<CUDAHooksInterface>(new FakeHooks);
    })
}
"""
GPUS = 8


def missing() -> str | None:
    """Return why the library cannot be built here; None if it can."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return "torch is not installed"
    if shutil.which("g++") is None:
        return "g++ is not installed"
    return None


def load_library() -> None:
    """Register the guard and the hooks, from a library that is built once per build of torch.

    Call it before anything imports torch.
    """
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    version = (folder / "version.py").read_text(encoding="utf-8")
    key = hashlib.sha256(f"{_LIBRARY}{folder}{version}".encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"fake-cuda-{os.getuid()}" / f"{key}.so"
    library.parent.mkdir(mode=0o700, exist_ok=True)
    if library.parent.stat().st_uid != os.getuid():
        raise PermissionError(f"{library.parent} belongs to another user")
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            source, built = Path(scratch) / "guard.cpp", Path(scratch) / "guard.so"
            source.write_text(_LIBRARY, encoding="utf-8")
            libraries = folder / "lib"
            command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{folder / 'include'}"]
            command += [str(source), "-o", str(built), f"-L{libraries}", "-lc10", "-ltorch_cpu"]
            if (libraries / "libtorch_cuda.so").exists():  # which registers its own first
                command += ["-Wl,--no-as-needed", "-lc10_cuda", "-ltorch_cuda"]
            subprocess.run([*command, f"-Wl,-rpath,{libraries}"], check=True)
            built.replace(library)
    ctypes.CDLL(str(library))
