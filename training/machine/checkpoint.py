"""Saving the state to resume from, and the matrices of a published model in another precision."""

import json
import os
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import nn

from ...errors import ResumeError
from ...files import STATE_FILE, state_folder, states


@torch.no_grad()
def round_matrices(model: nn.Module, dtype: torch.dtype) -> None:
    """Give matrices (and what has more dimensions) the values that they have in a dtype; they stay in float32."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.ndim > 1:
            tensor.copy_(tensor.to(dtype))


def store_matrices(folder: Path, dtype: torch.dtype) -> None:
    """Store the matrices of a saved model in a dtype; its configuration says what they are loaded as."""
    for path in folder.glob("*.safetensors") if dtype != torch.float32 else []:
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if tensor.dtype == torch.float32 and tensor.ndim > 1:
                tensors[name] = tensor.to(dtype)
        save_file(tensors, path, metadata={"format": "pt"})


def save_state(accelerator: Accelerator, folder: Path, step: int, facts: dict, keep: int) -> Path:
    """Save weights, optimiser, random states and `facts` as folder/step-N, whole or not at all; keep the last `keep`.

    Raises OSError, on every process, where any of them fails.
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
        raise OSError(
            f"Could not save {target} ({errors[0]}); the states before it are as they were. Is the disk full?"
        )
    return target


def find_state(name: str, output_dir: str) -> Path:
    """The state that `--resume_from_checkpoint` means. Raises ResumeError where there is none."""
    if name == "latest":
        found = states(state_folder(output_dir))
        if not found:
            raise ResumeError(f"--resume_from_checkpoint latest: there is no state in {state_folder(output_dir)}.")
        return found[-1]
    path = Path(name)
    if not (path / STATE_FILE).is_file():
        raise ResumeError(f"--resume_from_checkpoint {name}: {path / STATE_FILE} is not there.")
    return path


def load_state(accelerator: Accelerator, path: Path, facts: dict) -> dict:
    """Load a state and return its facts; the states after it are removed.

    Args:
        facts: those of this run: "model_config" and "recipe", which must be the state's.

    Raises ResumeError, with what differs, where the state belongs to another model or another recipe.
    """
    saved = json.loads((path / STATE_FILE).read_text())
    for name in ("model_config", "recipe"):
        differences = compare(saved.get(name, {}), json.loads(json.dumps(facts[name])))
        if differences:
            raise ResumeError(f"{path} is of another {name.split('_')[0]}: {'; '.join(differences)}.")
    accelerator.load_state(str(path))
    if accelerator.is_main_process:
        for later in states(path.parent):
            if later.name > path.name:
                shutil.rmtree(later)
    return saved


def compare(saved: dict, current: dict, prefix: str = "") -> list[str]:
    """What differs between two configurations, one line each."""
    lines = []
    for key in sorted(saved.keys() | current.keys()):
        a, b = saved.get(key), current.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += compare(a, b, f"{prefix}{key}.")
        elif a != b and not key.startswith("_") and key not in ("transformers_version", "dtype", "architectures"):
            lines.append(f"{prefix}{key} is {a} there and {b} here")
    return lines
