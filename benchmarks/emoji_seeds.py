"""Train a recipe for the included data with several seeds, and collect the results on what training never sees.

    python benchmarks/emoji_seeds.py [--seeds 0 1 2 3 4] [--config clip-emoji] [--more OPTIONS OF TRAINING]

Each run is a separate process, `accelerate launch -m vlp.training clip --seed N`. The results are written to
emoji_seeds.json, and the pictures of the first seed replace those of docs/. {seed} in the options is replaced by the
seed. For example, BLIP-2 uses the BLIP of the same seed with

    --config blip2-emoji --more --vision_tower runs/blip-emoji-seed-{seed}
    --config blip2-emoji-2 --more --model_name_or_path runs/blip2-emoji-seed-{seed}

With `--config blip-scenes`, composition.py also measures each model. docs/scenes.md shows those that start from the
captioner of `make cards`:

    --config blip-scenes --more --model_name_or_path build/blip-scenes-captions --max_train_minutes none \\
        --max_train_steps 3600
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from composition import composition

RESULTS = Path(__file__).with_suffix(".json")
DOCS = Path(__file__).parents[1] / "docs"
KEPT = ("metrics", "samples", "steps", "training_seconds", "parameters", "precision", "hardware", "versions", "classes")


def store(config: str, runs: dict[str, dict]) -> dict:
    """Write the results of the runs to emoji_seeds.json.

    Args:
        config: name of the recipe. runs: for each seed, its results.

    Returns:
        For each metric, its mean, min and max over the seeds.
    """
    summary = {}
    for name in next(iter(runs.values()))["metrics"]:
        values = [run["metrics"][name] for run in runs.values()]
        summary[name] = {"mean": statistics.mean(values), "min": min(values), "max": max(values)}
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[config] = {"summary": summary, "seeds": runs}
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--config", default="clip-emoji")
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="more training options")
    options = parser.parse_args()
    runs = {}
    for seed in options.seeds:
        folder = Path("runs") / f"{options.config}-seed-{seed}"
        launch = [
            str(Path(sys.executable).with_name("accelerate")),
            "launch",
            "-m",
            "vlp.training",
            options.config.split("-")[0],
        ]
        words = ["--config", options.config, "--seed", str(seed), "--output_dir", str(folder)]
        words += [word.replace("{seed}", str(seed)) for word in options.more]
        subprocess.run(launch + words, check=True)
        results = json.loads((folder / "results.json").read_text())
        runs[str(seed)] = {key: results[key] for key in KEPT}
        if options.config == "blip-scenes":
            runs[str(seed)]["metrics"] |= composition(str(folder))["metrics"]
        if seed == options.seeds[0]:
            for name in ("examples.png", "loss.png"):
                if (shown := DOCS / f"{options.config}-{name}").exists():
                    shutil.copy(folder / name, shown)
        summary = store(options.config, runs)  # after each run, so that an interruption keeps the finished ones
    for name, values in summary.items():
        print(f"{name:28s} {100 * values['mean']:6.2f} % ({100 * values['min']:.2f} to {100 * values['max']:.2f})")


if __name__ == "__main__":
    main()
