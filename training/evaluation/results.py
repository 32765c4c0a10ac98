"""Write the results of an evaluation: JSON, a Markdown table, and a confusion matrix as PNG."""

import dataclasses
import json
import os
import platform
from collections import Counter
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ...errors import ArgumentError, printable
from ...files import is_own, kind_of, list_files, require_own, usable_path
from ...inference import predictor_of, shorten_embeddings
from ...model_cards.card import PREDICTIONS, evaluation_table
from ...model_cards.plots import plot_confusion
from ..arguments import publishable
from ..data.rows import describe
from .arguments import EvaluationArguments
from .pictures import Pictures
from .tasks import Outcome, evaluate_task, use_of

INTERVAL = "_interval"


def evaluate_model(model: PreTrainedModel, processor, evaluations: list[Pictures], resamples: int) -> list[Outcome]:
    """Evaluate a model on each task. Called by every process.

    Args:
        model: the model. It runs in evaluation mode; its mode is restored afterwards.
        processor: its processor.
        evaluations: the prepared data of each task.
        resamples: bootstrap resamples for the intervals; 0: no intervals.

    Returns:
        The outcome of each task.
    """
    training, outcomes = model.training, []
    model.eval()
    for pictures in evaluations:
        arguments = dataclasses.replace(pictures.arguments, resamples=resamples)
        predictor = predictor_of(model, processor, use_of(arguments))
        if arguments.embedding_size is not None:
            shorten_embeddings(predictor, type(model).__name__, arguments.embedding_size)
        outcomes.append(evaluate_task(predictor, dataclasses.replace(pictures, arguments=arguments)))
    model.train(training)
    return outcomes


def metrics_of(evaluations: list[Pictures], outcomes: list[Outcome]) -> dict[str, float]:
    """Merge the metrics of all tasks, without intervals.

    If a metric is measured on several columns, such as those of two languages, it is named METRIC@COLUMN from the
    second column on.

    Args:
        evaluations: the data of each task.
        outcomes: the outcome of each task.
    """
    metrics: dict[str, float] = {}
    for pictures, outcome in zip(evaluations, outcomes, strict=True):
        for name, value in values_of(outcome).items():
            metrics[name if name not in metrics else f"{name}@{pictures.arguments.text_column}"] = value
    return metrics


def values_of(outcome: Outcome) -> dict[str, float]:
    """The metrics without their intervals."""
    return {name: value for name, value in outcome.metrics.items() if not name.endswith(INTERVAL)}


def results_of(name: str, architecture: str, pictures: Pictures, outcome: Outcome, device: str) -> dict:
    """Collect the results of an evaluation for storage as JSON.

    Args:
        name: name of the model.
        architecture: class of the model.
        pictures: the data.
        outcome: the metrics.
        device: the hardware, as text.
    """
    results = {
        "model": name,
        "architecture": architecture,
        "metrics": values_of(outcome),
        "intervals": {key.removesuffix(INTERVAL): value for key, value in outcome.metrics.items()
                      if key.endswith(INTERVAL)},
        "rows": pictures.used,
        "pictures": len(pictures),
        "skipped": describe(pictures.skipped),
        "classes": len(pictures.names) if pictures.names else None,
        "groups": outcome.groups,
        "processes": pictures.state.num_processes,
        "device": device,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "arguments": publishable(dataclasses.asdict(pictures.arguments)),
    }  # fmt: skip
    if outcome.confusion:
        names = pictures.names
        wrong = Counter(
            (names[label], names[predicted]) for label, predicted in outcome.confusion if label != predicted
        )
        results["most_confused"] = [[*pair, count] for pair, count in wrong.most_common(20)]
    return results


def check_results(folder: Path, arguments: EvaluationArguments, root: Path) -> None:
    """Check that the results of an evaluation can be written, before it starts.

    Args:
        folder: the folder of the results.
        arguments: the options of the evaluation.
        root: the folder whose list of files has the results (see `files.WRITTEN`).

    Raises:
        ArgumentError: if a file there would be replaced that vlp did not write.
    """
    usable_path(folder, "--output_dir")
    if os.path.lexists(folder) and not folder.is_dir():
        raise ArgumentError(f"--output_dir {printable(folder, 120)} is {kind_of(folder)}, not a folder.")
    for suffix in (".json", ".md", ".png", *[PREDICTIONS] * arguments.save_predictions):
        require_own(root, folder / f"{file_name(arguments)}{suffix}", "--output_dir")


def write_results(
    folder: Path, results: dict, pictures: Pictures, outcome: Outcome, root: Path | None = None
) -> Path:  # fmt: skip
    """Write the results into a folder: JSON, a Markdown table, and for zero-shot a confusion matrix as PNG.

    Args:
        folder: the folder, created if it does not exist.
        results: the results, from `results_of`.
        pictures: the data.
        outcome: the metrics.
        root: the folder whose list of files gets the results; None: none, for a folder that is still being prepared.

    Returns:
        The path of the JSON file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{file_name(pictures.arguments)}.json"
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", errors="replace")
    table, written = evaluation_table(results), [path, path.with_suffix(".md")]
    if outcome.confusion:
        plot_confusion(outcome.confusion, pictures.names, path.with_suffix(".png"))
        table += f"\n![Predicted classes for each class]({path.stem}.png)\n"
        written.append(path.with_suffix(".png"))
    predictions = path.with_suffix(PREDICTIONS)
    if pictures.arguments.save_predictions:
        generated = json.dumps(outcome.predictions, indent=1, ensure_ascii=False, default=str) + "\n"
        predictions.write_text(generated, encoding="utf-8", errors="replace")
        written.append(predictions)
    elif root is not None and is_own(root, predictions):
        predictions.unlink(missing_ok=True)  # of an earlier evaluation
    path.with_suffix(".md").write_text(table, encoding="utf-8", errors="replace")
    if root is not None:
        list_files(root, written)
    return path


def file_name(arguments: EvaluationArguments) -> str:
    """The file name of an evaluation: data, split, task, the column unless it is `caption`, and the embedding size."""
    parts = [Path(arguments.dataset).stem, arguments.split, arguments.task]
    parts += [column for column in (arguments.text_column,) if column != "caption"]
    parts += [f"{arguments.embedding_size}-dimensions"] if arguments.embedding_size else []
    text = "-".join(part.replace("/", "_") for part in parts)
    return printable(text, 150).replace("\\", "_")
