"""Tests of loading pairs, skipping bad rows, choosing captions, sampling and batching."""

import io
import json
import os
import random
import threading

import datasets
import pytest
import torch
from conftest import tiny_processor
from PIL import Image
from vlp.processing.augmentation import PerImage
from vlp.training.data import build
from vlp.training.data.batches import BadRows, Collator, batches_of, one_ahead, train_loader
from vlp.training.data.build import load_data
from vlp.training.data.rows import BadRow, CaptionChooser, caption_texts, picture_of
from vlp.training.data.samples import DrawSampler, PairDataset, QuestionMaker, ReasoningMaker, SampleMaker
from vlp.training.data.sources import load_rows
from vlp.training.families.clip import ClipArguments

from vlp.errors import ArgumentError, BadDataError

COLOURS = ["red", "green", "blue", "yellow", "black", "white"]


def picture(colour: str, size: tuple[int, int] = (20, 16)) -> bytes:
    """A PNG file of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def maker(**options) -> SampleMaker:
    return SampleMaker(chooser=CaptionChooser(), per_image=PerImage(16, "middle"), **options)


@pytest.fixture
def folder(tmp_path):
    """Six pictures and a table of them in each supported format."""
    for colour in COLOURS:
        (tmp_path / f"{colour}.png").write_bytes(picture(colour))
    rows = [{"image": f"{colour}.png", "caption": f"a {colour} card"} for colour in COLOURS]
    for name, separator in (("table.csv", ","), ("table.tsv", "\t")):
        lines = [separator.join(row.values()) for row in rows]
        (tmp_path / name).write_text("\n".join([separator.join(rows[0]), *lines]))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    coco = {
        "images": [{"id": i, "file_name": f"{colour}.png"} for i, colour in enumerate(COLOURS)],
        "annotations": [{"image_id": i, "caption": f"{c} {n}"} for i, c in enumerate(COLOURS) for n in ("one", "two")],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    splits = ["train", "train", "restval", "val", "test", "test"]
    karpathy = {
        "images": [
            {"filename": f"{c}.png", "split": s, "imgid": i, "sentences": [{"raw": f"a {c} card"}, {"raw": c}]}
            for i, (c, s) in enumerate(zip(COLOURS, splits, strict=True))
        ]
    }
    (tmp_path / "karpathy.json").write_text(json.dumps(karpathy))
    return tmp_path


def check(rows, count: int = 6) -> list:
    """Check that the rows give `count` usable samples of different colours, and return the samples."""
    dataset = PairDataset(rows, maker())
    samples = [dataset[i, 0] for i in range(len(dataset))]
    assert len(samples) == count
    for sample in samples:
        assert sample.pixels.shape == (3, 16, 16) and sample.pixels.dtype == torch.uint8 and not sample.skipped
    colours = {tuple(sample.pixels[:, 8, 8].tolist()) for sample in samples}
    assert len(colours) == count
    return samples


@pytest.mark.parametrize("name", ["table.csv", "table.tsv", "rows.json", "rows.jsonl"])
def test_table_formats(folder, name):
    samples = check(load_rows(str(folder / name), "train", "image"))
    assert samples[0].text == "a red card"


def test_byte_order_mark_and_mixed_caption_types(folder):
    (folder / "excel.csv").write_text("\ufeff" + (folder / "table.csv").read_text(), encoding="utf-8")
    check(load_rows(str(folder / "excel.csv"), "train", "image"))
    rows = [
        {"image": "red.png", "caption": "one"},
        {"image": "blue.png", "caption": ["two", "three"]},
        {"image": "green.png"},
    ]
    (folder / "mixed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_rows(str(folder / "mixed.jsonl"), "train", "image")["caption"] == [["one"], ["two", "three"], None]


def test_table_without_split_column_has_no_test_split(folder):
    for name in ("table.csv", "rows.json", "rows.jsonl", "coco.json"):
        with pytest.raises(ArgumentError, match="no column split.*--hold_out"):
            load_rows(str(folder / name), "test", "image")


def test_non_text_caption_column_raises(folder):
    (folder / "numbers.jsonl").write_text('{"image": "red.png", "caption": 5}')
    with pytest.raises(ArgumentError, match="--caption_column caption of .* must hold text"):
        load_data(arguments(str(folder / "numbers.jsonl")))


def test_rows_with_same_file_share_image_id(folder):
    (folder / "flickr.csv").write_text("image,caption\nred.png,one\nred.png,two\nblue.png,three")
    dataset = PairDataset(load_rows(str(folder / "flickr.csv"), "train", "image"), maker())
    ids = [dataset[i, 0].image_id for i in range(3)]
    assert ids[0] == ids[1] != ids[2]


def test_image_root(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "table.csv"
    elsewhere.write_text((folder / "table.csv").read_text())
    check(load_rows(str(elsewhere), "train", "image", image_root=str(folder)))


def test_coco_captions(folder):
    rows = load_rows(str(folder / "coco.json"), "train", "image")
    assert rows[0]["caption"] == ["red one", "red two"]
    check(rows)


@pytest.mark.parametrize(("split", "count"), [("train", 3), ("val", 1), ("test", 2)])
def test_karpathy_splits(folder, split, count):
    check(load_rows(str(folder / "karpathy.json"), split, "image"), count)


def test_karpathy_split_that_is_not_there_is_refused(folder):
    with pytest.raises(ArgumentError, match="has no split 'validation'; its splits are test, train, val"):
        load_rows(str(folder / "karpathy.json"), "validation", "image")


def test_karpathy_pictures_have_the_ids_of_coco(folder):
    images = json.loads((folder / "karpathy.json").read_text())["images"]
    (folder / "ids.json").write_text(json.dumps({"images": [image | {"cocoid": 391895} for image in images[:1]]}))
    assert load_rows(str(folder / "ids.json"), "train", "image")[0]["image_id"] == "391895"
    assert load_rows(str(folder / "karpathy.json"), "test", "image")["image_id"] == ["4", "5"]


def test_imagefolder_with_metadata(folder, tmp_path_factory):
    base = tmp_path_factory.mktemp("imagefolder") / "train"
    base.mkdir()
    lines = ["file_name,caption"]
    for colour in COLOURS:
        (base / f"{colour}.png").write_bytes(picture(colour))
        lines.append(f"{colour}.png,a {colour} card")
    (base / "metadata.csv").write_text("\n".join(lines))
    samples = check(load_rows(str(base.parent), "train", "image"))
    assert {sample.text for sample in samples} == {f"a {colour} card" for colour in COLOURS}


def test_parquet_folder(tmp_path):
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": picture(c), "path": None} for c in COLOURS], "caption": COLOURS}
    )
    rows.to_parquet(tmp_path / "train-00000.parquet")
    check(load_rows(str(tmp_path), "train", "image"))


def test_emoji_data_set():
    rows = load_rows("emoji", "test", "image")
    assert len(rows) == 1906 and set(rows["design"]) == {"twemoji"}
    assert picture_of(rows[0], "image").size == (64, 64)
    assert "twemoji" not in load_rows("emoji", "train", "image")["design"]


@pytest.mark.parametrize(
    ("name", "column", "message"),
    [
        ("table.csv", "picture", "no column 'picture'; its columns are image, caption"),
        ("nothing.csv", "image", "does not exist"),
        ("empty.csv", "image", "has no rows"),
        ("broken.json", "image", "a list `images`"),
        ("garbled.json", "image", "cannot be read as json"),
        ("latin.csv", "image", "is not encoded in UTF-8"),
        ("instances.json", "image", "cannot be read as json.*caption"),
    ],
)
def test_invalid_data_raises(folder, name, column, message):
    (folder / "empty.csv").write_text("image,caption\n")
    (folder / "broken.json").write_text("{}")
    (folder / "garbled.json").write_text("{")
    (folder / "latin.csv").write_bytes("image,caption\nred.png,caf\xe9".encode("latin-1"))
    (folder / "instances.json").write_text('{"images": [{"id": 1}], "annotations": [{"image_id": 1, "bbox": []}]}')
    with pytest.raises(ArgumentError, match=message):
        load_rows(str(folder / name), "train", column)


def test_unknown_data_set_or_split_raises():
    with pytest.raises(ArgumentError, match="no such file or folder"):
        load_rows("no-such-data", "train", "image")
    with pytest.raises(ArgumentError, match="split"):
        load_rows("emoji", "validation", "image")


def bad_rows() -> datasets.Dataset:
    """Two good rows and one row of each bad kind."""
    good = picture("red")
    bomb = io.BytesIO()
    Image.new("1", (20000, 10000)).save(bomb, "PNG")
    images = [good, good[:60], b"no picture", bomb.getvalue(), None, good, good, "missing.png"]
    captions = ["fine", "truncated", "not", "bomb", "none", " \n\t ", "also fine", "missing"]
    images = [{"bytes": i, "path": None} if isinstance(i, bytes) else i and {"bytes": None, "path": i} for i in images]
    features = datasets.Features({"image": datasets.Image(decode=False), "caption": datasets.Value("string")})
    return datasets.Dataset.from_dict({"image": images, "caption": captions}, features=features)


def test_bad_rows_are_skipped_and_counted_by_cause():
    dataset = PairDataset(bad_rows(), maker())
    collator = Collator(tiny_processor(), 20)
    counter = BadRows(max_share=1.0)
    for _ in range(2):  # rows seen again are not counted again
        batch = collator([dataset[i, 0] for i in range(8)])
        assert len(batch) == 8
        counter.update(batch)
    causes = {key: cause for key, cause in counter.causes.items()}
    assert causes == {
        1: "truncated or broken image",
        2: "not an image",
        3: "decompression bomb",
        4: "no image",
        5: "empty caption",
        7: "missing image file",
    }
    assert "decompression bomb: 1" in counter.describe()


def test_too_large_image_raises_before_decoding():
    with pytest.raises(BadRow, match="decompression bomb"):
        picture_of({"image": picture("red", (100, 100))}, "image", max_pixels=9_999)


def test_too_many_bad_rows_raise():
    dataset = PairDataset(bad_rows(), maker())
    batch = Collator(tiny_processor(), 20)([dataset[i % 8, 0] for i in range(120)])
    with pytest.raises(BadDataError, match="6 of the first 126 rows.*--max_bad_share 0.01"):
        BadRows(max_share=0.01).update(batch)


def test_only_bad_rows_raise():
    rows = bad_rows().select([1, 2, 5])
    with pytest.raises(BadDataError, match="3 consecutive rows cannot be used: .*empty caption: 1"):
        PairDataset(rows, maker())[0, 0]


def test_caption_choice_is_random_and_reproducible():
    chooser = CaptionChooser()
    row = {"caption": ["one", " ", "two", "three"]}
    drawn = [chooser.choose(row, random.Random(seed))[0] for seed in range(50)]
    assert set(drawn) == {"one", "two", "three"}
    assert drawn == [chooser.choose(row, random.Random(seed))[0] for seed in range(50)]


def test_captions_in_two_languages():
    """Keywords and templates match the caption's language; empty captions are not chosen."""
    chooser = CaptionChooser(caption_column="en,vi", tag_column="tags,tags_vi", tag_share=0.5,
                             templates="emoji,emoji_vi", template_share=0.5)  # fmt: skip
    row = {"en": "cat", "vi": "con mèo", "tags": ["pet"], "tags_vi": ["vật nuôi"]}
    drawn = [chooser.choose(row, random.Random(i)) for i in range(400)]
    assert chooser.captions(row) == ["cat", "con mèo"]
    assert 150 < sum(caption == "cat" for _, caption in drawn) < 250
    english, vietnamese = ({text for text, caption in drawn if caption == word} for word in ("cat", "con mèo"))
    assert {"cat", "pet", "an emoji of cat", "cat, pet"} <= english
    assert {"con mèo", "vật nuôi", "hình vẽ con mèo", "con mèo, vật nuôi"} <= vietnamese
    assert not any("mèo" in text or "hình" in text or "vật" in text for text in english)
    assert not any("cat" in text or "emoji" in text or "pet" in text for text in vietnamese)
    assert {caption for _, caption in (chooser.choose(row | {"vi": " "}, random.Random(i)) for i in range(20))} == {
        "cat"
    }
    table = datasets.Dataset.from_list([row])
    assert {"cat", "con mèo", "pet", "vật nuôi", "hình vẽ con mèo"} <= set(caption_texts(table, chooser))


