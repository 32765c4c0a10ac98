"""The command `vlp`: --help, wrong options and missing files are answered at once, without torch and transformers.

vlp itself is imported only when a command does its work. What the commands accept is stored in commands.json, which
`python -m vlp.commands.tables` writes from their own parsers; a test compares them.

This package is installed as `vlp_launcher`, because importing a part of `vlp` imports `vlp`.
"""

import argparse
import difflib
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import types
from pathlib import Path

TABLES = Path(__file__).with_name("commands.json")
OWN = ("flags", "action", "type", "commands")  # keys of an action that are no settings of `add_argument`
TYPES = {"int": int, "float": float}
# The ends of names that mean a file or a folder of this machine, not a repository of the hub.
OF_FILES = (".bin", ".csv", ".json", ".jsonl", ".parquet", ".png", ".jpg", ".pt", ".pth", ".safetensors", ".tar",
            ".tsv", ".webp", ".yaml", ".yml", ".zip", ".gz")  # fmt: skip
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
COMPLETION = {
    "bash": """_vlp() {
    local IFS=$'\\n'
    COMPREPLY=($(vlp --complete "${COMP_WORDS[@]:1:COMP_CWORD}"))
}
complete -o default -F _vlp vlp""",
    "zsh": """autoload -Uz bashcompinit && bashcompinit
_vlp() {
    local IFS=$'\\n'
    COMPREPLY=($(vlp --complete "${COMP_WORDS[@]:1:COMP_CWORD}"))
}
complete -o default -F _vlp vlp""",
    "fish": "complete -c vlp -a '(vlp --complete (commandline -opc)[2..-1] (commandline -ct))'",
}


def tables() -> dict:
    return json.loads(TABLES.read_text(encoding="utf-8"))


