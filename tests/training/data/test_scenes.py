"""Tests of the scenes: what is said about them is true, and the splits do not share combinations."""

import io
import random
from collections import Counter

import pytest
from PIL import Image
from vlp.training.command_line import parse
from vlp.training.data.build import load_data
from vlp.training.data.scenes import is_scenes, load_scenes
from vlp.training.data.scenes.rows import MAKERS, make_rows, numbers_of
from vlp.training.data.scenes.texts import FORMS, NUMBERS, VIETNAMESE, questions, statement, swapped
from vlp.training.data.scenes.world import (
    COLOURS,
    INVERSE,
    LOOKS,
    SHAPES,
    SPLITS,
    direction,
    make_scene,
    split_of,
)

from vlp.errors import ArgumentError

PLACES = {"to the left of": "left", "to the right of": "right", "above": "above", "below": "below",
          "inside": "inside", "around": "around", "behind": "behind", "in front of": "front"}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))


def scenes(split: str, count: int):
    for number in range(count):
        rng = random.Random(f"{split} {number}")
        yield make_scene(split, rng), rng


def kinds_in(text: str) -> list[tuple[str, str]]:
    """The pairs of colour and shape that a text names."""
    words = text.replace("?", "").replace(",", "").split()
    return [(one, other) for one, other in zip(words, words[1:], strict=False) if one in COLOURS and other in SHAPES]


def test_no_split_shows_combinations_that_another_one_reserves():
    for split in SPLITS:
        seen = set()
        for scene, _ in scenes(split, 400):
            assert scene.first.split == split
            assert len({thing.kind for thing in scene.things}) == len(scene.things) >= 2
            seen |= {(thing.shape, thing.colour, thing.texture) for thing in scene.things}
        assert {split_of(*look) for look in seen} == {split, "train"}
        assert {look for look in LOOKS if split_of(*look) == split} <= seen


def test_every_pair_of_attributes_is_trained():
    reserved = {split: [look for look in LOOKS if split_of(*look) == split] for split in SPLITS}
    assert [len(reserved[split]) for split in SPLITS] == [126, 7, 14]
    for split, each in (("validation", 1), ("test", 2)):
        for place, names in enumerate((SHAPES, COLOURS)):
            assert Counter(look[place] for look in reserved[split]) == dict.fromkeys(names, each)
    for pair in ((0, 1), (0, 2), (1, 2)):
        shown = {(look[pair[0]], look[pair[1]]) for look in reserved["train"]}
        assert len(shown) == {(0, 1): 49, (0, 2): 21, (1, 2): 21}[pair]


def test_objects_lie_as_the_relation_says():
    found = Counter()
    for scene, _ in scenes("train", 200):
        one, other, relation = scene.first, scene.second, scene.relation
        found[relation] += 1
        if relation in ("left", "above"):
            assert direction(one, other) == relation and direction(other, one) == INVERSE[relation]
        elif relation == "inside":
            assert scene.things.index(one) > scene.things.index(other) and one.radius < other.radius / 2
        else:
            assert scene.things.index(one) < scene.things.index(other)
        assert scene.between(other, one) == INVERSE[relation]
        assert all(each.radius <= min(each.x, each.y, 1 - each.x, 1 - each.y) for each in scene.things)
    assert min(found.values()) > 20 and len(found) == 4


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_true(split):
    asked = Counter()
    for scene, rng in scenes(split, 150):
        for each in questions(scene, split, rng):
            named = kinds_in(each.question)
            asked[each.kind, each.answer] += 1
            if each.kind == "what":
                place = next(place for words, place in PLACES.items() if words in each.question)
                (answer,), (other,) = kinds_in(each.answer), named
                there = [one.kind for one in scene.things
                         if one.kind != other and scene.between(one, scene.find(*other)[0]) == place]  # fmt: skip
                assert there == [answer] and scene.find(*answer)[0].split == split
            elif each.kind == "colour":
                shape = next(word for word in each.question.replace("?", "").split() if word in SHAPES)
                more = [word for word in ("small", "large", "striped", "dotted") if word in each.question]
                same = [thing for thing in scene.find(shape=shape)
                        if all(word in (thing.size, thing.texture) for word in more)]  # fmt: skip
                assert [thing.colour for thing in same] == [each.answer]
            elif each.kind == "is there" and len(named) == 1:
                assert bool(scene.find(*named[0])) == (each.answer == "yes")
            elif each.kind == "is there":
                place = next(place for words, place in PLACES.items() if words in each.question)
                pairs = [(one, other) for one in scene.find(*named[0]) for other in scene.find(*named[1])]
                assert any(scene.between(*pair) == place for pair in pairs) == (each.answer == "yes")
            elif each.kind == "where":
                place = scene.between(*(scene.find(*kind)[0] for kind in named))
                assert place == each.answer.replace("in ", "")
            else:
                assert NUMBERS.index(each.answer) <= len(scene.things)
    said = {kind: sum(count for (name, _), count in asked.items() if name == kind) for kind, _ in asked}
    assert said.keys() == {"what", "colour", "how many", "is there", "where"}
    assert 0.4 < asked["is there", "yes"] / said["is there"] < 0.6


def test_counts_are_true():
    for scene, rng in scenes("train", 100):
        each = next(each for each in questions(scene, "train", rng) if each.kind == "how many")
        words = each.question.replace("?", "").split()
        colour = next((word for word in words if word in COLOURS), None)
        shape = next((shape for shape in SHAPES if {f"{shape}s", f"{shape}es"} & set(words)), None)
        assert NUMBERS[len(scene.find(colour, shape))] == each.answer


