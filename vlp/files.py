"""Write folders completely or not at all, and never overwrite files that vlp did not write."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from .errors import ArgumentError

STATE_FILE = "trainer_state.json"
TEACHER_FILE = "teacher.safetensors"  # momentum teacher of a converted checkpoint, written by vlp-convert


def state_folder(output_dir: str | Path) -> Path:
    """The folder of a run's resume states: beside the output folder, so that they are not published with it."""
    return Path(f"{str(output_dir).rstrip('/')}.resume")


def write_whole(target: Path, write: Callable[[Path], None]) -> None:
    """Write a folder as a whole: `write` fills a temporary folder beside it, which then takes its place.

    Args:
        target: the folder to create or replace. It does not change if `write` fails.
        write: called with the temporary folder.

    Raises:
        OSError: if `write` fails; the message gives the cause and says what is left.
    """
    fresh = target.with_name(f".{target.name}.writing")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        write(fresh)
    except Exception as error:
        shutil.rmtree(fresh, ignore_errors=True)
        kept = f"{target} is unchanged" if target.exists() else "no partial files were left"
        raise OSError(f"Could not save {target} ({error}); {kept}. Is the disk full?") from error
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(fresh, target)
    shutil.rmtree(old, ignore_errors=True)


def check_output(output_dir: str, name: str = "--output_dir") -> None:
    """Check that a folder may be replaced: it is new, empty, or contains a model that vlp wrote.

    Args:
        output_dir: the folder.
        name: the name of the option, for the error message.

    Raises:
        ArgumentError: if replacing the folder would delete other files.
    """
    path = Path(output_dir)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ArgumentError(f"{name} {output_dir} is a link, a file or a device: choose a dedicated folder.")
    if path.resolve() == Path.cwd() or not path.name or os.path.ismount(path):
        raise ArgumentError(f"{name} {output_dir} is replaced as a whole: choose a dedicated folder, such as runs/x.")
    if path.is_dir() and any(path.iterdir()) and not holds_a_model(path):
        raise ArgumentError(
            f"{name} {output_dir} contains other files and is replaced as a whole: choose another folder."
        )


def holds_a_model(path: Path) -> bool:
    """Whether vlp wrote a folder: it contains a vlp configuration, or adapters with their training arguments."""
    if all((path / name).is_file() for name in ("adapter_config.json", "training_arguments.yaml")):
        return True
    config = path / "config.json"
    return config.is_file() and json.loads(config.read_text()).get("model_type", "").startswith("vlp_")


def start_anew(folder: Path) -> None:
    """Move the states of an earlier run to FOLDER.previous, so that they are not mistaken for those of this run."""
    if states(folder):
        previous = folder.with_name(f"{folder.name}.previous")
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(folder, previous)


def states(folder: Path) -> list[Path]:
    """The valid states in a folder, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{STATE_FILE}"))
