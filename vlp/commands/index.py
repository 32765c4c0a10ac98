"""`vlp index`: search a folder of up to a million pictures by words or by a picture.

    vlp index build pictures/ runs/index --model model_cards/clip-emoji     # run again to embed only new pictures
    vlp index search runs/index "a red apple"
    vlp index search runs/index --image apple.png

An index is a folder with three files: `embeddings.safetensors` has one unit vector per picture in float16 and is
memory-mapped; `pictures.parquet` has their paths in the same order; `index.json` names the model. Up to 100,000
pictures, and without faiss, the query is compared with every vector. Larger indexes are searched with faiss
(`pip install "vlp[faiss]"`), which groups the vectors into cells and searches the `--probes` nearest ones.
"""

import argparse
import importlib.util
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets.utils.py_utils import iter_batched
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ..errors import (
    ArgumentError,
    CommandParser,
    UserError,
    brief,
    printable,
    reported_errors,
)
from ..files import check_output, foreign_file, glob_escape, remove_written, usable_path, write_whole
from ..inference import Predictor, load
from ..loading import hash_weights, text_of
from ..processing.pictures import PictureError, extensions, read_picture
from ..training.data.rows import describe

# Shapes: N pictures, E width of the embeddings, K cells, T queries

UNREADABLE = (".heic", ".heif", ".avif", ".cr2", ".dng", ".nef", ".arw")  # of cameras; Pillow may not know them
EXACT = 100_000  # up to this many pictures, every vector is compared
PROBES = 64  # cells to search in larger indexes
TRAINED = 200_000  # vectors that faiss finds the cells with, at most about twice as many
PART = 4096  # embeddings are saved after this many pictures; an interruption loses at most so many
FAISS = "index.faiss"


