"""Stages on a model that is spread over ranks: as one process makes them, stopped and killed, moved between layouts."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed.launching import end_ranks, run_ranks, start_ranks
from tests.distributed.test_resume import SCRIPT, assert_same_bits, rows_of, steps_of_checkpoints, wait_until
from tests.distributed.training_run import write_tasks

pytest.importorskip("deepspeed")
# Without dropout, whose draws are those of a rank. An epsilon beside which the rounding of a gradient is small.
SAME = ["model.lora.dropout=0", "s0.adam_epsilon=1e-3", "s1.adam_epsilon=1e-3", "loss.gradient_cache=true"]
SAME += ["loss.chunk_tokens=100"]
SPREAD = ["parallel.engine=deepspeed", "parallel.pp=2", "parallel.tp=2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """`alone` by one process; `spread` on four ranks of one replica, twice, and once stopped in two layouts."""
    folder = tmp_path_factory.mktemp("layouts")
    write_tasks(folder / "data")
    run_ranks(SCRIPT, folder, 1, [*SAME, "s0:alone", "s1:alone"])
    words = ["s0:spread", "s1:spread", "s0:signal:2:SIGTERM", "s1:signal:4:SIGINT", "s0:moved:1:SIGTERM:leave"]
    run_ranks(SCRIPT, folder, 4, [*SPREAD, *SAME, *words])
    run_ranks(
        SCRIPT,
        folder,
        4,
        ["parallel.engine=deepspeed", "parallel.zero=1", *SAME, "s0:moved:3:SIGTERM:leave"],
    )
    run_ranks(SCRIPT, folder, 1, [*SAME, "s0:moved"])
    return folder


def assert_close(found: Path, wanted: Path):
    """Losses, alpha and the trained weights are those of the other folder but for rounding."""
    for row, expected in zip(rows_of(found / "metrics.jsonl"), rows_of(wanted / "metrics.jsonl"), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    models = [load_file(folder / "out" / "model" / "adapter_model.safetensors") for folder in (found, wanted)]
    assert models[0].keys() == models[1].keys()
    for name, tensor in models[1].items():
        assert float((models[0][name] - tensor).norm()) <= 1e-3 * float(tensor.norm()), name


@pytest.mark.parametrize("stage", ["s0", "s1"])
def test_spread_over_pipeline_and_tensor_ranks_a_stage_makes_what_one_process_makes(runs: Path, stage: str):
    assert_close(runs / "spread" / stage, runs / "alone" / stage)
    if stage == "s1":
        paths = [runs / run / "s1" / "trajectory.jsonl" for run in ("spread", "alone")]
        for row, expected in zip(*(rows_of(path) for path in paths), strict=True):
            assert row["alpha"] == pytest.approx(expected["alpha"], rel=1e-4)


@pytest.mark.parametrize("stage", ["s0", "s1"])
def test_stopped_and_continued_in_the_same_layout_it_ends_in_the_same_bits(runs: Path, stage: str):
    assert_same_bits(runs / "spread" / stage, runs / "signal" / stage)
    names = sorted(path.name for path in (runs / "spread" / stage / "checkpoints").glob("*7/*.safetensors"))
    assert names == [f"state-{rank:05d}.safetensors" for rank in range(4)]
    for name in names:
        pair = [runs / run / stage / "checkpoints" / "step-00000007" / name for run in ("spread", "signal")]
        assert pair[0].read_bytes() == pair[1].read_bytes()


def test_begun_on_a_pipeline_continued_by_zero_and_ended_by_one_process_it_goes_on_as_if_it_had_not_moved(runs: Path):
    assert_close(runs / "moved" / "s0", runs / "alone" / "s0")


def test_killed_rank_of_four_costs_the_steps_since_the_last_checkpoint_only(runs: Path):
    shutil.copytree(runs / "spread" / "s0", runs / "killed" / "s0")
    ranks = start_ranks(SCRIPT, runs, 4, [*SPREAD, *SAME, "s1:killed"])
    try:
        wait_until(lambda: steps_of_checkpoints(runs / "killed" / "s1"), "the first checkpoint")
        os.kill(ranks[2].pid, signal.SIGKILL)
        ranks[2].join()
    finally:
        end_ranks(ranks)
    assert not (runs / "killed" / "s1" / "out" / "model").exists()
    run_ranks(SCRIPT, runs, 4, [*SPREAD, *SAME, "s1:killed"])
    assert_same_bits(runs / "spread" / "s1", runs / "killed" / "s1")
