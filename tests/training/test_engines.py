"""Tests of DDP, FSDP2 and DeepSpeed as a user starts them: `accelerate launch --config_file`, with CPU processes."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from conftest import free_port
from safetensors.torch import load_file
from test_training import arguments, pairs  # noqa: F401  # the fixture
from torch.testing import assert_close
from transformers import AutoModel, AutoProcessor
from vlp.training.machine.checkpoint import check_state
from vlp.training.run import train

from vlp.errors import ResumeError
from vlp.files import list_files, state_folder, states

RECIPES = Path(__file__).parents[2] / "training" / "recipes" / "accelerate"
OPTIONS = dict(augmentation="none", save_steps=2, save_total_limit=9, per_device_train_batch_size=8)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


def launch(engine: str, options, processes: int = 2, code: int = 0, **settings) -> str:
    """Run `accelerate launch --config_file`, with the included configuration for GPUs and fewer processes.

    Args:
        engine: name of the configuration.
        options: options of the run.
        processes: number of processes.
        code: the expected exit code.
        settings: changes of the configuration.

    Returns:
        What the run prints.
    """
    folder = Path(options.output_dir).parent
    config = yaml.safe_load((RECIPES / f"{engine}.yaml").read_text())
    config |= {"num_processes": processes, "mixed_precision": "no", "main_process_port": free_port()} | settings
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(config))
    (folder / "config.yaml").write_text(yaml.safe_dump(vars(options)))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate.yaml"),
               "-m", "vlp.training", "clip", "--config", str(folder / "config.yaml")]  # fmt: skip
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, cwd=folder)
    assert found.returncode == code, found.stdout + found.stderr
    return found.stdout + found.stderr


@pytest.fixture(scope="module")
def alone(pairs, tmp_path_factory) -> Path:  # noqa: F811
    """The folder of a run in one process, with the batch of two."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(arguments(pairs, folder, max_train_steps=4, **OPTIONS | {"per_device_train_batch_size": 16}))
    return folder


def require_same_run(folder: Path, alone: Path, processes: int = 2) -> dict[str, torch.Tensor]:
    """Check that a run learnt what one process learns, and is published; returns its weights."""
    one, two = (json.loads((each / "results.json").read_text()) for each in (alone, folder))
    assert two["processes"] == processes and two["samples"] == one["samples"] and len(two["history"]) == 4
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a["contrastive"] == pytest.approx(b["contrastive"], rel=1e-4)
        assert a["logit_scale"] == pytest.approx(b["logit_scale"], rel=1e-4)
    weights = load_file(folder / "model.safetensors")
    for name, value in load_file(alone / "model.safetensors").items():
        assert_close(weights[name], value, rtol=1e-2, atol=1e-4, msg=name)  # AdamW amplifies rounding errors
    assert (folder / "README.md").read_text().startswith("---")
    AutoModel.from_pretrained(folder)
    AutoProcessor.from_pretrained(folder)
    return weights


@pytest.fixture(scope="module")
def runs(pairs, tmp_path_factory) -> dict[str, Path]:  # noqa: F811
    """The folders of runs of two processes, by engine."""
    folders = {engine: tmp_path_factory.mktemp(engine) / "run" for engine in ("ddp", "fsdp2")}
    for engine, folder in folders.items():
        launch(engine, arguments(pairs, folder, max_train_steps=4, **OPTIONS))
    return folders


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_learn_what_one_learns(engine, runs, alone):
    require_same_run(runs[engine], alone)


def test_muon_learns_the_same_from_shards_and_resumes_exactly(pairs, tmp_path):  # noqa: F811
    options = OPTIONS | {"optimizer": "muon", "max_train_steps": 4}
    train(arguments(pairs, tmp_path / "alone/run", **options | {"per_device_train_batch_size": 16}))
    folder = tmp_path / "fsdp2/run"
    folder.parent.mkdir()
    launch("fsdp2", arguments(pairs, folder, **options))
    expected = require_same_run(folder, tmp_path / "alone/run")
    middle = states(state_folder(folder))[0]
    assert middle.name == "step-0000002"
    launch("fsdp2", arguments(pairs, folder, resume_from_checkpoint=str(middle), **options))
    assert_close(load_file(folder / "model.safetensors"), expected, rtol=0, atol=0)
    with pytest.raises(ResumeError, match="optimizer"):
        changed = options | {"optimizer": "adamw", "per_device_train_batch_size": 16}
        train(arguments(pairs, folder, resume_from_checkpoint=str(middle), **changed))


