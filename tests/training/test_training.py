"""Tests of complete small CLIP runs: training, publishing, loading, resuming and errors."""

import dataclasses
import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from conftest import tiny_batch, tiny_model
from huggingface_hub import HfApi, ModelCard
from peft import PeftModel
from PIL import Image
from processes import Program, run_group
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)
from vlp.training import command_line, loop
from vlp.training.data.build import load_data
from vlp.training.data.sources import load_rows
from vlp.training.evaluate import evaluate
from vlp.training.evaluation.arguments import EvaluationArguments
from vlp.training.evaluation.results import evaluate_model, metrics_of
from vlp.training.families.clip import CLIP, ClipArguments
from vlp.training.machine import checkpoint, hardware, hub
from vlp.training.machine.optim import learning_rate_factor, levels_below_top, make_optimizer, parameter_groups
from vlp.training.objectives.clip import ClipObjective
from vlp.training.run import interruptible, main, require_finite, train

import vlp
from vlp import files
from vlp.commands.index import Index, build
from vlp.conversion import convert
from vlp.errors import ArgumentError, BadDataError, ResumeError
from vlp.files import state_folder, states
from vlp.loading import load_model

COLOURS = ["red", "green", "blue", "yellow", "black", "orange", "purple", "brown"]
MODEL = {
    "projection_dim": 16,
    "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                      "patch_size": 8},
    "text_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
}  # fmt: skip


