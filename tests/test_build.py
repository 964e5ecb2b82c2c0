"""setup.py: what is compiled and when, what a wheel holds, and what is said where the library cannot be built.

They build a library of tiny sources in a copy of this checkout; tests/test_kernels.py builds the real ones.
"""

import math
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import setuptools

from tests.building import (
    COMPILER,
    IS_X86,
    LIBRARY,
    answer_of,
    compiled,
    copy_checkout,
    needs_compiler,
    setup,
    wheel_of,
)

TINY = {
    "ops.cpp": """
        #include <torch/csrc/stable/library.h>
        #include <torch/csrc/stable/ops.h>
        #include "cpu/answer.h"
        std::string path() { return answer(); }
        STABLE_TORCH_LIBRARY(tdro_hpc, m) { m.def("infonce_cpu_path() -> str"); }
        STABLE_TORCH_LIBRARY_IMPL(tdro_hpc, CompositeExplicitAutograd, m) {
          m.impl("infonce_cpu_path", TORCH_BOX(&path));
        }
        """,
    "cpu/answer.h": "const char* answer();\n",
    "cpu/answer.cpp": '#include "cpu/answer.h"\nconst char* answer() { return "tiny"; }\n',
    "cpu/wide_avx512bf16.cpp": """
        #if !defined(__AVX512BF16__) || !defined(__AVX512VL__) || !defined(TDRO_X86)
        #error wrong options
        #endif
        """,
}


