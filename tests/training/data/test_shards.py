"""Tests of reading, writing, training on and resuming within shards."""

import functools
import gzip
import http.server
import io
import itertools
import json
import shutil
import tarfile
import threading
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import tiny_processor
from PIL import Image
from safetensors.torch import load_file
from test_data import maker, picture
from test_training import arguments as training_arguments
from vlp.processing.augmentation import PerImage
from vlp.processing.pictures import extensions
from vlp.training.command_line import parse
from vlp.training.data.batches import Collator, train_loader
from vlp.training.data.rows import BadRow, CaptionChooser
from vlp.training.data.samples import SampleMaker
from vlp.training.data.shard_writer import ShardsArguments, files_of, write_shards
from vlp.training.data.shards import INDEX, Source, expand, read_index
from vlp.training.data.streams import Kinds, ShardDataset, endings
from vlp.training.families.clip import ClipArguments
from vlp.training.run import train

from vlp.errors import ArgumentError, BadDataError, ResumeError
from vlp.files import state_folder, states

pytest.importorskip("webdataset")


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write_shard(path: Path, captions: list[str], broken: bool = False) -> None:
    """Write a red picture per caption; if `broken`, the second picture is truncated."""
    with tarfile.open(path, "w") as tar:
        for number, caption in enumerate(captions):
            content = picture("red")
            add(tar, f"{number:03d}.png", content[:50] if broken and number == 1 else content)
            add(tar, f"{number:03d}.txt", caption.encode())


@pytest.fixture
def seven_shards(tmp_path) -> list[str]:
    """Seven shards of 3 to 9 samples with different captions."""
    for shard in range(7):
        write_shard(tmp_path / f"{shard}.tar", [f"{shard}-{number}" for number in range(3 + shard)])
    return expand(str(tmp_path / "{0..6}.tar"))


EVERY = sorted(f"{shard}-{number}" for shard in range(7) for number in range(3 + shard))


def dataset_of(paths: list[str], **options) -> ShardDataset:
    return ShardDataset([paths], None, maker(), seed=3, **options)


def loader_of(dataset: ShardDataset, workers: int, batch: int = 4):
    options = dict(augmentation="none", max_train_steps=1, per_device_train_batch_size=batch, num_workers=workers)
    return iter(train_loader(ClipArguments(dataset_name="x.tar", output_dir="x", **options), dataset, None,
                             Collator(tiny_processor(), 20)))  # fmt: skip


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [1, 2, 3, 7])
def test_each_sample_is_read_once_per_epoch(seven_shards, streams):
    read: dict[int, Counter] = {}
    for stream in range(streams):
        for files, _, epoch in Source(seven_shards, 3, stream, streams):
            if epoch == 4:
                break
            read.setdefault(epoch, Counter()).update([files["txt"].decode()])
    assert [sorted(read[epoch].elements()) for epoch in range(4)] == 4 * [EVERY]


def test_order_changes_each_epoch_and_mixes_shards(seven_shards):
    source = iter(Source(seven_shards, 3, 0, 1))
    epochs = [[next(source)[0]["txt"].decode() for _ in EVERY] for _ in range(2)]
    assert epochs[0] != epochs[1]
    changes = sum(a[0] != b[0] for a, b in itertools.pairwise(epochs[0]))
    assert changes > 20  # of 41; only 6 if shards were read one after another


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 0), (1, 2), (2, 3)])
def test_loaders_split_data_and_resume_exactly(seven_shards, processes, workers):
    whole, stopped = [], []
    for rank in range(processes):
        loader = loader_of(dataset_of(seven_shards, rank=rank, processes=processes), workers)
        batches, places = [next(loader) for _ in range(12)], {}
        whole.append([batch.caption_ids.tolist() for batch in batches])
        for number in (5,):
            for batch in batches[:number]:
                places |= batch.place
            places = json.loads(json.dumps(places))  # as in a saved state
            again = dataset_of(seven_shards, rank=rank, processes=processes, places=places, first_batch=number)
            loader = loader_of(again, workers)
            stopped.append([next(loader).caption_ids.tolist() for _ in range(12 - number)])
    for complete, rest in zip(whole, stopped, strict=True):
        assert complete[5:] == rest
    seen = Counter(itertools.chain.from_iterable(itertools.chain.from_iterable(whole)))
    assert max(seen.values()) <= 1 + processes * 12 * 4 // len(EVERY) + 1  # streams do not overlap


