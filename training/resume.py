"""The data that a training state holds besides its tensors, and resuming from it."""

import dataclasses
from pathlib import Path

from accelerate.utils import gather_object, set_seed

from ..errors import ResumeError, printable
from .arguments import names_of
from .data.sources import is_shards
from .loop import Progress, Run
from .machine.checkpoint import load_state


def state_facts(run: Run) -> dict:
    """Collect a run's progress, and the settings that a resumed run must share; every process must call this.

    Returns:
        "model_config" and "recipe", which must not change, "progress", "bad_rows" and "processes".
    """
    arguments, accelerator = run.arguments, run.accelerator
    recipe = {name: getattr(arguments, name) for name in names_of(arguments, "bound")}
    recipe["ema_decay"] = bool(arguments.ema_decay)
    progress = dataclasses.asdict(run.progress)
    if is_shards(arguments.dataset_name) or arguments.streaming:  # each process knows the positions of its own streams
        workers, rank = max(1, arguments.num_workers), accelerator.process_index
        everyone = workers * accelerator.num_processes
        own = {n: place for n, place in run.progress.places.items() if int(n) % everyone // workers == rank}
        progress["places"] = {number: place for part in gather_object([own]) for number, place in part.items()}
    return {
        "model_config": run.model.config.to_dict(),
        "recipe": recipe,
        "progress": progress,
        "bad_rows": list(run.bad_rows.causes.items()),
        "processes": accelerator.num_processes,
    }


def resume(run: Run, path: Path) -> None:
    """Resume a run from a training state.

    Learning rate, weight decay and the like are taken from the run's options, not from the state. The number of
    processes may be another one, except with DeepSpeed: the order of the samples does not depend on it, and shards
    go on where each of their streams was.

    Args:
        run: a run that has not started; its model, optimiser and progress are replaced.
        path: folder of the state.

    Raises:
        ResumeError: if the state belongs to another model or recipe; the message lists the differences.
    """
    options = [{k: v for k, v in group.items() if k != "params"} for group in run.optimizer.param_groups]
    facts = load_state(run.accelerator, path, state_facts(run), run.arguments.output_dir, run.average)
    for group, values in zip(run.optimizer.param_groups, options, strict=True):
        group.update(values)
    run.progress = progress_of(facts["progress"], path)
    run.bad_rows.causes = {key: cause for key, cause in facts["bad_rows"]}
    processes = facts.get("processes", run.accelerator.num_processes)
    if processes != run.accelerator.num_processes:
        if run.accelerator.process_index >= processes:  # it has no random state of its own
            set_seed((run.arguments.seed + 1_000_003 * run.accelerator.process_index + run.progress.step) % 2**32)
        run.accelerator.print(f"{processes} processes before, {run.accelerator.num_processes} now.")
    most = run.arguments.max_train_steps
    if most and run.progress.step > most:
        raise ResumeError(
            f"The state was saved at step {run.progress.step:,}, past the end: --max_train_steps {most:,}."
        )
    end = f" It ends after step {most:,}." if most else ""
    run.accelerator.print(f"Resumed from {printable(path)}, step {run.progress.step}.{end}")


def progress_of(saved: dict, path: Path) -> Progress:
    """The progress in a state.

    Args:
        saved: its fields.
        path: folder of the state, for the error message.

    Raises:
        ResumeError: if a field is missing, unknown, or has an impossible value.
    """
    fields = {item.name: item.type for item in dataclasses.fields(Progress)}
    for name in fields.keys() ^ saved.keys():
        what = "lacks" if name in fields else "has, perhaps from a newer version of vlp,"
        raise ResumeError(f"The state {printable(path, 160)} {what} the field {printable(name, 60)} of its progress.")
    for name, value in saved.items():
        kind = {"step": int, "samples": int, "seconds": (int, float), "places": dict}.get(name, list)
        number = name in ("step", "samples", "seconds")
        if not isinstance(value, kind) or isinstance(value, bool) or (number and not 0 <= value < 2**53):
            raise ResumeError(
                f"The state {printable(path, 160)} is damaged: {name} of its progress is {printable(repr(value), 60)}."
            )
    return Progress(**saved)
