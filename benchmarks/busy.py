"""Time steps of `clip-emoji` with OpenMP's own spinning and with that of vlp, alone and beside other programs.

python benchmarks/busy.py

Each core gets a program that does nothing but count. Nothing else may run on the machine. The results are written to
busy.json.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

RESULTS = Path(__file__).with_suffix(".json")
OPENMP, STEPS, ROUNDS = "300000", 40, 2  # libgomp's own number of spins, where threads are no more than cores


def count() -> None:
    while True:
        pass


@contextmanager
def others(number: int):
    """Let programs count beside the run."""
    programs = [multiprocessing.Process(target=count, daemon=True) for _ in range(number)]
    for program in programs:
        program.start()
    yield
    for program in programs:
        program.kill()


def seconds(spins: str | None, threads: int) -> float:
    """The time of a run."""
    environment = os.environ | ({"GOMP_SPINCOUNT": spins} if spins else {})
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "vlp.training", "clip", "--max_train_steps", str(STEPS), "--num_threads", str(threads),
                 "--eval_split", "none", "--report_to", "none", "--output_dir", f"{folder}/run"]  # fmt: skip
        subprocess.run([sys.executable, *words], env=environment, check=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)  # fmt: skip
        return json.loads(Path(folder, "run/results.json").read_text())["training_seconds"]


def main() -> None:
    threads, found = os.cpu_count(), []
    for programs in (0, threads):
        with others(programs):
            for _ in range(ROUNDS):
                for name, spins in (("OpenMP's", OPENMP), ("vlp's", None)):
                    each = {"programs": programs, "spinning": name, "steps": STEPS,
                            "seconds": round(seconds(spins, threads), 1)}  # fmt: skip
                    print(each, flush=True)
                    found.append(each)
    RESULTS.write_text(json.dumps({"cores": threads, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
