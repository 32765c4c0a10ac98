"""Tests of the metrics and their bootstrap intervals on small hand-made cases."""

import math

import evaluate
import numpy as np
import pytest
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from vlp.training.evaluation.metrics import FOLDER, NAMES, load
from vlp.training.evaluation.scores import caption_statistics, estimate, mean, mean_per_class, plain_answer, words

PREDICTIONS = ["a cat sits on the mat", "two dogs run in the park", "a red rocket", "nothing at all"]
REFERENCES = [
    ["a cat sits on a mat", "there is a cat on the mat"],
    ["two dogs are running in a park", "dogs run in the park on a sunny day"],
    ["a red rocket flies", "the rocket is red"],
    ["a bowl of soup", "some soup with bread"],
]


def test_metrics_load_offline_by_name_and_path():
    assert NAMES == [
        "caption_scores", "composition_accuracy", "itm_accuracy", "nlvr_accuracy", "recall_at_k", "vqa_accuracy",
        "zero_shot_accuracy",
    ]  # fmt: skip
    for name in NAMES:
        assert isinstance(load(name), evaluate.Metric)
    assert evaluate.load(str(FOLDER / "recall_at_k.py")).compute(predictions=[[1]], references=[[1]], k=[1]) == {
        "recall_at_1": 1.0
    }
    with pytest.raises(ValueError, match="no metric 'bleu'; the metrics are caption_scores"):
        load("bleu")


def test_recall_at_k_with_several_correct_answers():
    metric = load("recall_at_k")
    predictions = [[3, 1, 2], [0, 1, 2], [5, 4, 0], [1, 2, 3]]
    references = [[1, 9], [0, 1], [0], [7]]
    assert metric.compute(predictions=predictions, references=references, k=[1, 2, 3]) == {
        "recall_at_1": 0.25, "recall_at_2": 0.5, "recall_at_3": 0.75,
    }  # fmt: skip


def test_zero_shot_accuracy_with_unbalanced_classes():
    metric = load("zero_shot_accuracy")
    # Three images of class 0, all correct; one of class 2, wrong; none of class 1.
    predictions, references = [[0, 1], [0, 2], [0, 1], [1, 2]], [0, 0, 0, 2]
    assert metric.compute(predictions=predictions, references=references, k=[1, 2]) == {
        "zero_shot_top1": 0.75, "zero_shot_top2": 1.0, "zero_shot_mean_per_class": 0.5,
    }  # fmt: skip


def test_itm_accuracy():
    found = load("itm_accuracy").compute(predictions=[1, 1, 0, 1, 0, 0], references=[1, 1, 1, 0, 0, 0])
    assert found == {
        "itm_accuracy": pytest.approx(4 / 6),
        "itm_accuracy_matched": pytest.approx(2 / 3),
        "itm_accuracy_unmatched": pytest.approx(2 / 3),
    }


def test_caption_scores_match_pycocoevalcap():
    found = load("caption_scores").compute(predictions=PREDICTIONS, references=REFERENCES)
    scorer = BleuScorer(n=4)
    for text, references in zip(PREDICTIONS, REFERENCES, strict=True):
        scorer += (text, references)
    for order, value in enumerate(scorer.compute_score(option="closest", verbose=0)[0], start=1):
        assert found[f"bleu_{order}"] == pytest.approx(value, rel=1e-6)
    # ROUGE-L of "a red rocket" by hand: the longest common subsequence is 3 of 3 predicted and of 4 reference words.
    single = load("caption_scores").compute(predictions=["a red rocket"], references=[["a red rocket flies"]])
    precision, recall, beta = 1.0, 3 / 4, 1.2
    assert single["rouge_l"] == pytest.approx((1 + beta**2) * precision * recall / (recall + beta**2 * precision))
    assert found["caption_exact"] == 0.0 and 0 < found["cider"] < 10


