"""`vlp-index`: find pictures of a folder by words, or by a picture, among a million of them.

    vlp-index build pictures/ runs/index --model model_cards/clip-emoji     # again: new pictures alone are embedded
    vlp-index search runs/index "a red apple"
    vlp-index search runs/index --image apple.png

An index is a folder: `embeddings.safetensors`, read where it lies on disk, one unit vector a picture in float16;
`pictures.parquet`, their paths in the same order; `index.json`, the model. Up to EXACT pictures every vector is
compared. Beyond, vectors stand together in cells around their means (an inverted file, Sivic & Zisserman, 2003;
spherical k-means), and the cells nearest to the query are compared: `--probes` says how many, all of them is exact.
"""

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets.utils.py_utils import iter_batched
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ..errors import UnsupportedModelError
from ..files import write_whole
from ..inference import Predictor, load
from ..processing.pictures import PictureError, extensions, read_picture
from ..training.data.rows import describe

# Shapes: N pictures, E width of the embeddings, K cells, T queries

EXACT = 100_000  # pictures up to which every vector is compared
PROBES = 64  # cells that are compared beyond
PART = 4096  # pictures whose embeddings are kept on disk while an index is built: what an interruption loses at most
SAMPLE, ROUNDS = 100_000, 8  # vectors that cells are found on, and rounds of k-means
FAISS = "index.faiss"


class NoIndexError(ValueError):
    """An index that cannot be built or read; the message says what to do."""


@dataclass
class Hit:
    """A picture that was found: its path in the folder, and its cosine with the query."""

    path: str
    score: float


