"""What may be replaced on the disk, and what a killed program leaves."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlp import files
from vlp.errors import ArgumentError
from vlp.files import check_output, list_files, locked, start_anew, states, write_file, write_whole


def write(text: str):
    """A function for `write_whole` that writes two files and a subfolder."""

    def fill(folder: Path) -> None:
        (folder / "config.json").write_text(text)
        (folder / "more").mkdir()
        (folder / "more" / "weights").write_text(text * 1000)

    return fill


def content(folder: Path) -> set[str]:
    """The distinct texts of the files in a folder, without the list of files."""
    return {path.read_text()[:1] for path in folder.rglob("*") if path.is_file() and path.name != files.WRITTEN}


def test_links_files_and_devices_are_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "dangling", "file", "fifo"):
        with pytest.raises(ArgumentError, match="is a (link|file|named pipe|device), not a folder"):
            check_output(str(tmp_path / name))
    with pytest.raises(ArgumentError, match="is a device, not a folder"):
        check_output("/dev/null")
    check_output(str(tmp_path / "folder"))
    check_output(str(tmp_path / "new"))


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "\udcff/" + "y" * 300])
def test_impossible_paths_are_reported(tmp_path, name):
    with pytest.raises(ArgumentError, match="is not a usable path"):
        check_output(f"{tmp_path}/{name}")


def test_paths_mean_what_a_user_expects(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_output("~/x") == tmp_path / "x"
    write_whole(tmp_path / "a", write("1"))
    write_whole(Path(f"{tmp_path}/a/../a"), write("2"))
    assert content(tmp_path / "a") == {"2"} and [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("mine", ["photo.jpg", ".git/config", "more/notes.txt", "empty/"])
def test_a_folder_with_files_of_the_user_is_not_replaced(tmp_path, mine):
    write_whole(tmp_path / "model", write("1"))
    check_output(tmp_path / "model")
    path = tmp_path / "model" / mine
    path.mkdir() if mine.endswith("/") else path.parent.mkdir(exist_ok=True)
    if not mine.endswith("/"):
        path.write_text("mine")
    with pytest.raises(ArgumentError, match="contains other files than vlp wrote there"):
        check_output(tmp_path / "model")
    # If they appear while vlp works, the new folder gets another name.
    assert write_whole(tmp_path / "model", write("2")) == tmp_path / "model-2"
    assert path.exists() and content(tmp_path / "model") - {"m"} == {"1"} and content(tmp_path / "model-2") == {"2"}


def test_a_file_that_the_user_has_changed_is_theirs(tmp_path):
    write_whole(tmp_path / "model", write("1"))
    (tmp_path / "model" / "config.json").write_text("changed")
    with pytest.raises(ArgumentError, match="or changed ones, such as config.json"):
        check_output(tmp_path / "model")
    write_file(tmp_path / "results" / "a.json", "1")
    write_file(tmp_path / "results" / "a.json", "2")
    (tmp_path / "results" / "a.json").write_text("notes")
    with pytest.raises(ArgumentError, match="a.json was not written by vlp, or was changed since"):
        write_file(tmp_path / "results" / "a.json", "3")
    assert (tmp_path / "results" / "a.json").read_text() == "notes"


def test_files_with_names_like_temporary_ones_are_kept(tmp_path):
    write_whole(tmp_path / "t", write("1"))
    for name in (".t.writing", ".t.old", "t.building", f"{files.UNFINISHED}t-mine1234"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    write_whole(tmp_path / "t", write("2"))
    assert content(tmp_path / "t") == {"2"}
    assert all((tmp_path / name / "notes.txt").exists() for name in (".t.writing", ".t.old", "t.building"))
    assert (tmp_path / f"{files.UNFINISHED}t-mine1234" / "notes.txt").exists()


def test_sources_in_the_target_are_not_replaced(tmp_path):
    write_whole(tmp_path / "model", write("1"))
    for source in (tmp_path / "model", tmp_path / "model" / "more", f"{tmp_path}/model/"):
        with pytest.raises(ArgumentError, match="which is read"):
            check_output(tmp_path / "model", sources=[str(source)])
    check_output(tmp_path / "model", sources=[str(tmp_path / "other"), "owner/name", None])


def test_states_of_earlier_runs_are_moved_and_other_files_stay(tmp_path):
    for run in range(3):
        write_whole(tmp_path / "x.resume" / f"step-{run}", lambda folder: (folder / files.STATE_FILE).write_text("{}"))
        (tmp_path / "x.resume" / "notes.txt").write_text("mine")
        start_anew(tmp_path / "x.resume")
        (tmp_path / "x.resume.previous" / "more.txt").write_text("mine")
        assert [path.name for path in states(tmp_path / "x.resume.previous")] == [f"step-{run}"]
    assert (tmp_path / "x.resume" / "notes.txt").exists() and (tmp_path / "x.resume.previous" / "more.txt").exists()


def test_a_long_earlier_run_is_kept_beside_the_latest(tmp_path):
    """A run that starts anew by mistake, twice, does not remove the states of a long one."""

    def found(name: str) -> list[str]:
        return [path.name for path in states(tmp_path / f"x.resume{name}")]

    for step, longest in ((2, []), (9, []), (1, ["step-9"]), (5, ["step-9"]), (4, ["step-9"])):
        write_whole(tmp_path / "x.resume" / f"step-{step}", lambda folder: (folder / files.STATE_FILE).write_text("{}"))
        assert start_anew(tmp_path / "x.resume") == tmp_path / "x.resume.previous"
        assert found(".previous") == [f"step-{step}"] and found(".longest") == longest and found("") == []
    (tmp_path / "x.resume.previous" / "step-7").mkdir()  # somebody else's
    write_whole(tmp_path / "x.resume" / "step-7", lambda folder: (folder / files.STATE_FILE).write_text("{}"))
    start_anew(tmp_path / "x.resume")
    assert not list((tmp_path / "x.resume.previous" / "step-7").iterdir()) and found("") == ["step-7"]


def test_a_second_run_is_refused(tmp_path):
    with locked(tmp_path / "x.resume", "--output_dir x"):
        with pytest.raises(ArgumentError, match="--output_dir x: another run is using it"):
            with locked(tmp_path / "x.resume", "--output_dir x"):
                pass
    with locked(tmp_path / "x.resume", "--output_dir x"):
        pass
    assert not (tmp_path / "x.resume").exists()


CALLS = ("mkdtemp", "chmod", "fsync", "exchange", "rename", "replace", "unlink", "rmdir", "list_files", "remove_own")


@pytest.mark.parametrize("first", [True, False], ids=["new", "replaced"])
def test_killed_between_any_two_calls_the_old_folder_or_the_new_one_is_whole(tmp_path, monkeypatch, first):
    """Each call that changes the disk ends the program once before it and once after it."""

    class Killed(BaseException):
        pass

    counted = {"calls": 0, "end": None}

    def counting(function):
        def call(*args, **kwargs):
            for before in (True, False):
                if counted["calls"] == counted["end"]:
                    counted["calls"] += 1
                    raise Killed
                counted["calls"] += 1
                result = function(*args, **kwargs) if before else result  # noqa: F821
            return result

        return call

    target, end = tmp_path / "m", 0
    while True:
        place = tmp_path / str(end)
        target = place / "m"
        if not first:
            write_whole(target, write("1"))
        with monkeypatch.context() as patched:
            for owner, names in ((os, CALLS), (files.tempfile, CALLS), (files, CALLS)):
                for name in names:
                    if hasattr(owner, name):
                        patched.setattr(owner, name, counting(getattr(owner, name)))
            # A killed program does not clean up.
            patched.setattr(files, "remove_unfinished", lambda target: None)
            counted["calls"], counted["end"] = 0, end
            try:
                write_whole(target, write("2"))
                finished = counted["calls"] <= end
            except Killed:
                finished = False
        found = content(target) if target.exists() else set()
        assert found in ({"1"}, {"2"}) if not first else found in (set(), {"2"})
        if finished:
            break
        write_whole(target, write("3"))  # and the next run can write
        assert content(target) == {"3"}
        end += 1
    assert end > 10


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_files import write
from vlp.files import write_whole
print("ready", flush=True)
for number in range(10**6):
    write_whole(Path(sys.argv[1]), write(str(number % 2)))
"""


