"""A process with eight H100 on a machine that has none: fake tensors on `cuda`, and an account of
what the real device would be asked.

The CPU wheel of torch carries fake CUDA tensors through autograd (with a device thread), FSDP2,
checkpointing and DTensor once a library of 30 lines registers a device guard and the hooks of a
CUDA build. Tensors on `cuda` then have shapes, strides, types and devices, but neither memory nor
values. What is real is everything that the host does: the engine, FSDP's hooks and streams,
autograd, and every check of the operators' meta kernels. Integers do have values (routing, sizes),
made up where they come from fake floats, so that ragged splits are what they would be.

Counted, by line of the engine: waits of the host for the device, kernels that calls launch,
attention calls by the backend that the CUDA wheel takes, calls that the CUDA build compiles just in
time, collectives, live bytes. `tools.gpu_dry_run` runs training steps on it.

Call `load_library()` before torch is imported, `pretend()` before the engine asks for devices.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import types
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LIBRARY = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, FakeGuardImpl<DeviceType::CUDA>)
}
namespace at {
struct CUDAHooks final : CUDAHooksInterface {  // the name that torch looks for
  explicit CUDAHooks(CUDAHooksArgs) {}
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
REGISTER_CUDA_HOOKS(CUDAHooks)
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
    version = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    return None if "cuda: Optional[str] = None" in version else "torch is a CUDA build"


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
            subprocess.run([*command, f"-Wl,-rpath,{libraries}"], check=True)
            built.replace(library)
    ctypes.CDLL(str(library))


if "torch" not in sys.modules:
    load_library()

import torch  # noqa: E402
from torch._C._distributed_c10d import FakeWork, Work  # noqa: E402
from torch._subclasses import fake_tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

from tools.attention_backends import backend_of  # noqa: E402

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
_GRANULARITY = 512  # bytes: CUDA's allocator rounds up to it

# Calls that launch no kernel, apart from views.
_NO_KERNEL = {
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::detach",
    "aten::alias",
    "aten::lift_fresh",
    "aten::_unsafe_view",
    "aten::set_",
    "aten::resize_",
    "aten::record_stream",
    "aten::_local_scalar_dense",
    "aten::is_pinned",
    "aten::_reshape_alias",
    "prim::device",
    "aten::sym_size",
    "aten::sym_stride",
    "aten::sym_numel",
    "aten::is_contiguous",
    "aten::_has_same_storage_numel",
}
# Kernels of one call, where it is not one: counted in the sources of torch 2.13 (reductions in two
# launches, the grouped matmul's preparation, the backward passes of fused attention).
_KERNELS = {
    "aten::topk": 3,
    "aten::bincount": 5,
    "aten::repeat_interleave": 3,
    "aten::nonzero": 4,
    "aten::cumsum": 2,
    "aten::_embedding_bag": 3,
    "aten::embedding_dense_backward": 6,
    "aten::_grouped_mm": 2,
    "aten::index_put_": 2,
    "aten::_scaled_dot_product_cudnn_attention_backward": 3,
    "aten::_scaled_dot_product_flash_attention_backward": 3,
    "aten::_scaled_dot_product_efficient_attention_backward": 3,
    "aten::_efficient_attention_backward": 3,
    "torch_attn::_varlen_attn": 2,  # the kernel, and the zeros that stand for the random state
    "torch_attn::_varlen_attn_backward": 3,
}
_SORTS = ("aten::sort", "aten::argsort")  # CUB's radix sort: a pass per byte of a key, and 4 more
_LISTS = ("aten::_foreach_", "aten::_fused_adam")  # one launch for many tensors
_LIST_BLOCK, _LIST_BLOCKS, _LIST_TENSORS, _ADAM_TENSORS = 65536, 320, 110, 36


# --- torch.cuda, as far as Python asks ---


class _Stream:
    current: _Stream
    count = 0

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        _Stream.count += 1
        self.priority, self.device, self.cuda_stream = priority, CUDA, _Stream.count
        self.stream_id, self.device_index, self.device_type = _Stream.count, 0, 1

    def wait_event(self, event: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _device().wait("stream.synchronize")


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, stream: Any = None) -> _Event:
        return self

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0

    def synchronize(self) -> None:
        _device().wait("event.synchronize")


@contextlib.contextmanager
def _stream_context(stream: Any) -> Iterator[None]:
    before, _Stream.current = _Stream.current, stream or _Stream.current
    try:
        yield
    finally:
        _Stream.current = before


def pretend() -> None:
    """Make `torch.cuda` of this process describe eight H100, for good."""
    _Stream.current = _Stream()
    properties = types.SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        minor=0,
        total_memory=85_520_809_984,
        multi_processor_count=132,
        warp_size=32,
    )
    replaced: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_compiled": lambda: True,
        "device_count": lambda: GPUS,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda *_, **__: True,
        "mem_get_info": lambda device=None: (84_000_000_000, properties.total_memory),
        "max_memory_allocated": lambda device=None: _device().peak,
        "memory_allocated": lambda device=None: _device().now,
        "memory_reserved": lambda device=None: _device().now,
        "max_memory_reserved": lambda device=None: _device().peak,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: _device().wait("torch.cuda.synchronize"),
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "is_current_stream_capturing": lambda: False,
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda device=None: _Stream.current,
        "default_stream": lambda device=None: _Stream.current,
        "stream": _stream_context,
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    stand_ins: tuple[tuple[Any, str, Any], ...] = (
        (torch.version, "cuda", "13.0"),
        (fake_tensor, "init_gpu_context", lambda device: None),
        (FakeTensor, "tolist", lambda tensor: _device().read(tensor).tolist()),
        (torch.nn.functional, "scaled_dot_product_attention", _attention),
        (torch.nn.functional, "rms_norm", _rms_norm),
        (torch.UntypedStorage, "resize_", _resize),
    )
    for owner, name, value in stand_ins:
        setattr(owner, name, value)


# --- the device, as the dispatcher sees it ---


class FakeDevice(TorchDispatchMode):
    """Run what touches `cuda` with fake tensors and everything else for real; keep account."""

    running: FakeDevice | None = None

    def __init__(self, engine: Path, *, ep: int) -> None:
        """
        Args:
            engine: the folder of the code that costs are attributed to.
            ep: ranks of an all-to-all; each is assumed to send what this one sends.
        """
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._engine, self._ep = engine, ep
        self._values: dict[int, tuple[weakref.ref, torch.Tensor]] = {}  # of fake integers, by id
        self._storages: dict[int, tuple[int, weakref.ref]] = {}
        self._generator = torch.Generator().manual_seed(0)
        self.now = self.peak = 0
        self.at_peak = ""
        self.reset()

    def __enter__(self) -> FakeDevice:
        FakeDevice.running = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        FakeDevice.running = None

    def reset(self) -> None:
        """Start a new account; what is alive stays."""
        self.peak = self.now
        self.waits: collections.Counter[str] = collections.Counter()
        self.uploads: collections.Counter[str] = collections.Counter()
        self.kernels: collections.Counter[str] = collections.Counter()
        self.places: collections.Counter[str] = collections.Counter()
        self.attention: collections.Counter[str] = collections.Counter()
        self.received: collections.Counter[str] = collections.Counter()
        self.compiled: collections.Counter[str] = collections.Counter()
        self.broken: collections.Counter[str] = collections.Counter()

    # waits of the host

    def place(self) -> str:
        """Return file and line of the innermost frame of the engine."""
        frame: types.FrameType | None = sys._getframe(1)
        own = str(self._engine)
        while frame is not None:
            if frame.f_code.co_filename.startswith(own):
                file = Path(frame.f_code.co_filename).relative_to(self._engine.parent)
                return f"{file}:{frame.f_lineno}"
            frame = frame.f_back
        return "elsewhere"

    def wait(self, what: str, times: int = 1) -> None:
        """Note that the host waits for the device."""
        self.waits[f"{self.place()} {what}"] += times

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the values of a tensor of the device, for which the host waits."""
        if isinstance(tensor, FakeTensor) and tensor.device.type == "cuda":
            self.wait("read")
        return self._value(tensor, anything=True)

    # values of integers

    def _value(self, tensor: Any, *, anything: bool = False) -> Any:
        if not isinstance(tensor, FakeTensor):
            return tensor
        found = self._values.get(id(tensor))
        if found is not None and found[0]() is tensor:
            return found[1]
        return torch.ones(tensor.shape, dtype=tensor.dtype) if anything else None

    def _know(self, tensor: Any, value: torch.Tensor) -> None:
        if not isinstance(tensor, FakeTensor):
            return
        key, values = id(tensor), self._values
        values[key] = weakref.ref(tensor, lambda _: values.pop(key, None)), value

    def _compute_values(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        outs = [o for o in tree_leaves(out) if isinstance(o, FakeTensor)]
        if not outs:
            return
        if func.overloadpacket is aten.topk:
            rows, width = out[1].numel() // out[1].shape[-1], args[0].shape[-1]
            scores = torch.rand(rows, width, generator=self._generator)
            self._know(out[1], scores.topk(out[1].shape[-1]).indices.view(out[1].shape))
            return
        if any(o.dtype.is_floating_point or o.numel() > 2**24 for o in outs):
            return
        ins = [a for a in tree_leaves((args, kwargs)) if isinstance(a, FakeTensor)]
        if any(self._value(a) is None for a in ins):
            return

        def real(x: Any) -> Any:
            if isinstance(x, FakeTensor):
                return self._value(x)
            return torch.device("cpu") if isinstance(x, torch.device) else x

        kept = {k: v for k, v in kwargs.items() if k not in ("pin_memory", "non_blocking")}
        with torch._C._DisableTorchDispatch():
            found = func(*tree_map(real, args), **tree_map(real, kept))
        values = [f for f in tree_leaves(found) if isinstance(f, torch.Tensor)]
        for fake, value in zip(outs, values, strict=False):
            self._know(fake, value)

    # memory

    def _see(self, tensor: Any) -> None:
        if (
            not isinstance(tensor, FakeTensor)
            or tensor.fake_mode is not self._fake
            or tensor.device.type != "cuda"
        ):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            size = _rounded(storage.nbytes())
            self._storages[key] = size, weakref.ref(storage, lambda _: self._drop(key))
            self._grow(size)

    def _drop(self, key: int) -> None:
        self.now -= self._storages.pop(key)[0]

    def _grow(self, size: int) -> None:
        self.now += size
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, self.place()

    def resized(self, storage: Any) -> None:
        """Note that a storage has another size now: FSDP frees and allocates that way."""
        key = storage._cdata
        if key in self._storages:
            before, reference = self._storages[key]
            size = _rounded(storage.nbytes())
            self._storages[key] = size, reference
            self._grow(size - before)

    # dispatch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # which asks again with local tensors
        fakes = [x for x in tree_leaves((args, kwargs)) if isinstance(x, FakeTensor)]
        to = kwargs.get("device")
        if any(x.fake_mode is not self._fake for x in fakes):  # DTensor finds shapes with its own
            return func(*args, **kwargs)
        if not fakes and (to is None or torch.device(to).type != "cuda"):
            return func(*args, **kwargs)
        name = f"{func.namespace}::{func._schema.name.split('::')[-1]}"
        if func.namespace == "c10d":
            return self._collective(name, args)
        out = self._data_dependent(func, name, args, kwargs)
        if out is None:
            self._check(name, args, kwargs)
            faked = tree_map(self._faked, (args, kwargs))
            with self._fake:
                out = func(*faked[0], **faked[1])
            self._compute_values(func, args, kwargs, out)
        self._account(func, name, args, out)
        return out

    def _faked(self, x: Any) -> Any:
        real = isinstance(x, torch.Tensor) and not isinstance(x, (FakeTensor, DTensor))
        return self._fake.from_tensor(x) if real else x

    def _data_dependent(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Answer what the host has to know a result of; None: nothing of the kind."""
        packet = func.overloadpacket
        if packet is aten._local_scalar_dense:
            if args[0].device.type == "cuda":
                self.wait("item")
            return self._value(args[0], anything=True).item()
        if packet is aten.equal:
            self.wait("equal")
            return True
        to = torch.device(kwargs.get("device") or "cuda").type
        if packet is aten._to_copy and to == "cpu" and args[0].device.type == "cuda":
            if not kwargs.get("non_blocking"):  # else it is pinned, and an event is waited for
                self.wait("copy to the host")
            found = self._value(args[0], anything=True)
            return found.to(kwargs.get("dtype") or args[0].dtype)
        copies_back = packet is aten.copy_ and args[0].device.type == "cpu"
        if copies_back and args[1].device.type == "cuda":
            self.wait("copy to the host")
            return args[0]
        masked = packet is aten.index and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        shaped = packet in (
            aten.bincount,
            aten.nonzero,
            aten._unique2,
            aten.masked_select,
            aten.unique_consecutive,
        )
        repeats = packet is aten.repeat_interleave and kwargs.get("output_size") is None
        if not (shaped or masked or repeats) or args[0].device.type != "cuda":
            return None
        self.wait(name.split("::")[1], 2 if packet is aten.bincount else 1)
        reals = tree_map(
            lambda x: self._value(x, anything=True) if isinstance(x, FakeTensor) else x, args
        )
        plain = {k: v for k, v in kwargs.items() if not isinstance(v, torch.Tensor)}
        with torch._C._DisableTorchDispatch():
            found = func(*reals, **plain)
        with self._fake:
            out = tree_map(lambda f: torch.empty_like(f, device=CUDA), found)
        for fake, value in zip(tree_leaves(out), tree_leaves(found), strict=True):
            self._know(fake, value)
        return out

    def _collective(self, name: str, args: Any) -> Any:
        tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
        if any(isinstance(t, FakeTensor) and t.device.type != "cuda" for t in tensors):
            self.broken[f"{self.place()} {name} of a tensor on {tensors[0].device}"] += 1
        short = name.split("::")[1]
        done = Work.boxed(FakeWork()) if hasattr(Work, "boxed") else FakeWork().boxed()
        self.kernels[name] += 1
        self.places[self.place()] += 1
        if "alltoall" in short:
            out, rows = args[0], args[1]
            if tuple(out.shape) == tuple(rows.shape):
                value = self._value(rows)
                if value is not None:
                    self._know(out, value.clone())
            self.received[short] += rows.numel() * rows.element_size() * (self._ep - 1) // self._ep
            return done
        if "allgather_base" in short:
            self.received[short] += args[0].nbytes - args[1].nbytes
            return args[0], done
        if "reduce_scatter_base" in short:
            self.received[short] += args[1].nbytes - args[0].nbytes
            return args[0], done
        if short in ("allreduce_", "broadcast_"):
            return args[0], done
        return done

    def _check(self, name: str, args: Any, kwargs: Any) -> None:
        """Check rules of CUDA kernels that the CPU's do not have."""
        if name == "aten::_grouped_mm":
            offsets = kwargs.get("offs", args[2] if len(args) > 2 else None)
            self._check_grouped(args[0], args[1], offsets)
        elif name == "aten::bmm" and args[0].shape[2] == 1 and args[0].numel() and args[1].numel():
            # The CUDA build answers an outer product with a Triton kernel (torch._native).
            shapes = f"{tuple(args[0].shape)} x {tuple(args[1].shape)}"
            self.compiled[f"{self.place()} bmm {shapes}"] += 1
        elif name in ("aten::_to_copy", "aten::copy_"):
            copy = name == "aten::copy_"
            source, target = (args[1], args[0].device) if copy else (args[0], kwargs.get("device"))
            up = target is not None and torch.device(target).type == "cuda"
            if source.device.type == "cpu" and up and source.ndim:
                pinned = not isinstance(source, FakeTensor) and source.is_pinned()
                self.uploads[f"{self.place()} {'pinned' if pinned else 'pageable'}"] += 1
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor) and a.ndim]
        both = len({a.device.type for a in tensors}) > 1
        if both and name not in ("aten::copy_", "aten::_to_copy"):
            self.broken[f"{self.place()} {name} of tensors on both devices"] += 1

    def _check_grouped(self, a: torch.Tensor, b: torch.Tensor, offsets: Any) -> None:
        def wrong(why: str) -> None:
            self.broken[f"{self.place()} grouped_mm: {why}"] += 1

        def is_row_major(matrix: torch.Tensor) -> bool | None:
            stride, shape = matrix.stride()[-2:], matrix.shape[-2:]
            if stride[0] == 1 and stride[1] >= max(1, shape[0]):
                major, leading = False, stride[1]
            elif stride[1] == 1 and stride[0] >= max(1, shape[1]):
                major, leading = True, stride[0]
            else:
                wrong(f"strides {matrix.stride()} of {tuple(matrix.shape)}")
                return None
            if leading * matrix.element_size() % 16:
                wrong(f"stride {leading} of {matrix.dtype} is no multiple of 16 bytes")
            if int(matrix.storage_offset()) * matrix.element_size() % 16:
                wrong("address is no multiple of 16 bytes")
            return major

        major_a, major_b = is_row_major(a), is_row_major(b)
        if a.dtype != torch.bfloat16:
            self.broken[f"{self.place()} grouped_mm of {a.dtype}: a loop that waits per group"] += 1
        if offsets is None:
            return
        if offsets.dtype != torch.int32:
            wrong(f"offsets of {offsets.dtype}")
        if a.ndim == 2 and b.ndim == 2 and (major_a or not major_b):
            ends = self._value(offsets)  # the kernel asserts multiples of 16 bytes
            sizes = torch.diff(ends, prepend=ends.new_zeros(1)) if ends is not None else None
            if sizes is None or bool((sizes[:-1] % (16 // a.element_size())).any()):
                wrong("a contiguous ragged dimension, whose groups must be multiples of 16 bytes")

    def launched(self, name: str, kernels: int) -> None:
        """Note launches of a call that never reaches the dispatcher."""
        self.kernels[name] += kernels
        self.places[self.place()] += kernels

    def _account(self, func: Any, name: str, args: Any, out: Any) -> None:
        for value in tree_leaves(out):
            self._see(value)
        leaves = [x for x in tree_leaves((args, out)) if isinstance(x, FakeTensor)]
        cuda = [x for x in leaves if x.device.type == "cuda"]
        if name in _NO_KERNEL or _is_view(func) or not cuda:
            return
        count = _KERNELS.get(name, 1)
        if name in _SORTS:
            count = args[0].element_size() + 4
        elif name.startswith(_LISTS):
            count = _list_launches(name, args)
        self.launched(name, count)


def _rounded(size: int) -> int:
    return -(-size // _GRANULARITY) * _GRANULARITY


def _is_view(func: Any) -> bool:
    return getattr(func, "is_view", False) or any(
        a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments
    )


def _list_launches(name: str, args: Any) -> int:
    """Count a list operator's launches: some hundred blocks and so many tensors each, at most."""
    lists = [a for a in args if isinstance(a, (list, tuple)) and a]
    tensors = next((a for a in lists if isinstance(a[0], torch.Tensor)), [])
    blocks = sum(-(-t.numel() // _LIST_BLOCK) for t in tensors)
    most = _ADAM_TENSORS if "fused" in name else _LIST_TENSORS
    return max(1, -(-blocks // _LIST_BLOCKS), -(-len(tensors) // most))


def _device() -> FakeDevice:
    assert FakeDevice.running is not None
    return FakeDevice.running


_STOCK_RESIZE = torch.UntypedStorage.resize_


def _resize(storage: Any, size: int) -> Any:
    found = _STOCK_RESIZE(storage, size)
    if FakeDevice.running is not None:
        FakeDevice.running.resized(storage)
    return found


# --- attention: the call that torch's selector would make ---

_STOCK_ATTENTION = torch.nn.functional.scaled_dot_product_attention


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if query.device.type != "cuda":
        options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
        return _STOCK_ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, **options)
    backend, why = backend_of(query, key, value, attn_mask, is_causal, enable_gqa)
    device = _device()
    heads = f"{query.shape[-3]} over {key.shape[-3]} heads, {query.dtype}".replace("torch.", "")
    kind = "causal" if is_causal else "mask" if attn_mask is not None else "all keys"
    reason = f" ({why})" if backend == "math" else ""
    device.attention[f"{backend}: D {query.shape[-1]}, {heads}, {kind}{reason}"] += 1
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool and backend != "math":
        bias = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = bias.masked_fill_(attn_mask.logical_not(), float("-inf"))
    if backend == "cudnn":
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*query.shape[:3], key.shape[-2])
        return aten._scaled_dot_product_cudnn_attention(
            query, key, value, attn_mask, grad, dropout_p, is_causal, False, scale=scale
        )[0]
    if backend == "flash":
        return aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
    if backend == "efficient":
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, grad, dropout_p, is_causal, scale=scale
        )[0]
    return aten._scaled_dot_product_attention_math(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        None,
        scale=scale,
        enable_gqa=enable_gqa,
    )[0]


# --- norms: on CUDA one kernel forward, one or two backward; the CPU's are composed ---

_STOCK_NORM = torch.nn.functional.rms_norm


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any, eps: float) -> torch.Tensor:
        out, inverse = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        _device().launched("aten::_fused_rms_norm", 1)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        x, weight, _ = ctx.saved_tensors
        needs_weight = ctx.needs_input_grad[1]
        _device().launched("aten::_fused_rms_norm_backward", 1 + needs_weight)
        return torch.empty_like(x), torch.empty_like(weight) if needs_weight else None, None


def _rms_norm(x: torch.Tensor, shape: Any, weight: Any = None, eps: Any = None) -> torch.Tensor:
    same = weight is None or weight.dtype == x.dtype
    if x.device.type == "cuda" and len(shape) == 1 and same:
        return _FusedNorm.apply(x, weight, eps)
    return _STOCK_NORM(x, shape, weight, eps)
