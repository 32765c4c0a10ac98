"""What a family of models is to training: seven parts, each with its type."""

import dataclasses
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import datasets
from accelerate import PartialState
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from ...errors import ArgumentError
from ..arguments import TrainingArguments
from ..data.rows import CaptionChooser
from ..data.samples import SampleMaker
from ..evaluation.arguments import EvaluationArguments
from ..evaluation.pictures import Pictures
from ..evaluation.tasks import prepare_data
from ..objectives.base import Objective

A = TypeVar("A", bound=TrainingArguments)


@dataclass(frozen=True)
class Family(Generic[A]):
    """A kind of model to train; `dataclasses.replace` gives one with another part.

    Attributes:
        name: its word on the command line. text: what training it does. recipe: used where none is named.
        arguments: its options.
        config: (arguments, tokenizer or None) -> the configuration of a new model. Raises ArgumentError.
        processor: (arguments, rows or None for shards, chooser) -> the processor, its tokenizer loaded or trained.
        model: (arguments, processor) -> the model, new or loaded; of a loaded model, the arguments take over the sizes.
        objective: (arguments, model, processor, steps per epoch or None) -> the losses to train with.
        evaluation: (arguments, rows to evaluate on, rows to train on or None) -> the prepared data of each task.
        samples: (arguments, rows or None, model, processor, maker) -> what makes samples of rows; `maker` makes plain
            pairs, and is returned as it is where that is enough.
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


def check_fields(given: dict, kind: type) -> None:
    """Raise ArgumentError, with the nearest name, for a field that a configuration does not have."""
    known = [item.name for item in dataclasses.fields(kind)] + ["model_type"]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ArgumentError(f"--model: {kind.__name__} has no field {name!r}{f'; {near[0]}?' if near else '.'}")


def require_model_type(name: str, model_type: str) -> None:
    """Raise ArgumentError if a folder or hub name holds another kind of model."""
    kind = AutoConfig.from_pretrained(name).model_type
    if kind != model_type:
        raise ArgumentError(f"{name} is a {kind}, not a {model_type}.")


def extend(maker: SampleMaker, kind: type[SampleMaker], **parts) -> SampleMaker:
    """A maker of another kind with the same settings, and more parts."""
    settings = {item.name: getattr(maker, item.name) for item in dataclasses.fields(maker)}
    return kind(**settings, **parts)


def evaluation_tasks(
    arguments: TrainingArguments, rows: datasets.Dataset, tasks: list[dict], answers: list[str] | None = None
) -> list[Pictures]:
    """The prepared data of tasks, with the settings that all of a run's tasks share.

    Args:
        tasks: for each, the fields of `EvaluationArguments` that are its own. answers: vqa, answers to rank.
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
