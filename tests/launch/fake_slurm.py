"""Slurm's programs as small scripts with a state file, for tests of what the front door says and does to Slurm.

A job stays as it was submitted until a test changes it: nothing runs.
"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

_PROGRAMS = ("sbatch", "squeue", "scancel", "sacct", "scontrol")
# What a program does is in this file; the scripts on PATH only say which one they are and where the state lies.
_SCRIPT = '#!/bin/sh\nexec "{python}" -S -E "{this}" {program} "{state}" "$@"\n'


class FakeSlurm:
    """The state that the scripts share."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "state.json"
        self.write({"next": 811, "jobs": {}, "calls": [], "fail_at": 0, "lost": False, "down": "", "sacct": {}})

    def read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text())

    def write(self, state: dict[str, Any]) -> None:
        self.path.write_text(json.dumps(state))

    def set(self, **values: Any) -> None:
        self.write({**self.read(), **values})

    def change(self, job: str, **values: Any) -> None:
        """Another state, reason or nodes of a job."""
        state = self.read()
        state["jobs"][job].update(values)
        self.write(state)

    def remove(self, *jobs: str) -> None:
        """Jobs leave the queue."""
        state = self.read()
        for job in jobs:
            del state["jobs"][job]
        self.write(state)

    @property
    def jobs(self) -> dict[str, dict[str, str]]:
        return self.read()["jobs"]

    def calls(self, program: str) -> list[list[str]]:
        """Arguments of every call of a program."""
        return [call[1:] for call in self.read()["calls"] if call[0] == program]


def put_on_path(folder: Path, monkeypatch: "pytest.MonkeyPatch") -> FakeSlurm:
    """Slurm's programs in `folder`, before all others on PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    slurm = FakeSlurm(folder)
    for program in _PROGRAMS:
        script = folder / program
        script.write_text(_SCRIPT.format(python=sys.executable, this=__file__, program=program, state=slurm.path))
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return slurm


def _sbatch(state: dict[str, Any], words: list[str]) -> int:
    if state["down"]:
        sys.stderr.write(f"sbatch: error: {state['down']}\n")
        return 1
    if "--test-only" in words:
        refused = state["fail_at"] == -1
        sys.stderr.write("sbatch: error: invalid partition specified: gpu\n" if refused else "")
        sys.stderr.write("" if refused else "sbatch: Job 900 to start at 2026-01-01T00:00:00 using 4 processors\n")
        return int(refused)
    state["submitted"] = state.get("submitted", 0) + 1
    fails = state["submitted"] == state["fail_at"]
    if not fails or state["lost"]:
        dependency = next((word.partition("=")[2] for word in words if word.startswith("--dependency=")), "")
        job, state["next"] = str(state["next"]), state["next"] + 1
        state["jobs"][job] = {
            "state": "PENDING",
            "reason": "Dependency" if dependency else "Resources",
            "dependency": dependency and f"{dependency}(unfulfilled)",
            "nodes": "",
            "script": os.path.abspath(words[-1]),
        }
    if fails:
        sys.stderr.write("sbatch: error: Batch job submission failed: Job violates accounting/QOS policy\n")
        return 1
    print(f"Submitted batch job {job}")
    return 0


def _squeue(state: dict[str, Any], words: list[str]) -> int:
    if state["down"]:
        sys.stderr.write(f"slurm_load_jobs error: {state['down']}\n")
        return 1
    for job, row in state["jobs"].items():
        cells = [
            job,
            row["state"],
            "1:00:00",
            row["nodes"],
            row["dependency"] or "(null)",
            row["reason"],
            row["script"],
        ]
        print("\x1f".join(cells))
    return 0


def _scancel(state: dict[str, Any], words: list[str]) -> int:
    for job in [word for word in words if not word.startswith("-")]:
        state["jobs"].pop(job, None)
    return 0


def _sacct(state: dict[str, Any], words: list[str]) -> int:
    for job, end in state["sacct"].items():
        print(f"{job}|{end}")
    return 0 if state["sacct"] else 1


def _main(program: str, path: Path, words: list[str]) -> int:
    state = json.loads(path.read_text())
    state["calls"].append([program, *words])
    acts = {"sbatch": _sbatch, "squeue": _squeue, "scancel": _scancel, "sacct": _sacct}
    code = acts[program](state, words) if program in acts else 0
    path.write_text(json.dumps(state))
    return code


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))
