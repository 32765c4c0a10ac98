"""Tests for the list of packages in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools.config.pyprojecttoml import read_configuration

ROOT = Path(__file__).resolve().parents[2]


def test_every_folder_of_modules_is_installed():
    tool = read_configuration(ROOT / "pyproject.toml", expand=False)["tool"]["setuptools"]
    rooms = ("vlp", "configuration", "modeling_vlp", "processing", "training", "model_cards")
    files = [file for room in rooms for end in ("py", "txt", "yaml") for file in (ROOT / room).rglob(f"*.{end}")]
    models = ROOT / "model_cards"  # the included ones are not installed
    folders = {file.parent.relative_to(ROOT).as_posix() for file in files if file.parent.parent != models}
    assert set(tool["package-dir"].values()) == folders
    assert set(tool["packages"]) == set(tool["package-dir"])


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_threads_that_wait_leave_the_core_to_other_programs(given, expected):
    """The number of spins is set before torch loads OpenMP; a user's own setting is kept."""
    code = "import os, vlp; print(os.environ.get('GOMP_SPINCOUNT'))"
    left = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    found = subprocess.run([sys.executable, "-c", code], env=left | given, capture_output=True, text=True, cwd="/")
    assert found.stdout.strip() == expected, found.stderr
