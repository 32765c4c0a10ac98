"""The scenes as data sets: one row for each scene, question, statement or pair of a true and a false caption."""

import random
from collections.abc import Iterator

import datasets

from ....errors import ArgumentError, printable
from ....files import cache_folder
from ...machine.hardware import cpu_cores
from .drawing import draw_scene, jpeg
from .texts import CAPTIONS, FORMS, LANGUAGES, caption, captions, description, questions, statement, swapped
from .world import SPLITS, Scene, make_scene

NAME = "scenes"
# Versions of the configurations; cached data of another one are not used.
VERSIONS = {"captions": 6, "questions": 6, "statements": 7, "swaps": 6}
SIZES = {"train": 30_000, "validation": 500, "test": 1000}  # scenes of each split, or half as many pairs of scenes
TRIES = 8  # statements of a form that are drawn to find a true and a false one
MOST = 10_000_000
MANY = 5000  # from this number on, processes share the work


def load_scenes(name: str, config: str | None, split: str, option: str = "--dataset_name") -> datasets.Dataset:
    """Make a data set of scenes, or load it from the cache folder.

    Args:
        name: `scenes`, `scenes:NUMBER` for another number of training scenes, or `scenes:NUMBER:SEED`.
        config: captions (the default), questions, statements or swaps.
        split: train, validation or test: combinations of shape, colour and texture of the last two are not in the
            first.
        option: the option that names the data, for error messages.

    Returns:
        Rows with `image` (bytes), and for
        captions: the lists `caption`, `description` and `answered` (questions followed by their answers), and
            `caption_vi`, `description_vi` and `answered_vi`;
        questions: `question`, `answers`, `question_vi`, `answers_vi`, `kind`, and the `image_id` of the scene;
        statements: `second_image`, `sentence`, `sentence_vi`, `label`, and the `image_id` of the pair of scenes;
        swaps: `caption`, `caption_vi` and, of the same words, `wrong` and `wrong_vi`, and `kind`.

    Raises:
        ArgumentError: if there is no such split or configuration, or the number or the seed is none.
    """
    config = config or "captions"
    if split not in SPLITS:
        raise ArgumentError(f"{option} {NAME} has no split {split!r}; its splits are {', '.join(SPLITS)}.")
    if config not in MAKERS:
        raise ArgumentError(f"--dataset_config_name {printable(config, 60)}: {NAME} has {', '.join(MAKERS)}.")
    number, seed = numbers_of(name, split, option)
    numbers = list(range(max(1, number // 2) if config == "statements" else number))
    return datasets.Dataset.from_generator(
        make_rows, features=features_of(config), cache_dir=str(cache_folder() / NAME),
        gen_kwargs={"numbers": numbers, "config": config, "split": split, "seed": seed, "version": VERSIONS[config]},
        split=split, num_proc=min(cpu_cores(), 8) if number >= MANY else None,
    )  # fmt: skip


def is_scenes(name: str) -> bool:
    """Whether the name of a data set stands for scenes."""
    return name == NAME or name.startswith(f"{NAME}:")


def numbers_of(name: str, split: str, option: str) -> tuple[int, int]:
    """The number of scenes and the seed in a name. Raises ArgumentError if they are no such numbers."""
    parts = name.split(":")[1:]
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise ArgumentError(
            f"{option} {printable(name, 60)} must be {NAME}, {NAME}:NUMBER or {NAME}:NUMBER:SEED, such as {NAME}:5000."
        )
    number, seed = int(parts[0]) if parts and split == "train" else SIZES[split], int([*parts, 0, 0][1])
    if not 1 <= number <= MOST:
        raise ArgumentError(f"{option} {printable(name, 60)}: the number of scenes must be from 1 to {MOST:,}.")
    return number, seed


def features_of(config: str) -> datasets.Features:
    """The columns of a configuration."""
    text, texts = datasets.Value("string"), datasets.List(datasets.Value("string"))
    columns = {
        "captions": {name: texts for name in ("caption", "caption_vi", "description", "description_vi", "answered",
                                              "answered_vi")},
        "questions": {"image_id": text, "question": text, "answers": texts, "question_vi": text, "answers_vi": texts,
                      "kind": text},
        "statements": {"second_image": datasets.Image(decode=False), "image_id": text, "sentence": text,
                       "sentence_vi": text, "label": datasets.Value("bool")},
        "swaps": {"image_id": text, "caption": text, "caption_vi": text, "wrong": text, "wrong_vi": text, "kind": text},
    }  # fmt: skip
    return datasets.Features({"image": datasets.Image(decode=False)} | columns[config])


def make_rows(numbers: list[int], config: str, split: str, seed: int, version: int) -> Iterator[dict]:
    """The rows of scenes, given by their numbers. Each depends on its number, the split and the seed alone."""
    for number in numbers:
        rng = random.Random(f"{version} {seed} {split} {number} {config}")
        yield from MAKERS[config](f"{split}-{seed}-{number}", split, rng)


def drawn(scene: Scene, rng: random.Random) -> dict:
    """A picture of a scene as a cell of an image column."""
    return {"bytes": jpeg(draw_scene(scene, rng), rng), "path": None}


def caption_row(name: str, split: str, rng: random.Random) -> Iterator[dict]:
    """A scene with captions of its two main objects, descriptions of all of them, and questions with their answers."""
    scene = make_scene(split, rng)
    row: dict = {"image": drawn(scene, rng)}
    for language, ending in zip(LANGUAGES, ("", "_vi"), strict=True):
        row[f"caption{ending}"] = captions(scene, language, 2, rng)
        row[f"description{ending}"] = [description(scene, language, first, rng) for first in (True, False)]
    asked = rng.sample(questions(scene, split, rng), 2)
    row["answered"] = [f"{each.question} {each.answer}" for each in asked]
    row["answered_vi"] = [f"{each.question_vi} {each.answer_vi}" for each in asked]
    yield row


def question_rows(name: str, split: str, rng: random.Random) -> Iterator[dict]:
    """The questions about a scene."""
    scene = make_scene(split, rng)
    picture = drawn(scene, rng)
    for each in questions(scene, split, rng):
        yield {
            "image": picture, "image_id": name, "kind": each.kind, "question": each.question,
            "answers": [each.answer], "question_vi": each.question_vi, "answers_vi": [each.answer_vi],
        }  # fmt: skip


def statement_rows(name: str, split: str, rng: random.Random) -> Iterator[dict]:
    """Statements about two scenes, one of each of FORMS at most; half of those of each form are true.

    The scenes are drawn for the first statement. Of the other forms, only those are used of which there are both true
    and false statements about these scenes.
    """
    first, label = rng.choice(FORMS), rng.random() < 0.5
    while True:
        left, right = make_scene(split, rng), make_scene(split, rng)
        said = statement(first, left, right, split, rng)
        if said.holds(left, right) == label:
            break
    found = {said.text: (said, label)}
    for form in FORMS:
        if form is first:
            continue
        drawn_ones = [statement(form, left, right, split, rng) for _ in range(TRIES)]
        by_label = {each.holds(left, right): each for each in drawn_ones}
        if len(by_label) == 2:
            label = rng.random() < 0.5
            found.setdefault(by_label[label].text, (by_label[label], label))
    pictures = {"image": drawn(left, rng), "second_image": drawn(right, rng), "image_id": name}
    for said, label in found.values():
        yield pictures | {"sentence": said.text, "sentence_vi": said.text_vi, "label": label}


def swap_rows(name: str, split: str, rng: random.Random) -> Iterator[dict]:
    """The true caption of a scene and, for each kind of swap, a false one of the same words."""
    scene = make_scene(split, rng)
    picture, number = drawn(scene, rng), rng.randrange(4)
    wordings = [CAPTIONS[language][number % len(CAPTIONS[language])] for language in LANGUAGES]
    true = (scene.first.kind, scene.relation, scene.second.kind)
    for kind in ("colours", "order"):
        if (false := swapped(scene, kind)) is None:
            continue
        texts = [caption(*facts, language, wording) for facts in (true, false)
                 for language, wording in zip(LANGUAGES, wordings, strict=True)]  # fmt: skip
        yield {
            "image": picture, "image_id": name, "caption": texts[0], "caption_vi": texts[1],
            "wrong": texts[2], "wrong_vi": texts[3], "kind": kind,
        }  # fmt: skip


MAKERS = {
    "captions": caption_row,
    "questions": question_rows,
    "statements": statement_rows,
    "swaps": swap_rows,
}
