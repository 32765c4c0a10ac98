"""`vlp space` writes a page that runs as it is, without vlp."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import saved_pair, tiny_blip2
from huggingface_hub import SpaceCard
from PIL import Image

from vlp.commands.space import main, write_space
from vlp.conversion import convert
from vlp.errors import ArgumentError, UnsupportedModelError
from vlp.inference import load

gradio = pytest.importorskip("gradio")
TRY = """
import json, sys
sys.modules["vlp"] = None  # as if it were not installed
sys.path.insert(0, ".")
import app
from PIL import Image
picture = Image.open(sys.argv[1])
print(app.compares, app.writer is not None, app.answers, app.reasons)
if app.compares:
    scores = app.score(picture, "a red square\\n\\ntwo dogs\\ntwo dogs")
    print({name: round(share, 4) for name, share in scores.items()})
    for wrong in ((None, "a"), (picture, " "), (picture, "\\n".join(map(str, range(101))))):
        try:
            app.score(*wrong)
            sys.exit("accepted")
        except app.gr.Error:
            pass
if app.writer is not None:
    print("caption", json.dumps(app.describe(picture)))
if app.answers:
    print("answer", json.dumps(app.answer(picture, " what is it? ")))
if app.reasons:
    print("judged", json.dumps(app.judge(picture, picture.rotate(90, expand=True), "two dogs")))
for use, pictures in ((app.answer, 1), (app.judge, 2)):
    for wrong in ((None,) * pictures + ("a",), (picture,) * pictures + (" ",)):
        try:
            use(*wrong)
            sys.exit("accepted")
        except app.gr.Error:
            pass
print(app.title, type(app.page).__name__)
"""


def tried(space: Path, picture: Path) -> list[str]:
    """What a space prints where vlp is not installed."""
    environment = {"HF_HOME": str(space.parent / "home"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    found = subprocess.run([sys.executable, "-c", TRY, str(picture)], cwd=space, env=environment, capture_output=True,
                           text=True, timeout=300)  # fmt: skip
    assert found.returncode == 0, found.stderr
    return found.stdout.strip().splitlines()


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (40, 30), "red").save(path)
    return path


@pytest.mark.parametrize("kind", ["clip", "blip"])
def test_a_space_runs_without_vlp(kind, tmp_path, picture):
    name = saved_pair(kind, tmp_path / kind)
    space = write_space(name, tmp_path / "space")
    lines = tried(space, picture)
    assert lines[0] == f"True {kind == 'blip'} False False" and lines[-1] == f"{kind} TabbedInterface"
    predictor = load(name, "embed")
    similarity = predictor.similarity(
        predictor.embed_images([Image.open(picture)]), predictor.embed_texts(["a red square", "two dogs"])
    )
    shares = (similarity[0] / predictor.temperature).softmax(dim=-1).tolist()
    scores = eval(lines[1])
    assert scores == {text: pytest.approx(share, abs=2e-3) for text, share in zip(scores, shares, strict=True)}
    card = SpaceCard.load(space / "README.md")
    assert card.data.sdk == "gradio" and card.data.app_file == "app.py" and card.data.title == kind
    needed = (space / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("transformers>=5") for line in needed) and not any("vlp" in line for line in needed)


@pytest.mark.parametrize("kind", ["vqa", "blip2"])
def test_a_space_answers_questions(kind, tmp_path, picture):
    name = saved_pair(kind, tmp_path / kind)
    space = write_space(name, tmp_path / "space")
    expected = load(name, "answer").answer([Image.open(picture)], ["what is it?"], num_beams=3, max_new_tokens=10)[0]
    if kind == "blip2":
        (tmp_path / "language-model").rename(tmp_path / "moved")  # the space has its own copy
    lines = tried(space, picture)
    assert lines[0] == f"False {kind == 'blip2'} True False"
    assert f"answer {json.dumps(expected)}" in lines


def test_a_space_judges_statements(tmp_path, picture):
    name = saved_pair("nlvr", tmp_path / "nlvr")
    lines = tried(write_space(name, tmp_path / "space"), picture)
    assert lines[0] == "False False False True"
    left = Image.open(picture)
    logits = load(name, "reason").reason([left], [left.rotate(90, expand=True)], ["two dogs"])
    judged = json.loads(lines[1].removeprefix("judged "))
    assert list(judged.values()) == pytest.approx(logits.softmax(dim=-1)[0].tolist(), abs=1e-4)
    assert list(judged) == ["false", "true"]


def test_a_model_of_transformers_is_converted(tmp_path, picture):
    name = saved_pair("clip", tmp_path / "clip")
    convert(name, tmp_path / "theirs", "transformers")
    space = write_space(str(tmp_path / "theirs"), tmp_path / "space")
    assert json.loads((space / "model/config.json").read_text())["architectures"] == ["VlpClipModel"]
    assert SpaceCard.load(space / "README.md").data.title == "theirs"


def test_what_cannot_be_a_space_is_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(UnsupportedModelError, match="MODEL"):
        write_space(str(tmp_path / "nowhere"), tmp_path / "space")
    tiny_blip2().save_pretrained(tmp_path / "stage-1")
    with pytest.raises(UnsupportedModelError, match="after stage 1"):
        write_space(str(tmp_path / "stage-1"), tmp_path / "space")
    name = saved_pair("clip", tmp_path / "clip")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArgumentError, match="thesis.txt|other files"):
        write_space(name, tmp_path / "mine")
    monkeypatch.setattr(sys, "argv", ["vlp space", name, str(tmp_path / "space")])
    main()
    assert "Wrote" in capsys.readouterr().out and (tmp_path / "space" / "model" / "model.safetensors").is_file()
    main()  # what vlp wrote is replaced
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
