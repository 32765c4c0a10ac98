"""Tests for the list of packages in pyproject.toml."""

from pathlib import Path

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
