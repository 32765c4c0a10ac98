"""Tests of the evaluation tasks with small data sets and models."""

import dataclasses
import io
from collections import Counter

import datasets
import pytest
import torch
from accelerate import PartialState
from conftest import tiny_blip, tiny_pair
from PIL import Image
from torch.nn import functional as F
from vlp.processing.blip import VlpBlipImageProcessor, VlpBlipProcessor, train_tokenizer
from vlp.training.evaluation.arguments import EvaluationArguments
from vlp.training.evaluation.results import evaluate_model, file_name, metrics_of
from vlp.training.evaluation.tasks import embed_classes, evaluate_task, number_labels, prepare_data

import vlp
from vlp.errors import ArgumentError, BadDataError, UnsupportedModelError
from vlp.inference import VlpPredictor, predictor_of

COLOURS = ["red", "green", "blue", "white", "black", "yellow"]


def png(colour: str, corner: str = "grey") -> bytes:
    image = Image.new("RGB", (20, 24), colour)
    image.putpixel((0, 0), Image.new("RGB", (1, 1), corner).getpixel((0, 0)))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def captions_of(colour: str) -> list[str]:
    return [f"a {colour} card", f"{colour} paper", f"a card that is {colour}"]


def table(rows: list[dict]) -> datasets.Dataset:
    columns = {name: [row.get(name) for row in rows] for name in rows[0]}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))


def as_lists(**more) -> datasets.Dataset:
    """One row per picture, with a list of three captions."""
    return table([{"image": {"bytes": png(c), "path": None}, "caption": captions_of(c)} | more for c in COLOURS])


def as_rows(order: list[tuple[str, int]] | None = None) -> datasets.Dataset:
    """The same pictures with one caption per row, in the order of the (colour, caption number) pairs."""
    order = order or [(colour, number) for colour in COLOURS for number in range(3)]
    return table([{"image": {"bytes": png(c), "path": None}, "caption": captions_of(c)[number]} for c, number in order])


@pytest.fixture(scope="module")
def blip():
    model = tiny_blip().eval()
    tokenizer = train_tokenizer([text for colour in COLOURS for text in captions_of(colour)], 118, 30)
    images = VlpBlipImageProcessor(size={"height": 32, "width": 32})
    return model, VlpBlipProcessor(images, tokenizer)


def evaluate(model, processor, rows, **options) -> dict:
    arguments = EvaluationArguments(**{"resamples": 50, "batch_size": 4, "max_length": 8} | options)
    pictures = prepare_data(rows, arguments, PartialState())
    use = {"captioning": "caption", "itm": "match"}.get(arguments.task, "match")
    return evaluate_task(predictor_of(model, processor, use), pictures).metrics


@pytest.mark.parametrize("task", ["retrieval", "itm", "captioning"])
def test_one_caption_per_row_gives_same_metrics_as_caption_lists(task, blip):
    """Rows of the same picture are grouped, so both layouts give exactly the same metrics."""
    options = {"task": task} | ({"rerank_top_k": 4} if task == "retrieval" else {})
    lists, rows = (evaluate(*blip, data, **options) for data in (as_lists(), as_rows()))
    assert lists == rows and len(lists) >= 6
    # Rows of the same picture are not adjacent.
    interleaved = [(colour, number) for number in range(3) for colour in COLOURS]
    mixed = evaluate(*blip, as_rows(interleaved), **options)
    assert {k: v for k, v in mixed.items() if "interval" not in k} == pytest.approx(
        {k: v for k, v in lists.items() if "interval" not in k}
    )


def test_picture_identity(tmp_path):
    """A picture is identified by its image_id, otherwise by its bytes if the row has them, otherwise by its path."""
    (tmp_path / "a.png").write_bytes(png("red"))
    (tmp_path / "b.png").write_bytes(png("red"))
    one, two, red = str(tmp_path / "a.png"), str(tmp_path / "b.png"), png("red")

    def pictures(rows: list[dict]) -> list[list[int]]:
        found = prepare_data(table(rows), EvaluationArguments(task="retrieval"), PartialState())
        return [picture.rows for picture in found.items]

    assert pictures([{"image": path, "caption": "red"} for path in (one, two, one)]) == [[0, 2], [1]]
    assert pictures([{"image": {"bytes": red, "path": name}, "caption": "red"} for name in "ab"]) == [[0, 1]]
    ids = [{"image": {"bytes": red, "path": None}, "caption": "red", "image_id": number} for number in (7, 8, 7)]
    assert pictures(ids) == [[0, 2], [1]]


