"""`vlp merge A B --weights 0.5 --output_dir C`: average the weights of models that were trained from the same start.

vlp merge runs/clip runs/my-clip --weights 0.5 --output_dir runs/between         # WiSE-FT: half of each
vlp merge runs/a runs/b runs/c --output_dir runs/soup                            # a uniform soup
vlp merge runs/a runs/b runs/c --greedy --data "val.csv --task retrieval" --output_dir runs/soup
vlp merge runs/clip runs/my-clip --curve 11 --data old.csv --data my.csv --output_dir runs/curve

`--data` names data to evaluate on, followed by options of `vlp evaluate` if they are needed. A curve is drawn over the
share of the second model, from 0 to 1, and written to curve.png and curve.json.

Sources: WiSE-FT (Wortsman et al., 2022, arXiv:2109.01903); model soups (arXiv:2203.05482).
"""

import argparse
import json
import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from huggingface_hub import ModelCardData
from torch import Tensor
from transformers import PreTrainedModel

from ..conversion import own_copy
from ..errors import ArgumentError, CommandParser, UserError, printable, reported_errors
from ..files import check_output, write_whole
from ..loading import licence_of, load_model, load_processor, read_config, row_of, text_of
from ..model_cards.card import code
from ..model_cards.plots import plot_curve
from ..training.arguments import add_options, public_name
from ..training.evaluation.arguments import EvaluationArguments
from ..training.evaluation.pictures import Pictures
from ..training.evaluation.results import evaluate_model, values_of
from ..training.evaluation.tasks import load_table, prepare_data

MOST_POINTS = 101
# Fields of a configuration that only training, or the initial weights, depend on.
IRRELEVANT = re.compile(r"^_|^transformers_version$|dtype$|^architectures$|dropout|drop_path_rate|label_smoothing|"
                        r"initializer|_init_value$|^embedding_sizes$")  # fmt: skip
# The metric of each task that a curve shows and a greedy soup maximises.
METRIC = {
    "zero-shot": "zero_shot_top1",
    "retrieval": "text_to_image_recall_at_1",
    "captioning": "cider",
    "vqa": "vqa_accuracy",
    "itm": "itm_accuracy",
    "nlvr": "nlvr_accuracy",
    "composition": "composition_accuracy",
    "linear-probe": "linear_probe_top1",
}
State = dict[str, Tensor]


class MergeError(UserError, ValueError):
    """Models that cannot be merged; the message says why."""


@dataclass
class Member:
    """A model to merge.

    Attributes:
        name: folder or hub name, as given.
        state: its weights, by name.
        licence: the licence on its card; None if it is not known.
    """

    name: str
    state: State
    licence: str | None


@dataclass
class Merged:
    """The model that the weights are put into, with all models to merge."""

    model: PreTrainedModel
    processor: object
    members: list[Member]

    def put(self, shares: list[float]) -> PreTrainedModel:
        """Set the weights to the average with these shares, one per member, and return the model."""
        self.model.load_state_dict(average([member.state for member in self.members], shares))
        return self.model


def average(states: list[State], shares: list[float]) -> State:
    """The weighted average of weights, in float64. Integers, such as counters of batches, are those of the first.

    Args:
        states: tensors by name; the same names and shapes in each.
        shares: the weight of each, with the sum 1.

    Returns:
        Tensors in the data types of the first.
    """
    merged = {}
    for name, first in states[0].items():
        others = [state[name] for state in states]
        if not first.is_floating_point() or all(torch.equal(first, other) for other in others[1:]):
            merged[name] = first
            continue
        total = sum(share * other.double() for share, other in zip(shares, others, strict=True))
        merged[name] = total.to(first.dtype)
    return merged


def read_members(names: list[str]) -> Merged:
    """Load models and check that they have the same architecture, tokenizer and preprocessing.

    Raises:
        MergeError: if they differ.
        UnsupportedModelError: if one cannot be loaded.
    """
    merged = None
    for name in names:
        own = own_copy(name)
        config = read_config(own)
        model, processor = load_model(row_of(own, config).model, own), load_processor(own)
        if merged is None:
            merged = Merged(model.eval(), processor, [])
        elif difference := different(merged, model, processor):
            raise MergeError(
                f"{printable(name, 120)} cannot be merged with {printable(names[0], 120)}: {difference}. Only models "
                "that were trained from the same start can be merged."
            )
        state = {key: value.detach().clone() for key, value in model.state_dict().items()}
        merged.members.append(Member(name, state, licence_of(name)))
    return merged


def different(merged: Merged, model: PreTrainedModel, processor) -> str | None:
    """What two models differ in, besides their weights; None if nothing."""
    if type(model) is not type(merged.model):
        return f"one is a {type(model).__name__}, the other a {type(merged.model).__name__}"
    first, second = (settings_of(each.config.to_dict()) for each in (merged.model, model))
    for name in sorted(first.keys() | second.keys()):
        if first.get(name) != second.get(name):
            return f"{name} is {second.get(name)} in one and {first.get(name)} in the other"
    if text_of(merged.processor.tokenizer) != text_of(processor.tokenizer):
        return "they have different tokenizers"
    if merged.processor.image_processor.to_dict() != processor.image_processor.to_dict():
        return "they prepare images differently"
    return None


