"""Compare optimisers: the recipe clip-emoji for 1,400 steps, measured on a design held out of the training data.

python benchmarks/optimizers.py

The results are written to optimizers.json. It takes about 20 minutes on 2 cores.
"""

import json
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).with_suffix(".json")
STEPS = 1400
TRIED = (("adamw", 2e-3), ("adamw", 4e-3), ("muon", 4e-3), ("muon", 6e-3))


def main() -> None:
    runs = []
    for optimizer, rate in TRIED:
        folder = Path("runs") / f"optimizer-{optimizer}-{rate:g}"
        command = [
            str(Path(sys.executable).with_name("accelerate")), "launch", "-m", "vlp.training", "clip",
            "--hold_out", "design=noto", "--eval_split", "none", "--optimizer", optimizer, "--learning_rate", str(rate),
            "--max_train_steps", str(STEPS), "--output_dir", str(folder), "--report_to", "none",
        ]  # fmt: skip
        subprocess.run(command, check=True)
        results = json.loads((folder / "results.json").read_text())
        runs.append({"optimizer": optimizer, "learning_rate": rate, "steps": STEPS, "metrics": results["metrics"]})
        RESULTS.write_text(json.dumps({"runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
