"""The Makefile's environment, with a Python that only pretends to make one."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRETENDED = """#!/bin/sh
[ "$1 $2" = "-m venv" ] || exit 0
mkdir -p "$3/bin"
printf '#!/bin/sh\\necho "$@" >> installs.txt\\n' > "$3/bin/pip"
printf '#!/bin/sh\\necho "$@" >> runs.txt\\n' > "$3/bin/python"
chmod +x "$3/bin/pip" "$3/bin/python"
"""
TOOLS = "c++", "chromium", "shellcheck"


pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What make needs, a Python that pretends, and a folder of commands without any."""
    for name in ("Makefile", "setup.py", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    script(tmp_path / "python", PRETENDED)
    (tmp_path / "commands").mkdir()
    return tmp_path


def script(path: Path, text: str) -> None:
    path.write_text(text if text.startswith("#!") else f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def make(root: Path, *words: str, status: int = 0, **variables: str) -> str:
    """What make says."""
    outer = "CXX", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PYTHON"  # of the make that these tests may run under
    environment = {name: value for name, value in os.environ.items() if name not in outer} | variables
    command = [str(shutil.which("make")), *words, "PYTHON=./python"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def test_an_interrupted_environment_is_made_whole_and_made_once(checkout: Path):
    (checkout / ".venv/bin").mkdir(parents=True)
    (checkout / ".venv/bin/python").touch()  # python -m venv was stopped before it came to pip
    make(checkout, ".venv/installed")
    installs = (checkout / "installs.txt").read_text()
    assert "torch==" in installs and "-c constraints.txt" in installs
    assert "up to date" in make(checkout, ".venv/installed")
    assert (checkout / "installs.txt").read_text() == installs


def test_the_library_is_built_before_the_tests_and_the_demo_and_required_by_make_build(checkout: Path):
    build = "setup.py -q build_ext --inplace"
    make(checkout, "-o", "tools", "test")
    first, *pytests = (checkout / "runs.txt").read_text().splitlines()
    assert first == build
    assert sorted(pytests) == ["-m pytest tests --ignore=tests/cluster", "-m pytest tests/cluster"]
    (checkout / "runs.txt").unlink()
    make(checkout, "demo")
    assert (checkout / "runs.txt").read_text().splitlines()[0] == build
    (checkout / "runs.txt").unlink()
    make(checkout, "build")
    assert (checkout / "runs.txt").read_text().splitlines() == [f"{build} --required"]


def test_wheel_check_runs_what_the_wheel_brings_under_another_torch(checkout: Path):
    make(checkout, "wheel-check", "OTHER_TORCH=torch==9.9")
    *_, wheel, install = (checkout / "installs.txt").read_text().splitlines()
    assert wheel == "wheel -q --no-deps -w build/wheel-check ."
    assert install == "install -q torch==9.9 build/wheel-check/*-none-linux_*.whl"  # with the library, or none fits
    assert "torch.__version__" in (checkout / "runs.txt").read_text()  # the one that builds it
    assert (checkout / "build/wheel-check/runs.txt").read_text() == "-m tdro_hpc.info\n"  # not in the checkout


@pytest.mark.parametrize("failing", ["--ignore=tests/cluster", "tests/cluster"])
def test_make_test_fails_and_shows_it_when_either_half_fails(checkout: Path, failing: str):
    make(checkout, ".venv/installed")
    fails = f'case " $* " in *" {failing} "*) echo "1 failed in $*"; exit 1;; *) echo "$* passed";; esac'
    script(checkout / ".venv/bin/python", fails)
    told = make(checkout, "-o", "tools", "test", status=2)
    assert "1 failed" in told and "passed" in told


@pytest.mark.parametrize(("missing", "package"), zip(TOOLS, ("g++", "chromium", "shellcheck"), strict=True))
def test_a_missing_tool_of_the_tests_is_installed_as_root(checkout: Path, missing: str, package: str):
    for name in {*TOOLS} - {missing}:
        script(checkout / "commands" / name, "")
    script(checkout / "commands/id", "echo 0")
    script(checkout / "commands/apt-get", 'echo "$@" >> installs.txt')
    make(checkout, "tools", PATH=str(checkout / "commands"))
    assert (checkout / "installs.txt").read_text().splitlines()[-1].endswith(f" {package}")


def test_what_tests_will_be_skipped_without_is_said_to_other_people(checkout: Path):
    script(checkout / "commands/id", "echo 1000")
    said = make(checkout, "tools", PATH=str(checkout / "commands"))
    assert "not here: g++ chromium shellcheck; tests that need them will be skipped" in said
    for name in ("chromium", "shellcheck"):
        script(checkout / "commands" / name, "")
    assert make(checkout, "tools", PATH=str(checkout / "commands"), CXX="my-compiler") == ""
