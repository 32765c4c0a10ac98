"""Load models, processors and tokenizers from folders and from the hub; all commands load through this module.

Code that a folder or a repository contains is never run, and pickles are never executed. Whatever is wrong with a
folder becomes an `UnsupportedModelError` that names the folder, the file and what to do.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file, logging
from transformers.utils.generic import is_timm_config_dict

from .architectures import ARCHITECTURES, Architecture, architecture
from .errors import UnsupportedModelError, UserError, brief, printable
from .files import state_folder, usable_path
from .processing.siglip_tokenizer import siglip_tokenizer

ADAPTERS = "adapter_config.json"
BASE_FILE = "base_model.txt"  # in the folder of the states, which is not published: where the base model of adapters is
JSON_FILES = (
    "config.json", ADAPTERS, "processor_config.json", "preprocessor_config.json", "tokenizer_config.json",
    "tokenizer.json", "generation_config.json", "special_tokens_map.json", "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)  # fmt: skip
WEIGHT_TYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL")
LFS = b"version https://git-lfs"
NO_CODE = {"trust_remote_code": False}


def holds_model(folder: Path) -> bool:
    """Whether a folder has a model or adapters."""
    return (folder / "config.json").is_file() or (folder / ADAPTERS).is_file()


def holds_adapters(folder: Path) -> bool:
    """Whether a folder has adapters instead of a model."""
    return (folder / ADAPTERS).is_file() and not (folder / "config.json").is_file()


def told_of(name: str | Path, option: str) -> str:
    """The name of a model in messages, after the option that gave it, if there is one."""
    return f"{option} {printable(name, 120)}".strip()


# --- what is wrong with a folder --------------------------------------------------------------------------------------


@contextlib.contextmanager
def explained(name: str | Path, what: str, option: str = "") -> Iterator[None]:
    """Turn any error of a loading library into an UnsupportedModelError.

    Args:
        name: folder or hub name that is loaded.
        what: what is loaded, for the message.
        option: the option that named it, for the message.

    Raises:
        UnsupportedModelError: if anything fails.
    """
    told = told_of(name, option)
    try:
        if Path(name).is_dir():
            check_files(Path(name), told)
        yield
    except UserError:
        raise
    except RecursionError:
        raise UnsupportedModelError(f"{told}: {what} cannot be loaded: a file is nested too deeply.") from None
    except Exception as error:
        text = str(error)
        if "trust_remote_code" in text or "custom code" in text:
            reason = "it needs code of its own, which vlp does not run; convert it, or load it with transformers"
        elif "model type" in text or "model_type" in text:
            reason = "its model_type is unknown: it may need a newer version of vlp or transformers"
        elif "size mismatch" in text or "mismatched" in text:
            reason = "its weights have other shapes than its configuration says: download it again, or convert it anew"
        elif not Path(name).exists() and isinstance(error, (OSError, ValueError)):
            reason = f"there is no such folder, and {hub_says(text)}"
        else:
            reason = brief(f"{type(error).__name__}: {text}")[:200]
        raise UnsupportedModelError(f"{told}: {what} cannot be loaded: {reason.rstrip('.')}.") from error


def hub_says(text: str) -> str:
    """Why a model could not be had from the hub, from the message of transformers."""
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return "no model of this name is in the cache (HF_HUB_OFFLINE=1 is set: the hub is not asked)"
    if "gated" in text:
        return "the model on the hub is gated: accept its terms on its page, then log in with `hf auth login`"
    if "is not a valid model identifier" in text or "Repository Not Found" in text:
        return "no such model is on the hub, or it is private: log in with `hf auth login`"
    if "connect" in text or "connection" in text:
        return "the hub cannot be reached: check the connection, or set HF_HUB_OFFLINE=1 to use the cache alone"
    return "the hub has no such model, or cannot be reached"


def check_files(folder: Path, told: str) -> None:
    """Check the files of a model folder that can be checked without loading it.

    Args:
        folder: the folder.
        told: its name in messages.

    Raises:
        UnsupportedModelError: if a file is damaged; the message names it.
    """
    for name in JSON_FILES:
        path = folder / name
        if not os.path.lexists(path):
            continue
        if not path.is_file():
            raise UnsupportedModelError(f"{told}: {name} is not a file.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError, OSError) as error:
            reason = brief(str(error) or type(error).__name__)[:100]
            raise UnsupportedModelError(
                f"{told}: {name} is damaged, it is not JSON ({reason}): copy or download it again."
            ) from error
        if not isinstance(content, dict):
            raise UnsupportedModelError(
                f"{told}: {name} must hold a JSON object, not {brief(repr(content))[:60]}: copy or download it again."
            )
        if name.endswith(".index.json"):
            check_weight_index(folder, name, content, told)
    for path in sorted(folder.glob("*.safetensors")):
        check_safetensors(path, told)


def check_weight_index(folder: Path, name: str, content: dict, told: str) -> None:
    """Check the index of weights in several files. Raises UnsupportedModelError if it does not fit the folder."""
    files = content.get("weight_map")
    names = set(files.values()) if isinstance(files, dict) and all(isinstance(v, str) for v in files.values()) else None
    if not names:
        raise UnsupportedModelError(f"{told}: {name} has no weight_map from tensors to files: download it again.")
    for part in sorted(names):
        if Path(part).name != part or not (folder / part).is_file():
            raise UnsupportedModelError(
                f"{told}: {name} names the file {printable(part, 60)}, which is not in the folder: download it again."
            )


def check_safetensors(path: Path, told: str) -> None:
    """Check the header of a safetensors file. Raises UnsupportedModelError if it is damaged or quantised."""
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS))
        if start == LFS:
            raise UnsupportedModelError(
                f"{told}: {path.name} is a pointer of Git LFS, not the weights: run `git lfs pull` in the folder."
            )
        with safe_open(path, "pt") as file:
            types = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise UnsupportedModelError(
            f"{told}: {path.name} is damaged ({brief(error)[:100]}): copy or download it again."
        ) from error
    if other := sorted(types - set(WEIGHT_TYPES)):
        raise UnsupportedModelError(
            f"{told}: {path.name} has tensors of type {other[0]}; expected {', '.join(WEIGHT_TYPES[:4])}."
        )


# --- loading ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' warnings about unused weights, which are expected if only a part of a model is loaded."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


def read_config(name: str | Path, option: str = "") -> PreTrainedConfig:
    """Read the configuration of a model, or that of the base model of adapters.

    Args:
        name: folder or hub name.
        option: the option that named it, for error messages.

    Returns:
        The configuration, whose `architectures` has at least one name.

    Raises:
        UnsupportedModelError: if there is no such model, or its configuration cannot be read.
    """
    folder, told = Path(name), told_of(name, option)
    if not str(name).strip():
        raise UnsupportedModelError(f"{option or 'the model'} must be a folder or a hub name.")
    usable_path(name, option or "the model")
    with explained(name, "the configuration", option):
        if holds_adapters(folder):
            config = read_config(base_of(folder), f"{told}, base model")
            config.architectures = [trained_class(folder) or config.architectures[0]]
            return config
        if folder.is_file():
            raise UnsupportedModelError(f"{told} is a file; expected the folder of a model. vlp convert reads weights.")
        if folder.is_dir() and not (folder / "config.json").is_file():
            more = "is a checkpoint of open_clip: convert it with vlp convert first"
            if not (folder / "open_clip_config.json").is_file():
                more = "contains no config.json, so it is not the folder of a model"
            raise UnsupportedModelError(f"{told} {more}.")
        if folder.is_dir():
            content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            kind = content.get("model_type")
            if (not isinstance(kind, str) or kind not in CONFIG_MAPPING) and not is_timm_config_dict(content):
                shown = "none" if kind is None else printable(repr(kind), 60)
                if str(kind).startswith("vlp_") and getattr(sys.modules[__package__], "__file__", None) is None:
                    raise UnsupportedModelError(
                        "Python takes a folder named vlp here, such as a clone of the repository, for the package vlp: "
                        "run this in another folder."
                    )
                raise UnsupportedModelError(
                    f"{told}: config.json has the model_type {shown}, which this version of vlp and transformers does "
                    "not know; expected vlp_clip, vlp_blip, vlp_blip2 or one of transformers."
                )
        with quiet():  # transformers warns about its own defaults for SigLIP
            config = AutoConfig.from_pretrained(name, **NO_CODE)
        if config.model_type == "timm_wrapper" and not config.architectures:  # as timm's own files are
            config.architectures = ["TimmWrapperModel"]
        names = config.architectures
        if not isinstance(names, (list, tuple)) or not names or not isinstance(names[0], str):
            raise UnsupportedModelError(
                f"{told}: architectures in config.json is {printable(repr(names), 60)}; expected a list with the name "
                'of the model class, such as ["VlpClipModel"].'
            )
    return config


def readable_as(name: str) -> list[str]:
    """The architectures that a model of an architecture can be read as, besides its own."""
    return [row.model.__name__ for row in ARCHITECTURES if name in (row.model.loads or ())]


def row_of(name: str | Path, config: PreTrainedConfig, option: str = "", read_as: str | None = None) -> Architecture:
    """The row of a model's architecture.

    Args:
        name: folder or hub name of the model.
        config: its configuration.
        option: the option that named it, for error messages.
        read_as: the architecture to read it as, such as a captioner from a pre-trained BLIP; None: its own.

    Raises:
        UnsupportedModelError: if vlp has no such architecture, or the model cannot be read as `read_as`.
    """
    try:
        row = architecture(config.architectures[0])
    except KeyError as error:
        told = told_of(name, option)
        raise UnsupportedModelError(f"{told}: {printable(error.args[0], 300)}") from None
    own = row.model.__name__
    if read_as in (None, own):
        return row
    if read_as not in readable_as(own):
        choices = ", ".join([own, *readable_as(own)])
        raise UnsupportedModelError(f"--architecture {printable(read_as, 60)}: a {own} can be read as {choices}.")
    return architecture(read_as)


def load_model(kind: type, name: str | Path, option: str = "", **kwargs) -> PreTrainedModel:
    """Load a model with all its weights; adapters are loaded onto their base model and merged with it.

    Args:
        kind: a model class, or an Auto class.
        name: folder or hub name.
        option: the option that named it, for error messages.
        kwargs: further options of `from_pretrained`.

    Raises:
        UnsupportedModelError: if it cannot be loaded, weights are missing, or some are not finite.
    """
    folder = Path(name)
    if holds_adapters(folder):
        return load_adapted(folder, option, **kwargs)
    with explained(name, "the model", option), quiet():
        options = {"dtype": torch.float32} | (NO_CODE if not issubclass(kind, PreTrainedModel) else {}) | kwargs
        model, info = kind.from_pretrained(name, output_loading_info=True, **options)
    told = told_of(name, option)
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("language_model."))
    if missing:
        raise UnsupportedModelError(
            f"{told} lacks {len(missing)} weights of {type(model).__name__}, such as {printable(missing[0], 80)}: copy "
            "or download it again, or use a model that was trained for this."
        )
    require_finite(model, told)
    return model


def load_weights(name: str | Path, option: str = "") -> dict[str, Tensor]:
    """Load the tensors in the file model.safetensors of a model. Raises UnsupportedModelError if it cannot be read."""
    with explained(name, "model.safetensors", option):
        if (Path(name) / ADAPTERS).is_file():
            told = told_of(name, option)
            raise UnsupportedModelError(f"{told} has adapters: merge them with their base model by vlp convert first.")
        return load_file(cached_file(str(name), "model.safetensors"))


def require_finite(model: nn.Module, told: str) -> None:
    """Raise UnsupportedModelError, with the name of a tensor, if a weight is not finite."""
    if name := not_finite(model):
        raise UnsupportedModelError(f"{told}: {name} has values that are not finite, so the model cannot be used.")


def not_finite(model: nn.Module) -> str | None:
    """The name of a weight that is not finite; None if all are."""
    weights = ((name, tensor) for name, tensor in model.state_dict().items() if tensor.is_floating_point())
    return next((name for name, tensor in weights if not torch.isfinite(tensor).all()), None)


def hash_weights(digest, module: nn.Module) -> None:
    """Feed the names and values of all weights of a module to a hash of hashlib."""
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def load_processor(name: str | Path, option: str = ""):
    """Load the processor of a model, or that of the base model of adapters.

    Raises:
        UnsupportedModelError: if there is none, or it cannot be loaded.
    """
    folder = Path(name)
    if folder.is_dir() and (folder / ADAPTERS).is_file() and not any(folder.glob("*processor_config.json")):
        name = base_of(folder)
    with explained(name, "the processor", option):
        return AutoProcessor.from_pretrained(name, **NO_CODE)


def load_image_processor(name: str | Path, option: str = "", **kwargs):
    """Load an image processor. Raises UnsupportedModelError if there is none, or it cannot be loaded."""
    with explained(name, "the image processor", option):
        return AutoImageProcessor.from_pretrained(name, **NO_CODE, **kwargs)


def load_auto_tokenizer(name: str | Path, option: str = "", fast: bool = True, **kwargs):
    """Load a tokenizer, if `fast` one of the tokenizers library.

    Raises:
        UnsupportedModelError: if there is none, or it cannot be loaded.
    """
    with explained(name, "the tokenizer", option):
        settings = get_tokenizer_config(name)
        if settings.get("tokenizer_class") == "SiglipTokenizer":
            return load_siglip_tokenizer(name, settings | kwargs, option)
        tokenizer = AutoTokenizer.from_pretrained(name, **NO_CODE, **kwargs)
        files = {"tokenizer.json", *getattr(tokenizer, "vocab_files_names", {}).values()}
        files |= {kwargs["gguf_file"]} if kwargs.get("gguf_file") else set()  # which has the tokenizer inside
        empty = Path(name).is_dir() and not any((Path(name) / file).is_file() for file in files)
        if empty or len(tokenizer) == 0 or (fast and not hasattr(tokenizer, "backend_tokenizer")):
            raise UnsupportedModelError(
                f"{told_of(name, option)}: there is no tokenizer.json, or its vocabulary is empty."
            )
        return tokenizer


def load_siglip_tokenizer(name: str | Path, settings: dict, option: str):
    """Load SigLIP's tokenizer, whose class in transformers is not one of the tokenizers library."""
    for file in ("spiece.model", "tokenizer.json"):
        found = cached_file(str(name), file, _raise_exceptions_for_missing_entries=False)
        if found:
            return siglip_tokenizer(found, settings)
    raise UnsupportedModelError(f"{told_of(name, option)}: there is neither a spiece.model nor a tokenizer.json.")


