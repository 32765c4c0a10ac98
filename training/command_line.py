"""The command line of training: options from a recipe, overridden by those on the command line."""

import argparse
import dataclasses
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from ..errors import ArgumentError, CommandParser, brief, printable
from ..files import usable_path
from .arguments import EMOJI, TrainingArguments, add_options
from .data.capfilt import CapFiltArguments
from .data.scenes import is_scenes
from .data.shard_writer import ShardsArguments
from .data.survey import CheckArguments
from .families import FAMILIES

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Task:
    """A command of the training program.

    Attributes:
        arguments: dataclass of its options.
        recipe: name of its default recipe.
        text: short description for --help.
        recipe_with_towers: name of the default recipe if an option of TOWERS is given; None: the same one.
        fine_tuning: (the parsed options) -> name of the default recipe with --model_name_or_path; None: the same one.
    """

    arguments: type
    recipe: str
    text: str
    recipe_with_towers: str | None = None
    fine_tuning: Callable[[argparse.Namespace], str] | None = None

    def default_recipe(self, given: argparse.Namespace) -> str:
        """The recipe of a command line without --config: a recipe for new models would spoil a trained one."""
        if self.fine_tuning and given.model_name_or_path:
            return self.fine_tuning(given)
        return (self.recipe_with_towers if any(getattr(given, name, None) for name in TOWERS) else None) or self.recipe


# What recipes for the included data say of its columns and splits, which other data do not have.
OF_THE_DATA = ("dataset_config_name", "train_split", "eval_split", "class_column", "caption_column", "answer_column",
               "tag_column", "tag_share", "templates", "template_share")  # fmt: skip
LENGTHS = ("max_train_steps", "max_train_minutes", "num_train_epochs")
TOWERS = ("image_tower", "text_tower", "vision_tower")
TASKS = {
    each.name: Task(each.arguments, each.recipe, each.text, each.recipe_with_towers, each.fine_tuning)
    for each in FAMILIES.values()
} | {  # fmt: skip
    "capfilt": Task(
        CapFiltArguments, "capfilt", "Caption web images and filter captions with fine-tuned BLIPs (CapFilt)"
    ),
    "check": Task(CheckArguments, "check", "Check a data set before training, and write a report with pictures"),
    "shards": Task(ShardsArguments, "shards", "Write a data set as WebDataset shards with an index"),
}