class NoIndexError(UserError, ValueError):
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
                f"{printable(folder, 120)} contains no index: build one with "
                "`vlp index build PICTURES INDEX --model MODEL`."
            )
        self.facts, self.table, self.embeddings = read_index(self.folder)
        self.faiss = None
        if (self.folder / FAISS).is_file():
            try:
                self.faiss = import_faiss().read_index(str(self.folder / FAISS))
            except RuntimeError as error:
                raise damaged(self.folder, FAISS, error) from error

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

        Raises:
            NoIndexError: if the query has another width than the embeddings of the index.
        """
        if query.numel() != self.embeddings.shape[1]:
            raise NoIndexError(
                f"The index {printable(self.folder, 120)} has embeddings of {self.embeddings.shape[1]} numbers, and "
                f"its model of {query.numel()}: build it again with `vlp index build`."
            )
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


def read_index(folder: Path) -> tuple[dict, pa.Table, Tensor]:
    """Read the files of an index, or of a part of one, and check that they fit together.

    Args:
        folder: the folder, which has an index.json.

    Returns:
        The facts, the table of pictures, and their embeddings (N, E), memory-mapped.

    Raises:
        NoIndexError: if a file is damaged; the message names it.
    """
    name = "index.json"
    try:
        facts = json.loads((folder / name).read_text(encoding="utf-8"))
        if not isinstance(facts, dict) or not isinstance(facts.get("model"), str):
            raise ValueError("it names no model")
        for name in ("pictures.parquet", "embeddings.safetensors"):
            if not (folder / name).is_file():
                raise ValueError("is missing, or is not a file")
        name = "pictures.parquet"
        table = pq.read_table(folder / name, memory_map=True)
        wanted = {"path": pa.types.is_string, "size": pa.types.is_integer, "changed": pa.types.is_integer}
        for column, fits in wanted.items():
            if column not in table.column_names or not fits(table.schema.field(column).type):
                raise ValueError(f"its column {column} is missing or of another type")
            if table[column].null_count:
                raise ValueError(f"its column {column} has empty rows")
        name = "embeddings.safetensors"
        embeddings = load_file(folder / name)["embeddings"]
        if embeddings.ndim != 2 or embeddings.dtype != torch.float16 or not len(embeddings):
            raise ValueError(f"its embeddings are {embeddings.dtype} of shape {tuple(embeddings.shape)}")
        if len(embeddings) != len(table):
            raise ValueError(f"it has {len(embeddings)} embeddings for {len(table)} pictures")
        if not all(torch.isfinite(part).all() for part in embeddings.split(65_536)):
            raise ValueError("its embeddings are not finite")
    except (ValueError, KeyError, RecursionError, OSError, SafetensorError, pa.ArrowException) as error:
        raise damaged(folder, name, error) from error
    return facts, table, embeddings


def damaged(folder: Path, name: str, error: Exception) -> NoIndexError:
    """The error for a damaged file of an index."""
    return NoIndexError(
        f"The index {printable(folder, 120)} is damaged: {name}: {brief(error)[:160]}. Remove the folder, and build it "
        "again with `vlp index build`."
    )


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
    found, unreadable = [], Counter()
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in UNREADABLE and path.suffix.lower() not in extensions() and path.is_file():
            unreadable[path.suffix.lower()] += 1
        if path.suffix.lower() in extensions() and path.is_file() and path.resolve().is_relative_to(root):
            stat, name = path.stat(), path.relative_to(root).as_posix()
            try:
                name.encode()
            except UnicodeEncodeError:  # the table holds UTF-8
                print(f"warning: skipped {printable(name, 120)}: its name is not valid UTF-8.", file=sys.stderr)
                continue
            found.append((name, stat.st_size, stat.st_mtime_ns))
    for ending, count in unreadable.items():
        print(f"warning: {ending} files skipped: {count:,}. Pillow cannot read them: convert them to JPEG.",
              file=sys.stderr)  # fmt: skip
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
    embedding_size: int | None = None,
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
        embedding_size: keep only the first dimensions of an embedding, this many, of a model that was trained for that
            (`--embedding_sizes` of training); None: all.
        progress: called with the number of new pictures done and their total.

    Returns:
        The number of skipped pictures, by cause.

    Raises:
        NoIndexError: if there is nothing to index, or the target contains other files.
        UnsupportedModelError: if the model does not embed images and texts in one space.
    """
    folder, target = usable_path(folder, "PICTURES"), check_output(target, "INDEX", [str(folder)])
    if not 1 <= batch_size <= 65_536:
        raise ArgumentError(f"--batch_size must be from 1 to 65,536, got {printable(batch_size, 40)}.")
    if faiss is not None:
        check_factory(faiss)
    pictures, skipped = pictures_in(folder), Counter()
    predictor = predictor or load(model, "embed", embedding_size=embedding_size)
    identity = identity_of(predictor)
    known = StoredVectors.load(target, identity)
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
            facts = {"model": str(model), "identity": identity}
            known.parts.append(write_index(next_part(target), rows, embeddings, facts))
            known.add(rows, embeddings)
    kept = [picture for picture in pictures if picture in known.places]
    if not kept:
        raise NoIndexError(f"No picture in {folder} can be read: {describe(skipped)}.")
    save(target, kept, known.take(kept), model, folder, faiss, identity, predictor.embedding_size)
    for part in known.parts:
        remove_written(part)
    return skipped


def identity_of(predictor: Predictor) -> str:
    """A hash of a model's weights, preprocessing and embedding size.

    Embeddings of another model are never reused or searched.
    """
    found = blake2b(digest_size=16)
    hash_weights(found, predictor.model)
    if predictor.embedding_size is not None:
        found.update(f"{predictor.embedding_size} dimensions".encode())
    for part in (predictor.processor.image_processor, predictor.processor.tokenizer):
        text = part.to_json_string() if hasattr(part, "to_json_string") else text_of(part)
        found.update(text.encode(errors="surrogatepass"))
    return found.hexdigest()


def parts_of(target: Path) -> list[Path]:
    """The folders of the parts of an interrupted index, beside the index."""
    found = target.parent.glob(f"{glob_escape(target.name)}.building-*")
    return sorted(part for part in found if (part / "index.json").is_file() and not foreign_file(part))


