"""The Makefile's environment, with a Python that only pretends to make one."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRETENDED = """#!/bin/sh
[ "$1 $2" = "-m venv" ] || exit 0
mkdir -p "$3/bin"
printf '#!/bin/sh\\necho "$@" >> installs.txt\\n' > "$3/bin/pip"
chmod +x "$3/bin/pip"
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_an_interrupted_environment_is_made_whole_and_made_once(tmp_path: Path):
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "python").write_text(PRETENDED)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").touch()  # python -m venv was stopped before it came to pip
    command = ["make", ".venv/installed", "PYTHON=./python"]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert first.returncode == 0, first.stdout + first.stderr
    installs = (tmp_path / "installs.txt").read_text()
    assert "torch==" in installs and "-c constraints.txt" in installs
    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert second.returncode == 0 and "up to date" in second.stdout
    assert (tmp_path / "installs.txt").read_text() == installs
