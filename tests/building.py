"""Copies of this checkout that are built, and what came of it."""

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = "tdro_hpc/losses/libtdro_kernels.so"
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
IS_X86 = platform.machine() == "x86_64"
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (make test installs one, as root)")


def copy_checkout(root: Path) -> Path:
    """What a wheel is made of, without kernels and without what was built."""
    root.mkdir()
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "Makefile"):
        shutil.copy(ROOT / name, root)
    for name in ("tdro_hpc", "configs"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.so*"))
    shutil.copy(ROOT / "constraints.txt", root)
    return root


def setup(root: Path, *words: str, code: int = 0, **variables: str) -> str:
    """What `python setup.py words` says."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "NVCC", "CUDA_HOME")}
    command = [sys.executable, "setup.py", "-q", *words]
    done = subprocess.run(command, cwd=root, env=environment | variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def compiled(said: str) -> set[str]:
    """Sources that were compiled, and the library if it was linked; not what only tries a compiler."""
    files = {line.split()[1] for line in said.splitlines() if line.startswith(("c++ ", "g++ ", "clang++ ", "nvcc "))}
    return {Path(file).name for file in files if "probe" not in file}


def wheel_of(root: Path, **variables: str) -> tuple[str, dict[str, bytes], str]:
    """Tags and files of the wheel that is built, and what was said."""
    shutil.rmtree(root / "dist", ignore_errors=True)
    said = setup(root, "bdist_wheel", **variables)
    (path,) = (root / "dist").iterdir()
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    return path.name.removesuffix(".whl").split("-", 2)[2], files, said


def answer_of(library: Path) -> str:
    code = f"import torch; torch.ops.load_library('{library}'); print(torch.ops.tdro_hpc.infonce_cpu_path())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
