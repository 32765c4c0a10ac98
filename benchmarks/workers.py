"""Time the contenders of a benchmark: each runs in its own process, and they take turns, one at a time."""

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from vlp.training.machine.hardware import cpu_cores


def serve(step: Callable[[int], object]) -> None:
    """In a contender's process: run a step for each line on stdin, and print the seconds that it took.

    Args:
        step: called with the number of the step, from 0.
    """
    print("ready", flush=True)
    for number, _ in enumerate(sys.stdin):
        started = time.perf_counter()
        step(number)
        print(time.perf_counter() - started, flush=True)


def start(command: list[str]) -> subprocess.Popen:
    """Start a contender's process and wait until it is ready; exit if it fails."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.strip() == "ready":
            return process
    sys.exit(f"{' '.join(command)} did not start.")


def interleave(
    contenders: dict[str, list[str]], rounds: int, started: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Run one step of each contender in turn, and return the seconds of their steps.

    Args:
        contenders: for each name, the command that starts its process, which calls `serve`.
        rounds: steps to time; a round before them is a warm-up and is not counted.
        started: called once all processes are ready.

    Returns:
        For each name, the seconds of its `rounds` steps.
    """
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, command in contenders.items():  # one after another
            workers[name] = start(command)
            stack.callback(workers[name].wait)
            stack.callback(workers[name].stdin.close)
        started()
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(rounds + 1):
            for name, worker in workers.items():
                print("step", file=worker.stdin, flush=True)
                line = worker.stdout.readline()
                if not line:
                    sys.exit(f"{name} ended in round {number}.")
                if number:
                    seconds[name].append(float(line))
                    print(f"{name:24s} {float(line):8.3f} s", file=sys.stderr, flush=True)
    return seconds


def ratios(seconds: dict[str, list[float]], ours: str = "vlp") -> dict[str, float]:
    """How many times as fast `ours` is as each of the others, by the medians."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {name: medians[name] / medians[ours] for name in medians if name != ours}


def report(path: Path, seconds: dict[str, list[float]], **facts) -> None:
    """Store the measurements, and print the medians, ranges and ratios.

    Args:
        path: JSON file to write. seconds: for each name, the seconds of its steps. facts: other fields to store.
    """
    result = facts | {"cores": cpu_cores(), "seconds": seconds, "ratios_of_medians": ratios(seconds)}
    path.write_text(json.dumps(result, indent=1) + "\n")
    for name, values in seconds.items():
        print(f"{name}: {statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})")
    for peer, ratio in ratios(seconds).items():
        print(f"vlp is {ratio:.2f} times as fast as {peer}.")