RESNET = MODEL | {"vision_config": {"model_type": "vlp_modified_resnet", "depths": [1, 1], "embedding_size": 8}}


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Reset Accelerate's global state, so that each run can set its own precision."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Cards in eight colours and five sizes; eight of the 40 rows are the test split."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = ["image,caption,split"]
    for number in range(40):
        colour = COLOURS[number % 8]
        Image.new("RGB", (16 + number // 8, 16), colour).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{colour} card,{'test' if number >= 32 else 'train'}")
    (folder / "pairs.csv").write_text("\n".join(lines))
    return folder / "pairs.csv"


def arguments(pairs, output_dir, **options) -> ClipArguments:
    """Options of a small, fast run; `options` override the defaults."""
    defaults = dict(
        dataset_name=str(pairs), output_dir=str(output_dir), eval_split="test", class_column="caption", image_size=16,
        max_length=8, vocab_size=560, augmentation="strong", cache_images=True, model=json.loads(json.dumps(MODEL)),
        per_device_train_batch_size=16, learning_rate=3e-3, warmup_steps=2, max_train_steps=6, report_to="none",
        mixed_precision="no", logging_steps=1, num_threads=1,
    )  # fmt: skip
    return ClipArguments(**defaults | options)


@pytest.fixture(scope="module")
def trained(pairs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "cards"
    train(arguments(pairs, folder, max_train_steps=120, eval_steps=60, augmentation="none", report_to="tensorboard",
                    license="mit"))  # fmt: skip
    return folder


def test_training_learns_and_writes_publishable_folder(trained):
    files = {path.name for path in trained.iterdir()}
    model = {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    pictures = {"loss.png", "metrics.png", "examples.png", "retrieval.png"}
    assert files == model | pictures | {
        "README.md", "evaluations", "results.json", "training_arguments.yaml", ".vlp-files",
    }  # fmt: skip
    assert {path.name for path in (trained / "evaluations").glob("*.json")} == {
        "pairs-test-zero-shot.json", "pairs-test-retrieval.json",
    }  # fmt: skip
    results = json.loads((trained / "results.json").read_text())
    assert results["metrics"]["zero_shot_top1"] == 1.0 and results["metrics"]["zero_shot_top5"] == 1.0
    assert results["metrics"]["text_to_image_recall_at_1"] == 1.0
    assert [entry["step"] for entry in results["evaluations"]] == [60, 120]
    assert results["history"][-1]["contrastive"] < results["history"][0]["contrastive"] / 2
    assert list((state_folder(trained) / "logs").rglob("events.out.tfevents.*"))
    assert yaml.safe_load((trained / "training_arguments.yaml").read_text())["max_train_steps"] == 120


def test_folder_loads_with_auto_classes(trained):
    assert type(AutoConfig.from_pretrained(trained)) is vlp.VlpClipConfig
    assert type(AutoModel.from_pretrained(trained)) is vlp.VlpClipModel
    assert type(AutoModelForZeroShotImageClassification.from_pretrained(trained)) is vlp.VlpClipModel
    assert type(AutoProcessor.from_pretrained(trained)) is vlp.VlpClipProcessor
    assert type(AutoImageProcessor.from_pretrained(trained)) is vlp.VlpClipImageProcessor
    assert type(AutoTokenizer.from_pretrained(trained)) is vlp.VlpClipTokenizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_shot_pipeline_classifies(trained, dtype, caplog):
    classify = pipeline("zero-shot-image-classification", model=str(trained), dtype=dtype)
    labels = [f"{colour} card" for colour in COLOURS]
    for colour in ("red", "blue", "orange"):
        best = classify(Image.new("RGB", (30, 20), colour), candidate_labels=labels, hypothesis_template="{}")[0]
        assert best["label"] == f"{colour} card"
    assert not [record for record in caplog.records if "not supported" in record.getMessage()]


def test_model_card_shows_results(trained):
    card = ModelCard.load(trained / "README.md")
    assert card.data.pipeline_tag == "zero-shot-image-classification" and card.data.license == "mit"
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values["Zero-shot top-1 accuracy"] == 1.0 and len(values) == 9
    for text in ("ViT, 2 layers of 32", "examples.png", "loss.png", "120 optimiser steps", f'model="{trained.name}"'):
        assert text in card.content, text


def test_resumed_run_equals_uninterrupted_run(pairs, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(arguments(pairs, whole, max_train_steps=8, ema_decay=0.9))
    train(arguments(pairs, stopped, max_train_steps=8, ema_decay=0.9, save_steps=3, save_total_limit=5))
    saved = states(state_folder(stopped))
    assert [path.name for path in saved] == ["step-0000003", "step-0000006", "step-0000008"]
    (stopped / "model.safetensors").unlink()
    train(arguments(pairs, stopped, max_train_steps=8, ema_decay=0.9, resume_from_checkpoint=str(saved[0])))
    assert (whole / "model.safetensors").read_bytes() == (stopped / "model.safetensors").read_bytes()
    a, b = (json.loads((folder / "results.json").read_text()) for folder in (whole, stopped))
    assert a["metrics"] == b["metrics"] and a["samples"] == b["samples"] == 128
    assert [x["contrastive"] for x in a["history"]] == [x["contrastive"] for x in b["history"]]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_are_published_and_evaluated(pairs, tmp_path, dtype):
    train(arguments(pairs, tmp_path / "whole", max_train_steps=30))
    train(arguments(pairs, tmp_path / "small", max_train_steps=30, publish_dtype=dtype))
    whole, small = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "small"))
    for name, value in whole.items():
        wanted = value.to(getattr(torch, dtype)) if value.ndim > 1 else value
        assert torch.equal(small[name], wanted), name
    model, processor = (kind.from_pretrained(tmp_path / "small") for kind in (AutoModel, AutoProcessor))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path / "small"))
    assert classify.model.dtype == torch.float32
    rows = load_rows(str(pairs), "test", "image")
    evaluations = CLIP.evaluation(arguments(pairs, tmp_path / "small"), rows, None)
    results = json.loads((tmp_path / "small" / "results.json").read_text())["metrics"]
    assert metrics_of(evaluations, evaluate_model(model, processor, evaluations, 0)) == pytest.approx(results)


def test_save_total_limit_keeps_latest_states(pairs, tmp_path):
    train(arguments(pairs, tmp_path / "run", save_steps=1, save_total_limit=2))
    assert [path.name for path in states(tmp_path / "run.resume")] == ["step-0000005", "step-0000006"]


def test_resuming_with_incompatible_state_raises(pairs, tmp_path):
    train(arguments(pairs, tmp_path / "run", max_train_steps=1))
    other = json.loads(json.dumps(MODEL)) | {"projection_dim": 24}
    with pytest.raises(ResumeError, match="belongs to another model: projection_dim was 16 and is now 24"):
        train(arguments(pairs, tmp_path / "run", model=other, resume_from_checkpoint="latest"))
    with pytest.raises(ResumeError, match="there is no state in"):
        train(arguments(pairs, tmp_path / "new", resume_from_checkpoint="latest"))
    with pytest.raises(ResumeError, match="is not the folder of a state"):
        train(arguments(pairs, tmp_path / "new", resume_from_checkpoint=str(tmp_path)))


def test_new_run_moves_previous_states_aside(pairs, tmp_path):
    train(arguments(pairs, tmp_path / "run", max_train_steps=4))
    train(arguments(pairs, tmp_path / "run", max_train_steps=2))
    assert [path.name for path in states(tmp_path / "run.resume")] == ["step-0000002"]
    assert [path.name for path in states(tmp_path / "run.resume.previous")] == ["step-0000004"]


def test_folder_with_other_files_is_not_replaced(pairs, tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    for name in (str(folder), ".", str(pairs), str(folder / "thesis.txt")):
        monkeypatch.chdir(folder)
        with pytest.raises(ArgumentError, match="is replaced as a whole|, not a folder|contains other files"):
            train(arguments(pairs, name))
    assert (folder / "thesis.txt").read_text() == "years of work"


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_average_is_resumed_without_unpickling(pairs, tmp_path):
    train(arguments(pairs, tmp_path / "run", max_train_steps=1, ema_decay=0.9))
    state = states(state_folder(tmp_path / "run"))[-1]
    assert (state / "average.safetensors").is_file() and not list(state.glob("custom_checkpoint*"))
    options = dict(max_train_steps=2, ema_decay=0.9, resume_from_checkpoint="latest")
    torch.save(Bomb(tmp_path / "exploded"), state / "custom_checkpoint_0.pkl")
    with pytest.raises(ResumeError, match="contains custom_checkpoint_0.pkl, a pickle, which is never loaded"):
        train(arguments(pairs, tmp_path / "run", **options))
    assert not (tmp_path / "exploded").exists()
    (state / "custom_checkpoint_0.pkl").unlink()
    train(arguments(pairs, tmp_path / "run", **options))
    (states(state_folder(tmp_path / "run"))[-1] / "average.safetensors").unlink()
    with pytest.raises(ResumeError, match="is incomplete: average.safetensors is missing"):
        train(arguments(pairs, tmp_path / "run", **options | {"max_train_steps": 3}))


def test_weights_that_are_not_finite_are_not_published():
    model = tiny_model()
    require_finite(model)
    with torch.no_grad():
        model.logit_scale.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="logit_scale is not finite, so the model is not published"):
        require_finite(model)


def test_resuming_after_the_end_is_refused(pairs, tmp_path):
    train(arguments(pairs, tmp_path / "run", max_train_steps=6))
    resumed = arguments(pairs, tmp_path / "run", max_train_steps=4, resume_from_checkpoint="latest")
    with pytest.raises(ResumeError, match="saved at step 6, past the end: --max_train_steps 4"):
        train(resumed)


def test_resuming_accepts_new_learning_rate_but_not_new_seed(pairs, tmp_path):
    train(arguments(pairs, tmp_path / "run", max_train_steps=2))
    with pytest.raises(ResumeError, match="belongs to another recipe: seed was 0 and is now 1"):
        train(arguments(pairs, tmp_path / "run", seed=1, resume_from_checkpoint="latest"))
    train(arguments(pairs, tmp_path / "run", learning_rate=5e-4, warmup_steps=0, resume_from_checkpoint="latest"))
    history = json.loads((tmp_path / "run" / "results.json").read_text())["history"]
    assert history[-1]["step"] == 6 and history[2]["learning_rate"] < 5e-4 < history[1]["learning_rate"]


def test_locked_tower_is_unchanged_after_evaluations(pairs, tmp_path):
    options = dict(image_size=32, model=RESNET, augmentation="none")
    train(arguments(pairs, tmp_path / "a", max_train_steps=1, **options))
    first = AutoModel.from_pretrained(tmp_path / "a").vision_model.state_dict()
    tower = dict(image_tower=str(tmp_path / "a"), lock_image_tower=True)
    train(arguments(pairs, tmp_path / "b", eval_steps=2, **tower, **options))
    assert_close(AutoModel.from_pretrained(tmp_path / "b").vision_model.state_dict(), first, rtol=0, atol=0)


def test_external_tokenizers(pairs, trained, tmp_path):
    clip = pytest.importorskip("clip")
    merges = Path(clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    train(arguments(pairs, tmp_path / "openai", tokenizer_name=str(merges), max_train_steps=1))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "openai")) == 49408
    options = dict(tokenizer_name=str(trained), text_tower=str(trained), lock_text_tower=True)
    train(arguments(pairs, tmp_path / "text", **options))
    a, b = AutoModel.from_pretrained(trained), AutoModel.from_pretrained(tmp_path / "text")
    assert_close(a.text_model.state_dict(), b.text_model.state_dict(), rtol=0, atol=0)
    theirs = CLIPTokenizer.from_pretrained(tmp_path / "openai")
    theirs.save_pretrained(tmp_path / "theirs")
    train(arguments(pairs, tmp_path / "theirs-run", tokenizer_name=str(tmp_path / "theirs"), max_train_steps=1))
    loaded = AutoProcessor.from_pretrained(tmp_path / "theirs-run").tokenizer
    assert loaded("a red card")["input_ids"] == theirs("a red card")["input_ids"]


