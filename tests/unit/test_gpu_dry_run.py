"""What the engine asks of a GPU, counted without one: `tools.gpu_dry_run` at the released model's
widths, with its last two layers, a sliding and a full one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from canvastune.model import grouped_matmul, moe
from canvastune.model.attention import takes_grouped_heads
from tools import attention_backends, fake_cuda

ROOT = Path(__file__).parents[2]
LAUNCHES = {  # ceilings, 2 to 5% above the count
    "lora, not self-conditioned": 605,
    "lora, experts": 770,
    "lora, 4 blocks": 900,
    "lora, no kernels": 935,
    "full": 760,
    "full, longest": 845,
    "full, 8,192 tokens": 1680,
}
CASES = tuple(LAUNCHES)
MOST_COMPILED = 20  # kernels in a run, whatever the lengths of its examples


@pytest.fixture(scope="module")
def accounts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if (reason := fake_cuda.missing()) is not None:
        pytest.skip(reason)
    out = tmp_path_factory.mktemp("dry-run") / "accounts.json"
    cases = [option for case in CASES for option in ("--case", case)]
    command = [sys.executable, "-m", "tools.gpu_dry_run", "--layers", "2", *cases]
    done = subprocess.run(
        [*command, "--json", str(out)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"  # no bar is missed
    return out


@pytest.fixture(scope="module")
def accounts(accounts_file: Path) -> dict[str, Any]:
    return json.loads(accounts_file.read_text(encoding="utf-8"))


def compiled(*options: str) -> dict[str, int]:
    """Compile Triton kernels for an H100; return the shared memory of each, in bytes."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    done = subprocess.run(
        [sys.executable, "-m", "tools.compiled_kernels", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def own_kernels(accounts_file: Path) -> list[tuple[str, ...]]:
    """Return each kernel of ours that a case compiles: the case, its name, types and constants."""
    return [tuple(json.loads(spec)) for spec in compiled("--own", str(accounts_file))]


def test_every_kernel_of_ours_that_a_step_launches_compiles_for_an_h100(
    own_kernels: list[tuple[str, ...]],
) -> None:
    from canvastune.model import triton_kernels  # only where Triton is installed

    ours = {name for name, found in vars(triton_kernels).items() if hasattr(found, "arg_names")}
    assert {name for _, name, *_ in own_kernels} == {
        name for name in ours if not name.startswith("_")
    }


@pytest.mark.parametrize("method", ["lora", "full"])
def test_examples_of_all_lengths_share_twenty_compiled_kernels(
    accounts: dict[str, Any], own_kernels: list[tuple[str, ...]], method: str
) -> None:
    """Triton compiles a kernel again for numbers that 16 divides, except `do_not_specialize`."""
    cases = [case for case in CASES if case.partition(",")[0] == method and "experts" not in case]
    numbers = {
        kinds[-2]
        for case in cases
        for name, kinds, _ in accounts[case]["triton"]
        if name == "turn_heads_backward"
    }
    assert numbers == {"i32", "i32:16"}, "rows of both kinds"
    found = {json.dumps(kernel) for case, *kernel in own_kernels if case in cases}
    assert len(found) <= MOST_COMPILED, sorted(found)


def test_flex_attention_compiles_for_an_h100_and_fits_its_shared_memory() -> None:
    if (reason := fake_cuda.missing()) is not None:
        pytest.skip(reason)
    shared = compiled("--flex")
    for width in (256, 512):
        of_width = [size for name, size in shared.items() if name.endswith(f"D {width}")]
        assert sorted(of_width)[-2] > 0, "a forward and a backward kernel with tiles"
    assert max(shared.values()) <= 227 * 1024


@pytest.mark.parametrize("case", CASES)
def test_the_host_waits_once_per_layer_and_pass_and_once_per_step(
    accounts: dict[str, Any], case: str
) -> None:
    waits = accounts[case]["waits_by_line"]
    assert sorted(waits.values()) == [1, 2 * accounts[case]["passes"]]
    assert [line.split(":")[0] for line in sorted(waits, key=waits.__getitem__)] == [
        "canvastune/training/trainer.py",
        "canvastune/model/moe.py",
    ]


@pytest.mark.parametrize("case", CASES)
def test_attention_is_fused_and_nothing_is_compiled_just_in_time(
    accounts: dict[str, Any], case: str
) -> None:
    assert {call.partition(":")[0] for call in accounts[case]["attention"]} == {
        "flash",
        "efficient",
    }
    assert accounts[case]["compiled"] == accounts[case]["broken"] == {}


@pytest.mark.parametrize("case", CASES)
def test_live_bytes_are_those_of_the_plan(accounts: dict[str, Any], case: str) -> None:
    assert accounts[case]["planned"] == pytest.approx(accounts[case]["peak"], rel=0.10)


def test_live_bytes_are_compared_for_short_and_for_long_examples(accounts: dict[str, Any]) -> None:
    assert {account["tokens"] for account in accounts.values()} >= {366, 1279, 8192}


@pytest.mark.parametrize("case", CASES)
def test_launches_stay_below_their_ceiling(accounts: dict[str, Any], case: str) -> None:
    assert 500 < accounts[case]["launches"] < LAUNCHES[case]


def test_the_rules_of_attention_were_read_in_the_locked_wheel() -> None:
    lock = (ROOT / "docker" / "requirements-torch-cuda.txt").read_text(encoding="utf-8")
    pin = f"torch=={attention_backends.VERSION} \\"
    todo = "read the selector of the new wheel, then change tools/attention_backends.py"
    assert pin in lock, todo
    assert attention_backends.WHEEL in lock, todo


def test_the_table_of_backends() -> None:
    def call(heads: int, width: int, dtype: torch.dtype = torch.bfloat16, **kwargs: Any) -> str:
        query, key = torch.empty(1, 16, 4, width, dtype=dtype), torch.empty(1, heads, 4, width)
        key = key.to(dtype)
        options = {"mask": None, "causal": True, "gqa": heads != 16, **kwargs}
        return attention_backends.backend_of(query, key, key, **options)[0]

    before = torch.backends.cuda.cudnn_sdp_enabled()
    mask = torch.ones(4, 4, dtype=torch.bool)
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        assert call(8, 256) == "cudnn"
        torch.backends.cuda.enable_cudnn_sdp(False)
        assert call(8, 256) == "flash"
        assert call(8, 256, mask=mask, causal=False) == call(2, 512) == "math"
        assert call(16, 256, mask=mask, causal=False) == call(16, 512) == "efficient"
        assert call(16, 256, torch.float32) == "efficient"
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_heads_are_repeated_where_flash_does_not_take_a_call() -> None:
    half, wide = torch.empty(1, 16, 4, 256, dtype=torch.bfloat16), torch.empty(1, 16, 4, 512)
    assert takes_grouped_heads(half, None)
    assert not takes_grouped_heads(half, torch.ones(4, 4))
    assert not takes_grouped_heads(half.float(), None)
    assert not takes_grouped_heads(wide.bfloat16(), None)


def test_bytes_sort_as_expert_ids_do() -> None:
    for experts in (3, 128, 256):
        ids = torch.randint(0, experts, (5000,), generator=torch.Generator().manual_seed(experts))
        plain = moe.sorted_order(ids, experts, as_bytes=False)
        assert torch.equal(moe.sorted_order(ids, experts, as_bytes=True), plain)
        assert torch.equal(plain, torch.argsort(ids, stable=True))


def test_an_expert_without_rows_gets_a_zero_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 8, generator=generator, requires_grad=True)
    weight = torch.randn(4, 12, 8, generator=generator, requires_grad=True)
    ends = torch.tensor([2, 2, 6, 6], dtype=torch.int32)  # the second and the last have no rows
    stock = grouped_matmul.grouped_mm

    def gradients() -> tuple[torch.Tensor, ...]:
        out = grouped_matmul.GroupedProduct.apply(rows, weight, ends)
        return torch.autograd.grad(out.square().sum(), (rows, weight))

    plain = torch.autograd.grad(
        stock(rows, weight.transpose(-2, -1), offs=ends).square().sum(), (rows, weight)
    )
    assert all(torch.equal(a, b) for a, b in zip(gradients(), plain, strict=True))

    def leaves_garbage(a: torch.Tensor, b: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        out = stock(a, b, offs=offs)
        if b.ndim == 2:  # a weight's gradient
            out[offs.diff(prepend=offs.new_zeros(1)) == 0] = float("nan")
        return out

    monkeypatch.setattr(grouped_matmul, "_in_chunks", lambda rows: False)  # as on a GPU
    monkeypatch.setattr(grouped_matmul, "grouped_mm", leaves_garbage)
    assert gradients()[1].isnan().any()
    monkeypatch.setattr(grouped_matmul, "leaves_empty_groups", lambda device: True)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), plain, strict=True))
