"""Stopped and continued = never stopped, in bits: weights, alpha, metrics; by signal and by kill -9; 1 and 2 ranks."""

import json
import shutil
import time
from pathlib import Path

import pytest

from tests.distributed.launching import end_ranks, run_ranks, start_ranks
from tests.distributed.training_run import write_tasks

SCRIPT = "training_run.py"


def wait_until(condition, what, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.01)


def rows_of(path: Path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row.pop("clock", None)
    return rows


def assert_same_bits(one: Path, other: Path):
    model = next((one / "out" / "model").glob("*.safetensors")).name
    assert (one / "out" / "model" / model).read_bytes() == (other / "out" / "model" / model).read_bytes()
    last = "checkpoints/step-00000007/state-00000.safetensors"
    assert (one / last).read_bytes() == (other / last).read_bytes()
    assert rows_of(one / "metrics.jsonl") == rows_of(other / "metrics.jsonl")
    if (one / "trajectory.jsonl").exists():
        assert rows_of(one / "trajectory.jsonl") == rows_of(other / "trajectory.jsonl")
        assert [row["step"] for row in rows_of(one / "trajectory.jsonl")] == list(range(1, 8))
        for path in (one / "out" / "weights").iterdir():
            assert path.read_bytes() == (other / "out" / "weights" / path.name).read_bytes()


def steps_of_checkpoints(stage: Path):
    return sorted(int(path.name[5:]) for path in stage.glob("checkpoints/step-*"))


RING_OF_CHUNKS = ["loss.gradient_cache=true", "loss.chunk_tokens=100", "loss.ring_above_mb=0"]


@pytest.mark.parametrize(
    ("world", "signals", "settings"), [(1, ("SIGTERM", "SIGINT"), []), (2, ("SIGINT", "SIGUSR2"), RING_OF_CHUNKS)]
)
def test_interrupted_equals_unbroken(world: int, signals: tuple[str, str], settings: list[str], tmp_path: Path):
    write_tasks(tmp_path / "data")
    # One launch: the unbroken s0 and s1, then both again with a signal to the last rank in the middle of a step.
    run_ranks(
        SCRIPT,
        tmp_path,
        world,
        [*settings, "s0:unbroken", "s1:unbroken", f"s0:signal:2:{signals[0]}", f"s1:signal:4:{signals[1]}"],
    )
    for stage in ("s0", "s1"):
        assert_same_bits(tmp_path / "unbroken" / stage, tmp_path / "signal" / stage)
    # kill -9 of every rank while s1 runs, some time after its first checkpoint; then the same line.
    shutil.copytree(tmp_path / "unbroken" / "s0", tmp_path / "killed" / "s0")
    ranks = start_ranks(SCRIPT, tmp_path, world, [*settings, "s1:killed"])
    try:
        wait_until(lambda: steps_of_checkpoints(tmp_path / "killed" / "s1"), "the first checkpoint")
    finally:
        end_ranks(ranks)
    assert not (tmp_path / "killed" / "s1" / "out" / "model").exists()
    run_ranks(SCRIPT, tmp_path, world, [*settings, "s1:killed"])
    assert_same_bits(tmp_path / "unbroken" / "s1", tmp_path / "killed" / "s1")
