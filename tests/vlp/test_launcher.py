"""`vlp_launcher`: the same help and errors as the commands' own parsers, without importing vlp."""

import ast
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import vlp_launcher
from processes import run_without_reader
from vlp.training.command_line import TASKS, build_parser

from vlp.commands import tables
from vlp.commands.main import COMMANDS
from vlp.errors import CommandParser

HEAVY = ("torch", "transformers", "numpy", "vlp")
NAMES = [name for name in COMMANDS if name != "train"]


def run(*words: str, folder: Path | None = None) -> tuple[int, str, list[str]]:
    """Run `vlp` in a process of its own; its exit code, what it prints, and which heavy modules it imported."""
    code = f"""
import sys, vlp_launcher
try:
    vlp_launcher.main({list(words)!r})
finally:
    print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, timeout=60)
    lines = found.stderr.strip().splitlines()
    heavy = next(line for line in lines if line.startswith("["))
    told = "\n".join(line for line in lines if line != heavy)
    return found.returncode, found.stdout + told, ast.literal_eval(heavy)


def test_the_tables_are_those_of_the_parsers():
    assert tables.TABLES.read_text(encoding="utf-8") == tables.text(), "run `make readme`"


@pytest.mark.parametrize("name", [*NAMES, *(f"train {task}" for task in TASKS)])
def test_help_is_that_of_the_command(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    command, _, task = name.partition(" ")
    table = vlp_launcher.tables()["commands"][command]
    own = build_parser(task) if task else build_parser("check") if command == "check" else tables.parser_of(command)
    light = vlp_launcher.build(table[task] if task else table, CommandParser)
    assert light.format_help() == own.format_help()
    for action in light._actions:
        for each in action.choices if isinstance(action.choices, dict) else ():
            theirs = next(a for a in own._actions if isinstance(a.choices, dict)).choices[each]
            assert action.choices[each].format_help() == theirs.format_help()


@pytest.mark.parametrize(
    "line",
    [
        "train clip --loss sigmoid --no-cache_images --learning_rate 1e-3 --model '{\"a\": 1}'",
        "train blip --task vqa --max_train_steps none",
        "index build pictures out --model m --batch_size 3",
        "index search out a red apple --top_k 4",
        "convert a b --to open_clip --image_size 64",
        "merge a b --weights 0.5 --output_dir out",
        "evaluate m --dataset emoji --task zero-shot",
        "onnx a b",
    ],
)
def test_what_a_command_accepts_is_accepted(line):
    command, task, rest = vlp_launcher.split(shlex.split(line))
    table = vlp_launcher.tables()["commands"][command]
    light = vlp_launcher.build(table[task] if task else table, CommandParser).parse_args(rest)
    own = (build_parser(task) if task else tables.parser_of(command)).parse_args(rest)
    for name, value in vars(own).items():
        if isinstance(value, (str, int, float, bool, list)):  # other types are converted by the command alone
            assert type(value)(vars(light)[name]) == value, name


def test_help_and_errors_import_nothing_heavy(tmp_path):
    for words, code, message in (
        ([], 0, "usage: vlp COMMAND"),
        (["--help"], 0, "usage: vlp COMMAND"),
        (["train", "clip", "--help"], 0, "--per_device_train_batch_size"),
        (["train", "--help"], 0, "--loss"),
        (["index", "search", "--help"], 0, "--top_k"),
        (["trian"], 1, "Did you mean train?"),
        (["train", "blib"], 1, "Did you mean blip?"),
        (["train", "clip", "--learning_rat", "1"], 2, "did you mean --learning_rate?"),
        (["train", "clip", "--loss", "hinge"], 2, "invalid choice: 'hinge'"),
        (["train", "clip", "--config", "clip-emojy"], 1, "Did you mean clip-emoji?"),
        (["train", "clip", "--config", "none.yaml"], 1, "--config none.yaml: there is no such file"),
        (["train", "clip", "--dataset_name", "pairs.csv"], 1, "--dataset_name pairs.csv: there is no such file"),
        (["check", "pairs.csv"], 1, "--dataset_name pairs.csv: there is no such file"),
        (["evaluate", "./nowhere"], 1, "MODEL ./nowhere: there is no such file or folder"),
        (["convert", "ViT-B-32.pt", "out"], 1, "SOURCE ViT-B-32.pt: there is no such file"),
        (["index", "search", "./nowhere", "dog"], 1, "INDEX ./nowhere: there is no such file"),
        (["completion", "bash"], 0, "complete -o default -F _vlp vlp"),
        (["completion", "csh"], 1, "usage: vlp completion bash|zsh|fish"),
    ):
        found, output, heavy = run(*words, folder=tmp_path)
        assert (found, heavy) == (code, []), (words, output)
        assert message in output, (words, output)


@pytest.mark.parametrize(
    "name", ["OWNER/NAME", "emoji", "shards/{00000..00009}.tar", "*.csv", "hf://a/b.csv", "scenes"]
)
def test_what_may_be_elsewhere_is_left_to_the_command(name):
    vlp_launcher.require_place(name, "--dataset_name")


def test_completion():
    complete = vlp_launcher.complete
    assert complete(["tr"]) == ["train"] and "completion" in complete([""])
    assert complete(["train", "bl"]) == ["blip", "blip2"]
    assert complete(["train", "clip", "--los"]) == ["--loss"]
    assert complete(["train", "clip", "--loss", ""]) == ["sigmoid", "softmax"]
    assert complete(["train", "clip", "--output_dir", ""]) == []  # left to the shell: names of files
    assert complete(["index", "b"]) == ["build"] and complete(["index", "build", "--mod"]) == ["--model"]
    assert complete(["nothing", ""]) == [] and complete(["completion", "z"]) == ["zsh"]


def test_a_command_that_is_right_does_its_work(tmp_path):
    code, output, heavy = run("convert", str(Path(__file__)), str(tmp_path / "out"))
    assert code and "torch" in heavy and str(Path(__file__).name) in output


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["--help"], ["completion", "zsh"], ["--complete", "train", ""]], ids=" ".join)
def test_a_reader_that_has_ended_ends_the_command_quietly(words, unbuffered, monkeypatch):
    """As in `vlp completion zsh | head -1`."""
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    assert run_without_reader(f"import vlp_launcher; vlp_launcher.main({words!r})") == (141, "")


@pytest.mark.skipif(not Path("/bin/bash").exists(), reason="needs bash")
def test_bash_completes(tmp_path):
    script = f"""
vlp() {{ {sys.executable} -c 'import vlp_launcher; vlp_launcher.main()' "$@"; }}
eval "$(vlp completion bash)"
COMP_WORDS=(vlp train clip --los) COMP_CWORD=3
_vlp
echo "${{COMPREPLY[@]}}"
"""
    found = subprocess.run(["/bin/bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert found.stdout.strip() == "--loss", found.stderr