def parse(arguments: list[str], task: str = "clip"):
    """Parse a command line: its options override those of the recipe (`--config`).

    If it chooses the length of the run, in steps, minutes or epochs, that of the recipe does not count, and the warm-up
    of a recipe of the package takes at most a tenth of the steps.

    Args:
        arguments: words of the command line after the command.
        task: a key of `TASKS`.

    Returns:
        An instance of the command's options.

    Raises:
        ArgumentError: if a value is wrong.
        SystemExit: if an option is unknown, as argparse does.
    """
    parser = build_parser(task)
    default = parser.get_default("dataset_name")
    parser.set_defaults(dataset_name=None)
    given = parser.parse_known_args(arguments)[0]
    parser.set_defaults(dataset_name=default)
    recipe = given.config or TASKS[task].default_recipe(given)
    values = read_recipe(recipe, TASKS[task].arguments)
    own, chosen = values.get("dataset_name", EMOJI), given.dataset_name
    if chosen is not None and (own == EMOJI or is_scenes(own)) and chosen.partition(":")[0] != own.partition(":")[0]:
        values = {name: value for name, value in values.items() if name not in OF_THE_DATA}
    lengths = lengths_in(arguments)
    values = {name: value for name, value in values.items() if not lengths or name not in LENGTHS or name in lengths}
    if "max_train_steps" in lengths and values.get("warmup_steps") and not Path(recipe).suffix:  # not a user's own file
        values["warmup_steps"] = min(values["warmup_steps"], max(1, given.max_train_steps // 10))
    parser.set_defaults(**values)
    parsed = vars(parser.parse_args(arguments))
    del parsed["config"]
    if parsed["output_dir"] is None:
        parsed["output_dir"] = f"runs/{Path(recipe).stem}"
    return TASKS[task].arguments(**parsed)


def lengths_in(arguments: list[str]) -> set[str]:
    """The options in a command line that choose the length of the run, which those of the recipe then do not."""
    pairs = [word.removeprefix("--").partition("=") for word in arguments if word.startswith("--")]
    after = dict(zip(arguments, [*arguments[1:], ""], strict=False))
    chosen = {name: value or after.get(f"--{name}", "") for name, _, value in pairs if name in LENGTHS}
    return {name for name, value in chosen.items() if value != "none"}


def read_recipe(name: str, kind: type[TrainingArguments]) -> dict:
    """Read the options in a recipe of the package or in a YAML file.

    Args:
        name: name of a recipe, or path of a YAML file.
        kind: dataclass that the options belong to.

    Returns:
        Values by the names of the options.

    Raises:
        ArgumentError: if there is no such file, or if it does not hold valid options.
    """
    path = Path(name)
    if not path.suffix:
        path = RECIPES / f"{name}.yaml"
    if not usable_path(path, "--config").is_file():
        names = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise ArgumentError(
            f"--config {printable(name, 120)}: there is no such file or recipe; the recipes are {names}."
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OSError) as error:
        raise ArgumentError(f"{printable(path, 120)} is not valid YAML: {brief(error)[:200]}") from error
    if not isinstance(values, dict):
        raise ArgumentError(f"{path} must hold options, one `name: value` per line; got a {type(values).__name__}.")
    types = {item.name: item.type for item in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in types:
            task = next(name for name, task in TASKS.items() if task.arguments is kind)
            raise ArgumentError(
                f"{path}: {printable(repr(key), 60)} is not an option of {task}; `accelerate launch training {task} "
                "--help` lists them."
            )
        expected = kinds_of(types[key])
        if float in expected and isinstance(value, (int, str)) and is_number(value):
            values[key] = float(value)  # YAML parses 5e-4, which has no dot, as text
        elif type(value) not in expected and not (value is None and type(None) in expected):
            kind = getattr(types[key], "__name__", types[key])
            raise ArgumentError(f"{path}: {key} must be of type {kind}, got {printable(repr(value), 60)}.")
    return values


def kinds_of(annotation) -> tuple[type, ...]:
    """Return the types that an option's value may have."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return tuple({type(choice) for choice in arguments})
    return arguments or (annotation,)


def is_number(value: int | str) -> bool:
    try:
        float(value)
    except (ValueError, OverflowError):
        return False
    return not isinstance(value, bool)


def build_parser(task: str = "clip") -> argparse.ArgumentParser:
    """The parser of a task: `--config` and the options of its dataclass."""
    recipe = TASKS[task].recipe
    parser = CommandParser(
        prog=f"accelerate launch training {task}",
        description=f"{TASKS[task].text}.",
    )
    families = ("blip2", "blip", "capfilt", "shards", "check")  # CLIP recipes are named after its architectures
    family = next((name for name in families if name == task), None)
    stems = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    towers = f"; with pre-trained towers, {TASKS[task].recipe_with_towers}" if TASKS[task].recipe_with_towers else ""
    others = towers + ("; with --model_name_or_path, one for fine-tuning" if TASKS[task].fine_tuning else "")
    names = ", ".join(s for s in stems if next((n for n in families if s.startswith(n)), None) == family)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help=f"YAML file with options, or name of a recipe: {names} (default: {recipe}{others})",
    )
    add_options(parser, TASKS[task].arguments)
    values = read_recipe(recipe, TASKS[task].arguments)
    for action in parser._actions:
        if action.dest in values and not isinstance(values[action.dest], dict):
            value = "none" if values[action.dest] is None else str(values[action.dest]).replace("%", "%%")
            action.help = f"{action.help.removesuffix(')')}; with the recipe {recipe}: {value})"
    return parser


def parse_command_line() -> TrainingArguments:
    """Parse `sys.argv`, whose first word is a key of `TASKS` ("clip" if omitted); exit if an option is wrong."""
    words = sys.argv[1:]
    task = words.pop(0) if words and not words[0].startswith("-") else "clip"
    if task not in TASKS:
        sys.exit(f"Unknown training command {task!r}; expected one of {', '.join(TASKS)}.")
    return parse(words, task)
