"""The real kernels, built from scratch: by silent compilers, for all processors and GPUs, keeping to themselves."""

import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.building import IS_X86, LIBRARY, ROOT, compiled, copy_checkout, needs_compiler, setup

NVCC = next(filter(None, map(shutil.which, ["nvcc", *map(str, Path("/usr/local").glob("cuda*/bin/nvcc"))])), None)
# In a CI run, CUDA sources that are not compiled fail their tests instead of leaving them out.
needs_nvcc = pytest.mark.skipif(NVCC is None and "CI" not in os.environ, reason="no nvcc here")
pytestmark = [needs_compiler, pytest.mark.slow]
# What the processor must have for a path of the library, and the files that are better than it.
PATHS = {
    "avx2": ({"avx2", "fma"}, ["avx512", "avx512bf16"]),
    "avx512": ({"avx512f", "avx512bw", "avx512dq", "avx512vl"}, ["avx512bf16"]),
}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """This checkout, built from scratch, and what the compilers said."""
    root = copy_checkout(tmp_path_factory.mktemp("real") / "checkout")
    shutil.copytree(ROOT / "kernels", root / "kernels")
    return root, setup(root, "build_ext", "--inplace", "--required")


def test_compilers_have_nothing_to_say_about_the_kernels(real: tuple[Path, str]):
    lines = [line for line in real[1].splitlines() if not line.startswith(("c++ ", "g++ ", "clang++ ", "nvcc "))]
    assert len(lines) == 1 and lines[0].startswith(f"{LIBRARY} is built "), real[1]


def test_the_kernels_compute_the_loss(real: tuple[Path, str]):
    command = [sys.executable, "-m", "tdro_hpc.info"]
    done = subprocess.run(command, cwd=real[0], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(real[0] / LIBRARY) in done.stdout and "loss on cpu: compiled" in done.stdout


def test_other_processors_than_x86_get_what_every_processor_can(real: tuple[Path, str], tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text("import platform\nplatform.machine = lambda: 'riscv64'\n")
    shutil.copytree(real[0], tmp_path / "checkout", ignore=shutil.ignore_patterns("build"))
    variables = {"PYTHONPATH": str(tmp_path), "NVCC": str(tmp_path / "nvcc")}
    said = setup(tmp_path / "checkout", "build_ext", "--inplace", "--required", **variables)
    assert {"ops.cpp", "infonce.cpp"} < compiled(said) and "_avx" not in said
    check_path(tmp_path / "checkout", "generic")


@pytest.mark.skipif(not IS_X86, reason="these paths are for x86-64")
@pytest.mark.parametrize("path", PATHS)
def test_older_processors_get_the_same_losses(real: tuple[Path, str], tmp_path: Path, path: str):
    """The same objects, but for the better files: those say that the processor does not have their instructions."""
    needed, better = PATHS[path]
    if lacking := needed - set(re.split(r"\s", Path("/proc/cpuinfo").read_text())):
        pytest.skip(f"this processor has no {', '.join(sorted(lacking))}")
    root = Path(shutil.copytree(real[0], tmp_path / "checkout"))
    for name in better:
        (root / f"kernels/cpu/tile_{name}.cpp").write_text(
            f'#include "cpu/tile.h"\nconst tdro::TileKernels* tdro::kernels_{name}() {{ return nullptr; }}\n'
        )
    said = setup(root, "build_ext", "--inplace", "--required")
    assert compiled(said) == {f"tile_{name}.cpp" for name in better} | {Path(LIBRARY).name}
    check_path(root, path)


def check_path(root: Path, path: str) -> None:
    """The library of a checkout takes a path, is found right by info, and passes the tests of the loss."""
    for name in ("conftest.py", "reference", "losses/test_infonce.py", "losses/test_infonce_large.py"):
        copy = shutil.copytree if (ROOT / "tests" / name).is_dir() else shutil.copy
        (root / "tests/losses").mkdir(parents=True, exist_ok=True)
        copy(ROOT / "tests" / name, root / "tests" / name)
    chosen = "fused and (test_infonce.py or 512-385-all-)"  # small cases, and one of each type in several panels
    code = (
        "import sys, pytest; from tdro_hpc import info\n"
        f"sys.exit(info.main([]) or pytest.main(['-q', '-p', 'no:cacheprovider', '-k', '{chosen}', 'tests/losses']))"
    )
    command, environment = [sys.executable, "-c", code], os.environ | {"CI": "true"}  # no library: no skipped tests
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in (str(root / LIBRARY), f"on this CPU by its {path} code", "loss on cpu: compiled", " passed"):
        assert words in done.stdout
    assert " skipped" not in done.stdout


def symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """(kind, name) of the symbols that a file defines."""
    said = subprocess.run(
        ["nm", "--defined-only", "-P", *options, str(path)], capture_output=True, text=True, check=True
    )
    return [(line.split()[1], line.split()[0]) for line in said.stdout.splitlines()]


@pytest.mark.skipif(not IS_X86, reason="these files are for x86-64")
def test_code_for_newer_processors_is_not_shared_with_other_files(real: tuple[Path, str]):
    """The linker keeps one copy of an inline function: that of such a file would stop an older processor."""
    objects = [path for path in (real[0] / "build").rglob("kernels/cpu/*.o") if "_avx" in path.name]
    assert len(objects) >= 2
    shared = {path.name: [name for kind, name in symbols(path) if kind in "WVu"] for path in objects}
    assert shared == {path.name: [] for path in objects}


def test_the_library_keeps_its_symbols_to_itself(real: tuple[Path, str]):
    """torch brings its own cudart, and other extensions theirs."""
    exported = [name for kind, name in symbols(real[0] / LIBRARY, "-D") if kind == "T"]
    assert exported == []


def machine_codes(library: bytes) -> list[set[tuple[str, int]]]:
    """Kind and compute capability of what each block of GPU code in a library holds."""
    found = []
    for block in re.finditer(rb"\x50\xed\x55\xba\x01\0\x10\0(.{8})", library, flags=re.DOTALL):
        at, end = block.end(), block.end() + struct.unpack("<Q", block[1])[0]
        found.append(set())
        while at < end:
            kind, _, header_bytes, content_bytes = struct.unpack_from("<HHIQ", library, at)
            found[-1].add(({1: "PTX", 2: "machine code"}[kind], *struct.unpack_from("<I", library, at + 28)))
            at += header_bytes + content_bytes
    return found


@needs_nvcc
def test_gpu_code_is_there_for_a100_for_h100_and_to_compile_for_newer_gpus(real: tuple[Path, str]):
    assert f"{LIBRARY} is built with CUDA" in real[1], real[1]
    codes = machine_codes((real[0] / LIBRARY).read_bytes())
    wanted = {("machine code", 80), ("machine code", 90), ("PTX", 90)}
    assert codes == [wanted] * len(list((ROOT / "kernels/cuda").glob("*.cu")))