def next_part(target: Path) -> Path:
    """A new folder for a part of an index."""
    number = 0
    while os.path.lexists(part := target.with_name(f"{target.name}.building-{number:06d}")):
        number += 1
    return part


def check_factory(faiss: str) -> None:
    """Check a factory string of faiss, some of which end the program. Raises NoIndexError if it is not accepted."""
    library = import_faiss()
    try:
        if len(faiss) > 200 or re.search(r"HNSW[01](?!\d)", faiss):
            raise ValueError("it is too long, or has fewer than two neighbours")
        library.index_factory(64, faiss, library.METRIC_INNER_PRODUCT)
    except (RuntimeError, ValueError) as error:
        reason = brief(error)[-120:]
        raise NoIndexError(
            f"--faiss {printable(faiss, 60)} is not a factory string of faiss, such as HNSW32: {reason}"
        ) from error


@dataclass
class StoredVectors:
    """Embeddings that were computed earlier.

    Attributes:
        matrices: matrices of embeddings, (rows, E) each.
        places: for each picture (path, size, modification time), the number of its matrix and its row there.
        parts: the folders of the parts of an interrupted index.
    """

    matrices: list[Tensor] = field(default_factory=list)
    places: dict[tuple, tuple[int, int]] = field(default_factory=dict)
    parts: list[Path] = field(default_factory=list)

    @classmethod
    def load(cls, target: Path, identity: str) -> "StoredVectors":
        """Load the embeddings of an existing or interrupted index.

        Args:
            target: the folder of the index.
            identity: only embeddings by the model of this identity are loaded (see `identity_of`).
        """
        known = cls(parts=parts_of(target))
        for place in [target, *known.parts]:
            if not (place / "index.json").is_file():
                continue
            try:
                facts, table, embeddings = read_index(place)
            except NoIndexError as error:
                print(f"warning: embedded anew: {error}", file=sys.stderr)
                continue
            if facts.get("identity") == identity:
                rows = zip(*(table[name].to_pylist() for name in ("path", "size", "changed")), strict=True)
                known.add(list(rows), embeddings)
            elif place == target:
                other = printable(facts["model"], 120)
                print(f"The index was built with {other}, or with other weights: all pictures are embedded again.",
                      file=sys.stderr)  # fmt: skip
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


def save(
    target: Path, pictures: list, vectors: Tensor, model: str, folder: Path, faiss: str | None, identity: str = "",
    embedding_size: int | None = None,
) -> None:  # fmt: skip
    """Write an index, completely or not at all; above EXACT pictures with faiss, if it is installed.

    Args:
        target: the folder of the index.
        pictures: N pictures (path, size, modification time).
        vectors: their embeddings (N, E).
        model: folder or hub name of the model; a folder is stored as its absolute path.
        folder: the folder of pictures.
        faiss: factory string of faiss; None for cells above EXACT pictures.
        identity: identity of the model, see `identity_of`.
        embedding_size: how many dimensions of an embedding are kept; None: all.
    """
    if faiss is None and len(pictures) > EXACT and importlib.util.find_spec("faiss"):
        faiss = f"IVF{round(len(pictures) ** 0.5)},SQfp16"  # about sqrt(N) cells, vectors in float16
    model = Path(model).resolve() if Path(model).is_dir() else model
    facts = {"model": str(model), "identity": identity, "folder": str(folder.resolve()), "width": vectors.shape[1],
             "embedding_size": embedding_size}  # fmt: skip
    write_index(target, pictures, vectors.half().contiguous(), facts, faiss)