def test_tokenizer_without_end_token_raises(pairs, tmp_path):
    backend = Tokenizer(models.WordLevel({"a": 0, "<s>": 1, "</s>": 2, "<pad>": 3}, unk_token="a"))
    special = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "none")
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(tmp_path / "unused")
    with pytest.raises(ArgumentError, match="lacks a start, end or pad token"):
        train(arguments(pairs, tmp_path / "run", tokenizer_name=str(tmp_path / "none")))
    with pytest.raises(ArgumentError, match="does not end each caption with exactly one end token"):
        train(arguments(pairs, tmp_path / "run", tokenizer_name=str(tmp_path / "unused")))


def test_hold_out_rows_are_used_for_evaluation_only(pairs, tmp_path):
    train(arguments(pairs, tmp_path / "run", hold_out="caption=red card", eval_split=None, max_train_steps=1))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["training_pairs"], results["evaluation_pairs"]) == (28, 4)
    assert "caption=red card" in (tmp_path / "run" / "README.md").read_text()


def test_a_share_of_the_pictures_is_held_out(pairs, tmp_path):
    """All captions of a picture are on the same side, and the seed draws the pictures."""
    lines = [line.rsplit(",", 1)[0] for line in pairs.read_text().splitlines()[1:]]
    table = ["image,caption", *lines, *(line.replace(" card", " paper") for line in lines)]
    (pairs.parent / "twice.csv").write_text("\n".join(table))
    options = arguments(
        pairs.parent / "twice.csv", tmp_path / "run", hold_out="25%", eval_split=None, max_train_steps=1
    )
    rows, held = load_data(options)
    assert len(rows) + len(held) == 80 and 10 <= len(held) <= 30
    assert not {row["image"]["path"] for row in rows} & {row["image"]["path"] for row in held}
    other = dataclasses.replace(options, seed=1)
    shutil.copytree(pairs.parent, tmp_path / "moved")
    moved = dataclasses.replace(options, dataset_name=str(tmp_path / "moved/twice.csv"))
    names = lambda rows: {Path(row["image"]["path"]).name for row in rows}  # noqa: E731
    assert names(load_data(moved)[1]) == names(held)
    assert {row["image"]["path"] for row in load_data(other)[1]} != {row["image"]["path"] for row in held}
    train(options)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "not trained on a random 25% of the pictures." in card.replace("\\", "")