def test_statements_of_every_form_can_be_true_and_false():
    for form in FORMS:
        rng, found = random.Random(1), Counter()
        for _ in range(400):
            left, right = make_scene("test", rng), make_scene("test", rng)
            found[statement(form, left, right, "test", rng).holds(left, right)] += 1
        assert found[True] and found[False]
    rows = list(make_rows(list(range(100)), "statements", "test", 0, 1))
    labels, pairs = [row["label"] for row in rows], Counter(row["image_id"] for row in rows)
    assert 0.44 < sum(labels) / len(labels) < 0.56
    assert len(pairs) == 100 and 4 < len(rows) / 100 < len(FORMS)
    assert len({(row["image_id"], row["sentence"]) for row in rows}) == len(rows)
    texts = Counter((row["sentence"].split()[:4] == ["in", "the", "left", "picture,"], row["label"]) for row in rows)
    assert 0.6 < texts[True, True] / texts[True, False] < 1.6


def test_statements_are_judged_by_both_pictures():
    rng = random.Random(3)
    scene, other = make_scene("test", rng), make_scene("test", rng)
    more = next(form for form in FORMS if getattr(form, "__name__", "") == "state_more")
    said = more(scene.first, scene, random.Random(0))
    counts = len(scene.things), len(other.things)
    assert said.holds(scene, scene) is False
    assert {said.holds(scene, other), said.holds(other, scene)} == {counts[0] != counts[1], False}


def test_swapped_captions_have_the_same_words_and_are_false():
    for row in make_rows(list(range(80)), "swaps", "test", 0, 1):
        for true, wrong in ((row["caption"], row["wrong"]), (row["caption_vi"], row["wrong_vi"])):
            assert true != wrong
            assert Counter(word for word in true.split() if word not in ("a", "an")) == Counter(
                word for word in wrong.split() if word not in ("a", "an")
            )
    for scene, _ in scenes("test", 80):
        if (false := swapped(scene, "colours")) is not None:
            assert not scene.find(*false[0]) and not scene.find(*false[2])


@pytest.mark.parametrize("config", MAKERS)
def test_rows_depend_on_number_split_and_seed_alone(config):
    first = list(make_rows([0, 1, 2], config, "train", 0, 1))
    assert first[-1] == list(make_rows([2], config, "train", 0, 1))[-1]
    assert first != list(make_rows([0, 1, 2], config, "train", 1, 1))
    assert first != list(make_rows([0, 1, 2], config, "test", 0, 1))


@pytest.mark.parametrize("config", MAKERS)
def test_scenes_are_a_data_set(config):
    rows = load_scenes("scenes:6", config, "train")
    if config == "captions":
        assert len(rows) == 6
    else:  # two scenes make a pair; a scene may have no swap
        shown = len(set(rows["image_id"]))
        assert shown == {"questions": 6, "statements": 3}.get(config, shown) and 0 < shown <= len(rows)
    for row in rows:
        with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
            assert image.size == (96, 96) and image.format == "JPEG"
    assert load_scenes("scenes:6", config, "train")[0] == rows[0]


def test_vietnamese_has_a_word_for_everything():
    for row in make_rows(list(range(30)), "captions", "train", 0, 1):
        texts = " ".join(row["caption_vi"] + row["description_vi"] + row["answered_vi"])
        words = texts.replace("?", "").replace(",", "").split()
        assert not {*SHAPES, *COLOURS, *PLACES, *PLACES.values()} & set(words)
    assert {*SHAPES, *COLOURS, *INVERSE} <= VIETNAMESE.keys()


def test_names_of_scenes():
    assert is_scenes("scenes") and is_scenes("scenes:10") and not is_scenes("scenes.csv")
    assert numbers_of("scenes:10:3", "train", "--dataset_name") == (10, 3)
    assert numbers_of("scenes:10:3", "test", "--dataset_name") == (1000, 3)  # only the training split has any number
    for name in ("scenes:", "scenes:0", "scenes:x", "scenes:1:2:3", "scenes:-1", "scenes:99999999999"):
        with pytest.raises(ArgumentError, match="--dataset_name scenes:"):
            load_scenes(name, None, "train")
    with pytest.raises(ArgumentError, match="no split 'dev'; its splits are train, validation, test"):
        load_scenes("scenes", None, "dev")
    with pytest.raises(ArgumentError, match="--dataset_config_name vqa: scenes has captions, questions, statements"):
        load_scenes("scenes", "vqa", "train")


def test_recipes_for_scenes_can_be_used_for_other_data():
    own = parse(["--config", "blip-scenes-vqa", "--dataset_name", "scenes:50"], "blip")
    assert (own.dataset_config_name, own.caption_column, own.eval_split) == ("questions", "question", "test")
    other = parse(["--config", "blip-scenes-vqa", "--dataset_name", "pairs.csv"], "blip")
    assert (other.dataset_config_name, other.caption_column, other.eval_split) == (None, "caption", None)


def test_scenes_are_not_streamed():
    given = parse(["--dataset_name", "scenes", "--streaming", "--tokenizer_name", "x"], "clip")
    with pytest.raises(ArgumentError, match="drawn once and cached"):
        load_data(given)