def test_tags_and_templates():
    chooser = CaptionChooser(tag_column="tags", tag_share=1.0, templates="emoji", template_share=1.0)
    texts = {chooser.choose({"caption": "cat", "tags": ["pet", "fur"]}, random.Random(s))[0] for s in range(200)}
    assert {"an emoji of pet", "cat, fur", "This is a photo of cat, pet, fur."} <= texts
    texts = {chooser.choose({"caption": "cat", "tags": "pet, fur"}, random.Random(s))[0] for s in range(200)}
    assert "an emoji of pet" in texts
    assert {chooser.choose({"caption": "cat", "tags": None}, random.Random(s))[1] for s in range(20)} == {"cat"}
    rows = datasets.Dataset.from_dict({"caption": ["cat"], "tags": [["pet", "fur"]]})
    assert list(caption_texts(rows, chooser))[:3] == ["cat", "pet, fur", "cat"]


def test_sampler_covers_each_epoch_splits_and_resumes():
    def draws(count, **options):
        sampler = iter(DrawSampler(10, seed=3, **options))
        return [next(sampler) for _ in range(count)]

    single = draws(30)
    for epoch in range(3):
        assert sorted(single[10 * epoch : 10 * epoch + 10]) == [(row, epoch) for row in range(10)] or {
            row for row, _ in single[10 * epoch : 10 * epoch + 10]
        } == set(range(10))
    assert [row for row, _ in single[:10]] != [row for row, _ in single[10:20]]
    first, second = draws(15, rank=0, processes=2), draws(15, rank=1, processes=2)
    assert [draw for pair in zip(first, second, strict=True) for draw in pair] == single
    assert draws(13, start=17) == single[17:]


