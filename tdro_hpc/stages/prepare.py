"""Data set built on the spot: the documentation on this machine becomes training tasks and held-out test sets."""

import shutil
from pathlib import Path

from tdro_hpc.atomic import new_folder
from tdro_hpc.config.schema import Config
from tdro_hpc.embedded.build import TASKS, build_embedded
from tdro_hpc.parallel.process import Process
from tdro_hpc.stages.graph import Stage
from tdro_hpc.training.stop import Stopped, stop_flag


def run(config: Config, stage: Stage, run_dir: Path, process: Process) -> None:
    """Make out/data: train/<task>.jsonl, test/<set> in BEIR layout and facts.json, all of it or nothing.

    raises  ValueError  where data.builder names no builder, or this machine carries too little documentation
            Stopped     between two tasks when a stop was asked for; the next call builds all of it
    """
    if config.data.builder != "embedded":
        raise ValueError(
            f"Stage {stage.name} has nothing to build: data.builder is {config.data.builder!r}. "
            "Type data=embedded for the data set made from this machine's documentation."
        )
    assert process.data_size == 1, "stage prepare runs in one process"
    flag = stop_flag()

    def leave_if_asked(done: int) -> None:
        if flag.requested:
            raise Stopped(stage.name, done, len(TASKS), flag.reason)

    out = run_dir / stage.name / "out"
    for leftover in out.glob(".data.*"):
        shutil.rmtree(leftover)  # of a build that was killed
    with new_folder(out / "data") as folder:
        build_embedded(folder, config.embedded, seed=config.seed, before_task=leave_if_asked)
