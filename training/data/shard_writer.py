"""Write any data set as WebDataset shards with an index."""

import io
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ...errors import BadDataError
from ...files import check_output, write_whole
from ...processing.pictures import PictureError, formats, picture_bytes
from ..arguments import EMOJI, check_values, option, require_at_least_one
from .rows import BadRow, captions_of, describe, picture_id
from .shards import INDEX, require_webdataset
from .sources import load_rows, require_text

EXTENSION = {"JPEG2000": "jp2", "MPO": "mpo", "SUN": "ras", "SPIDER": "spider"}  # if it differs from the format's name


@dataclass(kw_only=True)
class ShardsArguments:
    """Options of writing a data set as WebDataset shards."""

    dataset_name: str = option(EMOJI, "pairs to write, as --dataset_name of training")
    dataset_config_name: str | None = option(None, "configuration of a hub data set")
    train_split: str = option("train", "split to read")
    image_column: str = option("image", "column with the images or their paths; all other columns are stored as JSON")
    caption_column: str = option("caption", "column with the captions; the first caption is also stored as text")
    image_root: str | None = option(None, "folder that image paths start from; that of the data file if not given")
    encoding: str | None = option(None, "encoding of a table, such as cp1252; UTF-8 if not given")
    samples_per_shard: int = option(1000, "samples per shard; training needs a shard per worker of each process")
    seed: int = option(0, "seed of the order of the samples")
    output_dir: str | None = option(None, "folder for the shards and their index; runs/shards if not given")

    def __post_init__(self):
        check_values(self)
        require_at_least_one(self, "samples_per_shard")


def write_shards(arguments: ShardsArguments) -> None:
    """Write a data set as shuffled shards with an index. The bytes of the images are copied unchanged.

    Raises:
        ArgumentError: if webdataset is not installed, the data cannot be loaded, or the output folder holds other
            files.
    """
    require_webdataset()
    from webdataset import ShardWriter

    target, causes = Path(arguments.output_dir), Counter()
    check_output(arguments.output_dir, sources=[arguments.dataset_name, arguments.image_root])
    rows = load_rows(
        arguments.dataset_name, arguments.train_split, arguments.image_column, arguments.image_root,
        arguments.dataset_config_name, caption_column=arguments.caption_column, encoding=arguments.encoding,
    ).shuffle(seed=arguments.seed)  # fmt: skip
    for column in arguments.caption_column.split(","):
        require_text(rows, column, arguments.dataset_name, "--caption_column")
    shards: dict[str, dict[str, int]] = {}

    def write(folder: Path) -> None:
        def note(path: str) -> None:
            shards[Path(path).name] = {"samples": writer.count, "bytes": os.path.getsize(path)}

        options = {"maxcount": arguments.samples_per_shard, "encoder": False, "post": note, "verbose": 0}
        with ShardWriter(f"{str(folder).replace('%', '%%')}/%05d.tar", **options) as writer:
            for number, row in enumerate(tqdm(rows, unit=" samples")):
                try:
                    writer.write(
                        {"__key__": f"{number:09d}"} | files_of(row, arguments.image_column, arguments.caption_column)
                    )
                except BadRow as error:
                    causes[str(error)] += 1
        if not any(shard["samples"] for shard in shards.values()):
            raise BadDataError(f"no row can be used: {describe(causes)}. No shards were written")
        (folder / INDEX).write_text(json.dumps({"shards": shards}, indent=1))

    target = write_whole(target, write)
    total = sum(shard["samples"] for shard in shards.values())
    print(f"{total:,} samples in {len(shards):,} shards. Skipped rows: {describe(causes)}.")
    print(f"To train on them: --dataset_name '{target}/{{00000..{len(shards) - 1:05d}}}.tar'")


def files_of(row: dict, image_column: str, caption_column: str) -> dict[str, bytes]:
    """The files of a sample: the image, the first caption as text, and all columns except the image as JSON.

    Other readers of WebDataset, such as open_clip's, use the text file.

    Args:
        row: a row of the data set.
        image_column: column with the image.
        caption_column: column with the captions, or several, joined by commas; the first caption becomes the text.

    Returns:
        Contents by kind: the image's format, "txt" and "json".

    Raises:
        BadRow: if there is no image, it cannot be read, or there is no caption.
    """
    try:
        content = picture_bytes(row[image_column])
        with Image.open(io.BytesIO(content), formats=formats()) as image:
            kind = EXTENSION.get(image.format, image.format).lower()
    except PictureError as error:
        raise BadRow(str(error)) from None
    except Exception:
        raise BadRow("not an image") from None
    rest = {"image_id": picture_id(row, image_column)} | {
        k: v for k, v in row.items() if k != image_column and v is not None
    }
    text = captions_of(row, caption_column)[0]
    return {kind: content, "txt": text.encode(), "json": json.dumps(rest, ensure_ascii=False, default=str).encode()}