class Index:
    """An index on disk. Raises NoIndexError where there is none in the folder.

    Attributes:
        facts: `model`, `folder` (of the pictures), `width`. paths: (N,) in the order of the vectors.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "index.json").is_file():
            raise NoIndexError(f"{folder} holds no index: `vlp-index build PICTURES {folder} --model MODEL` makes one.")
        self.facts = json.loads((self.folder / "index.json").read_text())
        tensors = load_file(self.folder / "embeddings.safetensors")  # stays on disk until it is looked at
        self.embeddings = tensors["embeddings"]  # (N, E) float16
        self.centres, self.starts = tensors.get("centres"), tensors.get("starts")  # (K, E), (K + 1,)
        self.table = pq.read_table(self.folder / "pictures.parquet", memory_map=True)
        self.faiss = None
        if (self.folder / FAISS).is_file():
            self.faiss = import_faiss().read_index(str(self.folder / FAISS))

    def __len__(self) -> int:
        return len(self.embeddings)

    def search(self, query: Tensor, top_k: int = 10, probes: int = PROBES) -> list[Hit]:
        """The pictures nearest to a query (E,) of unit length, the best first.

        Args:
            probes: cells to compare, where there are cells; all of them, or 0, for the exact answer.
        """
        query, count = query.float().flatten(), min(top_k, len(self))
        if self.faiss is not None:
            scores, numbers = self.faiss.search(query[None].numpy(), count)
            found = [(s, n) for s, n in zip(scores[0].tolist(), numbers[0].tolist(), strict=True) if n >= 0]
        else:
            near = self.near(query, 4 * count, probes)  # by products in float16; their order, by float32
            best = (self.embeddings[near].float() @ query).topk(min(count, len(near)))
            found = list(zip(best.values.tolist(), near[best.indices].tolist(), strict=True))
        paths = self.table["path"]
        return [Hit(paths[number].as_py(), score) for score, number in found]

    def near(self, query: Tensor, count: int, probes: int) -> Tensor:
        """Numbers of the vectors that seem nearest: of all, or of those in the cells that are nearest."""
        half = query.half()
        if self.centres is None or not 0 < probes < len(self.centres):
            return (self.embeddings @ half).topk(min(count, len(self))).indices
        cells = (self.centres @ query).topk(probes).indices.sort().values
        ranges = [(int(self.starts[cell]), int(self.starts[cell + 1])) for cell in cells]
        scores = torch.cat([self.embeddings[start:stop] @ half for start, stop in ranges])
        numbers = torch.cat([torch.arange(start, stop) for start, stop in ranges])
        return numbers[scores.topk(min(count, len(scores))).indices]


# --- building ---------------------------------------------------------------------------------------------------------


def pictures_in(folder: Path) -> list[tuple[str, int, int]]:
    """(path in the folder, bytes, time of change) of all pictures, also in folders within; links out are left out."""
    root = folder.resolve()
    if not root.is_dir():
        raise NoIndexError(f"{folder}: there is no such folder.")
    found = []
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in extensions() and path.is_file() and path.resolve().is_relative_to(root):
            facts = path.stat()
            found.append((path.relative_to(root).as_posix(), facts.st_size, facts.st_mtime_ns))
    if not found:
        raise NoIndexError(f"{folder} holds no picture ({', '.join(sorted(extensions()))}).")
    return found


def build(
    folder: str | Path,
    target: str | Path,
    model: str,
    batch_size: int = 64,
    faiss: str | None = None,
    predictor: Predictor | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Counter:
    """Write an index of a folder's pictures; what an index there has of unchanged pictures is taken from it.

    Args:
        model: folder or hub name of a CLIP or BLIP; `predictor` if it is loaded already.
        faiss: a factory string of faiss, such as "HNSW32", to search by faiss instead.
        progress: told how many pictures are done, of how many.

    Returns the pictures that could not be read, by cause.

    Raises NoIndexError where there is nothing to index, UnsupportedModelError where the model does not compare.
    """
    folder, target = Path(folder), Path(target)
    if target.is_dir() and any(target.iterdir()) and not (target / "index.json").is_file():
        raise NoIndexError(f"{target} holds other files: name a folder of its own for the index.")
    if faiss:
        import_faiss()
    pictures, skipped = pictures_in(folder), Counter()
    predictor = predictor or load(model, "embed")
    parts = target.with_name(target.name + ".building")
    known = StoredVectors.load(target, parts, model)
    missing, done = [picture for picture in pictures if picture not in known.places], 0
    for part in iter_batched(missing, PART):
        rows, vectors = [], []
        for batch in iter_batched(part, batch_size):
            readable = []
            for picture in batch:
                try:
                    readable.append((picture, read_picture(folder / picture[0])))
                except PictureError as error:
                    skipped[str(error)] += 1
            if readable:
                rows += [picture for picture, _ in readable]
                vectors.append(predictor.embed_images([image for _, image in readable]).half())
            done += len(batch)
            progress(done, len(missing))
        if rows:
            embeddings = torch.cat(vectors)
            if embeddings.ndim != 2:
                raise NoIndexError(f"{model} gives several vectors a picture (BLIP-2): name a CLIP or a BLIP.")
            number = len(list(parts.glob("*/")))
            write_index(parts / f"{number:06d}", rows, {"embeddings": embeddings}, {"model": model})
            known.add(rows, embeddings)
    kept = [picture for picture in pictures if picture in known.places]
    if not kept:
        raise NoIndexError(f"No picture of {folder} can be read: {describe(skipped)}.")
    save(target, kept, known.take(kept), model, folder, faiss)
    shutil.rmtree(parts, ignore_errors=True)
    return skipped


@dataclass
class StoredVectors:
    """The vectors that are there already: matrices, and which row of which is each picture's."""

    matrices: list[Tensor] = field(default_factory=list)
    places: dict[tuple, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def load(cls, target: Path, parts: Path, model: str) -> "StoredVectors":
        """What an index, or one that was being built, has by the same model."""
        known = cls()
        for place in [target, *sorted(parts.glob("*/"))]:
            if (place / "index.json").is_file() and json.loads((place / "index.json").read_text())["model"] == model:
                table = pq.read_table(place / "pictures.parquet")
                rows = zip(*(table[name].to_pylist() for name in ("path", "size", "changed")), strict=True)
                known.add(list(rows), load_file(place / "embeddings.safetensors")["embeddings"])
        return known

    def add(self, pictures: list[tuple], embeddings: Tensor) -> None:
        self.places |= {picture: (len(self.matrices), row) for row, picture in enumerate(pictures)}
        self.matrices.append(embeddings)

    def take(self, pictures: list[tuple]) -> Tensor:
        """(N, E) the vectors of pictures, in their order."""
        places = torch.tensor([self.places[picture] for picture in pictures])  # (N, 2)
        result = self.matrices[0].new_empty(len(pictures), self.matrices[0].shape[1])
        for number, matrix in enumerate(self.matrices):
            mine = (places[:, 0] == number).nonzero()[:, 0]
            result[mine] = matrix[places[mine, 1]]
        return result


def save(target: Path, pictures: list, vectors: Tensor, model: str, folder: Path, faiss: str | None) -> None:
    """Write an index, whole or not at all; of many pictures, in cells."""
    tensors = {"embeddings": vectors.half().contiguous()}
    if len(pictures) > EXACT and not faiss:
        order, centres, starts = in_cells(vectors)
        pictures = [pictures[number] for number in order.tolist()]
        tensors = {"embeddings": vectors[order].half().contiguous(), "centres": centres, "starts": starts}
    facts = {"model": model, "folder": str(folder.resolve()), "width": vectors.shape[1]}
    write_index(target, pictures, tensors, facts, faiss)


def write_index(target: Path, pictures: list, tensors: dict[str, Tensor], facts: dict, faiss: str | None = None):
    paths, sizes, changed = (list(column) for column in zip(*pictures, strict=True))

    def write(fresh: Path) -> None:
        save_file(tensors, fresh / "embeddings.safetensors")
        pq.write_table(pa.table({"path": paths, "size": sizes, "changed": changed}), fresh / "pictures.parquet")
        if faiss:
            library = import_faiss()
            index = library.index_factory(facts["width"], faiss, library.METRIC_INNER_PRODUCT)
            values = tensors["embeddings"].float().numpy()
            index.train(values)
            index.add(values)
            library.write_index(index, str(fresh / FAISS))
        (fresh / "index.json").write_text(json.dumps(facts, indent=1) + "\n")

    write_whole(target, write)


def in_cells(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors (N, E) in about sqrt(N) cells: their order (N,), the cells' means (K, E), their starts (K + 1,)."""
    generator = torch.Generator().manual_seed(0)
    count = round(len(vectors) ** 0.5)
    sample = vectors[torch.randperm(len(vectors), generator=generator)[:SAMPLE]].float()
    centres = sample[torch.randperm(len(sample), generator=generator)[:count]].clone()
    for _ in range(ROUNDS):
        cell = nearest(sample, centres)
        sums = torch.zeros_like(centres).index_add_(0, cell, sample)
        empty = sums.abs().sum(dim=1) == 0
        sums[empty] = sample[torch.randint(len(sample), (int(empty.sum()),), generator=generator)]
        centres = F.normalize(sums, dim=1)
    cell = torch.cat([nearest(chunk.float(), centres) for chunk in vectors.split(65_536)])
    order = cell.argsort(stable=True)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(cell, minlength=count).cumsum(0)])
    return order, centres, starts


