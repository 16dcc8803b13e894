"""Compile Triton kernels for an H100 on a machine that has none.

    python -m tools.compiled_kernels --own ACCOUNTS.json
    python -m tools.compiled_kernels --flex

`--own`: each launch of our kernels that `tools.gpu_dry_run --json` noted. `--flex`: FlexAttention's
forward and backward kernels as Inductor writes them for the released model's two kinds of layer.
Prints the bytes of shared memory of each as JSON; exit code 1 if one takes more than there are.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

from tools import fake_cuda  # before torch, which it has to come before

# isort: split
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGET = GPUTarget("cuda", 90, 32)
SHARED_BYTES = 227 * 1024  # that a block can have on sm_90
_ALIGNED = 16  # what Triton compiles other code for, if it divides an address or a number
_ROWS, _HEADS = 616, 16  # of an example of 360 clean tokens; of queries
FLEX = {256: 8, 512: 2}  # head size -> heads of keys


def own_kernels(accounts: dict[str, Any]) -> dict[str, int]:
    """Compile the launches of a dry run, as often as Triton would; return the shared memory of
    each, in bytes, by case, kernel, types and constants.
    """
    from canvastune.model import triton_kernels

    found: dict[str, int] = {}
    compiled: dict[str, int] = {}
    for case, account in accounts.items():
        for name, given, constants in account["triton"]:
            kernel = getattr(triton_kernels, name)
            parameters = [each for each in kernel.params if not each.is_constexpr]
            kinds = [
                kind.partition(":")[0] if parameter.do_not_specialize else kind
                for parameter, kind in zip(parameters, given, strict=True)
            ]
            key = json.dumps([name, kinds, constants])
            if key not in compiled:
                compiled[key] = _compiled(kernel, kinds, dict(constants))
            found[json.dumps([case, name, kinds, constants])] = compiled[key]
    return found


def _compiled(kernel: Any, kinds: list[str], constants: dict[str, Any]) -> int:
    """Compile a kernel; return its shared memory in bytes.

    Args:
        kinds: its arguments' types, with ":16" where 16 divides an address or number, and ":1".
    """
    names = [parameter.name for parameter in kernel.params if not parameter.is_constexpr]
    ones = {name: 1 for name, kind in zip(names, kinds, strict=True) if kind.endswith(":1")}
    constants = constants | ones
    signature = {
        name: kind.partition(":")[0] for name, kind in zip(names, kinds, strict=True)
    } | dict.fromkeys(constants, "constexpr")
    attributes = {
        (kernel.arg_names.index(name),): [["tt.divisibility", _ALIGNED]]
        for name, kind in zip(names, kinds, strict=True)
        if kind.endswith(f":{_ALIGNED}")
    }
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGET).metadata.shared


def flex_kernels(width: int, groups: int) -> dict[str, int]:
    """Compile FlexAttention for one head size; return the shared memory of each kernel, in bytes."""
    found: dict[str, int] = {}
    for name, source in _flex_sources(width, groups):
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / f"{name}.py"
            path.write_text(source, encoding="utf-8")
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            (tuner,) = (
                value
                for value in vars(module).values()
                if hasattr(value, "configs") and hasattr(value, "triton_meta")
            )
            (config,) = tuner.configs
            meta, kernel = tuner.triton_meta, tuner.fn
            constants = dict(meta.get("constants", {})) | dict(config.kwargs)
            signature = dict.fromkeys(kernel.arg_names, "constexpr")
            signature |= dict(meta["signature"])
            signature |= dict.fromkeys(config.kwargs, "constexpr")
            how = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            ast = ASTSource(kernel, signature, constants, meta["configs"][0])
            binary = triton.compile(ast, target=TARGET, options=how)
            found[f"{name}, D {width}"] = binary.metadata.shared
    return found


def _flex_sources(width: int, groups: int) -> list[tuple[str, str]]:
    """Return names and sources of Inductor's kernels for one layer, forward and backward."""
    import torch
    import torch._inductor.config
    from functorch.compile import make_boxed_func
    from torch._functorch.aot_autograd import aot_function
    from torch._guards import TracingContext, tracing
    from torch._higher_order_ops.flex_attention import flex_attention
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode

    from canvastune.model.flex_attention import TILE, kernel_options

    captured: list[tuple[str, str]] = []

    def capture(_: Any, name: str, source: str, device_str: str = "cuda") -> Any:
        captured.append((name, source))
        return lambda *_, **__: None

    inductor: Any = AsyncCompile
    inductor.triton = capture
    torch._inductor.config.compile_threads = 1
    torch._inductor.config.force_disable_caches = True
    mode, tiles = FakeTensorMode(allow_non_fake_inputs=True), -(-_ROWS // TILE)

    def made(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="cuda", dtype=torch.int32)

    def heads(count: int) -> torch.Tensor:
        rows = torch.empty(1, _ROWS, count, width, device="cuda", dtype=torch.bfloat16)
        return rows.transpose(1, 2).detach().requires_grad_()

    def score(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return score

    def sees(b: Any, h: Any, row: Any, key: Any, first: Any, stop: Any, own: Any, end: Any) -> Any:
        return ((key >= first[row]) & (key < stop[row])) | ((key >= own[row]) & (key < end[row]))

    def attend(*given: torch.Tensor) -> torch.Tensor:
        tensors: Any = given[:3]
        ranges, blocks = given[3:7], given[7:]
        mask = (_ROWS, _ROWS, *blocks, None, None, None, None, TILE, TILE, sees)
        options = {
            "PRESCALE_QK": False,
            "ROWS_GUARANTEED_SAFE": False,
            "BLOCKS_ARE_CONTIGUOUS": False,
            "WRITE_DQ": True,
            "OUTPUT_LOGSUMEXP": True,
            "OUTPUT_MAX": False,
            "BACKEND": "AUTO",
            **(kernel_options(width) or {}),
        }
        operator: Any = flex_attention
        return operator(*tensors, score, mask, 1.0, options, (), ranges)[0]

    def forward(graph: Any, inputs: Any) -> Any:
        kept = make_boxed_func(graph.forward)
        compile_fx_inner(graph, inputs, is_backward=False)
        return kept

    class Done(Exception):
        pass

    def backward(graph: Any, inputs: Any) -> Any:
        compile_fx_inner(graph, inputs, is_backward=True)
        raise Done

    with mode:
        inputs = [heads(_HEADS), heads(groups), heads(groups), *(made(_ROWS) for _ in range(4))]
        for _ in range(4):
            inputs += [made(1, 1, tiles), made(1, 1, tiles, tiles)]
    how: dict[str, Any] = {"fw_compiler": forward, "bw_compiler": backward}
    how["decompositions"] = select_decomp_table()
    with tracing(TracingContext(mode)), mode, V.set_fake_mode(mode), contextlib.suppress(Done):
        compiled = aot_function(attend, **how)
        out = compiled(*inputs)
        out.backward(torch.empty_like(out))
    return captured


def _pretend() -> None:
    """Make Inductor and Triton find an H100."""
    import torch

    class Device(contextlib.nullcontext):
        def __init__(self, *_: Any) -> None:
            super().__init__()

    fake_cuda.pretend()
    torch.cuda.device = torch.cuda._DeviceGuard = Device  # type: ignore
    torch._C._cuda_getCurrentRawStream = lambda device=0: 0  # type: ignore
    limits = {"max_shared_mem": SHARED_BYTES, "multiprocessor_count": 132, "warpSize": 32}
    driver: Any = types.SimpleNamespace(
        get_current_target=lambda: TARGET,
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
        get_current_stream=lambda device=0: 0,
        get_device_interface=lambda: torch.cuda,
        map_python_to_cpp_type=str,
        utils=types.SimpleNamespace(get_device_properties=lambda device: limits),
    )
    triton.runtime.driver.set_active(driver)
    import torch._inductor.runtime.triton_helpers as helpers  # which asks torch.cuda

    helpers.set_driver_to_gpu = lambda: None


def main(arguments: list[str] | None = None) -> int:
    """Compile; return 1 if a kernel does not fit."""
    parser = argparse.ArgumentParser("tools.compiled_kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--own", type=Path, help="accounts of a dry run")
    parser.add_argument("--flex", action="store_true", help="FlexAttention's kernels")
    options = parser.parse_args(arguments)
    shared: dict[str, int] = {}
    if options.own:
        shared |= own_kernels(json.loads(options.own.read_text(encoding="utf-8")))
    if options.flex:
        _pretend()
        for width, groups in FLEX.items():
            shared |= flex_kernels(width, groups)
    print(json.dumps(shared, indent=1))
    return int(any(size > SHARED_BYTES for size in shared.values()))


if __name__ == "__main__":
    sys.exit(main())