def text_of(tokenizer) -> str:
    """Everything that a tokenizer's output depends on, as text."""
    if hasattr(tokenizer, "backend_tokenizer"):
        return tokenizer.backend_tokenizer.to_str()
    return json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), repr(tokenizer.init_kwargs)])


def load_bert_tokenizer(name: str | Path, option: str = ""):
    """Load a BERT tokenizer. Raises UnsupportedModelError if it cannot be loaded, or lacks [CLS], [SEP] or [PAD]."""
    tokenizer = load_auto_tokenizer(name, option)
    if None in (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id):
        raise UnsupportedModelError(f"{option} {name} has no [CLS], [SEP] or [PAD]: BLIP needs a BERT tokenizer.")
    return tokenizer


def licence_of(name: str | Path) -> str | None:
    """The licence in the card of a model, as the hub's identifier; None if it is not known."""
    path = Path(name) / "README.md"
    try:
        if not Path(name).exists():
            found = cached_file(str(name), "README.md", _raise_exceptions_for_missing_entries=False,
                                _raise_exceptions_for_connection_errors=False)  # fmt: skip
            path = Path(found) if found else path
        licence = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.license
    except Exception:  # a card that cannot be read names no licence
        return None
    return printable(licence, 60) if isinstance(licence, str) and licence.strip() else None