def settings_of(config: dict, prefix: str = "") -> dict:
    """The fields of a configuration that the weights depend on, with those of its parts as PART.FIELD."""
    found = {}
    for name, value in config.items():
        if isinstance(value, dict):
            found |= settings_of(value, f"{prefix}{name}.")
        elif not IRRELEVANT.search(str(name)):
            found[f"{prefix}{name}"] = value
    return found


# --- shares -----------------------------------------------------------------------------------------------------------


def shares_of(weights: str | None, count: int) -> list[float]:
    """The share of each of `count` models, with the sum 1.

    Args:
        weights: one number per model, joined by commas; for two models, also the share of the second alone; None: equal
            shares.
        count: number of models.

    Raises:
        ArgumentError: if a number is negative or not finite, or their count does not fit.
    """
    if weights is None:
        return [1 / count] * count
    try:
        numbers = [float(word) for word in weights.split(",")]
    except ValueError:
        raise ArgumentError(f"--weights must be numbers joined by commas, got {printable(weights, 60)!r}.") from None
    if len(numbers) == 1 and count == 2:
        if not 0 <= numbers[0] <= 1:
            raise ArgumentError(f"--weights with one number is the share of the second model, from 0 to 1: {weights}.")
        numbers = [1 - numbers[0], numbers[0]]
    if len(numbers) != count:
        raise ArgumentError(f"--weights has {len(numbers)} numbers for {count} models: give one per model.")
    if not all(math.isfinite(number) and number >= 0 for number in numbers) or not sum(numbers):
        raise ArgumentError(f"--weights must not be negative, and not all 0: {printable(weights, 60)}.")
    return [number / sum(numbers) for number in numbers]


def greedy(merged: Merged, evaluations: list[Pictures]) -> list[float]:
    """Find the members of a greedy soup: from the best model on, one joins if the soup is not worse with it.

    Returns:
        The shares; 0 for models that did not join.
    """
    count = len(merged.members)

    def shares(chosen: list[int]) -> list[float]:
        return [1 / len(chosen) if number in chosen else 0.0 for number in range(count)]

    def score(chosen: list[int]) -> float:
        return sum(scores(merged.put(shares(chosen)), merged.processor, evaluations)) / len(evaluations)

    alone = {number: score([number]) for number in range(count)}
    order = sorted(alone, key=alone.get, reverse=True)
    chosen, best = order[:1], alone[order[0]]
    for number in order[1:]:
        value = score([*chosen, number])
        print(f"{printable(merged.members[number].name, 120)}: {value:.4f} with it, {best:.4f} without.")
        if value >= best:
            chosen, best = [*chosen, number], value
    return shares(chosen)


# --- evaluation -------------------------------------------------------------------------------------------------------


def prepare(text: str) -> Pictures:
    """Prepare the data that --data names, with options of an evaluation, such as "my.csv --task retrieval".

    Raises:
        ArgumentError: if an option has a wrong value, or the data cannot be used.
        SystemExit: if an option does not exist, as argparse does.
    """
    parser = CommandParser(prog="vlp merge: --data", add_help=False)
    add_options(parser, EvaluationArguments)
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ArgumentError(f"--data {printable(text, 80)}: {error}.") from None
    arguments = EvaluationArguments(**vars(parser.parse_args(["--dataset", *words])))
    if arguments.output_dir or arguments.dtype != "float32":
        raise ArgumentError("--data takes neither --output_dir nor --dtype: nothing is written, in float32.")
    if arguments.task not in METRIC:
        raise ArgumentError(f"--data cannot be evaluated by --task {arguments.task}: use one of {', '.join(METRIC)}.")
    rows = load_table(arguments, arguments.split, "--data")
    return prepare_data(rows, arguments, PartialState(cpu=not torch.accelerator.is_available()))


def name_of(pictures: Pictures, number: int) -> str:
    """The name of an evaluation's metric in a curve: it, the data, the split and the column."""
    arguments = pictures.arguments
    parts = (METRIC[arguments.task], public_name(arguments.dataset), arguments.split, arguments.text_column)
    return f"{number}: " + ", ".join(part for part in parts if part)


def scores(model: PreTrainedModel, processor, evaluations: list[Pictures]) -> list[float]:
    """The metric of each evaluation (see METRIC)."""
    outcomes = evaluate_model(model, processor, evaluations, resamples=0)
    return [
        values_of(outcome)[METRIC[pictures.arguments.task]]
        for pictures, outcome in zip(evaluations, outcomes, strict=True)
    ]


