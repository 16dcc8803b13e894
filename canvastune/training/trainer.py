"""The training loop. A step is that of docs/method.md.

Examples and their noise, two losses over global counts, one update.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from canvastune.checkpoint.resume import Checkpoints
from canvastune.config import RunConfig
from canvastune.config.schema import Blocks
from canvastune.data.dataset import TrainingDataset
from canvastune.data.packing import PackedBatch, Part, pack, padding_batch
from canvastune.distributed.parallelize import clip_gradients
from canvastune.distributed.sync import gather_results
from canvastune.errors import UserError
from canvastune.logging import TrainingProgress
from canvastune.model.diffusion_gemma import WeightTiedDiffusionGemma
from canvastune.objective import LossWeights, losses, row_losses
from canvastune.perf_model.architecture import describe
from canvastune.perf_model.flops import needed_flops
from canvastune.perf_model.hardware import accelerator_of, peak_rate
from canvastune.tracking import MetricsWriter, lost_energy, read_metrics
from canvastune.training.energy import EnergyMeter
from canvastune.training.optimizer import build_optimizer, learning_rate


@dataclass(frozen=True)
class MicroBatch:
    """What one rank computes in one forward of a step."""

    batch: PackedBatch  # on the device
    is_padding: bool  # whether the rank has no example here, and only takes part
    whole: PackedBatch | None  # all of the examples that have their last part here, to count them
    any_self_conditioned: bool  # on any rank


@dataclass
class TrainState:
    """Progress of a run, stored in its checkpoints with weights and optimizer state."""

    step: int = 0  # optimizer steps done, including skipped ones
    validation: float | None = None  # the held-out loss at this step, if it was measured
    best: float | None = None  # the lowest so far
    not_better: int = 0  # validations in a row that were not below `best`
    skipped: int = 0  # steps whose loss or gradient was not finite
    skipped_in_a_row: int = 0
    tokens: int = 0  # of all steps


class Trainer:
    """Trains a loaded, sharded model; every rank makes the same calls."""

    def __init__(
        self,
        config: RunConfig,
        model: WeightTiedDiffusionGemma,
        data: TrainingDataset,
        checkpoints: Checkpoints,
        metrics: MetricsWriter | None,
        display: TrainingProgress | None,
    ) -> None:
        """
        Args:
            metrics: receives the records; None on every rank but the first. Likewise `display`.
        """
        self.config, self.model, self.data = config, model, data
        self.checkpoints, self.metrics, self.display = checkpoints, metrics, display
        # called before each piece of work, with its name
        self.heartbeat: Callable[[str], object] = str
        # called after the last step: whether its weights can be exported, on every rank
        self.can_export: Callable[[], bool] = lambda: False
        self.checkpoints.waiting = lambda: self.heartbeat(
            f"waiting at step {self.progress.step} until a checkpoint is written"
        )
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = next(model.parameters()).device
        self.place = device_name(self.device, self.world_size)
        self.energy = EnergyMeter(self.device)
        self.place |= self.energy.place
        self.architecture = describe(model, config)
        accelerator = accelerator_of(self.place.get("device_name", ""))
        # Of a rank.
        self.peak_flops = peak_rate(self.architecture, accelerator) if accelerator else None
        self.trained = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self.optimizer = build_optimizer(list(self.trained.values()), config.optimizer)
        self.progress = TrainState()
        self.stop_requested: float | None = None  # when it was requested
        self.last: dict[str, dict[str, Any]] = {}
        share = config.train.global_batch_size // self.world_size
        self.micro_batch_size = config.train.micro_batch_size or share

    def run(self) -> bool:
        """Train to the end, from the newest checkpoint if there is one.

        Return False if a stop was requested and the state saved.

        Raises:
            UserError: the loss stays non-finite, or a checkpoint cannot be read or written; the
                last good one is kept.
        """
        try:
            return self._loop()
        except UserError:  # on all ranks: let the checkpoint in the background complete
            self.checkpoints.wait()
            raise

    def _loop(self) -> bool:
        train, progress = self.config.train, self._resume()
        saved = progress.step
        while True:
            due = progress.step % train.validate_every == 0 or progress.step == train.steps
            validated = due and progress.validation is None and self._validate()
            done = progress.step == train.steps or (
                train.early_stopping is not None and progress.not_better >= train.early_stopping
            )
            done = done and not (due and progress.validation is None)
            stop = self._agreed_to_stop() and not done
            if progress.step > saved and (
                progress.step % train.checkpoint_every == 0 or done or stop
            ):
                if not (done and self._last_is_exported()):
                    self._save()
                saved = progress.step
            elif validated and progress.step == saved > 0:
                # The last attempt was stopped during this validation.
                self.checkpoints.update_metadata(saved, asdict(progress))
            if done or stop:
                break
            self._train_one_step()
        self.checkpoints.wait()
        if stop and self.stop_requested is not None:
            took = time.monotonic() - self.stop_requested
            grace = f"state saved {took:.1f} s after the request, of {train.stop_grace} s"
            self._report_event("stopped", grace)
        return done

    def train_step(self) -> dict[str, Any]:
        """Train one step on the next global batch; return its record for metrics.jsonl.

        If the loss or its gradient is not finite, no weight changes, and `examples` of the record
        has file and row of each of the offending ones.
        """
        started = time.perf_counter()
        batch_size = self.config.train.global_batch_size
        first = self.progress.step * batch_size
        micro_batches = self._micro_batches(first)
        counts = self._global_counts([micro.whole for micro in micro_batches if micro.whole])
        encoder_weight = self.config.objective.encoder_loss_weight
        weights = (1 / counts[0], encoder_weight / counts[1])
        sums = torch.zeros(len(micro_batches), 2, device=self.device)
        for index, micro in enumerate(micro_batches):
            loss, diffusion, autoregressive = self.compute_losses(
                micro.batch,
                (0.0, 0.0) if micro.is_padding else weights,
                micro.any_self_conditioned,
            )
            loss.backward()
            if not micro.is_padding:
                sums[index] = torch.stack([diffusion, autoregressive])
        gradient_norm = clip_gradients(
            list(self.trained.values()), self.config.optimizer.max_grad_norm
        )
        taken = torch.tensor([self.energy.joules()], dtype=torch.float64)
        totals = torch.cat(
            [sums.sum(0, dtype=torch.float64), taken.to(self.device, non_blocking=True)]
        )
        dist.all_reduce(totals)
        # The only wait for the device in a step.
        diffusion_loss, autoregressive_loss, tokens, flops, norm, joules = torch.cat(
            [totals[:2] / counts[:2], counts[2:], gradient_norm[None], totals[2:]]
        ).tolist()
        self.progress.step += 1
        self.progress.tokens += int(tokens)
        rate = learning_rate(self.config.optimizer, self.progress.step, self.config.train.steps)
        record: dict[str, Any] = {
            "loss": diffusion_loss + encoder_weight * autoregressive_loss,
            "diffusion_loss": diffusion_loss,
            "autoregressive_loss": autoregressive_loss,
            "grad_norm": norm,
            "lr": rate,
        }
        if math.isfinite(norm + record["loss"]):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.checkpoints.wait_staged()  # the state may still be being copied
            self.optimizer.step()
        else:
            record["examples"] = self._offending(first, sums)
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        of_a_rank = flops / seconds / self.world_size
        return record | {
            "seconds": seconds,
            "tokens": int(tokens),
            "tokens_seen": self.progress.tokens,  # axes for runs whose steps differ in size
            "epoch": self.progress.step * batch_size / len(self.data),
            "tokens_per_second": tokens / seconds,
            "tflops": of_a_rank / 1e12,  # only work that the losses need, per rank
            **({"mfu": of_a_rank / self.peak_flops} if self.peak_flops else {}),
            "memory_bytes": _peak_memory(self.device),
            **self.energy.field(joules),  # of all ranks, since the record before
        }

    def load_best_checkpoint(self) -> int:
        """Load the weights of the best checkpoint (lowest validation loss) unless these are it.

        Return their step.
        """
        best = self._better_checkpoint()
        if best is None:
            return self.progress.step
        self.checkpoints.load_weights(best, self.trained)
        return best

    def _better_checkpoint(self) -> int | None:
        """Return the step of the checkpoint to export instead of the last step's weights."""
        best, loss = self.checkpoints.best(), self.progress.validation
        if self.config.train.export == "last" or best is None:
            return None
        last_is_best = loss is not None and math.isfinite(loss) and loss < best[0]
        return None if last_is_best or best[1] == self.progress.step else best[1]

    def _last_is_exported(self) -> bool:
        """Return whether the last step's weights go into the model that is written next.

        A checkpoint with all weights of a model takes as long to write as the model, or longer: it
        is only written where the model cannot be.
        """
        return (
            self.config.train.method == "full"
            and self._better_checkpoint() is None
            and self.can_export()
        )

    @torch.no_grad()
    def validate(self) -> dict[str, Any] | None:
        """Measure the held-out losses at fixed corruption levels with fixed noise.

        Return the record for metrics.jsonl.

        Returns None if a stop was requested before it was done.
        """
        started = time.perf_counter()
        train = self.config.train
        levels, setting = train.validation_levels, train.validation_blocks
        rows = train.validated_rows(self.data.validation_rows)
        blocks = 0 if setting == 1 else self.data.most_validation_blocks(rows)
        # Of each level, of the clean tokens, and of each level's blocks.
        sums = torch.zeros(len(levels) + 1 + len(levels) * blocks, 2, device=self.device)
        stride = self.world_size * self.micro_batch_size
        for start in range(0, rows, stride):
            self.heartbeat(f"validating at step {self.progress.step}")
            if self._agreed_to_stop():
                return None
            own = range(
                start + self.rank * self.micro_batch_size,
                start + (self.rank + 1) * self.micro_batch_size,
            )
            real = [row < rows for row in own]
            # Every rank makes the same number of passes; rows past the end do not count.
            examples = list(
                itertools.compress(
                    self.data.validation_examples(own), real if any(real) else [True]
                )
            )
            for group in levels_at_once(self.device, len(levels), setting):
                draws = [
                    [
                        draw
                        for index in group
                        for draw in self.data.validation_draws(example, levels[index], setting)
                    ]
                    for example in examples
                ]
                batch = pack(examples, draws)
                if group[0]:  # the encoder's loss does not depend on the level
                    batch = replace(
                        batch, next_rows=batch.next_rows[:0], next_targets=batch.next_targets[:0]
                    )
                _, canvas, pairs = self.model.run_under_fsdp(
                    row_losses,
                    batch.to(self.device),
                    (0.0, 0.0),
                    any_self_conditioned=False,
                    checkpointing=train.activation_checkpointing,
                )
                if not any(real):
                    continue
                sums[len(levels)] += _sum_and_count(pairs)
                if len(group) == 1:
                    sums[group[0]] += _sum_and_count(canvas)
                else:  # a canvas of each level for each example
                    canvases = canvas.split(batch.canvas_lengths)
                    for index, of_canvas in zip(itertools.cycle(group), canvases, strict=False):
                        sums[index] += _sum_and_count(of_canvas)
                if blocks:
                    own_blocks = [draw.block for example in draws for draw in example]
                    first = len(levels) + 1 + group[0] * blocks
                    for block, of_canvas in zip(
                        own_blocks, canvas.split(batch.canvas_lengths), strict=True
                    ):
                        sums[first + block] += _sum_and_count(of_canvas)
        *summed, joules = self._global_sum([*sums.flatten().tolist(), self.energy.joules()])
        totals = list(zip(*[iter(summed)] * 2, strict=True))
        means = [total / count for total, count in totals[: len(levels) + 1]]
        by_level = {str(level): mean for level, mean in zip(levels, means, strict=False)}
        # A block that no chosen canvas has is without a loss.
        of_blocks = iter(
            total / count if count else None for total, count in totals[len(levels) + 1 :]
        )
        by_block = {str(level): list(itertools.islice(of_blocks, blocks)) for level in levels}
        return {
            "loss": sum(by_level.values()) / len(by_level),
            "levels": by_level,
            **({"blocks": by_block} if blocks else {}),
            "autoregressive_loss": means[-1],
            "seconds": time.perf_counter() - started,
            **self.energy.field(joules),
        }

    def _micro_batches(self, first: int) -> list[MicroBatch]:
        """Pack this rank's micro-batches, each with whether any rank self-conditions."""
        result = []
        for everyone in self._shares(first):
            own = everyone[self.rank]
            examples = self.data.train_examples(part.position for part in own)
            draws = [
                self.data.train_draws(example, part.position)
                for example, part in zip(examples, own, strict=True)
            ]
            counted = [at for at, part in enumerate(own) if part.is_last]
            whole = (
                pack([examples[at] for at in counted], [draws[at] for at in counted])
                if counted
                else None
            )
            if all(part.is_last and part.first == 0 for part in own):
                batch = whole
            else:
                batch = pack(
                    examples,
                    [drawn[part.blocks] for drawn, part in zip(draws, own, strict=True)],
                    scored=[part.is_last for part in own],
                )
            result.append(
                MicroBatch(
                    batch=(batch or padding_batch()).to(self.device),
                    is_padding=batch is None,
                    whole=whole,
                    any_self_conditioned=self.data.any_self_conditioned(itertools.chain(*everyone)),
                )
            )
        return result

    def _shares(self, first: int) -> list[list[list[Part]]]:
        """Return the parts of the global batch that starts at a position.

        [micro-batch][rank], so that ranks finish each forward together.
        """
        train = self.config.train
        return self.data.balance_microbatches(
            range(first, first + train.global_batch_size),
            self.world_size,
            self.micro_batch_size,
            train.micro_batch_blocks,
        )

    def compute_losses(
        self, batch: PackedBatch, weights: LossWeights, any_self_conditioned: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return a batch's weighted loss and its diffusion and autoregressive sums."""
        return self.model.run_under_fsdp(
            losses,
            batch,
            weights,
            any_self_conditioned=any_self_conditioned,
            checkpointing=self.config.train.activation_checkpointing,
        )

    def _train_one_step(self) -> None:
        self.heartbeat(f"in step {self.progress.step + 1}")
        record = self.train_step()
        self.progress.validation = None
        if "examples" not in record:
            self.progress.skipped_in_a_row = 0
            self._report("train", record)
            return
        self.progress.skipped += 1
        self.progress.skipped_in_a_row += 1
        found = (
            f"loss {record['loss']:.4g}, gradient norm {record['grad_norm']:.4g}, "
            f"on rows {', '.join(record['examples'])}"
        )
        energy = {name: record[name] for name in ("energy_joules",) if name in record}
        self._report_event("skipped_step", found, **energy)
        allowed, in_a_row = self.config.train.max_skipped_steps, self.progress.skipped_in_a_row
        if in_a_row > allowed or self.progress.skipped == self.config.train.steps:
            raise UserError(
                f"step {self.progress.step}: loss or gradient is not finite, as in "
                f"{in_a_row - 1} steps before it (train.max_skipped_steps: {allowed}): {found}",
                hint=(
                    "Inspect these rows, or lower optimizer.lr; the last checkpoint is intact."
                    if self.progress.skipped < self.progress.step
                    else "No step was finite, and none changed a weight: check the base model's "
                    "own weights, and whether they need train.precision=float32."
                ),
            )

    def _offending(self, first: int, sums: torch.Tensor) -> list[str]:
        """Return file and row of the examples in the micro-batches whose loss is not finite.

        All, if only the gradient is not.
        """
        bad = (~sums.isfinite().all(dim=1)).nonzero().flatten().tolist()
        shares = self._shares(first)
        own = [part.position for index in bad for part in shares[index][self.rank]]
        positions = sorted(
            {position for found in gather_results(lambda: own) for position in found}
        )
        everyone = list(range(first, first + self.config.train.global_batch_size))
        return self.data.train_origins(positions or everyone)

    def _validate(self) -> bool:
        record = self.validate()
        if record is None:
            return False
        progress = self.progress
        progress.validation = record["loss"]
        if math.isfinite(record["loss"]) and (
            progress.best is None or record["loss"] < progress.best
        ):
            progress.best, progress.not_better = record["loss"], 0
        else:
            progress.not_better += 1
        self._report("validation", record)
        return True

    def _save(self) -> None:
        self.heartbeat(f"saving step {self.progress.step}")
        step, steps = self.progress.step, self.config.train.steps
        # `train.steps` of a run cannot change, so nothing is trained after the last one.
        optimizer = self.optimizer if step < steps else None
        self.checkpoints.save(step, self.trained, optimizer, asdict(self.progress))
        self._report_event("checkpoint", "stop requested" if self.stop_requested else "")

    def _resume(self) -> TrainState:
        found, damages = self.checkpoints.restore(self.trained, self.optimizer)
        if found is None:
            self._report_event("started", f"on {_format_event(self.place)}", **self.place)
            return self.progress
        self.progress, lost = TrainState(**found), {}
        if self.metrics is not None:
            lost = lost_energy(self.metrics.resume(self.progress.step))
            self.last = {record["kind"]: record for record in read_metrics(self.metrics.path)}
        for damage in damages:
            self._report_event("damaged_checkpoint", damage)
        detail = f"from the checkpoint of step {self.progress.step}, on {_format_event(self.place)}"
        self._report_event("resumed", detail, **self.place, **lost)
        return self.progress

    def _report_event(self, name: str, detail: str, **more: Any) -> None:
        self._report("event", {"event": name, "detail": detail, **more})

    def _report(self, kind: str, record: dict[str, Any]) -> None:
        record = {"kind": kind, "step": self.progress.step, "time": time.time(), **record}
        self.last[kind] = record
        if self.metrics is not None:
            self.metrics.write(record)
        if self.display is not None:
            self.display.show(record)

    def _agreed_to_stop(self) -> bool:
        stop, failed = self._global_sum(
            [float(self.stop_requested is not None), float(self.checkpoints.failed)]
        )
        if failed:
            self.checkpoints.wait()  # raises, on all ranks
        return stop > 0

    def _global_counts(self, batches: list[PackedBatch]) -> torch.Tensor:
        """Sum canvas targets, pair targets, tokens and FLOPs over all ranks, float64[4].

        What several forwards compute again of an example counts once.
        """
        sizes = [
            (
                len(b.canvas_targets),
                len(b.next_targets),
                len(b.clean) + len(b.canvas),
                needed_flops(self.architecture, b),
            )
            for b in batches
        ]
        counts = torch.tensor(sizes, dtype=torch.float64).view(-1, 4).sum(0)
        counts = counts.to(self.device, non_blocking=True)
        dist.all_reduce(counts)
        return counts

    def _global_sum(self, values: list[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()


def levels_at_once(device: torch.device, levels: int, setting: Blocks) -> list[list[int]]:
    """Return which of the validation's levels share a forward, by their indices.

    On a GPU all of an example's levels, each with one canvas, share its clean tokens: a fifth of the
    launches, which bound small batches. Without gradients they take hardly more memory than a
    training step. On a CPU each has its own, so that the order of summation stays as it was.
    """
    if device.type == "cuda" and setting == 1:
        return [list(range(levels))]
    return [[index] for index in range(levels)]


def export_path(output: Path, config: RunConfig) -> Path:
    """Return the folder of a run's trained weights: `adapter/` or `model/`."""
    return output / ("adapter" if config.train.method == "lora" else "model")


def device_name(device: torch.device, ranks: int) -> dict[str, Any]:
    """Describe the hardware of a run, as its records name it."""
    if device.type == "cuda":
        return {"ranks": ranks, "device": "cuda", "device_name": torch.cuda.get_device_name(device)}
    return {"ranks": ranks, "device": "cpu", "threads": torch.get_num_threads()}


def _sum_and_count(rows: torch.Tensor) -> torch.Tensor:
    return torch.stack([rows.sum(), rows.new_tensor(len(rows))])


def _format_event(place: dict[str, Any]) -> str:
    if "device_name" in place:
        return f"{place['ranks']} x {place['device_name']}"
    return f"{place['ranks']} x CPU, threads of each: {place['threads']}"


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with open("/proc/self/status", encoding="ascii") as status:
        # The high-water mark of resident memory, in KiB.
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
