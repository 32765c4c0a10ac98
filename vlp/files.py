"""Write folders whole or not at all, and never replace or remove a file that vlp did not write.

Every folder that vlp writes contains a list of its files, WRITTEN, with a digest of each. A folder may be replaced if
it contains only listed files that have not changed since; otherwise it belongs, at least in part, to the user.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from .errors import ArgumentError, UserError, printable

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None

STATE_FILE = "trainer_state.json"
TEACHER_FILE = "teacher.safetensors"  # momentum teacher of a converted checkpoint, written by vlp convert
WRITTEN = ".vlp-files"  # the files that vlp wrote into a folder, with their digests
UNFINISHED = ".vlp-unfinished-"  # prefix of the folders in which vlp prepares its files


def state_folder(output_dir: str | Path) -> Path:
    """The folder of a run's resume states: beside the output folder, so that they are not published with it."""
    return Path(f"{str(output_dir).rstrip('/')}.resume")


# --- what vlp wrote ---------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """The folder for what can be computed again: the environment variable VLP_CACHE, or ~/.cache/vlp."""
    return Path(os.environ.get("VLP_CACHE", Path.home() / ".cache" / "vlp"))


def digest(path: Path) -> str:
    """A digest of a file's content."""
    found = hashlib.blake2b()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            found.update(chunk)
    return found.hexdigest()[:32]


