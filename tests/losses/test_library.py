"""The compiled library: loaded once, and in words why not where it cannot be."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tdro_hpc.losses.library import OPERATORS, PATH, Library, load, load_from

ROOT = Path(__file__).parents[2]
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
needs_library = pytest.mark.skipif(not PATH.exists(), reason="the library is not built (make build)")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (make test installs one, as root)")


def reason_for(path: Path) -> str:
    found = load_from(path)
    assert found == Library(None, cpu=False, cuda=False, reason=found.reason)
    assert found.reason.endswith(f". Type `make build` in {ROOT}.")
    return found.reason.removesuffix(f". Type `make build` in {ROOT}.")


def compiled(path: Path, code: str, *options: str) -> Path:
    source = path.with_suffix(".cpp")
    source.write_text(code)
    subprocess.run([COMPILER, "-shared", "-fPIC", str(source), "-o", str(path), *options], check=True)
    return path


@needs_library
def test_the_library_is_loaded_once_and_serves_the_cpu():
    library = load()
    assert library is load() and library.path == PATH and library.cpu and library.reason == ""
    assert all(hasattr(torch.ops.tdro_hpc, name) for name in OPERATORS)


def test_nothing_is_loaded_on_import():
    code = "import sys, tdro_hpc.losses, torch; print('infonce_forward' in dir(torch.ops.tdro_hpc), "
    code += "hasattr(torch.ops.tdro_hpc, 'infonce_forward'))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.split() == ["False", "False"]


def test_a_missing_library_is_not_built(tmp_path: Path):
    assert reason_for(tmp_path / "none.so") == "none.so is not built"


def test_outside_of_a_checkout_the_reason_names_the_ways_to_a_library(tmp_path: Path):
    """In site-packages, or in a copy of the code that a job runs."""
    shutil.copytree(ROOT / "tdro_hpc", tmp_path / "tdro_hpc", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    code = "from tdro_hpc.losses.library import load; print(load().reason)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-P", "-c", code] if sys.version_info >= (3, 11) else [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (
        "libtdro_kernels.so is not built. Type `make build` in the checkout of tdro_hpc, or install a wheel that was "
        "built where a compiler is."
    )


def test_what_is_no_library_is_told_before_it_is_loaded(tmp_path: Path):
    path = tmp_path / "lib.so"
    path.write_bytes(b"")
    assert reason_for(path) == f"{path} is damaged: 0 bytes that are no library"
    path.write_text("version https://git-lfs.example.org/spec\n" * 3)
    assert reason_for(path) == f"{path} is damaged: {path.stat().st_size} bytes that are no library"
    assert reason_for(tmp_path) == f"{tmp_path} cannot be read: Is a directory"


@needs_library
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_library_that_was_cut_off_is_told_before_it_is_loaded(tmp_path: Path, share: float):
    """The system's loader would map it and end the process at its first missing page."""
    path = tmp_path / "cut.so"
    path.write_bytes(PATH.read_bytes()[: int(PATH.stat().st_size * share)])
    assert reason_for(path) == f"{path} is damaged: it was cut off at {path.stat().st_size} bytes"


@needs_library
def test_a_library_of_another_architecture_is_named(tmp_path: Path):
    content = bytearray(PATH.read_bytes())
    content[18:20] = (22).to_bytes(2, "little")  # the machine: S/390, which nobody has here
    path = tmp_path / "other.so"
    path.write_bytes(content)
    assert reason_for(path) == f"{path} is for machine 22, and this is {os.uname().machine}"


@needs_compiler
def test_a_library_that_does_not_fit_is_told_from_what_the_loader_says(tmp_path: Path):
    newer = compiled(tmp_path / "newer.so", 'extern "C" int torch_of_2031(); int f() { return torch_of_2031(); }')
    assert reason_for(newer) == f"{newer} is built for a newer torch: torch {torch.__version__} has no torch_of_2031"
    other = compiled(tmp_path / "other.so", 'extern "C" int elsewhere(); int f() { return elsewhere(); }')
    assert reason_for(other) == f"{other} is built for other libraries: nothing here has elsewhere"
    compiled(tmp_path / "libgone.so", 'extern "C" int gone() { return 1; }')
    beside = compiled(
        tmp_path / "needs.so",
        'extern "C" int gone(); int f() { return gone(); }',
        f"-L{tmp_path}",
        "-Wl,--no-as-needed",
        "-lgone",
    )
    assert "needs.so does not load: libgone.so: cannot open shared object file" in reason_for(beside)


@needs_compiler
def test_a_library_of_a_newer_system_is_named(tmp_path: Path):
    """As from a newer libstdc++: the library that is found has fewer versions than the one that was linked with."""
    script = tmp_path / "versions"
    script.write_text("GLIBCXX_9.9.99 { global: *; };\n")
    compiled(tmp_path / "libsystem.so", 'extern "C" int f() { return 1; }', f"-Wl,--version-script={script}")
    options = f"-L{tmp_path}", "-lsystem", f"-Wl,-rpath,{tmp_path}"
    path = compiled(tmp_path / "new.so", 'extern "C" int f(); int g() { return f(); }', *options)
    script.write_text("GLIBCXX_3.4 { global: *; };\n")
    compiled(tmp_path / "libsystem.so", 'extern "C" int f() { return 1; }', f"-Wl,--version-script={script}")
    assert reason_for(path) == f"{path} is built on a newer system: this one has no GLIBCXX_9.9.99"


@needs_compiler
def test_a_library_without_the_operators_is_refused(tmp_path: Path):
    path = compiled(tmp_path / "empty.so", "int f() { return 1; }")
    code = f"from pathlib import Path; from tdro_hpc.losses.library import load_from; print(load_from(Path('{path}')))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"empty.so lacks {', '.join(OPERATORS)}: it was built from other sources" in said and "path=None" in said