def tiny_project(root: Path) -> Path:
    """This checkout, with tiny kernels."""
    copy_checkout(root)
    for name, text in TINY.items():
        path = root / "kernels" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Tiny kernels of which nothing is compiled."""
    return tiny_project(tmp_path / "project")


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tiny_project(tmp_path_factory.mktemp("compiled") / "project")
    setup(root, "build_ext", "--inplace", "--required")
    (root / LIBRARY).unlink()
    return root


@pytest.fixture
def built(compiled_once: Path, tmp_path: Path) -> Path:
    """Tiny kernels that are compiled; only the library is to be linked."""
    return Path(shutil.copytree(compiled_once, tmp_path / "project"))


def words_of(root: Path) -> set[str]:
    """Which of the answers that tests write into a source are in the library."""
    content = (root / LIBRARY).read_bytes()
    return {word for word in ("tiny", "small", "edited") if f"{word}\0".encode() in content}


def edit(path: Path, old: str, new: str) -> None:
    time.sleep(0.01)  # file times are as coarse as the system's clock
    path.write_text(path.read_text().replace(old, new))


@needs_compiler
def test_only_what_is_out_of_date_is_compiled(project: Path):
    sources = {"ops.cpp", "answer.cpp", *(["wide_avx512bf16.cpp"] if IS_X86 else [])}
    linked = {"libtdro_kernels.so"}
    assert compiled(setup(project, "build_ext", "--inplace")) == sources | linked
    assert words_of(project) == {"tiny"}
    assert compiled(setup(project, "build_ext", "--inplace")) == set()
    edit(project / "kernels/cpu/answer.cpp", "tiny", "small")
    assert compiled(setup(project, "build_ext", "--inplace")) == {"answer.cpp"} | linked
    assert words_of(project) == {"small"}
    edit(project / "kernels/cpu/answer.h", "answer();", "answer();  // in words")
    assert compiled(setup(project, "build_ext", "--inplace")) == {"ops.cpp", "answer.cpp"} | linked
    (project / "kernels/cpu/wide_avx512bf16.cpp").unlink()
    assert compiled(setup(project, "build_ext", "--inplace")) == (linked if IS_X86 else set())
    edit(project / "setup.py", '"-O3", "-fPIC"', '"-O2", "-fPIC"')
    assert compiled(setup(project, "build_ext", "--inplace")) == {"ops.cpp", "answer.cpp"} | linked


@needs_compiler
def test_a_library_in_use_is_not_written_into(built: Path):
    setup(built, "build_ext", "--inplace")
    with (built / LIBRARY).open("rb") as loaded:
        before = loaded.read()
        edit(built / "kernels/cpu/answer.cpp", "tiny", "another")
        setup(built, "build_ext", "--inplace")
        loaded.seek(0)
        assert loaded.read() == before != (built / LIBRARY).read_bytes()
    assert sorted(path.name for path in (built / LIBRARY).parent.glob("libtdro*")) == ["libtdro_kernels.so"]


def pretended_compiler(tmp_path: Path, text: str) -> str:
    path = tmp_path / "c++"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_a_source_that_is_edited_while_it_is_compiled_is_compiled_again(project: Path, tmp_path: Path):
    source = project / "kernels/cpu/answer.cpp"
    slow = f'{COMPILER} "$@" || exit 1; case "$*" in *answer.cpp*) sleep 0.1; sed -i s/tiny/edited/ {source};; esac'
    cxx = pretended_compiler(tmp_path, slow)
    setup(project, "build_ext", "--inplace", CXX=cxx)
    assert words_of(project) == {"tiny"}
    assert "answer.cpp" in compiled(setup(project, "build_ext", "--inplace", CXX=cxx))
    assert words_of(project) == {"edited"}


@needs_compiler
def test_a_source_that_does_not_compile_leaves_the_library_out_and_fails_where_it_is_required(built: Path):
    with (built / "kernels/cpu/answer.cpp").open("a") as file:
        file.write("no C++\n")
    tags, files, said = wheel_of(built)
    assert tags == "py3-none-any" and LIBRARY not in files
    assert "kernels/cpu/answer.cpp:3:1: error:" in said and "Losses are computed in torch" in said
    said = setup(built, "build_ext", "--inplace", "--required", code=1)
    assert f"{LIBRARY} cannot be built: it failed: " in said and not (built / LIBRARY).exists()


@needs_compiler
def test_a_wheel_serves_every_python_of_its_platform(built: Path):
    setup(built, "build_ext", "--inplace")  # what lies in the checkout is not what the wheel takes
    edit(built / "kernels/cpu/answer.cpp", "tiny", "wheel")
    tags, files, _ = wheel_of(built)
    assert tags == f"py3-none-linux_{platform.machine()}"
    assert f"Tag: {tags}\n".encode() in files["tdro_hpc-0.1.0.dist-info/WHEEL"]
    assert b"Root-Is-Purelib: false" in files["tdro_hpc-0.1.0.dist-info/WHEEL"]
    (built / "installed.so").write_bytes(files[LIBRARY])
    assert answer_of(built / "installed.so") == "wheel" and "tdro_hpc/configs/run.yaml" in files
    assert not [name for name in files if "kernels/" in name or name.endswith((".cpp", ".h", ".cu"))]


def test_without_a_compiler_one_line_says_so_and_the_wheel_is_for_any_platform(project: Path, tmp_path: Path):
    (project / LIBRARY).write_bytes(b"of another time")
    tags, files, said = wheel_of(project, PATH=str(tmp_path))
    line = "tdro_hpc without libtdro_kernels.so: no C++ compiler (looked for c++, g++, clang++; CXX names another)."
    assert said.count(line) == 1 and tags == "py3-none-any" and LIBRARY not in files
    assert b"Root-Is-Purelib: true" in files["tdro_hpc-0.1.0.dist-info/WHEEL"]
    setup(project, "build_ext", "--inplace", PATH=str(tmp_path))
    assert "no C++ compiler" in setup(project, "build_ext", "--inplace", "--required", code=1, PATH=str(tmp_path))


def test_pip_install_without_a_compiler_makes_a_package_that_warns_once_and_computes_the_loss(
    project: Path, tmp_path: Path
):
    variables = os.environ | {"CXX": str(tmp_path / "nowhere/c++"), "PIP_NO_INDEX": "1"}
    words = ["install", "-v", "--no-deps", "--no-build-isolation", "--target", str(tmp_path / "installed"), "."]
    command = [sys.executable, "-m", "pip", *words]
    done = subprocess.run(command, cwd=project, env=variables, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert said.count(f"no C++ compiler (looked for {tmp_path}/nowhere/c++; CXX names another).") == 1
    (tmp_path / "loss.py").write_text(
        "import torch\nfrom tdro_hpc.losses import grouped_infonce\nside, own = torch.eye(2), torch.arange(2)\n"
        "for times in (1, 2):\n    loss = grouped_infonce(side, side * times, own, temperature=1.0)\n"
        "print(loss.tolist(), grouped_infonce.__code__.co_filename)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "loss.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    loss = math.log1p(math.exp(-2))
    assert done.stdout.startswith(f"[{loss:.7f}"[:8]) and f" {tmp_path}/installed/tdro_hpc/losses/" in done.stdout
    assert done.stderr.count("UserWarning") == done.stderr.count("libtdro_kernels.so is not built") == 1
    assert "Type `make build` in the checkout of tdro_hpc, or install a wheel that was built where" in done.stderr


@needs_compiler
def test_a_wheel_without_a_compiler_has_no_library_of_an_earlier_wheel(built: Path, tmp_path: Path):
    assert LIBRARY in wheel_of(built)[1]
    tags, files, _ = wheel_of(built, PATH=str(tmp_path))
    assert tags == "py3-none-any" and LIBRARY not in files


@needs_compiler
def test_a_compiler_that_is_too_old_is_told_from_a_source_that_is_wrong(project: Path, tmp_path: Path):
    old = pretended_compiler(tmp_path, 'echo "unrecognized option -std=c++20" >&2; exit 1')
    said = setup(project, "build_ext", "--inplace", CXX=old)
    assert "unrecognized option -std=c++20" in said and f"{old} -O3" in said and "does not work" in said
    assert compiled(said) == set() and not (project / LIBRARY).exists()


@needs_compiler
@pytest.mark.parametrize(
    ("version", "words"),
    [("2.9.1+cpu", "is torch 2.9.1+cpu, and 2.10 or newer is needed"), ("2.10.0", "has no include/torch/csrc/stable")],
)
def test_a_torch_that_does_not_do_is_named(built: Path, tmp_path: Path, version: str, words: str):
    (tmp_path / "site/torch").mkdir(parents=True)
    (tmp_path / "site/torch/__init__.py").touch()
    (tmp_path / "site/torch/version.py").write_text(f"__version__ = '{version}'\n")
    assert words in setup(built, "build_ext", "--inplace", PYTHONPATH=str(tmp_path / "site"))


@needs_compiler
def test_headers_of_torch_are_found_where_pip_hides_torch(project: Path, tmp_path: Path):
    """pip builds in isolation: sys.path is without the environment, but for what the build itself needs."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import site, sys\nhidden = set(site.getsitepackages())\n"
        "sys.path[:] = [place for place in sys.path if place not in hidden]\n"
    )
    places = Path(setuptools.__file__).parents[1]
    for path in [*places.glob("setuptools*"), places / "_distutils_hack"]:
        (site / path.name).symlink_to(path)
    variables = {"PYTHONPATH": str(site)}
    hides = subprocess.run([sys.executable, "-c", "import torch"], env=os.environ | variables, capture_output=True)
    assert b"No module named 'torch'" in hides.stderr
    assert LIBRARY in wheel_of(project, **variables)[1]


@needs_compiler
def test_a_source_distribution_builds_the_library(project: Path, tmp_path: Path):
    setup(project, "sdist")
    (path,) = (project / "dist").glob("*.tar.gz")
    shutil.unpack_archive(path, tmp_path / "unpacked")
    (root,) = (tmp_path / "unpacked").iterdir()
    assert {name for name in TINY if (root / "kernels" / name).is_file()} == set(TINY)
    assert not (root / LIBRARY).exists()
    assert LIBRARY in wheel_of(root)[1]


@needs_compiler
def test_without_nvcc_the_library_is_for_cpus(built: Path, tmp_path: Path):
    (built / "kernels/cuda").mkdir()
    (built / "kernels/cuda/tile.cu").write_text("no CUDA\n")
    said = setup(built, "build_ext", "--inplace", NVCC=str(tmp_path / "nvcc"))
    assert f"{LIBRARY} is built for CPUs only: no nvcc (looked for {tmp_path}/nvcc; CUDA_HOME names another" in said
    assert answer_of(built / LIBRARY) == "tiny"