@functools.cache
def errors() -> types.ModuleType:
    """`vlp.errors`, from its file: importing it by name would import vlp."""
    place = importlib.util.find_spec("vlp").origin
    if place is None:
        sys.exit(
            f"Python takes the folder {os.path.abspath('vlp')} for the package vlp, because it is in the current "
            "folder: go into that folder, or rename it."
        )
    place = Path(place).with_name("errors.py")
    spec = importlib.util.spec_from_file_location("vlp_launcher.errors", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parser_class() -> type[argparse.ArgumentParser]:
    """`vlp.errors.CommandParser`."""
    return errors().CommandParser


def build(table: dict, kind: type[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Build a parser from its table (see `vlp.commands.tables`)."""
    formatter = argparse.RawDescriptionHelpFormatter if table["raw"] else argparse.HelpFormatter
    parser = kind(prog=table["prog"], description=table["description"], formatter_class=formatter)
    for action in table["actions"]:
        settings = {name: value for name, value in action.items() if name not in OWN}
        if action["action"] == "commands":
            commands = parser.add_subparsers(**settings)
            for name, (text, each) in action["commands"].items():
                own = build(each, kind)
                added = commands.add_parser(name, help=text, description=own.description)
                for part in own._actions[1:]:
                    added._add_action(part)
            continue
        if action["action"] == "boolean":
            settings["action"] = argparse.BooleanOptionalAction
        elif action["action"] != "store":
            settings["action"] = action["action"]
        elif "type" in action:
            settings["type"] = TYPES[action["type"]]
        parser.add_argument(*action["flags"], **settings)
    return parser


def split(words: list[str]) -> tuple[str | None, str | None, list[str]]:
    """Find the command, the task of `train`, and the rest of a command line."""
    command, rest = (words[0], words[1:]) if words else (None, [])
    if command != "train":
        return command, None, rest
    if rest and not rest[0].startswith("-"):
        return command, rest[0], rest[1:]
    return command, "clip", rest


def nearest(word: str, known: list[str]) -> str:
    """A hint for a wrong word; empty if no known one is close."""
    near = difflib.get_close_matches(word, known, 1) or [each for each in known if word and each.startswith(word)]
    return f" Did you mean {near[0]}?" if near else ""


def check(words: list[str], as_vlp: bool = False) -> list[str]:
    """Answer a command line that needs no work: --help, a wrong option or a missing file; otherwise return it.

    Args:
        words: the words after `vlp`.
        as_vlp: call the command `vlp COMMAND` in messages, not as the table does, such as `accelerate launch ...`.

    Returns:
        The same words, with `check DATA` written as `check --dataset_name DATA`.

    Raises:
        SystemExit: if it was answered.
    """
    if importlib.util.find_spec("vlp") is None:  # the import says so
        return words
    if words[:1] == ["check"] and words[1:] and not words[1].startswith("-"):
        words = ["check", "--dataset_name", *words[1:]]
    known = tables()
    command, task, rest = split(words)
    if command == "--version":
        print(f"vlp {importlib.metadata.version('vlp')}")
        raise SystemExit(0)
    if command in (None, "-h", "--help"):
        print(f"{known['usage']}\n\n`vlp COMMAND --help` lists the options of a command.")
        raise SystemExit(0)
    if command not in known["commands"]:
        names = list(known["commands"])
        sys.exit(f"vlp: there is no command {command!r}; expected one of {', '.join(names)}.{nearest(command, names)}")
    table = known["commands"][command]
    if command == "train":
        if task not in table:
            sys.exit(
                f"vlp train: there is no {task!r}; expected one of {', '.join(table)}.{nearest(task, list(table))}"
            )
        table = table[task]
    parser = build(table, parser_class())
    if as_vlp:
        parser.prog = " ".join(["vlp", command, *([task] if task else [])])
    given = vars(parser.parse_args(rest))
    inputs = [*known["inputs"], *(["index"] if given.get("command") == "search" else [])]
    for name, value in given.items():
        if name not in inputs:
            continue
        for each in value if isinstance(value, list) else [value]:
            if name == "config" and each and not Path(each).suffix and "/" not in each:
                require_recipe(each, known["recipes"])
            elif isinstance(each, str):
                require_place(each, name.upper() if name in arguments_of(parser) else f"--{name}")
    return words


def arguments_of(parser: argparse.ArgumentParser) -> set[str]:
    """The names of what stands without an option."""
    found = {action.dest for action in parser._actions if not action.option_strings}
    for action in parser._actions:
        for each in action.choices.values() if isinstance(action, argparse._SubParsersAction) else ():
            found |= arguments_of(each)
    return found


def require_recipe(name: str, known: list[str]) -> None:
    """End the program if there is no recipe of this name."""
    if name not in known:
        sys.exit(f"error: --config {ascii(name)[1:-1][:120]}: there is no such file or recipe; the recipes are "
                 f"{', '.join(known)}.{nearest(name, known)}")  # fmt: skip


def require_place(value: str, option: str) -> None:
    """End the program if a value can only be a file or a folder, and there is none; names of the hub are left alone."""
    path = os.path.expanduser(value)
    of_this_machine = path.startswith((os.sep, "." + os.sep, ".." + os.sep)) or path.count("/") > 1
    of_this_machine = of_this_machine or path.endswith(OF_FILES) or not HUB_NAME.fullmatch(path)
    if any(mark in path for mark in "*?[{:|") or not path or "\0" in path:  # patterns, addresses, prefixes
        return
    if of_this_machine and not os.path.exists(path):
        sys.exit(f"error: {option} {ascii(value)[1:-1][:160]}: there is no such file or folder.")


def complete(words: list[str]) -> list[str]:
    """The words that can stand in place of the last one, which may be empty."""
    known, before, last = tables(), words[:-1], words[-1] if words else ""
    command, task, _ = split(before)
    if command is None:
        found = [*known["commands"], "completion", "--help"]
    elif command not in known["commands"]:
        found = list(COMPLETION) if command == "completion" else []
    else:
        table = known["commands"][command]
        if command == "train":
            if len(before) == 1 and not last.startswith("-"):
                return [name for name in table if name.startswith(last)]
            table = table.get(task, {"actions": []})
        actions = table["actions"]
        subcommands = next((action["commands"] for action in actions if action["action"] == "commands"), None)
        if subcommands is not None:
            chosen = next((word for word in before if word in subcommands), None)
            if chosen is None:
                return [name for name in subcommands if name.startswith(last)]
            actions = subcommands[chosen][1]["actions"]
        flags = {flag: action for action in actions for flag in action["flags"] if flag.startswith("-")}
        if before[-1] in flags and flags[before[-1]]["action"] == "store":
            found = [str(choice) for choice in flags[before[-1]].get("choices") or []]
        else:
            found = [*flags, "--help"] if last.startswith("-") else []
    return sorted(name for name in found if name.startswith(last))


def main(words: list[str] | None = None) -> None:
    """The command `vlp`."""
    words = sys.argv[1:] if words is None else words
    with errors().quiet_pipe():
        if words[:1] == ["--complete"]:
            print("\n".join(complete(words[1:])))
            return
        if words[:1] == ["completion"]:
            if len(words) != 2 or words[1] not in COMPLETION:
                sys.exit(f"usage: vlp completion {'|'.join(COMPLETION)}")
            print(COMPLETION[words[1]])
            return
        words = check(words, as_vlp=True)
    if sys.stderr.isatty():
        print("Loading torch and transformers (a few seconds).", file=sys.stderr, flush=True)
    from vlp.commands.main import main as work

    work(words)


def convert() -> None:
    main(["convert", *sys.argv[1:]])


def onnx() -> None:
    main(["onnx", *sys.argv[1:]])


def index() -> None:
    main(["index", *sys.argv[1:]])


def demo() -> None:
    main(["demo", *sys.argv[1:]])
