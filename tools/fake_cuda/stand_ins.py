"""`torch.cuda`, and the functions of torch whose CUDA kernels differ from the CPU's."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor

from tools.attention_backends import backend_of
from tools.fake_cuda.device import CUDA, FakeDevice, running_device
from tools.fake_cuda.library import GPUS

aten = torch.ops.aten


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
        running_device().wait("stream.synchronize")


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
        running_device().wait("event.synchronize")


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
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        regs_per_multiprocessor=65536,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=232448,
        L2_cache_size=50 * 2**20,
        clock_rate=1_980_000,
        memory_clock_rate=2_619_000,
        memory_bus_width=5120,
        gcnArchName="",
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
        "max_memory_allocated": lambda device=None: running_device().peak,
        "memory_allocated": lambda device=None: running_device().now,
        "memory_reserved": lambda device=None: running_device().now,
        "max_memory_reserved": lambda device=None: running_device().peak,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: running_device().wait("torch.cuda.synchronize"),
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
    from canvastune.model import kernels  # which imports torch

    stand_ins: tuple[tuple[Any, str, Any], ...] = (
        (kernels, "available", lambda x: x.device.type == "cuda" and kernels._Switch.allowed),
        (kernels, "launch", _launch),
        (torch.version, "cuda", "13.0"),
        (fake_tensor, "init_gpu_context", lambda device: None),
        (FakeTensor, "tolist", lambda tensor: running_device().read(tensor).tolist()),
        (torch.nn.functional, "scaled_dot_product_attention", _attention),
        (torch.nn.functional, "rms_norm", _rms_norm),
        (torch.UntypedStorage, "resize_", _resize),
    )
    for owner, name, value in stand_ins:
        setattr(owner, name, value)


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
    device = running_device()
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
        running_device().launched("aten::_fused_rms_norm", 1)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        x, weight, _ = ctx.saved_tensors
        needs_weight = ctx.needs_input_grad[1]
        running_device().launched("aten::_fused_rms_norm_backward", 1 + needs_weight)
        return torch.empty_like(x), torch.empty_like(weight) if needs_weight else None, None


def _rms_norm(x: torch.Tensor, shape: Any, weight: Any = None, eps: Any = None) -> torch.Tensor:
    same = weight is None or weight.dtype == x.dtype
    if x.device.type == "cuda" and len(shape) == 1 and same:
        return _FusedNorm.apply(x, weight, eps)
    return _STOCK_NORM(x, shape, weight, eps)


# --- our own kernels: launched by Triton, which the dispatcher does not see ---

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
}


def _launch(name: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    if not all(grid):
        return
    device = running_device()
    device.launched(f"triton::{name}", 1)
    device.triton.add((name, tuple(map(_type, arguments)), tuple(constants.items())))
    if name == "choose":
        scores, _, _, index = arguments
        rows, width = scores.shape
        device.know(index, device.chosen(rows, width, index.shape[1]))
    elif name == "sort_rows":
        index, order, inverse, counts, _ = arguments
        experts = device.value(index).flatten()
        sorted_rows = experts.argsort(stable=True)
        device.know(order, sorted_rows)
        device.know(inverse, sorted_rows.argsort().view(index.shape))
        device.know(counts, experts.bincount(minlength=len(counts)))
    elif name == "sort_segments":
        received, by_expert, by_sender, ends = arguments
        sizes = device.value(received)
        experts = torch.arange(constants["L"]).repeat(constants["RANKS"]).repeat_interleave(sizes)
        order = experts.argsort(stable=True)
        device.know(by_expert, order)
        device.know(by_sender, order.argsort())
        device.know(ends, experts.bincount(minlength=len(ends)).cumsum(0).int())


def _type(argument: Any) -> str:
    """Return an argument's type as Triton's signatures have it, then what else of it Triton
    compiles a kernel for: an address or a number that 16 divides, or the number 1.
    """
    if isinstance(argument, torch.Tensor):
        address = int(argument.storage_offset()) * argument.element_size()  # an allocation's is 0
        return f"*{_TYPES[argument.dtype]}{':16' if address % 16 == 0 else ''}"
    if isinstance(argument, float):
        return "fp32"
    return "i32:1" if argument == 1 else "i32:16" if argument % 16 == 0 else "i32"