def test_perfect_captions_get_perfect_scores():
    texts = ["a cat sits on the mat", "two dogs run in the park", "a red rocket flies away"]
    found = load("caption_scores").compute(
        predictions=[t.upper() + "." for t in texts], references=[[t] for t in texts]
    )
    assert found["cider"] == pytest.approx(10.0)
    for name in ("bleu_1", "bleu_4", "rouge_l", "caption_exact"):
        assert found[name] == pytest.approx(1.0), name


def test_caption_tokenisation():
    assert words('A man, "red"  don\'t well-known 3.5 (x)…') == "a man red don't well-known 3.5 x"
    assert words("Mặt cười, MẮT to!") == "mặt cười mắt to"


def test_vqa_accuracy():
    metric = load("vqa_accuracy")
    references = [["red"] * 10, ["2"] * 3 + ["three"] * 7, ["yes"], ["dont know"] * 10]
    found = metric.compute(predictions=["The Red.", "two", "no", "don't know"], references=references)
    assert found == {"vqa_accuracy": pytest.approx((1 + (3 * 2 / 3 + 7) / 10 + 0 + 1) / 4)}
    assert plain_answer("1,000 x-ray, an 3.5 Apples.") == "1000 x ray 3.5 apples"


def test_bootstrap_intervals():
    rng = np.random.default_rng(1)
    scores = (rng.random(400) < 0.3).astype(float)
    found = estimate({"share": mean(scores)}, 400, resamples=2000)
    low, high = found["share_interval"]
    error = math.sqrt(scores.mean() * (1 - scores.mean()) / 400)
    assert low == pytest.approx(scores.mean() - 1.96 * error, abs=0.006)
    assert high == pytest.approx(scores.mean() + 1.96 * error, abs=0.006)
    assert estimate({"share": mean(scores)}, 400, 50, seed=3) == estimate({"share": mean(scores)}, 400, 50, seed=3)
    # Copies of a sample that are always resampled together do not narrow the interval.
    repeated = estimate({"share": mean(np.repeat(scores, 5), np.repeat(np.arange(400), 5))}, 400, resamples=2000)
    assert repeated["share_interval"] == pytest.approx(found["share_interval"])


def test_mean_per_class_with_one_image_per_class_has_interval_of_mean():
    scores = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0] * 20
    both = {"plain": mean(scores), "classes": mean_per_class(scores, range(160))}
    found = estimate(both, 160, resamples=300)
    assert found["classes_interval"] == pytest.approx(found["plain_interval"])


def test_caption_intervals_contain_their_value():
    found = estimate(caption_statistics(PREDICTIONS * 10, REFERENCES * 10), 40, resamples=200)
    for name in ("cider", "bleu_4", "rouge_l"):
        low, high = found[f"{name}_interval"]
        assert low < found[name] < high


def test_many_resamples_at_once_give_what_one_at_a_time_gives(monkeypatch):
    statistics = caption_statistics(PREDICTIONS * 3, REFERENCES * 3)
    units = len(PREDICTIONS) * 3
    statistics |= {"grouped": mean(np.arange(units) % 3, np.arange(units) // 2),
                   "classes": mean_per_class(np.arange(units) % 2, np.arange(units) % 5)}  # fmt: skip
    together = estimate(statistics, units, resamples=60, seed=1)
    monkeypatch.setattr("vlp.training.evaluation.scores.PART", 1)
    alone = estimate(statistics, units, resamples=60, seed=1)
    assert together.keys() == alone.keys()
    for name, value in together.items():
        assert value == pytest.approx(alone[name], rel=1e-12), name


def test_equal_scores_of_captions_count_as_chance():
    metric = load("composition_accuracy")
    found = metric.compute(predictions=[0.5, 0.1, 0.3, 0.2], references=[0.4, 0.2, 0.3, 0.1], groups=[0, 0, 1, 2])
    assert found == {"composition_accuracy": 0.625}
