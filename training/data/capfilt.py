"""CapFilt (BLIP, section 3.3): a captioner writes about web images, a filter drops captions that do not match.

Captioner and filter are fine-tuned apart from the same pre-trained model: with shared weights the filter passes what
the captioner makes up (table 13 of the paper).
"""

import dataclasses
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

from ...errors import ArgumentError, BadDataError, ResumeError, UnsupportedModelError
from ...inference import load
from ...processing.blip import clean_caption
from ...processing.pictures import MAX_PIXELS, picture_bytes
from ..arguments import EMOJI, option, require_at_least_one, require_share
from ..machine.checkpoint import compare
from ..machine.hardware import cpu_cores, use_cpu_well
from .rows import BadRow, CaptionChooser, describe, picture_id, picture_of
from .sources import is_shards, load_rows, require_text

OPTIONS_FILE = "capfilt.json"
CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: "data/train-*.parquet"}
---
# Pairs that CapFilt kept

Made by vlp from `%s`: columns image, caption, source (web or synthetic), score (the filter's probability of a match)
and image_id. What was dropped is in `dropped/`, without its images. The options are in `capfilt.json`.
"""


@dataclass(kw_only=True)
class CapFiltArguments:
    """CapFilt: caption images and filter captions. The defaults are those of the paper (BLIP, sections 3.3 and 4.3)."""

    dataset_name: str = option(EMOJI, "pairs to caption and to filter, as for training; not shards")
    train_split: str = option("train", "split to read")
    image_column: str = option("image", "column with the images, or with their paths")
    caption_column: str = option("caption", "column with one web caption or a list of them")
    image_root: str | None = option(None, "folder that image paths start from; that of the file where not given")
    max_image_pixels: int = option(MAX_PIXELS, "images of more pixels are skipped as decompression bombs, in pixels")
    captioner: str | None = option(None, "folder or hub name of a BLIP that was fine-tuned with --task captioning")
    filter: str | None = option(None, "folder or hub name of a BLIP that was fine-tuned with --task retrieval")
    prompt: str = option("", "what the captioner was trained to begin with")
    top_p: float = option(0.9, "share of probability (0 to 1) that nucleus sampling draws from")
    min_length: int = option(5, "fewest tokens of a new caption, start and prompt included")
    max_length: int = option(20, "most tokens of a new caption, start and prompt included")
    threshold: float = option(0.5, "captions that match with a probability up to this are dropped (0 to 1)")
    batch_size: int = option(32, "images at a time")
    shard_size: int = option(1000, "rows in a file of the new data set; what is written when all is stopped, stays")
    seed: int = option(0, "seed of the sampling")
    output_dir: str | None = option(None, "folder of the new data set; runs/capfilt where not given")

    def __post_init__(self):
        for name in ("captioner", "filter"):
            if not getattr(self, name):
                raise ArgumentError(f"CapFilt needs --{name}, the folder of a fine-tuned BLIP.")
        require_at_least_one(self, "batch_size", "shard_size", "min_length", "max_length", "max_image_pixels")
        require_share(self, "top_p", "threshold")


class CapFilt:
    """The captioner and the filter. Raises ArgumentError if one of them is not a BLIP with the needed head."""

    def __init__(self, arguments: CapFiltArguments, device: torch.device):
        self.arguments = arguments
        try:
            self.captioner = load(arguments.captioner, "caption", device)
            self.filter = load(arguments.filter, "match", device)
        except UnsupportedModelError as error:
            raise ArgumentError(str(error)) from error

    def caption(self, images: list) -> list[str]:
        """A caption for each image, by nucleus sampling, which the paper finds better than beams (table 2)."""
        arguments = self.arguments
        return self.captioner.caption(
            images, arguments.prompt, num_beams=1, do_sample=True, top_p=arguments.top_p, top_k=0,
            min_length=arguments.min_length, max_length=arguments.max_length,
        )  # fmt: skip

    def match(self, images: list, captions: list[list[str]]) -> list[list[float]]:
        """The probability that each caption matches its image; each image is encoded once."""
        counts = torch.tensor([len(row) for row in captions])
        index = torch.arange(len(images)).repeat_interleave(counts)
        logits = self.filter.match(self.filter.encode_images(images), index, [text for row in captions for text in row])
        return [part.tolist() for part in logits.softmax(dim=-1)[:, 1].split(counts.tolist())]


def capfilt(arguments: CapFiltArguments) -> None:
    """Write the pairs that are kept as a data set that training reads, shard by shard; those that are there, stay."""
    state = PartialState()
    if state.device.type == "cpu":
        use_cpu_well(max(1, cpu_cores() // state.num_processes))
    if is_shards(arguments.dataset_name):
        raise ArgumentError("CapFilt needs data whose rows are known beforehand: --dataset_name cannot be shards.")
    rows = load_rows(arguments.dataset_name, arguments.train_split, arguments.image_column, arguments.image_root)
    require_text(rows, arguments.caption_column, arguments.dataset_name, "--caption_column")
    folder = Path(arguments.output_dir)
    if state.is_main_process:
        prepare(folder, arguments)
    state.wait_for_everyone()
    pair = CapFilt(arguments, state.device)
    shards = range(0, len(rows), arguments.shard_size)
    mine = [n for n in range(len(shards)) if n % state.num_processes == state.process_index]
    causes: Counter = Counter()
    for number in tqdm(mine, unit="shard", disable=not state.is_main_process):
        target = folder / "data" / f"train-{number:05d}.parquet"
        if not target.exists():
            torch.manual_seed(arguments.seed + number)  # so that a shard is the same whenever it is made
            chunk = rows.select(range(shards[number], min(shards[number] + arguments.shard_size, len(rows))))
            causes += make_shard(pair, chunk, target, folder / "dropped" / target.name, arguments)
    state.wait_for_everyone()
    if state.is_main_process:
        report(folder, causes)


def prepare(folder: Path, arguments: CapFiltArguments) -> None:
    """Make the folder, or check that what it holds was made with the same options.

    Raises ResumeError, with what differs, where it was not; ArgumentError where it holds other things.
    """
    options, path = dataclasses.asdict(arguments), folder / OPTIONS_FILE
    if path.is_file():
        if differences := compare(json.loads(path.read_text()), options):
            raise ResumeError(f"{folder} was made with other options: {'; '.join(differences)}.")
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise ArgumentError(f"--output_dir {folder} holds other files: name another.")
    for name in ("data", "dropped"):
        (folder / name).mkdir(parents=True)
    (folder / "README.md").write_text(CARD % arguments.dataset_name)
    path.write_text(json.dumps(options, indent=1) + "\n")


def make_shard(pair: CapFilt, rows, target: Path, dropped: Path, arguments: CapFiltArguments) -> Counter:
    """Caption and filter some rows, and write them, whole; returns the rows that could not be used, by cause."""
    chooser = CaptionChooser(caption_column=arguments.caption_column)
    kept: list[dict] = []
    rest: list[dict] = []
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
            captions = []  # an image without a caption gets one
        identity = picture_id(row, arguments.image_column)
        usable.append((identity, row[arguments.image_column], image, [clean_caption(text) for text in captions]))
    for start in range(0, len(usable), arguments.batch_size):
        batch = usable[start : start + arguments.batch_size]
        images = [image for _, _, image, _ in batch]
        written = pair.caption(images)
        texts = [[*web, new] for (_, _, _, web), new in zip(batch, written, strict=True)]
        for (identity, source, _, web), captions, scores in zip(batch, texts, pair.match(images, texts), strict=True):
            for place, (caption, score) in enumerate(zip(captions, scores, strict=True)):
                origin = "web" if place < len(web) else "synthetic"
                facts = {"caption": caption, "source": origin, "score": score, "image_id": identity}
                good = bool(caption) and score > arguments.threshold
                (kept if good else rest).append({"image": source} | facts if good else facts)
    features = datasets.Features({
        "image": datasets.Image(decode=False), "caption": datasets.Value("string"), "source": datasets.Value("string"),
        "score": datasets.Value("float32"), "image_id": datasets.Value("string"),
    })  # fmt: skip
    for path, pairs, names in ((dropped, rest, [n for n in features if n != "image"]), (target, kept, list(features))):
        columns = {name: [entry[name] for entry in pairs] for name in names}
        if "image" in names:
            columns["image"] = [{"bytes": picture_bytes(image), "path": None} for image in columns["image"]]
        table = datasets.Dataset.from_dict(columns, datasets.Features({name: features[name] for name in names}))
        fresh = path.with_name(f".{path.name}.writing")
        table.to_parquet(str(fresh))
        os.replace(fresh, path)
    return causes


def report(folder: Path, causes: Counter) -> None:
    counts = {}
    for name in ("data", "dropped"):
        tables = [parquet.read_table(path, columns=["source"]) for path in sorted((folder / name).glob("*.parquet"))]
        counts[name] = Counter(source for table in tables for source in table["source"].to_pylist())
    if not counts["data"]:
        raise BadDataError(f"The filter kept none of {sum(counts['dropped'].values())} captions: is it fine-tuned?")
    for source in ("web", "synthetic"):
        whole = counts["data"][source] + counts["dropped"][source]
        print(f"{source}: kept {counts['data'][source]:,} of {whole:,} captions.")
    print(f"Bad rows: {describe(causes)}.")
    print(f"The data set is in {folder}. Train on it: accelerate launch training blip --dataset_name {folder}")
