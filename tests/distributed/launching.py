"""Starts the ranks of a test as processes and waits for them."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TEARDOWN = "terminate called without an active exception"
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def start_ranks(script: str, folder: Path, world: int, words: list[str]) -> list[subprocess.Popen]:
    """`world` processes of tests/distributed/<script>, their words in <folder>/rank-<n>.txt."""
    rendezvous = f"file://{tempfile.mktemp(dir=folder)}"
    ranks = []
    for rank in range(world):
        with open(folder / f"rank-{rank}.txt", "w") as log:
            command = [sys.executable, str(Path(__file__).parent / script)]
            command += [str(folder), str(rank), str(world), rendezvous, *words]
            ranks.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=ENVIRONMENT, cwd=ROOT))
    return ranks


def wait_for_ranks(ranks: list[subprocess.Popen], folder: Path, *, seconds: float = 300) -> None:
    """All ranks ended well, or an AssertionError with the last words of each."""
    deadline = time.monotonic() + seconds
    try:
        for rank in ranks:
            rank.wait(timeout=max(0.1, deadline - time.monotonic()))
    finally:
        for rank in ranks:
            rank.kill()
    words = [(folder / f"rank-{number}.txt").read_text()[-3000:] for number in range(len(ranks))]
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), "\n---\n".join(words)


def run_ranks(script: str, folder: Path, world: int, words: list[str]) -> None:
    """Start the ranks and wait until all have ended well."""
    try:
        wait_for_ranks(start_ranks(script, folder, world, words), folder)
    except AssertionError as error:
        # gloo's threads abort a process now and then while it ends, after all its work: seen once in some 70 launches.
        if TEARDOWN not in str(error) or "Traceback" in str(error):
            raise
        wait_for_ranks(start_ranks(script, folder, world, words), folder)