def write_index(target: Path, pictures: list, vectors: Tensor, facts: dict, faiss: str | None = None) -> Path:
    """Write the files of an index, completely or not at all.

    Args:
        target: the folder of the index.
        pictures: N pictures (path, size, modification time).
        vectors: their embeddings (N, E), float16.
        facts: the content of index.json.
        faiss: factory string of faiss; None for none.

    Returns:
        The folder.
    """
    paths, sizes, changed = (list(column) for column in zip(*pictures, strict=True))

    def write(fresh: Path) -> None:
        save_file({"embeddings": vectors}, fresh / "embeddings.safetensors")
        pq.write_table(pa.table({"path": paths, "size": sizes, "changed": changed}), fresh / "pictures.parquet")
        if faiss:
            library = import_faiss()
            index = library.index_factory(facts["width"], faiss, library.METRIC_INNER_PRODUCT)
            try:
                index.train(vectors[:: max(1, len(vectors) // TRAINED)].float().numpy())
            except RuntimeError as error:
                reason = brief(error)[-160:]
                raise NoIndexError(f"--faiss {faiss} does not suit {len(vectors)} vectors: {reason}") from error
            for chunk in vectors.split(65_536):
                index.add(chunk.float().numpy())
            library.write_index(index, str(fresh / FAISS))
        (fresh / "index.json").write_text(json.dumps(facts, indent=1) + "\n")

    return write_whole(target, write)


def import_faiss():
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise NoIndexError('faiss is not installed: pip install "vlp[faiss]", or omit --faiss.') from error
    return faiss


# --- command line -----------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The parser of `vlp index`, with its subcommands build and search."""
    parser = CommandParser(prog="vlp index", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    builder = commands.add_parser("build", help="embed a folder's pictures")
    builder.add_argument("pictures", help="folder of pictures, including its subfolders")
    builder.add_argument("index", help="folder of the index")
    builder.add_argument("--model", required=True, help="folder or hub name of a CLIP or BLIP")
    builder.add_argument(
        "--batch_size", type=int, default=64, help="number of pictures to embed at a time (default: 64)"
    )
    builder.add_argument(
        "--embedding_size",
        type=int,
        help="dimensions to keep of an embedding, for a model trained with --embedding_sizes",
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
        options: the options of `vlp index search`, as attributes.

    Raises:
        NoIndexError: if there is no index, or the picture cannot be read.
    """
    if options.top_k < 1 or options.probes < 0:
        raise ArgumentError(
            f"--top_k must be at least 1 and --probes at least 0, got {options.top_k} and {options.probes}."
        )
    index = Index(usable_path(options.index, "INDEX"))
    try:
        predictor = load(index.facts["model"], "embed", embedding_size=index.facts.get("embedding_size"))
    except ArgumentError as error:
        raise NoIndexError(f"The model of the index {printable(options.index, 120)}: {brief(error)[:300]}") from error
    if index.facts.get("identity") != identity_of(predictor):
        raise NoIndexError(
            f"The model {printable(index.facts['model'], 120)} is not the one that the index was built with: build it "
            "again with `vlp index build`."
        )

    def print_hits(query: Tensor) -> None:
        start = time.perf_counter()
        hits = index.search(query, options.top_k, options.probes)
        milliseconds = 1000 * (time.perf_counter() - start)
        for hit in hits:
            print(f"{hit.score:.3f}  {printable(hit.path)}")
        print(f"{len(index):,} pictures searched in {milliseconds:.1f} ms.", file=sys.stderr)

    if options.image:
        try:
            print_hits(predictor.embed_images([read_picture(options.image)])[0])
        except PictureError as error:
            raise NoIndexError(f"--image {printable(options.image, 120)}: {error}.") from None
    elif options.words:
        print_hits(predictor.embed_texts([" ".join(options.words)])[0])
    else:
        print("Enter one query per line; an empty line ends the search.", file=sys.stderr)
        for line in iter(lambda: sys.stdin.readline().strip(), ""):
            print_hits(predictor.embed_texts([line])[0])


def main() -> None:
    """The command `vlp index`."""
    options = build_parser().parse_args()
    with reported_errors():
        if options.command == "search":
            search(options)
            return
        with tqdm(unit=" pictures") as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            skipped = build(options.pictures, options.index, options.model, options.batch_size, options.faiss,
                            embedding_size=options.embedding_size, progress=progress)  # fmt: skip
        count = len(Index(usable_path(options.index, "INDEX")))
        print(f"Indexed pictures in {printable(options.index)}: {count:,}. Skipped: {describe(skipped)}.")


if __name__ == "__main__":
    main()