def written_files(folder: Path) -> dict[str, str]:
    """The files that vlp wrote into a folder: their digests by relative path; empty if there is no valid list."""
    try:
        files = json.loads((folder / WRITTEN).read_text())["files"]
        return {str(name): str(value) for name, value in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def list_files(folder: Path, more: Iterable[Path] | None = None) -> None:
    """Write the list of files of a folder.

    Args:
        folder: the folder.
        more: files that vlp has just written into a folder that it does not own as a whole; None: all its files.
    """
    if more is None:
        files = {path.relative_to(folder).as_posix(): digest(path) for path in files_in(folder)}
    else:
        files = written_files(folder) | {path.relative_to(folder).as_posix(): digest(path) for path in more}
    fresh = folder / f"{WRITTEN}.{os.getpid()}"
    fresh.write_text(json.dumps({"files": files}, indent=0))
    os.replace(fresh, folder / WRITTEN)


def files_in(folder: Path) -> list[Path]:
    """All files in a folder and its subfolders, except the list of files; links are files."""
    found = []
    for place, folders, names in os.walk(folder):
        found += [Path(place) / name for name in names]
        found += [Path(place) / name for name in folders if (Path(place) / name).is_symlink()]
    return sorted(path for path in found if path != folder / WRITTEN)


def is_own(folder: Path, path: Path) -> bool:
    """Whether vlp wrote a file of a folder, and nobody has changed it since."""
    known = written_files(folder).get(path.relative_to(folder).as_posix())
    return known is not None and path.is_file() and not path.is_symlink() and digest(path) == known


def require_own(folder: Path, path: Path, choice: str = "folder") -> None:
    """Check that a file of a folder may be replaced; it need not exist.

    Args:
        folder: the folder whose list has the file.
        path: the file.
        choice: what else to choose, for the error message.

    Raises:
        ArgumentError: if vlp did not write it, or it was changed since.
    """
    if os.path.lexists(path) and not is_own(folder, path):
        told = printable(path, 200)
        raise ArgumentError(
            f"{told} was not written by vlp, or was changed since: move it, or choose another {choice}."
        )


def foreign_file(folder: Path) -> Path | None:
    """A file or empty folder that vlp did not write into a folder, or that was changed since; None if there is none."""
    known, files = written_files(folder), files_in(folder)
    for path in files:
        if path.relative_to(folder).as_posix() not in known:
            return path
    for path in files:
        if path.is_symlink() or not path.is_file() or digest(path) != known[path.relative_to(folder).as_posix()]:
            return path
    empty = (Path(place) for place, folders, names in os.walk(folder) if not folders and not names)
    return next((path for path in empty if path != folder), None)


# --- checks -----------------------------------------------------------------------------------------------------------


def usable_path(value: str | Path, name: str) -> Path:
    """A path as the user means it: `~` is expanded, and `..` is resolved.

    Args:
        value: the path.
        name: the name of the option, for the error message.

    Raises:
        ArgumentError: if no file can have this name.
    """
    text = str(value)
    try:
        if any(len(part) > 255 for part in os.fsencode(text).split(b"/")):
            raise ValueError("a name in it is longer than 255 bytes")
        if "\0" in text:
            raise ValueError("it contains a NUL character")
        path = Path(os.path.abspath(os.path.expanduser(text)))
        os.lstat(path)
    except FileNotFoundError:
        return path
    except NotADirectoryError:
        raise ArgumentError(f"{name} {printable(text, 120)}: a part of this path is a file, not a folder.") from None
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise ArgumentError(f"{name} {printable(text, 120)} is not a usable path: {reason}.") from None
    return path


def check_output(output_dir: str | Path, name: str = "--output_dir", sources: Iterable[str | None] = ()) -> Path:
    """Check that a folder may be written: it is new or empty, or contains only files that vlp wrote.

    Args:
        output_dir: the folder.
        name: the name of the option, for the error message.
        sources: files and folders that the command reads, which must not lie in the folder; hub names are ignored.

    Returns:
        The absolute path of the folder.

    Raises:
        ArgumentError: if writing the folder would lose other files.
    """
    path, told = usable_path(output_dir, name), f"{name} {printable(output_dir, 120)}"
    if path.is_symlink() or (os.path.lexists(path) and not path.is_dir()):
        raise ArgumentError(f"{told} is {kind_of(path)}, not a folder: choose a folder for these files alone.")
    if path == Path.cwd() or path == Path.home() or os.path.ismount(path):
        raise ArgumentError(f"{told} is replaced as a whole: choose a folder for these files alone, such as runs/x.")
    for source in filter(None, sources):
        if lies_in(source, path):
            raise ArgumentError(f"{told} contains {printable(source, 120)}, which is read: choose another folder.")
    if path.is_dir() and (foreign := foreign_file(path)):
        raise ArgumentError(
            f"{told} contains other files than vlp wrote there, or changed ones, such as "
            f"{printable(foreign.relative_to(path), 80)}: choose another folder, or move them away."
        )
    return path


def lies_in(source: str, folder: Path) -> bool:
    """Whether a source is an existing file or folder that is, or lies in, a folder."""
    try:
        real = usable_path(source, "source").resolve()
        return real.exists() and real.is_relative_to(folder.resolve())
    except (ArgumentError, OSError, RuntimeError):
        return False


def kind_of(path: Path) -> str:
    """What a path is, in words."""
    mode = os.lstat(path).st_mode
    kinds = ((stat.S_ISLNK, "a link"), (stat.S_ISREG, "a file"), (stat.S_ISFIFO, "a named pipe"),
             (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))  # fmt: skip
    return next((text for test, text in kinds if test(mode)), "a folder")


def check_new_file(target: str | Path, name: str = "TARGET") -> Path:
    """Check that a file can be created. Raises ArgumentError if something is there already."""
    path = usable_path(target, name)
    if os.path.lexists(path):
        raise ArgumentError(f"{name} {printable(target, 120)} exists: choose a new name, or remove it first.")
    return path


# --- writing ----------------------------------------------------------------------------------------------------------


def write_whole(target: Path, write: Callable[[Path], None]) -> Path:
    """Write a folder as a whole: `write` fills a temporary folder beside it, which then takes its place at once.

    A program that is killed leaves the old folder or the new one. If files of the user have appeared in the target in
    the meantime, it is left as it is, and the new folder gets another name.

    Args:
        target: the folder to create or replace. It does not change if `write` fails.
        write: called with the temporary folder.

    Returns:
        The folder that was written: the target, or TARGET-2 and so on.

    Raises:
        OSError: if `write` fails; the message gives the cause and says what is left.
    """
    target = Path(os.path.abspath(os.path.expanduser(str(target))))
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(target)
    fresh = Path(tempfile.mkdtemp(prefix=f"{UNFINISHED}{target.name[:100]}-", dir=target.parent))
    mark = (fresh / WRITTEN).open("w")  # locked while the folder is in use
    lock(mark)
    try:
        os.chmod(fresh, 0o777 & ~current_umask())
        write(fresh)
        list_files(fresh)
        synchronise(fresh)
    except BaseException as error:
        remove_own(fresh, files_in(fresh))
        mark.close()
        if isinstance(error, UserError) or not isinstance(error, Exception):
            raise
        kept = f"{target} is unchanged" if target.exists() else "no partial files were left"
        full = " Is the disk full?" if no_space(error) else ""
        raise OSError(f"Could not write {target}: {str(error).strip().rstrip('.')}; {kept}.{full}") from error
    number, place = 2, target
    while place.is_symlink() or (place.exists() and (not place.is_dir() or foreign_file(place))):
        place, number = target.with_name(f"{target.name}-{number}"), number + 1
    if place.is_dir() and any(place.iterdir()):
        exchange(fresh, place)
        remove_written(fresh)
        give_back(fresh, place)
    else:
        os.rename(fresh, place)  # an empty folder is replaced
    mark.close()
    if place != target:
        print(f"warning: {target} contains files that vlp did not write, so the folder is {place}.", file=sys.stderr)
    return place


def no_space(error: Exception) -> bool:
    """Whether an error says that a disk is full, or a file too large for it."""
    codes = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    return getattr(error, "errno", None) in codes or any(f"os error {code}" in str(error) for code in codes)


def current_umask() -> int:
    """The permissions that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def synchronise(folder: Path) -> None:
    """Let the disk store the files of a folder before the folder gets its name."""
    for path in files_in(folder):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def exchange(first: Path, second: Path) -> None:
    """Exchange two folders: on Linux and macOS in one step, elsewhere in three."""
    library, folders = ctypes.CDLL(None, use_errno=True), (os.fsencode(first), os.fsencode(second))
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        if library.renameat2(here, folders[0], here, folders[1], swap) == 0:
            return
    elif sys.platform == "darwin" and library.renamex_np(*folders, 2) == 0:  # RENAME_SWAP
        return
    between = Path(f"{first}-old")
    os.rename(second, between)
    os.rename(first, second)
    os.rename(between, first)


def remove_written(folder: Path) -> None:
    """Remove the files of a folder that its list has, and then the folder if nothing else is left in it.

    STATE_FILE is removed first: a state that is only partly removed, because the run was killed, is no longer one.
    """
    names = sorted(written_files(folder), key=lambda name: name != STATE_FILE)
    remove_own(folder, [folder / name for name in names])


def remove_own(folder: Path, files: Iterable[Path]) -> None:
    """Remove files that vlp wrote, and then the folder if nothing else is left in it."""
    for path in [*files, folder / WRITTEN]:
        with contextlib.suppress(OSError):
            path.unlink()
    for place, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(place)


def give_back(left: Path, place: Path) -> None:
    """Move files that appeared in a folder while it was replaced into the new one; what has no place there stays."""
    for path in files_in(left) if left.exists() else []:
        goal = place / path.relative_to(left)
        if not os.path.lexists(goal):
            goal.parent.mkdir(parents=True, exist_ok=True)
            os.rename(path, goal)
    remove_own(left, [])


def remove_unfinished(target: Path) -> None:
    """Remove the temporary folders that killed programs left beside a target; those in use are locked."""
    for folder in target.parent.glob(f"{glob_escape(UNFINISHED + target.name[:100])}-????????"):
        if not (folder / WRITTEN).exists():
            remove_own(folder, [])  # its files are gone already
            continue
        with contextlib.suppress(OSError), (folder / WRITTEN).open("r+") as mark:
            lock(mark)
            if written_files(folder):  # it was complete, or had its place before
                remove_written(folder)
            else:
                shutil.rmtree(folder, ignore_errors=True)


def glob_escape(name: str) -> str:
    """The name as a pattern that matches only itself."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file of a folder that vlp does not own as a whole, and add it to the folder's list.

    Raises:
        ArgumentError: if there is a file of this name that vlp did not write, or that was changed since.
    """
    folder = path.parent
    require_own(folder, path)
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f"{UNFINISHED}{os.getpid()}"
    fresh.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(fresh, path)
    list_files(folder, [path])


def lock(file) -> None:
    """Lock an open file. Raises OSError if another program has locked it."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Keep other runs out of a folder. The system ends the lock with the program, however it ends.

    Args:
        folder: the folder of the lock, created if it does not exist.
        name: what is locked, for the error message.

    Raises:
        ArgumentError: if another run has the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".vlp-lock").open("a") as file:
        try:
            lock(file)
        except OSError:
            raise ArgumentError(f"{name}: another run is using it. Wait for it, or choose another folder.") from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                (folder / ".vlp-lock").unlink()
                folder.rmdir()  # only if nothing else was written


# --- states -----------------------------------------------------------------------------------------------------------


def start_anew(folder: Path) -> Path | None:
    """Move the states of an earlier run to FOLDER.previous, so that they are not mistaken for those of this run.

    The states that were there before are removed or, if their run came further than this one and than those that are
    in FOLDER.longest, moved there. Other files stay where they are.

    Returns:
        The folder of the earlier states; None if there are none.
    """
    earlier = states(folder)
    previous, longest = (folder.with_name(f"{folder.name}.{name}") for name in ("previous", "longest"))
    if not earlier:
        return None
    before, most = states(previous), [state.name for state in states(longest)]
    if before and before[-1].name > max(earlier[-1].name, *most, ""):
        replace_states(longest, before)
    replace_states(previous, earlier)
    return previous


def replace_states(folder: Path, found: list[Path]) -> None:
    """Remove the states in a folder, and move others there; other files stay where they are."""
    for state in states(folder):
        remove_written(state)
    for state in found:
        folder.mkdir(parents=True, exist_ok=True)
        goal = folder / state.name
        if not os.path.lexists(goal):
            os.rename(state, goal)


def states(folder: Path) -> list[Path]:
    """The valid states in a folder, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{STATE_FILE}"))
