"""Data as other people write it: each form is read as it is, every row arrives, or is refused with what to do."""

import gzip
import io
import json
from collections import Counter

import datasets
import pytest
from PIL import Image
from vlp.training.data.rows import BadRow, answers_of, captions_of, picture_of, root_of, texts_of, unusable
from vlp.training.data.sources import load_rows

from vlp.errors import ArgumentError

NAMES = ["1000268201_693b08cb0e.jpg", "1001773457_577c3a7d70.jpg", "1002674143_1b742ab4b8.jpg"]
TEXTS = ["A child in a pink dress .", "A black dog, and a spotted dog", 'A girl 5" tall; "painting"']
COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]


def picture(colour) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    for name, colour in zip(NAMES, COLOURS, strict=True):
        (tmp_path / name).write_bytes(picture(colour))
    return tmp_path


def check(rows, captions=TEXTS, images=COLOURS) -> None:
    """Check that the rows have these captions (a text, or a list) and pictures."""
    assert [texts_of(value) for value in rows["caption"]] == [texts_of(value) for value in captions]
    assert [picture_of(row, "image").convert("RGB").getpixel((0, 0)) for row in rows] == images


def load(path, split="train", **options):
    return load_rows(str(path), split, "image", **options)


# --- CSV and TSV ------------------------------------------------------------------------------------------------------

