"""Compare optimisers: default recipes, shortened, measured on a design held out of the training data.

python benchmarks/optimizers.py

The results are written to optimizers.json. It takes about an hour on 2 cores.
"""

import json
import subprocess
import sys
from pathlib import Path

from vlp.training.command_line import parse

RESULTS = Path(__file__).with_suffix(".json")
TRIED = {
    "clip-emoji": (1400, (("adamw", 2e-3), ("adamw", 4e-3), ("muon", 4e-3), ("muon", 6e-3))),
    "blip-emoji": (1500, (("adamw", 2e-3), ("muon", 2e-3), ("muon", 4e-3), ("muon", 6e-3), ("muon", 8e-3))),
}
MORE = {"blip-emoji": "--contrastive_share 0.25 --itm_negatives 1 --no-queue_negatives"}  # as when it was tuned
MODEL = {"blip-emoji": {"itm_pooling": "cls"}}  # likewise


def main() -> None:
    runs = []
    for recipe, (steps, tried) in TRIED.items():
        for optimizer, rate in tried:
            folder = Path("runs") / f"optimizer-{recipe}-{optimizer}-{rate:g}"
            command = [
                str(Path(sys.executable).with_name("accelerate")), "launch", "-m", "vlp.training",
                recipe.split("-")[0], "--hold_out", "design=noto", "--eval_split", "none", "--optimizer", optimizer,
                "--learning_rate", str(rate), "--max_train_steps", str(steps), "--output_dir", str(folder),
                "--report_to", "none", *MORE.get(recipe, "").split(),
            ]  # fmt: skip
            if recipe in MODEL:
                model = parse(["--config", recipe], recipe.split("-")[0]).model | MODEL[recipe]
                command += ["--model", json.dumps(model)]
            subprocess.run(command, check=True)
            runs.append(outcome(folder, recipe, optimizer, rate))
            RESULTS.write_text(json.dumps({"runs": runs}, indent=1) + "\n")


def outcome(folder: Path, recipe: str, optimizer: str, rate: float) -> dict:
    """What is kept of a run."""
    results = json.loads((folder / "results.json").read_text())
    kept = {name: results[name] for name in ("metrics", "steps", "training_seconds", "precision", "hardware")}
    return {"recipe": recipe, "optimizer": optimizer, "learning_rate": rate} | kept


if __name__ == "__main__":
    main()
