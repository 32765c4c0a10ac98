"""Saving: the state to resume from, and the folder to publish, each written whole or not at all."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import nn

from .arguments import ArgumentError

STATE_FILE = "trainer_state.json"
TEACHER_FILE = "teacher.safetensors"  # of a pre-training that was begun elsewhere, as vlp-convert writes it


class ResumeError(ValueError):
    """A state that cannot be gone on from."""


def state_folder(output_dir: str | Path) -> Path:
    """Where the resume states of a run are: beside the folder to publish, so that they are not published with it."""
    return Path(f"{str(output_dir).rstrip('/')}.resume")


def write_whole(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside `target`, then put it in its place; on any error the old folder stays.

    Raises OSError, with what happened and what is left, where `write` fails.
    """
    fresh = target.with_name(f".{target.name}.writing")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        write(fresh)
    except Exception as error:
        shutil.rmtree(fresh, ignore_errors=True)
        kept = f"{target} is as it was" if target.exists() else "nothing was left behind"
        raise OSError(f"Could not save {target} ({error}); {kept}. Is the disk full?") from error
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(fresh, target)
    shutil.rmtree(old, ignore_errors=True)


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


def check_output(output_dir: str, name: str = "--output_dir") -> None:
    """Raise ArgumentError unless a folder can be written whole: it is new, empty, or holds an earlier model.

    Args:
        name: what the user calls it.
    """
    path = Path(output_dir)
    if path.resolve() == Path.cwd() or not path.name or os.path.ismount(path) or path.is_file():
        raise ArgumentError(f"{name} {output_dir} is replaced as a whole: name a folder of its own, such as runs/x.")
    if path.is_dir() and any(path.iterdir()) and not holds_a_model(path):
        raise ArgumentError(f"{name} {output_dir} holds other files, and is replaced as a whole: name another.")


def holds_a_model(path: Path) -> bool:
    """Whether a folder is one that vlp wrote: with a model's configuration, or with adapters and how they were made."""
    if all((path / name).is_file() for name in ("adapter_config.json", "training_arguments.yaml")):
        return True
    config = path / "config.json"
    return config.is_file() and json.loads(config.read_text()).get("model_type", "").startswith("vlp_")


def start_anew(folder: Path) -> None:
    """Put the states of an earlier run aside, in FOLDER.previous, not to mistake them for those of this one."""
    if states(folder):
        previous = folder.with_name(f"{folder.name}.previous")
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(folder, previous)


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


def states(folder: Path) -> list[Path]:
    """The valid states in a folder, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{STATE_FILE}"))


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
