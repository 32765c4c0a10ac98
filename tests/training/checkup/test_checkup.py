"""The check-up finds what is wrong with a spoilt copy of the included data, and invents nothing."""

import io
import json
import random
import re
import shlex
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from vlp.processing.pictures import read_picture, to_rgb
from vlp.training.checkup import command
from vlp.training.checkup.advice import advise, duration
from vlp.training.checkup.command import check
from vlp.training.command_line import parse
from vlp.training.data.caption_facts import CaptionFacts, caption_facts, emptiness, language_of, script_of
from vlp.training.data.duplicates import groups_of, similar
from vlp.training.data.sources import load_rows
from vlp.training.data.survey import CheckArguments, facts_of, fingerprint

from vlp.errors import ArgumentError, BadDataError

MODEL = Path(__file__).parents[3] / "model_cards" / "clip-emoji"
KINDS = ("exact", "jpeg", "png", "resized")


def encoded(content: bytes, kind: str) -> bytes:
    if kind == "exact":
        return content
    image, file = to_rgb(read_picture(content)), io.BytesIO()
    if kind == "resized":
        image = image.resize((96, 96), Image.Resampling.BICUBIC)
    image.save(file, "JPEG" if kind == "jpeg" else "PNG", quality=75)
    return file.getvalue()


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """Every tenth row of the included data: 40 duplicates, 16 leaks, 20 wrong captions and 9 broken files."""
    folder, rng = tmp_path_factory.mktemp("spoilt"), random.Random(3)
    train, test = load_rows("emoji", "train"), load_rows("emoji", "test")
    rows = [{"image": train[n]["image"]["bytes"], "caption": train[n]["caption"]} for n in range(7, len(train), 10)]
    held = [{"image": test[n]["image"]["bytes"], "caption": test[n]["caption"]} for n in range(3, len(test), 10)]
    count, truth = len(rows), {"copies": {}, "leaks": set()}
    chosen = rng.sample(range(count), 69)
    for number, row in enumerate(chosen[:40]):
        truth["copies"][len(rows)] = row
        rows.append({"image": encoded(rows[row]["image"], KINDS[number % 4]), "caption": rows[row]["caption"]})
    for number, row in enumerate(rng.sample(range(len(held)), 16)):
        truth["leaks"].add((len(rows), row))
        rows.append({"image": encoded(held[row]["image"], KINDS[number % 4]), "caption": held[row]["caption"]})
    truth["wrong"], truth["broken"] = set(chosen[40:60]), chosen[60:]
    clean = [row["caption"] for row in rows]
    for row in truth["wrong"]:
        rows[row]["caption"] = clean[(row + count // 2) % count]
    for number, row in enumerate(truth["broken"]):
        rows[row]["image"] = [rows[row]["image"][:300], b"not a picture", None][number % 3]
    features = datasets.Features(image=datasets.Image(), caption=datasets.Value("string"))
    for name, part in (("train", rows), ("test", held)):
        values = [{"bytes": row["image"], "path": None} if row["image"] else None for row in part]
        table = {"image": values, "caption": [row["caption"] for row in part]}
        datasets.Dataset.from_dict(table, features=features).to_parquet(folder / f"{name}-0.parquet")
    return folder, truth


@pytest.fixture(scope="module")
def found(spoilt, tmp_path_factory):
    target = tmp_path_factory.mktemp("report") / "report"
    arguments = CheckArguments(dataset_name=str(spoilt[0]), model=str(MODEL), output_dir=str(target), num_workers=2,
                               measure=False)  # fmt: skip
    return check(arguments), target


def test_what_was_spoilt_is_found_and_nothing_else(spoilt, found):
    truth, findings = spoilt[1], found[0]
    joined = groups_of((group[0], other) for group in findings.copies + findings.alike for other in group[1:])
    group_of = {row: number for number, group in enumerate(joined) for row in group}
    assert all(group_of[copy] == group_of[row] for copy, row in truth["copies"].items())
    assert sum(len(group) - 1 for group in joined) == len(truth["copies"])
    assert {(one, other) for one, other, _ in findings.leaks} == truth["leaks"]
    assert Counter(is_same for _, _, is_same in findings.leaks) == {True: 4, False: 12}
    assert {row for rows in findings.unreadable.values() for row in rows} == set(truth["broken"])
    assert {cause: len(rows) for cause, rows in findings.unreadable.items()} == {
        "truncated or broken image": 3, "not an image": 3, "no image": 3}  # fmt: skip
    reported = {each.row for each in findings.misfits}
    leaked = {one for one, _ in truth["leaks"]}  # of a design that the model has not seen
    assert len(truth["wrong"] & reported) >= 19 and not reported - truth["wrong"] - leaked


def test_report_opens_alone_and_shows_pictures(found):
    findings, folder = found
    page = (folder / "check.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:)', page) and page.count("data:image/webp;base64,") > 30
    assert "10 rows have the same file as an earlier row; 30 more" in page
    for text in ("Leaks into the evaluation", "16 of the 191 pictures", "truncated or broken image", "What to choose"):
        assert text in page
    markdown = (folder / "check.md").read_text(encoding="utf-8")
    assert "## ⚠ Duplicate pictures" in markdown
    for name in re.findall(r"\]\((pictures-\d\.png)\)", markdown):
        assert Image.open(folder / name).width > 200
    content = json.loads((folder / "check.json").read_text(encoding="utf-8"))
    assert content["rows"] == findings.rows and len(content["leaks"]) == 16 and content["advice"]["command"]


def test_report_replaces_only_what_it_wrote(spoilt, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(ArgumentError, match="contains other files"):
        check(CheckArguments(dataset_name=str(spoilt[0]), output_dir=str(tmp_path / "mine"), measure=False))
    with pytest.raises(ArgumentError, match="cannot be shards"):
        check(CheckArguments(dataset_name="a.tar", output_dir=str(tmp_path / "x")))


def test_data_must_be_named_and_have_a_usable_row(tmp_path, capsys):
    with pytest.raises(ArgumentError, match="Name the data to check, as in `vlp check pairs.csv`"):
        check(parse([], "check"))
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "pictures" / "1.png")
    (tmp_path / "my pairs.csv").write_text("image,caption\n1.png,a red card\n")
    options = ["--dataset_name", str(tmp_path / "my pairs.csv"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(BadDataError, match="No row of .*my pairs.csv can be used. .*--image_root .*pictures"):
        check(parse([*options, "--no-measure"], "check"))
    assert (tmp_path / "out/check.html").is_file() and "To train on it" not in capsys.readouterr().out
    found = check(parse([*options, "--no-measure", "--image_root", str(tmp_path / "pictures")], "check"))
    assert found.advice.options["output_dir"] == "runs/my-pairs"
    assert found.advice.blip_command.startswith("accelerate launch training blip --dataset_name '")
    assert "--image_root" in found.advice.blip_command and "--config" not in found.advice.blip_command
    assert found.advice.blip_command in (tmp_path / "out/check.md").read_text()
    parse(shlex.split(found.advice.blip_command)[4:], "blip")
    assert "Fewer than 100 rows are enough to try the commands" in capsys.readouterr().out


def test_pictures_to_evaluate_on_have_their_own_folder(tmp_path):
    """As COCO's have; where they cannot be read, the report does not say that none is trained on."""
    for folder, colours in (("train", ("red", "blue")), ("val", ("red", "green"))):
        (tmp_path / folder).mkdir()
        rows = []
        for number, colour in enumerate(colours):
            Image.new("RGB", (40, 40), colour).save(tmp_path / folder / f"{folder}{number}.png")
            rows.append({"image": f"{folder}{number}.png", "caption": f"a {colour} card"})
        (tmp_path / f"{folder}.json").write_text(json.dumps(rows))
    options = {
        "dataset_name": str(tmp_path / "train.json"), "image_root": str(tmp_path / "train"), "eval_split": "train",
        "eval_dataset_name": str(tmp_path / "val.json"), "output_dir": str(tmp_path / "out"), "measure": False,
    }  # fmt: skip
    found = check(CheckArguments(**options))
    assert found.eval_unreadable == {"missing image file": [0, 1]} and not found.leaks
    report = (tmp_path / "out/check.md").read_text()
    assert "⚠ Unreadable pictures to evaluate on" in report and "missing image file | 2 | 100.0 %" in report
    assert "No picture was compared." in report and "is trained on" not in report
    assert f"They would be found with --eval_image_root {tmp_path / 'val'}." in report
    found = check(CheckArguments(**options, eval_image_root=str(tmp_path / "val")))
    assert found.leaks == [(0, 0, True)] and not found.eval_unreadable
    assert f"--eval_image_root {tmp_path / 'val'}" in found.advice.command.replace("'", "")
    with pytest.raises(ArgumentError, match="--eval_image_root needs data to evaluate on"):
        check(CheckArguments(dataset_name=options["dataset_name"], image_root=options["image_root"], measure=False,
                             output_dir=options["output_dir"], eval_image_root=str(tmp_path / "val")))  # fmt: skip


def test_captions_and_names_cannot_add_markup(tmp_path, capsys):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "1.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "2.png")
    rows = [{"image": "1.png", "caption": "<script>alert(1)</script>"}, {"image": "2.png", "caption": "a | b"},
            {"image": "2.png", "caption": "a | b"}]  # fmt: skip
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    check(CheckArguments(dataset_name=str(tmp_path / "pairs.json"), output_dir=str(tmp_path / "out"), measure=False,
                         vocab_size=600))  # fmt: skip
    assert "<script>" not in (tmp_path / "out" / "check.html").read_text()
    assert "a \\| b" in (tmp_path / "out" / "check.md").read_text()
    said = capsys.readouterr().out
    assert "3 rows, of which 3 can be used; 2 different pictures and 2 different captions. Look at: " in said
    assert f"To train on it: accelerate launch training clip --dataset_name {tmp_path / 'pairs.json'}" in said


def test_speed_is_measured_with_the_recommended_recipe(spoilt, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "survey", lambda rows, *given: [facts_of(rows[n], "image", 10**8) for n in range(40)])
    arguments = parse(["--dataset_name", str(spoilt[0]), "--output_dir", str(tmp_path / "x")], "check")
    advice = advise(arguments, 500, 64, CaptionFacts(count=500, distinct=500, tokens={"99 %": 9}), False)
    assert advice.options["config"] == "clip-emoji" and advice.options["max_length"] == "16"
    sentence = command.measure(advice, 500)
    assert re.search(r"reads and learns [\d,]+ pairs/s, so an epoch of 500 pairs takes \d+ s", sentence)


@pytest.mark.parametrize(
    ("pairs", "side", "gpu", "config"),
    [(7000, 64, False, "clip-emoji"), (7000, 224, True, "clip-towers"), (500_000, 224, False, "clip-towers"),
     (500_000, 224, True, "vit-b-32"), (9_000_000, 224, True, "vit-b-16")],
)  # fmt: skip
def test_recipe_follows_the_data(pairs, side, gpu, config):
    captions = CaptionFacts(count=pairs, distinct=pairs, tokens={"99 %": 20}, languages={"Vietnamese": pairs})
    advice = advise(CheckArguments(dataset_name="a b.csv"), pairs, side, captions, gpu)
    assert advice.options["config"] == config and "--dataset_name 'a b.csv'" in advice.command
    assert ("phobert" in advice.command) == (config == "clip-towers")


def test_captions():
    texts = [
        ["A dog"],
        ["a dog."],
        ["IMG_1234"],
        ["một con chó"],
        ["собака"],
        ["", "photo"],
        ["犬です"],
        ["<b>x</b> y"],
    ]
    facts = caption_facts(texts, {text: len(text) for own in texts for text in own}, 5)
    assert facts.scripts["CYRILLIC"] == 1 and facts.languages["Vietnamese"] == 1 and facts.languages["Japanese"] == 1
    assert set(facts.empty) == {"the name of a file", "a word for any picture", "markup", "no letter"}
    assert facts.variants == [["A dog", "a dog."]] and facts.per_picture == {1: 7, 2: 1}
    assert emptiness("https://a.b/c.jpg") == "an address" and emptiness("keycap: #") is None
    assert script_of("12") == "none" and language_of("der Hund und die Katze", "LATIN") == "German"
    assert duration(60) == "60 s" and duration(600) == "10 minutes" and duration(7200) == "2.0 hours"


def test_similar_pictures_are_found_among_many():
    rng = np.random.default_rng(0)
    prints = rng.integers(0, 256, (5000, 384), np.uint8)
    prints[4000] = np.clip(prints[17].astype(int) + rng.integers(-4, 5, 384), 0, 255)
    prints[4999] = prints[0]
    assert sorted(similar(prints)) == [(0, 4999), (17, 4000)]
    red = fingerprint(Image.new("RGB", (40, 30), "red"))
    assert red.shape == (384,) and not list(similar(np.stack([red, fingerprint(Image.new("RGB", (40, 30), "blue"))])))
