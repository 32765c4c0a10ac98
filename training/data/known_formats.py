"""Read JSON in the formats of public data sets: COCO, Karpathy's splits, VQAv2, NLVR2, LLaVA."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ...errors import ArgumentError, printable
from .delimited import IMAGE_NAMES, is_picture

EXPECTED = "rows with an image and a caption, or the files of COCO, Karpathy, VQAv2, NLVR2 or LLaVA"
Layout = Callable[[str], str]  # from the name of a picture to a path below the folder of pictures


def read_json(text: str, split: str, path: Path) -> list[dict]:
    """Read the rows of a JSON or JSON Lines file.

    Args:
        text: content of the file.
        split: the split to read, of the formats that have splits.
        path: the file, for error messages, and to find files that belong to it.

    Returns:
        The rows. Formats with splits give those of the split alone.

    Raises:
        ArgumentError: if the file has no pairs, or has no such split.
        ValueError: if it is not JSON.
    """
    rows = content_of_json(text, path)
    if isinstance(rows, dict):
        rows = rows_of_object(rows, split, path)
    if not isinstance(rows, list):
        raise ValueError(f"it is {printable(repr(rows), 40)}")
    if rows and all(isinstance(row, dict) for row in rows):
        if isinstance(rows[0].get("conversations", rows[0].get("messages")), list):
            return [turn for row in rows for turn in conversation_rows(row)]
        if "sentence" in rows[0] and "identifier" in rows[0] and "image" not in rows[0]:
            return list(nlvr_rows(rows, path))
    return rows


def content_of_json(text: str, path: Path) -> object:
    """The content of JSON, or of JSON Lines as a list, which may be in a file named .json."""
    if ".json" in Path(path.name.lower().removesuffix(".gz")).suffixes[-1:]:
        try:
            return json.loads(text)
        except ValueError as error:
            if "Extra data" not in str(error):
                raise
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def rows_of_object(content: dict, split: str, path: Path) -> list | object:
    """The rows of a JSON object; the object itself if it has none."""
    if "questions" in content or ("annotations" in content and "images" not in content):
        return list(vqa_rows(content, path))
    if "images" in content:
        return list(coco_or_karpathy_rows(content, split, path))
    values = list(content.values())
    if any(name in content for name in IMAGE_NAMES) and not isinstance(values[0], (list, dict)):
        return [content]  # JSON Lines of one line
    if len(values) == 1 and isinstance(values[0], list):
        return values[0]
    if values and all(is_picture(str(name)) for name in content):  # the captions of each picture
        return [{"image": name, "caption": captions} for name, captions in content.items()]
    if values and all(isinstance(value, list) and len(value) == len(values[0]) for value in values):
        return [dict(zip(content, row, strict=True)) for row in zip(*values, strict=True)]
    if values and all(isinstance(value, dict) for value in values):
        if all(list(value) == list(values[0]) for value in values) and "0" in values[0]:  # pandas' to_json
            return [{name: column[key] for name, column in content.items()} for key in values[0]]
        return values
    raise ArgumentError(f"{printable(path, 160)}: expected {EXPECTED}, in a list or in an object with a list `images`.")


def coco_or_karpathy_rows(content: dict, split: str, path: Path) -> Iterator[dict]:
    """Read COCO's captions_*.json (images, annotations) or Karpathy's dataset_*.json (images with sentences).

    Args:
        content: the parsed JSON.
        split: the split to read (Karpathy only; images without a split match any).
        path: the file, for error messages.

    Returns:
        An iterator over rows with image, caption (a list), image_id, and in Karpathy's files split.

    Raises:
        ArgumentError: if there is no list `images`, or no image of the split.
    """
    images = content.get("images")
    if not isinstance(images, list):
        raise ArgumentError(
            f"{path}: expected a list of rows, or an object with a list `images`, as in COCO's and Karpathy's files."
        )
    if "annotations" in content:
        captions: dict = {}
        for annotation in content["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
        for image in images:
            if image["id"] in captions:
                yield {"image": image["file_name"], "caption": captions[image["id"]], "image_id": str(image["id"])}
        return
    # Karpathy's "restval" images are training images, as is usual with these splits.
    splits = ["train" if image.get("split") == "restval" else image.get("split", split) for image in images]
    if images and split not in splits:
        known = ", ".join(sorted(set(map(str, splits))))
        raise ArgumentError(f"{printable(path, 160)} has no split {split!r}; its splits are {printable(known, 160)}.")
    for image, image_split in zip(images, splits, strict=True):
        if image_split == split:
            name = str(Path(image.get("filepath", "")) / image["filename"])
            captions = [sentence["raw"] for sentence in image["sentences"]]
            row = {"image": name, "caption": captions, "image_id": str(image.get("cocoid", image.get("imgid", name)))}
            yield row | ({"split": split} if "split" in image else {})


# --- VQAv2 ------------------------------------------------------------------------------------------------------------


def vqa_rows(content: dict, path: Path) -> Iterator[dict]:
    """Join VQAv2's questions with their annotations, which are in another file of the same folder.

    Args:
        content: the parsed JSON of either file.
        path: that file.

    Returns:
        An iterator over rows with image, question, answers (a list, if there are annotations), image_id, question_id.

    Raises:
        ArgumentError: if the other file is not there.
    """
    has_questions = "questions" in content
    other = other_half(path, has_questions)
    if other is None and not has_questions:
        raise ArgumentError(
            f"{printable(path, 160)} has answers, but not their questions: put the file of the questions, such as "
            "v2_OpenEnded_mscoco_val2014_questions.json, into the same folder."
        )
    theirs = json.loads(other.read_text(encoding="utf-8-sig")) if other else {}
    questions, annotations = (content, theirs) if has_questions else (theirs, content)
    answers = {each["question_id"]: each for each in annotations.get("annotations", [])}
    subset = str(questions.get("data_subtype") or annotations.get("data_subtype") or "")
    for question in questions["questions"]:
        known = answers.get(question["question_id"], {})
        number = question["image_id"]
        is_number = isinstance(number, int) and subset
        name = f"COCO_{subset}_{number:012d}.jpg" if is_number else str(question.get("image", number))
        row = {"image": name, "question": question["question"], "image_id": str(number),
               "question_id": str(question["question_id"])}  # fmt: skip
        yield row | ({"answers": known.get("answers") or [known.get("multiple_choice_answer")]} if known else {})


def other_half(path: Path, has_questions: bool) -> Path | None:
    """The file of annotations that belongs to one of questions, or the other way round; None if there is none."""
    subset = re.search(r"(train|val|test)[-_a-z]*\d*", path.name)
    word = "annotation" if has_questions else "question"
    found = [
        each for each in sorted(path.parent.glob("*.json"))
        if each != path and word in each.name.lower() and (not subset or subset[0].split("_")[0] in each.name)
    ]  # fmt: skip
    return found[0] if found else None


# --- NLVR2 and LLaVA --------------------------------------------------------------------------------------------------


def nlvr_rows(rows: list[dict], path: Path) -> Iterator[dict]:
    """Name the two pictures of each row of NLVR2's files, as its authors distribute them.

    The identifier "dev-850-0-1" stands for the pictures dev-850-0-img0.png and dev-850-0-img1.png; those of the
    training data are in numbered folders.
    """
    for row in rows:
        stem = str(row["identifier"]).rsplit("-", 1)[0]
        folder = f"{row['directory']}/" if row.get("directory") is not None else ""
        left, right = (f"{folder}{stem}-img{side}.png" for side in (0, 1))
        yield {"image": left, "second_image": right, "caption": row["sentence"], "label": row.get("label"),
               "identifier": row["identifier"]}  # fmt: skip


def conversation_rows(row: dict) -> Iterator[dict]:
    """One row for each question and answer of a conversation about a picture, in the format of LLaVA or of messages.

    Returns:
        An iterator over rows with image, question, answers (a list of one), caption (the answer), image_id, and history
        (the questions and answers before it, in turn).
    """
    turns = row.get("conversations", row.get("messages")) or []
    if turns and turns[0].get("role", turns[0].get("from")) == "system":
        turns = turns[1:]
    said = [re.sub(r"\s*<image>\s*", " ", text_of_turn(turn)).strip() for turn in turns]
    for number in range(0, len(said) - 1, 2):
        question, answer = said[number : number + 2]
        yield {"image": row.get("image"), "question": question, "answers": [answer], "caption": answer,
               "image_id": str(row.get("image")), "history": said[:number]}  # fmt: skip


def text_of_turn(turn: dict) -> str:
    """What was said in a turn: LLaVA's `value`, or the `content` of a message, a text or a list of parts."""
    content = turn.get("value", turn.get("content", ""))
    if isinstance(content, list):
        return " ".join(str(part["text"]) for part in content if isinstance(part, dict) and part.get("text"))
    return str(content)


# --- where the pictures are -------------------------------------------------------------------------------------------


def layouts(name: str, split: str) -> list[str]:
    """The paths below the folder of pictures where a picture of these data sets may be, the likeliest first."""
    folders = ["", "images", "Images", "imgs", "img", split, f"images/{split}", f"images/{split}2014"]
    if match := re.match(r"(?:.*/)?COCO_(\w+)_\d+\.", name):
        folders = ["", match[1], f"images/{match[1]}", *folders[1:]]
    if match := re.match(r"(?:.*/)?(train|dev|test1|test2)-\d+-", name):
        folders = ["", match[1], f"images/{match[1]}", *folders[1:]]
    return [f"{folder}/{name}" if folder else name for folder in dict.fromkeys(folders)]
