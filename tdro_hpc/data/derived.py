"""Files made from a data file (row indexes, unpacked archives): where they lie, when they are stale, how they appear.

A derived folder appears under its final name only when it is whole, so no process ever reads half of one. Its name
carries a stamp of the source file: a changed source is a new name, and the old folder is removed.
"""

import errno
import fcntl
import hashlib
import logging
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

FOLDER = ".tdro_hpc"  # beside the data file
END_BYTES = 4096  # of each end of a file that go into its stamp
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


def home_cache() -> Path:
    """Folder for derived files whose data lies in a read-only place."""
    return Path.home() / ".cache" / "tdro_hpc"


def stamp_of(path: Path) -> str:
    """16 hex digits that change when the file does: size, time of change (ns), first and last 4 KiB."""
    status = path.stat()
    digest = hashlib.blake2b(f"{status.st_size} {status.st_mtime_ns}".encode(), digest_size=8)
    with path.open("rb") as handle:
        digest.update(handle.read(END_BYTES))
        handle.seek(max(0, status.st_size - END_BYTES))
        digest.update(handle.read(END_BYTES))
    return digest.hexdigest()


def derived_folder(path: Path, kind: str, *, stamp: str, cache_dir: str, build: Callable[[Path], None]) -> Path:
    """Folder of files of this kind made from `path`; built first where there is none for this stamp.

    kind       word of the file name, such as rows or unpacked; one current folder is kept for each kind
    stamp      hex digits; another stamp is another folder, and folders of older stamps are removed
    cache_dir  empty = beside the file, or ~/.cache/tdro_hpc where that place is read-only
    build      writes its files into the empty folder that it is given; may run in several processes at once where
               the file system has no locks, then the first that ends counts
    raises     ValueError when no place can be written, or the disk is full
    """
    places = _places(path, cache_dir)
    for folder, prefix in places:
        target = folder / f"{prefix}.{stamp}.{kind}"
        if target.is_dir():
            return target
    folder, prefix = _first_writable(path, places)
    target = folder / f"{prefix}.{stamp}.{kind}"
    with _locked(folder / f"{prefix}.{kind}.lock") as locked:
        if target.is_dir():
            return target
        old = [entry for entry in folder.iterdir() if _is_older(entry.name, prefix, kind, part=locked)]
        _build_whole(target, build)
        for entry in old:
            shutil.rmtree(entry, ignore_errors=True)
    return target


def _places(path: Path, cache_dir: str) -> list[tuple[Path, str]]:
    """(folder, start of the name) of each place, best first; a shared place needs the file's folder in the name."""
    shared = f"{path.name}-{hashlib.blake2b(str(path.absolute().parent).encode(), digest_size=4).hexdigest()}"
    if cache_dir:
        return [(Path(cache_dir).expanduser(), shared)]
    return [(path.parent / FOLDER, path.name), (home_cache(), shared)]


def _first_writable(path: Path, places: list[tuple[Path, str]]) -> tuple[Path, str]:
    for folder, prefix in places:
        # root may write into a folder without write permission; its owner meant it to stay as it is.
        if folder.parent.is_dir() and not folder.is_dir() and folder.parent.stat().st_mode & 0o222 == 0:
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".probe-{socket.gethostname()}-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            if error.errno in UNWRITABLE:
                continue
            raise
        return folder, prefix
    tried = ", ".join(str(folder) for folder, _ in places)
    raise ValueError(f"No place for the row index of {path}: {tried} cannot be written. Set data.cache_dir=<folder>.")


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock of one derived file; False where the file system has no locks. A killed process lets go of it."""
    with path.open("a") as handle:
        locked = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that builds %s", path.with_suffix("").name)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("%s cannot be locked (%s): processes may build the same index side by side", path, error)
            locked = False
        yield locked


def _is_older(name: str, prefix: str, kind: str, *, part: bool) -> bool:
    """Whether a name is a derived folder of the same file and kind; `part` adds what killed builds left behind."""
    if not name.startswith(f"{prefix}."):
        return False
    stamp, _, rest = name[len(prefix) + 1 :].partition(".")
    is_part = part and rest.startswith(f"{kind}.") and rest.endswith(".part")
    return len(stamp) == 16 and (rest == kind or is_part)


def _build_whole(target: Path, build: Callable[[Path], None]) -> None:
    temporary = target.with_name(f"{target.name}.{secrets.token_hex(8)}.part")
    temporary.mkdir()
    try:
        build(temporary)
        temporary.rename(target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ValueError(f"The disk of {target.parent} is full. Set data.cache_dir=<folder with room>.") from error
        if not target.is_dir():  # a directory there means that another process was faster: same stamp, same content
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
