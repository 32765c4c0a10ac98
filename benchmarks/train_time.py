"""Time the training of `make train` on a machine that does nothing else: in float32 with AVX2 alone, and as it is.

    python benchmarks/train_time.py

The results are added to train_time.json, beside those of other machines.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).with_suffix(".json")
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}  # as on a processor without AVX-512


def processor() -> str:
    """The name of the processor."""
    facts = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return next((line.partition(":")[2].strip() for line in facts.splitlines() if "model name" in line), "unknown")


def main() -> None:
    runs = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for environment, words, addition in ((AVX2, ["--mixed_precision", "no"], ", AVX2 alone"), ({}, [], "")):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "run"
            command = [
                str(Path(sys.executable).with_name("accelerate")), "launch", "-m", "vlp.training", "clip",
                "--eval_split", "none", "--report_to", "none", "--output_dir", str(folder), *words,
            ]  # fmt: skip
            subprocess.run(command, check=True, env=os.environ | environment)
            results = json.loads((folder / "results.json").read_text())
        hardware = f"{results['hardware']}, {processor()}{addition}"
        run = {"hardware": hardware, "precision": results["precision"]}
        runs = [each for each in runs if any(each[key] != value for key, value in run.items())]
        runs.append(run | {"steps": results["steps"], "seconds": results["training_seconds"]})
        RESULTS.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
