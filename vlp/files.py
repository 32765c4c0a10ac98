"""Folders and files that the programs write: whole or not at all, and never over somebody else's."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from .errors import ArgumentError

STATE_FILE = "trainer_state.json"
TEACHER_FILE = "teacher.safetensors"  # of a pre-training that was begun elsewhere, as vlp-convert writes it


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


def states(folder: Path) -> list[Path]:
    """The valid states in a folder, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{STATE_FILE}"))
