"""Save and load training states, and convert the weight matrices of a published model to another data type."""

import json
import os
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ...errors import ResumeError
from ...files import STATE_FILE, state_folder, states

AVERAGE_FILE = "average.safetensors"


@torch.no_grad()
def round_matrices(model: nn.Module, dtype: torch.dtype) -> None:
    """Round all tensors of two or more dimensions to the precision of a data type.

    Args:
        model: model to change; its tensors keep their data type.
        dtype: data type to round to.
    """
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.ndim > 1:
            tensor.copy_(tensor.to(dtype))


def store_matrices(folder: Path, dtype: torch.dtype) -> None:
    """Convert the float32 matrices of a saved model; its configuration still sets the data type that it is loaded in.

    Args:
        folder: folder with .safetensors files, which are overwritten.
        dtype: data type to save in; float32 changes nothing.
    """
    for path in folder.glob("*.safetensors") if dtype != torch.float32 else []:
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if tensor.dtype == torch.float32 and tensor.ndim > 1:
                tensors[name] = tensor.to(dtype)
        save_file(tensors, path, metadata={"format": "pt"})


def save_state(
    accelerator: Accelerator, folder: Path, step: int, facts: dict, keep: int, average: AveragedModel | None = None
) -> Path:
    """Save a training state as folder/step-N, completely or not at all; every process must call this.

    Args:
        accelerator: holds the weights, the optimiser and the random states to save.
        folder: folder for the states of the run.
        step: optimiser steps done.
        facts: further data, which must fit into JSON.
        keep: number of states to keep; older ones are deleted.
        average: the average of the weights to save with it, if there is one.

    Returns:
        The folder of the state.

    Raises:
        OSError: on every process, if any process fails.
    """
    target = folder / f"step-{step:07d}"
    fresh = target.with_name(f".{target.name}.writing")
    error = None
    if accelerator.is_main_process:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(fresh))
        if accelerator.is_main_process and average is not None:
            # As safetensors: Accelerate would store it as a pickle, which loading would execute.
            save_file({name: value.clone() for name, value in average.state_dict().items()}, fresh / AVERAGE_FILE)
        if accelerator.is_main_process:
            (fresh / STATE_FILE).write_text(json.dumps(facts, indent=1))
    except Exception as problem:
        error = str(problem)
    errors = [text for text in gather_object([error]) if text]
    if accelerator.is_main_process and not errors:
        shutil.rmtree(target, ignore_errors=True)
        os.replace(fresh, target)
        for old in states(folder)[:-keep]:
            shutil.rmtree(old)
    elif accelerator.is_main_process:
        shutil.rmtree(fresh, ignore_errors=True)
    accelerator.wait_for_everyone()
    if errors:
        raise OSError(f"Could not save {target} ({errors[0]}); earlier states are unchanged. Is the disk full?")
    return target


def find_state(name: str, output_dir: str) -> Path:
    """Find the training state that `--resume_from_checkpoint` names.

    Args:
        name: folder of a state, or "latest".
        output_dir: output folder of the run, next to which its states are saved.

    Raises:
        ResumeError: if there is no such state.
    """
    if name == "latest":
        found = states(state_folder(output_dir))
        if not found:
            raise ResumeError(f"--resume_from_checkpoint latest: there is no state in {state_folder(output_dir)}.")
        return found[-1]
    path = Path(name)
    if not (path / STATE_FILE).is_file():
        raise ResumeError(f"--resume_from_checkpoint {name}: {path / STATE_FILE} does not exist.")
    return path


def load_state(accelerator: Accelerator, path: Path, facts: dict, average: AveragedModel | None = None) -> dict:
    """Load a training state, and delete the states of later steps.

    Args:
        accelerator: its weights, optimiser and random states are replaced.
        path: folder of the state.
        facts: "model_config" and "recipe" of this run, which must equal those of the state.
        average: the average of the weights, which is replaced too, if there is one.

    Returns:
        The `facts` that were saved with the state.

    Raises:
        ResumeError: if the state belongs to another model or recipe; the message lists the differences.
    """
    saved = json.loads((path / STATE_FILE).read_text())
    if pickles := sorted(path.glob("custom_checkpoint_*.pkl")):
        raise ResumeError(f"{path} contains {pickles[0].name}, a pickle, which is never loaded: start a new run.")
    if average is not None and not (path / AVERAGE_FILE).is_file():
        raise ResumeError(f"{path} has no {AVERAGE_FILE}, which --ema_decay needs.")
    for name in ("model_config", "recipe"):
        differences = compare(saved.get(name, {}), json.loads(json.dumps(facts[name])))
        if differences:
            raise ResumeError(f"{path} belongs to another {name.split('_')[0]}: {'; '.join(differences)}.")
    accelerator.load_state(str(path))
    if average is not None:
        average.load_state_dict(load_file(path / AVERAGE_FILE))
    if accelerator.is_main_process:
        for later in states(path.parent):
            if later.name > path.name:
                shutil.rmtree(later)
    return saved


def compare(saved: dict, current: dict, prefix: str = "") -> list[str]:
    """Compare two configurations.

    Args:
        saved: the saved configuration; dicts in it are compared recursively.
        current: the current configuration.
        prefix: prefix of the names in the result.

    Returns:
        One text per difference.
    """
    lines = []
    for key in sorted(saved.keys() | current.keys()):
        a, b = saved.get(key), current.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += compare(a, b, f"{prefix}{key}.")
        elif a != b and not key.startswith("_") and key not in ("transformers_version", "dtype", "architectures"):
            lines.append(f"{prefix}{key} was {a} and is now {b}")
    return lines
