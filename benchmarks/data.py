"""Time reading photographs for training: vlp, open_clip's webdataset pipeline, torchvision and datasets.

    python benchmarks/data.py [--rounds 5] [--samples 64]

Each contender is one process with one thread, as a loading worker has. Real photographs (from scikit-image and
scikit-learn) are cropped and resized to each of three sizes, and saved as JPEG with quality 90. All contenders draw the
same kind of crop (at least 0.9 of the area, resized to 224 x 224, bicubic). vlp and open_clip read tar files,
torchvision and datasets files from a folder and a Parquet file. Also measured: how far vlp's pixels are from those of
the picture decoded in full, and the memory of each process.

    python benchmarks/data.py --train

trains the same CLIP twice on JPEGs of 512 x 512 pixels, once with each decoding, and compares the results.
"""

import argparse
import io
import itertools
import json
import os
import random
import resource
import sys
import tempfile
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from shards import webdataset_batches
from skimage import data as photographs
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2
from vlp.processing.augmentation import PerImage
from vlp.processing.pictures import read_picture
from vlp.training.command_line import parse
from vlp.training.data.rows import CaptionChooser
from vlp.training.data.samples import SampleMaker
from vlp.training.data.shard_writer import ShardsArguments, write_shards
from vlp.training.data.shards import expand
from vlp.training.data.sources import load_rows
from vlp.training.data.streams import ShardDataset
from vlp.training.run import train
from workers import interleave

RESULTS = Path(__file__).with_suffix(".json")
SIZES = ((640, 480), (1024, 768), (2048, 1536))
CONTENDERS = ("vlp", "vlp, decoded in full", "open_clip", "torchvision", "datasets")
SHARDS, EACH, SIDE = 8, 16, 224
NAMES = ("astronaut", "coffee", "chelsea", "rocket")


def pictures() -> list[Image.Image]:
    """The photographs."""
    own = [getattr(photographs, name)() for name in NAMES]
    return [Image.fromarray(each) for each in (*load_sample_images().images, *own)]


