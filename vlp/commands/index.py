"""`vlp-index`: search a folder of up to a million pictures by words or by a picture.

    vlp-index build pictures/ runs/index --model model_cards/clip-emoji     # run again to embed only new pictures
    vlp-index search runs/index "a red apple"
    vlp-index search runs/index --image apple.png

An index is a folder with three files: `embeddings.safetensors` has one unit vector per picture in float16 and is
memory-mapped; `pictures.parquet` has their paths in the same order; `index.json` names the model. Up to EXACT pictures,
and without faiss, the query is compared with every vector. Larger indexes are searched with faiss
(`pip install "vlp[faiss]"`), which groups the vectors into cells and searches the `--probes` nearest ones.
"""

import argparse
import importlib.util
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
from tqdm import tqdm

from ..errors import UnsupportedModelError
from ..files import write_whole
from ..inference import Predictor, load
from ..processing.pictures import PictureError, extensions, read_picture
from ..training.data.rows import describe

# Shapes: N pictures, E width of the embeddings, K cells, T queries

EXACT = 100_000  # up to this many pictures, every vector is compared
PROBES = 64  # cells to search in larger indexes
TRAINED = 200_000  # vectors that faiss finds the cells with, at most about twice as many
PART = 4096  # embeddings are saved after this many pictures; an interruption loses at most so many
FAISS = "index.faiss"


class NoIndexError(ValueError):
    """An index that cannot be built or read; the message says how to fix it."""


@dataclass
class Hit:
    """A search result.

    Attributes:
        path: the path of the picture, relative to the indexed folder.
        score: its cosine similarity with the query.
    """

    path: str
    score: float


