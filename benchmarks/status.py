"""Prints what `submit status` costs with many runs in one directory, beside the least that it could cost.

    python benchmarks/status.py [runs=200] [rounds=5]

Every run has five stages: one done, one running and three waiting in the queue of a Slurm. squeue is a shell script
that prints these jobs and counts its calls, so that no cluster is needed. The peer reads the plan, the list of jobs and
the newest metrics of every stage with json, starts the same squeue once, and prints nothing: a Python without us.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("s0", "s1", "s2-curr", "s2-top70", "eval")
FILES = ("jobs.jsonl", "metrics.jsonl", "DONE.json")
FIRST_JOB = 1000
PEER = """\
import json, subprocess, sys
from pathlib import Path
for path in Path(sys.argv[1]).glob("*/plan.json"):
    json.loads(path.read_text())
    for name in {files!r}:
        for file in path.parent.glob("*/" + name):
            [json.loads(line) for line in file.read_text().splitlines()]
subprocess.run(["squeue"], capture_output=True, check=True)
"""


def rows_of_job(job: str, begun: bool) -> list[dict]:
    """What jobs.jsonl holds of a job."""
    submit = {"event": "submit", "time": 1.0, "job": job, "executor": "slurm", "keys": {}, "fresh": True, "after": []}
    rows = [{**submit, "link": 1, "links": 1, "max_restarts": 20, "code": ""}]
    if begun:
        start = {"event": "start", "time": 2.0, "job": job, "executor": "slurm", "restart": 0, "fresh": True}
        keys = {f"section.key{number}": number for number in range(80)}
        more = {"pid": 1, "started": 2.0, "host": "node1", "attempt": 1, "ranks": 8, "keys": keys, "inputs": {}}
        rows.append({**start, **more})
    return rows


def write_run(run_dir: Path, first_job: int) -> list[str]:
    """Files of one run; the lines of squeue about its jobs."""
    lines = []
    stages = [
        {"name": name, "kind": name, "needs": list(STAGES[max(0, index - 1) : index]), "action": "run"}
        for index, name in enumerate(STAGES)
    ]
    run_dir.mkdir()
    (run_dir / "plan.json").write_text(json.dumps({"line": "", "time": 0, "stages": stages}))
    for index, name in enumerate(STAGES):
        folder, job = run_dir / name, str(first_job + index)
        folder.mkdir()
        rows = rows_of_job(job, begun=index < 2)
        (folder / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if index < 2:
            metrics = {"stage": name, "step": 400, "steps": 1000, "loss": 0.5, "clock": {"time": 0, "eta_seconds": 60}}
            (folder / "metrics.jsonl").write_text((json.dumps(metrics) + "\n") * 400)
        if index == 0:
            done = {"keys": rows[-1]["keys"], "inputs": {}, "code": "0", "seconds": 60.0, "outputs": {}}
            (folder / "DONE.json").write_text(json.dumps(done))
            continue
        state, node, reason = ("RUNNING", "node1", "None") if index == 1 else ("PENDING", "", "Dependency")
        dependency = "(null)" if index == 1 else f"afterok:{int(job) - 1}(unfulfilled)"
        lines.append("\x1f".join([job, state, "1:00:00", node, dependency, reason, f"{folder}/job.sbatch"]))
    return lines


def write_squeue(folder: Path, lines: list[str]) -> Path:
    """A squeue that prints these lines; the file that gets a line at each of its calls."""
    (folder / "queue.txt").write_text("\n".join(lines) + "\n")
    script, calls = folder / "bin" / "squeue", folder / "calls"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\necho >> '{calls}'\nexec cat '{folder}/queue.txt'\n")
    script.chmod(0o755)
    calls.touch()
    return calls


def seconds_of(command: list[str], environment: dict[str, str]) -> float:
    """Wall time of a program; ends this one when it fails."""
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    elapsed = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return elapsed


def main(arguments: list[str]) -> None:
    options = {"runs": "200", "rounds": "5"} | dict(text.split("=", 1) for text in arguments)
    number, rounds = int(options["runs"]), int(options["rounds"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "runs").mkdir()
        firsts = [(index, FIRST_JOB + index * len(STAGES)) for index in range(number)]
        lines = [line for index, first in firsts for line in write_run(folder / "runs" / f"run{index:03d}", first)]
        calls = write_squeue(folder, lines)
        environment = {**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}"}
        status = [sys.executable, "-m", "tdro_hpc.submit", "status", f"runs_dir={folder}/runs"]
        peer = [sys.executable, "-c", PEER.format(files=FILES), f"{folder}/runs"]
        timed, asked = [], []
        for _ in range(rounds):
            before = len(calls.read_text())
            timed.append((seconds_of(status, environment), seconds_of(peer, environment)))
            asked.append(len(calls.read_text()) - before - 1)  # one is the peer's
        ours, theirs = (statistics.median(column) for column in zip(*timed, strict=True))
        print(f"status of {number} runs x {len(STAGES)} stages   {ours:6.2f} s   squeue calls {max(asked)}")
        print(f"the same files and one squeue   {theirs:6.2f} s   (median of {rounds}, in turns)")


if __name__ == "__main__":
    main(sys.argv[1:])
