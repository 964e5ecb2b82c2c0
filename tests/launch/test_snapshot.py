"""Jobs run the code as it was when they were submitted, wherever they are started and whatever is edited meanwhile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tdro_hpc
from tdro_hpc.launch import snapshot
from tdro_hpc.launch.record import code_version
from tdro_hpc.launch.snapshot import code_root, code_version_of, copy_code, snapshot_folder, take_snapshot

ROOT = Path(tdro_hpc.__file__).parents[1]
LIBRARY = "tdro_hpc/losses/libtdro_kernels.so"


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small repository of the same shape, with one commit."""
    root = tmp_path / "repository"
    for name, text in (
        ("tdro_hpc/__init__.py", '__version__ = "7"\n'),
        ("tdro_hpc/loss/infonce.py", "MARGIN = 1\n"),
        ("tdro_hpc/gone.py", ""),
        ("configs/model/a.yaml", "width: 1\n"),
        ("kernels/tile.cu", "// tile\n"),
        ("README.md", "about\n"),
        (".gitignore", "*.so\n*.log\nruns/\n__pycache__/\n"),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "first")
    return root


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_clean_checkout_is_its_commit(checkout, tmp_path):
    copy = copy_code(checkout, tmp_path / "run" / "code")
    assert copy.name == git(checkout, "rev-parse", "--short=10", "HEAD").strip() == code_version_of(copy)
    code = {"tdro_hpc/__init__.py", "tdro_hpc/loss/infonce.py", "tdro_hpc/gone.py", "configs/model/a.yaml"}
    assert files_of(copy) == code | {"kernels/tile.cu", "job.py", "CODE_VERSION"}


def make_dirty(checkout: Path) -> None:
    (checkout / "tdro_hpc/loss/infonce.py").write_text("MARGIN = 2  # \N{DEGREE SIGN}\n", encoding="latin-1")
    (checkout / "tdro_hpc/gone.py").unlink()
    (checkout / "tdro_hpc/new file.py").write_text("NEW = 1\n")
    (checkout / "tdro_hpc/trace.log").write_text("ignored")
    (checkout / "notes.txt").write_text("of nobody's interest")
    (checkout / "configs/model/weights.bin").write_bytes(bytes(range(256)))


def test_a_dirty_tree_is_copied_as_it_is(checkout, tmp_path):
    make_dirty(checkout)
    before = git(checkout, "status", "--porcelain")
    copy = copy_code(checkout, tmp_path / "run" / "code")
    assert (copy / "tdro_hpc/loss/infonce.py").read_bytes() == b"MARGIN = 2  # \xb0\n"
    found = files_of(copy)
    assert {"tdro_hpc/new file.py", "configs/model/weights.bin", "dirty.diff"} <= found
    assert not {"tdro_hpc/gone.py", "tdro_hpc/trace.log", "notes.txt"} & found
    assert git(checkout, "status", "--porcelain") == before, "the index of the person stays as it is"


def test_commit_and_diff_give_the_copy(checkout, tmp_path):
    make_dirty(checkout)
    copy = copy_code(checkout, tmp_path / "run" / "code")
    again = tmp_path / "again"
    git(tmp_path, "clone", "-q", str(checkout), str(again))
    git(again, "apply", str(copy / "dirty.diff"))
    for name in files_of(copy) - {"job.py", "CODE_VERSION", "dirty.diff"}:
        assert (again / name).read_bytes() == (copy / name).read_bytes(), name
    assert not (again / "tdro_hpc/gone.py").exists()


def test_the_version_changes_with_the_code_and_with_nothing_else(checkout):
    commit = code_version_of(checkout)
    (checkout / "README.md").write_text("changed\n")
    (checkout / "tdro_hpc/trace.log").write_text("ignored")
    assert code_version_of(checkout) == commit
    seen = {commit}
    for name, text in (("tdro_hpc/loss/infonce.py", "a = 1"), ("tdro_hpc/b.py", "b"), ("configs/model/a.yaml", "c: 1")):
        (checkout / name).write_text(text)
        seen.add(code_version_of(checkout))
    assert len(seen) == 4 and all(version.startswith(commit) for version in seen)
    assert all("-dirty-" in version for version in seen - {commit})


def test_compiled_libraries_are_copied_although_git_ignores_them(checkout, tmp_path):
    plain = code_version_of(checkout)
    (checkout / "tdro_hpc/loss/tiles.so").write_bytes(b"\x7fELF one")
    copy = copy_code(checkout, tmp_path / "code")
    assert (copy / "tdro_hpc/loss/tiles.so").read_bytes() == b"\x7fELF one"
    assert copy.name.startswith(f"{plain}-built-")
    (checkout / "tdro_hpc/loss/tiles.so").write_bytes(b"\x7fELF two")
    assert code_version_of(checkout) != copy.name


def test_the_same_code_is_copied_once(checkout, tmp_path):
    first = copy_code(checkout, tmp_path / "code")
    (first / "mark").touch()
    assert copy_code(checkout, tmp_path / "code") == first and (first / "mark").exists()


def test_a_copy_that_a_power_cut_damaged_is_made_again(checkout, tmp_path):
    copy = copy_code(checkout, tmp_path / "code")
    (copy / "tdro_hpc/__init__.py").write_text("")
    (copy / "kernels/tile.cu").unlink()
    assert copy_code(checkout, tmp_path / "code") == copy
    assert (copy / "tdro_hpc/__init__.py").read_text() == '__version__ = "7"\n' and (copy / "kernels/tile.cu").exists()
    assert [path.name for path in (tmp_path / "code").iterdir()] == [copy.name], "nothing else is left"


