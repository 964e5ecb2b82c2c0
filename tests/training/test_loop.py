"""The loop around any step: what it asks before it writes."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tdro_hpc.config.schema import TrainingConfig
from tdro_hpc.launch.job import hold
from tdro_hpc.parallel.process import Process
from tdro_hpc.training.checkpoint import checkpoint_steps
from tdro_hpc.training.loop import Loop, run_loop
from tdro_hpc.training.stop import StopFlag


class Part:
    def state_dict(self):
        return {"tensors": {"x": torch.zeros(1)}, "values": {}}

    def load_state_dict(self, state):
        pass


class Metrics(Part):
    def __init__(self) -> None:
        self.written: list[int] = []
        self.said: list[str] = []
        self.say = self.said.append

    def resume(self, step):
        pass

    def add(self, values):
        pass

    def write(self, step, *, learning_rate):
        self.written.append(step)


def run(folder: Path, *, at=None, act=None, lead: float = 0.0) -> Metrics:
    """Ten steps of nothing; `act` is called in step `at`."""
    metrics = Metrics()
    loop = Loop(
        stage="s0",
        stage_dir=folder,
        training=TrainingConfig(steps=10, warmup_steps=1, save_every_steps=2, log_every_steps=1),
        seed=1,
        process=Process(0, 1, 0, torch.device("cpu")),
        parts={"part": Part()},
        metrics=metrics,  # type: ignore[arg-type]
        watch=SimpleNamespace(check=lambda describe: None),  # type: ignore[arg-type]
        stop=StopFlag(),
        describe_row=lambda task, row: "",
        stop_lead_seconds=lead,
    )

    def step(number, batches):
        if number + 1 == at:
            act()

    step.learning_rate = 0.0  # type: ignore[attr-defined]
    run_loop(loop, step, lambda first: iter([[]] * (10 - first)))  # type: ignore[arg-type]
    return metrics


def test_copy_that_was_taken_over_writes_no_checkpoint_and_no_metrics(tmp_path):
    hold.take_hold(tmp_path, "812", 0)
    seen: list[list[int]] = []

    def another_attempt_begins():
        owner = {"job": "812", "restart": 1, "host": "node2", "time": 0.0}
        (tmp_path / "log" / "holder.json").write_text(json.dumps(owner))
        seen.append(checkpoint_steps(tmp_path / "checkpoints"))

    try:
        with pytest.raises(hold.TakenOver, match="restart 1"):
            run(tmp_path, at=6, act=another_attempt_begins)
    finally:
        hold.let_go()
    assert seen == [[2, 4]] and checkpoint_steps(tmp_path / "checkpoints") == [2, 4]


def test_without_a_hold_all_steps_are_made(tmp_path):
    metrics = run(tmp_path)
    assert metrics.written == list(range(1, 11)) and metrics.said == []


def test_figures_for_the_lead_time_are_said_where_there_is_a_limit(tmp_path):
    metrics = run(tmp_path, lead=100.0)
    assert "longest step" in metrics.said[-1] and "cluster.stop_lead_seconds=100" in metrics.said[-1]