def test_sharded_run_resumes_exactly(pairs, runs, tmp_path):  # noqa: F811
    folder = tmp_path / "run"
    shutil.copytree(runs["fsdp2"], folder)
    shutil.copytree(state_folder(runs["fsdp2"]), state_folder(folder))
    middle = states(state_folder(folder))[0]
    assert middle.name == "step-0000002"
    assert len(list((middle / "pytorch_model_fsdp_0").glob("*.distcp"))) == 2  # a shard of each process
    launch("fsdp2", arguments(pairs, folder, max_train_steps=4, resume_from_checkpoint=str(middle), **OPTIONS))
    expected = load_file(runs["fsdp2"] / "model.safetensors")
    assert_close(load_file(folder / "model.safetensors"), expected, rtol=0, atol=0)


def test_sharded_state_goes_on_with_another_number_of_processes(pairs, runs, tmp_path):  # noqa: F811
    """As a run goes on whose model is not sharded."""
    folders = {}
    for engine, run in runs.items():
        folders[engine] = tmp_path / engine / "run"
        shutil.copytree(states(state_folder(run))[0], state_folder(folders[engine]) / "step-0000002")
        options = arguments(pairs, folders[engine], max_train_steps=4, resume_from_checkpoint="auto", **OPTIONS)
        if engine == "ddp":
            train(options)
        else:
            assert "2 processes before, 1 now." in launch(engine, options, processes=1)
    require_same_run(folders["fsdp2"], folders["ddp"], processes=1)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_learns_what_one_process_learns_and_resumes_exactly(stage, pairs, alone, tmp_path):  # noqa: F811
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (pip install deepspeed)")
    settings = {"deepspeed_config": {"zero_stage": stage, "gradient_accumulation_steps": 1}}
    folder = tmp_path / "run"
    launch("deepspeed-zero2", arguments(pairs, folder, max_train_steps=4, **OPTIONS), **settings)
    first, middle = require_same_run(folder, alone), str(states(state_folder(folder))[0])
    options = arguments(pairs, folder, max_train_steps=4, resume_from_checkpoint=middle, **OPTIONS)
    launch("deepspeed-zero2", options, **settings)
    assert_close(load_file(folder / "model.safetensors"), first, rtol=0, atol=0)
    options = arguments(pairs, folder, max_train_steps=6, resume_from_checkpoint="latest", **OPTIONS)
    told = launch("deepspeed-zero2", options, processes=1, code=1, **settings)
    assert "was saved by 2 processes with DeepSpeed: resume with the same number" in told


# --- what a state must not do -----------------------------------------------------------------------------------------


class Runs:
    """A pickle of this object writes a file when it is executed."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


# Sets an attribute of a class that is allowed: PosixPath.is_file = StorageMeta.
CHANGES = b"cpathlib\nPosixPath\n(N}Vis_file\nctorch.distributed.checkpoint.metadata\nStorageMeta\nstb."


@pytest.mark.parametrize("name", [".metadata", "__0.metadata"])
@pytest.mark.parametrize("content", [pickle.dumps(Runs()), b"no pickle", pickle.dumps({"a": print}), CHANGES])
def test_metadata_of_a_sharded_state_is_never_executed(content, name, alone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = tmp_path / "step-0000002"
    shutil.copytree(states(state_folder(alone))[0], state)
    (state / "pytorch_model_fsdp_0").mkdir()
    (state / "pytorch_model_fsdp_0" / name).write_bytes(content)
    (state / ".vlp-files").unlink()
    list_files(state)
    with pytest.raises(ResumeError, match=f"pytorch_model_fsdp_0/{name} that is not loaded"):
        check_state(state, 0)
    assert not Path("executed").exists() and Path("missing").is_file() is False