def test_sampler_groups_images_with_same_caption():
    groups = [0, 1, 2, 3, 4] * 4
    order = DrawSampler(20, seed=0, group_ids=groups, group_size=4).order(epoch=0)
    assert sorted(order) == list(range(20))
    runs = [[groups[row] for row in order[i : i + 4]] for i in range(0, 20, 4)]
    assert all(len(set(run)) == 1 for run in runs)


def arguments(name: str, **options) -> ClipArguments:
    defaults = dict(dataset_name=name, output_dir="unused", augmentation="none", max_train_steps=1)
    return ClipArguments(**defaults | {"per_device_train_batch_size": 4} | options)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_number_of_workers(folder, workers):
    rows = load_rows(str(folder / "coco.json"), "train", "image")
    collator = Collator(tiny_processor(), 20)

    def take(num_workers):
        dataset, sampler = PairDataset(rows, maker()), DrawSampler(len(rows), seed=0)
        loader = iter(train_loader(arguments("x", num_workers=num_workers), dataset, sampler, collator))
        return [next(loader) for _ in range(4)]

    for a, b in zip(take(0), take(workers), strict=True):
        assert torch.equal(a.pixels, b.pixels) and torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.text_index, b.text_index)
        assert torch.equal(a.image_ids, b.image_ids) and len(a) == 4


