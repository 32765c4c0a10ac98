"""Processes for tests that start quickly: they are forked from a server that has already imported vlp.

They replace `python -m vlp.training ...`, the groups that `accelerate launch` starts, and programs with their own
environment.
"""

import contextlib
import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from conftest import free_port

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["vlp.training.run", "vlp.training.evaluate"])


class Program:
    """A function that runs in its own process and writes its output to a file.

    Args:
        output: The file for stdout and stderr.
        function: The function to run.
        args: Its arguments.
        environment: Environment variables to set; a value of None removes the variable.
        argv: The program's `sys.argv`. None leaves it unchanged.
        folder: The working directory. None means the current one.
    """

    def __init__(self, output: Path, function: Callable, *args, environment: dict | None = None,
                 argv: list[str] | None = None, folder: Path | None = None):  # fmt: skip
        self.output = output
        settings = (str(output), environment or {}, argv, str(folder or os.getcwd()))
        self.process = CONTEXT.Process(target=_run, args=(settings, function, args))
        self.process.start()

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def wait(self, timeout: float = 240) -> tuple[int, str]:
        """Wait for the process to end.

        Args:
            timeout: Seconds to wait.

        Returns:
            The exit code and the output.

        Raises:
            TimeoutError: The process did not end in time and was killed; the message is its output.
        """
        self.process.join(timeout)
        text = self.output.read_text() if self.output.exists() else ""
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(text)
        return self.process.exitcode, text


def _run(settings: tuple, function: Callable, args: tuple) -> None:
    output, environment, argv, folder = settings
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(folder)
    for name, value in environment.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    if any(name.startswith("HF_") for name in environment):
        import huggingface_hub.constants

        importlib.reload(huggingface_hub.constants)  # the module reads the environment only at import
    if argv is not None:
        sys.argv = argv
    import torch

    torch.set_num_threads(1)
    function(*args)


def run_code(code: str) -> None:
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def run_script(path: str) -> None:
    """Run a Python file as `python FILE` does."""
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")


def run_module(name: str) -> None:
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def run_group(count: int, folder: Path, function: Callable, *args, argv: list[str] | None = None) -> None:
    """Run a function in a group of processes, as `accelerate launch` does.

    Args:
        count: The number of processes.
        folder: Their working directory, which also receives their output files.
        function: The function that each process runs.
        args: Its arguments.
        argv: The `sys.argv` of each process. None leaves it unchanged.

    Raises:
        AssertionError: A process failed; the message is the output of all processes.
    """
    port, programs = free_port(), []
    for rank in range(count):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                       "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                       "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}  # fmt: skip
        programs.append(Program(folder / f"rank-{port}-{rank}.txt", function, *args, environment=environment, argv=argv,
                                folder=folder))  # fmt: skip
    results = []
    for program in programs:
        with contextlib.suppress(TimeoutError):
            results.append(program.wait())
    assert [code for code, _ in results] == [0] * count, "\n".join(text for _, text in results)


def run_without_reader(code: str) -> tuple[int, str]:
    """Run Python code whose output nobody reads, as after `| head` has ended; its exit code and its errors."""
    reader, writer = os.pipe()
    os.close(reader)
    found = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    return found.returncode, found.stderr