def curve(merged: Merged, evaluations: list[Pictures], points: int) -> Iterator[dict]:
    """Evaluate averages of two models; yields {"weight": share of the second model, "values": [metric, ...]}."""
    for number in range(points):
        weight = number / (points - 1)
        yield {"weight": weight, "values": scores(merged.put([1 - weight, weight]), merged.processor, evaluations)}


# --- writing ----------------------------------------------------------------------------------------------------------


def save_model(merged: Merged, shares: list[float], folder: Path) -> None:
    """Save the average with its processor and a card that names the models and their shares."""
    merged.put(shares).save_pretrained(folder)
    merged.processor.save_pretrained(folder)
    used = [(member, share) for member, share in zip(merged.members, shares, strict=True) if share]
    licences = {member.licence for member, _ in used}
    data = ModelCardData(
        library_name="transformers", tags=["vlp", "merge"], base_model_relation="merge",
        base_model=[public_name(member.name) for member, _ in used],
        license=licences.pop() if len(licences) == 1 else None,
    )  # fmt: skip
    table = "".join(f"| {code(public_name(member.name))} | {share:.4g} |\n" for member, share in used)
    text = f"---\n{data}\n---\n\n# Merged model\n\nAn average of the weights of:\n\n| model | share |\n| --- | --- |\n"
    (folder / "README.md").write_text(text + table, encoding="utf-8")


def save_curve(entries: list[dict], names: list[str], folder: Path) -> None:
    """Save a curve as JSON and as a picture; `names` are those of the metrics, with their data."""
    (folder / "curve.json").write_text(json.dumps({"metrics": names, "points": entries}, indent=1) + "\n")
    values = {name: [entry["values"][number] for entry in entries] for number, name in enumerate(names)}
    plot_curve([entry["weight"] for entry in entries], values, "share of the second model", folder / "curve.png")


# --- command line -----------------------------------------------------------------------------------------------------


def merge(
    models: list[str],
    output_dir: str | Path,
    weights: str | None = None,
    greedy_soup: bool = False,
    curve_points: int | None = None,
    data: list[str] | None = None,
) -> Path:
    """Merge models, or draw the curve between two of them; see the module's docstring.

    Args:
        models: folders or hub names, at least two.
        output_dir: the folder to write.
        weights: see `shares_of`.
        greedy_soup: choose the models that make the soup better on `data`.
        curve_points: number of shares of the second model to evaluate on `data`, instead of writing a model.
        data: evaluations, see `prepare`.

    Returns:
        The folder that was written.

    Raises:
        MergeError: if the models cannot be merged.
        ArgumentError: if an option is wrong.
    """
    if len(models) < 2:
        raise ArgumentError("vlp merge needs at least two models.")
    if curve_points is not None and not 2 <= curve_points <= MOST_POINTS:
        raise ArgumentError(f"--curve must be from 2 to {MOST_POINTS} points, got {curve_points}.")
    if curve_points is not None and len(models) != 2:
        raise ArgumentError(f"--curve is drawn between two models, got {len(models)}.")
    if sum([weights is not None, greedy_soup, curve_points is not None]) > 1:
        raise ArgumentError("Choose one of --weights, --greedy and --curve.")
    if (greedy_soup or curve_points is not None) != bool(data):
        raise ArgumentError("--greedy and --curve need --data, and --data needs one of them.")
    shares = shares_of(weights, len(models))
    check_output(output_dir, "--output_dir", models)
    evaluations = [prepare(text) for text in data or []]
    merged = read_members(models)
    merged.model.to(PartialState(cpu=not torch.accelerator.is_available()).device)
    if curve_points is not None:
        names = [name_of(each, number) for number, each in enumerate(evaluations, 1)]
        entries = []
        for entry in curve(merged, evaluations, curve_points):
            entries.append(entry)
            print(f"{entry['weight']:.2f}: " + ", ".join(f"{value:.4f}" for value in entry["values"]), flush=True)
        return write_whole(output_dir, lambda fresh: save_curve(entries, names, fresh))
    if greedy_soup:
        shares = greedy(merged, evaluations)
    return write_whole(output_dir, lambda fresh: save_model(merged, shares, fresh))


def build_parser() -> argparse.ArgumentParser:
    """The parser of `vlp merge`."""
    parser = CommandParser(prog="vlp merge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders or hub names of at least two models")
    parser.add_argument("--output_dir", required=True, help="folder to write")
    parser.add_argument("--weights", help="share of the second model (0 to 1), or one number per model, as 1,1,2")
    parser.add_argument("--greedy", dest="greedy_soup", action="store_true", help="only models that help on --data")
    parser.add_argument(
        "--curve", dest="curve_points", type=int, metavar="POINTS", help="number of averages to evaluate"
    )
    parser.add_argument("--data", action="append", metavar="OPTIONS", help="data to evaluate on; can be repeated")
    return parser


def main() -> None:
    options = vars(build_parser().parse_args())
    with reported_errors():
        print(f"Wrote {printable(merge(**options))}")


if __name__ == "__main__":
    main()