def test_duplicate_texts_are_tokenised_once():
    rows = datasets.Dataset.from_dict(
        {
            "image": [picture(c) for c in COLOURS],
            "caption": ["a", "b", "a", "c", "b", "a"],
            "tags": [["x", "y", "z"]] * 6,
        }
    )
    chooser = CaptionChooser(tag_column="tags", tag_share=1.0, templates="emoji", template_share=0.5)
    dataset = PairDataset(rows, SampleMaker(chooser=chooser, per_image=PerImage(16, "middle")))
    collator = Collator(tiny_processor(), 20)
    for epoch in range(5):
        batch = collator([dataset[i, epoch] for i in range(6)])
        assert batch.text_index.tolist() == [0, 1, 0, 2, 1, 0] and len(batch.input_ids) == 3
        assert batch.caption_ids[0] == batch.caption_ids[2] != batch.caption_ids[1]


@pytest.mark.parametrize("cache", [None, {}])
def test_images_of_several_questions_are_in_a_batch_once(cache):
    """With the same augmentation of an image for all of its rows in an epoch, and another one in the next epoch."""
    image = Image.effect_noise((40, 40), 90).convert("RGB")
    file = io.BytesIO()
    image.save(file, "PNG")
    cells = [file.getvalue(), picture("red"), picture("blue")]
    order = [0, 0, 1, 2, 2, 0]
    rows = datasets.Dataset.from_dict(
        {"image": [cells[n] for n in order], "caption": list("abcdef"), "answers": [["yes"], ["no"]] * 3}
    )
    per_image = PerImage(16, "random", 0.2)
    settings = {"chooser": CaptionChooser(), "per_image": per_image, "cache": cache, "same_views": True}
    dataset = PairDataset(rows, QuestionMaker(**settings))
    collator = Collator(tiny_processor(), 20, images_once=True)
    batch = collator([dataset[n, 0] for n in range(6)])
    assert batch.extra["image_index"].tolist() == order and batch.pixels.shape == (3, 3, 16, 16)
    assert len(batch) == 6 and len(batch.input_ids) == 6
    for n in range(6):
        assert torch.equal(dataset[n, 0].pixels, batch.pixels[order[n]])
    assert torch.equal(dataset[0, 1].pixels, batch.pixels[0]) == (cache is not None)
    apart = PairDataset(rows, QuestionMaker(**settings | {"same_views": False, "cache": None}))
    assert not torch.equal(apart[0, 0].pixels, apart[1, 0].pixels)