QUOTED = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
TABLES = {
    "commas.csv": "\n".join(["image,caption", *(f"{n},{q}" for n, q in zip(NAMES, QUOTED, strict=True))]),
    "semicolons.csv": "\n".join(["image;caption", *(f"{n};{q}" for n, q in zip(NAMES, QUOTED, strict=True))]),
    "tabs.csv": "\n".join(["filepath\ttitle", *(f"{n}\t{t}" for n, t in zip(NAMES, TEXTS, strict=True))]),
    "bars.csv": "\n".join(  # Flickr30k on Kaggle
        ["image_name| comment_number| comment", *(f"{n}| 0| {t}" for n, t in zip(NAMES, TEXTS, strict=True))]
    ),
    "captions.txt": "\n".join(["image,caption", *(f"{n},{q}" for n, q in zip(NAMES, QUOTED, strict=True))]),
    "Flickr8k.token.txt": "\n".join(f"{n}#0\t{t}" for n, t in zip(NAMES, TEXTS, strict=True)),
    "results_20130124.token": "\n".join(f"{n}#0\t{t}" for n, t in zip(NAMES, TEXTS, strict=True)),
    "conceptual.tsv": "\n".join(f"{t}\t{n}" for n, t in zip(NAMES, TEXTS, strict=True)),
    "crlf.CSV": "\r\n".join(["Image,Caption", *(f"{n},{q}" for n, q in zip(NAMES, QUOTED, strict=True)), ""]),
    "excel.csv": "\n".join(["image,caption,,", *(f"{n},{q},," for n, q in zip(NAMES, QUOTED, strict=True))]),
    "unquoted.csv": "\n".join(["image,caption", *(f"{n},{t}" for n, t in zip(NAMES, TEXTS, strict=True))]),
    "unquoted-first.csv": "\n".join(["caption,image", *(f"{t},{n}" for n, t in zip(NAMES, TEXTS, strict=True))]),
    "unquoted-middle.csv": "\n".join(
        ["image,caption,source", *(f"{n},{t},web" for n, t in zip(NAMES, TEXTS, strict=True))]
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(folder, name):
    (folder / name).write_text(TABLES[name], encoding="utf-8", newline="")
    check(load(folder / name))


def test_compressed_tables(folder):
    (folder / "table.csv.gz").write_bytes(gzip.compress(TABLES["commas.csv"].encode()))
    (folder / "rows.jsonl.gz").write_bytes(
        gzip.compress(
            "\n".join(json.dumps({"image": n, "caption": t}) for n, t in zip(NAMES, TEXTS, strict=True)).encode()
        )
    )
    check(load(folder / "table.csv.gz"))
    check(load(folder / "rows.jsonl.gz"))


@pytest.mark.parametrize(
    ("lines", "captions"),
    [
        (['"an open quote', "b", "c"], ['"an open quote', "b", "c"]),
        (["a", '"an open quote', 'and one that ends"'], ["a", '"an open quote', 'and one that ends"']),
        (['12" wide', '"quoted, rightly"', 'half "of it'], ['12" wide', "quoted, rightly", 'half "of it']),
        (['"right" and wrong', "b", '"c"'], ['"right" and wrong', "b", "c"]),
        (['"two\nlines, rightly"', "b", "c"], ["two\nlines, rightly", "b", "c"]),
    ],
)
def test_every_row_arrives_whatever_the_quotes(folder, lines, captions):
    rows = [f"{name},{line}" for name, line in zip(NAMES, lines, strict=True)]
    (folder / "table.csv").write_text("\n".join(["image,caption", *rows]))
    check(load(folder / "table.csv"), captions)


def test_a_stray_quote_in_a_long_table_costs_no_row(folder):
    rows = [f"{NAMES[n % 3]},caption {n}" for n in range(20_000)]
    rows[10] = f'{NAMES[1]},"caption 10'
    (folder / "table.csv").write_text("\n".join(["image,caption", *rows]))
    found = load(folder / "table.csv")
    assert (
        len(found) == 20_000 and found[10]["caption"] == '"caption 10' and found[19_999]["caption"] == "caption 19999"
    )


def test_rows_with_missing_fields_are_counted(folder):
    (folder / "table.csv").write_text(f"image,caption\n{NAMES[0]},a\n{NAMES[1]}\n{NAMES[2]},c")
    assert load(folder / "table.csv")["caption"] == ["a", None, "c"]


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-16-le"])
def test_encodings_are_named_in_the_error_and_read_with_the_option(folder, encoding):
    captions = ["café", "naïve", "Müller"]
    text = "\n".join(["image,caption", *(f"{n},{t}" for n, t in zip(NAMES, captions, strict=True))])
    (folder / "table.csv").write_text(text, encoding=encoding)
    check(load(folder / "table.csv", encoding=encoding), captions)
    if encoding != "utf-16-le":  # which is valid UTF-8 as long as it is ASCII
        with pytest.raises(ArgumentError, match="not encoded in UTF-8.*--encoding.*cp1252"):
            load(folder / "table.csv")
    with pytest.raises(ArgumentError, match="--encoding klingon is not known"):
        load(folder / "table.csv", encoding="klingon")


def test_byte_order_marks_are_recognised(folder):
    for encoding in ("utf-16", "utf-8-sig", "utf-32"):
        (folder / "table.csv").write_text(TABLES["commas.csv"], encoding=encoding)
        check(load(folder / "table.csv"))


def test_na_and_null_are_captions_and_saved_lists_are_lists(folder):
    (folder / "na.csv").write_text(
        "image,caption\n" + "\n".join(f"{n},{t}" for n, t in zip(NAMES, ["NA", "null", "None"], strict=True))
    )
    check(load(folder / "na.csv"), ["NA", "null", "None"])
    cells = ["\"['one', 'it''s two']\"".replace("''", "\\'"), '"[""one, two"", ""three""]"', "\"['one'\n 'two']\""]
    (folder / "lists.csv").write_text(
        "image,caption\n" + "\n".join(f"{n},{c}" for n, c in zip(NAMES, cells, strict=True))
    )
    check(load(folder / "lists.csv"), [["one", "it's two"], ["one, two", "three"], ["one", "two"]])


def test_several_files(folder):
    for number, (name, text) in enumerate(zip(NAMES, TEXTS, strict=True)):
        (folder / f"part-{number}.jsonl").write_text(json.dumps({"image": name, "caption": text}))
    check(load(folder / "part-*.jsonl"))
    check(load("::".join(str(folder / f"part-{number}.jsonl") for number in range(3))))
    with pytest.raises(ArgumentError, match="no file matches this pattern"):
        load(folder / "other-*.csv")
    with pytest.raises(ArgumentError, match="part-7.jsonl is not a file"):
        load(f"{folder}/part-0.jsonl::{folder}/part-7.jsonl")


# --- JSON -------------------------------------------------------------------------------------------------------------

ROWS = [{"image": name, "caption": text} for name, text in zip(NAMES, TEXTS, strict=True)]


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(map(json.dumps, ROWS)),
        json.dumps({"data": ROWS}),
        json.dumps({"image": NAMES, "caption": TEXTS}),
        json.dumps({key: {str(n): row[key] for n, row in enumerate(ROWS)} for key in ("image", "caption")}),
        json.dumps({str(n): row for n, row in enumerate(ROWS)}),
        json.dumps(dict(zip(NAMES, TEXTS, strict=True))),
        json.dumps([row | {"extra": value} for row, value in zip(ROWS, [1, "two", [3]], strict=True)]),
    ],
    ids=["lines", "data", "columns", "pandas", "objects", "captions of pictures", "mixed column"],
)
def test_json(folder, content):
    (folder / "rows.json").write_text(content)
    check(load(folder / "rows.json"))


