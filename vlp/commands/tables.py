"""`python -m vlp.commands.tables`: write what the commands accept, for `vlp_launcher`, which does not import them."""

import argparse
import importlib
import json
import sys
from pathlib import Path

from vlp_launcher import TABLES

from ..errors import CommandParser
from ..training.command_line import RECIPES, TASKS, build_parser
from .main import COMMANDS, USAGE

# Options and arguments that name something to read, here or on the hub.
INPUTS = ("config", "dataset_name", "model_name_or_path", "image_tower", "text_tower", "vision_tower", "source",
          "folder", "model", "dataset", "pictures", "image", "models", "teacher_name_or_path")  # fmt: skip
KEPT = ("nargs", "const", "default", "choices", "required", "help", "metavar")


class Found(BaseException):
    """Carries the parser of a command out of it, past its handling of errors."""


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of a command, taken where the command would parse its options."""
    module, before, _ = COMMANDS[command]

    def give(self, *args, **kwargs):
        raise Found(self)

    original, words = CommandParser.parse_known_args, sys.argv
    CommandParser.parse_known_args, sys.argv = give, [command, *before]
    try:
        importlib.import_module(module).main()
    except Found as found:
        return found.args[0]
    finally:
        CommandParser.parse_known_args, sys.argv = original, words
    raise AssertionError(f"{command} parses no options")


def table_of(parser: argparse.ArgumentParser) -> dict:
    """What a parser accepts, as JSON."""
    return {
        "prog": parser.prog,
        "description": parser.description,
        "raw": parser.formatter_class is argparse.RawDescriptionHelpFormatter,
        "actions": [action_of(action) for action in parser._actions if not isinstance(action, argparse._HelpAction)],
    }


def action_of(action: argparse.Action) -> dict:
    """What an option or an argument accepts, as the settings of `add_argument`, with its "flags" and its "action"."""
    if isinstance(action, argparse._SubParsersAction):
        texts = {choice.dest: choice.help for choice in action._choices_actions}
        commands = {name: (texts[name], table_of(parser)) for name, parser in action.choices.items()}
        return {"flags": [], "action": "commands", "dest": action.dest, "required": action.required,
                "commands": commands}  # fmt: skip
    flags = action.option_strings or [action.dest]
    settings = {name: getattr(action, name) for name in KEPT if getattr(action, name) is not None}
    if isinstance(settings.get("default"), Path):  # a place on this machine
        del settings["default"]
    if isinstance(action, argparse.BooleanOptionalAction):
        kind, flags = "boolean", flags[:1]
        settings = {name: settings[name] for name in ("default", "help") if name in settings}
    elif isinstance(action, (argparse._StoreTrueAction, argparse._StoreFalseAction)):
        kind = "store_true" if action.const else "store_false"
        settings = {name: settings[name] for name in ("help",) if name in settings}
    elif type(action) in (argparse._StoreAction, argparse._AppendAction):
        kind = "append" if isinstance(action, argparse._AppendAction) else "store"
        if action.type in (int, float):
            settings["type"] = action.type.__name__
    else:
        raise TypeError(f"{flags}: {type(action).__name__} has no entry in the table")
    if not settings.get("required") or not action.option_strings:
        settings.pop("required", None)
    if action.option_strings and action.dest != flags[0].lstrip("-"):
        settings["dest"] = action.dest
    return {"flags": flags, "action": kind} | settings


def content() -> dict:
    """The content of commands.json."""
    commands = {}
    for name in COMMANDS:
        if name == "train":
            commands[name] = {task: table_of(build_parser(task)) for task in TASKS}
        elif name == "check":
            commands[name] = table_of(build_parser("check"))
        else:
            commands[name] = table_of(parser_of(name))
    recipes = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    return {"usage": USAGE, "inputs": INPUTS, "recipes": recipes, "commands": commands}


def text() -> str:
    return json.dumps(content(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    TABLES.write_text(text(), encoding="utf-8")