def test_pairs_of_images_of_several_statements_are_in_a_batch_once():
    cells = [picture("red"), picture("blue"), picture("green")]
    pairs, order = [(0, 1), (0, 2), (1, 0)], [0, 1, 0, 2, 1, 0]
    left, right = zip(*(pairs[n] for n in order), strict=True)
    rows = datasets.Dataset.from_dict(
        {"image": [cells[n] for n in left], "second_image": [cells[n] for n in right], "caption": list("abcdef"),
         "label": [True, False] * 3}
    )  # fmt: skip
    per_image = PerImage(16, "none", 0.2)
    dataset = PairDataset(
        rows, ReasoningMaker(chooser=CaptionChooser(), per_image=per_image, cache={}, same_views=True)
    )
    batch = Collator(tiny_processor(), 20, images_once=True)([dataset[n, 0] for n in range(6)])
    assert batch.extra["image_index"].tolist() == order and batch.extra["labels"].tolist() == [1, 0] * 3
    assert batch.pixels.shape == (6, 3, 16, 16)  # each pair once, left and right images alternating
    for index, (one, other) in enumerate(pairs):
        first = [dataset[order.index(index), 0].pixels[side] for side in (0, 1)]
        assert torch.equal(batch.pixels[2 * index], first[0]) and torch.equal(batch.pixels[2 * index + 1], first[1])
        assert torch.equal(first[0], batch.pixels[{0: 0, 1: 1, 2: 3}[one]])
        assert not torch.equal(first[0], first[1]) and one != other


# --- odd tables -------------------------------------------------------------------------------------------------------

ROWS = [{"image": f"{colour}.png", "caption": f"a {colour} card"} for colour in COLOURS]


def changed(row: dict, number: int = 2) -> list[dict]:
    """The rows with one of them changed."""
    return [each | row if position == number else each for position, each in enumerate(ROWS)]


