"""The training loop: `train_step` does one optimiser step; `fit` decides when to log, evaluate and save."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from .arguments import TrainingArguments
from .data.batches import BadRows, Batch
from .evaluation.pictures import Pictures
from .machine.clock import Clock
from .machine.optim import learning_rate_factor
from .machine.sharding import gathered
from .objectives.base import Objective


@dataclass
class Progress:
    """Progress of a run; saved in its training state."""

    step: int = 0  # optimiser steps done
    samples: int = 0  # samples used, over all processes
    seconds: float = 0.0  # time spent training, without evaluating and saving
    losses: list[str] = field(default_factory=list)  # names of the losses
    history: list[dict] = field(default_factory=list)  # logged losses
    evaluations: list[dict] = field(default_factory=list)  # metrics of each evaluation
    places: dict[str, dict] = field(default_factory=dict)  # positions of this process' shard streams, by stream number


@dataclass
class Run:
    """Everything that a run needs, as built by `set_up`."""

    arguments: TrainingArguments
    accelerator: Accelerator
    rows: Dataset | None  # training data; None for shards
    processor: ProcessorMixin
    model: PreTrainedModel  # the model being trained
    objective: Objective
    wrapped: torch.nn.Module  # the objective, wrapped by Accelerate
    optimizer: torch.optim.Optimizer
    to_pixel_values: Callable[[Tensor], Tensor]
    total_samples: int | None  # of the schedule, if it is a number of epochs; it may be resumed with other batches
    bad_rows: BadRows
    average: AveragedModel | None = None
    evaluations: list[Pictures] = field(default_factory=list)  # the prepared data of each evaluation task
    batches: Iterator[Batch] | None = None  # created after resuming, so that they continue from there
    progress: Progress = field(default_factory=Progress)
    stop_requested: bool = False  # this process was asked to stop
    interrupted: bool = False  # all processes stop before the next step

    def share_done(self) -> float:
        """Return the completed share of the schedule, from 0 to 1."""
        arguments, progress, done = self.arguments, self.progress, 0.0
        if self.total_samples:
            done = progress.samples / self.total_samples
        if arguments.max_train_steps:
            done = progress.step / arguments.max_train_steps
        if arguments.max_train_minutes:
            done = max(done, progress.seconds / (60 * arguments.max_train_minutes))
        return min(done, 1.0)


def train_step(run: Run, share_done: float) -> dict[str, Tensor]:
    """Do one optimiser step.

    Args:
        run: the run; its progress is updated.
        share_done: completed share of the schedule, from 0 to 1.

    Returns:
        The losses of the last batch of the step by name, as scalars on the device.
    """
    arguments, accelerator = run.arguments, run.accelerator
    factor = learning_rate_factor(run.progress.step, arguments.warmup_steps, share_done)
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * (1.0 if group["constant"] else factor)
    run.objective.before_step(run.progress.step, share_done)
    for _ in range(arguments.gradient_accumulation_steps):
        batch = next(run.batches)
        run.bad_rows.update(batch)
        run.progress.places |= batch.place
        run.progress.samples += len(batch) * accelerator.num_processes
        with accelerator.accumulate(run.wrapped):
            device = accelerator.device
            losses = run.wrapped(
                pixel_values=run.to_pixel_values(batch.pixels.to(device, non_blocking=True)),
                input_ids=batch.input_ids.to(device, non_blocking=True),
                text_index=batch.text_index.to(device, non_blocking=True),
                caption_ids=batch.caption_ids.to(device),
                image_ids=batch.image_ids.to(device),
                **{name: value.to(device, non_blocking=True) for name, value in batch.extra.items()},
            )
            accelerator.backward(sum(losses.values()))
            if accelerator.sync_gradients and arguments.max_grad_norm:
                accelerator.clip_grad_norm_(run.wrapped.parameters(), arguments.max_grad_norm)
            run.optimizer.step()
            run.optimizer.zero_grad()
    run.objective.after_step()
    if run.average is not None:
        with gathered(run.model.parameters()):
            run.average.update_parameters(run.model)
    run.progress.step += 1
    return {name: loss.detach() for name, loss in losses.items()}


def fit(run: Run, evaluate: Callable[[], dict], save: Callable[[], object]) -> None:
    """Train until the schedule ends or the run is interrupted.

    Args:
        run: the run.
        evaluate: called every `eval_steps` steps.
        save: called every `save_steps` steps and every `save_minutes` minutes.
    """
    arguments, progress, clock = run.arguments, run.progress, Clock(run.accelerator.num_processes)
    saved_at = progress.seconds
    bar = tqdm(total=1.0, initial=run.share_done(), unit="", disable=not run.accelerator.is_main_process,
               mininterval=1.0, miniters=0,
               bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}")  # fmt: skip
    while True:
        started = time.perf_counter()
        progress.seconds, run.interrupted = clock.agree(progress.seconds, run.stop_requested)
        waited = time.perf_counter() - started
        share = run.share_done()
        bar.update(share - bar.n)
        if share >= 1 or run.interrupted:
            break
        if arguments.save_minutes and progress.seconds - saved_at > 60 * arguments.save_minutes:
            saved_at = progress.seconds
            save()
        started = time.perf_counter()
        losses = train_step(run, share)
        logged = progress.step % arguments.logging_steps == 0 or progress.step == 1
        values = {name: loss.item() for name, loss in losses.items()} if logged else {}
        progress.seconds += clock.count(waited + time.perf_counter() - started)
        if logged:
            log(run, values, bar)
        if arguments.eval_steps and progress.step % arguments.eval_steps == 0 and run.share_done() < 1:
            evaluate()
        if arguments.save_steps and progress.step % arguments.save_steps == 0 and run.share_done() < 1:
            save()
    bar.close()


def log(run: Run, losses: dict[str, float], bar: tqdm) -> None:
    """Log the losses to the history, the trackers and the progress bar.

    Raises:
        FloatingPointError: if a loss is not finite.
    """
    progress = run.progress
    for name, value in losses.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"The {name} loss is {value} at step {progress.step}: lower --learning_rate, or --mixed_precision no."
            )
    progress.losses = sorted(losses)
    values = losses | run.objective.facts() | {"learning_rate": run.optimizer.param_groups[0]["lr"]}
    if progress.seconds:  # several processes have agreed on no time before the second step
        values["samples_per_second"] = progress.samples / progress.seconds
    progress.history.append({"step": progress.step, "samples": progress.samples} | values)
    run.accelerator.log(values, step=progress.step)
    shown = {name: f"{value:.3f}" for name, value in losses.items()}
    rate = f"{values.get('samples_per_second', 0):.0f}"
    bar.set_postfix(shown | {"step": progress.step, "samples/s": rate}, refresh=False)
