"""Metrics on cases made by hand, with their intervals. Run: pytest tests/test_scores.py"""

import math

import evaluate
import numpy as np
import pytest
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from vlp.training.evaluation.metrics import FOLDER, NAMES, load
from vlp.training.evaluation.scores import caption_statistics, estimate, mean, mean_per_class, plain_answer, words

WRITTEN = ["a cat sits on the mat", "two dogs run in the park", "a red rocket", "nothing at all"]
REFERENCES = [
    ["a cat sits on a mat", "there is a cat on the mat"],
    ["two dogs are running in a park", "dogs run in the park on a sunny day"],
    ["a red rocket flies", "the rocket is red"],
    ["a bowl of soup", "some soup with bread"],
]


def test_every_metric_loads_offline_by_its_name_and_by_its_path():
    assert NAMES == [
        "caption_scores", "itm_accuracy", "nlvr_accuracy", "recall_at_k", "vqa_accuracy", "zero_shot_accuracy",
    ]  # fmt: skip
    for name in NAMES:
        assert isinstance(load(name), evaluate.Metric)
    assert evaluate.load(str(FOLDER / "recall_at_k.py")).compute(predictions=[[1]], references=[[1]], k=[1]) == {
        "recall_at_1": 1.0
    }
    with pytest.raises(ValueError, match="no metric 'bleu'; there are caption_scores"):
        load("bleu")


def test_recall_with_several_right_answers():
    metric = load("recall_at_k")
    predictions = [[3, 1, 2], [0, 1, 2], [5, 4, 0], [1, 2, 3]]
    references = [[1, 9], [0, 1], [0], [7]]
    assert metric.compute(predictions=predictions, references=references, k=[1, 2, 3]) == {
        "recall_at_1": 0.25, "recall_at_2": 0.5, "recall_at_3": 0.75,
    }  # fmt: skip


def test_zero_shot_accuracy_of_uneven_classes():
    metric = load("zero_shot_accuracy")
    # Three images of class 0, all right; one of class 2, wrong; of class 1 there is none.
    predictions, references = [[0, 1], [0, 2], [0, 1], [1, 2]], [0, 0, 0, 2]
    assert metric.compute(predictions=predictions, references=references, k=[1, 2]) == {
        "zero_shot_top1": 0.75, "zero_shot_top2": 1.0, "zero_shot_mean_per_class": 0.5,
    }  # fmt: skip


def test_itm_accuracy_of_each_kind():
    found = load("itm_accuracy").compute(predictions=[1, 1, 0, 1, 0, 0], references=[1, 1, 1, 0, 0, 0])
    assert found == {
        "itm_accuracy": pytest.approx(4 / 6),
        "itm_accuracy_matched": pytest.approx(2 / 3),
        "itm_accuracy_unmatched": pytest.approx(2 / 3),
    }


def test_captions_as_pycocoevalcap_scores_them():
    found = load("caption_scores").compute(predictions=WRITTEN, references=REFERENCES)
    scorer = BleuScorer(n=4)
    for text, wanted in zip(WRITTEN, REFERENCES, strict=True):
        scorer += (text, wanted)
    for order, value in enumerate(scorer.compute_score(option="closest", verbose=0)[0], start=1):
        assert found[f"bleu_{order}"] == pytest.approx(value, rel=1e-6)
    # ROUGE-L of "a red rocket" by hand: longest common part 3 of 3 words written, of 4 of the reference.
    alone = load("caption_scores").compute(predictions=["a red rocket"], references=[["a red rocket flies"]])
    precision, recall, beta = 1.0, 3 / 4, 1.2
    assert alone["rouge_l"] == pytest.approx((1 + beta**2) * precision * recall / (recall + beta**2 * precision))
    assert found["caption_exact"] == 0.0 and 0 < found["cider"] < 10


def test_perfect_captions():
    texts = ["a cat sits on the mat", "two dogs run in the park", "a red rocket flies away"]
    found = load("caption_scores").compute(
        predictions=[t.upper() + "." for t in texts], references=[[t] for t in texts]
    )
    assert found["cider"] == pytest.approx(10.0)
    for name in ("bleu_1", "bleu_4", "rouge_l", "caption_exact"):
        assert found[name] == pytest.approx(1.0), name


def test_words_of_a_caption():
    assert words('A man, "red"  don\'t well-known 3.5 (x)…') == "a man red don't well-known 3.5 x"
    assert words("Mặt cười, MẮT to!") == "mặt cười mắt to"


def test_vqa_accuracy_by_hand():
    metric = load("vqa_accuracy")
    given = [["red"] * 10, ["2"] * 3 + ["three"] * 7, ["yes"], ["dont know"] * 10]
    found = metric.compute(predictions=["The Red.", "two", "no", "don't know"], references=given)
    assert found == {"vqa_accuracy": pytest.approx((1 + (3 * 2 / 3 + 7) / 10 + 0 + 1) / 4)}
    assert plain_answer("1,000 x-ray, an 3.5 Apples.") == "1000 x ray 3.5 apples"


def test_intervals_are_those_of_the_bootstrap():
    rng = np.random.default_rng(1)
    scores = (rng.random(400) < 0.3).astype(float)
    found = estimate({"share": mean(scores)}, 400, resamples=2000)
    low, high = found["share_interval"]
    error = math.sqrt(scores.mean() * (1 - scores.mean()) / 400)
    assert low == pytest.approx(scores.mean() - 1.96 * error, abs=0.006)
    assert high == pytest.approx(scores.mean() + 1.96 * error, abs=0.006)
    assert estimate({"share": mean(scores)}, 400, 50, seed=3) == estimate({"share": mean(scores)}, 400, 50, seed=3)
    # Samples that always come together tell less: five copies of each leave the interval as wide.
    repeated = estimate({"share": mean(np.repeat(scores, 5), np.repeat(np.arange(400), 5))}, 400, resamples=2000)
    assert repeated["share_interval"] == pytest.approx(found["share_interval"])


def test_the_mean_over_classes_of_one_image_each_is_as_sure_as_the_mean():
    scores = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0] * 20
    both = {"plain": mean(scores), "classes": mean_per_class(scores, range(160))}
    found = estimate(both, 160, resamples=300)
    assert found["classes_interval"] == pytest.approx(found["plain_interval"])


def test_intervals_of_captions_hold_their_value():
    found = estimate(caption_statistics(WRITTEN * 10, REFERENCES * 10), 40, resamples=200)
    for name in ("cider", "bleu_4", "rouge_l"):
        low, high = found[f"{name}_interval"]
        assert low < found[name] < high
