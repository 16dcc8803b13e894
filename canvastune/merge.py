"""The step `merge_lora`: base and adapter become one checkpoint, tensor by tensor, with proof that it computes the same."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from canvastune.config import RunConfig
from canvastune.merge_proof import prove_merge
from canvastune.model.adapter import each_expert, read_adapter
from canvastune.model.checkpoint_files import CheckpointReader, CheckpointWriter, copy_side_files
from canvastune.outputs import whole_folder, write_provenance


def merge_lora(config: RunConfig, base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    """Write the merged checkpoint into `out` and return its proof.

    `out` gets the base's own configuration, tokenizer and tensors, the adapted weights being `W + scale * B @ A` (expert by
    expert, summed in float32, stored in the base's dtype), and `merge_proof.json`, `config.yaml` and `provenance.json`. It
    appears whole or not at all. Memory is the adapter and a few times the largest tensor; the proof takes the model where it
    fits (`merge_proof`).

    Raises:
        UserError: a base or an adapter that cannot be read, an adapter of another base, an `out` that is not empty, a full disk.
        RuntimeError: the proof failed.
    """
    started = time.monotonic()
    with whole_folder(out) as folder:
        checkpoint = CheckpointReader(base)
        trained = read_adapter(adapter, checkpoint, config.model.id)
        copy_side_files(base, folder)
        with CheckpointWriter(folder, checkpoint.specs()) as writer:
            written = 0
            for name in checkpoint.names():
                factors = trained.factors.get(name)
                # No variable holds the tensor: the last one is gone when the next one is read.
                shard = writer.write(name, _merged(checkpoint.get(name), *factors, trained.scale) if factors else checkpoint.get(name))
                if shard is not None:
                    written += 1
                    _say(f"shard {written} of {writer.shards} written: {shard}, {time.monotonic() - started:.1f} s")
        proof = prove_merge(checkpoint, adapter, trained, folder, config.seed)
        if not proof["passed"]:
            raise RuntimeError(f"{out}: not written: the merged model does not compute what base and adapter do: {json.dumps(proof)}")
        proof["merge_seconds"] = time.monotonic() - started
        (folder / "merge_proof.json").write_text(json.dumps(proof, indent=2) + "\n", encoding="utf-8")
        write_provenance(folder, "merge_lora", config, {"base": base, "adapter": adapter})
    _say(f"{len(trained.factors)} weights merged and proved by {proof['method']} in {proof['merge_seconds']:.1f} s: {out}")
    return proof


def _merged(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """W [(E,) out, in] + scale * B [(E,) out, r] @ A [(E,) r, in] in W's dtype, in W's place."""
    for one, one_a, one_b in each_expert(weight, a, b):
        one.copy_(torch.addmm(one.float(), one_b.float(), one_a.float(), alpha=scale))
    return weight


def _say(line: str) -> None:
    print(f"merge: {line}", file=sys.stderr, flush=True)
