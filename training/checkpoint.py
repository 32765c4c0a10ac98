"""Saving: the state to resume from, and the folder to publish, each written whole or not at all."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator

STATE_FILE = "trainer_state.json"


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


def save_state(accelerator: Accelerator, folder: Path, step: int, facts: dict, keep: int) -> Path:
    """Save weights, optimiser, random states and `facts` as folder/step-N; all but the last `keep` are removed."""
    target = folder / f"step-{step:07d}"

    def write(fresh: Path) -> None:
        accelerator.save_state(str(fresh))
        (fresh / STATE_FILE).write_text(json.dumps(facts, indent=1))

    if accelerator.num_processes == 1:
        write_whole(target, write)
    else:  # every process writes its part; the main one's file comes last and makes the state valid
        accelerator.save_state(str(target))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (target / STATE_FILE).write_text(json.dumps(facts, indent=1))
    if accelerator.is_main_process:
        for old in states(folder)[:-keep]:
            shutil.rmtree(old)
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


def load_state(accelerator: Accelerator, path: Path, model_config: dict) -> dict:
    """Load a state and return its facts. Raises ResumeError where it belongs to a model of another shape."""
    facts = json.loads((path / STATE_FILE).read_text())
    differences = compare(facts["model_config"], json.loads(json.dumps(model_config)))
    if differences:
        raise ResumeError(f"{path} is of another model: {'; '.join(differences)}.")
    accelerator.load_state(str(path))
    return facts


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
