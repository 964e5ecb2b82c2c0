"""The code in use, copied into a run directory: jobs run what was there when they were submitted.

In a git checkout that is HEAD with the changes of the working tree, new files and compiled libraries; elsewhere the
package as it is installed. Copied file by file: `git apply` leaves out, without a word, what lies outside the checkout
that its working directory belongs to.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import tdro_hpc
from tdro_hpc.launch.commands import run_command

CODE_VERSION, DIFF, JOB_FILE = "CODE_VERSION", "dirty.diff", "job.py"
_PACKAGE = "tdro_hpc"
_FOLDERS = (_PACKAGE, "configs", "kernels")  # what a job reads of a checkout, where they are there
_JOB = '''\
"""Runs jobs with the code in this folder, whatever is installed or lies in the working directory.

    python job.py <stage>/log/slurm            the job that was submitted there
    python job.py -m tdro_hpc.run <stage>      any module, as `python -m` does
"""

import runpy
import sys
from pathlib import Path

# Loader processes import this file again. They must not start the job a second time.
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    if sys.argv[1] == "-m":
        sys.argv = sys.argv[2:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        from tdro_hpc.launch.slurm.executor import run_submitted

        run_submitted(Path(sys.argv[1]))
'''


@dataclass(frozen=True)
class Code:
    """The code under one folder at one moment."""

    version: str  # <commit>, with -dirty-<hash of the diff> and -built-<hash of the libraries> where there are some
    files: tuple[str, ...]  # paths under the folder
    diff: bytes = b""  # against the commit, new files included


def take_snapshot(run_dir: Path) -> Path:
    """Copy of the code in use, <run>/code/<version>; the same code is copied once.

    run_dir   absolute
    returns   a folder with tdro_hpc/, configs/, kernels/ (where there), job.py, CODE_VERSION and, where files differ
              from the commit, dirty.diff
    raises    ValueError when the code is edited meanwhile
    """
    assert run_dir.is_absolute(), "a job starts in a folder that is not known here"
    return copy_code(code_root(), run_dir / "code")


def snapshot_folder(run_dir: Path) -> Path:
    """Where take_snapshot puts the code as it is now. Writes nothing."""
    return run_dir / "code" / read_code(code_root()).version


def code_root() -> Path:
    """The folder that the package lies in."""
    return Path(tdro_hpc.__file__).resolve().parent.parent


def copy_code(root: Path, target: Path) -> Path:
    """Copy of the code under `root`: a folder in `target` named by its version, whole or not there."""
    code = read_code(root)
    folder = target / code.version
    if _is_whole(folder, root, code):
        return folder
    # Not new_folder, which waits for the disk once a file: that takes seconds here, and what a power cut leaves behind
    # is found by its sizes.
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=target) as scratch:
        copy = Path(scratch, code.version)
        for name in code.files:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, copy / name)
        (copy / JOB_FILE).write_text(_JOB, encoding="utf-8")
        (copy / CODE_VERSION).write_text(code.version + "\n", encoding="utf-8")
        if code.diff:
            (copy / DIFF).write_bytes(code.diff)
        if read_code(root) != code:
            raise ValueError(f"Files under {root} were changed while they were copied. Type the same line again.")
        if folder.is_dir() and not _is_whole(folder, root, code):
            os.replace(folder, Path(scratch, "damaged"))
        try:
            os.replace(copy, folder)
        except OSError:
            # Another front door was faster, with the same code.
            if not _is_whole(folder, root, code):
                raise
    return folder


def _is_whole(folder: Path, root: Path, code: Code) -> bool:
    """Whether a copy has every file, with the size of the original."""
    sizes = {name: (root / name).stat().st_size for name in code.files}
    sizes |= {JOB_FILE: len(_JOB), CODE_VERSION: len(code.version) + 1}
    try:
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except FileNotFoundError:
        return False


def code_version_of(root: Path) -> str:
    """Version of the code under `root`: that of the snapshot which it is, or of the files as they are now."""
    noted = root / CODE_VERSION
    return noted.read_text(encoding="utf-8").strip() if noted.is_file() else read_code(root).version


def read_code(root: Path) -> Code:
    """Version and files of the code under `root`."""
    noted = root / CODE_VERSION
    if noted.is_file():
        diff = (root / DIFF).read_bytes() if (root / DIFF).is_file() else b""
        return Code(noted.read_text(encoding="utf-8").strip(), tuple(_files_below(root, _FOLDERS)), diff)
    in_git = _git_code(root) if (root / ".git").exists() else None
    if in_git is not None:
        return in_git
    # Only the package: what else lies beside it, in site-packages, is not ours.
    files = tuple(_files_below(root, (_PACKAGE,)))
    return Code(f"version-{tdro_hpc.__version__}-{_hash(root, files)}", files)


def _git_code(root: Path) -> Code | None:
    """The code of a checkout; None where git is missing, refuses, or has no commit yet."""
    commit = _git(root, "rev-parse", "--short=10", "HEAD")
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *_FOLDERS)
    new = _git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *_FOLDERS)
    if commit is None or listed is None or new is None:
        return None
    sources = {name for name in listed.split("\0") if (root / name).is_file()}
    libraries = {str(path.relative_to(root)) for path in (root / _PACKAGE).rglob("*.so")} - sources
    diff = _diff(root, [name for name in new.split("\0") if name])
    if diff is None:
        return None
    version = commit.strip()
    if diff:
        version += f"-dirty-{hashlib.sha256(diff).hexdigest()[:8]}"
    if libraries:
        version += f"-built-{_hash(root, sorted(libraries))}"
    return Code(version, tuple(sorted(sources | libraries)), diff)


def _diff(root: Path, new_files: list[str]) -> bytes | None:
    """What `git apply` turns the commit into the working tree with, for the folders that count; None = git refuses."""
    index = _git(root, "rev-parse", "--git-path", "index")
    if index is None:
        return None
    with tempfile.TemporaryDirectory(prefix="tdro-hpc-") as scratch:
        # New files only show in a diff when the index knows of them. The index of the person stays as it is.
        own_index, written = Path(scratch, "index"), Path(scratch, "diff")
        if (root / index.strip()).is_file():
            shutil.copy2(root / index.strip(), own_index)
        if new_files and _git(root, "add", "--intent-to-add", "--", *new_files, index=own_index) is None:
            return None
        options = ("--binary", "--no-color", "--no-ext-diff", "--no-textconv", "--src-prefix=a/", "--dst-prefix=b/")
        said = _git(root, "diff", *options, f"--output={written}", "HEAD", "--", *_FOLDERS, index=own_index)
        return None if said is None else written.read_bytes()


def _git(root: Path, *words: str, index: Path | None = None) -> str | None:
    """What git says about the checkout; None when it fails."""
    assignment = ["env", f"GIT_INDEX_FILE={index}"] if index else []
    outcome = run_command([*assignment, "git", "-C", str(root), *words])
    return None if outcome.code else outcome.out


def _files_below(root: Path, folders: Iterable[str]) -> list[str]:
    found = [path for folder in folders for path in (root / folder).rglob("*") if path.is_file()]
    return sorted(str(path.relative_to(root)) for path in found if "__pycache__" not in path.parts)


def _hash(root: Path, files: Iterable[str]) -> str:
    """Eight digits that change with a name or the content of a file."""
    whole = hashlib.sha256()
    for name in files:
        content = hashlib.sha256((root / name).read_bytes()).hexdigest()
        whole.update(f"{name}\0{content}\0".encode())
    return whole.hexdigest()[:8]
