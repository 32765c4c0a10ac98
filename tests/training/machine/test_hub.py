"""Publishing and pulling through the real huggingface_hub client, against a Hub on this machine (hub_server.py).

Run: pytest tests/test_hub.py
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Hub, serving
from PIL import Image

COLOURS = ["red", "green", "blue", "yellow"]


@pytest.fixture
def hub():
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    lines = ["image,caption,split"]
    for number in range(16):
        Image.new("RGB", (16, 16), COLOURS[number % 4]).save(folder / f"{number}.png")
        lines.append(f"{number}.png,a {COLOURS[number % 4]} card,{'test' if number >= 12 else 'train'}")
    (folder / "pairs.csv").write_text("\n".join(lines))
    return folder / "pairs.csv"


def run(hub: Hub, home: Path, *words: str, token: str | None = "hf_me") -> subprocess.CompletedProcess:
    """A program with a home, and so a cache, of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1",
                    "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
    if token:
        environment["HF_TOKEN"] = token
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=240)


def train(hub: Hub, pairs: Path, folder: Path, *words: str, token: str | None = "hf_me"):
    model = {"projection_dim": 16,
             "vision_config": {"patch_size": 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
                               "num_attention_heads": 2},
             "text_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
                             "num_attention_heads": 2}}  # fmt: skip
    return run(
        hub, folder.parent / "home", "-m", "vlp.training", "clip", "--config", "clip-emoji-vit", "--dataset_name",
        str(pairs), "--output_dir", str(folder), "--model", json.dumps(model), "--image_size", "16", "--vocab_size",
        "560", "--max_length", "12", "--per_device_train_batch_size", "4", "--max_train_steps", "2",
        "--max_train_minutes", "none", "--report_to", "none", "--tag_column", "none", "--tag_share", "0",
        "--class_column", "none", "--push_to_hub", *words, token=token,
    )  # fmt: skip


PULL = """
import hashlib, json, sys
from pathlib import Path
from huggingface_hub import ModelCard, snapshot_download
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline
import vlp
name, revision = sys.argv[1:]
model = AutoModel.from_pretrained(name, revision=revision)
processor = AutoProcessor.from_pretrained(name, revision=revision)
classify = pipeline("zero-shot-image-classification", model=name, revision=revision)
best = classify(Image.new("RGB", (16, 16), "red"), candidate_labels=["a red card", "a blue card"],
                hypothesis_template="{}")
card = ModelCard.load(snapshot_download(name, revision=revision) + "/README.md")
folder = Path(snapshot_download(name, revision=revision))
print(json.dumps({
    "model": type(model).__name__, "processor": type(processor).__name__, "labels": sorted(x["label"] for x in best),
    "license": card.data.license, "tags": card.data.tags,
    "files": {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
              for p in folder.rglob("*") if p.is_file()},
}))
"""


PULL_ALONE = """
import sys
sys.modules["vlp"] = None  # as where it is not installed
from transformers import AutoModel, AutoProcessor
name, revision = sys.argv[1:]
AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=True)
print(type(AutoModel.from_pretrained(name, revision=revision, trust_remote_code=True)).__name__)
"""


