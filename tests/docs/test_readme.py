"""The snippets, commands, figures and links of the README work."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import QFORMER, VIT, save_language_model
from processes import Program, run_script
from test_docs import parse_command, parse_vlp
from transformers import AutoTokenizer, pipeline
from vlp.model_cards.card import render_card
from vlp.modeling_vlp.language_model import load_language_model
from vlp.training.command_line import parse
from vlp.training.data.capfilt import CapFiltArguments
from vlp.training.evaluation.arguments import EvaluationArguments

import vlp

ROOT = Path(__file__).parents[2]
READMES = ["README.md", "README.vi.md"]


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with docs/ and the included models, but with small BLIP-2s, which need no language model."""
    base = tmp_path_factory.mktemp("readme")
    (base / "docs").symlink_to(ROOT / "docs")
    (base / "model_cards").mkdir()
    for path in (ROOT / "model_cards").iterdir():
        if not path.name.startswith("blip2-"):
            (base / "model_cards" / path.name).symlink_to(path)
    save_language_model(base / "llm", ["An emoji of a red square"])
    config = vlp.VlpBlip2Config(vision_config=dict(VIT), qformer_config=dict(QFORMER), num_query_tokens=3,
                                language_model_name_or_path=str(base / "llm"))  # fmt: skip
    captioner = vlp.VlpBlip2ForConditionalGeneration(config, load_language_model(config))
    tokenizer = AutoTokenizer.from_pretrained(base / "llm")
    images = vlp.VlpBlipImageProcessor(size={"height": 32, "width": 32})
    for name in ("model_cards/blip2-emoji", "model_cards/blip2-scenes-vqa"):
        captioner.save_pretrained(base / name)
        vlp.VlpBlip2Processor(images, tokenizer).save_pretrained(base / name)
    return base


@pytest.mark.parametrize("name", READMES)
def test_python_snippets_run(name, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    pushed = []
    for kind in (vlp.VlpClipModel, vlp.VlpClipProcessor):  # test_hub.py tests the push itself
        monkeypatch.setattr(kind, "push_to_hub", lambda self, name, bundle: pushed.append((type(self).__name__, name)))
    snippets = blocks(name, "python")
    assert len(snippets) == 3
    for snippet in snippets:
        exec(compile(snippet, name, "exec"), {})
    shown = capsys.readouterr().out
    assert "score" in shown and "caption: ['red apple']" in shown
    assert pushed == [("VlpClipModel", "ME/my-clip"), ("VlpClipProcessor", "ME/my-clip")]


def test_examples_run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for snippet in blocks("docs/examples.md", "python"):
        exec(compile(snippet, "examples.md", "exec"), {})
    shown = capsys.readouterr().out
    for word in ("match: [", "best image for each text: [", "answer: ['", "said: "):
        assert word in shown


@pytest.mark.parametrize("name", READMES)
def test_readme_is_short(name):
    assert len((ROOT / name).read_text().splitlines()) <= 200


def test_included_models_recognise_an_apple(monkeypatch):
    """The first example of the README, with the models of this repository."""
    monkeypatch.chdir(ROOT)
    for model, names, right in (("clip-emoji", ["red apple", "dog", "rocket"], "red apple"),
                                ("clip-emoji-vi", ["táo đỏ", "con chó", "tên lửa"], "táo đỏ"),
                                ("clip-emoji-en-vi", ["táo đỏ", "dog", "tên lửa"], "táo đỏ")):  # fmt: skip
        classify = pipeline("zero-shot-image-classification", model=f"model_cards/{model}")
        best = classify("docs/red-apple.webp", candidate_labels=names, hypothesis_template="{}")[0]
        assert best["label"] == right and best["score"] > 0.5, model
    for folder in (ROOT / "model_cards").glob("*/model.safetensors"):
        assert folder.stat().st_size < 8e6
        card = str(render_card(folder.parent))
        assert card.strip() == (folder.parent / "README.md").read_text().strip()  # rendered from its stored results


@pytest.mark.parametrize("name", READMES)
def test_commands_parse(name):
    """Every command parses, and every make target exists."""
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    parsed = 0
    for line in "\n".join(blocks(name, "bash")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert words[1] in targets
        elif words:
            parsed += parse_command(words)
    assert parsed == 7


@pytest.mark.parametrize("name", [*READMES, "docs/training.md", "docs/own-data.md"])
def test_options_exist(name):
    known = parse_vlp(["convert", "a", "b"]) | vars(CapFiltArguments(captioner="a", filter="b"))
    known |= vars(EvaluationArguments()) | vars(parse([])) | vars(parse([], "blip")) | vars(parse([], "blip2"))
    for options in re.findall(r"`(--[^`]*)`", (ROOT / name).read_text()):
        words = shlex.split(options)
        for word in (word for word in words if word.startswith("--")):
            if word != "--config":
                assert word[2:].removeprefix("no-") in known, word


def test_both_languages_have_the_same_structure():
    english, vietnamese = ((ROOT / name).read_text() for name in READMES)
    for pattern in (r"^## ", r"^\|", r"^!\[", r"```"):
        assert len(re.findall(pattern, english, re.M)) == len(re.findall(pattern, vietnamese, re.M)), pattern
    strip = lambda text: re.sub(r"#.*", "", text).split()  # noqa: E731  comments are translated
    for language in ("python", "bash"):
        for a, b in zip(blocks("README.md", language), blocks("README.vi.md", language), strict=True):
            assert strip(a) == strip(b)


def test_each_library_was_asked_for_each_feature():
    stored = json.loads((ROOT / "benchmarks/features.json").read_text())
    code = "import features; print('\\n'.join(name for name, _, _ in features.PROBES))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "benchmarks", capture_output=True, text=True, check=True
    )
    names = found.stdout.splitlines()
    assert len(names) > 10 and {"vlp", "open_clip", "transformers"} <= set(stored)
    assert all(list(facts["features"]) == names for facts in stored.values())
    assert all(stored["vlp"]["features"].values())


def test_figures_match_the_stored_results(tmp_path):
    command = [str(ROOT / "benchmarks/readme.py"), "--check"]
    code, output = Program(tmp_path / "output.txt", run_script, command[0], argv=command).wait()
    assert code == 0, output


@pytest.mark.parametrize("name", [*READMES, "CONTRIBUTING.md"])
def test_links_and_pictures_exist(name):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text()):
        assert target.startswith("http") or ((ROOT / name).parent / target).exists(), target


def test_make_help_lists_the_targets():
    output = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("train", "test", "test-all", "check", "bench", "cards", "demo", "docs"):
        assert re.search(rf"make {target}\s+\w", output)