# --- adapters ---------------------------------------------------------------------------------------------------------


def base_of(folder: Path) -> str:
    """The base model of a folder of adapters.

    The folder names a repository of the hub, or a folder without its path. The latter is looked for where training
    found it, beside the adapters and in the current folder.

    Raises:
        UnsupportedModelError: if it is not found.
    """
    name = str(json.loads((folder / ADAPTERS).read_text()).get("base_model_name_or_path") or "")
    noted, places = state_folder(folder) / BASE_FILE, []
    if noted.is_file():
        places.append(Path(noted.read_text().strip()))
    places += [folder.parent / name, Path(name)]
    for place in places:
        if name and (place / "config.json").is_file():
            return str(place)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    raise UnsupportedModelError(
        f"{printable(folder, 120)} has adapters for the model {printable(name or 'none', 80)}, which is not beside it: "
        f"copy that model's folder to {printable(folder.parent / (Path(name).name or 'BASE'), 120)}."
    )


def trained_class(folder: Path) -> str | None:
    """The name of the model class that adapters were trained on; None if they do not say so."""
    return (json.loads((folder / ADAPTERS).read_text()).get("auto_mapping") or {}).get("base_model_class")


def load_adapted(folder: Path, option: str = "", **kwargs) -> PreTrainedModel:
    """Load the base model of adapters, and merge the adapters with its weights.

    Raises:
        UnsupportedModelError: if the base model or the adapters cannot be loaded.
    """
    base = base_of(folder)
    trained = trained_class(folder)
    config = read_config(base, option)
    row = row_of(base, config, option)
    kind = row.model if trained is None else architecture(trained).model
    model = load_model(kind, base, option, **kwargs)
    with explained(folder, "the adapters", option), quiet():
        try:
            from peft.tuners.tuners_utils import BaseTunerLayer
        except ImportError:
            raise UnsupportedModelError(f'{folder} has adapters, which need peft: pip install "vlp[lora]".') from None
        model.load_adapter(str(folder))
        for name, module in list(model.named_modules()):
            if isinstance(module, BaseTunerLayer):
                module.merge()
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.get_base_layer())
    model._hf_peft_config_loaded = False
    model.peft_config = {}
    require_finite(model, str(folder))
    model.config.architectures = [type(model).__name__]
    return model.requires_grad_(True).eval()
