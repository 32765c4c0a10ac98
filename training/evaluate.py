"""Evaluate a vlp or transformers model on any data set: `accelerate launch -m vlp.training.evaluate MODEL ...`.

    accelerate launch -m vlp.training.evaluate model_cards/clip-emoji --dataset emoji --task zero-shot
    accelerate launch -m vlp.training.evaluate OWNER/MODEL --dataset captions.json --task retrieval --rerank_top_k 16

The pictures are divided among the processes; the results do not depend on the number of processes. They are a JSON
file, a table in Markdown and, for zero-shot classification, a plot of the confusion matrix. They are written to
MODEL/evaluations, and added to the model card if vlp wrote one.
"""

import argparse
import sys
from pathlib import Path

import datasets
import torch
from accelerate import PartialState

from ..errors import ArgumentError, UnsupportedModelError
from ..inference import load
from ..model_cards.card import RESULTS, evaluation_table, render_card
from .arguments import add_options
from .data.sources import load_rows
from .evaluation.arguments import EvaluationArguments
from .evaluation.results import results_of, write_results
from .evaluation.tasks import evaluate_task, prepare_data, use_of
from .machine.hardware import cpu_cores, use_cpu_well


def evaluate(model: str, arguments: EvaluationArguments) -> dict:
    """Evaluate a model and write the results; every process must call this.

    Args:
        model: folder or hub name.
        arguments: the data, the task and its settings.

    Returns:
        The results, as written to the JSON file.

    Raises:
        ArgumentError: if the data does not fit the task.
        UnsupportedModelError: if the model does not support the task.
    """
    state = PartialState(cpu=not torch.accelerator.is_available())
    if state.device.type == "cpu":
        use_cpu_well(max(1, cpu_cores() // state.num_processes))
    table = load_rows(arguments.dataset, arguments.split, arguments.image_column, arguments.image_root,
                      arguments.dataset_config_name)  # fmt: skip
    pictures = prepare_data(table, arguments, state)
    predictor = load(model, use_of(arguments), state.device, getattr(torch, arguments.dtype))
    outcome = evaluate_task(predictor, pictures)
    name = Path(model).name if Path(model).is_dir() else model
    results = results_of(name, type(predictor.model).__name__, pictures, outcome, state.device.type)
    if state.is_main_process:
        default = Path(model) / "evaluations" if Path(model).is_dir() else Path("runs/evaluations") / Path(model).name
        path = write_results(Path(arguments.output_dir or default), results, pictures, outcome)
        print(evaluation_table(results))
        print(f"Results written to {path}, with .md{' and .png' if outcome.confusion else ''} files next to it.")
        if path.parent == Path(model) / "evaluations" and (Path(model) / RESULTS).is_file():
            render_card(Path(model)).save(Path(model) / "README.md")
    state.wait_for_everyone()
    return results


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="accelerate launch -m vlp.training.evaluate", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of a vlp or transformers model")
    add_options(parser, EvaluationArguments)
    return parser


def main() -> None:
    options = vars(build_parser().parse_args())
    model = options.pop("model")
    datasets.disable_progress_bars()
    try:
        evaluate(model, EvaluationArguments(**options))
    except (ArgumentError, UnsupportedModelError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
