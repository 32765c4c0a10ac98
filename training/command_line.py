"""The command line of training: a recipe's options, then those given over them."""

import argparse
import dataclasses
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from ..errors import ArgumentError
from .arguments import TrainingArguments, add_options
from .data.capfilt import CapFiltArguments
from .data.shards import ShardsArguments
from .families import FAMILIES

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Task:
    """Something to train: its options, its recipe where none is named, and what it is in a few words."""

    arguments: type
    recipe: str
    text: str


TASKS = {family.name: Task(family.arguments, family.recipe, family.text) for family in FAMILIES.values()} | {
    "capfilt": Task(
        CapFiltArguments, "capfilt", "Caption web images and filter captions with fine-tuned BLIPs (CapFilt)"
    ),
    "shards": Task(ShardsArguments, "shards", "Write a data set as WebDataset shards with an index"),
}


def parse(arguments: list[str], task: str = "clip"):
    """Options from the recipe (`--config`, the task's where not given), then those of the command line over them.

    Raises ArgumentError where a value is wrong; exits, as argparse does, where an option is not known.
    """
    parser = build_parser(task)
    recipe = parser.parse_known_args(arguments)[0].config
    values = read_recipe(recipe, TASKS[task].arguments)
    parser.set_defaults(**values)
    parsed = vars(parser.parse_args(arguments))
    del parsed["config"]
    if parsed["output_dir"] is None:
        parsed["output_dir"] = f"runs/{Path(recipe).stem}"
    return TASKS[task].arguments(**parsed)


def read_recipe(name: str, kind: type[TrainingArguments]) -> dict:
    """The options in a recipe of the package (by name) or in a YAML file (by path)."""
    path = Path(name)
    if not path.suffix:
        path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise ArgumentError(f"--config {name}: no such file, and no such recipe; the recipes are {names}.")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ArgumentError(f"{path} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise ArgumentError(f"{path} must hold options, one `name: value` a line; got a {type(values).__name__}.")
    types = {item.name: item.type for item in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in types:
            task = next(name for name, task in TASKS.items() if task.arguments is kind)
            raise ArgumentError(
                f"{path}: {key!r} is no option of {task}; `accelerate launch training {task} --help` lists them."
            )
        expected = kinds_of(types[key])
        if float in expected and isinstance(value, (int, str)) and is_number(value):
            values[key] = float(value)  # YAML reads 5e-4, without a dot, as text
        elif type(value) not in expected and not (value is None and type(None) in expected):
            raise ArgumentError(f"{path}: {key} must be of type {types[key]}, got {value!r}.")
    return values


def kinds_of(annotation) -> tuple[type, ...]:
    """The types of an option's values."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return tuple({type(choice) for choice in arguments})
    return arguments or (annotation,)


def is_number(value: int | str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return not isinstance(value, bool)


def build_parser(task: str = "clip") -> argparse.ArgumentParser:
    recipe = TASKS[task].recipe
    parser = argparse.ArgumentParser(
        prog=f"accelerate launch training {task}",
        description=f"{TASKS[task].text}.",
    )
    families = ("blip2", "blip", "capfilt", "shards")  # CLIP's recipes have the names of its architectures
    family = next((name for name in families if name == task), None)
    stems = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    names = ", ".join(s for s in stems if next((n for n in families if s.startswith(n)), None) == family)
    parser.add_argument(
        "--config",
        default=recipe,
        metavar="FILE",
        help=f"YAML file of options, or a recipe: {names} (default: {recipe})",
    )
    add_options(parser, TASKS[task].arguments)
    return parser


def parse_command_line() -> TrainingArguments:
    """`sys.argv`, its first word (`clip` where it is left out) naming what to train; wrong options end the program."""
    words = sys.argv[1:]
    task = words.pop(0) if words and not words[0].startswith("-") else "clip"
    if task not in TASKS:
        sys.exit(f"There is nothing called {task!r} to train; expected one of {', '.join(TASKS)}.")
    try:
        return parse(words, task)
    except ArgumentError as error:
        sys.exit(f"error: {error}")