def test_vqa_v2(tmp_path):
    questions = [
        {"image_id": n, "question": f"Is it {n}?", "question_id": n * 1000 + m} for n in (9, 25, 30) for m in (0, 1)
    ]
    answers = [{"answer": "yes" if n % 3 else "no", "answer_confidence": "yes", "answer_id": n + 1} for n in range(10)]
    annotations = [{"question_id": q["question_id"], "image_id": q["image_id"], "question_type": "is it",
                    "answer_type": "yes/no", "multiple_choice_answer": "yes", "answers": answers}
                   for q in questions]  # fmt: skip
    facts = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "train2014"}
    (tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json").write_text(
        json.dumps(facts | {"task_type": "Open-Ended", "questions": questions})
    )
    (tmp_path / "v2_mscoco_train2014_annotations.json").write_text(json.dumps(facts | {"annotations": annotations}))
    (tmp_path / "v2_mscoco_val2014_annotations.json").write_text(json.dumps(facts | {"annotations": []}))
    (tmp_path / "train2014").mkdir()
    for n, colour in zip((9, 25, 30), COLOURS, strict=True):
        (tmp_path / f"train2014/COCO_train2014_{n:012d}.jpg").write_bytes(picture(colour))
    for name in ("v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json"):
        rows = load(tmp_path / name)
        check(
            rows,
            [q["question"] for q in questions],
            [c for c in COLOURS for _ in (0, 1)],
        )
        assert answers_of(rows[0], "answers") == ["no" if n % 3 == 0 else "yes" for n in range(10)]
    (tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json").unlink()
    with pytest.raises(ArgumentError, match="put the file of the questions"):
        load(tmp_path / "v2_mscoco_train2014_annotations.json")


def test_nlvr2(tmp_path):
    rows = [{"identifier": f"train-{n}-0-{m}", "sentence": f"Both are {n}.", "label": "True", "directory": n,
             "left_url": "http://a", "right_url": "http://b"} for n in (10, 11) for m in (0, 1)]  # fmt: skip
    (tmp_path / "train.json").write_text("\n".join(map(json.dumps, rows)))
    for n, colour in zip((10, 11), COLOURS, strict=False):
        (tmp_path / f"images/train/{n}").mkdir(parents=True)
        for side in (0, 1):
            (tmp_path / f"images/train/{n}/train-{n}-0-img{side}.png").write_bytes(picture(colour))
    found = load(tmp_path / "train.json")
    check(found, [row["sentence"] for row in rows], [COLOURS[0], COLOURS[0], COLOURS[1], COLOURS[1]])
    assert picture_of(found[2], "second_image").getpixel((0, 0)) == COLOURS[1] and found[0]["label"] == "True"


def test_lists_of_images(folder):  # NLVR2 as BLIP's authors distribute it
    (folder / "pictures").mkdir()
    for name in NAMES:
        (folder / name).rename(folder / "pictures" / name)
    rows = [{"sentence": "Both are red.", "label": "False", "images": [NAMES[0], NAMES[2]]}] * 2
    (folder / "nlvr.json").write_text(json.dumps(rows))
    for options in ({"image_root": str(folder / "pictures")}, {}):
        if not options:
            (folder / "pictures").rename(folder / "images")
        found = load(folder / "nlvr.json", **options)
        check(found, ["Both are red."] * 2, [COLOURS[0]] * 2)
        assert picture_of(found[0], "second_image").getpixel((0, 0)) == COLOURS[2]


def test_conversations(folder):
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dog."},
             {"from": "human", "value": "Which colour?"}, {"from": "gpt", "value": "Black."}]  # fmt: skip
    (folder / "llava.json").write_text(json.dumps([{"id": "1", "image": NAMES[1], "conversations": turns}]))
    rows = load(folder / "llava.json")
    check(rows, ["A dog.", "Black."], [COLOURS[1]] * 2)
    assert rows["question"] == ["What is it?", "Which colour?"] and rows["answers"] == [["A dog."], ["Black."]]
    assert rows["history"] == [[], ["What is it?", "A dog."]]
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts},
                {"role": "assistant", "content": "A dog."}, {"role": "user", "content": "Which colour?"},
                {"role": "assistant", "content": [{"type": "text", "text": "Black."}]}]  # fmt: skip
    (folder / "messages.json").write_text(json.dumps([{"image": NAMES[1], "messages": messages}]))
    assert load(folder / "messages.json").to_list() == rows.to_list()


