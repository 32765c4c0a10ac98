"""Save and load training states, and convert the weight matrices of a published model to another data type."""

import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ...errors import ResumeError, brief, printable
from ...files import (
    STATE_FILE,
    UNFINISHED,
    digest,
    exchange,
    kind_of,
    list_files,
    remove_written,
    state_folder,
    states,
    synchronise,
    usable_path,
    written_files,
)

AVERAGE_FILE = "average.safetensors"
METADATA = {
    *((f"torch.distributed.checkpoint.{module}", name) for module, names in {
        "metadata": ("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata",
                     "BytesStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        "filesystem": ("_StorageInfo",),
    }.items() for name in names),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"), ("pathlib", "WindowsPath"), ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"), ("torch", "Size"), ("torch", "device"),
    *(("torch", str(dtype).removeprefix("torch.")) for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)),
}  # fmt: skip
FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # read by torch.load


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
    fresh = target.with_name(f"{UNFINISHED}{target.name}")
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
        try:
            list_files(fresh)
            synchronise(fresh)
            if target.is_dir():
                exchange(fresh, target)
                remove_written(fresh)
            else:
                os.rename(fresh, target)
        except OSError as problem:
            errors = [str(problem)]
        for old in states(folder)[:-keep]:
            remove_written(old)
    if accelerator.is_main_process and errors:
        shutil.rmtree(fresh, ignore_errors=True)
    accelerator.wait_for_everyone()
    if errors:
        raise OSError(f"Could not save {target} ({brief(errors[0])[:200]}); earlier states are unchanged.")
    return target


def find_state(name: str, output_dir: str) -> Path | None:
    """Find the training state that `--resume_from_checkpoint` names.

    Args:
        name: folder of a state, "latest", or "auto".
        output_dir: output folder of the run, next to which its states are saved.

    Returns:
        The folder of the state; None for "auto" if there is none.

    Raises:
        ResumeError: if there is no such state.
    """
    if name in ("latest", "auto"):
        found = states(state_folder(output_dir))
        if not found and name == "auto":
            return None
        if not found:
            raise ResumeError(f"--resume_from_checkpoint latest: there is no state in {state_folder(output_dir)}.")
        return found[-1]
    path = usable_path(name or ".", "--resume_from_checkpoint") if name.strip() else None
    if path is None or not (path / STATE_FILE).is_file():
        known = states(state_folder(output_dir)) or (states(path) if path else [])
        more = f"; choose latest, or {known[-1]}" if known else ""
        raise ResumeError(
            f"--resume_from_checkpoint {printable(name, 120) or repr(name)} is not the folder of a state, which has a "
            f"{STATE_FILE}{more}."
        )
    return path


def state_for_all(path: Path | None) -> Path | None:
    """The state that the main process found, for all processes; every process must call this.

    Raises:
        ResumeError: if another process cannot read it, such as one on a machine that does not share the folder.
    """
    found = broadcast_object_list([None if path is None else str(path)])[0]
    if found is not None and not (Path(found) / STATE_FILE).is_file():
        raise ResumeError(
            f"The main process resumes from {printable(found, 160)}, which this process cannot read: use a folder that "
            "all machines share."
        )
    return None if found is None else Path(found)


def check_state(path: Path, rank: int) -> dict:
    """Check that a state is complete and unchanged, and read its facts.

    Args:
        path: folder of the state.
        rank: index of this process, which has random states of its own if the run had as many processes.

    Returns:
        The content of STATE_FILE.

    Raises:
        ResumeError: if a file is missing, damaged or unreadable; the message names it.
    """
    told = f"The state {printable(path, 160)}"
    if pickles := sorted(path.glob("custom_checkpoint_*.pkl")):
        raise ResumeError(f"{told} contains {pickles[0].name}, a pickle, which is never loaded: start a new run.")
    require_plain_metadata(path, told)
    known = written_files(path)
    before = sum(name.startswith("random_states_") for name in known)  # processes that saved the state
    wanted = [STATE_FILE] + [f"random_states_{rank}.pkl"] * (rank < before or not before)
    for name in {*known, *wanted}:
        file = path / name
        if not file.is_file():
            what = "is missing" if not os.path.lexists(file) else f"is {kind_of(file)}"
            raise ResumeError(f"{told} is incomplete: {printable(name, 60)} {what}. Resume from an earlier state.")
        if name in known and digest(file) != known[name]:
            raise ResumeError(f"{told} is damaged: {printable(name, 60)} was changed. Resume from an earlier state.")
    try:
        facts = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        for name, kind in (("model_config", dict), ("recipe", dict), ("progress", dict), ("bad_rows", list)):
            if not isinstance(facts[name], kind):
                raise TypeError(f"{name} is not a {kind.__name__}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ResumeError(
            f"{told} is damaged: {STATE_FILE}: {brief(repr(error))[:120]}. Resume from an earlier state."
        ) from error
    return facts


