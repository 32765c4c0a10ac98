"""The table in CONTRIBUTING.md of the files to open for a change."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMITS = {"the CLIP loss": 4, "the data path": 4, "from recipe to run": 4, "a new family": 7, "a new loss": 4,
          "the teacher's update": 3, "a kind of tower": 3}  # fmt: skip


@pytest.mark.parametrize("task", LIMITS)
def test_few_files_are_to_be_opened_and_all_exist(task):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    row = re.search(rf"^\| {re.escape(task)} \| (.*) \|$", text, re.MULTILINE)[1]
    files, folder = re.findall(r"`([^`]+)`", row), Path()
    assert 1 <= len(files) <= LIMITS[task]
    for name in files:
        folder = Path(name).parent if "/" in name else folder  # files without a folder are in the folder before
        assert (ROOT / (name if "/" in name else folder / name)).exists(), name


def test_run_is_short():
    assert len((ROOT / "training/run.py").read_text().splitlines()) < 200