def test_bad_rows_are_skipped_and_counted():
    rows = [{"image": {"bytes": png(c), "path": None}, "caption": f"a {c} card"} for c in COLOURS]
    rows += [{"image": {"bytes": b"x", "path": None}, "caption": "broken"}, rows[0] | {"caption": " "}]
    pictures = prepare_data(table(rows), EvaluationArguments(task="retrieval"), PartialState())
    assert (len(pictures), pictures.used) == (6, 6)
    assert pictures.skipped == Counter({"not an image": 1, "empty caption": 1})
    with pytest.raises(BadDataError, match="no usable row: not an image: 1"):
        prepare_data(table(rows[6:7]), EvaluationArguments(task="retrieval"), PartialState())


def test_zero_shot_counts_each_picture_once_per_class():
    rows = [{"image": {"bytes": png("red"), "path": None}, "name": name} for name in ("red", "red", "warm")]
    found = prepare_data(table(rows), EvaluationArguments(class_column="name"), PartialState())
    assert [(picture.rows, found.names[picture.label]) for picture in found.items] == [([0, 1], "red"), ([2], "warm")]


def test_class_embedding_is_mean_of_its_prompts():
    model, processor = tiny_pair()
    predictor = VlpPredictor(model, processor)
    rows = table([{"image": {"bytes": png("red"), "path": None}, "name": name} for name in ("cat", "dog")])
    pictures = prepare_data(rows, EvaluationArguments(class_column="name", templates="simple"), PartialState())
    from vlp.processing.prompts import TEMPLATES

    mean = predictor.embed_texts([template.format("cat") for template in TEMPLATES["simple"]]).mean(dim=0)
    torch.testing.assert_close(embed_classes(predictor, pictures)[0], F.normalize(mean, dim=0), rtol=1e-4, atol=1e-5)


def test_embeddings_have_unit_length_and_do_not_depend_on_the_batch():
    predictor = VlpPredictor(*tiny_pair())
    images = [Image.new("RGB", (30, 40), colour) for colour in COLOURS]
    texts = ["a", "two yellow triangles and a dog", "b c"]
    for embed, items in ((predictor.embed_images, images), (predictor.embed_texts, texts)):
        many, one = embed(items), torch.cat([embed([item]) for item in items])
        torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.norm(dim=-1), torch.ones(len(items)))


def test_number_labels():
    numbers = [0, 1, 5]
    with pytest.raises(ArgumentError, match="numbers without names: give --class_names"):
        number_labels(numbers, None, "label")
    with pytest.raises(ArgumentError, match="labels range from 0 to 5, for 2 names"):
        number_labels(numbers, ["a", "b"], "label")
    with pytest.raises(ArgumentError, match="must hold names or labels"):
        number_labels([["a"]], None, "label")
    with pytest.raises(ArgumentError, match="has 'c', which is not one of --class_names"):
        number_labels(["a", "c"], ["a", "b"], "label")
    assert number_labels([1, -1, None, 0], ["a", "b"], "label") == ([1, None, None, 0], ["a", "b"])
    assert number_labels(["b", "", "a"], None, "label") == ([1, None, 0], ["a", "b"])


def test_model_in_training_mode_gives_same_metrics_as_loaded_model(blip, tmp_path):
    """Evaluating a model in memory, in training mode, gives the same metrics as loading its folder."""
    model, processor = blip
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    common = dict(batch_size=4, max_length=8)
    evaluations = [
        prepare_data(as_lists(), EvaluationArguments(task=task, **common), PartialState())
        for task in ("retrieval", "itm", "captioning")
    ]
    outcomes = evaluate_model(model.train(), processor, evaluations, resamples=0)
    assert model.training
    for pictures, outcome in zip(evaluations, outcomes, strict=True):
        from vlp.training.evaluation.tasks import use_of

        from vlp.inference import load

        without_intervals = dataclasses.replace(
            pictures, arguments=dataclasses.replace(pictures.arguments, resamples=0)
        )
        assert evaluate_task(load(tmp_path, use_of(pictures.arguments)), without_intervals).metrics == outcome.metrics


def test_metrics_and_files_are_named_by_caption_column(blip):
    rows = as_lists().add_column("caption_vi", [f"tấm {number}" for number in range(6)])
    options = [{"task": "retrieval", "caption_column": column} for column in ("caption", "caption_vi")]
    evaluations = [prepare_data(rows, EvaluationArguments(**each), PartialState()) for each in options]
    metrics = metrics_of(evaluations, evaluate_model(*blip, evaluations, resamples=0))
    assert {"text_to_image_recall_at_1", "text_to_image_recall_at_1@caption_vi"} <= metrics.keys()
    assert [file_name(each.arguments) for each in evaluations] == [
        "emoji-test-retrieval", "emoji-test-retrieval-caption_vi",
    ]  # fmt: skip


def test_embeddings_that_are_not_finite_are_refused():
    """Ranked, they would give a recall of 100 %."""
    model, processor = tiny_pair()
    with torch.no_grad():
        model.visual_projection.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="embeddings are not finite"):
        VlpPredictor(model, processor).embed_images([Image.new("RGB", (30, 40), "red")])


