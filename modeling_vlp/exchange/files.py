"""Read tensors from checkpoint files without running code that the files may contain."""

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from .places import ExchangeError, State

NESTED = ("state_dict", "model", "module")  # keys under which training scripts store the weights


def read_tensors(path: Path) -> State:
    """Read all tensors of a .safetensors file, a PyTorch file or a TorchScript archive.

    Args:
        path: the file. A PyTorch file is loaded with `weights_only=True`; the code of a TorchScript archive is not run.

    Returns:
        The state dict: for each tensor name, the tensor.

    Raises:
        ExchangeError: if the file is missing or damaged, or contains anything but tensors and plain values; the message
            names the file.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if is_torchscript(path):
            return read_torchscript(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ExchangeError(f"{path}: no such file.") from None
    except ExchangeError:
        raise
    except pickle.UnpicklingError as error:
        raise ExchangeError(
            f"{path} contains more than tensors and was not loaded, because loading it could run its code: "
            f"{first_line(error)}"
        ) from error
    except Exception as error:  # a damaged file can make the readers fail in any way
        raise ExchangeError(f"{path} is damaged or not a checkpoint ({first_line(error)}): copy it again.") from error
    return weights_in(content, path)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def weights_in(content, path: Path) -> State:
    """The state dict inside the content of a checkpoint file.

    Args:
        content: what the file contains: a state dict, or a dictionary with one under a key of NESTED.
        path: the file, for the error message.

    Raises:
        ExchangeError: if there is no state dict.
    """
    for name in NESTED:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            return weights_in(content[name], path)
    tensors = {}
    if isinstance(content, dict):
        tensors = {name: value for name, value in content.items() if isinstance(name, str) and torch.is_tensor(value)}
    if not tensors:
        raise ExchangeError(f"{path} contains no state dict: expected tensors by name.")
    return tensors


def is_torchscript(path: Path) -> bool:
    """Whether a file is a zip archive with code, as `torch.jit.save` writes it."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name or name.endswith("constants.pkl") for name in archive.namelist())


class Module:
    """Placeholder for any object of a TorchScript archive: keeps its attributes, has none of its methods."""

    def __setstate__(self, state) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("an object whose state is not a dictionary")
        self.attributes = state


STORAGES = {
    "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16, "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8, "CharStorage": torch.int8, "ShortStorage": torch.int16,
}  # fmt: skip


def rebuild(storage: Tensor, offset: int, size: tuple, stride: tuple, *ignored) -> Tensor:
    """Replacement of `torch._utils._rebuild_tensor_v2`; raises if the view exceeds the storage."""
    return storage.as_strided(size, stride, offset).clone()


class ArchiveUnpickler(pickle.Unpickler):
    """Unpickler for data.pkl of a TorchScript archive. Accepts tensors, plain values and modules (as `Module`) only."""

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str):
        if module.startswith("__torch__"):
            return Module
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return rebuild if name == "_rebuild_tensor_v2" else lambda tensor, *ignored: tensor
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch.jit._pickle" and name.startswith("build_"):  # lists of numbers and of tensors
            return lambda values: values
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a checkpoint")

    def persistent_load(self, identity) -> Tensor:
        _, dtype, key, _, count = identity
        if not str(key).isdigit():
            raise pickle.UnpicklingError(f"invalid storage key {key!r}")
        content = self.archive.read(f"{self.root}/data/{key}")
        storage = torch.frombuffer(bytearray(content), dtype=dtype)
        if storage.numel() < count:
            raise pickle.UnpicklingError(f"storage {key} is truncated")
        return storage


def read_torchscript(path: Path) -> State:
    """Read the parameters and buffers of a TorchScript archive without running its code.

    Raises:
        ExchangeError: if the archive contains no module.
    """
    with zipfile.ZipFile(path) as archive:
        root = next(name.split("/")[0] for name in archive.namelist() if name.endswith("/data.pkl"))
        module = ArchiveUnpickler(archive, root).load()
    if not isinstance(module, Module):
        raise ExchangeError(f"{path} is a TorchScript archive without a module.")
    return dict(tensors_of(module))


def tensors_of(module: Module, prefix: str = ""):
    """Yield the (name, tensor) pairs of a module and its submodules."""
    for name, value in module.attributes.items():
        if isinstance(value, Module):
            yield from tensors_of(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            yield prefix + name, value