@pytest.mark.parametrize(
    ("row", "column", "value"),
    [
        ({"caption": 5}, "caption", "5"),
        ({"caption": True}, "caption", "True"),
        ({"caption": None}, "caption", None),
        ({"caption": "a \ud800 card"}, "caption", "a ? card"),
        ({"caption": "one\u2028line"}, "caption", "one\u2028line"),
        ({"caption": 10**400}, "caption", None),  # Python reads more digits than it writes
        ({"other": {"deep": 1}}, "other", None),
        ({"other": [1, "two"]}, "other", None),
        ({"image": "green \ud800.png"}, "caption", "a blue card"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:12],
)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_values_of_any_type_are_read_beside_the_others(folder, name, row, column, value):
    """One odd value neither fails the table nor changes the other rows."""
    rows = changed(row)
    text = json.dumps(rows) if name == "rows.json" else "\n".join(json.dumps(each, ensure_ascii=False) for each in rows)
    (folder / name).write_text(text, encoding="utf-8", errors="surrogatepass" if "\\u" in text else "replace")
    loaded = load_rows(str(folder / name), "train", "image")
    assert len(loaded) == len(ROWS)
    captions = loaded["caption"]
    assert [captions[i] for i in (0, 1, 3, 4, 5)] == [f"a {COLOURS[i]} card" for i in (0, 1, 3, 4, 5)]
    if value is not None and not (name == "rows.jsonl" and "?" in value):
        assert loaded[2][column] == value


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("deep.json", "[" * 100_000, "nested too deeply"),
        ("number.json", "5", "cannot be read as json"),
        ("true.json", "true", "cannot be read as json"),
        ("nulls.json", "[null, null]", "row 1 is None; expected an object"),
        ("digits.json", '[{"image": 1' + "0" * 5000 + "}]", "cannot be read as json"),
        ("karpathy.json", '{"images": ["a", "b"]}', "cannot be read as json"),
        ("dict.json", json.dumps([{"image": {"bytes": 1}, "caption": "a"}]), "expected the path of a picture"),
        ("list.json", json.dumps([{"image": ["a.png"], "caption": "a"}]), "expected the path of a picture"),
        ("broken.jsonl", '{"image": "a.png"\n', "cannot be read as jsonl"),
        ("names.csv", "one,two\n1,a\n", "no column 'image'; its columns are one, two"),
        ("empty.csv", "", "has no rows"),
        ("header.csv", "image,caption\n", "has no rows"),
        ("empty.json", "", "cannot be read as json"),
        ("null.jsonl", "\0\0", "cannot be read as jsonl"),
    ],
)
def test_unreadable_tables_are_refused_with_a_short_reason(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ArgumentError, match=message) as error:
        load_rows(str(tmp_path / name), "train", "image")
    assert len(str(error.value)) < 700 and "\n" not in str(error.value)


def test_other_encodings_are_named_without_the_content(tmp_path):
    for name in ("latin.csv", "latin.json", "latin.jsonl"):
        (tmp_path / name).write_bytes(b'[{"image": "a.png", "caption": "' + b"caf\xe9 " * 200_000 + b'"}]')
        with pytest.raises(ArgumentError, match=r"not encoded in UTF-8 \(byte 0xe9 at 35\)") as error:
            load_rows(str(tmp_path / name), "train", "image")
        assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("values", "works"),
    [
        ([picture("red")] * 3, True),  # raw bytes of pictures
        ([1, 2, 3], False),
        ([0.5, 1.5, 2.5], False),
        ([[1], [2], [3]], False),
    ],
    ids=["bytes", "whole numbers", "numbers", "lists"],
)
def test_image_columns_of_parquet_files(tmp_path, values, works):
    (tmp_path / "data").mkdir()
    rows = datasets.Dataset.from_dict({"image": values, "caption": ["a", "b", "c"]})
    rows.to_parquet(str(tmp_path / "data/train-00000-of-00001.parquet"))
    if works:
        loaded = load_rows(str(tmp_path), "train", "image")
        assert picture_of(loaded[0], "image").getpixel((0, 0)) == (255, 0, 0)
    else:
        with pytest.raises(ArgumentError, match="must hold images, their bytes or their paths"):
            load_rows(str(tmp_path), "train", "image")


def test_paths_of_a_folder_start_from_the_folder(tmp_path, monkeypatch):
    (tmp_path / "pairs/data").mkdir(parents=True)
    (tmp_path / "pairs/red.png").write_bytes(picture("red"))
    rows = datasets.Dataset.from_dict({"image": ["red.png"], "caption": ["red"]})
    rows.to_parquet(str(tmp_path / "pairs/data/train-00000-of-00001.parquet"))
    monkeypatch.chdir("/")
    loaded = load_rows(str(tmp_path / "pairs"), "train", "image")
    assert picture_of(loaded[0], "image").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("name", ["", " ", "a\0b.csv", "x" * 5000, "no/such\udc80name.csv", "nowhere.csv", "./nowhere"])
def test_names_that_cannot_be_opened_are_refused(name):
    with pytest.raises(ArgumentError, match="--dataset_name") as error:
        load_rows(name, "train", "image")
    assert len(str(error.value)) < 500 and str(error.value).isprintable()


