"""The training loop. A step reads like objective.md: examples and their noise, two losses over global counts, one update."""

from __future__ import annotations

import itertools
import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from canvastune.checkpoints import Checkpoints
from canvastune.config import OptimizerConfig, RunConfig
from canvastune.data.batches import PackedBatch, PreparedData, pack
from canvastune.errors import UserError
from canvastune.model.shared import SharedModel
from canvastune.objective import losses
from canvastune.parallel import clip_gradients
from canvastune.progress import TrainingProgress
from canvastune.tracking import MetricsWriter


class Trainer:
    """Trains a loaded, sharded model; every rank makes the same calls."""

    def __init__(
        self,
        config: RunConfig,
        model: SharedModel,
        data: PreparedData,
        checkpoints: Checkpoints,
        metrics: MetricsWriter | None,
        progress: TrainingProgress | None,
    ) -> None:
        """
        Args:
            metrics: where the numbers go; None on every rank but the first. Likewise `progress`.
        """
        self.config, self.model, self.data = config, model, data
        self.checkpoints, self.metrics, self.progress = checkpoints, metrics, progress
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = next(model.parameters()).device
        self.trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.optimizer = build_optimizer(list(self.trained.values()), config.optimizer)
        self.step = 0  # optimiser steps done
        self.stop_requested = False
        self.last: dict[str, dict[str, Any]] = {}
        share = config.train.global_batch_size // self.world_size
        self.micro_batch_size = config.train.micro_batch_size or share

    def run(self) -> bool:
        """Train from the newest checkpoint, if any, to the last step. False: a stop was requested, and the state is saved."""
        train = self.config.train
        self._resume()
        if self.step == 0:
            self._report("validation", self.validate())
        while self.step < train.steps:
            record = self.train_step()
            self._report("train", record)
            last = self.step == train.steps
            if self.step % train.validate_every == 0 or last:
                self._report("validation", self.validate())
            stop = self._agreed_to_stop()
            if self.step % train.checkpoint_every == 0 or last or stop:
                self.checkpoints.save(self.step, self.trained, self.optimizer)
                self._report("event", {"event": "checkpoint", "detail": "stop requested" if stop else ""})
            if stop and not last:
                return False
        return True

    def train_step(self) -> dict[str, Any]:
        """One optimiser step over the next global batch; returns its record for metrics.jsonl."""
        started = time.perf_counter()
        batch_size = self.config.train.global_batch_size
        first = self.step * batch_size
        micro_batches = self._micro_batches(first)
        counts = self._global_sum(
            [sum(len(b.canvas_targets) for b, _ in micro_batches), sum(len(b.next_targets) for b, _ in micro_batches)]
        )
        weights = (1 / counts[0], self.config.objective.encoder_loss_weight / counts[1])
        sums = torch.zeros(2, device=self.device)
        for batch, any_coin in micro_batches:
            loss, diffusion, autoregressive = self._losses(batch, weights, any_coin)
            loss.backward()
            sums += torch.stack([diffusion, autoregressive])
        norm = float(clip_gradients(list(self.trained.values()), self.config.optimizer.max_grad_norm))
        diffusion_loss, autoregressive_loss = (s / c for s, c in zip(self._global_sum(sums.tolist()), counts, strict=True))
        if not math.isfinite(norm + diffusion_loss + autoregressive_loss):
            raise UserError(
                f"step {self.step + 1}: the loss or its gradient is not finite (loss {diffusion_loss}, norm {norm}) on examples "
                f"{[e.id for e in self.data.train_examples(range(first, first + batch_size))]}. "
                "The last checkpoint is intact; lower optimizer.lr"
            )
        self.step += 1
        rate = learning_rate(self.config.optimizer, self.step, self.config.train.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        tokens = self._global_sum([sum(len(b.clean) + len(b.canvas) for b, _ in micro_batches)])[0]
        return {
            "loss": diffusion_loss + self.config.objective.encoder_loss_weight * autoregressive_loss,
            "diffusion_loss": diffusion_loss,
            "autoregressive_loss": autoregressive_loss,
            "grad_norm": norm,
            "lr": rate,
            "seconds": seconds,
            "tokens": int(tokens),
            "tokens_per_second": tokens / seconds,
            "memory_bytes": _peak_memory(self.device),
        }

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """The held-out losses at fixed corruption levels with fixed noise; returns the record for metrics.jsonl."""
        started = time.perf_counter()
        levels = self.config.train.validation_levels
        rows = self.data.validation_rows
        if self.config.train.validation_batches is not None:
            rows = min(rows, self.config.train.validation_batches * self.config.train.global_batch_size)
        sums = torch.zeros(len(levels) + 1, 2, device=self.device)  # last row: autoregressive
        stride = self.world_size * self.micro_batch_size
        for start in range(0, rows, stride):
            own = range(start + self.rank * self.micro_batch_size, start + (self.rank + 1) * self.micro_batch_size)
            real = [row < rows for row in own]
            # Every rank makes the same number of passes; what lies past the end counts nothing.
            examples = list(itertools.compress(self.data.validation_examples(own), real if any(real) else [True]))
            for index, level in enumerate(levels):
                batch = pack(examples, [self.data.validation_draws(example, level) for example in examples])
                if index:  # the encoder's loss does not depend on the level
                    batch = replace(batch, next_rows=batch.next_rows[:0], next_targets=batch.next_targets[:0])
                _, diffusion, autoregressive = self._losses(batch.to(self.device), (0.0, 0.0), any_coin=False)
                if any(real):
                    sums[index] += torch.stack([diffusion, diffusion.new_tensor(len(batch.canvas_targets))])
                    sums[-1] += torch.stack([autoregressive, autoregressive.new_tensor(len(batch.next_targets))])
        means = [a / b for a, b in zip(*[iter(self._global_sum(sums.flatten().tolist()))] * 2, strict=True)]
        by_level = {str(level): mean for level, mean in zip(levels, means, strict=False)}
        return {
            "loss": sum(by_level.values()) / len(by_level),
            "levels": by_level,
            "autoregressive_loss": means[-1],
            "seconds": time.perf_counter() - started,
        }

    def _micro_batches(self, first: int) -> list[tuple[PackedBatch, bool]]:
        """This rank's share of the global batch that starts at a position, cut up, with whether any rank needs pass 1."""
        objective = self.config.objective
        size, result = self.micro_batch_size, []
        for start in range(first, first + self.config.train.global_batch_size, self.world_size * size):
            own = range(start + self.rank * size, start + (self.rank + 1) * size)
            examples = self.data.train_examples(own)
            draws = [
                self.data.train_draws(example, position, objective.min_corruption, objective.self_conditioning_probability)
                for example, position in zip(examples, own, strict=True)
            ]
            everyone = range(start, start + self.world_size * size)
            any_coin = self.data.any_self_conditioned(everyone, objective.self_conditioning_probability)
            result.append((pack(examples, draws).to(self.device), any_coin))
        return result

    def _losses(self, batch: PackedBatch, weights: tuple[float, float], any_coin: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.model.inside(losses, batch, weights, any_coin=any_coin, checkpointing=self.config.train.activation_checkpointing)

    def _resume(self) -> None:
        step = self.checkpoints.latest()
        if step is not None:
            self.checkpoints.load(step, self.trained, self.optimizer)
            self.step = step
            if self.metrics is not None:
                self.metrics.resume(step)
            self._report("event", {"event": "resumed", "detail": f"from the checkpoint of step {step}"})

    def _report(self, kind: str, record: dict[str, Any]) -> None:
        record = {"kind": kind, "step": self.step, "time": time.time(), **record}
        self.last[kind] = record
        if self.metrics is not None:
            self.metrics.write(record)
        if self.progress is not None:
            self.progress.show(record)

    def _agreed_to_stop(self) -> bool:
        return self._global_sum([float(self.stop_requested)])[0] > 0

    def _global_sum(self, values: list[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()


def build_optimizer(parameters: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over sharded parameters; one group per mesh, since a fused update takes tensors of one mesh."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": group} for group in groups.values()],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of step 1, 2, ...: linear warm-up that starts at lr / warmup_steps, then a cosine to min_lr at the last step."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * min(1.0, progress)))


def export_path(output: Path, config: RunConfig) -> Path:
    """Where the trained weights of a run stand: `adapter/` or `model/`."""
    return output / ("adapter" if config.train.method == "lora" else "model")


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with open(f"/proc/{os.getpid()}/status", encoding="ascii") as status:  # high-water mark of resident memory, in KiB
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