def nearest(vectors: Tensor, centres: Tensor) -> Tensor:
    return torch.cat([(chunk @ centres.T).argmax(dim=1) for chunk in vectors.split(8192)])


def import_faiss():
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise NoIndexError('faiss is not installed: pip install "vlp[faiss]", or leave out --faiss.') from error
    return faiss


# --- command line -----------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vlp-index", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    builder = commands.add_parser("build", help="embed a folder's pictures")
    builder.add_argument("pictures", help="folder of pictures, those in folders within too")
    builder.add_argument("index", help="folder of the index")
    builder.add_argument("--model", required=True, help="folder or hub name of a CLIP or BLIP")
    builder.add_argument("--batch_size", type=int, default=64, help="pictures at a time (default: 64)")
    builder.add_argument("--faiss", metavar="FACTORY", help='search by faiss: its factory string, such as "HNSW32"')
    searcher = commands.add_parser("search", help="find pictures; with neither words nor --image, asks for words")
    searcher.add_argument("index", help="folder of the index")
    searcher.add_argument("words", nargs="*", help="what to look for")
    searcher.add_argument("--image", help="a picture to look for others like it")
    searcher.add_argument("--top_k", type=int, default=10, help="pictures to find (default: 10)")
    searcher.add_argument("--probes", type=int, default=PROBES,
                          help=f"cells to compare in an index of more than {EXACT:,} pictures; 0 for all, which is "
                          f"exact (default: {PROBES})")  # fmt: skip
    return parser


def search(options) -> None:
    index = Index(options.index)
    predictor = load(index.facts["model"], "embed")

    def tell(query: Tensor) -> None:
        start = time.perf_counter()
        hits = index.search(query, options.top_k, options.probes)
        took = 1000 * (time.perf_counter() - start)
        for hit in hits:
            print(f"{hit.score:.3f}  {hit.path}")
        print(f"{len(index):,} pictures looked through in {took:.1f} ms.", file=sys.stderr)

    if options.image:
        try:
            tell(predictor.embed_images([read_picture(options.image)])[0])
        except PictureError as error:
            raise NoIndexError(f"--image {options.image}: {error}.") from None
    elif options.words:
        tell(predictor.embed_texts([" ".join(options.words)])[0])
    else:
        print("What to look for, one query a line; an empty line ends.", file=sys.stderr)
        for line in iter(lambda: sys.stdin.readline().strip(), ""):
            tell(predictor.embed_texts([line])[0])


def main() -> None:
    options = build_parser().parse_args()
    try:
        if options.command == "search":
            search(options)
            return
        with tqdm(unit="picture") as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            skipped = build(options.pictures, options.index, options.model, options.batch_size, options.faiss,
                            progress=progress)  # fmt: skip
    except (NoIndexError, UnsupportedModelError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(Index(options.index)):,} pictures in {options.index}; could not be read: {describe(skipped)}.")


if __name__ == "__main__":
    main()