def test_shards_end_to_end(tmp_path, trained):
    pytest.importorskip("webdataset")
    shard = tmp_path / "cards-000.tar"
    with tarfile.open(shard, "w") as tar:
        for number, colour in enumerate(COLOURS * 3):
            file = io.BytesIO()
            Image.new("RGB", (16, 16), colour).save(file, "PNG")
            for kind, data in (("png", file.getvalue()), ("json", json.dumps({"caption": f"{colour} card"}).encode())):
                info = tarfile.TarInfo(f"{number:03d}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    options = dict(eval_split=None, class_column=None, cache_images=False, tokenizer_name=str(trained))
    train(arguments(shard, tmp_path / "run", **options))
    assert json.loads((tmp_path / "run" / "results.json").read_text())["samples"] == 96
    for wrong, message in (
        ({"cache_images": True}, "keep all shards in memory"),
        ({"shard_weights": "1::2"}, "must be 1 numbers joined by ::"),
        ({"max_train_steps": None}, "Shards without an index"),
        ({"num_workers": 2}, "1 shards from .* are fewer than the 2 workers that read them"),
        ({"tokenizer_name": None}, "needs --tokenizer_name"),
        ({"dataset_name": str(tmp_path / "cards-{000..001}.tar")}, "there is no shard .*cards-001.tar"),
    ):
        with pytest.raises(ArgumentError, match=message):
            train(arguments(shard, tmp_path / "other", **options | wrong))


def test_zero_shot_evaluation_on_another_data_set(pairs, tmp_path):
    rows = datasets.Dataset.from_dict(
        {"img": [Image.new("RGB", (16, 16), c) for c in ("red", "blue")], "label": [0, 1]},
        features=datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["red", "blue"])}),
    )
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "classes")
    options = dict(eval_dataset_name=str(tmp_path / "classes"), eval_image_column="img", class_column="label")
    train(arguments(pairs, tmp_path / "run", max_train_steps=1, **options))
    assert set(json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]) == {
        "zero_shot_top1", "zero_shot_mean_per_class",
    }  # fmt: skip


def test_full_disk_keeps_previous_checkpoint(pairs, tmp_path, capsys):
    """A limit of 20 kB on the file size makes every larger write fail."""
    resume = dict(resume_from_checkpoint="latest", max_train_steps=2)
    train(arguments(pairs, tmp_path / "run", max_train_steps=1))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    state = {path: path.read_bytes() for path in states(tmp_path / "run.resume")[0].iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="Could not write .*run .*is unchanged. Is the disk full?"):
            train(arguments(pairs, tmp_path / "run", **resume))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    # Saving the state only warns; saving the folder then raises the error.
    assert "warning: Could not save" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert {path: path.read_bytes() for path in states(tmp_path / "run.resume")[0].iterdir()} == state
    assert [path.name for path in states(tmp_path / "run.resume")] == ["step-0000001"]


def run_in_process(pairs, folder, *words) -> Program:
    options = arguments(pairs, folder, max_train_steps=100_000)
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(vars(options)))
    return Program(
        folder.with_suffix(".txt"),
        main,
        argv=["training", "clip", "--config", str(config), *words],
        folder=folder.parent,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_run_resumes_after_a_signal(pairs, tmp_path, number):
    folder = tmp_path / "run"
    process = run_in_process(pairs, folder, "--save_steps", "20")
    deadline = time.time() + 120
    while not states(state_folder(folder)) and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    code, output = process.wait(60)
    assert code == 0, output
    assert "Interrupted at step" in output and "--resume_from_checkpoint latest" in output
    step = int(states(state_folder(folder))[-1].name.removeprefix("step-"))
    assert f"Interrupted at step {step}." in output and step >= 20
    process = run_in_process(pairs, folder, "--resume_from_checkpoint", "latest", "--max_train_steps", str(step + 1))
    code, output = process.wait(120)
    assert code == 0 and f"step {step}." in output, output
    assert (folder / "model.safetensors").exists()


def test_signals_of_one_request_are_counted_once(monkeypatch):
    """A launcher that Ctrl-C stops may send the run another signal, or the run notices its end."""
    run = SimpleNamespace(stop_requested=False, accelerator=SimpleNamespace(is_main_process=True))
    with interruptible(run):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(os.getpid(), number)
        assert run.stop_requested
        monkeypatch.setattr("vlp.training.run.SAME_REQUEST", 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_state_is_saved_when_the_launcher_dies_of_ctrl_c_in_a_slow_step(pairs, tmp_path, monkeypatch):
    """Accelerate ends at once; the run finds its launcher gone while the step goes on."""
    step, slow = loop.train_step, []

    def slow_step(run, *given):
        loss = step(run, *given)
        if run.progress.step == 2 and not slow:
            slow.append(True)
            os.kill(os.getpid(), signal.SIGINT)
            monkeypatch.setattr(os, "getppid", lambda: -1)
            time.sleep(1.5)  # the watch looks every half second
        return loss

    monkeypatch.setattr(loop, "train_step", slow_step)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    train(arguments(pairs, tmp_path / "run", max_train_steps=50))
    assert slow and len(states(tmp_path / "run.resume")) == 1 and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_run_ends_with_its_launcher(pairs, tmp_path):
    """The signal goes to `accelerate launch` alone, which does not pass it on: the run saves its state and ends."""
    folder = tmp_path / "run"
    options = vars(arguments(pairs, folder, max_train_steps=100_000, save_steps=20))
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(options))
    accelerate = Path(sys.executable).with_name("accelerate")
    command = [accelerate, "launch", "--cpu", "training", "clip", "--config", tmp_path / "options.yaml"]
    with (tmp_path / "out.txt").open("w") as out:
        launcher = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=out, stderr=out)
        deadline = time.time() + 240
        while not states(state_folder(folder)) and time.time() < deadline:
            time.sleep(0.2)
        launcher.terminate()
        launcher.wait(60)
    deadline = time.time() + 60
    while "Interrupted at step" not in (tmp_path / "out.txt").read_text() and time.time() < deadline:
        time.sleep(0.2)
    with files.locked(state_folder(folder), "--output_dir"):  # no process holds it any more
        output = (tmp_path / "out.txt").read_text()
    step = int(states(state_folder(folder))[-1].name.removeprefix("step-"))
    assert f"Interrupted at step {step}." in output, output


