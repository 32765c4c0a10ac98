"""Evaluate a model of vlp, transformers or open_clip: `accelerate launch -m vlp.training.evaluate MODEL ...`.

    accelerate launch -m vlp.training.evaluate model_cards/clip-emoji --dataset emoji --task zero-shot
    accelerate launch -m vlp.training.evaluate OWNER/MODEL --dataset captions.json --task retrieval --rerank_top_k 16

The pictures are divided among the processes; the results do not depend on the number of processes. They are a JSON
file, a table in Markdown and, for zero-shot classification, a plot of the confusion matrix. They are written to
MODEL/evaluations, and added to the model card if vlp wrote one.
"""

import argparse
import contextlib
import dataclasses
from pathlib import Path

import datasets
import torch
from accelerate import PartialState

from ..errors import ArgumentError, CommandParser, printable, reported_errors
from ..files import is_own, usable_path, write_file
from ..inference import load
from ..model_cards.card import PREDICTIONS, RESULTS, evaluation_table, read_json, render_card
from .arguments import add_options
from .evaluation.arguments import EvaluationArguments
from .evaluation.results import check_results, results_of, write_results
from .evaluation.tasks import evaluate_task, load_table, prepare_data, use_of
from .machine.hardware import use_cpu_well


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
        use_cpu_well(arguments.num_threads, state.num_processes)
    local = Path(model) if Path(model).is_dir() else None
    default = local / "evaluations" if local else Path("runs/evaluations") / Path(model).name
    folder = usable_path(arguments.output_dir, "--output_dir") if arguments.output_dir else default
    root = local if local and folder == default else folder  # whose list of files has the results
    arguments = as_in_training(arguments, local)
    check_results(folder, arguments, root)
    pictures = prepare_data(load_table(arguments, arguments.split), arguments, state)
    predictor = load(model, use_of(arguments), state.device, getattr(torch, arguments.dtype), arguments.embedding_size)
    outcome = evaluate_task(predictor, pictures)
    name = local.name if local else model
    results = results_of(name, type(predictor.model).__name__, pictures, outcome, state.device.type)
    if state.is_main_process:
        path = write_results(folder, results, pictures, outcome, root)
        print(evaluation_table(results))
        endings = ".md and .png" if outcome.confusion else ".md"
        print(f"Results written to {printable(path)}, and as {endings} beside it.")
        if arguments.save_predictions:
            print(f"Predictions written to {printable(path.with_suffix(PREDICTIONS))}.")
        if root == local and (root / RESULTS).is_file():
            update_card(root)
    state.wait_for_everyone()
    return results


def as_in_training(arguments: EvaluationArguments, folder: Path | None) -> EvaluationArguments:
    """Fill in the options that were not given, and that a model was trained and evaluated with.

    Args:
        arguments: the options of the evaluation.
        folder: the model's folder, which tells if vlp trained it; None for a model of the hub.
    """
    trained = {}
    if folder and (folder / RESULTS).is_file():
        with contextlib.suppress(ArgumentError):  # a file of somebody else
            trained = read_json(folder / RESULTS)["arguments"]
    posterior, prompt = arguments.rerank_posterior, arguments.prompt
    if posterior is None:
        posterior = trained.get("rerank_posterior") is True
    if prompt is None:
        prompt = str(trained.get("prompt") or "")
    return dataclasses.replace(arguments, rerank_posterior=posterior, prompt=prompt)


def update_card(folder: Path) -> None:
    """Render the card of a model again; one that was written or changed by hand is left as it is."""
    card = folder / "README.md"
    if card.exists() and not is_own(folder, card):
        print(f"warning: {printable(card)} was not written by vlp, or was changed since, so it is not updated.")
        return
    write_file(card, str(render_card(folder)))


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="accelerate launch -m vlp.training.evaluate", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of a vlp, transformers or open_clip model")
    add_options(parser, EvaluationArguments)
    return parser


def main() -> None:
    options = vars(build_parser().parse_args())
    model = options.pop("model")
    datasets.disable_progress_bars()
    with reported_errors():
        try:
            evaluate(model, EvaluationArguments(**options))
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
