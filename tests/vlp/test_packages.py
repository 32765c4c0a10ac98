"""Tests for the list of packages in pyproject.toml."""

from pathlib import Path

from setuptools.config.pyprojecttoml import read_configuration

ROOT = Path(__file__).resolve().parents[2]


def test_every_folder_of_modules_is_installed():
    tool = read_configuration(ROOT / "pyproject.toml", expand=False)["tool"]["setuptools"]
    rooms = ("vlp", "configuration", "modeling_vlp", "processing", "training", "model_cards")
    folders = {file.parent.relative_to(ROOT).as_posix() for room in rooms for file in (ROOT / room).rglob("*.py")}
    assert set(tool["package-dir"].values()) == folders
    assert set(tool["packages"]) == set(tool["package-dir"])