class StandIn:
    """Takes the place of any class of the metadata: keeps nothing, and cannot be changed by a pickle."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state) -> None:
        pass


class MetadataUnpickler(pickle.Unpickler):
    """Reads the metadata of torch.distributed.checkpoint, a pickle, and refuses classes that do not belong in it.

    No real class is touched. A pickle that would change a class, instead of an object, is refused as well.
    """

    def find_class(self, module: str, name: str):
        if (module, name) not in METADATA:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return type(name, (StandIn,), {})


def require_plain_metadata(folder: Path, told: str) -> None:
    """Raise ResumeError, with the name of the state, if loading the metadata in its folder could run code."""
    for path in folder.glob("*/*.metadata"):
        try:
            if path.name != ".metadata":  # torch would load it if there is no .metadata
                raise pickle.UnpicklingError("metadata of a single process")
            with path.open("rb") as file:
                MetadataUnpickler(file).load()
        except Exception as error:  # a damaged pickle can raise anything
            raise ResumeError(
                f"{told} has a {path.parent.name}/{printable(path.name, 60)} that is not loaded: {brief(error)[:120]}. "
                "Start a new run."
            ) from error


def load_state(
    accelerator: Accelerator, path: Path, facts: dict, output_dir: str, average: AveragedModel | None = None
) -> dict:
    """Load a training state, and delete the states of later steps if they belong to the same output folder.

    Args:
        accelerator: its weights, optimiser and random states are replaced.
        path: folder of the state.
        facts: "model_config" and "recipe" of this run, which must equal those of the state.
        output_dir: output folder of this run.
        average: the average of the weights, which is replaced too, if there is one.

    Returns:
        The `facts` that were saved with the state.

    Raises:
        ResumeError: if the state is damaged, or belongs to another model or recipe; the message lists the differences.
    """
    saved = check_state(path, accelerator.process_index)
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    if deepspeed and saved.get("processes", accelerator.num_processes) != accelerator.num_processes:
        raise ResumeError(
            f"{printable(path, 160)} was saved by {saved['processes']} processes with DeepSpeed: resume with the same "
            f"number, not with {accelerator.num_processes}."
        )
    if average is not None and not (path / AVERAGE_FILE).is_file():
        raise ResumeError(f"{path} has no {AVERAGE_FILE}, which --ema_decay needs.")
    for name in ("model_config", "recipe"):
        differences = compare(saved[name], json.loads(json.dumps(facts[name])))
        if differences:
            more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
            shown = "; ".join(printable(line, 90) for line in differences[:3])
            raise ResumeError(
                f"{path} belongs to another {name.split('_')[0]}: {shown}{more}. Give the options of that run, or "
                "start anew without --resume_from_checkpoint."
            )
    try:
        with weights_only(accelerator):
            accelerator.load_state(str(path))
        if average is not None:
            average.load_state_dict(load_file(path / AVERAGE_FILE))
    except Exception as error:
        raise ResumeError(f"The state {printable(path, 160)} cannot be loaded: {brief(error)[:200]}") from error
    if accelerator.is_main_process and path.parent == state_folder(output_dir).absolute():
        for later in states(path.parent):
            if later.name > path.name:
                remove_written(later)
    return saved


@contextlib.contextmanager
def weights_only(accelerator: Accelerator) -> Iterator[None]:
    """Make every `torch.load` read tensors and plain values alone; DeepSpeed would execute pickles."""
    classes = []
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from deepspeed.runtime.fp16 import loss_scaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        classes = [loss_scaler.LossScaler, loss_scaler.DynamicLossScaler, ZeroStageEnum, fragment_address]
    before = os.environ.get(FORCE_WEIGHTS_ONLY)
    os.environ[FORCE_WEIGHTS_ONLY] = "1"
    try:
        with torch.serialization.safe_globals(classes):
            yield
    finally:
        os.environ.pop(FORCE_WEIGHTS_ONLY)
        if before is not None:
            os.environ[FORCE_WEIGHTS_ONLY] = before


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
        if key not in saved and not b:  # an option that is newer than the state, and off
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            lines += compare(a, b, f"{prefix}{key}.")
        elif a != b and not key.startswith("_") and key not in ("transformers_version", "dtype", "architectures"):
            lines.append(f"{prefix}{key} was {a} and is now {b}")
    return lines
