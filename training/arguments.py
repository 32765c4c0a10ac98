"""Training options: their meaning, units and defaults, and the checks that run before anything is loaded."""

import argparse
import dataclasses
import functools
import json
import math
import os
import re
import typing
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..conversion import own_copy
from ..errors import ArgumentError, brief, is_valid, printable
from ..processing.pictures import MAX_PIXELS
from ..processing.prompts import TEMPLATES

EMOJI = "emoji"  # the data set included in the package


def option(default, text: str, bound: bool = False, shown: bool = False):
    """Define a dataclass field that is also a command line option.

    Args:
        default: default value; lists and dicts are copied for each instance.
        text: help text.
        bound: whether a resumed run must use the same value.
        shown: whether the model card shows the value.

    Returns:
        The dataclass field.
    """
    metadata = {"help": text, "bound": bound, "shown": shown}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


def names_of(arguments, mark: str) -> list[str]:
    """Return the names of the options marked "bound" or "shown" in their definitions."""
    return [item.name for item in dataclasses.fields(arguments) if item.metadata.get(mark)]


@dataclass(kw_only=True)
class TrainingArguments:
    """Options of a training run: data, model, optimisation, evaluation and output."""

    # Data
    dataset_name: str = option(
        EMOJI,
        'training data: "emoji" (included in the package), "scenes" (drawn, in any number: docs/scenes.md), a hub '
        "name, a folder, a .csv, .tsv, .json, .jsonl, .parquet or .arrow file or several (docs/own-data.md), or .tar "
        "shards such as data/{000..099}.tar; "
        "several files or shard sources, joined by ::",
        bound=True,
    )
    dataset_config_name: str | None = option(
        None, "configuration of a hub data set; of the scenes: captions, questions, statements or swaps", bound=True
    )
    train_split: str = option("train", "split to train on", bound=True)
    image_column: str = option("image", "column with the images or their paths", bound=True)
    caption_column: str = option(
        "caption",
        "column with a caption or a list of captions, one of which is drawn at random each time; for several "
        "languages, one column each, joined by commas, with --tag_column and --templates in the same order",
        bound=True,
    )
    tag_column: str | None = option(
        None, "column with keywords (a list, or text with commas) that can replace or extend the caption", bound=True
    )
    tag_share: float = option(0.0, "share of captions (0 to 1) in which keywords are used", bound=True, shown=True)
    templates: str = option(
        "name", f"prompt templates for training captions: one of {', '.join(TEMPLATES)}", bound=True, shown=True
    )
    template_share: float = option(
        0.0, "share of captions (0 to 1) that are put into a template", bound=True, shown=True
    )
    image_root: str | None = option(
        None, "folder that image paths are relative to; the folder of the data file if not given"
    )
    encoding: str | None = option(
        None, "encoding of a table, such as cp1252 or utf-16; UTF-8 if not given, or what its byte order mark says"
    )
    streaming: bool = option(
        False,
        "read the training data row by row, without downloading and converting all of it first; for data sets of the "
        "hub and for Parquet files; needs --tokenizer_name",
        bound=True,
    )
    shard_weights: str | None = option(
        None, "sampling weights of the shard sources, joined by ::, such as 2::1; equal if not given", bound=True
    )
    shard_size: int | None = option(
        None, "number of samples in all shards, to compute the length of an epoch; read from the index if there is one"
    )
    shard_image_key: str | None = option(
        None, "endings of the images in shards, such as jpg,png, if not whatever is a picture", bound=True
    )
    shard_caption_key: str | None = option(
        None, "endings of the captions in shards, such as alt.txt, if not those in .txt, .json or .cls", bound=True
    )
    hold_out: str | None = option(
        None,
        "COLUMN=VALUE: evaluate on the rows with this value instead of training on them; or a share of the pictures, "
        "such as 10%",
        bound=True,
    )
    max_bad_share: float = option(0.1, "stop the run if more than this share of the rows (0 to 1) is unusable")
    max_image_pixels: int = option(MAX_PIXELS, "skip larger images, in pixels, as decompression bombs")
    augmentation: Literal["crop", "strong", "none"] = option(
        "crop",
        "crop: random crops, as in the papers; strong: affine, style and colour changes, for small data sets; none: "
        "the preprocessing of evaluation",
        bound=True,
        shown=True,
    )
    crop_scale: float = option(
        0.9, "smallest share (0 to 1) of the image area that --augmentation crop keeps", bound=True
    )
    horizontal_flip: bool = option(False, "mirror half of the images with --augmentation crop", bound=True)
    random_augment: bool = option(False, "also apply BLIP's RandomAugment(2, 5) with --augmentation crop", bound=True)
    group_captions: int = option(
        1,
        "place up to this many images with the same caption next to each other in a batch; 1: no grouping",
        bound=True,
        shown=True,
    )
    cache_images: bool = option(
        False, "keep decoded images in memory; for small data sets with --augmentation strong or none"
    )
    num_workers: int | None = option(
        None,
        "data loading workers per process; if not given, one per CPU core, at most 8, where a GPU trains, and none "
        "where the CPU does: a thread then loads the next batch",
    )

    # Model
    model: dict = option(
        {},
        "fields of the model configuration, as JSON, in place of all those of the recipe; the image size and the "
        "vocabulary size are set by --image_size and the tokenizer",
    )
    image_size: int = option(224, "side of the images, in pixels; a loaded model keeps its own")
    max_length: int = option(77, "maximum number of tokens in a caption, including start and end", bound=True)
    tokenizer_name: str | None = option(
        None,
        "hub name or folder of a tokenizer, or for CLIP the path of OpenAI's bpe_simple_vocab_16e6.txt.gz; if not "
        "given, a tokenizer is trained on the captions",
        bound=True,
    )
    vocab_size: int = option(49408, "vocabulary size of the tokenizer that is trained on the captions")
    model_name_or_path: str | None = option(
        None,
        "folder or hub name of a model to fine-tune or to continue training, of vlp, transformers or open_clip; it "
        "brings its processor",
    )
    lora_rank: int = option(
        0,
        "rank of the LoRA adapters added to the projections of every attention; only they are trained; 0: train all "
        "weights",
        bound=True,
        shown=True,
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, slower steps"
    )
    sync_batch_norm: bool = option(
        False,
        "compute the statistics of batch norm over the images of all processes, as one process with the whole batch "
        "would; slower",
        bound=True,
    )
    pack_texts: bool | None = option(
        None,
        "remove the padding of texts before anything is computed for their tokens; if not given, on CPUs only: on a "
        "GPU, the host waits for the amount of padding in every step",
    )
    torch_compile: bool = option(False, "compile the model with torch.compile: slower start, faster steps")

    # Objective and optimisation
    exclude_duplicates: bool = option(
        True, "do not use pairs that share a caption or an image as each other's negatives", bound=True, shown=True
    )
    per_device_train_batch_size: int = option(256, "pairs per batch in each process", bound=True, shown=True)
    micro_batch_size: int | None = option(
        None,
        "pairs per forward pass of a part of the model, to save memory; the gradient is still that of the whole batch",
        shown=True,
    )
    gradient_accumulation_steps: int = option(
        1,
        "batches per optimiser step; unlike --micro_batch_size, this adds no negatives",
        bound=True,
        shown=True,
    )
    optimizer: Literal["adamw", "muon"] = option(
        "adamw",
        "muon: learn matrices and convolutions with Muon, and embeddings, heads and vectors with AdamW, which takes "
        "fewer steps; not with DeepSpeed",
        bound=True,
        shown=True,
    )
    learning_rate: float = option(5e-4, "peak learning rate", shown=True)
    tower_learning_rate: float | None = option(
        None, "peak learning rate of the towers, for pre-trained ones; --learning_rate if not given", shown=True
    )
    weight_decay: float = option(
        0.2, "weight decay of matrices; not applied to gains, biases, logit scale and position embeddings", shown=True
    )
    adam_beta1: float = option(0.9, "AdamW: decay rate of the first moment", shown=True)
    adam_beta2: float = option(
        0.98, "AdamW: decay rate of the second moment; CLIP's paper: 0.98 for ViT, 0.999 for ResNet", shown=True
    )
    adam_epsilon: float = option(
        1e-6, "AdamW: term added to the denominator; CLIP's paper: 1e-6 for ViT, 1e-8 for ResNet", shown=True
    )
    layer_decay: float = option(
        1.0, "factor on the learning rate from each layer to the one below; 1: the same rate everywhere", shown=True
    )
    max_grad_norm: float = option(1.0, "norm to clip the gradient to; 0: no clipping", shown=True)
    warmup_steps: int = option(2000, "optimiser steps of linear warm-up", shown=True)
    num_train_epochs: float = option(32.0, "epochs, if neither --max_train_steps nor --max_train_minutes is given")
    max_train_steps: int | None = option(None, "total number of optimiser steps", shown=True)
    max_train_minutes: float | None = option(
        None, "total minutes of training; the learning rate reaches zero at their end", shown=True
    )
    ema_decay: float = option(
        0.0,
        "decay of a moving average of the weights, such as 0.999, which is evaluated and published; 0: no average",
        shown=True,
    )
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "auto", "precision of the computation; auto: bf16 if the hardware supports it natively, else no"
    )
    num_threads: int | None = option(
        None, "CPU threads per process when training on the CPU; if not given, the cores divided by the processes"
    )
    seed: int = option(0, "seed of the weights, the order of the data and the augmentation", bound=True, shown=True)

    # Evaluation
    eval_dataset_name: str | None = option(None, "data to evaluate on; --dataset_name if not given")
    eval_split: str | None = option(None, "split to evaluate on; none: no evaluation, unless --hold_out is given")
    eval_image_root: str | None = option(
        None, "folder that the image paths of the evaluation data start from; --image_root if not given"
    )
    eval_image_column: str | None = option(None, "image column of the evaluation data; --image_column if not given")
    eval_steps: int | None = option(
        None, "evaluate every this many optimiser steps; the run always evaluates at the end"
    )
    eval_batch_size: int = option(256, "images or texts per batch in evaluation")

    # Output
    output_dir: str | None = option(
        None, "folder for the published model; runs/RECIPE if not given; training states are saved in FOLDER.resume"
    )
    save_steps: int | None = option(None, "save the training state every this many optimiser steps")
    save_minutes: float | None = option(10.0, "save the training state every this many minutes of training")
    save_total_limit: int = option(2, "number of training states to keep")
    resume_from_checkpoint: str | None = option(
        None,
        'folder of a training state to resume from; "latest" for the last one in FOLDER.resume; "auto" for that one if '
        "it exists, otherwise a new run, which is what torchrun needs",
    )
    logging_steps: int = option(10, "log every this many optimiser steps")
    report_to: str = option(
        "tensorboard", "experiment tracker: tensorboard, wandb or another that accelerate supports, or none"
    )
    publish_dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "data type that weight matrices are saved in; they are loaded as float32"
    )
    push_to_hub: bool = option(False, "push the model, its processor and its card to the hub at the end, in one commit")
    hub_model_id: str | None = option(None, "hub repository to push to, such as me/my-clip")
    hub_private: bool = option(False, "make the hub repository private")
    hub_bundle: bool = option(
        False, "publish the modelling code too, so that the model loads without vlp (trust_remote_code=True)"
    )
    hub_revision: str | None = option(None, "branch to push to; created if there is none")
    language: str = option("en", "language codes of the captions, joined by commas, for the model card")
    license: str | None = option(
        None,
        "licence of the weights, as the hub's identifier (mit, apache-2.0, cc-by-4.0), for the model card; none: that "
        "of the model from which training starts, if any",
    )
    data_license: str | None = option(None, "licence of the data, for the model card")

    def __post_init__(self):
        check_values(self)
        require_at_least_one(
            self, "per_device_train_batch_size", "gradient_accumulation_steps", "eval_batch_size", "image_size",
            "max_length", "vocab_size", "logging_steps", "group_captions", "save_total_limit", "max_image_pixels",
        )  # fmt: skip
        for name in (
            "micro_batch_size",
            "max_train_steps",
            "max_train_minutes",
            "eval_steps",
            "save_steps",
            "save_minutes",
            "shard_size",
            "num_threads",
            "tower_learning_rate",
        ):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ArgumentError(f"--{name} must be positive, got {getattr(self, name)}.")
        for name in ("learning_rate", "num_train_epochs", "adam_epsilon", "layer_decay", "crop_scale"):
            if getattr(self, name) <= 0:
                raise ArgumentError(f"--{name} must be positive, got {getattr(self, name)}.")
        for name in ("weight_decay", "max_grad_norm", "warmup_steps", "num_workers", "lora_rank"):
            if (getattr(self, name) or 0) < 0:
                raise ArgumentError(f"--{name} must not be negative, got {getattr(self, name)}.")
        if self.max_length is not None and self.max_length < 3:
            raise ArgumentError(f"--max_length must be at least 3 (start, one token, end), got {self.max_length}.")
        if self.adam_beta1 == 1 or self.adam_beta2 == 1 or self.ema_decay == 1:
            raise ArgumentError(
                "--adam_beta1, --adam_beta2 and --ema_decay must be below 1: at 1 the averages never change."
            )
        require_share(
            self, "tag_share", "template_share", "max_bad_share", "ema_decay", "adam_beta1", "adam_beta2", "crop_scale"
        )
        languages = len(self.caption_column.split(","))
        for name in ("templates", "tag_column"):
            count = len((getattr(self, name) or "").split(","))
            if count not in (1, languages):
                raise ArgumentError(
                    f"--{name} has {count} entries and --caption_column {languages}: give one, or one per column."
                )
        for templates in self.templates.split(","):
            require_one_of("templates", templates, tuple(TEMPLATES))
        if self.tag_share and not self.tag_column:
            raise ArgumentError(f"--tag_share {self.tag_share} needs --tag_column, the column with keywords.")
        if self.per_device_train_batch_size == 1:
            raise ArgumentError("--per_device_train_batch_size 1 leaves no negatives to learn from: use at least 2.")
        if self.cache_images and (self.augmentation == "crop" or self.num_workers):
            raise ArgumentError(
                "--cache_images needs --augmentation strong or none (crop draws a new crop each time) and "
                f"--num_workers 0, got {self.augmentation} and {self.num_workers}."
            )
        if self.eval_dataset_name and not self.eval_split:
            raise ArgumentError(
                "--eval_dataset_name needs --eval_split, the split to evaluate on: train, if it has no splits."
            )
        if self.eval_split and self.eval_split == self.train_split and not self.eval_dataset_name and not self.hold_out:
            raise ArgumentError(
                f"--eval_split {self.eval_split} is the training split: choose another split, or use --hold_out."
            )
        if self.push_to_hub and not self.hub_model_id:
            raise ArgumentError("--push_to_hub needs --hub_model_id, the repository to push to, such as me/my-clip.")
        if self.hub_model_id and not self.push_to_hub:
            raise ArgumentError(f"--hub_model_id {self.hub_model_id} has no effect without --push_to_hub.")
        if self.hold_out and "=" not in self.hold_out and not 0 < share_of(self.hold_out) < 1:
            raise ArgumentError(
                f"--hold_out must be COLUMN=VALUE or a share of the pictures such as 10%, got {self.hold_out!r}."
            )

    @functools.cached_property
    def base_model(self) -> str | None:
        """The model of --model_name_or_path in vlp's format, converted if it is another one; None without one."""
        return own_copy(self.model_name_or_path, "--model_name_or_path") if self.model_name_or_path else None

    def own_parts(self) -> tuple[str, str] | None:
        """Name the architecture if the task adds weights that a pre-trained model does not have.

        Returns:
            The name of the architecture and the option that selects it, or None if no weights are added.
        """
        return None


