"""The interface of a model family: the seven functions that training needs from it."""

import argparse
import contextlib
import dataclasses
import difflib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import datasets
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from ...errors import ArgumentError, UserError, brief, printable
from ...loading import read_config
from ..arguments import TrainingArguments, option, require_at_least_one
from ..data.features import Features, compute_features, key_of
from ..data.rows import CaptionChooser
from ..data.samples import SampleMaker
from ..data.sources import is_shards
from ..evaluation.arguments import EvaluationArguments
from ..evaluation.pictures import Pictures
from ..evaluation.tasks import prepare_data
from ..objectives.base import Objective
from ..objectives.distributed import main_process_first

A = TypeVar("A", bound=TrainingArguments)


@dataclass(frozen=True)
class Family(Generic[A]):
    """A kind of model to train; use `dataclasses.replace` to change one of its parts.

    Attributes:
        name: command that trains it.
        text: description for --help.
        recipe: default recipe.
        recipe_with_towers: default recipe with pre-trained towers; None: the same one.
        fine_tuning: (the parsed options) -> default recipe with `--model_name_or_path`.
        arguments: dataclass of its options.
        config: (arguments, tokenizer or None) -> configuration of a new model. Raises ArgumentError if it is invalid.
        processor: (arguments, rows or None for shards, chooser) -> processor with a loaded or newly trained tokenizer.
        model: (arguments, processor) -> new or loaded model; the sizes of a loaded model are copied to the arguments.
        objective: (arguments, model, processor, steps per epoch or None if unknown) -> the training objective.
        evaluation: (arguments, evaluation rows, training rows or None) -> the prepared data of each evaluation task.
        samples: (arguments, rows or None, model, processor, maker) -> the maker that converts rows into samples; the
            given maker, which makes pairs of an image and a caption, if that is enough.
    """

    name: str
    text: str
    recipe: str
    arguments: type[A]
    config: Callable[[A, object | None], PreTrainedConfig]
    processor: Callable[[A, datasets.Dataset | None, CaptionChooser], ProcessorMixin]
    model: Callable[[A, ProcessorMixin], PreTrainedModel]
    objective: Callable[[A, PreTrainedModel, ProcessorMixin, float | None], Objective]
    evaluation: Callable[[A, datasets.Dataset, datasets.Dataset | None], list[Pictures]]
    samples: Callable[[A, datasets.Dataset | None, PreTrainedModel, ProcessorMixin, SampleMaker], SampleMaker]
    fine_tuning: Callable[[argparse.Namespace], str]
    recipe_with_towers: str | None = None


@dataclass(kw_only=True)
class CachingArguments(TrainingArguments):
    """Options of the families whose locked towers can run once instead of in every epoch."""

    cache_features: bool = option(
        False,
        "compute the output of locked towers once, and keep it in the cache folder; the image tower must be locked",
    )
    cached_views: int = option(
        1,
        "with --cache_features: number of augmented versions of each image and of its caption, of which an epoch uses "
        "one each",
        bound=True,
        shown=True,
    )

    def check_cache(self, locked: bool, option: str) -> None:
        """Raise ArgumentError unless --cache_features fits the other options; `option` locks the image tower."""
        require_at_least_one(self, "cached_views")
        if not self.cache_features:
            if self.cached_views > 1:
                raise ArgumentError(f"--cached_views {self.cached_views} needs --cache_features.")
            return
        if not locked:
            raise ArgumentError(f"--cache_features needs {option}: features of a tower that is trained change.")
        if self.cache_images or self.lora_rank:
            raise ArgumentError("--cache_features does not go with --cache_images or --lora_rank.")
        self.require_random_access("--cache_features")

    def require_random_access(self, option: str) -> None:
        """Raise ArgumentError unless this process can read any row at any time, as an option needs."""
        if is_shards(self.dataset_name) or self.streaming or self.num_workers:
            raise ArgumentError(f"{option} needs random access to the rows: no shards, and --num_workers 0.")


@dataclass(kw_only=True)
class GroupingArguments(TrainingArguments):
    """Options of the families that learn from several texts about an image."""

    group_images: int = option(
        1,
        "questions and statements: place up to this many texts about an image, or a pair of images, next to each other "
        "in a batch, which encodes it once; 1: no grouping",
        bound=True,
        shown=True,
    )

    def check_groups(self, learns: bool, tasks: str) -> None:
        """Raise ArgumentError unless --group_images fits the other options.

        Args:
            learns: whether the task learns from several texts about an image.
            tasks: the options of the tasks that do.
        """
        require_at_least_one(self, "group_images")
        random_access = not (is_shards(self.dataset_name) or self.streaming)
        if self.group_images > 1 and not (random_access and learns):
            raise ArgumentError(f"--group_images is for {tasks}, and for data with random access to the rows.")


