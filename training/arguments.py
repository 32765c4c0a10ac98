"""Training options: their meaning, unit, default, and what is refused before anything is loaded."""

import argparse
import dataclasses
import json
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..errors import ArgumentError
from ..processing.pictures import MAX_PIXELS
from ..processing.prompts import TEMPLATES

EMOJI = "emoji"  # the data set that the package embeds


def option(default, text: str, bound: bool = False, shown: bool = False):
    """A dataclass field that is an option of the command line.

    Args:
        text: its help. bound: a resumed run must have the same value. shown: the model card shows it.
    """
    metadata = {"help": text, "bound": bound, "shown": shown}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


def names_of(arguments, mark: str) -> list[str]:
    """The options that are marked "bound" or "shown" in their definitions."""
    return [item.name for item in dataclasses.fields(arguments) if item.metadata.get(mark)]


@dataclass(kw_only=True)
class TrainingArguments:
    """Everything that a run is told, along the way of the data: data, model, optimisation, evaluation, output."""

    # Data
    dataset_name: str = option(
        EMOJI,
        'training pairs: "emoji" (embedded), a hub name, a folder (datasets, imagefolder), a .csv, .tsv, .json or '
        ".jsonl file, or .tar shards such as data/{000..099}.tar, several joined by :: ",
        bound=True,
    )
    dataset_config_name: str | None = option(None, "configuration of a hub data set", bound=True)
    train_split: str = option("train", "split to train on", bound=True)
    image_column: str = option("image", "column with the images, or with their paths", bound=True)
    caption_column: str = option(
        "caption",
        "column with one caption or a list of them, one drawn at random each time; of several languages, joined by "
        "commas, one column each, and then --tag_column and --templates in the same order",
        bound=True,
    )
    tag_column: str | None = option(None, "column with a list of keywords that may stand for the caption", bound=True)
    tag_share: float = option(0.0, "share of captions (0 to 1) that keywords take part in", bound=True, shown=True)
    templates: str = option(
        "name", "templates to put captions in while training; see vlp.processing.prompts", bound=True, shown=True
    )
    template_share: float = option(0.0, "share of captions (0 to 1) that are put in a template", bound=True, shown=True)
    image_root: str | None = option(None, "folder that image paths start from; that of the file where not given")
    shard_weights: str | None = option(None, "weights of the :: shard sources, joined by ::, such as 2::1", bound=True)
    shard_size: int | None = option(None, "samples in all shards, for the length of an epoch (WebDataset)")
    hold_out: str | None = option(
        None, "COLUMN=VALUE: rows to keep out of training and to evaluate on instead", bound=True
    )
    max_bad_share: float = option(0.1, "the run stops when more than this share of rows (0 to 1) cannot be used")
    max_image_pixels: int = option(MAX_PIXELS, "images of more pixels are skipped as decompression bombs, in pixels")
    augmentation: Literal["crop", "strong", "none"] = option(
        "crop", "crop (the paper's), strong (for small data) or none", bound=True, shown=True
    )
    crop_scale: float = option(0.9, "least share (0 to 1) of an image's area that augmentation crop keeps", bound=True)
    horizontal_flip: bool = option(False, "augmentation crop also mirrors half of the images", bound=True)
    random_augment: bool = option(False, "augmentation crop also applies BLIP's RandomAugment(2, 5)", bound=True)
    group_captions: int = option(
        1, "images with the same caption to put into one batch together, where there are", bound=True, shown=True
    )
    cache_images: bool = option(False, "keep decoded images in memory; for small data with augmentation strong or none")
    num_workers: int = option(0, "processes that load data, for each training process")

    # Model
    model: dict = option({}, "fields of the configuration, as JSON; vocab_size and image_size follow from elsewhere")
    image_size: int = option(224, "side of the images, in pixels")
    max_length: int = option(77, "most tokens in a caption, start and end included", bound=True)
    tokenizer_name: str | None = option(
        None, "hub name or folder of a tokenizer, or OpenAI's bpe_simple_vocab_16e6.txt.gz", bound=True
    )
    vocab_size: int = option(49408, "entries of the tokenizer trained on the captions, where no tokenizer is named")
    model_name_or_path: str | None = option(None, "folder or hub name of a vlp model to go on from, processor included")
    lora_rank: int = option(
        0,
        "train LoRA adapters of this rank beside every attention's projections; 0: all weights",
        bound=True,
        shown=True,
    )
    gradient_checkpointing: bool = option(False, "compute activations again in the backward pass, to save memory")
    torch_compile: bool = option(False, "compile the model; slower to start, faster steps")

    # Objective and optimisation
    exclude_duplicates: bool = option(
        True, "rows of a batch with the same caption or image are not negatives", bound=True, shown=True
    )
    per_device_train_batch_size: int = option(256, "pairs in a step of each process", bound=True, shown=True)
    gradient_accumulation_steps: int = option(
        1,
        "backward passes for each optimiser step; unlike CLIP's --micro_batch_size, adds no negatives",
        bound=True,
        shown=True,
    )
    learning_rate: float = option(5e-4, "peak learning rate", shown=True)
    weight_decay: float = option(
        0.2, "decay of weight matrices; gains, biases, scale and positions have none", shown=True
    )
    adam_beta1: float = option(0.9, "first moment's decay", shown=True)
    adam_beta2: float = option(0.98, "second moment's decay; the paper: 0.98 for ViT, 0.999 for ResNet", shown=True)
    adam_epsilon: float = option(1e-6, "the paper: 1e-6 for ViT, 1e-8 for ResNet", shown=True)
    layer_decay: float = option(1.0, "factor on the learning rate from each layer to the one below it", shown=True)
    max_grad_norm: float = option(1.0, "gradient norm to clip at; 0 for none", shown=True)
    warmup_steps: int = option(2000, "optimiser steps of linear warm-up", shown=True)
    num_train_epochs: float = option(32.0, "passes over the data, where neither steps nor minutes are given")
    max_train_steps: int | None = option(None, "optimiser steps in all", shown=True)
    max_train_minutes: float | None = option(
        None, "minutes of training in all; the schedule ends with them", shown=True
    )
    ema_decay: float = option(0.0, "average of weights to evaluate and publish, such as 0.999; 0 for none", shown=True)
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "auto", "no, bf16, fp16, or auto: bf16 where the hardware computes in it"
    )
    num_threads: int | None = option(None, "CPU threads of each process; all cores over all processes if not given")
    seed: int = option(0, "seed of weights, order and augmentation", bound=True, shown=True)

    # Evaluation
    eval_dataset_name: str | None = option(None, "pairs to evaluate on; the training data's other split if not given")
    eval_split: str | None = option(None, "split to evaluate on; none: no evaluation")
    eval_image_column: str | None = option(None, "column with the images to evaluate on, where it is another")
    eval_steps: int | None = option(None, "evaluate every so many optimiser steps; at the end in any case")
    eval_batch_size: int = option(256, "images or captions in a step of the evaluation")

    # Output
    output_dir: str | None = option(None, "folder to publish; runs/RECIPE where not given, its resume state beside it")
    save_steps: int | None = option(None, "save the state every so many optimiser steps")
    save_minutes: float | None = option(10.0, "save the state every so many minutes")
    save_total_limit: int = option(2, "states to keep")
    resume_from_checkpoint: str | None = option(None, 'folder of a state, or "latest"')
    logging_steps: int = option(10, "log every so many optimiser steps")
    report_to: str = option("tensorboard", "tracker: tensorboard, wandb, ... (those of accelerate), or none")
    publish_dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "of the weight matrices that are published: float32, bfloat16 or float16; loaded, they are float32"
    )
    push_to_hub: bool = option(False, "push model, processor and card to the hub at the end, in one commit")
    hub_model_id: str | None = option(None, "name to push to, such as me/my-clip")
    hub_private: bool = option(False, "make the hub repository private")
    hub_bundle: bool = option(False, "publish the model's code too, for those without vlp (trust_remote_code=True)")
    hub_revision: str | None = option(None, "branch to push to, made where there is none")
    language: str = option("en", "language of the captions, or several joined by commas, for the card")
    data_license: str | None = option(None, "licence of the data, for the card")

    def __post_init__(self):
        require_at_least_one(
            self, "per_device_train_batch_size", "gradient_accumulation_steps", "eval_batch_size", "image_size",
            "max_length", "vocab_size", "logging_steps", "group_captions", "save_total_limit", "max_image_pixels",
        )  # fmt: skip
        for name in (
            "max_train_steps",
            "max_train_minutes",
            "eval_steps",
            "save_steps",
            "save_minutes",
            "shard_size",
            "num_threads",
        ):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ArgumentError(f"--{name} must be positive, got {getattr(self, name)}.")
        for name in ("learning_rate", "num_train_epochs", "adam_epsilon", "layer_decay", "crop_scale"):
            if getattr(self, name) <= 0:
                raise ArgumentError(f"--{name} must be positive, got {getattr(self, name)}.")
        for name in ("weight_decay", "max_grad_norm", "warmup_steps", "num_workers", "lora_rank"):
            if getattr(self, name) < 0:
                raise ArgumentError(f"--{name} must not be negative, got {getattr(self, name)}.")
        if self.adam_beta1 == 1 or self.adam_beta2 == 1 or self.ema_decay == 1:
            raise ArgumentError(
                "--adam_beta1, --adam_beta2 and --ema_decay must be below 1: at 1 nothing is ever learnt."
            )
        require_share(
            self, "tag_share", "template_share", "max_bad_share", "ema_decay", "adam_beta1", "adam_beta2", "crop_scale"
        )
        require_choices(self)
        languages = len(self.caption_column.split(","))
        for name in ("templates", "tag_column"):
            count = len((getattr(self, name) or "").split(","))
            if count not in (1, languages):
                raise ArgumentError(f"--{name} names {count}, for the {languages} of --caption_column: one or as many.")
        for templates in self.templates.split(","):
            require_one_of("templates", templates, tuple(TEMPLATES))
        if self.tag_share and not self.tag_column:
            raise ArgumentError(f"--tag_share {self.tag_share} needs --tag_column, the column with the keywords.")
        if self.per_device_train_batch_size == 1:
            raise ArgumentError("--per_device_train_batch_size 1 leaves no negatives to learn from: use at least 2.")
        if self.cache_images and (self.augmentation == "crop" or self.num_workers):
            raise ArgumentError(
                "--cache_images needs --augmentation strong or none (crop draws another crop each time) and "
                f"--num_workers 0, got {self.augmentation} and {self.num_workers}."
            )
        if self.eval_dataset_name and not self.eval_split:
            raise ArgumentError("--eval_dataset_name needs --eval_split, the split of it to evaluate on.")
        if self.eval_split and self.eval_split == self.train_split and not self.eval_dataset_name and not self.hold_out:
            raise ArgumentError(f"--eval_split {self.eval_split} is what is trained on: name another, or --hold_out.")
        if self.push_to_hub and not self.hub_model_id:
            raise ArgumentError("--push_to_hub needs --hub_model_id, the name to push to, such as me/my-clip.")
        if self.hub_model_id and not self.push_to_hub:
            raise ArgumentError(f"--hub_model_id {self.hub_model_id} does nothing without --push_to_hub.")
        if self.hold_out and "=" not in self.hold_out:
            raise ArgumentError(f"--hold_out must be COLUMN=VALUE, got {self.hold_out!r}.")

    def own_parts(self) -> tuple[str, str] | None:
        """The architecture with parts that a pre-trained folder lacks, and the option that asks for it; else None."""
        return None


