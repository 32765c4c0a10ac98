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
VERSION = 6  # of the generator; cached data of another one are not used
SIZES = {"train": 30_000, "validation": 500, "test": 1000}  # scenes of each split
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
        statements: `second_image`, `sentence`, `sentence_vi` and `label`;
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
    return datasets.Dataset.from_generator(
        make_rows, features=features_of(config), cache_dir=str(cache_folder() / NAME),
        gen_kwargs={"numbers": list(range(number)), "config": config, "split": split, "seed": seed, "version": VERSION},
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
        "statements": {"second_image": datasets.Image(decode=False), "sentence": text, "sentence_vi": text,
                       "label": datasets.Value("bool")},
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


def statement_row(name: str, split: str, rng: random.Random) -> Iterator[dict]:
    """A statement about two scenes; half of the statements of each form are true."""
    form, label = rng.choice(FORMS), rng.random() < 0.5
    while True:
        left, right = make_scene(split, rng), make_scene(split, rng)
        said = statement(form, left, right, split, rng)
        if said.holds(left, right) == label:
            break
    yield {
        "image": drawn(left, rng), "second_image": drawn(right, rng), "sentence": said.text,
        "sentence_vi": said.text_vi, "label": label,
    }  # fmt: skip


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
    "statements": statement_row,
    "swaps": swap_rows,
}
