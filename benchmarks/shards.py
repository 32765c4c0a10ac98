"""Time loading batches from WebDataset shards: vlp, and webdataset set up as in open_clip's trainer.

    python benchmarks/shards.py [--rounds 5] [--workers 2] [--batch 64]

JPEG pictures of 512 x 384, a random crop of 224, captions tokenised with OpenAI's tokenizer. vlp's batches are uint8
until they are on the device; the conversion to floats there is included in its time. open_clip's workers return
float32.
"""

import argparse
import io
import sys
import tempfile
from pathlib import Path

import clip
import numpy as np
import open_clip
import webdataset as wds
from datasets import Dataset
from PIL import Image
from vlp.processing.augmentation import PerImage, ToPixelValues
from vlp.training.data.batches import Collator, train_loader
from vlp.training.data.rows import CaptionChooser
from vlp.training.data.samples import SampleMaker
from vlp.training.data.shard_writer import ShardsArguments, write_shards
from vlp.training.data.shards import expand
from vlp.training.data.sources import load_rows
from vlp.training.data.streams import ShardDataset
from vlp.training.families.clip import ClipArguments
from vlp.training.machine.hardware import cpu_cores
from workers import interleave, report, serve

import vlp

RESULTS = Path(__file__).with_suffix(".json")
SHARDS, EACH, BATCHES = 8, 128, 16
MERGES = Path(clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")


def write_data(folder: Path) -> None:
    """Write shards of bundled pictures, enlarged and with noise, so that the files are as large as photographs."""
    rows, rng = load_rows("emoji", "train", "image"), np.random.default_rng(0)
    pictures, captions = [], []
    for number in range(SHARDS * EACH):
        picture = Image.open(io.BytesIO(rows[number]["image"]["bytes"])).convert("RGB").resize((512, 384))
        noisy = np.asarray(picture, dtype=np.float32) + rng.normal(0, 12, (384, 512, 3))
        file = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        pictures.append({"bytes": file.getvalue(), "path": None})
        captions.append(rows[number]["caption"])
    Dataset.from_dict({"image": pictures, "caption": captions}).save_to_disk(folder / "rows")
    write_shards(
        ShardsArguments(dataset_name=str(folder / "rows"), samples_per_shard=EACH, output_dir=str(folder / "shards"))
    )


def vlp_batches(folder: str, batch: int, workers: int):
    """Pixel values (B, 3, 224, 224) and token ids of each batch, loaded by vlp."""
    images = vlp.VlpClipImageProcessor(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    processor = vlp.VlpClipProcessor(images, vlp.VlpClipTokenizer.from_openai_merges(MERGES, 77))
    arguments = ClipArguments(dataset_name="x.tar", per_device_train_batch_size=batch, num_workers=workers)
    maker = SampleMaker(chooser=CaptionChooser(), per_image=PerImage(224, "random", 0.9))
    dataset = ShardDataset([expand(f"{folder}/{{00000..{SHARDS - 1:05d}}}.tar")], None, maker, seed=0)
    to_pixel_values = ToPixelValues(images.image_mean, images.image_std, None)
    for found in train_loader(arguments, dataset, None, Collator(processor, 77)):
        yield to_pixel_values(found.pixels), found.input_ids


def webdataset_batches(folder: str, batch: int, workers: int):
    """The pipeline of open_clip_train/data.py, get_wds_dataset, with its buffer sizes.

    Its own grouping of files does not work with webdataset 1.0, so webdataset's grouping is used.
    """
    preprocess = open_clip.image_transform(
        224, is_train=True, mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD
    )
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    pipeline = wds.DataPipeline(
        wds.ResampledShards(f"{folder}/{{00000..{SHARDS - 1:05d}}}.tar", deterministic=True),
        wds.tarfile_to_samples(handler=wds.warn_and_continue),
        wds.shuffle(bufsize=5000, initial=1000),
        wds.decode("pilrgb", handler=wds.warn_and_continue),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map_dict(image=preprocess, text=lambda text: tokenizer(text)[0]),
        wds.to_tuple("image", "text"),
        wds.batched(batch, partial=False),
    )
    yield from wds.WebLoader(
        pipeline, batch_size=None, shuffle=False, num_workers=workers, persistent_workers=workers > 0
    )


def work(contender: str, folder: str, batch: int, workers: int) -> None:
    """Run a contender in this process (see `workers.serve`); a step loads BATCHES batches."""
    batches = (vlp_batches if contender == "vlp" else webdataset_batches)(folder, batch, workers)

    def step(number: int) -> None:
        for _ in range(BATCHES):
            pixels = next(batches)[0]
            assert pixels.shape == (batch, 3, 224, 224) and pixels.is_floating_point()

    serve(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=cpu_cores())
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--work", nargs=2, metavar=("CONTENDER", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(*options.work, options.batch, options.workers)
    words = [sys.executable, __file__, "--batch", str(options.batch), "--workers", str(options.workers), "--work"]
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        shards = f"{folder}/shards"
        seconds = interleave({name: [*words, name, shards] for name in ("vlp", "webdataset")}, options.rounds)
    samples = BATCHES * options.batch
    report(
        RESULTS,
        seconds,
        batch=options.batch,
        workers=options.workers,
        samples=samples,
        versions={"webdataset": wds.__version__, "open_clip": open_clip.__version__, "vlp": vlp.__version__},
    )


if __name__ == "__main__":
    main()