def test_pipes_and_folders_are_no_tables(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.json").mkdir()
    for name in ("pipe.csv", "folder.json"):
        with pytest.raises(ArgumentError, match="not a file"):
            load_rows(str(tmp_path / name), "train", "image")
    with pytest.raises(BadRow, match="not an image"):  # and does not wait for a writer
        picture_of({"image": {"bytes": None, "path": str(tmp_path / "pipe.png")}}, "image")


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_that_are_all_bad_end_the_run_in_one_line(tmp_path, workers):
    rows = [{"image": f"https://example.org/{colour}.png", "caption": colour} for colour in COLOURS]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    arguments = ClipArguments(dataset_name=str(tmp_path / "pairs.json"), output_dir=str(tmp_path / "run"),
                              num_workers=workers, per_device_train_batch_size=2, max_train_steps=1,
                              augmentation="none")  # fmt: skip
    dataset = PairDataset(load_rows(arguments.dataset_name, "train", "image"), maker())
    loader = train_loader(arguments, dataset, DrawSampler(6, 2, 0), Collator(tiny_processor(), 20))
    with pytest.raises(BadDataError, match="a URL, which is not downloaded.*img2dataset") as error:
        next(batches_of(loader))
    assert "Traceback" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["csv", "paths in parquet", "images in parquet"])
def test_second_images_are_read_as_the_first_ones(tmp_path, monkeypatch, kind):
    """Their paths start from the same folder, whatever the column's name and the working directory."""
    paths = {"left": [], "right": [], "caption": ["a", "b"]}
    for number, colour in enumerate(("red", "green", "blue", "white")):
        (tmp_path / f"{colour}.png").write_bytes(picture(colour))
        paths["left" if number % 2 == 0 else "right"].append(f"{colour}.png")
    name = tmp_path / "pairs.csv"
    if kind == "csv":
        datasets.Dataset.from_dict(paths).to_csv(str(name))
    else:
        name = tmp_path
        (tmp_path / "data").mkdir()
        rows = datasets.Dataset.from_dict(paths)
        if kind == "images in parquet":
            for side in ("left", "right"):
                rows = rows.map(lambda row, side=side: {side: str(tmp_path / row[side])})
                rows = rows.cast_column(side, datasets.Image())
        rows.to_parquet(str(tmp_path / "data/train-00000-of-00001.parquet"))
    monkeypatch.chdir("/")
    loaded = load_rows(str(name), "train", "left", second_image_column="right")
    colours = [[picture_of(row, side).getpixel((0, 0)) for side in ("left", "right")] for row in loaded]
    assert colours == [[(255, 0, 0), (0, 128, 0)], [(0, 0, 255), (255, 255, 255)]]


def test_columns_that_only_have_the_name_of_second_images_are_left_alone(tmp_path):
    (tmp_path / "red.png").write_bytes(picture("red"))
    (tmp_path / "pairs.json").write_text(json.dumps([{"image": "red.png", "caption": "red", "second_image": 5}]))
    assert load_rows(str(tmp_path / "pairs.json"), "train", "image")[0]["second_image"] == 5


# --- loading ----------------------------------------------------------------------------------------------------------


def test_a_thread_makes_the_next_batch_in_the_same_order():
    made = []

    def batches():
        for number in range(5):
            made.append((number, threading.current_thread() is threading.main_thread()))
            yield number

    ahead = one_ahead(batches())
    assert next(ahead) == 0
    assert list(ahead) == [1, 2, 3, 4]
    assert made == [(number, False) for number in range(5)]

    def broken():
        yield 1
        raise BadDataError("no more")

    ahead = one_ahead(broken())
    assert next(ahead) == 1
    with pytest.raises(BadDataError, match="no more"):
        next(ahead)


def test_workers_follow_the_machine(monkeypatch, tmp_path):
    given = arguments("emoji")
    assert given.num_workers is None and build.default_workers(given) == 0  # the CPU trains
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(build, "cpu_cores", lambda: 6)
    assert build.default_workers(arguments("emoji")) == 6
    assert build.default_workers(arguments("emoji", cache_images=True, augmentation="strong")) == 0
    monkeypatch.setattr(build, "cpu_cores", lambda: 64)
    assert build.default_workers(arguments("emoji")) == 8
    pytest.importorskip("webdataset")
    assert build.default_workers(arguments(str(tmp_path / "{0..4}.tar"))) == 5
