"""The device as the dispatcher sees it: fake tensors, and an account of what they would cost."""

from __future__ import annotations

import collections
import functools
import sys
import types
import weakref
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import FakeWork, Work
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

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
        self.triton: set[tuple[str, tuple[str, ...], tuple[tuple[str, Any], ...]]] = set()
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
        return self.value(tensor, anything=True)

    # values of integers

    def value(self, tensor: Any, *, anything: bool = False) -> Any:
        """Return the values of a tensor, None if they are not known; or ones, if anything will do."""
        if not isinstance(tensor, FakeTensor):
            return tensor
        found = self._values.get(id(tensor))
        if found is not None and found[0]() is tensor:
            return found[1]
        return torch.ones(tensor.shape, dtype=tensor.dtype) if anything else None

    def know(self, tensor: Any, value: torch.Tensor) -> None:
        """Note the values of a fake tensor."""
        if not isinstance(tensor, FakeTensor):
            return
        key, values = id(tensor), self._values
        values[key] = weakref.ref(tensor, lambda _: values.pop(key, None)), value

    def chosen(self, rows: int, width: int, count: int) -> torch.Tensor:
        """Return made-up indices of the highest of each row's scores, int64[rows, count]."""
        return torch.rand(rows, width, generator=self._generator).topk(count).indices

    def _compute_values(
        self, func: Any, args: Any, kwargs: Any, fakes: list[FakeTensor], out: Any
    ) -> None:
        outs = [o for o in tree_leaves(out) if isinstance(o, FakeTensor)]
        if not outs:
            return
        if func.overloadpacket is aten.topk:
            rows, width = out[1].numel() // out[1].shape[-1], args[0].shape[-1]
            self.know(out[1], self.chosen(rows, width, out[1].shape[-1]).view(out[1].shape))
            return
        if any(o.dtype.is_floating_point or o.numel() > 2**24 for o in outs):
            return
        if any(self.value(a) is None for a in fakes):
            return

        def real(x: Any) -> Any:
            if isinstance(x, FakeTensor):
                return self.value(x)
            return torch.device("cpu") if isinstance(x, torch.device) else x

        kept = {k: v for k, v in kwargs.items() if k not in ("pin_memory", "non_blocking")}
        with torch._C._DisableTorchDispatch():
            found = func(*tree_map(real, args), **tree_map(real, kept))
        values = [f for f in tree_leaves(found) if isinstance(f, torch.Tensor)]
        for fake, value in zip(outs, values, strict=False):
            self.know(fake, value)

    # memory

    def _see(self, tensor: FakeTensor) -> None:
        if tensor.fake_mode is not self._fake or tensor.device.type != "cuda":
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
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        fakes = [x for x in tensors if isinstance(x, FakeTensor)]
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
            self._check(name, args, kwargs, tensors)
            faked = args, kwargs
            if len(fakes) < len(tensors):
                faked = tree_map(self._faked, (args, kwargs))
            with self._fake:
                out = func(*faked[0], **faked[1])
            self._compute_values(func, args, kwargs, fakes, out)
        self._account(func, name, args, fakes, out)
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
            return self.value(args[0], anything=True).item()
        if packet is aten.equal:
            self.wait("equal")
            return True
        to = torch.device(kwargs.get("device") or "cuda").type
        if packet is aten._to_copy and to == "cpu" and args[0].device.type == "cuda":
            if not kwargs.get("non_blocking"):  # else it is pinned, and an event is waited for
                self.wait("copy to the host")
            found = self.value(args[0], anything=True)
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
            lambda x: self.value(x, anything=True) if isinstance(x, FakeTensor) else x, args
        )
        plain = {k: v for k, v in kwargs.items() if not isinstance(v, torch.Tensor)}
        with torch._C._DisableTorchDispatch():
            found = func(*reals, **plain)
        with self._fake:
            out = tree_map(lambda f: torch.empty_like(f, device=CUDA), found)
        for fake, value in zip(tree_leaves(out), tree_leaves(found), strict=True):
            self.know(fake, value)
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
                value = self.value(rows)
                if value is not None:
                    self.know(out, value.clone())
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

    def _check(self, name: str, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> None:
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
        both = len({a.device.type for a in tensors if a.ndim}) > 1
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
            ends = self.value(offsets)  # the kernel asserts multiples of 16 bytes
            sizes = torch.diff(ends, prepend=ends.new_zeros(1)) if ends is not None else None
            if sizes is None or bool((sizes[:-1] % (16 // a.element_size())).any()):
                wrong("a contiguous ragged dimension, whose groups must be multiples of 16 bytes")

    def launched(self, name: str, kernels: int) -> None:
        """Note launches of a call that never reaches the dispatcher."""
        self.kernels[name] += kernels
        self.places[self.place()] += kernels

    def _account(self, func: Any, name: str, args: Any, fakes: list[FakeTensor], out: Any) -> None:
        outs = [x for x in tree_leaves(out) if isinstance(x, FakeTensor)]
        for value in outs:
            self._see(value)
        if name in _NO_KERNEL or _is_view(func):
            return
        if not any(x.device.type == "cuda" for x in (*fakes, *outs)):
            return
        count = _KERNELS.get(name, 1)
        if name in _SORTS:
            count = args[0].element_size() + 4
        elif name.startswith(_LISTS):
            count = _list_launches(name, args)
        self.launched(name, count)


def _rounded(size: int) -> int:
    return -(-size // _GRANULARITY) * _GRANULARITY


@functools.cache
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


def running_device() -> FakeDevice:
    """Return the device whose account is being kept."""
    assert FakeDevice.running is not None
    return FakeDevice.running