@pytest.mark.slow
def test_fifty_kills_leave_a_whole_folder(tmp_path):
    rng = random.Random(0)
    for _ in range(50):
        program = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path / "m"), str(Path(__file__).parent)], stdout=subprocess.PIPE
        )
        program.stdout.readline()
        time.sleep(rng.random() * 0.05)
        program.send_signal(signal.SIGKILL)
        program.wait()
        assert not (tmp_path / "m").exists() or content(tmp_path / "m") in ({"0"}, {"1"})
    write_whole(tmp_path / "m", write("2"))
    assert content(tmp_path / "m") == {"2"} and [path.name for path in tmp_path.iterdir()] == ["m"], list(
        tmp_path.iterdir()
    )


def test_lists_of_files_that_are_damaged_protect_everything(tmp_path):
    write_whole(tmp_path / "m", write("1"))
    for text in ("{", "[]", "null", '{"files": 3}', "[" * 10000):
        (tmp_path / "m" / files.WRITTEN).write_text(text)
        with pytest.raises(ArgumentError, match="contains other files"):
            check_output(tmp_path / "m")
    list_files(tmp_path / "m")
    check_output(tmp_path / "m")


def test_state_that_is_partly_removed_is_no_state(tmp_path, monkeypatch):
    state = tmp_path / "step-0000002"
    state.mkdir()
    for name in ("model.safetensors", "a.bin", files.STATE_FILE):
        (state / name).write_text("x")
    files.list_files(state)
    removed = []
    monkeypatch.setattr(files, "remove_own", lambda folder, paths: removed.extend(path.name for path in paths))
    files.remove_written(state)
    assert removed[0] == files.STATE_FILE and set(removed) == {"model.safetensors", "a.bin", files.STATE_FILE}
