"""Starts the ranks of a test as processes and waits for them.

They are forked from one process that has imported what they import, which takes each of them seconds otherwise.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest

TEARDOWN = "terminate called without an active exception"
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
# None of them may start threads or ask for a GPU when it is imported.
IMPORTED = ["tests.distributed.training_run", "tests.distributed.evaluation_run", "tests.distributed.loss_rank"]
IMPORTED += ["peft", *(f"transformers.models.{name}.modeling_{name}" for name in ("qwen2", "bert"))]
IMPORTED += ["deepspeed.runtime.zero.muon.muon_optimizer"]  # the slowest of what its engines import


@cache
def _forking() -> multiprocessing.context.ForkServerContext:
    """The server runs, with the environment of ranks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


def _run_script(path: Path, words: list[str], log: Path) -> None:
    """`python path words` in this process."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    sys.argv = [str(path), *words]
    runpy.run_path(str(path), run_name="__main__")


def start_ranks(script: str, folder: Path, world: int, words: list[str]) -> list[BaseProcess]:
    """`world` processes of tests/distributed/<script>, their words in <folder>/rank-<n>.txt."""
    rendezvous = f"file://{tempfile.mktemp(dir=folder)}"
    ranks = []
    for rank in range(world):
        line = [str(folder), str(rank), str(world), rendezvous, *words]
        arguments = Path(__file__).with_name(script), line, folder / f"rank-{rank}.txt"
        ranks.append(_forking().Process(target=_run_script, args=arguments))
        ranks[-1].start()
    return ranks


def end_ranks(ranks: list[BaseProcess]) -> None:
    """kill -9 for each that still runs, and for what it has started: a loader process may not notice its end."""
    for rank in ranks:
        started = []
        with suppress(psutil.NoSuchProcess):
            started = psutil.Process(rank.pid).children(recursive=True)
        rank.kill()
        rank.join()
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def wait_for_ranks(ranks: list[BaseProcess], folder: Path, *, seconds: float = 300) -> None:
    """All ranks ended well, or an AssertionError with the last words of each."""
    deadline = time.monotonic() + seconds
    try:
        for rank in ranks:
            rank.join(max(0.1, deadline - time.monotonic()))
    finally:
        end_ranks(ranks)
    words = [(folder / f"rank-{number}.txt").read_text()[-3000:] for number in range(len(ranks))]
    assert [rank.exitcode for rank in ranks] == [0] * len(ranks), "\n---\n".join(words)


def run_ranks(script: str, folder: Path, world: int, words: list[str]) -> None:
    """Start the ranks and wait until all have ended well."""
    try:
        wait_for_ranks(start_ranks(script, folder, world, words), folder)
    except AssertionError as error:
        # gloo's threads abort a process now and then while it ends, after all its work: seen once in some 70 launches.
        if TEARDOWN not in str(error) or "Traceback" in str(error):
            raise
        wait_for_ranks(start_ranks(script, folder, world, words), folder)
