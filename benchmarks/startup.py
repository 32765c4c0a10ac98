"""Time the start: importing vlp and importing transformers' CLIP, and the first step of a training run.

    python benchmarks/startup.py [--rounds 7]

Import: the CLIP classes of vlp and of transformers, in turn, each in a new interpreter. (`import transformers` loads
almost nothing; vlp registers its classes, so importing it loads torch and transformers' base classes.) First step:
`training clip` on the bundled data, from the start of the process until the state after the first step is saved.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vlp.training.machine.hardware import cpu_cores

import vlp

RESULTS = Path(__file__).with_suffix(".json")
IMPORTS = {
    "vlp": "import vlp; vlp.VlpClipModel, vlp.VlpClipProcessor",
    "transformers": "from transformers import CLIPModel, CLIPProcessor",
}


def seconds_of(command: list[str], **options) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
    return time.perf_counter() - started


def first_step() -> float:
    """Seconds until the state is saved in a training run of one step, without evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "vlp.training", "clip", "--max_train_steps", "1", "--eval_split", "none", "--report_to", "none"]
        command = [sys.executable, *words, "--output_dir", f"{folder}/run"]
        process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ.copy()
        )
        started, taken = time.perf_counter(), 0.0
        for line in process.stdout:
            if line.startswith("State saved"):  # right after the one step
                taken = time.perf_counter() - started
        process.wait()
        if process.returncode:
            sys.exit("The run failed.")
        return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for number in range(options.rounds + 1):  # the first round fills the disk cache
        for name, code in IMPORTS.items():
            taken = seconds_of([sys.executable, "-c", code])
            if number:
                seconds[name].append(taken)
    steps = [first_step() for _ in range(3)]
    median = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "cores": cpu_cores(),
        "seconds": seconds,
        "above": median["vlp"] - median["transformers"],
        "first_step": steps,
        "versions": {"vlp": vlp.__version__},
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    for name, values in seconds.items():
        print(f"import, {name}: {median[name]:.2f} s ({min(values):.2f} to {max(values):.2f})")
    print(f"vlp takes {result['above']:.2f} s longer; a run's first step ends after {statistics.median(steps):.1f} s.")


if __name__ == "__main__":
    main()
