"""CapFilt (BLIP, section 3.3): a captioner captions web images, a filter drops captions that do not match.

Captioner and filter are fine-tuned separately from the same pre-trained model. If they share weights, the filter keeps
wrong captions that the captioner generated (table 13 of the paper).
"""

import dataclasses
import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow.parquet as parquet
import torch
from accelerate import PartialState
from tqdm import tqdm

from ...errors import ArgumentError, BadDataError, ResumeError, UnsupportedModelError, printable
from ...files import UNFINISHED, kind_of, usable_path
from ...inference import load
from ...processing.blip import clean_caption
from ...processing.pictures import MAX_PIXELS, picture_bytes
from ..arguments import EMOJI, check_values, option, publishable, require_at_least_one, require_share
from ..machine.checkpoint import compare
from ..machine.hardware import use_cpu_well
from .rows import BadRow, CaptionChooser, describe, picture_id, picture_of, unusable
from .sources import is_shards, load_rows, require_text

OPTIONS_FILE = "capfilt.json"
DIGEST = "options_digest"  # of all options as they were given
CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: "data/train-*.parquet"}
---
# Pairs kept by CapFilt

Created with vlp from `%s`. The columns are image, caption, source (web or synthetic), score (the filter's match
probability) and image_id. Dropped captions are in `dropped/`, without images. The options are in `capfilt.json`.
"""


@dataclass(kw_only=True)
class CapFiltArguments:
    """Options of CapFilt. The defaults are those of the paper (BLIP, sections 3.3 and 4.3)."""

    dataset_name: str = option(EMOJI, "pairs to caption and filter, as --dataset_name of training; not shards")
    train_split: str = option("train", "split to read")
    image_column: str = option("image", "column with the images, or with their paths")
    caption_column: str = option("caption", "column with one web caption or a list of them")
    image_root: str | None = option(None, "folder that image paths start from; that of the data file if not given")
    encoding: str | None = option(None, "encoding of a table, such as cp1252; UTF-8 if not given")
    max_image_pixels: int = option(MAX_PIXELS, "larger images, in pixels, are skipped as decompression bombs")
    captioner: str | None = option(None, "folder or hub name of a BLIP fine-tuned with --task captioning")
    filter: str | None = option(None, "folder or hub name of a BLIP fine-tuned with --task retrieval")
    prompt: str = option("", "prompt that the captioner was fine-tuned with")
    top_p: float = option(0.9, "probability mass (0 to 1) of nucleus sampling")
    min_length: int = option(5, "minimum tokens of a generated caption, start token and prompt included")
    max_length: int = option(20, "maximum tokens of a generated caption, start token and prompt included")
    threshold: float = option(0.5, "captions with a match probability up to this (0 to 1) are dropped")
    batch_size: int = option(32, "images per batch")
    shard_size: int = option(1000, "source rows per output file; an interrupted run keeps its finished files")
    num_threads: int | None = option(
        None, "CPU threads per process when computing on the CPU; if not given, the cores divided by the processes"
    )
    seed: int = option(0, "seed of nucleus sampling")
    output_dir: str | None = option(None, "folder of the new data set; runs/capfilt if not given")

    def __post_init__(self):
        for name in ("captioner", "filter"):
            if not getattr(self, name):
                raise ArgumentError(f"CapFilt needs --{name}, the folder of a fine-tuned BLIP.")
        check_values(self)
        require_at_least_one(
            self, "batch_size", "shard_size", "min_length", "max_length", "max_image_pixels", "num_threads"
        )
        require_share(self, "top_p", "threshold")


class CapFilt:
    """The captioner and the filter.

    Args:
        arguments: the options, which name both models.
        device: where the models run.

    Raises:
        ArgumentError: if one of them is not a BLIP with the required head.
    """

    def __init__(self, arguments: CapFiltArguments, device: torch.device):
        self.arguments = arguments
        try:
            self.captioner = load(arguments.captioner, "caption", device)
            self.filter = load(arguments.filter, "match", device)
        except UnsupportedModelError as error:
            raise ArgumentError(str(error)) from error

    def caption(self, images: list) -> list[str]:
        """Generate a caption per image by nucleus sampling, which beats beam search in the paper (table 2)."""
        arguments = self.arguments
        return self.captioner.caption(
            images, arguments.prompt, num_beams=1, do_sample=True, top_p=arguments.top_p, top_k=0,
            min_length=arguments.min_length, max_length=arguments.max_length,
        )  # fmt: skip

    def match(self, images: list, captions: list[list[str]]) -> list[list[float]]:
        """Compute the probability that each caption matches its image. Each image is encoded once.

        Args:
            images: PIL images.
            captions: the captions of each image.

        Returns:
            The probabilities (0 to 1), in the structure of `captions`.
        """
        counts = torch.tensor([len(row) for row in captions])
        index = torch.arange(len(images)).repeat_interleave(counts)
        logits = self.filter.match(self.filter.encode_images(images), index, [text for row in captions for text in row])
        return [part.tolist() for part in logits.softmax(dim=-1)[:, 1].split(counts.tolist())]


def capfilt(arguments: CapFiltArguments) -> None:
    """Caption and filter a data set, and write the kept pairs as a data set for training, file by file.

    Existing files of an interrupted run are kept. Called by every process.

    Raises:
        ArgumentError: if the data, a column or a model does not fit, or the output folder holds other files.
        ResumeError: if the output folder was created with other options.
        BadDataError: if the filter kept no caption.
    """
    state = PartialState()
    if state.device.type == "cpu":
        use_cpu_well(arguments.num_threads, state.num_processes)
    if is_shards(arguments.dataset_name):
        raise ArgumentError("CapFilt needs random access to the rows: --dataset_name cannot be shards.")
    rows = load_rows(arguments.dataset_name, arguments.train_split, arguments.image_column, arguments.image_root,
                     caption_column=arguments.caption_column, encoding=arguments.encoding)  # fmt: skip
    require_text(rows, arguments.caption_column, arguments.dataset_name, "--caption_column")
    folder = usable_path(arguments.output_dir, "--output_dir")
    if state.is_main_process:
        prepare(folder, arguments)
    state.wait_for_everyone()
    models = CapFilt(arguments, state.device)
    shards = range(0, len(rows), arguments.shard_size)
    own = [n for n in range(len(shards)) if n % state.num_processes == state.process_index]
    causes: Counter = Counter()
    for number in tqdm(own, unit="shard", disable=not state.is_main_process):
        target = folder / "data" / f"train-{number:05d}.parquet"
        if not target.exists():
            torch.manual_seed(arguments.seed + number)  # a shard does not depend on when it is created
            chunk = rows.select(range(shards[number], min(shards[number] + arguments.shard_size, len(rows))))
            causes += make_shard(models, chunk, target, folder / "dropped" / target.name, arguments)
    state.wait_for_everyone()
    if state.is_main_process:
        report(folder, causes)


def prepare(folder: Path, arguments: CapFiltArguments) -> None:
    """Create the output folder, or check that an existing one was created with the same options.

    Raises:
        ResumeError: if the options differ; the message lists the differences.
        ArgumentError: if the folder holds other files.
    """
    options, path = dataclasses.asdict(arguments), folder / OPTIONS_FILE
    del options["num_threads"], options["output_dir"]  # which may change when a run is resumed
    given = digest_of(options)
    options = publishable(options)
    if path.is_file():
        try:
            saved = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            raise ResumeError(f"{printable(path, 160)} is damaged: remove the folder, or choose another.") from error
        digest = saved.pop(DIGEST, given)
        saved.pop("output_dir", None)
        differences = compare(saved, options)
        if digest != given and not differences:
            differences = ["another folder of --dataset_name, --image_root, --captioner or --filter"]
        if differences:
            shown = "; ".join(printable(line, 90) for line in differences[:3])
            raise ResumeError(
                f"{printable(folder, 160)} was created with other options: {shown}. Choose another --output_dir, or "
                "give those options to continue."
            )
        return
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ArgumentError(
            f"--output_dir {printable(folder, 120)} is {kind_of(folder)} that exists, or holds other files: choose "
            "another."
        )
    for name in ("data", "dropped"):
        (folder / name).mkdir(parents=True)
    (folder / "README.md").write_text(CARD % options["dataset_name"])
    path.write_text(json.dumps(options | {DIGEST: given}, indent=1) + "\n")


def digest_of(options: dict) -> str:
    """Return a digest of the options as given. Published names leave out local paths, so two models could share one."""
    whole = {name: os.path.realpath(value) if isinstance(value, str) and os.path.exists(value) else value
             for name, value in options.items()}  # fmt: skip
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def make_shard(models: CapFilt, rows, target: Path, dropped: Path, arguments: CapFiltArguments) -> Counter:
    """Caption and filter some rows, and write one file of kept and one of dropped captions, each atomically.

    Args:
        models: the captioner and the filter.
        rows: the source rows.
        target: Parquet file of the kept pairs.
        dropped: Parquet file of the dropped captions.
        arguments: the options.

    Returns:
        The number of unusable rows by cause.
    """
    chooser = CaptionChooser(caption_column=arguments.caption_column)
    kept: list[dict] = []
    rejected: list[dict] = []
    causes: Counter = Counter()
    usable = []
    for row in rows:
        try:
            image = picture_of(row, arguments.image_column, arguments.max_image_pixels)
        except BadRow as error:
            causes[str(error)] += 1
            continue
        try:
            captions = chooser.captions(row)
        except BadRow:
            captions = []  # images without a caption are captioned too
        identity = picture_id(row, arguments.image_column)
        usable.append((identity, row[arguments.image_column], image, [clean_caption(text) for text in captions]))
    for start in range(0, len(usable), arguments.batch_size):
        batch = usable[start : start + arguments.batch_size]
        images = [image for _, _, image, _ in batch]
        generated = models.caption(images)
        texts = [[*web, new] for (_, _, _, web), new in zip(batch, generated, strict=True)]
        for (identity, source, _, web), captions, scores in zip(batch, texts, models.match(images, texts), strict=True):
            for index, (caption, score) in enumerate(zip(captions, scores, strict=True)):
                origin = "web" if index < len(web) else "synthetic"
                entry = {"caption": caption, "source": origin, "score": score, "image_id": identity}
                if caption and score > arguments.threshold:
                    kept.append({"image": source} | entry)
                else:
                    rejected.append(entry)
    features = datasets.Features({
        "image": datasets.Image(decode=False), "caption": datasets.Value("string"), "source": datasets.Value("string"),
        "score": datasets.Value("float32"), "image_id": datasets.Value("string"),
    })  # fmt: skip
    without_image = [name for name in features if name != "image"]
    for path, pairs, names in ((dropped, rejected, without_image), (target, kept, list(features))):
        columns = {name: [entry[name] for entry in pairs] for name in names}
        if "image" in names:
            columns["image"] = [{"bytes": picture_bytes(image), "path": None} for image in columns["image"]]
        table = datasets.Dataset.from_dict(columns, datasets.Features({name: features[name] for name in names}))
        temporary = path.with_name(f"{UNFINISHED}{path.name}")
        table.to_parquet(str(temporary))
        os.replace(temporary, path)
    return causes


def report(folder: Path, causes: Counter) -> None:
    """Print how many captions were kept, and the unusable rows by cause.

    Raises:
        BadDataError: if no caption was kept.
    """
    counts = {}
    for name in ("data", "dropped"):
        tables = [parquet.read_table(path, columns=["source"]) for path in sorted((folder / name).glob("*.parquet"))]
        counts[name] = Counter(source for table in tables for source in table["source"].to_pylist())
    if not counts["data"]:
        paths = sorted((folder / "dropped").glob("*.parquet"))
        rows = [row for path in paths for row in parquet.read_table(path, columns=["caption", "score"]).to_pylist()]
        scores = [row["score"] for row in rows if row["caption"]]
        if not scores:
            raise unusable("No row can be used", causes)
        raise BadDataError(
            f"The filter kept none of {len(scores)} captions: the highest match probability is {max(scores):.2f}. "
            f"Fine-tune it with --task retrieval, or lower --threshold, with another --output_dir."
        )
    for source in ("web", "synthetic"):
        total = counts["data"][source] + counts["dropped"][source]
        print(f"{source}: kept {counts['data'][source]:,} of {total:,} captions.")
    print(f"Skipped rows: {describe(causes)}.")
    print(f"The data set is in {folder}. To train on it: accelerate launch training blip --dataset_name {folder}")
