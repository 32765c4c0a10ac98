"""Contenders of a benchmark: each has a process of its own; they work in turn, one at a time."""

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
    """In a contender's process: do a step for each line that comes in, and answer with the seconds that it took."""
    print("ready", flush=True)
    for number, _ in enumerate(sys.stdin):
        started = time.perf_counter()
        step(number)
        print(time.perf_counter() - started, flush=True)


def start(command: list[str]) -> subprocess.Popen:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.strip() == "ready":
            return process
    sys.exit(f"{' '.join(command)} did not start.")


def interleave(
    contenders: dict[str, list[str]], rounds: int, started: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each contender's steps, a step of each in turn; the first round warms up and does not count.

    Args:
        contenders: the command that starts each, whose process calls `serve`.
        started: called once all are ready.
    """
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, command in contenders.items():  # one after the other
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
    """How many times as fast ours is, by medians."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {name: medians[name] / medians[ours] for name in medians if name != ours}


def report(path: Path, seconds: dict[str, list[float]], **facts) -> None:
    """Store what was measured beside the facts of it, and print the medians, their spread and their ratios."""
    result = facts | {"cores": cpu_cores(), "seconds": seconds, "ratios_of_medians": ratios(seconds)}
    path.write_text(json.dumps(result, indent=1) + "\n")
    for name, values in seconds.items():
        print(f"{name}: {statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})")
    for peer, ratio in ratios(seconds).items():
        print(f"vlp is {ratio:.2f} times as fast as {peer}.")