@pytest.mark.parametrize(("before", "after"), [((1, 0), (1, 2)), ((2, 1), (1, 1)), ((1, 3), (3, 1)), ((2, 2), (1, 3))])
def test_another_number_of_workers_and_processes_goes_on_without_loss(tmp_path, before, after):
    """Before and after, nothing is read twice within an epoch, and each stream goes on where it was."""
    for shard in range(8):
        write_shard(tmp_path / f"{shard}.tar", [f"{shard}-{number}" for number in range(12)])
    paths = expand(str(tmp_path / "{0..7}.tar"))

    def read(shape: tuple[int, int], places: dict, first: int, count: int) -> list[str]:
        processes, workers = shape
        texts, merged = [], dict(places)
        for rank in range(processes):
            data = dataset_of(paths, rank=rank, processes=processes, workers=workers, places=places,
                              first_batch=first)  # fmt: skip
            loader = loader_of(data, workers)
            for _ in range(count):
                batch = next(loader)
                texts += batch.caption_ids.tolist()
                merged |= batch.place
        places.clear()
        places.update(json.loads(json.dumps(merged)))
        return texts

    places: dict = {}
    first = read(before, places, 0, 2)
    drawn = {stream: place["draws"] for stream, place in places.items()}
    rest = read(after, places, 2, 2)
    assert len(set(first + rest)) == len(first + rest) == 8 * (before[0] + after[0])
    assert sum(place["draws"] for place in places.values()) == len(first + rest)
    assert all(places[stream]["draws"] >= count for stream, count in drawn.items())


def test_sources_are_mixed_by_weight_and_bad_samples_counted(tmp_path):
    write_shard(tmp_path / "a-000.tar", ["red"] * 3, broken=True)
    write_shard(tmp_path / "a-001.tar", ["red"] * 3)
    write_shard(tmp_path / "b-000.tar", ["blue"] * 2)
    sources = [expand(str(tmp_path / "a-{000..001}.tar")), expand(str(tmp_path / "b-000.tar"))]

    def samples(count: int, **options) -> list:
        return list(itertools.islice(ShardDataset(sources, [3.0, 1.0], maker(), seed=0, **options), count))

    first = samples(400)
    assert 0.17 < sum(sample.text == "blue" for sample in first) / 400 < 0.34
    skipped = {key: cause for sample in first for key, cause in sample.skipped}
    assert list(skipped.values()) == ["truncated or broken image"]
    rest = samples(50, places=first[99].place)
    assert [sample.text for sample in rest] == [sample.text for sample in first[100:150]]


def test_truncated_shard_is_counted_and_skipped(tmp_path):
    write_shard(tmp_path / "a.tar", ["red"] * 4)
    write_shard(tmp_path / "b.tar", ["blue"] * 4)
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[: 5 * 1024 + 512 + 20])  # within a file
    samples = list(itertools.islice(dataset_of(expand(str(tmp_path / "{a,b}.tar"))), 60))
    assert Counter(sample.text for sample in samples[:14]) == {"red": 6, "blue": 8}  # two epochs of 3 and 4
    assert {cause for sample in samples for _, cause in sample.skipped} == {"truncated or broken shard"}


def test_shards_without_samples_raise(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(BadDataError, match="None of 1 shards has a sample. The last: .*a.tar"):
        next(iter(dataset_of([str(tmp_path / "a.tar")])))


def test_compressed_and_piped_shards(tmp_path):
    write_shard(tmp_path / "a.tar", ["one", "two"])
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    (tmp_path / "c.tar.gz").write_bytes((tmp_path / "b.tar.gz").read_bytes()[:-30])
    with pytest.raises(BadDataError, match="c.tar.gz: .*end-of-stream"):
        next(iter(dataset_of([str(tmp_path / "c.tar.gz")])))
    for path in (str(tmp_path / "b.tar.gz"), f"pipe:cat {tmp_path / 'a.tar'}"):
        assert {sample.text for sample in itertools.islice(dataset_of([path]), 2)} == {"one", "two"}


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path) -> Path:
    lines = ["image,caption,source"]
    for number in range(25):
        Image.new("RGB", (16, 16), (10 * number, 0, 0)).save(tmp_path / f"{number}.jpg")
        lines.append(f"{number}.jpg,card {number},web")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    lines += ["broken.jpg,broken,web", "missing.jpg,missing,web"]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    return tmp_path / "pairs.csv"


