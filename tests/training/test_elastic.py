"""Tests that a run goes on with another number of processes, without losing a sample or seeing one twice."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import yaml
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from conftest import free_port
from test_training import arguments, pairs, run_in_processes  # noqa: F401  # the fixture
from vlp.training.data.samples import DrawSampler
from vlp.training.machine.checkpoint import find_state, load_state
from vlp.training.run import train

from vlp.errors import ResumeError
from vlp.files import list_files, state_folder, states


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("changes", [[(2, 3), (1, 5), (2, 4)], [(1, 2), (4, 2), (3, 3), (1, 1)]])
def test_samples_do_not_depend_on_the_number_of_processes(changes):
    """Each change is (processes, steps); a batch has three samples."""
    drawn = []
    for processes, steps in changes:
        shares = [list(itertools.islice(DrawSampler(7, 0, rank, processes, len(drawn)), 3 * steps))
                  for rank in range(processes)]  # fmt: skip
        drawn += [draw for together in zip(*shares, strict=True) for draw in together]
    assert drawn == list(itertools.islice(DrawSampler(7, 0), len(drawn)))
    epochs = Counter(epoch for _, epoch in drawn)
    whole = [epoch for epoch, count in epochs.items() if count == 7]
    assert len(whole) >= 2 and all(sorted(row for row, e in drawn if e == epoch) == list(range(7)) for epoch in whole)


def test_run_goes_on_with_fewer_and_with_more_processes(pairs, tmp_path):  # noqa: F811
    folder, options = tmp_path / "run", {"per_device_train_batch_size": 8, "save_steps": 1, "save_total_limit": 9}
    samples = 0
    for processes, steps in ((2, 3), (1, 6), (2, 8)):
        before = len(json.loads((folder / "results.json").read_text())["history"]) if samples else 0
        run_in_processes(processes, arguments(pairs, folder, max_train_steps=steps, resume_from_checkpoint="auto",
                                              **options), tmp_path)  # fmt: skip
        results = json.loads((folder / "results.json").read_text())
        samples += 8 * processes * (steps - before)
        assert (results["processes"], results["samples"], results["steps"]) == (processes, samples, steps)
        assert [entry["step"] for entry in results["history"]] == list(range(1, steps + 1))
    state = json.loads((states(state_folder(folder))[-1] / "trainer_state.json").read_text())
    assert state["processes"] == 2 and state["progress"]["samples"] == samples


def test_epochs_are_counted_in_samples(pairs, tmp_path):  # noqa: F811
    """Two epochs of 32 rows: 64 samples, of which the second half is seen by one process in smaller steps."""
    folder = tmp_path / "run"
    options = {"per_device_train_batch_size": 8, "max_train_steps": None, "num_train_epochs": 2.0, "save_steps": 1,
               "save_total_limit": 9}  # fmt: skip
    run_in_processes(2, arguments(pairs, folder, **options), tmp_path)
    assert json.loads((folder / "results.json").read_text())["steps"] == 4
    state = state_folder(folder) / "step-0000002"
    train(arguments(pairs, folder, resume_from_checkpoint=str(state), **options))
    results = json.loads((folder / "results.json").read_text())
    assert (results["steps"], results["samples"], results["processes"]) == (6, 64, 1)
    rates = [entry["learning_rate"] for entry in results["history"]]
    assert rates[2:] == sorted(rates[2:], reverse=True)  # the schedule goes on where it was


def test_options_newer_than_a_state_do_not_matter_if_they_are_off(pairs, tmp_path):  # noqa: F811
    train(arguments(pairs, tmp_path / "run", max_train_steps=1))
    path = states(state_folder(tmp_path / "run"))[-1]
    facts = json.loads((path / "trainer_state.json").read_text())
    del facts["recipe"]["sync_batch_norm"], facts["model_config"]["vision_config"]["drop_path_rate"]
    (path / "trainer_state.json").write_text(json.dumps(facts))
    list_files(path)
    train(arguments(pairs, tmp_path / "run", max_train_steps=2, resume_from_checkpoint="latest"))
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 2


def test_states_of_deepspeed_need_as_many_processes(pairs, tmp_path):  # noqa: F811
    train(arguments(pairs, tmp_path / "run", max_train_steps=2, save_steps=1))
    for path in states(state_folder(tmp_path / "run")):
        file = path / "trainer_state.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"processes": 2}))
        list_files(path)
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, process_index=0, num_processes=1)
    with pytest.raises(
        ResumeError, match="was saved by 2 processes with DeepSpeed: resume with the same number, not with 1"
    ):
        load_state(accelerator, path, {}, str(tmp_path / "run"))


def test_auto_starts_anew_without_a_state(tmp_path):
    assert find_state("auto", str(tmp_path / "run")) is None
    with pytest.raises(ResumeError, match="there is no state"):
        find_state("latest", str(tmp_path / "run"))


def kill_tree(agent: subprocess.Popen) -> None:
    """Kill an agent of torchrun and its worker at once, as if their machine was lost."""
    found = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True)
    for pid in [agent.pid, *map(int, found.stdout.split())]:
        os.kill(pid, signal.SIGKILL)
    agent.wait()


@pytest.mark.slow
def test_killed_processes_are_replaced_by_torchrun(pairs, tmp_path):  # noqa: F811
    """Two agents of torchrun; one of them is killed at random and started again, ten times."""
    run, port, chance = tmp_path / "run", free_port(), random.Random(0)
    options = arguments(pairs, run, per_device_train_batch_size=8, max_train_steps=10**6, save_steps=100,
                        resume_from_checkpoint="auto", logging_steps=100)  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(vars(options)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc_per_node", "1",
               "--max_restarts", "100", "--monitor_interval", "0.2", "--rdzv_backend", "c10d",
               "--rdzv_endpoint", f"localhost:{port}", "--rdzv_conf", "last_call_timeout=1,is_host={is_host}",
               "-m", "vlp.training", "clip", "--config", str(tmp_path / "run.yaml")]  # fmt: skip
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

    def start(number: int) -> subprocess.Popen:
        log = (tmp_path / f"agent-{number}.txt").open("a")
        words = [word.replace("{is_host}", str(int(number == 1))) for word in command]  # the one that stays
        return subprocess.Popen(words, env=environment, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)

    def progress() -> dict:
        found = states(state_folder(run)) if state_folder(run).exists() else []
        return json.loads((found[-1] / "trainer_state.json").read_text()) if found else {"progress": {"step": 0}}

    first, second = start(1), start(2)
    seen = set()
    for _ in range(10):
        step, deadline = progress()["progress"]["step"], time.monotonic() + 120
        while progress()["progress"]["step"] < step + chance.randrange(100, 300) and time.monotonic() < deadline:
            assert first.poll() is None, (tmp_path / "agent-1.txt").read_text()[-3000:]
            time.sleep(0.2)
        seen.add(progress().get("processes"))
        if second is None:
            second = start(2)
        else:
            kill_tree(second)
            second = None
    for agent in (first, second):
        if agent is not None:
            kill_tree(agent)
    state = progress()
    assert seen == {1, 2} and state["progress"]["step"] >= 1000
    history = state["progress"]["history"]
    assert [entry["step"] for entry in history] == [1, *range(100, state["progress"]["step"] + 1, 100)]
    # Steps with one process add 8 samples and steps with two add 16: none is lost or counted twice.
    for earlier, later in itertools.pairwise(history):
        steps, samples = (later[name] - earlier[name] for name in ("step", "samples"))
        assert 8 * steps <= samples <= 16 * steps and samples % 8 == 0