# --- Parquet, Arrow, folders ------------------------------------------------------------------------------------------


def test_parquet_and_arrow_files(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("target")
    contents = [picture(colour) for colour in COLOURS]
    raw = datasets.Dataset.from_dict({"image": contents, "caption": TEXTS})
    raw.to_parquet(target / "raw.parquet")
    check(load(target / "raw.parquet"))
    raw.to_parquet(target / "UPPER.PARQUET")
    check(load(target / "UPPER.PARQUET"))
    raw.save_to_disk(target / "saved")
    check(load(next((target / "saved").glob("*.arrow"))))
    lists = datasets.Dataset.from_dict(
        {"image": [[c, contents[0]] for c in contents], "caption": TEXTS},
        features=datasets.Features(image=datasets.List(datasets.Image()), caption=datasets.Value("string")),
    )
    lists.to_parquet(target / "lists.parquet")
    found = load(target / "lists.parquet")
    check(found)
    assert picture_of(found[2], "second_image").getpixel((0, 0)) == COLOURS[0]
    datasets.Dataset.from_dict({"url": NAMES, "TEXT": TEXTS}).to_parquet(folder / "paths.parquet")
    check(load(folder / "paths.parquet"))
    (target / "folder").mkdir()
    for number in range(3):
        raw.select([number]).to_parquet(target / f"folder/{number}.parquet")
    check(load(target / "folder"))
    raw.to_parquet(target / "folder/test-0.parquet")
    check(load(target / "folder", "test"))


def test_text_files_beside_the_pictures(folder):
    for name, text in zip(NAMES, ["one\ntwo\n", "three", None], strict=True):
        if text:
            (folder / name).with_suffix(".txt").write_text(text)
    (folder / "LICENCE.txt").write_text("Do as you like.")
    rows = load(folder)
    check(rows, [["one", "two"], ["three"], None])
    with pytest.raises(BadRow, match="empty caption"):
        captions_of(rows[2], "caption")


@pytest.mark.parametrize("divided", [False, True])
def test_class_folders(tmp_path, divided):
    for name, colour in zip(["hot_dog", "apple", "cat"], COLOURS, strict=True):
        folder = tmp_path / ("train" if divided else "") / name
        folder.mkdir(parents=True)
        (folder / "1.JPG").write_bytes(picture(colour))
    rows = load(tmp_path)
    check(rows, ["apple", "cat", "hot dog"], [COLOURS[1], COLOURS[2], COLOURS[0]])
    assert rows.features["label"].names == ["apple", "cat", "hot dog"] and rows["label"] == [0, 1, 2]
    with pytest.raises(ArgumentError, match="no split 'test'"):
        load(tmp_path, "test")


def test_pictures_beside_a_table(folder):
    (folder / "Images").mkdir()
    for name in NAMES:
        (folder / name).rename(folder / "Images" / name)
    (folder / "captions.txt").write_text(TABLES["captions.txt"])
    check(load(folder))
    (folder / "captions.txt").unlink()
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *(f"Images/{n},NA" for n in NAMES)]))
    check(load(folder), ["NA"] * 3)
    for name in ("train.csv", "val.csv"):
        (folder / name).write_text("image,caption\n" + f"{NAMES[0]},{name}")
    (folder / "metadata.csv").unlink()
    check(load(folder), ["train.csv"], COLOURS[:1])