def test_write_shards_with_index(table, tmp_path, capsys):
    write_shards(ShardsArguments(dataset_name=str(table), samples_per_shard=10, output_dir=str(tmp_path / "shards")))
    printed = capsys.readouterr().out
    assert "25 samples in 3 shards. Skipped rows: " in printed
    assert "not an image: 1" in printed and "missing image file: 1" in printed
    assert f"--dataset_name '{tmp_path}/shards/{{00000..00002}}.tar'" in printed
    paths = expand(str(tmp_path / "shards/{00000..00002}.tar"))
    index = read_index(paths)
    assert [facts["samples"] for facts in index.values()] == [10, 10, 5]
    assert all(Path(path).stat().st_size == facts["bytes"] for path, facts in index.items())
    originals = {f"card {number}": (tmp_path / f"{number}.jpg").read_bytes() for number in range(25)}
    read = {}
    for files, _, epoch in Source(paths, 0, 0, 1):
        if epoch:
            break
        row = json.loads(files["json"])
        assert row["source"] == "web" and files["txt"].decode() == row["caption"]
        read[row["caption"]] = files["jpeg"]
    assert read == originals
    order = [json.loads(files["json"])["caption"] for files, _, _ in itertools.islice(Source(paths, 0, 0, 1), 25)]
    assert order != sorted(order)
    (tmp_path / "shards" / "notes.txt").write_text("mine")
    with pytest.raises(ArgumentError, match="contains other files"):
        write_shards(ShardsArguments(dataset_name=str(table), output_dir=str(tmp_path / "shards")))


def test_shard_writer_options():
    assert parse(["--dataset_name", "x.csv"], "shards").output_dir == "runs/shards"
    with pytest.raises(ArgumentError, match="--samples_per_shard must be at least 1"):
        parse(["--samples_per_shard", "0"], "shards")
    with pytest.raises(BadRow, match="no image"):
        files_of({"image": None}, "image", "caption")


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path_factory, table) -> str:
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("data") / "shards"
    write_shards(ShardsArguments(dataset_name=str(table), samples_per_shard=6, output_dir=str(folder)))
    return str(folder / "{00000..00004}.tar")


@pytest.fixture
def tokenizer(tmp_path) -> str:
    tiny_processor().tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def run_of(shards: str, tokenizer: str, output_dir: Path, **options) -> ClipArguments:
    defaults = dict(eval_split=None, class_column=None, cache_images=False, tokenizer_name=tokenizer, max_train_steps=9,
                    per_device_train_batch_size=4, num_workers=2)  # fmt: skip
    return training_arguments(shards, output_dir, **defaults | options)


def test_run_on_shards_resumes_exactly_within_a_shard(shards, tokenizer, tmp_path):
    train(run_of(shards, tokenizer, tmp_path / "whole"))
    train(run_of(shards, tokenizer, tmp_path / "stopped", save_steps=4, save_total_limit=5))
    first = states(state_folder(tmp_path / "stopped"))[0]
    assert first.name == "step-0000004"
    train(run_of(shards, tokenizer, tmp_path / "stopped", resume_from_checkpoint=str(first)))
    a, b = (tmp_path / name / "model.safetensors" for name in ("whole", "stopped"))
    assert a.read_bytes() == b.read_bytes() and load_file(a)
    a, b = (json.loads((tmp_path / name / "results.json").read_text())["history"] for name in ("whole", "stopped"))
    assert [entry["contrastive"] for entry in a] == [entry["contrastive"] for entry in b]
    # with another number of workers, as long as each has a stream
    train(run_of(shards, tokenizer, tmp_path / "stopped", num_workers=1, resume_from_checkpoint=str(first)))
    with pytest.raises(ResumeError, match="in 4 streams, so it cannot be resumed with 5 workers"):
        train(run_of(shards, tokenizer, tmp_path / "stopped", num_workers=5, resume_from_checkpoint="latest"))


def test_index_gives_epoch_length_and_detects_incomplete_copies(shards, tokenizer, tmp_path):
    options = dict(max_train_steps=None, num_train_epochs=2.0, num_workers=0)
    train(run_of(shards, tokenizer, tmp_path / "run", **options))
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 13  # 2 x 25 pairs in batches of 4
    folder = tmp_path / "copied"
    shutil.copytree(Path(shards).parent, folder)
    (folder / "00001.tar").write_bytes((folder / "00001.tar").read_bytes()[:-1024])
    with pytest.raises(ArgumentError, match="00001.tar has .* bytes, its index says .*: the copy is incomplete"):
        train(run_of(str(folder / "{00000..00004}.tar"), tokenizer, tmp_path / "other"))
    (folder / INDEX).unlink()
    with pytest.raises(ArgumentError, match="5 shards .* fewer than the 6 workers"):
        train(run_of(str(folder / "{00000..00004}.tar"), tokenizer, tmp_path / "other", num_workers=6))


