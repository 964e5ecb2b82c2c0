"""One rank of a run whose engine is spread: python checkpoint_rank.py <folder> <rank> <world> <rendezvous> <what> ...

what  <run>[:<step>:kill|full]. A run of six steps that saves every second one. With a step, the last rank is killed in
the save after it, when its own file is written, or finds its disk full there. What ends a run is noted in words.
"""

import errno
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from tdro_hpc.config.schema import ParallelConfig, TrainingConfig
from tdro_hpc.parallel.process import Process, end_process, start_process
from tdro_hpc.parallel.slices import Slice
from tdro_hpc.training import checkpoint
from tdro_hpc.training.loop import Loop, run_loop
from tdro_hpc.training.stop import StopFlag

TALL, WIDE = (7, 3), (2, 9)
LAST = 6


class SpreadEngine:
    """Two matrices, uneven parts of which each rank has: one along rows, one along columns; and what all have."""

    def __init__(self, rank: int, world: int) -> None:
        self.first = rank == 0
        self.rows, self.columns = (
            slice(size * rank // world, size * (rank + 1) // world) for size in (TALL[0], WIDE[1])
        )
        self.tall = torch.zeros(TALL)[self.rows]
        self.wide = torch.zeros(WIDE)[:, self.columns]
        self.norm = torch.zeros(4)

    def step(self, number: int) -> None:
        """An update whose bits depend on the place in the whole, not on the layout."""
        self.tall = 0.9 * self.tall + torch.arange(21.0).reshape(TALL)[self.rows] / (number + 1)
        self.wide = 0.9 * self.wide + torch.arange(18.0).reshape(WIDE)[:, self.columns] / (number + 1)
        self.norm = 0.9 * self.norm + number

    def state_dict(self) -> dict:
        tensors = {
            "tall": Slice(self.tall, TALL, 0, self.rows.start),
            "wide": Slice(self.wide, WIDE, 1, self.columns.start),
        }
        return {"tensors": tensors | ({"norm": self.norm} if self.first else {}), "values": {}}

    def load_state_dict(self, state: dict) -> None:
        stored = state["tensors"]
        self.tall = stored.part("tall", 0, self.rows.start, self.rows.stop)
        self.wide = stored.part("wide", 1, self.columns.start, self.columns.stop)
        self.norm = stored["norm"]


class Count:
    """A part that is the same on all ranks."""

    def __init__(self) -> None:
        self.steps = 0

    def state_dict(self) -> dict:
        return {"tensors": {}, "values": {"steps": self.steps}}

    def load_state_dict(self, state: dict) -> None:
        self.steps = state["values"]["steps"]


def run(stage_dir: Path, process: Process, world: int) -> list[str]:
    """Train to the end; what the log says."""
    said: list[str] = []
    engine, count = SpreadEngine(process.data_rank, world), Count()
    nothing = SimpleNamespace(
        say=said.append, resume=lambda step: None, add=lambda values: None, write=lambda step, **rate: None
    )
    loop = Loop(
        stage="s0",
        stage_dir=stage_dir,
        training=TrainingConfig(steps=LAST, warmup_steps=1, save_every_steps=2, log_every_steps=1, keep_checkpoints=3),
        seed=1,
        process=process,
        parts={"engine": engine, "count": count},
        metrics=nothing,  # type: ignore[arg-type]
        watch=SimpleNamespace(check=lambda describe: None),  # type: ignore[arg-type]
        stop=StopFlag(),
        describe_row=lambda task, row: "",
    )

    def step(number, batches):
        assert number == count.steps, "the count goes with the loop"
        engine.step(number)
        count.steps += 1

    step.learning_rate = 0.0  # type: ignore[attr-defined]
    run_loop(loop, step, lambda first: iter([[]] * (LAST - first)))  # type: ignore[arg-type]
    return said


def spoil_save(step: int, how: str) -> None:
    """kill -9 for this process when it has written its file of the save after `step`, or no room for the file."""
    original = checkpoint._write_own

    def write_and_fail(temporary, parts):
        report = original(temporary, parts)
        if temporary.name.startswith(f".step-{step:08d}"):
            checkpoint._write_own = original
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return report

    checkpoint._write_own = write_and_fail


def main() -> None:
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    config = ParallelConfig(backend="gloo", threads_per_rank=1, timeout_seconds=60)
    process = start_process(config, rank=rank, world=world, local_rank=rank, rendezvous=sys.argv[4])
    for word in sys.argv[5:]:
        name, *step = word.split(":")
        if step and rank == world - 1:
            spoil_save(int(step[0]), step[1])
        try:
            run(folder / name, process, world)
        except (ValueError, OSError, RuntimeError) as end:
            (folder / f"{name}-{rank}.txt").write_text(str(end))
    end_process()


if __name__ == "__main__":
    main()
