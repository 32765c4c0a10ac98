"""A training run: set up, train, evaluate, publish."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

import torch
from accelerate.utils import DistributedType, broadcast_object_list
from transformers import PreTrainedModel

from ..errors import brief, printable, reported_errors
from ..files import check_output, locked, state_folder
from ..loading import not_finite
from ..model_cards.card import shown
from .arguments import TrainingArguments
from .checkup.command import check
from .command_line import parse_command_line
from .data.capfilt import CapFiltArguments, capfilt
from .data.shard_writer import ShardsArguments, write_shards
from .data.survey import CheckArguments
from .evaluation.results import evaluate_model, metrics_of
from .evaluation.tasks import Outcome
from .families import Family, family_of
from .loop import Run, fit
from .machine.checkpoint import round_matrices, save_state
from .machine.sharding import whole_model
from .publish import publish
from .resume import state_facts
from .setup import set_up, sources_of

ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
GRACE = 5.0  # seconds after which a process other than the main one ends if its launcher has ended
SAME_REQUEST = 2.0  # seconds within which several signals are one request to stop
RESAMPLES = 1000  # bootstrap resamples for the confidence intervals of the published metrics


def main() -> None:
    """Run the command line. Errors that the user can fix end the program with a one-line message."""
    with reported_errors():
        arguments = parse_command_line()
        commands = {CapFiltArguments: capfilt, ShardsArguments: write_shards, CheckArguments: check}
        commands.get(type(arguments), train)(arguments)


def train(arguments: TrainingArguments, family: Family | None = None) -> None:
    """Train, evaluate and publish a model.

    Args:
        arguments: options of the run.
        family: kind of model to train; if None, the one that `arguments` belongs to.

    Raises:
        ArgumentError: if an option is wrong.
        BadDataError: if too many rows are unusable.
        ResumeError: if the state to resume from belongs to another model or recipe.
        FloatingPointError: if a loss is not finite.
        OSError: if a file cannot be written.
    """
    check_output(arguments.output_dir, sources=sources_of(arguments))
    with contextlib.ExitStack() as stack:
        if os.environ.get("RANK", "0") == "0":
            stack.enter_context(locked(state_folder(arguments.output_dir), f"--output_dir {arguments.output_dir}"))
        stack.enter_context(ends_with_its_launcher())
        run_to_the_end(arguments, family or family_of(arguments))


def run_to_the_end(arguments: TrainingArguments, family: Family) -> None:
    """Train, evaluate and publish; see `train`."""
    run = set_up(arguments, family)
    with interruptible(run):
        fit(run, lambda: log_metrics(run, published_model(run), resamples=0), lambda: save(run))
        saved = save(run)
    (asked,) = broadcast_object_list([run.stop_requested])  # meanwhile; that of the main process counts
    if run.interrupted or asked:
        run.accelerator.end_training()
        if not saved:
            raise OSError(f"Interrupted at step {run.progress.step}, and the state could not be saved.")
        run.accelerator.print(
            f"Interrupted at step {run.progress.step}. Resume with the same command and "
            "--resume_from_checkpoint latest."
        )
        return
    model = published_model(run).eval()
    require_finite(model)
    round_matrices(model, getattr(torch, arguments.publish_dtype))  # the published weights are the evaluated ones
    outcomes = log_metrics(run, model, RESAMPLES)
    model.eval()
    run.accelerator.end_training()
    if run.accelerator.is_main_process:
        publish(run, model, outcomes)


def require_finite(model: PreTrainedModel) -> None:
    """Raise FloatingPointError, with the name of a tensor, if a weight is not finite."""
    if name := not_finite(model):
        raise FloatingPointError(f"{name} is not finite, so the model is not published: lower --learning_rate.")


def published_model(run: Run) -> PreTrainedModel:
    """Return the model to publish: the averaged one if there is one; every process must call this."""
    model = run.average.module if run.average is not None else run.model
    sharded = run.accelerator.is_fsdp2 or run.accelerator.distributed_type == DistributedType.DEEPSPEED
    return whole_model(model) if sharded else model


def log_metrics(run: Run, model: PreTrainedModel, resamples: int) -> list[Outcome]:
    """Evaluate a model, log the metrics and add them to the run's progress.

    Args:
        run: the run.
        model: the model to evaluate.
        resamples: bootstrap resamples for confidence intervals; 0: no intervals.

    Returns:
        The result of each evaluation task; empty if the run has none.
    """
    if not run.evaluations:
        return []
    outcomes = evaluate_model(model, run.processor, run.evaluations, resamples)
    run.wrapped.train()  # the objective keeps locked towers in evaluation mode
    metrics = metrics_of(run.evaluations, outcomes)
    run.progress.evaluations.append({"step": run.progress.step} | metrics)
    run.accelerator.log(metrics, step=run.progress.step)
    first = ", ".join(f"{name} {shown(name, value)}" for name, value in list(metrics.items())[:3])
    run.accelerator.print(f"Step {run.progress.step}: {first}.")
    return outcomes


def save(run: Run) -> bool:
    """Save the training state; on failure print a warning and return False."""
    arguments, step = run.arguments, run.progress.step
    folder = state_folder(arguments.output_dir)
    try:
        path = save_state(run.accelerator, folder, step, state_facts(run), arguments.save_total_limit, run.average)
    except OSError as error:
        run.accelerator.print(f"warning: {brief(error)}")
        return False
    run.accelerator.print(f"State saved to {printable(path)}.")
    return True


@contextlib.contextmanager
def ends_with_its_launcher() -> Iterator[None]:
    """Interrupt the run when the program that launched it ends, so that no process goes on alone.

    Neither `accelerate launch` nor torchrun passes on that it was killed. The main process stops after its step, and
    saves the state. Another process cannot stop by itself: it ends, so that the others notice and are started again.
    """
    parent, over = int(os.environ.get("VLP_PARENT", os.getppid())), threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGTERM)
                if os.environ.get("RANK", "0") != "0" and not over.wait(GRACE):
                    os._exit(1)
                return

    launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    if launched:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


@contextlib.contextmanager
def interruptible(run: Run) -> Iterator[None]:
    """Let Ctrl-C, SIGTERM or SIGHUP end the training loop after the current step.

    A second Ctrl-C ends it at once, without a state; SIGTERM and SIGHUP do not. Signals that follow the first one
    within `SAME_REQUEST` are no second request: a launcher that is stopped passes the signal on, or sends another, or
    ends (see `ends_with_its_launcher`).
    """
    first = None

    def stop(number, frame):
        nonlocal first
        if first is not None:
            if number == signal.SIGINT and time.monotonic() - first > SAME_REQUEST:
                raise KeyboardInterrupt
            return
        run.stop_requested, first = True, time.monotonic()
        if run.accelerator.is_main_process:  # not by print, which a signal may have interrupted
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, b"\nStopping after this step, then saving the state; Ctrl-C again ends the run at once.\n")

    before = {number: signal.signal(number, stop) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
