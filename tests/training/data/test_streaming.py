"""Data sets that are streamed: every row once per epoch, and resumed in the middle of a file."""

import itertools
import json
from collections import Counter

import datasets
import pytest
from safetensors.torch import load_file
from test_data import maker, picture
from test_shards import loader_of, run_of
from vlp.training.data import streaming
from vlp.training.data.streaming import RowSource, stream_of
from vlp.training.data.streams import ShardDataset
from vlp.training.run import train

from vlp.errors import ArgumentError
from vlp.files import state_folder, states

EVERY = sorted(f"{file}-{row}" for file in range(4) for row in range(10))


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """Four files of ten rows, read in windows of four."""
    monkeypatch.setattr(streaming, "ROWS", 4)
    folder = tmp_path / "data set"
    folder.mkdir()
    for file in range(4):
        rows = {"image": [picture("red")] * 10, "text": [f"{file}-{row}" for row in range(10)]}
        datasets.Dataset.from_dict(rows).to_parquet(folder / f"train-{file}.parquet")
    return folder


def opened(parquet, name: str = ""):
    return stream_of(str(parquet / name) if name else str(parquet), None, "train", "image", "caption")


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_each_row_is_read_once_per_epoch(parquet, streams):
    read: dict[int, Counter] = {}
    for stream in range(streams):
        for row, _, epoch in RowSource(opened(parquet), 3, stream, streams):
            if epoch == 3:
                break
            read.setdefault(epoch, Counter()).update([row["caption"]])
    assert [sorted(read[epoch].elements()) for epoch in range(3)] == 3 * [EVERY]


def test_rows_go_on_where_they_were(parquet):
    source = RowSource(opened(parquet), 3, 0, 1)
    rows = [(row["caption"], key) for row, key, _ in itertools.islice(source, 17)]
    place = json.loads(json.dumps(source.place))  # as in a saved state
    rest = [(row["caption"], key) for row, key, _ in itertools.islice(source, 30)]
    again = RowSource(opened(parquet), 3, 0, 1, place)
    assert [(row["caption"], key) for row, key, _ in itertools.islice(again, 30)] == rest
    assert len({key for _, key in rows + rest[:23]}) == 40


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_divide_the_rows(parquet, workers):
    data = ShardDataset([opened(parquet)], None, maker(), 0, workers=workers)
    loader = loader_of(data, workers)
    batches = [next(loader) for _ in range(6)]
    ids = [number for batch in batches for number in batch.caption_ids.tolist()]
    assert len(set(ids)) == 24
    places = {stream: place for batch in batches[:2] for stream, place in batch.place.items()}
    again = ShardDataset(
        [opened(parquet)], None, maker(), 0, workers=workers, places=json.loads(json.dumps(places)), first_batch=2
    )
    loader = loader_of(again, workers)
    assert [next(loader).caption_ids.tolist() for _ in range(4)] == [b.caption_ids.tolist() for b in batches[2:]]


@pytest.fixture
def tokenizer(parquet, tmp_path):
    from vlp.processing.tokenizer import VlpClipTokenizer

    VlpClipTokenizer.train(EVERY, 520, 20).save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def test_run_resumes_exactly(parquet, tokenizer, tmp_path):
    options = dict(streaming=True, num_workers=2, save_steps=4, save_total_limit=5)
    train(run_of(str(parquet), tokenizer, tmp_path / "run", **options))
    whole = load_file(tmp_path / "run" / "model.safetensors")
    first = states(state_folder(tmp_path / "run"))[0]
    train(run_of(str(parquet), tokenizer, tmp_path / "run", resume_from_checkpoint=str(first), **options))
    again = load_file(tmp_path / "run" / "model.safetensors")
    assert all((whole[name] == again[name]).all() for name in whole)
    # and, without loss, with another number of workers
    options["num_workers"] = 1
    train(run_of(str(parquet), tokenizer, tmp_path / "run", resume_from_checkpoint=str(first), **options))


def test_what_cannot_be_streamed_is_refused(parquet, tokenizer, tmp_path):
    options = dict(streaming=True, num_workers=0)
    for more, message in (
        ({"num_workers": 5}, "4 files, fewer than the 5 workers"),
        ({"max_train_steps": None}, "number of rows is not known"),
        ({"hold_out": "caption=0-0"}, "--hold_out needs all rows"),
        ({"tokenizer_name": None}, "needs --tokenizer_name"),
    ):
        with pytest.raises(ArgumentError, match=message):
            train(run_of(str(parquet), tokenizer, tmp_path / "run", **options | more))
    datasets.Dataset.from_dict({"image": ["a.png"], "caption": ["a"]}).to_parquet(tmp_path / "paths.parquet")
    with pytest.raises(ArgumentError, match="paths or URLs of images"):
        train(run_of(str(tmp_path / "paths.parquet"), tokenizer, tmp_path / "run", **options))
    with pytest.raises(ArgumentError, match="must hold text"):
        datasets.Dataset.from_dict({"image": [b"a"], "caption": [1]}).to_parquet(tmp_path / "numbers.parquet")
        train(run_of(str(tmp_path / "numbers.parquet"), tokenizer, tmp_path / "run", **options))