def check_fields(given: dict, kind: type) -> None:
    """Check the names of configuration fields.

    Args:
        given: fields from --model.
        kind: configuration class.

    Raises:
        ArgumentError: if a field does not exist; the message suggests the closest name.
    """
    known = [item.name for item in dataclasses.fields(kind)] + ["model_type"]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ArgumentError(
                f"--model: {kind.__name__} has no field {printable(repr(name), 60)}"
                f"{f'; did you mean {near[0]}?' if near else '.'}"
            )


def parts_of_model(arguments: TrainingArguments, *names: str) -> dict:
    """A copy of the fields of --model, in which the named parts are objects of fields.

    Raises:
        ArgumentError: if --model or a part is not an object of fields.
    """
    check_object(arguments.model, "--model")
    fields = json.loads(json.dumps(arguments.model))
    for name in names:
        check_object(fields.setdefault(name, {}), f"--model: {name}")
    return fields


def check_object(value: object, name: str) -> None:
    """Raise ArgumentError unless a value is a dict."""
    if not isinstance(value, dict):
        raise ArgumentError(
            f'{name} must be an object of fields, such as {{"hidden_size": 256}}, not {printable(repr(value), 60)}.'
        )


@contextlib.contextmanager
def possible_model() -> Iterator[None]:
    """Raise ArgumentError for a configuration or a model that cannot be built."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, OverflowError, StrictDataclassError,
            RuntimeError, MemoryError) as error:  # fmt: skip
        raise ArgumentError(f"--model: no model can be built with these fields: {brief(error)[:300]}") from error


def limit_length(arguments: TrainingArguments, most: int) -> None:
    """Lower --max_length to what a loaded model supports, and say so."""
    if arguments.max_length > most:
        PartialState().print(
            f"Longer texts are cut at {most} tokens, which is the most that the model supports (--max_length)."
        )
        arguments.max_length = most


def require_model_type(name: str, *model_types: str) -> None:
    """Raise ArgumentError if the model in a folder or hub repository has none of these model types."""
    kind = read_config(name, "--model_name_or_path").model_type
    if kind not in model_types:
        expected = " or ".join(f"a {model_type}" for model_type in model_types)
        raise ArgumentError(f"--model_name_or_path {printable(name, 120)} is a {kind}, not {expected}.")


def extend(maker: SampleMaker, kind: type[SampleMaker], **parts) -> SampleMaker:
    """Return a maker of class `kind` with the settings of `maker` and additional fields."""
    settings = {item.name: getattr(maker, item.name) for item in dataclasses.fields(maker)}
    return kind(**settings, **parts)


def cached_features(
    arguments: TrainingArguments, rows, encode: Callable, module: nn.Module, config, images
) -> Features:
    """What a frozen model computes for the image of each row, from the cache folder; the main process computes it.

    Args:
        arguments: options of the run.
        rows: rows of a data set.
        encode: returns the features (B, ...) of PIL images.
        module, config, images: the model, its configuration and its image processor.
    """
    key = key_of(module, config, images, rows, arguments.image_column)
    with main_process_first():
        path = compute_features(encode, key, rows, arguments.image_column, arguments.max_image_pixels,
                                arguments.eval_batch_size)  # fmt: skip
    return Features(path)


def evaluation_tasks(
    arguments: TrainingArguments, rows: datasets.Dataset, tasks: list[dict], answers: list[str] | None = None
) -> list[Pictures]:
    """Prepare the data of each evaluation task of a run.

    Args:
        arguments: options of the run, from which the settings shared by all tasks are taken.
        rows: evaluation data.
        tasks: the other fields of `EvaluationArguments`, one dict per task.
        answers: for vqa, candidate answers to rank; None: no ranking.

    Returns:
        The prepared data, one entry per task.
    """
    dataset = arguments.eval_dataset_name or arguments.dataset_name
    common = {
        "dataset": Path(dataset).name if Path(dataset).exists() else dataset,
        "split": arguments.hold_out or arguments.eval_split,
        "image_column": arguments.image_column,
        "caption_column": arguments.caption_column,
        "batch_size": arguments.eval_batch_size,
        "max_image_pixels": arguments.max_image_pixels,
        "max_length": arguments.max_length,
    }
    return [prepare_data(rows, EvaluationArguments(**common | task), PartialState(), answers) for task in tasks]