def test_what_one_process_pushes_another_pulls(hub, pairs, tmp_path):
    """Training pushes a private model to a branch; a second process, with a cache of its own, loads it by its name."""
    words = ("--hub_model_id", "me/cards", "--hub_private", "--hub_revision", "v2", "--hub_bundle")
    done = train(hub, pairs, tmp_path / "run", *words)
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["me/cards"]
    assert repository.private and len(repository.messages) == 2  # the Hub's own, and the one of the upload
    assert f"Pushed to {hub.url}/me/cards/commit/" in done.stdout
    pushed = repository.commits[repository.branches["v2"]]
    assert "model.safetensors" not in repository.commits[repository.branches["main"]]
    run_folder = tmp_path / "run"
    local = {str(p.relative_to(run_folder)): p.read_bytes() for p in run_folder.rglob("*") if p.is_file()}
    assert {name: value for name, value in pushed.items() if name != ".gitattributes"} == local
    for name, value in pushed.items():
        assert not any(word in name for word in ("optimizer", "queue", "teacher", "scheduler"))
        assert b"hf_me" not in value and str(tmp_path).encode() not in value, f"{name} tells a secret or a path"
    pulled = run(hub, tmp_path / "elsewhere", "-c", PULL, "me/cards", "v2")
    assert pulled.returncode == 0, pulled.stderr
    told = json.loads(pulled.stdout.splitlines()[-1])
    assert (told["model"], told["processor"], told["license"]) == ("VlpClipModel", "VlpClipProcessor", "apache-2.0")
    assert told["labels"] == ["a blue card", "a red card"] and "vlp" in told["tags"]
    assert told["files"] == {name: hashlib.sha256(value).hexdigest() for name, value in pushed.items()}
    alone = run(hub, tmp_path / "alone", "-c", PULL_ALONE, "me/cards", "v2")
    assert alone.returncode == 0 and alone.stdout.split()[-1] == "VlpClipModel", alone.stderr
    hidden = run(hub, tmp_path / "yours", "-c", PULL, "me/cards", "v2", token="hf_you")
    assert hidden.returncode != 0 and "me/cards" in hidden.stderr


PUSH = """
import os, sys
os.environ["HF_HUB_OFFLINE"] = "0"  # conftest would have it 1
sys.path.insert(0, sys.argv[1])
from conftest import tiny_pair
model, processor = tiny_pair()
for part in (model, processor):
    part.push_to_hub("me/pushed", bundle=True)
"""


def test_a_model_and_its_processor_are_pushed_with_their_code(hub, tmp_path):
    done = run(hub, tmp_path / "home", "-c", PUSH, str(Path(__file__).parents[2]))
    assert done.returncode == 0, done.stderr
    alone = run(hub, tmp_path / "alone", "-c", PULL_ALONE, "me/pushed", "main")
    assert alone.returncode == 0 and alone.stdout.split()[-1] == "VlpClipModel", alone.stderr


def test_a_connection_that_breaks_is_tried_again(hub, pairs, tmp_path):
    hub.drop(r"^(PUT /large|POST .*/objects/batch)", times=2)
    done = train(hub, pairs, tmp_path / "run", "--hub_model_id", "me/cards")
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in hub.repositories["me/cards"].commits[hub.repositories["me/cards"].branches["main"]]


def test_a_failed_push_loses_nothing_and_can_be_made_again(hub, pairs, tmp_path):
    hub.drop(r"^POST .*/commit/", times=100)
    done = train(hub, pairs, tmp_path / "run", "--hub_model_id", "me/cards")
    assert done.returncode == 1 and "error: Could not push to me/cards" in done.stderr
    assert f"`hf upload me/cards {tmp_path / 'run'}`" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert list(hub.repositories["me/cards"].commits[hub.repositories["me/cards"].branches["main"]]) == [
        ".gitattributes"
    ]
    hub.dropped.clear()
    again = run(hub, tmp_path / "home", "-m", "huggingface_hub.cli.hf", "upload", "me/cards", str(tmp_path / "run"))
    assert again.returncode == 0, again.stderr
    files = hub.repositories["me/cards"].commits[hub.repositories["me/cards"].branches["main"]]
    assert files["model.safetensors"] == (tmp_path / "run" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("name", "token", "message"), [
    ("me/cards", "hf_wrong", "Invalid user token"),
    ("you/cards", "hf_me", "not allowed to create you/cards"),
])  # fmt: skip
def test_a_wrong_token_is_told(hub, pairs, tmp_path, name, token, message):
    done = train(hub, pairs, tmp_path / "run", "--hub_model_id", name, token=token)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not hub.repositories
