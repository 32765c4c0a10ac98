"""Time --cache_vision_features: BLIP-2's stage 1 with the frozen tower computed in each step, or its features read.

    python benchmarks/blip2_features.py [--rounds 5] [--batch 8] [--images 64]

A ViT-B/16 at 224 px, the paper's Q-Former (BERT-base, 32 queries), captions of 12 tokens, float32, on the CPU. The two
variants take turns in one process; the ratios are ratios of medians. Also times the features on their own: computed by
the tower ("see") and read from disk ("read").
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import datasets
import torch
from PIL import Image
from vlp.processing.blip import train_tokenizer
from vlp.training.data.features import Features, compute_features
from vlp.training.machine.hardware import cpu_cores, use_cpu_well
from vlp.training.machine.optim import make_optimizer, parameter_groups
from vlp.training.objectives.blip2 import Blip2Objective

import vlp

RESULTS = Path(__file__).with_suffix(".json")


def make_rows(folder: Path, count: int) -> datasets.Dataset:
    """Save random pictures in a folder, and return a table of their paths."""
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        pixels = torch.randint(0, 256, (224, 224, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return datasets.Dataset.from_dict({"image": [str(folder / f"{number}.png") for number in range(count)]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--threads", type=int, default=min(2, cpu_cores()))
    options = parser.parse_args()
    use_cpu_well(options.threads)
    torch.manual_seed(0)
    model = vlp.VlpBlip2ForPreTraining(vlp.VlpBlip2Config(vision_config={"model_type": "vlp_blip_vit"})).train()
    objective = Blip2Objective(model)
    optimizer = make_optimizer(parameter_groups(model, 1e-4, 0.05), 0.9, 0.98, 1e-8)
    square = {"height": 224, "width": 224}
    images = vlp.VlpBlipImageProcessor(size=square)
    processor = vlp.VlpBlipProcessor(images, train_tokenizer(["a picture"], 64))
    ids = torch.randint(1000, 20000, (options.batch, 12))
    rows, numbers = torch.arange(options.batch), list(range(options.batch))

    def step(pixel_values: torch.Tensor) -> None:
        objective.before_step(0)
        losses = objective(pixel_values, ids, rows, rows, rows)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as folder:
        os.environ["VLP_CACHE"] = folder
        data = make_rows(Path(folder), options.images)
        start = time.perf_counter()
        features = Features(compute_features(model, processor, data, "image", 10**6))
        filling = time.perf_counter() - start
        pixels = images([Image.open(path) for path in data["image"][: options.batch]], return_tensors="pt")

        def read_features() -> torch.Tensor:
            return torch.stack([features[number] for number in numbers])

        def compute() -> torch.Tensor:
            return model.encode_image(pixels["pixel_values"])

        work = {"see": compute, "read": read_features, "step, tower computed": lambda: step(pixels["pixel_values"]),
                "step, features read": lambda: step(read_features())}  # fmt: skip
        computed, cached = compute(), read_features()
        difference = (computed - cached).abs().max().item() / cached.abs().max().item()
        seconds: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(options.rounds + 1):
            for name, run in work.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    seconds = {name: values[1:] for name, values in seconds.items()}  # the first round is a warm-up
    median = {name: statistics.median(values) for name, values in seconds.items()}
    result = vars(options) | {
        "cores": cpu_cores(),
        "seconds": seconds,
        "medians": median,
        "seconds_to_fill": filling,
        "largest_relative_difference": difference,
        "ratio_of_features": median["see"] / median["read"],
        "ratio_of_steps": median["step, tower computed"] / median["step, features read"],
        "versions": {"torch": torch.__version__, "vlp": vlp.__version__},
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    for name, value in median.items():
        print(f"{name:22s} {1000 * value:9.1f} ms")
    print(
        f"Cached: features {result['ratio_of_features']:.0f} times, steps {result['ratio_of_steps']:.2f} times as fast."
    )


if __name__ == "__main__":
    main()
