"""Prints what submitting the six-stage chain of the demo costs on a login node, beside the bare programs that it needs.

    eval "$(slurm/testcluster env)"; python benchmarks/submission.py [rounds=5] [cluster=testcluster]

Every round plans (dry_run=true), submits and cancels the chain in a run of its own, and times the peers beside it: six
bare sbatch calls in a shell, and a Python that only imports the YAML reader and submitit. Needs a Slurm.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = 6  # prepare, s0, s1, s2-curr, s2-top70, eval


def seconds_of(command: list[str]) -> float:
    """Wall time of a program; raises when it fails."""
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    elapsed = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return elapsed


def bare_sbatch(count: int) -> float:
    """Seconds of `count` calls of sbatch, each waiting for the one before; the jobs are cancelled."""
    # Held, so that none of them starts.
    line = "sbatch --parsable --hold --output=/dev/null --wrap=true"
    script = f'set -e; for i in $(seq {count}); do ids="$ids $({line})"; done; scancel $ids'
    return seconds_of(["bash", "-c", script])


def round_of(cluster: str, folder: Path) -> dict[str, float]:
    """Seconds of each thing, once."""
    submit = [sys.executable, "-m", "tdro_hpc.submit"]
    keys = ["stage=all", "config=demo", "model=tiny_decoder", f"cluster={cluster}", f"runs_dir={folder}"]
    figures = {
        "plan and scripts (dry_run=true)": seconds_of([*submit, *keys, "dry_run=true"]),
        "submit the chain": seconds_of([*submit, *keys]),
        "status": seconds_of([*submit, "status", "name=demo", f"runs_dir={folder}"]),
        f"{STAGES} bare sbatch calls": bare_sbatch(STAGES),
        "Python importing yaml and submitit": seconds_of([sys.executable, "-c", "import yaml, submitit"]),
    }
    seconds_of([*submit, "cancel", "name=demo", f"runs_dir={folder}"])
    return figures


def main(words: list[str]) -> None:
    """Print the medians."""
    options = dict(word.split("=", 1) for word in words)
    rounds, cluster = int(options.get("rounds", "5")), options.get("cluster", "testcluster")
    seen: dict[str, list[float]] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for name, seconds in round_of(cluster, Path(folder)).items():
                seen.setdefault(name, []).append(seconds)
    for name, values in seen.items():
        print(f"{statistics.median(values):6.2f} s  {name} (from {min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main(sys.argv[1:])