def test_batches_record_stream_positions(seven_shards):
    loader = loader_of(dataset_of(seven_shards, workers=2), 2)
    places = [next(loader).place for _ in range(4)]
    assert [{int(stream) % 2 for stream in place} for place in places] == [{0}, {1}, {0}, {1}]
    last = {stream: place["draws"] for each in places for stream, place in each.items()}
    assert sum(last.values()) == 16 and {place["streams"] for each in places for place in each.values()} == {len(last)}
    assert torch.utils.data.get_worker_info() is None


def test_shards_keep_picture_identity(tmp_path):
    """Rows of one picture keep a common image id in shards, from tables with paths or with bytes."""
    for number, colour in enumerate(("red", "green")):
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{number}.png")
    lines = [f"{number}.png,a {word} card" for number in range(2) for word in ("plain", "bright", "small")]
    (tmp_path / "rows.csv").write_text("\n".join(["image,caption", *lines]))
    rows = [{"image": {"bytes": (tmp_path / f"{n}.png").read_bytes(), "path": None}, "caption": f"card {k}"}
            for n in range(2) for k in range(3)]  # fmt: skip
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "bytes/train-0.parquet")
    for source in ("rows.csv", "bytes"):
        target = tmp_path / f"{source}-shards"
        write_shards(ShardsArguments(dataset_name=str(tmp_path / source), output_dir=str(target), samples_per_shard=3))
        maker = SampleMaker(chooser=CaptionChooser(), per_image=PerImage(16, "middle"))
        dataset = iter(ShardDataset([expand(f"{target}/{{00000..00001}}.tar")], None, maker, seed=0))
        samples = [next(dataset) for _ in range(6)]
        assert len({sample.image_id for sample in samples}) == 2 and len({s.caption_id for s in samples}) >= 3, source
        assert str(tmp_path).encode() not in (target / "00000.tar").read_bytes()  # no local paths


@pytest.mark.parametrize("format", ["MPO", "AVIF", "JPEG2000", "PPM", "WEBP", "TIFF", "GIF"])
def test_image_formats_are_recognised(format, tmp_path):
    file = io.BytesIO()
    options = {"save_all": True, "append_images": [Image.new("RGB", (16, 16))]} if format == "MPO" else {}
    Image.new("RGB", (16, 16), "red").save(file, format, **options)
    kind = next(iter(files_of({"image": {"bytes": file.getvalue()}, "caption": "red"}, "image", "caption")))
    assert f".{kind}" in extensions(), kind


# --- damaged and hostile shards ---------------------------------------------------------------------------------------


