"""The one training loop: restore, then step, look, save, and leave together when asked to.

Stages differ by the step they hand in. What has state is in one dictionary that a checkpoint saves.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from tdro_hpc.config.schema import TrainingConfig
from tdro_hpc.data.batches import Batch
from tdro_hpc.launch.job.hold import TakenOver, taken_over
from tdro_hpc.parallel.process import Process, any_rank, wait_for_all, world_rank
from tdro_hpc.training.checkpoint import Part, load_checkpoint, newest_step, save_checkpoint
from tdro_hpc.training.finite import FiniteWatch
from tdro_hpc.training.lead import LeadWatch
from tdro_hpc.training.metrics import Metrics, StepValues
from tdro_hpc.training.stop import StopFlag, Stopped


class Step(Protocol):
    """One optimiser step on the micro-batches of this rank."""

    def __call__(self, number: int, batches: list[Batch]) -> StepValues: ...

    @property
    def learning_rate(self) -> float: ...


@dataclass
class Loop:
    """Everything the loop needs of a stage."""

    stage: str
    stage_dir: Path
    training: TrainingConfig
    seed: int
    process: Process
    parts: dict[str, Part]  # all that has state
    metrics: Metrics
    watch: FiniteWatch
    stop: StopFlag
    describe_row: Callable[[str, int], str]  # (task, row) -> file and line, for messages
    stop_lead_seconds: float = 0.0  # between the warning of a time limit and the limit; 0 = no limit is known

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints of this stage."""
        return self.stage_dir / "checkpoints"


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators for one step: a resumed step draws the dropout that the unbroken one drew.

    The random state is thereby a function of (seed, step, rank), and a checkpoint keeps it by keeping the step.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)  # torch takes 63 bits


def run_loop(loop: Loop, step: Step, read: Callable[[int], Iterator[list[Batch]]]) -> None:
    """Train until `training.steps`; returns when they are done.

    read    first step -> micro-batches of each step from there on, in order
    raises  Stopped when a stop was asked for, after saving; NotFiniteError when a loss or gradient is not finite;
            TakenOver when another attempt has begun with the stage
    """
    training = loop.training
    first = load_checkpoint(loop.checkpoints, loop.parts, step=newest_step(loop.checkpoints))
    loop.metrics.resume(first)
    if first:
        loop.metrics.say(f"{loop.stage} continues after step {first}")
    if first == training.steps:
        return
    lead = LeadWatch(loop.stop_lead_seconds, loop.metrics.say if loop.process.first else None)
    check_every = training.log_every_steps if loop.process.device.type == "cuda" else 1
    for number, batches in enumerate(read(first), start=first):
        seed_step(loop.seed, number, loop.process.data_rank)
        loop.metrics.add(step(number, batches))
        done = number + 1
        last = done == training.steps
        stopping = loop.stop.agreed()
        logging = last or done % training.log_every_steps == 0
        saving = last or stopping or done % training.save_every_steps == 0
        if logging or saving or done % check_every == 0:
            loop.watch.check(loop.describe_row)
            lead.end_step(done)
        if logging or saving:
            _check_hold()
        if logging:
            loop.metrics.write(done, learning_rate=step.learning_rate)
        if saving:
            began = time.monotonic()
            # Returns when it is whole: a rank that left before could end the others in the middle of the write.
            save_checkpoint(loop.checkpoints, done, loop.parts, keep=training.keep_checkpoints)
            lead.end_save(time.monotonic() - began)
        if stopping and not last:
            raise Stopped(loop.stage, done, training.steps, loop.stop.reason or "another rank was asked to stop")
    lead.summarise(loop.stage)
    wait_for_all()


def _check_hold() -> None:
    """Return when no other attempt has taken the stage over; all ranks leave together when one has."""
    taken = taken_over() if world_rank() == 0 else ""
    if any_rank(bool(taken)):
        raise TakenOver(taken or "Another attempt took the stage over; this copy writes nothing more.")
