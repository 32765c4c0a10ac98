"""The search index: what it finds, what it keeps, what it refuses. Run: pytest tests/test_index.py"""

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
from vlp.commands.index import Index, NoIndexError, build, in_cells, main
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


def test_what_is_found_is_what_comparing_finds(model, pictures, tmp_path):
    assert build(pictures, tmp_path / "index", model, batch_size=2) == Counter({"not an image": 1})
    index, ready = Index(tmp_path / "index"), load(model, "embed")
    assert len(index) == 6 and {path.name for path in (tmp_path / "index").iterdir()} == {
        "embeddings.safetensors", "index.json", "pictures.parquet",
    }  # fmt: skip
    from PIL import Image

    query = ready.embed_texts(["two yellow triangles"])[0]
    scores = {path: (ready.embed_images([Image.open(pictures / path)])[0] @ query).item()
              for path in index.table["path"].to_pylist()}  # fmt: skip
    hits = index.search(query, top_k=4)
    assert [hit.path for hit in hits] == sorted(scores, key=scores.get, reverse=True)[:4]
    assert [hit.score for hit in hits] == pytest.approx([scores[hit.path] for hit in hits], abs=1e-3)
    own = index.search(ready.embed_images([Image.open(pictures / "more/green.png")])[0], top_k=1)[0]
    assert own.path == "more/green.png" and own.score == pytest.approx(1.0, abs=1e-3)
    assert len(index.search(query, top_k=99)) == 6


def test_new_pictures_alone_are_embedded(model, pictures, tmp_path, monkeypatch):
    seen = []
    embed = VlpPredictor.embed_images
    monkeypatch.setattr(
        VlpPredictor, "embed_images", lambda self, images: seen.append(len(images)) or embed(self, images)
    )
    build(pictures, tmp_path / "index", model)
    assert sum(seen) == 6
    before = {path: row for path, row in zip(Index(tmp_path / "index").table["path"].to_pylist(),
                                             Index(tmp_path / "index").embeddings.clone(), strict=True)}  # fmt: skip
    (pictures / "red.png").unlink()
    (pictures / "cyan.png").write_bytes(picture("cyan"))
    (pictures / "blue.png").write_bytes(picture("navy", (30, 30)))  # changed
    seen.clear()
    told = []
    build(pictures, tmp_path / "index", model, progress=lambda done, total: told.append((done, total)))
    index = Index(tmp_path / "index")
    assert sum(seen) == 2 and told[-1] == (3, 3)  # the broken one is tried again
    paths = index.table["path"].to_pylist()
    assert "red.png" not in paths and "cyan.png" in paths and len(index) == 6
    assert torch.equal(index.embeddings[paths.index("more/green.png")], before["more/green.png"])
    assert not torch.equal(index.embeddings[paths.index("blue.png")], before["blue.png"])


def test_a_build_that_was_stopped_goes_on(model, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART", 2)
    embed, seen = VlpPredictor.embed_images, []

    def stops(self, images):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(images))
        return embed(self, images)

    monkeypatch.setattr(VlpPredictor, "embed_images", stops)
    with pytest.raises(KeyboardInterrupt):
        build(pictures, tmp_path / "index", model, batch_size=2)
    assert not (tmp_path / "index").exists() and list((tmp_path / "index.building").iterdir())
    before = sum(seen)
    seen.clear()
    monkeypatch.setattr(
        VlpPredictor, "embed_images", lambda self, images: seen.append(len(images)) or embed(self, images)
    )
    build(pictures, tmp_path / "index", model, batch_size=2)
    assert before + sum(seen) == 6 and len(Index(tmp_path / "index")) == 6
    assert not (tmp_path / "index.building").exists()


def clustered(count: int, width: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    middles = torch.randn(200, width, generator=generator)
    near = middles[torch.randint(200, (count,), generator=generator)]
    return F.normalize(near + 0.5 * torch.randn(count, width, generator=generator), dim=1)


def test_cells_hold_every_vector_once_and_find_what_all_of_them_find(tmp_path, monkeypatch):
    vectors = clustered(5000)
    order, centres, starts = in_cells(vectors)
    assert sorted(order.tolist()) == list(range(5000)) and starts[0] == 0 and starts[-1] == 5000
    assert centres.shape == (71, 32)
    monkeypatch.setattr(module, "EXACT", 1000)
    names = [(f"{number}.png", 1, 1) for number in range(5000)]
    module.save(tmp_path / "index", names, vectors, "a model", tmp_path, None)
    index = Index(tmp_path / "index")
    right = total = 0
    for query in clustered(50, 32):
        wanted = {f"{number}.png" for number in (vectors.half() @ query.half()).float().topk(10).indices.tolist()}
        exact = index.search(query, 10, probes=0)
        assert len(wanted & {hit.path for hit in exact}) >= 9  # equal scores in float16 may be in another order
        assert [h.score for h in index.search(query, 10, probes=71)] == pytest.approx([h.score for h in exact])
        right += len({hit.path for hit in exact} & {hit.path for hit in index.search(query, 10, probes=20)})
        total += 10
    assert right / total > 0.95


def test_faiss_finds_the_same(model, pictures, tmp_path):
    pytest.importorskip("faiss")
    build(pictures, tmp_path / "plain", model)
    build(pictures, tmp_path / "faiss", model, faiss="Flat")
    query = load(model, "embed").embed_texts(["a red square"])[0]
    plain, other = (Index(tmp_path / name).search(query, 6) for name in ("plain", "faiss"))
    assert [hit.path for hit in plain] == [hit.path for hit in other]
    assert [hit.score for hit in plain] == pytest.approx([hit.score for hit in other], abs=1e-3)


def test_the_command_line(model, pictures, tmp_path, monkeypatch, capsys):
    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["vlp-index", *map(str, words)])
        main()
        return capsys.readouterr().out

    assert "6 pictures in" in run("build", pictures, tmp_path / "index", "--model", model)
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
        (["search", "nowhere", "x"], "nowhere holds no index: `vlp-index build"),
        (["build", "nowhere", "index", "--model", "M"], "nowhere: there is no such folder"),
        (["build", "empty", "index", "--model", "M"], "empty holds no picture"),
        (["build", "pictures", "empty/other", "--model", "M"], "empty/other holds other files"),
        (["build", "pictures", "index", "--model", "nothing"], "nothing is not a model folder of vlp or transformers"),
    ],
)
def test_what_is_wrong_is_told(words, message, model, pictures, tmp_path, monkeypatch):
    (tmp_path / "empty/other").mkdir(parents=True)
    (tmp_path / "empty/other/notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["vlp-index", *(model if word == "M" else word for word in words)])
    with pytest.raises(SystemExit, match=f"error: {message}"):
        main()


def test_links_out_of_the_folder_are_left_out(model, pictures, tmp_path):
    (tmp_path / "secret.png").write_bytes(picture("red"))
    (pictures / "link.png").symlink_to(tmp_path / "secret.png")
    build(pictures, tmp_path / "index", model)
    assert "link.png" not in Index(tmp_path / "index").table["path"].to_pylist()


def test_vectors_are_stored_in_float16_of_unit_length(model, pictures, tmp_path):
    build(pictures, tmp_path / "index", model)
    vectors = load_file(tmp_path / "index/embeddings.safetensors")["embeddings"]
    assert vectors.dtype == torch.float16
    torch.testing.assert_close(vectors.float().norm(dim=1), torch.ones(6), atol=2e-3, rtol=0)
    with pytest.raises(NoIndexError, match="holds no index"):
        Index(pictures)