def require_at_least_one(arguments, *names: str) -> None:
    for name in names:
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise ArgumentError(f"--{name} must be at least 1, got {getattr(arguments, name)}.")


def require_share(arguments, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(arguments, name) <= 1:
            raise ArgumentError(f"--{name} must be between 0 and 1, got {getattr(arguments, name)}.")


def require_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ArgumentError(f"--{name} must be one of {', '.join(allowed)}, got {value!r}.")


# The largest value of each numeric option that is limited further than by its type.
MOST: dict[str, float] = {
    "seed": 2**32 - 1,
    "num_workers": 256,
    "num_threads": 1024,
    "image_size": 4096,
    "fine_tune_image_size": 4096,
    "vocab_size": 10_000_000,
    "per_device_train_batch_size": 1_000_000,
    "eval_batch_size": 1_000_000,
    "batch_size": 1_000_000,
    "gradient_accumulation_steps": 1_000_000,
    "micro_batch_size": 1_000_000,
    "cached_views": 1000,
    "queue_size": 10_000_000,
    "num_beams": 1000,
    "eval_num_beams": 1000,
    "resamples": 1_000_000,
    "lora_rank": 4096,
    "layer_decay": 1,
    "alpha_epochs": 1_000_000,
    "max_grad_norm": 1e12,
}
LARGEST = 2**53  # of numbers without bounds of their own


def check_values(arguments) -> None:
    """Check every option against its type and its bounds.

    Raises:
        ArgumentError: if a value is none of the choices of a Literal type, a number is not finite or out of bounds, or
            a text contains characters that no file has.
    """
    for item in dataclasses.fields(arguments):
        value, name = getattr(arguments, item.name), item.name
        if typing.get_origin(item.type) is Literal and value not in typing.get_args(item.type):
            choices = ", ".join(map(str, typing.get_args(item.type)))
            raise ArgumentError(f"--{name} must be one of {choices}, got {printable(repr(value), 60)}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise ArgumentError(f"--{name} must be a finite number, got {value}.")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            most = MOST.get(name, LARGEST if isinstance(value, int) else math.inf)
            if abs(value) > most:
                shown = "a number of many digits" if abs(value) > 1e15 else f"{value:,}"
                raise ArgumentError(f"--{name} must be at most {most:,}, got {shown}.")
            if name == "seed" and value < 0:
                raise ArgumentError(f"--seed must not be negative, got {value}.")
        if isinstance(value, str):
            if not is_valid(value):
                raise ArgumentError(
                    f"--{name} contains a NUL or a character that is not valid UTF-8: {printable(value, 60)}."
                )
            if name in PATHS and value.startswith("~"):
                setattr(arguments, name, os.path.expanduser(value))


# Options that name a file or a folder, or a model or data set on the hub.
PATHS = (
    "answer_list", "bert_name_or_path", "captioner", "class_names", "dataset", "dataset_name", "eval_dataset_name",
    "filter", "image_root", "image_tower", "language_model_name_or_path", "model_name_or_path", "output_dir",
    "resume_from_checkpoint", "teacher_name_or_path", "text_tower", "tokenizer_name", "vision_tower",
)  # fmt: skip


def publishable(options: dict) -> dict:
    """The options as they may be published: no path of this machine, no command, and no password of an address."""
    return {key: public_name(value) if key in PATHS and isinstance(value, str) else value
            for key, value in options.items()}  # fmt: skip


def public_name(name: str) -> str:
    """The name of a model or of data as it may be published.

    Args:
        name: a hub name, which is kept; a path, of which the last part is kept; a command (`pipe:...`), which is left
            out; an address, which is kept without its user and its query. Several are joined by "::".
    """
    return "::".join(public_part(part) for part in name.split("::"))


def public_part(name: str) -> str:
    if name.startswith("pipe:"):
        return "pipe"
    if "://" in name:
        address = urllib.parse.urlsplit(name)
        return f"{address.scheme}://{(address.netloc).rpartition('@')[2]}{address.path}"
    if re.fullmatch(r"[\w][\w.-]*/[\w.-]+", name) and not Path(name).exists():
        return name
    return Path(os.path.abspath(name)).name if "/" in name or name.startswith((".", "~")) else name


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """Add a command line option for each field of a dataclass.

    HfArgumentParser is not used because it can neither reset to None an option that a recipe has set nor parse a dict
    from JSON.

    Args:
        parser: parser to extend.
        kind: dataclass whose fields are defined with `option`.
    """
    for item in dataclasses.fields(kind):
        default = item.default if item.default is not dataclasses.MISSING else item.default_factory()
        shown = "none" if default in ({}, None) else default
        settings = {"default": default, "help": f"{item.metadata['help'].replace('%', '%%')} (default: {shown})"}
        kinds = [each for each in (typing.get_args(item.type) or (item.type,)) if each is not type(None)]
        if typing.get_origin(item.type) is Literal:
            settings |= {"choices": kinds, "type": type(kinds[0])}
        elif kinds[0] is bool:
            settings |= {"action": argparse.BooleanOptionalAction}
        else:
            convert = json_object if kinds[0] is dict else kinds[0]
            convert = none_or(convert) if type(None) in typing.get_args(item.type) else convert
            settings |= {"type": convert, "metavar": kinds[0].__name__}
        parser.add_argument(f"--{item.name}", **settings)


def share_of(text: str) -> float:
    """The share that a percentage such as "10%" says, from 0 to 1; 0 if the text is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", text)
    return float(found[1]) / 100 if found else 0.0


def json_object(word: str) -> dict:
    """Parse an object in JSON, such as {"hidden_size": 256}; for argparse."""
    try:
        value = json.loads(word)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(
            f"not valid JSON: {brief(error)[:100]} (to start from a model, use --model_name_or_path)"
        ) from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'expected an object such as {{"projection_dim": 256}}, got {word[:60]}')
    return value


def none_or(convert: Callable) -> Callable:
    """Wrap a converter so that the word "none" gives None, to undo what a recipe sets."""

    def convert_or_none(word: str):
        return None if word == "none" else convert(word)

    convert_or_none.__name__ = convert.__name__  # argparse shows it in the error message for a wrong value
    return convert_or_none
