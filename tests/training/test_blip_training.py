"""Tests of complete small BLIP runs: pre-training, fine-tuning, CapFilt, loading, resuming and killed runs."""

import dataclasses
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from conftest import what_the_card_says
from huggingface_hub import ModelCard
from PIL import Image
from processes import CONTEXT, run_group, run_module
from safetensors.torch import load_file
from transformers import AutoProcessor, pipeline
from vlp.modeling_vlp.ranking import rank
from vlp.training.data.capfilt import CapFiltArguments, capfilt
from vlp.training.data.rows import picture_id
from vlp.training.data.shard_writer import ShardsArguments, write_shards
from vlp.training.data.sources import load_rows
from vlp.training.families.blip import BlipArguments, load_for_task
from vlp.training.run import train

import vlp
from vlp.errors import ArgumentError, BadDataError, ResumeError
from vlp.files import state_folder, states

COLOURS = ["red", "green", "blue", "yellow", "black", "orange", "purple", "brown"]
MODEL = {
    "image_text_hidden_size": 16,
    "vision_config": {"model_type": "vlp_modified_resnet", "depths": [1, 1], "embedding_size": 8},
    "text_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "max_position_embeddings": 16, "initializer_range": 0.1, "hidden_dropout_prob": 0.1},
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Cards in eight colours; eight of the 40 rows are the test split."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = ["image,caption,split"]
    for number in range(40):
        colour = COLOURS[number % 8]
        Image.new("RGB", (16 + number // 8, 16), colour).save(folder / f"{number}.png")
        lines.append(f"{number}.png,A {colour} card!,{'test' if number >= 32 else 'train'}")
    (folder / "pairs.csv").write_text("\n".join(lines))
    return folder / "pairs.csv"


def options(pairs, output_dir, **changes) -> dict:
    defaults = dict(
        dataset_name=str(pairs), output_dir=str(output_dir), eval_split="test", image_size=16, max_length=10,
        vocab_size=120, augmentation="none", cache_images=True, model=json.loads(json.dumps(MODEL)), momentum=0.9,
        queue_size=40, per_device_train_batch_size=16, learning_rate=4e-3, warmup_steps=2, max_train_steps=6,
        report_to="none", mixed_precision="no", logging_steps=1, num_threads=1, rerank_top_k=4,
    )  # fmt: skip
    return defaults | changes


def arguments(*args, **changes) -> BlipArguments:
    return BlipArguments(**options(*args, **changes))


@pytest.fixture(scope="module")
def trained(pairs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "cards"
    train(arguments(pairs, folder, max_train_steps=220, eval_steps=100))
    return folder


def test_pre_training_learns_itc_itm_and_lm(trained):
    results = json.loads((trained / "results.json").read_text())
    metrics, first, last = results["metrics"], results["history"][0], results["history"][-1]
    assert set(results["losses"]) == {"itc", "itm", "lm"}
    assert last["itm"] < first["itm"] / 2 and last["lm"] < first["lm"] / 2 and last["itc"] < first["itc"]
    for name in ("text_to_image_recall_at_1", "reranked_image_to_text_recall_at_1", "caption_exact", "itm_accuracy"):
        assert metrics[name] >= 0.9, (name, metrics[name])
    assert [entry["step"] for entry in results["evaluations"]] == [100, 200, 220]
    assert all(example["predictions"][0][2] for example in results["examples"])


def test_teacher_is_saved_in_state_but_not_in_folder(trained):
    names = load_file(trained / "model.safetensors").keys()
    assert not [name for name in names if "teacher" in name or "queue" in name]
    assert {name.split(".")[0] for name in names} == {
        "vision_model", "text_model", "text_proj", "itm_head", "temp", "lm_head"}  # fmt: skip
    state = load_file(states(state_folder(trained))[-1] / "model.safetensors")
    assert int(state["teacher.filled"]) == 40 and "teacher.model.text_proj.weight" in state


def test_folder_captions_and_matches_images(trained):
    processor = AutoProcessor.from_pretrained(trained)
    assert type(processor) is vlp.VlpBlipProcessor
    captioner = vlp.VlpBlipForConditionalGeneration.from_pretrained(trained)
    images = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue")]
    inputs = processor(images=images, return_tensors="pt")
    assert processor.decode_texts(captioner.generate(**inputs, num_beams=3)) == ["a red card", "a blue card"]
    prompted = processor(images=images, text=["A red", "A blue"], return_tensors="pt")
    assert processor.decode_texts(captioner.generate(**prompted), prompt="A") == ["red card", "blue card"]
    matcher = vlp.VlpBlipForImageTextRetrieval.from_pretrained(trained)
    output = matcher(**processor(images=images, text=["a red card", "a green card"], return_tensors="pt"))
    assert output.itm_logits.softmax(-1)[0, 1] > 0.5 > output.itm_logits.softmax(-1)[1, 1]
    assert output.logits_per_image.argmax(1)[0] == 0
    several = processor(images=images, text=["a green card", "a blue card", "a red card"], return_tensors="pt")
    ranking = rank(matcher, several["pixel_values"], several["input_ids"], top_k=2)
    assert ranking.image_to_text.argmax(1).tolist() == [2, 1] and ranking.text_to_image.argmax(1)[1:].tolist() == [1, 0]


def test_pipeline_generates_caption(trained):
    describe = pipeline("image-text-to-text", model=str(trained))
    outputs = describe(Image.new("RGB", (20, 20), "orange"), text="a", max_new_tokens=4)
    assert "orange card" in outputs[0]["generated_text"]


def test_model_card_shows_caption_results(trained):
    card = ModelCard.load(trained / "README.md")
    assert card.data.pipeline_tag == "image-to-text" and "blip" in card.data.tags
    names = {result.metric_name for result in card.data.eval_results}
    assert {"Captions, CIDEr", "Text to image, R@1, re-ranked by ITM"} <= names
    for text in ("Mixture of encoder and decoder", "examples.png", "num_beams=3", "captions that the model generates"):
        assert text in card.content, text
    assert what_the_card_says(trained) == "['a red card']\n"


def test_resumed_run_equals_uninterrupted_run(pairs, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(arguments(pairs, whole, max_train_steps=8))
    train(arguments(pairs, stopped, max_train_steps=8, save_steps=3, save_total_limit=5))
    first = states(state_folder(stopped))[0]
    train(arguments(pairs, stopped, max_train_steps=8, resume_from_checkpoint=str(first)))
    assert_same_states(whole, stopped)
    train(arguments(pairs, stopped, max_train_steps=8, resume_from_checkpoint="latest"))  # already complete
    assert json.loads((stopped / "results.json").read_text())["losses"] == ["itc", "itm", "lm"]


def assert_same_states(a: Path, b: Path) -> None:
    """Check that the final weights, optimiser state, teacher, queue and losses of two runs are exactly equal."""
    last = [states(state_folder(folder))[-1] for folder in (a, b)]
    assert last[0].name == last[1].name
    tensors = [load_file(folder / "model.safetensors") for folder in last]
    assert tensors[0].keys() == tensors[1].keys() and "teacher.image_queue" in tensors[0]
    for name, value in tensors[0].items():
        assert torch.equal(value, tensors[1][name]), name
    moments = [torch.load(folder / "optimizer.bin", weights_only=True)["state"] for folder in last]
    for key, values in moments[0].items():
        for name, value in values.items():
            assert torch.equal(value, moments[1][key][name])
    results = [json.loads((folder / "results.json").read_text()) for folder in (a, b)]
    assert results[0]["metrics"] == results[1]["metrics"] and results[0]["samples"] == results[1]["samples"]
    for name in ("itc", "itm", "lm"):
        assert [x[name] for x in results[0]["history"]] == [x[name] for x in results[1]["history"]]


def start_or_resume(settings: dict) -> None:
    """Start a run, or resume it from its last state. Runs in its own process."""
    os.setsid()  # so that its workers can be killed with it
    last = "latest" if states(state_folder(settings["output_dir"])) else None
    train(BlipArguments(**settings, resume_from_checkpoint=last))


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_repeatedly_killed_run_equals_uninterrupted_run(pairs, trained, tmp_path, times):
    """Covers weights, optimiser, schedule, sampling, teacher, queue and the position in shards read by two workers."""
    write_shards(ShardsArguments(dataset_name=str(pairs), samples_per_shard=4, output_dir=str(tmp_path / "shards")))
    changes = dict(
        dataset_name=str(tmp_path / "shards" / "{00000..00007}.tar"), eval_dataset_name=str(pairs), num_workers=2,
        tokenizer_name=str(trained), cache_images=False, augmentation="strong", save_steps=2, save_total_limit=3,
        max_train_steps=16 + 12 * times,
    )  # fmt: skip
    whole, killed, rng = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    folder, settings = state_folder(killed), options(pairs, killed, **changes)

    def newest() -> str:
        return max((path.name for path in states(folder)), default="")

    pace, seen = 0.5, []  # upper bound of the seconds between two states
    for number in range(times):
        process = CONTEXT.Process(target=start_or_resume, args=(settings,))
        process.start()
        if number % 4 == 2:  # while it starts or loads
            time.sleep(rng.uniform(0, 1.5))
        else:
            before, started, deadline = newest(), time.monotonic(), time.monotonic() + 120
            while newest() == before and process.is_alive() and time.monotonic() < deadline:
                time.sleep(0.005)
            after, started = newest(), time.monotonic()
            while newest() == after and process.is_alive() and time.monotonic() < started + pace:
                time.sleep(0.005)
            pace = min(pace, time.monotonic() - started)
            time.sleep(rng.uniform(0, pace))  # in a step or while it saves
        assert process.is_alive(), f"the run ended before kill {number + 1}"
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has no process group yet
            process.kill()
        process.join()
        seen.append(newest())
        assert len(states(folder)) <= 4  # three, and one that is about to be deleted
        # States are complete.
        assert all((path / "model.safetensors").exists() for path in states(folder))
    assert len(set(seen)) > times // 2
    train(arguments(pairs, killed, **changes, resume_from_checkpoint="latest"))
    AcceleratorState._reset_state(reset_partial_state=True)
    train(arguments(pairs, whole, **changes))
    assert_same_states(whole, killed)
    assert len(states(folder)) == 3


@pytest.fixture(scope="module")
def tuned(pairs, trained, tmp_path_factory) -> tuple[Path, Path]:
    """A fine-tuned captioner and a fine-tuned retrieval model for filtering."""
    folder = tmp_path_factory.mktemp("tuned")
    options = dict(task="captioning", prompt="A picture of ", model_name_or_path=str(trained), max_train_steps=80)
    train(arguments(pairs, folder / "captioner", **options))
    options = dict(task="retrieval", model_name_or_path=str(trained), max_train_steps=5, learning_rate=1e-4)
    train(arguments(pairs, folder / "matcher", **options))
    return folder / "captioner", folder / "matcher"


def test_fine_tuning_for_captioning_and_retrieval(pairs, tuned, tmp_path):
    captioner_folder, matcher_folder = tuned
    results = json.loads((captioner_folder / "results.json").read_text())
    assert results["losses"] == ["lm"] and {"caption_exact", "bleu_4", "cider"} <= set(results["metrics"])
    assert results["metrics"]["caption_exact"] >= 0.9
    captioner = vlp.VlpBlipForConditionalGeneration.from_pretrained(captioner_folder)
    processor = AutoProcessor.from_pretrained(captioner_folder)
    inputs = processor(images=Image.new("RGB", (20, 20), "red"), text="a picture of", return_tensors="pt")
    start = inputs["input_ids"].shape[1] - 1  # the prompt's words are not in the small vocabulary
    assert processor.decode_texts(captioner.generate(**inputs)[:, start:]) == ["a red card"]
    assert "tensor([" in what_the_card_says(matcher_folder)
    assert "generates captions" in (captioner_folder / "README.md").read_text()
    results = json.loads((matcher_folder / "results.json").read_text())
    assert results["losses"] == ["itc", "itm"] and "cider" not in results["metrics"]
    assert results["metrics"]["itm_accuracy"] >= 0.8
    with pytest.raises(ArgumentError, match="lacks weights that --task retrieval needs"):
        train(arguments(pairs, tmp_path / "x", task="retrieval", model_name_or_path=str(captioner_folder)))


@pytest.mark.parametrize("task", ["pretrain", "vqa", "nlvr"])
def test_other_tasks_start_from_a_captioner(task, tuned):
    captioner = vlp.VlpBlipForConditionalGeneration.from_pretrained(tuned[0]).state_dict()
    started = load_for_task(str(tuned[0]), task).state_dict()
    for name, value in captioner.items():
        if name in started:
            assert torch.equal(started[name], value), name
    for part in ("encoder_attention.attention.q_proj.weight", "mlp.fc1.weight", "cross_attention.layer_norm.bias"):
        source = part.replace("encoder_attention", "decoder_attention")
        assert torch.equal(started[f"text_model.layers.1.{part}"], captioner[f"text_model.layers.1.{source}"])
    assert ("itm_head.weight" in started) == (task == "pretrain")


def test_statements_start_from_a_model_of_questions(tuned, tmp_path):
    answering = load_for_task(str(tuned[0]), "vqa")
    answering.save_pretrained(tmp_path)
    started, given = load_for_task(str(tmp_path), "nlvr").state_dict(), answering.state_dict()
    for layer, name in ((0, "encoder_attention.attention.q_proj.weight"), (1, "mlp.fc1.weight")):
        assert torch.equal(started[f"text_model.layers.{layer}.{name}"], given[f"text_model.layers.{layer}.{name}"])
    for side in "01":
        own, source = (f"text_model.layers.1.cross_attention.attention{number}.v_proj.weight" for number in (side, ""))
        assert torch.equal(started[own], given[source])
    with pytest.raises(ArgumentError, match="lacks weights that --task captioning needs"):
        load_for_task(str(tmp_path), "captioning")


def test_processes_train_a_captioner_that_leaves_the_pooling_of_its_tower_unused(pairs, tmp_path):
    config = tmp_path / "config.yaml"
    given = arguments(pairs, tmp_path / "run", task="captioning", eval_split=None, max_train_steps=3)
    config.write_text(yaml.safe_dump(vars(given)))
    run_group(2, tmp_path, run_module, "vlp.training", argv=["training", "blip", "--config", str(config)])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["steps"], results["processes"]) == (3, 2)


def test_captioning_with_adapters(pairs, trained, tmp_path):
    options = dict(task="captioning", model_name_or_path=str(trained), lora_rank=2, max_train_steps=2)
    train(arguments(pairs, tmp_path / "captioner", **options))
    captioner = vlp.VlpBlipForConditionalGeneration.from_pretrained(trained)
    captioner.load_adapter(str(tmp_path / "captioner"))
    assert [name for name in captioner.state_dict() if "lora_A" in name]
    processor = AutoProcessor.from_pretrained(tmp_path / "captioner")
    inputs = processor(images=Image.new("RGB", (20, 20), "red"), return_tensors="pt")
    assert processor.decode_texts(captioner.generate(**inputs, max_new_tokens=5)) == ["a red card"]
    for task in ("vqa", "nlvr"):
        with pytest.raises(ArgumentError, match=f"--task {task} adds parts that .* does not have"):
            train(arguments(pairs, tmp_path / "x", **options | {"task": task}))


def test_retrieval_with_adapters_updates_teacher_adapters(pairs, trained, tmp_path):
    options = dict(task="retrieval", model_name_or_path=str(trained), lora_rank=2, max_train_steps=3)
    train(arguments(pairs, tmp_path / "matcher", **options))
    matcher = vlp.VlpBlipForImageTextRetrieval.from_pretrained(tmp_path / "matcher").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "matcher")
    images = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue")]
    output = matcher(**processor(images=images, text=["a red card", "a green card"], return_tensors="pt"))
    assert output.itm_logits.softmax(-1)[0, 1] > 0.5 > output.itm_logits.softmax(-1)[1, 1]
    state = load_file(states(state_folder(tmp_path / "matcher"))[-1] / "model.safetensors")
    name = "text_model.layers.0.encoder_attention.attention.q_proj.lora_B.default.weight"
    student, teacher = state[f"model.{name}"], state[f"teacher.model.{name}"]
    assert student.abs().max() > 0 and 0 < teacher.abs().max() < student.abs().max()


@pytest.fixture
def web(tmp_path) -> Path:
    """Web pairs: six correct captions, eight wrong ones, two empty ones and a broken image."""
    lines = ["image,caption"]
    for number, colour in enumerate(COLOURS * 2):
        Image.new("RGB", (18, 16), colour).save(tmp_path / f"{number}.png")
        caption = f"a {colour} card" if number < 6 else f"a {COLOURS[number % 8 - 1]} card" if number < 14 else ""
        lines.append(f"{number}.png,{caption}")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "web.csv").write_text("\n".join(lines + ["broken.png,a red card"]))
    return tmp_path / "web.csv"


def test_capfilt_keeps_matching_captions_and_resumes(web, tuned, tmp_path, pairs, capsys):
    captioner, matcher = tuned
    settings = CapFiltArguments(dataset_name=str(web), captioner=str(captioner), filter=str(matcher),
                                prompt="a picture of ", shard_size=6, batch_size=4, output_dir=str(tmp_path / "new"),
                                max_length=12, min_length=3)  # fmt: skip
    capfilt(settings)
    printed = capsys.readouterr().out
    assert "not an image: 1" in printed and "of 14 captions" in printed and "of 16 captions" in printed
    rows = load_rows(str(tmp_path / "new"), "train", "image")
    dropped = datasets.Dataset.from_parquet([str(p) for p in sorted((tmp_path / "new" / "dropped").glob("*.parquet"))])
    assert len(rows) + len(dropped) == 30
    correct = {
        picture_id(row, "image"): f"a {COLOURS[n % 8]} card"
        for n, row in enumerate(load_rows(str(web), "train", "image"))
    }
    kept = [row for row in rows if row["source"] == "web"]
    assert sum(row["caption"] == correct[row["image_id"]] for row in kept) >= 0.8 * len(kept) > 3
    lost = [row for row in dropped if row["source"] == "web"]
    assert sum(row["caption"] != correct[row["image_id"]] for row in lost) >= 0.8 * len(lost) > 4
    assert all(row["score"] > 0.5 for row in rows) and all(row["score"] <= 0.5 for row in dropped)
    assert {row["source"] for row in rows} == {"web", "synthetic"}
    assert all(row["image"]["bytes"] for row in rows)
    shards = sorted((tmp_path / "new" / "data").glob("*.parquet"))
    before = {path.name: path.read_bytes() for path in shards}
    shards[1].unlink()
    again = dataclasses.replace(settings, num_threads=1)
    capfilt(again)  # as after an interruption: only the missing shard is computed again, with the same result
    assert {path.name: path.read_bytes() for path in shards} == before
    twin = shutil.copytree(settings.captioner, tmp_path / "elsewhere" / Path(settings.captioner).name)
    with pytest.raises(ResumeError, match="created with other options: another folder of"):
        capfilt(dataclasses.replace(settings, captioner=str(twin)))
    with pytest.raises(ResumeError, match="created with other options: top_p was 0.9 and is now 0.5. Choose another"):
        capfilt(dataclasses.replace(settings, top_p=0.5))
    said = r"kept none of 30 captions: the highest match probability is [01]\.\d\d. Fine-tune it"
    with pytest.raises(BadDataError, match=said):
        capfilt(dataclasses.replace(settings, threshold=1.0, output_dir=str(tmp_path / "none")))
    train(arguments(tmp_path / "new", tmp_path / "again", eval_split=None, max_train_steps=2))
    results = json.loads((tmp_path / "again" / "results.json").read_text())
    assert results["training_pairs"] == len(rows)


def test_captions_are_cut_to_what_a_loaded_model_supports(pairs, tmp_path, capsys):
    """The recipe for captioning has more tokens than the small model before it was made for."""
    train(arguments(pairs, tmp_path / "blip", eval_split=None, max_train_steps=1))
    most = json.loads((tmp_path / "blip/config.json").read_text())["text_config"]["max_position_embeddings"]
    options = dict(model_name_or_path=str(tmp_path / "blip"), task="captioning", max_length=most + 8)
    train(arguments(pairs, tmp_path / "captioner", eval_split=None, max_train_steps=1, **options))
    assert (
        f"Longer texts are cut at {most} tokens, which is the most that the model supports" in capsys.readouterr().out
    )
    assert json.loads((tmp_path / "captioner/results.json").read_text())["arguments"]["max_length"] == most


def test_invalid_capfilt_options_raise(web, trained, tmp_path):
    with pytest.raises(ArgumentError, match="CapFilt needs --filter"):
        CapFiltArguments(captioner=str(trained))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArgumentError, match="holds other files"):
        capfilt(CapFiltArguments(dataset_name=str(web), captioner=str(trained), filter=str(trained),
                                 output_dir=str(tmp_path / "full")))  # fmt: skip
    with pytest.raises(ArgumentError, match="cannot be shards"):
        capfilt(CapFiltArguments(dataset_name="a.tar", captioner="x", filter="x", output_dir=str(tmp_path / "n")))


def test_wrong_model_or_tokenizer_raises(pairs, trained, tmp_path):
    from conftest import tiny_model

    tiny_model().save_pretrained(tmp_path / "clip")
    with pytest.raises(ArgumentError, match="is a vlp_clip, not a vlp_blip"):
        train(arguments(pairs, tmp_path / "run", model_name_or_path=str(tmp_path / "clip")))
    with pytest.raises(ArgumentError, match=f"--tokenizer_name {tmp_path}: the tokenizer cannot be loaded"):
        train(arguments(pairs, tmp_path / "run", tokenizer_name=str(tmp_path)))


def test_initialisation_from_folder_keeps_metrics(pairs, trained, tmp_path):
    train(arguments(pairs, tmp_path / "more", model_name_or_path=str(trained), max_train_steps=1, learning_rate=1e-9))
    metrics = json.loads((tmp_path / "more" / "results.json").read_text())["metrics"]
    assert metrics == json.loads((trained / "results.json").read_text())["metrics"]