def test_folders_without_captions_are_refused(folder):
    with pytest.raises(ArgumentError, match="3 pictures, but no captions.*a text file beside"):
        load(folder)
    for name in ("a.csv", "b.csv"):
        (folder / name).write_text(TABLES["commas.csv"])
    with pytest.raises(ArgumentError, match="2 tables .a.csv, b.csv.: name the one"):
        load(folder)


# --- pictures that are not there --------------------------------------------------------------------------------------


def test_a_missing_picture_names_its_path_and_the_folder(folder):
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / NAMES[0]).rename(folder / "deep" / "er" / NAMES[0])
    cause = Counter({"missing image file": 3})
    text = str(unusable("3 rows cannot be used", cause, str(folder / "er" / NAMES[0])))
    assert str(folder / "er" / NAMES[0]) in text and f"--image_root {folder / 'deep'}." in text
    text = str(unusable("3 rows cannot be used", cause, str(folder / NAMES[0])))
    assert f"--image_root {folder / 'deep' / 'er'}." in text
    assert "--image_root." in str(unusable("3 rows cannot be used", cause, str(folder / "nowhere.jpg")))


def test_a_missing_picture_is_looked_for_beside_the_folder_that_paths_start_from(tmp_path):
    """As COCO has a folder of pictures for each split; a file of the same name in another class is not meant."""
    for name in ("train", "val", "val/cats", "val/dogs"):
        (tmp_path / name).mkdir()
    for name in ("val/1.jpg", "val/dogs/2.jpg"):
        (tmp_path / name).write_bytes(b"")
    assert root_of(str(tmp_path / "train/1.jpg"), str(tmp_path / "train")) == tmp_path / "val"
    assert root_of(str(tmp_path / "train/1.jpg")) is None
    assert root_of(str(tmp_path / "val/cats/2.jpg"), str(tmp_path / "val")) is None


def test_urls_are_refused_with_the_command_that_downloads_them():
    assert "img2dataset --url_list" in str(unusable("3 rows", Counter({"a URL, which is not downloaded": 3})))


def test_a_relative_image_root_starts_from_the_current_folder(folder, monkeypatch):
    (folder / "there").mkdir()
    (folder / "there" / "rows.csv").write_text(TABLES["commas.csv"])
    datasets.Dataset.from_dict({"image": NAMES, "caption": TEXTS}).to_parquet(folder / "there" / "rows.parquet")
    monkeypatch.chdir(folder.parent)
    for name in ("rows.csv", "rows.parquet"):
        check(load(folder / "there" / name, image_root=folder.name))
