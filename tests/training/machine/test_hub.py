"""Tests of pushing and pulling models with the real huggingface_hub client and a local Hub (hub_server.py)."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Hub, serving
from PIL import Image
from processes import Program, run_code, run_module

from vlp.files import WRITTEN

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


def run(
    hub: Hub, home: Path, *command: str, token: str | None = "hf_me", fresh: bool = False
) -> subprocess.CompletedProcess:
    """Run a program with its own HF_HOME and thus its own cache.

    Args:
        hub: the Hub to use.
        home: its HF_HOME.
        command: -c CODE or -m MODULE, and the program's arguments.
        token: its Hub token, or None.
        fresh: start a new interpreter that has not imported vlp.
    """
    given = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1",
             "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": None, "HF_TOKEN": token}  # fmt: skip
    if fresh:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {name: value for name, value in given.items() if value}
        return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=240)
    home.mkdir(parents=True, exist_ok=True)
    kind, what, *rest = command
    program = Program(home / f"{len(list(home.glob('*.txt')))}.txt", {"-c": run_code, "-m": run_module}[kind], what,
                      environment=given, argv=[kind, *rest])  # fmt: skip
    code, output = program.wait()
    return subprocess.CompletedProcess(command, code, output, output)


def train(hub: Hub, pairs: Path, folder: Path, *options: str, token: str | None = "hf_me"):
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
        "--class_column", "none", "--license", "mit", "--push_to_hub", *options, token=token,
    )  # fmt: skip


PULL = """
import hashlib, json, sys
from pathlib import Path
from huggingface_hub import ModelCard, snapshot_download
from PIL import Image
from processes import Program, run_code, run_module
from transformers import AutoModel, AutoProcessor, pipeline
from vlp.files import WRITTEN

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


PULL_WITHOUT_VLP = """
import sys
sys.modules["vlp"] = None  # as if it were not installed
from transformers import AutoModel, AutoProcessor
name, revision = sys.argv[1:]
AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=True)
print(type(AutoModel.from_pretrained(name, revision=revision, trust_remote_code=True)).__name__)
"""


def test_pushed_model_loads_in_another_process(hub, pairs, tmp_path):
    """Training pushes a private model to a branch; another process with an empty cache loads it by name."""
    options = ("--hub_model_id", "me/cards", "--hub_private", "--hub_revision", "v2", "--hub_bundle")
    done = train(hub, pairs, tmp_path / "run", *options)
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["me/cards"]
    assert repository.private and len(repository.messages) == 2  # the initial commit and the upload
    assert f"Pushed to {hub.url}/me/cards/commit/" in done.stdout
    pushed = repository.commits[repository.branches["v2"]]
    assert "model.safetensors" not in repository.commits[repository.branches["main"]]
    run_folder = tmp_path / "run"
    local = {str(p.relative_to(run_folder)): p.read_bytes() for p in run_folder.rglob("*")
             if p.is_file() and p.name != WRITTEN}  # fmt: skip
    assert {name: value for name, value in pushed.items() if name != ".gitattributes"} == local
    for name, value in pushed.items():
        assert not any(word in name for word in ("optimizer", "queue", "teacher", "scheduler"))
        assert b"hf_me" not in value and str(tmp_path).encode() not in value, f"{name} contains a secret or a path"
    pulled = run(hub, tmp_path / "elsewhere", "-c", PULL, "me/cards", "v2")
    assert pulled.returncode == 0, pulled.stderr
    facts = json.loads(pulled.stdout.splitlines()[-1])
    assert (facts["model"], facts["processor"], facts["license"]) == ("VlpClipModel", "VlpClipProcessor", "mit")
    assert facts["labels"] == ["a blue card", "a red card"] and "vlp" in facts["tags"]
    assert facts["files"] == {name: hashlib.sha256(value).hexdigest() for name, value in pushed.items()}
    pulled = run(hub, tmp_path / "without-vlp", "-c", PULL_WITHOUT_VLP, "me/cards", "v2", fresh=True)
    assert pulled.returncode == 0 and pulled.stdout.split()[-1] == "VlpClipModel", pulled.stderr
    hidden = run(hub, tmp_path / "yours", "-c", PULL, "me/cards", "v2", token="hf_you")
    assert hidden.returncode != 0 and "me/cards" in hidden.stderr


PUSH = """
import os, sys
os.environ["HF_HUB_OFFLINE"] = "0"  # conftest sets it to 1
sys.path.insert(0, sys.argv[1])
from conftest import tiny_pair
model, processor = tiny_pair()
for part in (model, processor):
    part.push_to_hub("me/pushed", bundle=True)
"""


def test_push_to_hub_with_bundled_code(hub, tmp_path):
    done = run(hub, tmp_path / "home", "-c", PUSH, str(Path(__file__).parents[2]))
    assert done.returncode == 0, done.stderr
    pulled = run(hub, tmp_path / "without-vlp", "-c", PULL_WITHOUT_VLP, "me/pushed", "main", fresh=True)
    assert pulled.returncode == 0 and pulled.stdout.split()[-1] == "VlpClipModel", pulled.stderr


def test_broken_connections_are_retried(hub, pairs, tmp_path):
    hub.drop(r"^(PUT /large|POST .*/objects/batch)", times=2)
    done = train(hub, pairs, tmp_path / "run", "--hub_model_id", "me/cards")
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in hub.repositories["me/cards"].commits[hub.repositories["me/cards"].branches["main"]]


def test_failed_push_keeps_folder_and_can_be_repeated(hub, pairs, tmp_path):
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
def test_invalid_token_is_reported(hub, pairs, tmp_path, name, token, message):
    done = train(hub, pairs, tmp_path / "run", "--hub_model_id", name, token=token)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not hub.repositories
