"""The search index: search results, updates, storage and error messages."""

import json
import os
import sys
from collections import Counter

import pytest
import torch
from conftest import tiny_pair
from safetensors.torch import load_file
from test_data import picture
from torch.nn import functional as F

import vlp.commands.index as module
from vlp.commands.index import Index, NoIndexError, build, main
from vlp.inference import VlpPredictor, load

COLOURS = ["red", "green", "blue", "yellow", "black", "white"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "clip"
    clip, processor = tiny_pair()
    clip.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for number, colour in enumerate(COLOURS):
        (folder / ("more" if number % 2 else "") / f"{colour}.png").write_bytes(picture(colour))
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("not one either")
    return folder


def test_search_matches_exhaustive_comparison(model, pictures, tmp_path):
    assert build(pictures, tmp_path / "index", model, batch_size=2) == Counter({"not an image": 1})
    index, predictor = Index(tmp_path / "index"), load(model, "embed")
    assert len(index) == 6 and {path.name for path in (tmp_path / "index").iterdir()} == {
        ".vlp-files", "embeddings.safetensors", "index.json", "pictures.parquet",
    }  # fmt: skip
    from PIL import Image

    query = predictor.embed_texts(["two yellow triangles"])[0]
    scores = {path: (predictor.embed_images([Image.open(pictures / path)])[0] @ query).item()
              for path in index.table["path"].to_pylist()}  # fmt: skip
    hits = index.search(query, top_k=4)
    assert [hit.path for hit in hits] == sorted(scores, key=scores.get, reverse=True)[:4]
    assert [hit.score for hit in hits] == pytest.approx([scores[hit.path] for hit in hits], abs=1e-3)
    own = index.search(predictor.embed_images([Image.open(pictures / "more/green.png")])[0], top_k=1)[0]
    assert own.path == "more/green.png" and own.score == pytest.approx(1.0, abs=1e-3)
    assert len(index.search(query, top_k=99)) == 6


def test_only_new_pictures_are_embedded(model, pictures, tmp_path, monkeypatch):
    embedded = []
    embed = VlpPredictor.embed_images
    monkeypatch.setattr(
        VlpPredictor, "embed_images", lambda self, images: embedded.append(len(images)) or embed(self, images)
    )
    build(pictures, tmp_path / "index", model)
    assert sum(embedded) == 6
    before = {path: row for path, row in zip(Index(tmp_path / "index").table["path"].to_pylist(),
                                             Index(tmp_path / "index").embeddings.clone(), strict=True)}  # fmt: skip
    (pictures / "red.png").unlink()
    (pictures / "cyan.png").write_bytes(picture("cyan"))
    (pictures / "blue.png").write_bytes(picture("navy", (30, 30)))  # changed
    embedded.clear()
    reported = []
    build(pictures, tmp_path / "index", model, progress=lambda done, total: reported.append((done, total)))
    index = Index(tmp_path / "index")
    assert sum(embedded) == 2 and reported[-1] == (3, 3)  # the broken file is tried again
    paths = index.table["path"].to_pylist()
    assert "red.png" not in paths and "cyan.png" in paths and len(index) == 6
    assert torch.equal(index.embeddings[paths.index("more/green.png")], before["more/green.png"])
    assert not torch.equal(index.embeddings[paths.index("blue.png")], before["blue.png"])


def test_interrupted_build_is_resumed(model, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART", 2)
    embed, embedded = VlpPredictor.embed_images, []

    def interrupted(self, images):
        if len(embedded) == 2:
            raise KeyboardInterrupt
        embedded.append(len(images))
        return embed(self, images)

    monkeypatch.setattr(VlpPredictor, "embed_images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(pictures, tmp_path / "index", model, batch_size=2)
    assert not (tmp_path / "index").exists() and list(tmp_path.glob("index.building-*/index.json"))
    before = sum(embedded)
    embedded.clear()
    monkeypatch.setattr(
        VlpPredictor, "embed_images", lambda self, images: embedded.append(len(images)) or embed(self, images)
    )
    build(pictures, tmp_path / "index", model, batch_size=2)
    assert before + sum(embedded) == 6 and len(Index(tmp_path / "index")) == 6
    assert not list(tmp_path.glob("*building*"))


def clustered(count: int, width: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    middles = torch.randn(200, width, generator=generator)
    near = middles[torch.randint(200, (count,), generator=generator)]
    return F.normalize(near + 0.5 * torch.randn(count, width, generator=generator), dim=1)


def test_cells_of_a_large_index_match_exact_search(tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    vectors = clustered(5000)
    names = [(f"{number}.png", 1, 1) for number in range(5000)]
    module.save(tmp_path / "exact", names, vectors, "a model", tmp_path, None)
    monkeypatch.setattr(module, "EXACT", 1000)
    module.save(tmp_path / "index", names, vectors, "a model", tmp_path, None)
    exact, index = Index(tmp_path / "exact"), Index(tmp_path / "index")
    assert exact.faiss is None and index.faiss.ntotal == 5000
    found = total = 0
    for query in clustered(50, 32):
        expected = exact.search(query, 10)
        every = index.search(query, 10, probes=0)
        assert [hit.score for hit in every] == pytest.approx([hit.score for hit in expected], abs=1e-3)
        found += len({hit.path for hit in expected} & {hit.path for hit in index.search(query, 10, probes=20)})
        total += 10
    assert found / total > 0.95


def test_large_index_is_searched_exactly_without_faiss(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "EXACT", 1000)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    vectors = clustered(2000)
    module.save(tmp_path / "index", [(f"{n}.png", 1, 1) for n in range(2000)], vectors, "a model", tmp_path, None)
    assert Index(tmp_path / "index").faiss is None
    assert Index(tmp_path / "index").search(vectors[7], 1)[0].path == "7.png"


def test_faiss_gives_the_same_results(model, pictures, tmp_path):
    pytest.importorskip("faiss")
    build(pictures, tmp_path / "plain", model)
    build(pictures, tmp_path / "faiss", model, faiss="Flat")
    query = load(model, "embed").embed_texts(["a red square"])[0]
    plain, other = (Index(tmp_path / name).search(query, 6) for name in ("plain", "faiss"))
    assert [hit.path for hit in plain] == [hit.path for hit in other]
    assert [hit.score for hit in plain] == pytest.approx([hit.score for hit in other], abs=1e-3)


def test_the_command_line(model, pictures, tmp_path, monkeypatch, capsys):
    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["vlp index", *map(str, words)])
        main()
        return capsys.readouterr().out

    assert ": 6. Skipped: not an image: 1." in run("build", pictures, tmp_path / "index", "--model", model)
    assert json.loads((tmp_path / "index/index.json").read_text())["folder"] == str(pictures)
    lines = run("search", tmp_path / "index", "a", "red", "square", "--top_k", "3").splitlines()
    assert len(lines) == 3 and all(line.endswith(".png") for line in lines)
    assert run("search", tmp_path / "index", "--image", pictures / "red.png").splitlines()[0].endswith("  red.png")
    monkeypatch.setattr(sys, "stdin", iter([]))
    monkeypatch.setattr("sys.stdin", open(os.devnull))
    assert run("search", tmp_path / "index") == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["search", "nowhere", "x"], ".*nowhere contains no index: build one with `vlp index build"),
        (["build", "nowhere", "index", "--model", "M"], ".*nowhere: no such folder"),
        (["build", "empty", "index", "--model", "M"], ".*empty contains no pictures"),
        (["build", "pictures", "empty/other", "--model", "M"], "INDEX empty/other contains other files"),
        (
            ["build", "pictures", "index", "--model", "nothing"],
            "nothing: the configuration cannot be loaded: there",
        ),
    ],
)
def test_errors_are_reported(words, message, model, pictures, tmp_path, monkeypatch):
    (tmp_path / "empty/other").mkdir(parents=True)
    (tmp_path / "empty/other/notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["vlp index", *(model if word == "M" else word for word in words)])
    with pytest.raises(SystemExit, match=f"error: {message}"):
        main()


def test_links_outside_the_folder_are_skipped(model, pictures, tmp_path):
    (tmp_path / "secret.png").write_bytes(picture("red"))
    (pictures / "link.png").symlink_to(tmp_path / "secret.png")
    build(pictures, tmp_path / "index", model)
    assert "link.png" not in Index(tmp_path / "index").table["path"].to_pylist()


def test_vectors_are_stored_as_float16_of_unit_length(model, pictures, tmp_path):
    build(pictures, tmp_path / "index", model)
    vectors = load_file(tmp_path / "index/embeddings.safetensors")["embeddings"]
    assert vectors.dtype == torch.float16
    torch.testing.assert_close(vectors.float().norm(dim=1), torch.ones(6), atol=2e-3, rtol=0)
    with pytest.raises(NoIndexError, match="contains no index"):
        Index(pictures)


@pytest.mark.parametrize("name", ["pictures.parquet", "embeddings.safetensors"])
def test_pipes_in_an_index_are_reported(model, pictures, tmp_path, name):
    build(pictures, tmp_path / "index", model)
    (tmp_path / "index" / name).unlink()
    os.mkfifo(tmp_path / "index" / name)
    with pytest.raises(NoIndexError, match=f"damaged: {name}: is missing, or is not a file"):
        Index(tmp_path / "index")


def test_queries_of_another_width_are_reported(model, pictures, tmp_path):
    build(pictures, tmp_path / "index", model)
    with pytest.raises(NoIndexError, match="embeddings of 24 numbers, and its model of 3: build it again"):
        Index(tmp_path / "index").search(torch.ones(3))


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 5000, "nope/nope", "\x1b[31mx"])
def test_model_of_an_index_that_cannot_be_loaded_is_named(model, pictures, tmp_path, monkeypatch, name):
    build(pictures, tmp_path / "index", model)
    facts = json.loads((tmp_path / "index/index.json").read_text())
    (tmp_path / "index/index.json").write_text(json.dumps(facts | {"model": name}))
    monkeypatch.setattr(sys, "argv", ["vlp index", "search", str(tmp_path / "index"), "red"])
    with pytest.raises(SystemExit, match="error: The model of the index .*index: ") as error:
        main()
    assert len(str(error.value)) < 500 and str(error.value).isprintable()


def test_what_a_camera_writes_and_another_model_are_told(model, pictures, tmp_path, monkeypatch, capsys):
    (pictures / "photo.HEIC").write_bytes(b"ftypheic")
    other, processor = tiny_pair("resnet")
    for part in (other, processor):
        part.save_pretrained(tmp_path / "other")
    for name in (model, str(tmp_path / "other")):
        words = ["vlp index", "build", str(pictures), str(tmp_path / "index"), "--model", name]
        monkeypatch.setattr(sys, "argv", words)
        main()
        shown = capsys.readouterr()
        assert "warning: .heic files skipped: 1. Pillow cannot read them" in shown.err
    assert f"The index was built with {model}, or with other weights: all pictures are embedded again." in shown.err
