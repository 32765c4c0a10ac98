"""Errors of users are reported on one short line, without a traceback and without control characters."""

from pathlib import Path

import pytest
from processes import run_without_reader

from vlp.errors import LONGEST, ArgumentError, CommandParser, brief, printable, reported_errors


@pytest.mark.parametrize(
    "text", ["a\x1b[31mred", "two\nlines", "a\u2028b", "bell\x07", "half \udc80 of a pair", "\u202eturned", "x" * 9999]
)
def test_messages_are_printable_and_short(text):
    for shown in (printable(text, 300), brief(text), brief(ValueError(text))):
        assert shown.isprintable() and len(shown) <= LONGEST


@pytest.mark.parametrize("error", [ArgumentError("no such option"), OSError(28, "No space left on device")])
def test_expected_errors_end_the_program_with_their_message(error):
    with pytest.raises(SystemExit, match=r"^error: (no such option|\[Errno 28\] No space left on device)$"):
        with reported_errors():
            raise error


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_ended_ends_the_program_quietly(unbuffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    place = Path(__file__).parents[2] / "vlp/errors.py"
    code = f"import runpy\nwith runpy.run_path({str(place)!r})['reported_errors'](): print('a line')"
    assert run_without_reader(code) == (141, "")


def test_unexpected_errors_name_their_place_and_how_to_see_more(monkeypatch):
    monkeypatch.delenv("VLP_DEBUG", raising=False)
    with pytest.raises(SystemExit, match=r"unexpected KeyError in test_errors\.py, line \d+: 'x' Set VLP_DEBUG=1"):
        with reported_errors():
            raise KeyError("x")


def test_debug_keeps_the_traceback(monkeypatch):
    monkeypatch.setenv("VLP_DEBUG", "1")
    with pytest.raises(ArgumentError, match="^x$"), reported_errors():
        raise ArgumentError("x")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--colour", "red"], "did you mean --color"),
        (["--co"], "did you mean --color"),
        (["--col", "red"], "unrecognized arguments"),  # no abbreviations
        (["--number", "9" * 5000], "argument --number: invalid int value"),
        (["--number", "\x1b[31m"], "argument --number: invalid int value"),
    ],
)
def test_parser_reports_one_short_line(words, message, capsys):
    parser = CommandParser(prog="vlp-command")
    parser.add_argument("--color")
    parser.add_argument("--number", type=int)
    with pytest.raises(SystemExit) as error:
        parser.parse_args(words)
    line = capsys.readouterr().err
    assert error.value.code == 2 and message in line
    assert line.count("\n") == 1 and line.strip().isprintable() and len(line) <= LONGEST