def require_at_least_one(arguments, *names: str) -> None:
    for name in names:
        if getattr(arguments, name) < 1:
            raise ArgumentError(f"--{name} must be at least 1, got {getattr(arguments, name)}.")


def require_share(arguments, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(arguments, name) <= 1:
            raise ArgumentError(f"--{name} must be between 0 and 1, got {getattr(arguments, name)}.")


def require_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ArgumentError(f"--{name} must be one of {', '.join(allowed)}, got {value!r}.")


def require_choices(arguments) -> None:
    """Raise ArgumentError for an option whose type is a Literal and whose value is none of its choices."""
    for item in dataclasses.fields(arguments):
        if typing.get_origin(item.type) is Literal:
            value, choices = getattr(arguments, item.name), typing.get_args(item.type)
            if value not in choices:
                raise ArgumentError(f"--{item.name} must be one of {', '.join(map(str, choices))}, got {value!r}.")


def publishable(options: dict) -> dict:
    """Options as anyone may read them: of an absolute path, the last part only."""

    def name(value):
        if isinstance(value, str) and value.startswith("/"):
            return "::".join(Path(path).name for path in value.split("::"))
        return value

    return {key: name(value) for key, value in options.items()}


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """Add an option for each field of a dataclass of `option`s.

    HfArgumentParser is not used because it can neither set an option back to None, which a recipe may have set, nor
    read a dict from JSON.
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
            convert = json.loads if kinds[0] is dict else kinds[0]
            convert = none_or(convert) if type(None) in typing.get_args(item.type) else convert
            settings |= {"type": convert, "metavar": kinds[0].__name__}
        parser.add_argument(f"--{item.name}", **settings)


def none_or(convert: Callable) -> Callable:
    """A converter that takes the word "none" for None, to undo what a recipe sets."""

    def convert_or_none(word: str):
        return None if word == "none" else convert(word)

    convert_or_none.__name__ = convert.__name__  # argparse names it in the message about a wrong value
    return convert_or_none
