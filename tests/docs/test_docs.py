"""The snippets, commands and links in docs/ work, and the API reference contains the docstrings."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import vlp_launcher
from accelerate.state import AcceleratorState
from conftest import BLIP_TEXT, VIT, tiny_pair
from processes import Program, run_module
from test_data import picture
from vlp.processing.blip import token_ids, train_tokenizer
from vlp.training import evaluate
from vlp.training.command_line import TASKS, parse
from vlp.training.run import train

import vlp
from vlp.files import list_files

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
COLOURS = ["red", "green", "blue", "yellow", "black", "white", "navy", "orange", "purple", "brown"]


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)


def parse_vlp(words: list[str]) -> dict:
    """The options of a command `vlp ...`, as the launcher parses them."""
    command, task, rest = vlp_launcher.split(words)
    table = vlp_launcher.tables()["commands"][command]
    rest = ["--dataset_name", *rest] if command == "check" else rest
    table = table if task is None else table[task]
    return vars(vlp_launcher.build(table, vlp_launcher.parser_class()).parse_args(rest))


def parse_command(words: list[str]) -> bool:
    """Parse a command that trains or evaluates, or one of `vlp`; False for another program."""
    if "--help" in words:
        return True
    if "vlp.training.evaluate" in words:
        options = vars(evaluate.build_parser().parse_args(words[words.index("vlp.training.evaluate") + 1 :]))
        options.pop("model")
        evaluate.EvaluationArguments(**options)
    elif words[:2] == ["accelerate", "launch"] or words[0] == "torchrun":
        task = next(word for word in words if word in TASKS)
        parse(words[words.index(task) + 1 :], task)
        assert all((DOCS.parent / word).is_file() for word in words if word.endswith(".yaml"))
    elif words[0] == "vlp":
        parse_vlp(words[1:])
    else:
        return False
    return True


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with pictures, pairs and small models, named as in the pages."""
    AcceleratorState._reset_state(reset_partial_state=True)  # another test may have run with another precision
    (tmp_path / "pictures").mkdir()
    for colour in COLOURS:
        (tmp_path / f"pictures/{colour}-square.png").write_bytes(picture(colour, (40, 40)))
    rows = [f"pictures/{colour}-square.png,{colour} square" for colour in COLOURS]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,caption", *rows]))
    clip, processor = tiny_pair()
    for name in ("runs/clip", "runs/mine", "model_cards/clip-emoji"):
        clip.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    tokenizer = train_tokenizer([f"{colour} square" for colour in COLOURS], 100, 20)
    config = vlp.VlpBlipConfig(vision_config=dict(VIT), text_config=BLIP_TEXT | token_ids(tokenizer))
    images = vlp.VlpBlipImageProcessor(size={"height": 32, "width": 32})
    for name in ("model_cards/blip-emoji", "runs/my-captioner"):
        vlp.VlpBlipForConditionalGeneration(config).save_pretrained(tmp_path / name)
        vlp.VlpBlipProcessor(images, tokenizer).save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


PRINTED = {  # text that the snippets of each page print
    "own-data.md": "",
    "fine-tuning.md": "['",
    "converting.md": "parameters",
    "evaluation.md": "recall_at_1_interval",
    "extending.md": "MeanClipModel",
}


@pytest.mark.parametrize("name", PRINTED)
def test_snippets_run_in_order(name, place, capsys):
    snippets, names = blocks(name, "python"), {}
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, name, "exec"), names)
    assert PRINTED[name] in capsys.readouterr().out
    if name == "extending.md":
        assert "gap" in (place / "runs/gap/results.json").read_text()
        assert "embeds the mean of its patches" in (place / "runs/mean/README.md").read_text()
    if name == "evaluation.md":
        assert list(place.glob("*.png"))
    if name == "own-data.md":  # also run the training command
        words = shlex.split(next(block for block in blocks(name, "bash") if "training clip" in block))
        less = ["--max_train_minutes", "none", "--max_train_steps", "2", "--per_device_train_batch_size", "4",
                "--report_to", "none", "--vocab_size", "600", "--num_threads", "2"]  # fmt: skip
        list_files(place / "runs/mine")  # as if vlp had written the model that the snippets use
        train(parse(words[words.index("clip") + 1 :] + less))
        assert "Image to text, R@1" in (place / "runs/mine/README.md").read_text()


@pytest.mark.parametrize("name", PAGES)
def test_commands_parse(name):
    """Every command of a page parses, and the files it names exist."""
    for line in "\n".join(blocks(name, "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and not parse_command(words):
            assert words[0] in ("make", "pip", "python", "hf", "clip_benchmark"), line


@pytest.mark.parametrize(
    ("target", "commands"),
    {"train": 1, "train-blip": 1, "train-blip2": 2, "train-towers": 1, "train-blip-towers": 1, "train-vqa": 1,
     "train-nlvr": 1, "cards": 17}.items(),
)  # fmt: skip
def test_commands_of_the_makefile_parse(target, commands):
    """An error in an option would otherwise show after hours."""
    command = ["make", "--dry-run", "--no-print-directory", target]
    printed = subprocess.run(command, cwd=DOCS.parent, capture_output=True, text=True, check=True).stdout
    launched = re.findall(r"accelerate launch [^;|\n]*", printed.replace("\\\n", " "))
    assert len(launched) == commands
    for line in launched:
        assert parse_command(shlex.split(line)), line


@pytest.mark.parametrize("name", PAGES)
def test_link_targets_exist(name):
    for target in re.findall(r"\]\(([^)#:]+)\)", (DOCS / name).read_text()):
        assert (DOCS / target).exists(), target


def test_api_reference_contains_the_docstrings(tmp_path):
    """`make docs` lists every public name with its docstring."""
    command = ["pdoc", "-o", str(tmp_path), "vlp", "vlp.inference", "vlp.commands.index"]
    code, output = Program(tmp_path / "output.txt", run_module, "pdoc", argv=command).wait()
    assert code == 0, output
    page = (tmp_path / "vlp.html").read_text()
    for name in vlp.__all__:
        assert f'id="{name}"' in page, name
        assert getattr(vlp, name).__doc__, name
    assert "An image tower and a text tower that share one embedding space" in page
    assert "Build or update the index of a folder" in (tmp_path / "vlp/commands/index.html").read_text()
