"""Packed files in, one plain file of lines out: .gz, and the released data's tar.gz. Streamed, once a version."""

import gzip
import logging
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import IO

from tdro_hpc.data.derived import derived_folder, stamp_of

logger = logging.getLogger(__name__)

COPY_BYTES = 1 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def is_packed(path: Path) -> bool:
    """Whether the name says that the file has to be unpacked before rows can be read from it."""
    return path.name.endswith((".gz", ".tgz"))


def unpacked(path: Path, *, cache_dir: str) -> Path:
    """The plain file inside an archive, unpacked into the cache where that was not done yet.

    A tar archive may hold several members; their lines follow each other in the order of the archive.
    raises  ValueError when the archive is damaged or holds no rows
    """
    is_tar = path.name.endswith((".tar.gz", ".tgz"))
    name = path.name.removesuffix(".gz").removesuffix(".tgz").removesuffix(".tar")

    def build(folder: Path) -> None:
        logger.info("unpacking %s (%.1f MB)", path, path.stat().st_size / 1e6)
        with (folder / name).open("wb") as target:
            try:
                if is_tar:
                    _unpack_tar(path, target)
                else:
                    _unpack_gzip(path, target)
            except (EOFError, gzip.BadGzipFile, tarfile.TarError, zlib.error) as error:
                raise ValueError(
                    f"{path} cannot be unpacked: {error}. The file is damaged or its download was cut short; "
                    f"get it again, or test it with: gzip -t {path}"
                ) from error

    return derived_folder(path, "unpacked", stamp=stamp_of(path), cache_dir=cache_dir, build=build) / name


def _unpack_gzip(path: Path, target: IO[bytes]) -> None:
    with gzip.open(path, "rb") as source:
        shutil.copyfileobj(source, target, COPY_BYTES)


def _unpack_tar(path: Path, target: IO[bytes]) -> None:
    stem = path.name.split(".")[0]
    others = []
    with tarfile.open(path, "r|gz") as archive:
        for member in archive:
            name = Path(member.name).name
            # "._x" is what macOS adds beside every x.
            if member.isfile() and not name.startswith(".") and (name.endswith(".jsonl") or name.startswith(stem)):
                source = archive.extractfile(member)
                assert source is not None, "a regular member always has content"
                _append_lines(source, target)
            elif member.isfile():
                others.append(member.name)
    if target.tell() == 0:
        raise ValueError(f"{path} holds no rows: no member ends in .jsonl or starts with {stem!r}. It has: {others}.")


def _append_lines(source: IO[bytes], target: IO[bytes]) -> None:
    """Copy a member so that its last line ends before the next member's first."""
    block = source.read(COPY_BYTES).removeprefix(BYTE_ORDER_MARK)
    last = b"\n"
    while block:
        target.write(block)
        last = block[-1:]
        block = source.read(COPY_BYTES)
    if last != b"\n":
        target.write(b"\n")