def test_two_front_doors_at_once_make_one_copy(checkout, tmp_path, monkeypatch):
    """The second finishes between the first one's copying and its rename."""
    replace, faster = os.replace, []

    def late(source: Path, target: Path) -> None:
        if not faster:
            faster.append(True)
            copy_code(checkout, tmp_path / "code")
        replace(source, target)

    monkeypatch.setattr(snapshot.os, "replace", late)
    copy = copy_code(checkout, tmp_path / "code")
    assert faster and [path.name for path in (tmp_path / "code").iterdir()] == [copy.name]


def test_a_run_directory_inside_the_work_tree_gets_the_dirty_files(checkout):
    make_dirty(checkout)
    copy = copy_code(checkout, checkout / "runs" / "demo" / "code")
    assert (copy / "tdro_hpc/new file.py").exists() and b"MARGIN = 2" in (
        copy / "tdro_hpc/loss/infonce.py"
    ).read_bytes()
    assert copy_code(checkout, checkout / "runs" / "demo" / "code") == copy


def test_without_git_the_package_alone_is_copied(tmp_path):
    site = tmp_path / "site-packages"
    for name in ("tdro_hpc/__init__.py", "tdro_hpc/configs/run.yaml", "tdro_hpc/__pycache__/a.pyc", "configs/other.py"):
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(name)
    copy = copy_code(site, tmp_path / "code")
    assert files_of(copy) == {"tdro_hpc/__init__.py", "tdro_hpc/configs/run.yaml", "job.py", "CODE_VERSION"}
    assert copy.name == code_version_of(site) == code_version_of(copy)
    (site / "tdro_hpc/__init__.py").write_text("edited")
    assert code_version_of(site) != copy.name


def test_a_snapshot_of_a_snapshot_is_the_same(checkout, tmp_path):
    make_dirty(checkout)
    first = copy_code(checkout, tmp_path / "one")
    second = copy_code(first, tmp_path / "two")
    assert second.name == first.name and files_of(second) == files_of(first)


def test_code_that_is_edited_while_it_is_copied_is_refused(checkout, tmp_path, monkeypatch):
    copied = snapshot.shutil.copy2

    def copy_and_edit(source: Path, target: Path) -> None:
        copied(source, target)
        if source.name == "gone.py":
            (checkout / "tdro_hpc/__init__.py").write_text("edited\n")

    monkeypatch.setattr(snapshot.shutil, "copy2", copy_and_edit)
    with pytest.raises(ValueError, match="changed while they were copied. Type the same line again"):
        copy_code(checkout, tmp_path / "code")
    assert list((tmp_path / "code").iterdir()) == []


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot of this package."""
    run_dir = tmp_path_factory.mktemp("run")
    assert snapshot_folder(run_dir) == run_dir / "code" / code_version()
    return take_snapshot(run_dir)


def test_the_snapshot_of_this_package_is_named_by_its_version(taken):
    assert taken.name == code_version() and code_root() == ROOT
    assert (taken / "tdro_hpc/run.py").read_bytes() == (ROOT / "tdro_hpc/run.py").read_bytes()


def imported_by(*words: str, cwd: Path, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_job_imports_the_snapshot_and_not_what_is_installed_or_lies_in_the_working_directory(checkout, tmp_path):
    """The working directory is a checkout that is edited after the submission; the package is installed besides."""
    copy = copy_code(checkout, tmp_path / "run" / "code")
    (checkout / "tdro_hpc/loss/infonce.py").write_text("MARGIN = 'edited'\n")
    probe = checkout / "tdro_hpc/probe.py"  # a module that only the working directory has
    probe.write_text("")
    (copy / "tdro_hpc/show.py").write_text(
        "import sys, tdro_hpc.loss.infonce as i\nprint(sys.argv[1:], i.MARGIN, i.__file__)\n"
    )
    for variables in ({}, {"PYTHONSAFEPATH": "1"}, {"PYTHONPATH": str(checkout)}):
        words = ("-u", str(copy / "job.py"), "-m", "tdro_hpc.show", "word")
        said = imported_by(*words, cwd=checkout, **variables)
        assert said == f"['word'] 1 {copy / 'tdro_hpc/loss/infonce.py'}", variables
    # The test can fail: without the snapshot the working directory is what is found.
    said = imported_by("-c", "import tdro_hpc.loss.infonce as i; print(i.MARGIN)", cwd=checkout)
    assert said == "edited"


@pytest.mark.skipif(not (ROOT / LIBRARY).exists(), reason="the library is not built (make build)")
def test_a_job_computes_the_loss_with_the_library_of_its_snapshot(taken):
    """Also where the checkout that it was submitted from is built anew, or cleaned, meanwhile."""
    assert (taken / LIBRARY).read_bytes() == (ROOT / LIBRARY).read_bytes()
    assert files_of(taken / "kernels") >= {"ops.cpp", "README.md"}
    said = imported_by(str(taken / "job.py"), "-m", "tdro_hpc.info", cwd=ROOT)
    assert f"compiled loss  {taken / LIBRARY}" in said and "loss on cpu: compiled" in said


def test_what_a_job_starts_finds_the_snapshot_too(checkout, tmp_path):
    """Loader processes that are spawned import the main file again, and must not run the job a second time."""
    copy = copy_code(checkout, tmp_path / "code")
    (copy / "tdro_hpc/worker.py").write_text("import tdro_hpc\ndef place(_):\n    return tdro_hpc.__file__\n")
    (copy / "tdro_hpc/spawner.py").write_text(
        "import multiprocessing\nfrom tdro_hpc.worker import place\nif __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n        print(pool.map(place, [1])[0])\n"
    )
    said = imported_by(str(copy / "job.py"), "-m", "tdro_hpc.spawner", cwd=checkout)
    assert said == str(copy / "tdro_hpc/__init__.py")