class Index:
    """An index on disk.

    Attributes:
        folder: the folder of the index.
        facts: the content of index.json: `model`, `folder` (of the pictures) and `width` (of the embeddings).
        embeddings: (N, E) unit vectors, float16, memory-mapped.
        table: the pictures, with the columns `path`, `size` and `changed`, in the order of the vectors.
        faiss: the index of faiss; None if the index was built without it.

    Raises:
        NoIndexError: if the folder contains no index.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "index.json").is_file():
            raise NoIndexError(
                f"{folder} contains no index: build one with `vlp-index build PICTURES {folder} --model MODEL`."
            )
        self.facts = json.loads((self.folder / "index.json").read_text())
        tensors = load_file(self.folder / "embeddings.safetensors")  # memory-mapped
        self.embeddings = tensors["embeddings"]  # (N, E) float16
        self.table = pq.read_table(self.folder / "pictures.parquet", memory_map=True)
        self.faiss = None
        if (self.folder / FAISS).is_file():
            self.faiss = import_faiss().read_index(str(self.folder / FAISS))

    def __len__(self) -> int:
        return len(self.embeddings)

    def search(self, query: Tensor, top_k: int = 10, probes: int = PROBES) -> list[Hit]:
        """Find the pictures nearest to a query.

        Args:
            query: embedding (E,) of unit length.
            top_k: number of pictures to find.
            probes: number of cells to search, if the index has cells; 0, or all cells, for an exact search.

        Returns:
            At most `top_k` pictures, best first.
        """
        query, count = query.float().flatten(), min(top_k, len(self))
        near = self.candidates(query, min(4 * count, len(self)), probes)
        best = (self.embeddings[near].float() @ query).topk(min(count, len(near)))  # re-ranked in float32
        paths = self.table["path"]
        numbers = near[best.indices].tolist()
        return [Hit(paths[n].as_py(), score) for n, score in zip(numbers, best.values.tolist(), strict=True)]

    def candidates(self, query: Tensor, count: int, probes: int) -> Tensor:
        """Find candidates by dot products in float16.

        Args:
            query: embedding (E,) of unit length, float32.
            count: number of candidates.
            probes: number of cells to search, if the index has cells; 0 for all of them.

        Returns:
            The numbers of at most `count` vectors, best first.
        """
        if self.faiss is None:
            return (self.embeddings @ query.half()).topk(count).indices
        cells = import_faiss().try_extract_index_ivf(self.faiss)  # None for an index without cells
        if cells is not None:
            cells.nprobe = min(probes or cells.nlist, cells.nlist)
        numbers = torch.from_numpy(self.faiss.search(query[None].numpy(), count)[1][0])
        return numbers[numbers >= 0]


# --- building ---------------------------------------------------------------------------------------------------------


def pictures_in(folder: Path) -> list[tuple[str, int, int]]:
    """List all pictures in a folder and its subfolders.

    Links to files outside the folder are ignored.

    Returns:
        For each picture: its path relative to the folder, its size in bytes, and its modification time in nanoseconds.

    Raises:
        NoIndexError: if there is no such folder, or it contains no pictures.
    """
    root = folder.resolve()
    if not root.is_dir():
        raise NoIndexError(f"{folder}: no such folder.")
    found = []
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in extensions() and path.is_file() and path.resolve().is_relative_to(root):
            stat = path.stat()
            found.append((path.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns))
    if not found:
        raise NoIndexError(f"{folder} contains no pictures ({', '.join(sorted(extensions()))}).")
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
    """Build or update the index of a folder of pictures.

    Embeddings of unchanged pictures are reused from an existing or interrupted index by the same model.

    Args:
        folder: the folder of pictures; subfolders are included.
        target: the folder of the index.
        model: folder or hub name of a CLIP or BLIP.
        batch_size: number of pictures to embed at a time.
        faiss: factory string of faiss, such as "HNSW32", to search with faiss; None to search without it.
        predictor: the model, if it is already loaded; None to load it.
        progress: called with the number of new pictures done and their total.

    Returns:
        The number of skipped pictures, by cause.

    Raises:
        NoIndexError: if there is nothing to index, or the target contains other files.
        UnsupportedModelError: if the model does not embed images and texts in one space.
    """
    folder, target = Path(folder), Path(target)
    if target.is_dir() and any(target.iterdir()) and not (target / "index.json").is_file():
        raise NoIndexError(f"{target} contains other files: choose a dedicated folder for the index.")
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
                raise NoIndexError(
                    f"{model} computes several embeddings per picture (BLIP-2): choose a CLIP or a BLIP."
                )
            number = len(list(parts.glob("*/")))
            write_index(parts / f"{number:06d}", rows, embeddings, {"model": model})
            known.add(rows, embeddings)
    kept = [picture for picture in pictures if picture in known.places]
    if not kept:
        raise NoIndexError(f"No picture in {folder} can be read: {describe(skipped)}.")
    save(target, kept, known.take(kept), model, folder, faiss)
    shutil.rmtree(parts, ignore_errors=True)
    return skipped


@dataclass
class StoredVectors:
    """Embeddings that were computed earlier.

    Attributes:
        matrices: matrices of embeddings, (rows, E) each.
        places: for each picture (path, size, modification time), the number of its matrix and its row there.
    """

    matrices: list[Tensor] = field(default_factory=list)
    places: dict[tuple, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def load(cls, target: Path, parts: Path, model: str) -> "StoredVectors":
        """Load the embeddings of an existing or interrupted index.

        Args:
            target: the folder of the index.
            parts: the folder of the parts of an interrupted index.
            model: only embeddings by this model are loaded.
        """
        known = cls()
        for place in [target, *sorted(parts.glob("*/"))]:
            if (place / "index.json").is_file() and json.loads((place / "index.json").read_text())["model"] == model:
                table = pq.read_table(place / "pictures.parquet")
                rows = zip(*(table[name].to_pylist() for name in ("path", "size", "changed")), strict=True)
                known.add(list(rows), load_file(place / "embeddings.safetensors")["embeddings"])
        return known

    def add(self, pictures: list[tuple], embeddings: Tensor) -> None:
        """Add pictures with their embeddings (rows, E), in the same order."""
        self.places |= {picture: (len(self.matrices), row) for row, picture in enumerate(pictures)}
        self.matrices.append(embeddings)

    def take(self, pictures: list[tuple]) -> Tensor:
        """The embeddings (N, E) of pictures, in their order."""
        places = torch.tensor([self.places[picture] for picture in pictures])  # (N, 2)
        result = self.matrices[0].new_empty(len(pictures), self.matrices[0].shape[1])
        for number, matrix in enumerate(self.matrices):
            mine = (places[:, 0] == number).nonzero()[:, 0]
            result[mine] = matrix[places[mine, 1]]
        return result


def save(target: Path, pictures: list, vectors: Tensor, model: str, folder: Path, faiss: str | None) -> None:
    """Write an index, completely or not at all; above EXACT pictures with faiss, if it is installed.

    Args:
        target: the folder of the index.
        pictures: N pictures (path, size, modification time).
        vectors: their embeddings (N, E).
        model: folder or hub name of the model.
        folder: the folder of pictures.
        faiss: factory string of faiss; None for cells above EXACT pictures.
    """
    if faiss is None and len(pictures) > EXACT and importlib.util.find_spec("faiss"):
        faiss = f"IVF{round(len(pictures) ** 0.5)},SQfp16"  # about sqrt(N) cells, vectors in float16
    facts = {"model": model, "folder": str(folder.resolve()), "width": vectors.shape[1]}
    write_index(target, pictures, vectors.half().contiguous(), facts, faiss)


def write_index(target: Path, pictures: list, vectors: Tensor, facts: dict, faiss: str | None = None) -> None:
    """Write the files of an index, completely or not at all.

    Args:
        target: the folder of the index.
        pictures: N pictures (path, size, modification time).
        vectors: their embeddings (N, E), float16.
        facts: the content of index.json.
        faiss: factory string of faiss; None for none.
    """
    paths, sizes, changed = (list(column) for column in zip(*pictures, strict=True))

    def write(fresh: Path) -> None:
        save_file({"embeddings": vectors}, fresh / "embeddings.safetensors")
        pq.write_table(pa.table({"path": paths, "size": sizes, "changed": changed}), fresh / "pictures.parquet")
        if faiss:
            library = import_faiss()
            index = library.index_factory(facts["width"], faiss, library.METRIC_INNER_PRODUCT)
            index.train(vectors[:: max(1, len(vectors) // TRAINED)].float().numpy())
            for chunk in vectors.split(65_536):
                index.add(chunk.float().numpy())
            library.write_index(index, str(fresh / FAISS))
        (fresh / "index.json").write_text(json.dumps(facts, indent=1) + "\n")

    write_whole(target, write)


def import_faiss():
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise NoIndexError('faiss is not installed: pip install "vlp[faiss]", or omit --faiss.') from error
    return faiss


# --- command line -----------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The parser of `vlp-index`, with its subcommands build and search."""
    parser = argparse.ArgumentParser(prog="vlp-index", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    builder = commands.add_parser("build", help="embed a folder's pictures")
    builder.add_argument("pictures", help="folder of pictures, including its subfolders")
    builder.add_argument("index", help="folder of the index")
    builder.add_argument("--model", required=True, help="folder or hub name of a CLIP or BLIP")
    builder.add_argument(
        "--batch_size", type=int, default=64, help="number of pictures to embed at a time (default: 64)"
    )
    builder.add_argument("--faiss", metavar="FACTORY", help='search with faiss; its factory string, such as "HNSW32"')
    searcher = commands.add_parser(
        "search", help="search for pictures; without words or --image, queries are read from standard input"
    )
    searcher.add_argument("index", help="folder of the index")
    searcher.add_argument("words", nargs="*", help="the query")
    searcher.add_argument("--image", help="a picture, to find similar pictures")
    searcher.add_argument("--top_k", type=int, default=10, help="number of pictures to find (default: 10)")
    searcher.add_argument("--probes", type=int, default=PROBES,
                          help=f"number of cells to search in an index of more than {EXACT:,} pictures; 0 for all "
                          f"cells, which is exact (default: {PROBES})")  # fmt: skip
    return parser


def search(options) -> None:
    """Search an index and print the results, as the command line does.

    Args:
        options: the options of `vlp-index search`, as attributes.

    Raises:
        NoIndexError: if there is no index, or the picture cannot be read.
    """
    index = Index(options.index)
    predictor = load(index.facts["model"], "embed")

    def print_hits(query: Tensor) -> None:
        start = time.perf_counter()
        hits = index.search(query, options.top_k, options.probes)
        milliseconds = 1000 * (time.perf_counter() - start)
        for hit in hits:
            print(f"{hit.score:.3f}  {hit.path}")
        print(f"{len(index):,} pictures searched in {milliseconds:.1f} ms.", file=sys.stderr)

    if options.image:
        try:
            print_hits(predictor.embed_images([read_picture(options.image)])[0])
        except PictureError as error:
            raise NoIndexError(f"--image {options.image}: {error}.") from None
    elif options.words:
        print_hits(predictor.embed_texts([" ".join(options.words)])[0])
    else:
        print("Enter one query per line; an empty line ends the search.", file=sys.stderr)
        for line in iter(lambda: sys.stdin.readline().strip(), ""):
            print_hits(predictor.embed_texts([line])[0])


def main() -> None:
    """The command `vlp-index`."""
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
    except (NoIndexError, UnsupportedModelError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"Indexed pictures in {options.index}: {len(Index(options.index)):,}. Skipped: {describe(skipped)}.")


if __name__ == "__main__":
    main()