def test_second_run_in_the_same_folder_is_refused(pairs, tmp_path):
    with files.locked(state_folder(tmp_path / "run"), "--output_dir"):
        with pytest.raises(ArgumentError, match="another run is using it"):
            train(arguments(pairs, tmp_path / "run"))


def test_accelerate_launch_command_of_readme(pairs, tmp_path):
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(vars(arguments(pairs, tmp_path / "run", max_train_steps=2))))
    accelerate = Path(sys.executable).with_name("accelerate")
    command = [accelerate, "launch", "training", "clip", "--config", tmp_path / "options.yaml"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f'model="{tmp_path / "run"}"' in done.stdout.splitlines()[-3]
    code, output = run_in_process(pairs, tmp_path / "wrong", "--learning_rate", "-1").wait()
    assert code == 1 and "error: --learning_rate must be positive, got -1.0." in output


def run_in_processes(count: int, options: ClipArguments, folder: Path, function=main) -> None:
    """Run training in a group of processes, as `accelerate launch` does."""
    config = folder / f"{Path(options.output_dir).name}.yaml"
    config.write_text(yaml.safe_dump(vars(options)))
    run_group(count, folder, function, argv=["training", "clip", "--config", str(config)])


def test_two_processes_match_one_with_joined_batch(pairs, tmp_path):
    options = dict(augmentation="none", max_train_steps=5, save_steps=2)
    train(arguments(pairs, tmp_path / "one", **options))
    two = arguments(pairs, tmp_path / "two", per_device_train_batch_size=8, micro_batch_size=3, **options)
    run_in_processes(2, two, tmp_path)
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert two["processes"] == 2 and two["samples"] == one["samples"] == 80
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a["contrastive"] == pytest.approx(b["contrastive"], rel=1e-4)
    state = states(tmp_path / "two.resume")[-1]
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= {path.name for path in state.iterdir()}


def test_unsupported_sharding_options_raise(pairs, tmp_path, monkeypatch):
    for sharded, options, message in ((True, {"ema_decay": 0.9}, "--ema_decay"), (False, {}, "fsdp_version: 2")):
        state = SimpleNamespace(is_fsdp2=sharded, distributed_type=DistributedType.FSDP, num_processes=1)
        monkeypatch.setattr(hardware, "Accelerator", lambda state=state, **given: state)
        with pytest.raises(ArgumentError, match=message):
            train(arguments(pairs, tmp_path / "run", **options))


class Runs:
    """A pickle of this object writes a file when it is executed."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_pickles_in_states_are_not_executed_whatever_reads_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state": Runs()}, "state.pt")
    with checkpoint.weights_only(SimpleNamespace(distributed_type=DistributedType.NO)):
        with pytest.raises(pickle.UnpicklingError):
            torch.load("state.pt", weights_only=False)  # as DeepSpeed does
    assert not Path("executed").exists() and checkpoint.FORCE_WEIGHTS_ONLY not in os.environ


def test_deepspeed_config_is_completed(pairs, tmp_path, monkeypatch):
    plugin = SimpleNamespace(deepspeed_config={"train_micro_batch_size_per_gpu": "auto"})
    state = SimpleNamespace(
        is_fsdp2=False, distributed_type=DistributedType.DEEPSPEED, state=SimpleNamespace(deepspeed_plugin=plugin),
        num_processes=1,
    )  # fmt: skip
    monkeypatch.setattr(hardware, "Accelerator", lambda **given: state)
    assert hardware.make_accelerator(arguments(pairs, tmp_path / "run", mixed_precision="bf16")) is state
    config = plugin.deepspeed_config
    assert config["train_micro_batch_size_per_gpu"] == 16 and config["bf16"] == {"enabled": False}
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"} and hardware.precision_of(state) == "bf16"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ArgumentError, match="2 processes were started, but Accelerate connects only 1 of them"):
        hardware.make_accelerator(arguments(pairs, tmp_path / "run"))


def test_batches_far_larger_than_the_data_are_refused(pairs, tmp_path):
    for options in ({"per_device_train_batch_size": 1_000_000}, {"gradient_accumulation_steps": 100_000}):
        with pytest.raises(
            ArgumentError, match="pairs for each step, but the data has .* rows: choose a smaller batch"
        ):
            train(arguments(pairs, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_options_that_fit_the_run_badly_are_warned_about(pairs, tmp_path, capsys):
    train(arguments(pairs, tmp_path / "fine", max_train_steps=3))
    assert "warning" not in capsys.readouterr().out
    train(arguments(pairs, tmp_path / "run", max_train_steps=3, warmup_steps=100, per_device_train_batch_size=48))
    said = capsys.readouterr().out
    assert "warning: a batch of 48 is larger than the data, 32 rows" in said
    assert "warning: --warmup_steps 100 is longer than the run, 3 steps" in said
    train(arguments(pairs, tmp_path / "epochs", max_train_steps=None, num_train_epochs=1.0, warmup_steps=7))
    assert "warning: --warmup_steps 7 is longer than the run, 2 steps" in capsys.readouterr().out
    train(arguments(pairs, tmp_path / "tuned", model_name_or_path=str(tmp_path / "run"), max_train_steps=3,
                    learning_rate=1e-5))  # fmt: skip
    assert "M parameters hardly changes at --learning_rate 1e-05; try 0.001." in capsys.readouterr().out
    train(arguments(pairs, tmp_path / "short", max_train_steps=1, max_length=3))
    assert "warning: 100% of the captions are longer than --max_length 3 tokens and are cut." in capsys.readouterr().out


def test_tracker_that_is_not_installed_is_refused(pairs, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ArgumentError, match="--report_to comet_ml needs a package that is not installed"):
        train(arguments(pairs, tmp_path / "run", report_to="comet_ml"))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", sorted((Path(command_line.__file__).parent / "recipes/accelerate").glob("*.yaml")))
def test_accelerate_loads_example_configurations(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == 8 and config.mixed_precision == "bf16"
    assert config.distributed_type.value in ("MULTI_GPU", "FSDP", "DEEPSPEED")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"image_column": "picture"}, ArgumentError, "no column 'picture'; its columns are image, caption"),
        ({"caption_column": "text"}, ArgumentError, "no column 'text'"),
        ({"class_column": "label"}, ArgumentError, "no column 'label'"),
        ({"eval_split": "validation"}, ArgumentError, "no row whose split is 'validation'"),
        ({"image_size": 17}, ArgumentError, r"image_size \(17\) must be divisible by patch_size \(8\)"),
        ({"model": {"projection_dim": -1}}, ArgumentError, "projection_dim must be positive, got -1"),
        ({"model": {"projection_dim": "x"}}, ArgumentError, "projection_dim must be positive, got 'x'"),
        ({"model": {"text_config": {"hiden_size": 8}}}, ArgumentError, "no field 'hiden_size'; did you mean hidden_"),
        ({"hold_out": "caption=pink card"}, ArgumentError, "0 of 32 rows"),
        ({"patch_dropout": 0.5, "image_size": 32, "model": RESNET}, ArgumentError, "a ResNet has no patches"),
        (
            {"learning_rate": 1e30, "max_grad_norm": 0.0},
            FloatingPointError,
            "lower --lear",
        ),
    ],
)
def test_errors_end_the_run_with_helpful_messages(pairs, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        train(arguments(pairs, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_too_many_bad_rows_end_the_run(pairs, tmp_path):
    for path in pairs.parent.glob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes()[: 45 if int(path.stem) % 4 == 0 else None])
    broken = tmp_path / "pairs.csv"
    broken.write_text(pairs.read_text())
    with pytest.raises(BadDataError, match="truncated or broken image"):
        train(arguments(broken, tmp_path / "run", max_train_steps=30))
    train(arguments(broken, tmp_path / "run", max_train_steps=30, max_bad_share=0.5))
    assert json.loads((tmp_path / "run" / "results.json").read_text())["bad_rows"] == "truncated or broken image: 8"


def test_initialisation_from_model_and_from_tower(trained, pairs, tmp_path):
    options = dict(max_train_steps=1, learning_rate=1e-9, augmentation="none")
    train(arguments(pairs, tmp_path / "again", model_name_or_path=str(trained), **options))
    a, b = AutoModel.from_pretrained(trained), AutoModel.from_pretrained(tmp_path / "again")
    assert_close(dict(a.named_parameters()), dict(b.named_parameters()), rtol=0, atol=1e-6)
    train(arguments(pairs, tmp_path / "lit", image_tower=str(trained), lock_image_tower=True, max_train_steps=3))
    c = AutoModel.from_pretrained(tmp_path / "lit")
    assert_close(a.vision_model.state_dict(), c.vision_model.state_dict(), rtol=0, atol=0)
    assert not torch.equal(a.text_projection.weight, c.text_projection.weight)


def test_tower_from_transformers_clip(pairs, trained, tmp_path):
    config = CLIPConfig(
        vision_config=MODEL["vision_config"] | {"image_size": 16}, text_config=MODEL["text_config"], projection_dim=16
    )
    theirs = CLIPModel(config)
    theirs.save_pretrained(tmp_path / "theirs")
    train(arguments(pairs, tmp_path / "run", image_tower=str(tmp_path / "theirs"), lock_image_tower=True))
    ours = AutoModel.from_pretrained(tmp_path / "run")
    assert_close(ours.vision_model.state_dict(), theirs.vision_model.state_dict(), rtol=0, atol=0)
    train(arguments(pairs, tmp_path / "text", text_tower=str(tmp_path / "theirs"), tokenizer_name=str(trained)))
    assert AutoModel.from_pretrained(tmp_path / "text").config.text_config.vocab_size == config.text_config.vocab_size


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "sigmoid"},
        {"mixed_precision": "bf16", "gradient_checkpointing": True},
        {"patch_dropout": 0.5, "layer_decay": 0.7},
        {"gradient_accumulation_steps": 2, "group_captions": 2},
        {"ema_decay": 0.99, "gradient_checkpointing": True, "image_size": 32, "model": RESNET},
        {"augmentation": "crop", "cache_images": False, "num_workers": 1, "eval_split": None, "class_column": None},
        {"max_train_steps": None, "max_train_minutes": 0.02},
        {"max_train_steps": None, "num_train_epochs": 2.0},
    ],
)
def test_training_options_run(pairs, tmp_path, options):
    train(arguments(pairs, tmp_path / "run", **options))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["steps"] >= 2 and (tmp_path / "run" / "model.safetensors").exists()
    if options.get("num_train_epochs"):
        assert results["steps"] == 4 and results["samples"] == 64


def test_push_uploads_folder_in_one_commit(pairs, tmp_path, monkeypatch):
    calls = []

    class Url:
        repo_id = "me/cards"

    class Commit:
        commit_url = "https://hub/me/cards/commit/1"

    monkeypatch.setattr(hub, "get_token", lambda: "token")
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **k: calls.append(("create", name, k)) or Url())
    monkeypatch.setattr(HfApi, "create_branch", lambda self, name, **k: calls.append(("branch", name, k)))
    monkeypatch.setattr(
        HfApi, "upload_folder", lambda self, **k: calls.append(("upload", k, os.listdir(k["folder_path"]))) or Commit()
    )
    train(
        arguments(
            pairs, tmp_path / "run", push_to_hub=True, hub_model_id="me/cards", hub_private=True, hub_revision="v2"
        )
    )
    assert [call[0] for call in calls] == ["create", "branch", "upload"]
    assert calls[0][2]["private"] is True and calls[1][2]["branch"] == "v2" and calls[2][1]["revision"] == "v2"
    assert {"README.md", "model.safetensors", "processor_config.json"} <= set(calls[2][2])
    assert not any("optimizer" in name or "step-" in name for name in calls[2][2])


def test_push_needs_token_and_failed_push_keeps_folder(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    options = dict(push_to_hub=True, hub_model_id="me/cards")
    with pytest.raises(ArgumentError, match="hf auth login"):
        train(arguments(pairs, tmp_path / "run", **options))
    assert not (tmp_path / "run.resume").exists()
    monkeypatch.setattr(hub, "get_token", lambda: "token")
    with pytest.raises(OSError, match="Could not push to me/cards.*hf upload me/cards"):  # offline
        train(arguments(pairs, tmp_path / "run", **options))
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_write_whole_is_atomic(tmp_path):
    target = tmp_path / "folder"
    files.write_whole(target, lambda fresh: (fresh / "a").write_text("old"))

    def fail(fresh):
        (fresh / "a").write_text("new")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left on device.*is unchanged"):
        files.write_whole(target, fail)
    assert (target / "a").read_text() == "old" and os.listdir(tmp_path) == ["folder"]


def test_learning_rate_schedule():
    factors = [learning_rate_factor(step, 4, step / 100) for step in range(101)]
    assert factors[0] == pytest.approx(0.25) and max(factors) == pytest.approx(factors[3], rel=0.01)
    assert factors[50] == pytest.approx(0.5) and factors[100] == pytest.approx(0)
    assert learning_rate_factor(0, 0, 0.0) == 1.0 and learning_rate_factor(9, 0, 1.5) == pytest.approx(0)


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_parameter_groups(tower):
    model = tiny_model(tower)
    groups = parameter_groups(model, 1.0, 0.2)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        free = parameter.ndim < 2 or "position" in name or "class_embedding" in name
        assert (id(parameter) in decayed) is not free, name
    rates = {id(p): g["lr"] for g in parameter_groups(model, 1.0, 0.2, layer_decay=0.5) for p in g["params"]}
    expected = {"text_projection.weight": 0, "logit_scale": 0, "text_model.encoder.layers.2.mlp.fc1.weight": 1,
                "text_model.encoder.layers.0.mlp.fc1.weight": 3,
                "text_model.embeddings.token_embedding.weight": 4}  # fmt: skip
    if tower == "resnet":
        expected |= {
            "vision_model.layer3.0.conv1.weight": 1,
            "vision_model.conv1.weight": 4,
            "vision_model.attnpool.q_proj.weight": 0,
        }
    for name, level in expected.items():
        assert levels_below_top(model, name) == level
        assert rates[id(model.get_parameter(name))] == 0.5**level, name


def test_objective_overfits_one_batch():
    for tower in ("vit", "resnet"):
        model = tiny_model(tower)
        objective, batch = ClipObjective(model).train(), tiny_batch(model)
        ids = torch.arange(4)
        optimizer = make_optimizer(parameter_groups(model, 3e-3, 0.0), 0.9, 0.98, 1e-6)
        for _ in range(60):
            loss = objective(**batch, text_index=ids, caption_ids=ids, image_ids=ids)["contrastive"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.01, tower


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_adapters_are_trained_saved_loaded_and_merged(pairs, trained, tmp_path):
    """The folder has adapters and their base's name instead of all weights; merging them gives the same features."""
    base = load_file(trained / "model.safetensors")
    options = dict(model_name_or_path=str(trained), lora_rank=4, max_train_steps=6, learning_rate=1e-2)
    train(arguments(pairs, tmp_path / "run", **options))
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "results.json"} <= files
    assert not {"model.safetensors", "config.json"} & files
    assert json.loads((tmp_path / "run/adapter_config.json").read_text())["base_model_name_or_path"] == trained.name
    assert "vlp convert" in (tmp_path / "run/README.md").read_text()
    tuned = AutoModel.from_pretrained(trained)
    tuned.load_adapter(str(tmp_path / "run"))
    tuned.eval()
    first = "text_model.encoder.layers.0.self_attn.q_proj"
    assert tuned.get_submodule(first).lora_A["default"].weight.shape[0] == 4
    assert torch.equal(tuned.get_submodule(first).base_layer.weight, base[f"{first}.weight"])
    assert tuned.get_submodule(first).lora_B["default"].weight.abs().max() > 0
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        wanted = tuned.get_image_features(pixels).pooler_output
        before = AutoModel.from_pretrained(trained).eval().get_image_features(pixels).pooler_output
        merged = PeftModel.from_pretrained(AutoModel.from_pretrained(trained), str(tmp_path / "run"))
        merged = merged.merge_and_unload().eval()
        assert torch.allclose(merged.get_image_features(pixels).pooler_output, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, wanted, rtol=1e-3)
    assert "lora" not in " ".join(merged.state_dict())


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_every_command_reads_adapters(pairs, tmp_path, monkeypatch, tower):
    """Adapters are evaluated, searched with, converted and trained on from as the model that training saw."""
    model = MODEL if tower == "vit" else RESNET | {"text_config": MODEL["text_config"]}
    train(arguments(pairs, tmp_path / "base", model=json.loads(json.dumps(model)), max_train_steps=1))
    AcceleratorState._reset_state(reset_partial_state=True)
    options = dict(model_name_or_path=str(tmp_path / "base"), lora_rank=2, max_train_steps=3, learning_rate=1e-2)
    train(arguments(pairs, tmp_path / "run", **options))
    config = json.loads((tmp_path / "run/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"  # no path of this machine
    pixels = torch.randn(2, 3, 16, 16)
    tuned, before = load_model(vlp.VlpClipModel, tmp_path / "run"), load_model(vlp.VlpClipModel, tmp_path / "base")
    with torch.no_grad():
        features = [model.get_image_features(pixels).pooler_output for model in (tuned, before)]
    assert not torch.allclose(*features, rtol=1e-3)
    (tmp_path / "pictures").mkdir()
    for colour in ("red", "green"):
        Image.new("RGB", (20, 20), colour).save(tmp_path / f"pictures/{colour}.png")
    build(tmp_path / "pictures", tmp_path / "index", str(tmp_path / "run"))
    assert len(Index(tmp_path / "index")) == 2
    AcceleratorState._reset_state(reset_partial_state=True)
    found = evaluate(str(tmp_path / "run"), EvaluationArguments(dataset=str(pairs), task="retrieval"))
    published = json.loads((tmp_path / "run/results.json").read_text())["metrics"]
    assert found["metrics"].items() <= published.items()
    convert(tmp_path / "run", tmp_path / "whole")
    with torch.no_grad():
        whole = load_model(vlp.VlpClipModel, tmp_path / "whole").get_image_features(pixels).pooler_output
    assert torch.allclose(whole, features[0], rtol=1e-4, atol=1e-5)
    AcceleratorState._reset_state(reset_partial_state=True)
    train(arguments(pairs, tmp_path / "next", model_name_or_path=str(tmp_path / "run"), max_train_steps=1))
    assert (tmp_path / "next/model.safetensors").is_file()
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(ArgumentError, match="adapters for the model base, which is not beside it: copy"):
        load_model(vlp.VlpClipModel, tmp_path / "run")


def test_folder_with_other_adapters_is_not_replaced(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ArgumentError, match="contains other files"):
        files.check_output(str(tmp_path))
    files.list_files(tmp_path)
    files.check_output(str(tmp_path))


def test_invalid_adapter_options_raise(pairs, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "get_token", lambda: "token")
    for options, message in (
        (dict(lora_rank=4), "--lora_rank needs --model_name_or_path"),
        (dict(lora_rank=4, model_name_or_path=str(trained), push_to_hub=True, hub_model_id="me/x"), "push it first"),
    ):
        with pytest.raises(ArgumentError, match=message):
            train(arguments(pairs, tmp_path / "run", **options))
    with pytest.raises(ArgumentError, match="--lora_rank must not be negative"):
        arguments(pairs, tmp_path / "run", lora_rank=-1)