def test_composition_compares_true_with_false_captions(blip):
    model, processor = blip
    rows = as_lists()
    rows = rows.add_column("wrong", [captions_of(COLOURS[(n + 1) % 6])[0] for n in range(6)])
    rows = rows.add_column("kind", ["dark", "light"] * 3)
    arguments = EvaluationArguments(task="composition", group_column="kind", resamples=20, batch_size=4)
    pictures = prepare_data(rows, arguments, PartialState())
    predictor = predictor_of(model, processor, "embed")
    outcome = evaluate_task(predictor, pictures)
    images = [pictures.image(number) for number in range(6)]
    hits = {"": [], "_itm": []}
    states = predictor.encode_images(images)
    for number, image in enumerate(images):
        texts = [captions_of(COLOURS[number])[0], captions_of(COLOURS[(number + 1) % 6])[0]]
        true, false = predictor.similarity(predictor.embed_images([image]), predictor.embed_texts(texts))[0]
        hits[""].append(bool(true > false))
        odds = predictor.match(states[[number]], torch.tensor([0, 0]), texts).diff(dim=1)[:, 0]
        hits["_itm"].append(bool(odds[0] > odds[1]))
    for suffix, found in hits.items():
        assert outcome.metrics[f"composition_accuracy{suffix}"] == pytest.approx(sum(found) / 6)
    by_kind = {f"composition_accuracy{suffix}": sum(hits[suffix][::2]) / 3 for suffix in ("", "_itm")}
    assert outcome.groups["dark"] == by_kind | {"rows": 3}
    # A model that sees no difference has 0.5, which is chance; one without ITM is judged by similarity only.
    same = rows.remove_columns("wrong").add_column("wrong", [captions_of(colour)[0] for colour in COLOURS])
    equal = evaluate_task(predictor, prepare_data(same, arguments, PartialState()))
    assert equal.metrics["composition_accuracy"] == equal.metrics["composition_accuracy_itm"] == 0.5
    clip = VlpPredictor(*tiny_pair())
    assert "composition_accuracy_itm" not in evaluate_task(clip, pictures).metrics


def test_composition_needs_a_column_with_false_captions():
    arguments = EvaluationArguments(task="composition", wrong_column="false")
    with pytest.raises(ArgumentError, match="--wrong_column"):
        prepare_data(as_lists(), arguments, PartialState())


def test_answers_and_statements_are_counted_by_group(blip):
    rows = as_lists(answers=["red"], kind="colour").remove_columns("caption").add_column("caption", ["which?"] * 6)
    model = vlp.VlpBlipForQuestionAnswering.from_pre_training(blip[0])
    arguments = EvaluationArguments(task="vqa", group_column="kind", resamples=0, num_beams=1, max_length=5)
    outcome = evaluate_task(predictor_of(model, blip[1], "answer"), prepare_data(rows, arguments, PartialState()))
    assert outcome.groups == {"colour": {"vqa_accuracy": outcome.metrics["vqa_accuracy"], "rows": 6}}


def test_captioning_reranks_by_the_probability_of_the_caption(blip):
    """The log-probability is that of the training loss, without label smoothing, summed over the tokens."""
    model, processor = blip
    predictor, rows = predictor_of(model, processor, "match"), as_lists()
    metrics = evaluate(model, processor, rows, task="retrieval", rerank_top_k=4, rerank_by="matching,captioning")
    assert {name for name in metrics if name.startswith("reranked_lm_") and not name.endswith("_interval")} == {
        f"reranked_lm_{way}_recall_at_{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)
    }
    assert "reranked_text_to_image_recall_at_1" in metrics
    image = Image.open(io.BytesIO(png("red"))).convert("RGB")
    states, texts = predictor.encode_images([image]), ["a red card", "green paper"]
    found = predictor.caption_log_probabilities(states, torch.tensor([0, 0]), texts)
    smoothing, model.config.text_config.label_smoothing = model.config.text_config.label_smoothing, 0.0
    for text, value in zip(texts, found, strict=True):
        ids = processor.tokenize([text], 30)["input_ids"]
        with torch.inference_mode():
            loss = model.lm_loss(ids, model.memory_of(states))
        assert value.item() == pytest.approx(-loss.item() * (ids.shape[1] - 1), rel=1e-4)
    model.config.text_config.label_smoothing = smoothing


def test_rerankers_that_do_not_exist_or_need_a_decoder_are_refused(blip):
    with pytest.raises(ArgumentError, match="--rerank_by must be matching or captioning"):
        EvaluationArguments(task="retrieval", rerank_by="itm")
    model = vlp.VlpBlipForImageTextRetrieval(blip[0].config).eval()
    with pytest.raises(UnsupportedModelError, match="cannot re-rank by captioning"):
        evaluate(model, blip[1], as_lists(), task="retrieval", rerank_top_k=4, rerank_by="captioning")