def sized(picture: Image.Image, width: int, height: int, rng: random.Random) -> bytes:
    """A JPEG of the largest part of a photograph with this shape, somewhere in it."""
    scale = max(width / picture.width, height / picture.height)
    picture = picture.resize(
        (round(picture.width * scale + 0.5), round(picture.height * scale + 0.5)), Image.Resampling.LANCZOS
    )
    left, top = rng.randint(0, picture.width - width), rng.randint(0, picture.height - height)
    file = io.BytesIO()
    picture.crop((left, top, left + width, top + height)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_data(folder: Path, width: int, height: int) -> None:
    """Write the photographs as shards, as files and as a Parquet file."""
    rng, kept = random.Random(0), pictures()
    files = [sized(kept[number % len(kept)], width, height, rng) for number in range(SHARDS * EACH)]
    (folder / "files").mkdir(parents=True)
    for number, content in enumerate(files):
        (folder / "files" / f"{number:04d}.jpg").write_bytes(content)
    rows = {
        "image": [{"bytes": content, "path": None} for content in files],
        "caption": [f"photo {n}" for n in range(len(files))],
    }
    table = datasets.Dataset.from_dict(
        rows, features=datasets.Features(image=datasets.Image(), caption=datasets.Value("string"))
    )
    table.to_parquet(folder / "rows.parquet")
    options = {"samples_per_shard": EACH, "output_dir": str(folder / "shards")}
    write_shards(ShardsArguments(dataset_name=str(folder / "rows.parquet"), **options))


def samples(contender: str, folder: str):
    """The pixels (3, 224, 224) of one sample after the other."""
    crop = v2.RandomResizedCrop(SIDE, scale=(0.9, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    if contender.startswith("vlp"):
        per_image = PerImage(SIDE, "random", 0.9)
        if contender != "vlp":
            per_image.read = lambda source, rng, most: per_image(read_picture(source, most), rng)
        maker = SampleMaker(chooser=CaptionChooser(), per_image=per_image)
        paths = expand(f"{folder}/shards/{{00000..{SHARDS - 1:05d}}}.tar")
        yield from (sample.pixels for sample in ShardDataset([paths], None, maker, seed=0))
    elif contender == "open_clip":
        for pixels, _ in webdataset_batches(f"{folder}/shards", 16, 0):
            yield from pixels
    elif contender == "torchvision":
        transform = v2.Compose([crop, v2.ToImage()])
        files = sorted(Path(folder, "files").iterdir())
        for file in itertools.cycle(files):
            with Image.open(file) as image:
                yield transform(image.convert("RGB"))
    else:
        transform = v2.Compose([crop, v2.ToImage()])
        rows = datasets.load_dataset("parquet", data_files=f"{folder}/rows.parquet", split="train")
        while True:
            for row in rows:
                yield transform(row["image"].convert("RGB"))


def work(contender: str, folder: str, count: int) -> None:
    """Run a contender in this process (see `workers.serve`); a step reads `count` samples."""
    import time

    torch.set_num_threads(1)
    found = samples(contender, folder)
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        for _ in range(count):
            assert next(found).shape == (3, SIDE, SIDE)
        seconds = time.perf_counter() - started
        print(seconds, flush=True)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        Path(folder, f"{contender}.memory").write_text(str(memory))


def difference(folder: Path) -> float:
    """The mean absolute difference, of 255, between vlp's pixels and those of the pictures decoded in full."""
    crop, found = PerImage(SIDE, "random", 0.9), []
    for number, file in enumerate(sorted((folder / "files").iterdir())):
        exact = crop(read_picture(file), random.Random(number))
        fast = crop.read(file, random.Random(number))
        found.append(np.abs(np.asarray(exact, float) - np.asarray(fast, float)).mean())
    return float(np.mean(found))


def compare(rounds: int, count: int) -> dict:
    """Time all contenders at each size."""
    results = {}
    for width, height in SIZES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_data(folder, width, height)
            words = [sys.executable, __file__, "--samples", str(count), "--work"]
            seconds = interleave({each: [*words, each, name] for each in CONTENDERS}, rounds)
            results[f"{width} x {height}"] = {
                "seconds": seconds,
                "samples_per_second": {
                    each: count / sorted(values)[len(values) // 2] for each, values in seconds.items()
                },
                "megabytes": {each: float((folder / f"{each}.memory").read_text()) for each in CONTENDERS},
                "difference": difference(folder),
            }
            speeds = ", ".join(
                f"{n} {v:.0f}/s" for n, v in results[f"{width} x {height}"]["samples_per_second"].items()
            )
            print(f"{width} x {height}: {speeds}; difference {results[f'{width} x {height}']['difference']:.2f}")
    return results


def train_both(steps: int) -> dict:
    """Train CLIP on large JPEGs with each decoding, and return the results of both runs."""
    found, exact = {}, PerImage.__call__
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for split in ("train", "test"):
            rows, table = load_rows("emoji", split), {"image": [], "caption": []}
            for row in rows:
                image, file = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"), io.BytesIO()
                image.resize((512, 512), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
                table["image"].append({"bytes": file.getvalue(), "path": None})
                table["caption"].append(row["caption"])
            features = datasets.Features(image=datasets.Image(), caption=datasets.Value("string"))
            datasets.Dataset.from_dict(table, features=features).to_parquet(folder / f"{split}-0.parquet")
        for kind in ("decoded in full", "vlp"):
            PerImage.read = READ
            if kind != "vlp":
                PerImage.read = lambda self, source, rng, most: exact(self, read_picture(source, most), rng)
            arguments = parse([
                "--dataset_name", name, "--eval_split", "test", "--augmentation", "crop", "--no-cache_images",
                "--class_column", "caption", "--max_train_minutes", "none", "--max_train_steps", str(steps),
                "--output_dir", f"{name}/{kind}",
            ])  # fmt: skip
            train(arguments)
            results = json.loads(Path(name, kind, "results.json").read_text())
            found[kind] = {"top1": results["metrics"]["zero_shot_top1"], "loss": results["history"][-1]["contrastive"],
                           "samples_per_second": results["history"][-1]["samples_per_second"]}  # fmt: skip
    return found


READ = PerImage.read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=64, help="samples of a step")
    parser.add_argument("--train", type=int, nargs="?", const=600, metavar="STEPS", help="train with each decoding")
    parser.add_argument("--work", nargs=2, metavar=("CONTENDER", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(*options.work, options.samples)
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if options.train:
        stored["training"] = {"steps": options.train, "runs": train_both(options.train)}
    else:
        stored |= {
            "sizes": compare(options.rounds, options.samples),
            "samples": options.samples,
            "cores": os.cpu_count(),
        }
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
    print(f"Written to {RESULTS}.")


if __name__ == "__main__":
    main()
