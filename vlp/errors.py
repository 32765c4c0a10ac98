"""Errors that a user can fix, and how the commands report them: on one line, without a traceback."""

import argparse
import contextlib
import difflib
import os
import re
import sys
import traceback
import unicodedata
from collections.abc import Iterator
from pathlib import Path

LONGEST = 480  # characters of an error message


class UserError(Exception):
    """An error that the user can fix; the message gives the value, what was expected and how to fix it."""


class ArgumentError(UserError, ValueError):
    """An invalid option."""


class ResumeError(UserError, ValueError):
    """A state that a run cannot be resumed from."""


class BadDataError(UserError, RuntimeError):
    """The data has more bad rows than the run allows."""


class UnsupportedModelError(ArgumentError):
    """An option names a model that cannot be loaded or does not support the task."""


def printable(text: object, longest: int | None = None) -> str:
    """Text for a terminal or a page: what could act as a command of either is shown as its code.

    Args:
        text: the text, such as a caption or a file name.
        longest: maximum number of characters; None for no limit. The middle of a longer text is left out.

    Returns:
        The text on one line, with line breaks, escape sequences, and marks of direction as codes such as `\\x1b`.
    """
    text = "".join(c if shown_as_it_is(c) else ascii(c)[1:-1] for c in str(text))
    if longest is not None and len(text) > longest:
        half = (longest - 5) // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return text


def shown_as_it_is(character: str) -> bool:
    """Whether a character is safe to print: no control, format, surrogate or line separator character."""
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp") or character == "\u200d"


def is_valid(text: str) -> bool:
    """Whether a text has neither a NUL nor a lone half of a surrogate pair, which no file and no tokenizer takes."""
    return not any(character == "\0" or "\ud800" <= character <= "\udfff" for character in text)


def brief(error: BaseException | str, most: int = LONGEST) -> str:
    """The message of an error on one line of at most `most` characters."""
    lines = (line.strip() for line in str(error).replace("\r", "\n").split("\n"))
    return printable(" ".join(line for line in lines if line) or type(error).__name__, most)


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are brief, and suggest the option that was meant. Options cannot be abbreviated."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        """End the program with the message on one line."""
        if match := re.search(r"unrecognized arguments: (--[\w-]+)", message):
            known = [name for action in self._actions for name in action.option_strings]
            longer = [name for name in known if name.startswith(match[1])]
            if near := difflib.get_close_matches(match[1], known, 1) or longer:
                message += f"; did you mean {near[0]}?"
        shown = brief(message, LONGEST - len(self.prog) - 24)
        self.exit(2, f"{self.prog}: error: {shown}{'' if shown.endswith(('.', '?')) else '.'} See --help.\n")


@contextlib.contextmanager
def quiet_pipe() -> Iterator[None]:
    """End the program without a message when the reader of its output, such as `head`, has ended.

    Raises:
        SystemExit: 141, as the shell reports a program that SIGPIPE ended.
    """
    try:
        try:
            yield
        finally:
            print(end="", flush=True)  # otherwise Python would write what is left, and fail, at its own end
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


@contextlib.contextmanager
def reported_errors(*expected: type[BaseException]) -> Iterator[None]:
    """End the program with a message on one line instead of a traceback; every command runs in this context.

    VLP_DEBUG=1 shows the traceback too.

    Args:
        expected: further errors whose message is complete, besides UserError, OSError and FloatingPointError.

    Raises:
        SystemExit: with the message.
    """
    try:
        with quiet_pipe():
            yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if os.environ.get("VLP_DEBUG"):
            raise
        if isinstance(error, (UserError, OSError, FloatingPointError, *expected)):
            sys.exit(f"error: {brief(error)}")
        place = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in place if not {"site-packages", "<frozen"} & set(Path(frame.filename).parts)
               and Path(frame.filename).name != "errors.py"] or place  # fmt: skip
        where = f"{Path(own[-1].filename).name}, line {own[-1].lineno}"
        text = brief(f"{type(error).__name__} in {where}: {printable(error, LONGEST // 2)}")
        sys.exit(f"error: unexpected {text} Set VLP_DEBUG=1 to see the traceback, and report it.")