def shard_with(path: Path, facts: bytes, pax: bytes = b"") -> None:
    """Write three good samples; the second has `facts` as its JSON, or `pax` as the header before it."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(3):
            if number == 1 and pax:
                header = tarfile.TarInfo("pax")
                header.type, header.size = tarfile.XHDTYPE, len(pax)
                tar.addfile(header, io.BytesIO(pax))
            add(tar, f"{number:03d}.png", picture("red"))
            add(tar, f"{number:03d}.txt", f"caption {number}".encode())
            add(tar, f"{number:03d}.json", facts if number == 1 else b"{}")


@pytest.mark.parametrize(
    "facts",
    [
        b"[" * 50_000,
        b'{"caption": "a \\ud800"}',
        b'{"image_id": "\\ud800"}',
        b'{"tags": [1, "two"]}',
        b'{"tags": [["three"]]}',
        b'{"tags": true}',
        b'{"tags": 5}',
        b"null",
        b"[]",
        b"\xff\xfe",
        b'{"image_id": {"a": 1}}',
        b'{"x": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda facts: facts[:20].decode("latin1"),
)
def test_odd_facts_cost_at_most_their_own_sample(tmp_path, facts):
    shard_with(tmp_path / "0.tar", facts)
    dataset = iter(dataset_of([str(tmp_path / "0.tar")]))
    texts = Counter(next(dataset).text for _ in range(9))
    assert {"caption 0", "caption 2"} <= set(texts)


@pytest.mark.parametrize(
    "pax", [b"18 size=-99999999\n", b"12 size=x\n\n\n\n", b"30 path=../../etc/passwd\n\n\n\n\n\n", b"x"]
)
def test_damaged_headers_end_a_shard_not_the_run(tmp_path, pax):
    shard_with(tmp_path / "0.tar", b"{}", pax)
    write_shard(tmp_path / "1.tar", ["good"])
    source = iter(Source([str(tmp_path / "0.tar"), str(tmp_path / "1.tar")], 3, 0, 1))
    texts = {next(source)[0].get("txt", b"").decode() for _ in range(12)}
    assert {"good", "caption 0"} <= texts


@pytest.mark.parametrize(
    "content",
    ["{", "", "null", "[]", "{}", '{"shards": 5}', '{"shards": {"0.tar": 1}}', '{"shards": {"0.tar": {}}}', "[" * 99999,
     '{"shards": {"0.tar": {"samples": -1, "bytes": 0}}}', '{"shards": {"0.tar": {"samples": true, "bytes": 0}}}'],
    ids=lambda content: content[:30],
)  # fmt: skip
def test_damaged_index_is_reported(tmp_path, content):
    write_shard(tmp_path / "0.tar", ["a"])
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ArgumentError, match=r"index\.json is damaged .*remove it, or write the shards again"):
        read_index([str(tmp_path / "0.tar")])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/tmp/{good.tar", "is not a pattern of shards"),
        ("foo://x/y.tar", "foo:// is not read"),
        ("{000000000..999999999}.tar", "more than 1,000,000 shards"),
        ("{0..99999}{0..99999}.tar", "more than 1,000,000 shards"),
    ],
)
def test_patterns_that_name_no_shards_are_refused(name, message):
    with pytest.raises(ArgumentError, match=message) as error:
        expand(name)
    assert "\n" not in str(error.value)


# --- what is in a shard -----------------------------------------------------------------------------------------------


def rows_of(path: Path, count: int, **options) -> list:
    return list(itertools.islice(iter(dataset_of([str(path)], **options)), count))


def test_dotted_names(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(3):
            add(tar, f"photo.{number:04d}.png", picture("red"))
            add(tar, f"photo.{number:04d}.txt", f"text {number}".encode())
    assert {sample.text for sample in rows_of(tmp_path / "a.tar", 3)} == {"text 0", "text 1", "text 2"}
    with tarfile.open(tmp_path / "b.tar", "w") as tar:  # as WebDataset means it
        for number in range(3):
            add(tar, f"{number}.small.png", picture("red"))
            add(tar, f"{number}.txt", f"text {number}".encode())
            add(tar, f"{number}.alt.txt", f"other {number}".encode())
            add(tar, f"{number}.large.png", picture("blue"))
    kinds = Kinds(images=("large.png",), captions=("alt.txt",))
    samples = rows_of(tmp_path / "b.tar", 3, kinds=kinds)
    assert {sample.text for sample in samples} == {"other 0", "other 1", "other 2"}
    assert all(sample.pixels[:, 0, 0].tolist() == [0, 0, 255] for sample in samples)


def test_classes_and_lists(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, content in enumerate([b"1", b"0", b"7", b"a name"]):
            add(tar, f"{number}.webp", picture("red"))
            add(tar, f"{number}.cls", content)
        add(tar, "5.png", picture("red"))
        add(tar, "5.json", json.dumps(["one", {"caption": "two"}]).encode())
    samples = rows_of(tmp_path / "a.tar", 40, kinds=Kinds(class_names=("apple", "dog")))
    assert {sample.text for sample in samples} == {"apple", "dog", "a name", "one", "two"}
    assert {cause for sample in samples for _, cause in sample.skipped} == {"a class number without a name"}
    assert endings("JPG; .png") == ("jpg", "png") and endings(None) == ()


@pytest.mark.skipif(not shutil.which("curl"), reason="webdataset fetches addresses with curl")
def test_shards_on_a_server(seven_shards):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(Path(seven_shards[0]).parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        paths = expand(f"http://127.0.0.1:{server.server_port}/{{0..6}}.tar")
        read = [sample.text for sample in itertools.islice(iter(dataset_of(paths)), len(EVERY))]
        assert len(set(read)) > 35
        missing = expand(f"http://127.0.0.1:{server.server_port}/missing.tar")
        with pytest.raises(BadDataError, match="None of 1 shards has a sample"):
            next(iter(dataset_of(missing)))
    finally:
        server.shutdown()
