"""A training run: set up, fit, publish."""

import contextlib
import signal
import sys
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from ..errors import ArgumentError, BadDataError, ResumeError
from ..files import state_folder
from ..model_cards.card import shown
from .arguments import TrainingArguments
from .command_line import parse_command_line
from .data.capfilt import CapFiltArguments, capfilt
from .data.shards import ShardsArguments, write_shards
from .evaluation.results import evaluate_model, metrics_of
from .evaluation.tasks import Outcome
from .families import Family, family_of
from .loop import Run, fit
from .machine.checkpoint import round_matrices, save_state
from .machine.sharding import whole_model
from .publish import publish
from .resume import state_facts
from .setup import set_up

RESAMPLES = 1000  # of the bootstrap, for the intervals of the published figures


def main() -> None:
    """Train as the command line says. Errors that a user can fix end the program with one line."""
    arguments = parse_command_line()
    try:
        {CapFiltArguments: capfilt, ShardsArguments: write_shards}.get(type(arguments), train)(arguments)
    except (ArgumentError, BadDataError, ResumeError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")


def train(arguments: TrainingArguments, family: Family | None = None) -> None:
    """Do a whole run.

    Args:
        arguments: its options. family: the kind of model; the one whose options these are, if not given.

    Raises:
        ArgumentError: for a wrong option. BadDataError: if too many rows are bad. ResumeError: if the state to resume
            from does not fit. FloatingPointError: if a loss is not finite. OSError: if something cannot be written.
    """
    run = set_up(arguments, family or family_of(arguments))
    with interruptible(run):
        fit(run, lambda: log_metrics(run, published_model(run), resamples=0), lambda: save(run))
    saved = save(run)
    if run.interrupted:
        run.accelerator.end_training()
        if not saved:
            raise OSError(f"Interrupted at step {run.progress.step}, and the state could not be saved.")
        run.accelerator.print(f"Interrupted at step {run.progress.step}. Resume with --resume_from_checkpoint latest.")
        return
    model = published_model(run).eval()
    round_matrices(model, getattr(torch, arguments.publish_dtype))  # the published weights are the evaluated ones
    outcomes = log_metrics(run, model, RESAMPLES)
    model.eval()
    run.accelerator.end_training()
    if run.accelerator.is_main_process:
        publish(run, model, outcomes)


def published_model(run: Run) -> PreTrainedModel:
    """The model that would be published now: the average of the weights if there is one. Called by every process."""
    if run.accelerator.is_fsdp2:
        return whole_model(run.model)
    return run.average.module if run.average is not None else run.model


def log_metrics(run: Run, model: PreTrainedModel, resamples: int) -> list[Outcome]:
    """Evaluate a model, and log and remember the metrics."""
    if not run.evaluations:
        return []
    outcomes = evaluate_model(model, run.processor, run.evaluations, resamples)
    run.wrapped.train()  # only the objective knows that locked towers stay in evaluation mode
    metrics = metrics_of(run.evaluations, outcomes)
    run.progress.evaluations.append({"step": run.progress.step} | metrics)
    run.accelerator.log(metrics, step=run.progress.step)
    first = ", ".join(f"{name} {shown(name, value)}" for name, value in list(metrics.items())[:3])
    run.accelerator.print(f"Step {run.progress.step}: {first}.")
    return outcomes


def save(run: Run) -> bool:
    """Save the state to resume from; returns whether that succeeded, and warns if not."""
    arguments, step = run.arguments, run.progress.step
    folder = state_folder(arguments.output_dir)
    try:
        path = save_state(run.accelerator, folder, step, state_facts(run), arguments.save_total_limit)
    except OSError as error:
        run.accelerator.print(f"warning: {error}")
        return False
    run.accelerator.print(f"State saved in {path}.")
    return True


@contextlib.contextmanager
def interruptible(run: Run) -> Iterator[None]:
    """Ctrl-C (or SIGTERM) ends the loop after the current step, and the state is saved; a second one ends at once."""

    def stop(number, frame):
        if run.interrupted:
            raise KeyboardInterrupt
        run.interrupted = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
