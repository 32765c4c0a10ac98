"""What the README says is so. Run: pytest tests/test_readme.py"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BLIP_TEXT, QFORMER, VIT, save_language_model, tiny_pair
from transformers import AutoTokenizer
from vlp.modeling_vlp.blip2_writer import load_language_model
from vlp.processing.blip import token_ids, train_tokenizer
from vlp.training.arguments import TASKS, parse

import vlp
from vlp.convert import build_parser

ROOT = Path(__file__).parents[1]
READMES = ["README.md", "README.vi.md"]


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A place where runs/clip-emoji, runs/blip-emoji and runs/blip2-emoji-2 are small models."""
    base = tmp_path_factory.mktemp("readme")
    tokenizer = train_tokenizer(["a red square", "a blue circle and a dog"], 100, 20)
    config = vlp.VlpBlipConfig(vision_config=dict(VIT), text_config=BLIP_TEXT | token_ids(tokenizer))
    vlp.VlpBlipForPreTraining(config).save_pretrained(base / "runs/blip-emoji")
    images = vlp.VlpBlipImageProcessor(size={"height": 32, "width": 32})
    vlp.VlpBlipProcessor(images, tokenizer).save_pretrained(base / "runs/blip-emoji")
    model, processor = tiny_pair()
    model.save_pretrained(base / "runs/clip-emoji")
    processor.save_pretrained(base / "runs/clip-emoji")
    save_language_model(base / "llm", ["An emoji of a red square"])
    config = vlp.VlpBlip2Config(vision_config=dict(VIT), qformer_config=dict(QFORMER), num_query_tokens=3,
                                language_model_name_or_path=str(base / "llm"))  # fmt: skip
    writer = vlp.VlpBlip2ForConditionalGeneration(config, load_language_model(config))
    writer.save_pretrained(base / "runs/blip2-emoji-2")
    tokenizer = AutoTokenizer.from_pretrained(base / "llm")
    vlp.VlpBlip2Processor(images, tokenizer).save_pretrained(base / "runs/blip2-emoji-2")
    return base


@pytest.mark.parametrize("name", READMES)
def test_python_snippets_run(name, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    snippets = blocks(name, "python")
    assert len(snippets) == 5
    for snippet in snippets:
        exec(compile(snippet, name, "exec"), {})
    shown = capsys.readouterr().out
    assert (
        "score" in shown and "caption: ['" in shown and "best image for each text: [" in shown and "answer: ['" in shown
    )


@pytest.mark.parametrize("name", READMES)
def test_commands_are_commands(name):
    """Every training command parses; every make target is there."""
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    seen = converted = 0
    for line in "\n".join(blocks(name, "bash")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert words[1] in targets
        elif words[:2] == ["accelerate", "launch"] and "--help" not in words:
            task = next(word for word in words if word in TASKS)
            parse(words[words.index(task) + 1 :], task)
            seen += 1
        elif words[:1] == ["vlp-convert"]:
            options = vars(build_parser().parse_args(words[1:]))
            converted += 1
    assert seen == 14 and converted == 6
    convert_options = options
    for options in re.findall(r"`(--[^`]*)`", (ROOT / name).read_text()):
        words = shlex.split(options)
        for word in (word for word in words if word.startswith("--")):
            if word != "--config":
                assert (
                    word[2:] in vars(parse([])) | vars(parse([], "blip")) | vars(parse([], "blip2")) | convert_options
                ), word


def test_both_languages_have_the_same_parts():
    english, vietnamese = ((ROOT / name).read_text() for name in READMES)
    for pattern in (r"^## ", r"^\|", r"^!\[", r"```"):
        assert len(re.findall(pattern, english, re.M)) == len(re.findall(pattern, vietnamese, re.M)), pattern
    strip = lambda text: re.sub(r"#.*", "", text).split()  # noqa: E731  comments are translated
    for language in ("python", "bash"):
        for a, b in zip(blocks("README.md", language), blocks("README.vi.md", language), strict=True):
            assert strip(a) == strip(b)


def test_figures_are_those_of_the_stored_results():
    subprocess.run([sys.executable, ROOT / "benchmarks/readme.py", "--check"], check=True)


@pytest.mark.parametrize("name", [*READMES, "CONTRIBUTING.md", "docs/scaling.md"])
def test_links_and_pictures_are_there(name):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text()):
        assert target.startswith("http") or ((ROOT / name).parent / target).exists(), target


def test_makefile_explains_itself():
    output = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("train", "test", "test-all", "check", "bench"):
        assert re.search(rf"make {target}\s+\w", output)
