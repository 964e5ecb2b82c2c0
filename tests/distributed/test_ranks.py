"""1 = 2 ranks for the whole of s0, s1 and s2: losses, weights of the model, alpha; cached = online reference."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.launching import run_ranks
from tests.distributed.training_run import write_tasks

SCRIPT = "training_run.py"
# Ranks draw dropout for their own rows. And where a gradient is nothing but rounding, a step of Adam is its sign: an
# epsilon that is larger than the rounding keeps such elements where they are.
SAME = ["model.lora.dropout=0", *(f"{stage}.adam_epsilon=1e-6" for stage in ("s0", "s1", "s2"))]
CHAIN = ["s0:run", "s1:run", "s2-curr:run"]
CHUNKED = ["loss.gradient_cache=true", "loss.chunk_tokens=100", "s0:chunked", "s1:chunked"]
RING = ["loss.ring_above_mb=0", "s0:ring"]  # beside CHUNKED: the columns of the chunks go round
TASK = ["loss.ring_above_mb=2048", "s1.negatives=task", "s1:task", "s1.negatives=group"]
RATIOS = ["loss.gradient_cache=false", "s1.measurement=mean_of_ratios", "s1:ratios"]


def rows_of(path: Path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def model_of(stage: Path):
    return load_file(next((stage / "out" / "model").glob("*.safetensors")))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folders = {}
    for world in (1, 2):
        folders[world] = tmp_path_factory.mktemp(f"ranks{world}")
        write_tasks(folders[world] / "data")
        for run in ("ratios", "task"):
            (folders[world] / run).mkdir()
            (folders[world] / run / "s0").symlink_to(folders[world] / "run" / "s0")
        run_ranks(SCRIPT, folders[world], world, [*SAME, *CHAIN, *CHUNKED, *RING, *TASK, *RATIOS])
    return folders


@pytest.mark.parametrize("stage", ["s0", "s1", "s2-curr"])
def test_loss_and_model_are_those_of_one_rank(runs, stage):
    one, two = (runs[world] / "run" / stage for world in (1, 2))
    losses = [[row["loss"] for row in rows_of(folder / "metrics.jsonl")] for folder in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # float32 sums in another order, 7 steps of Adam
    models = [model_of(folder) for folder in (one, two)]
    for name, tensor in models[0].items():
        torch.testing.assert_close(tensor, models[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("run", "stage"), [("chunked", "s0"), ("chunked", "s1"), ("ring", "s0")])
@pytest.mark.parametrize("world", [1, 2])
def test_gradient_caching_trains_the_same_model_with_columns_that_go_round_too(runs, world, run, stage):
    whole, chunked = (runs[world] / name / stage for name in ("run", run))
    rows = [rows_of(folder / "metrics.jsonl") for folder in (whole, chunked)]
    for key in ("loss", "grad_norm"):
        one, other = ([row[key] for row in part] for part in rows)
        assert one == pytest.approx(other, rel=1e-4)  # float32 sums in another order, 7 steps of Adam
    if stage == "s1":
        alphas = [rows_of(folder / "trajectory.jsonl")[-1]["alpha"] for folder in (whole, chunked)]
        assert alphas[0] == pytest.approx(alphas[1], rel=1e-4)


@pytest.mark.parametrize("run", ["ratios", "task"])
@pytest.mark.parametrize("world", [1, 2])
def test_measurements_and_negatives_of_the_task_lead_to_other_weights(runs, world, run):
    trajectories = [rows_of(runs[world] / name / "s1" / "trajectory.jsonl") for name in ("run", run)]
    assert [len(trajectory) for trajectory in trajectories] == [7, 7]
    assert trajectories[0][-1]["alpha"] != pytest.approx(trajectories[1][-1]["alpha"], rel=1e-3)


@pytest.mark.parametrize("run", ["run", "ratios"])
def test_alpha_is_that_of_one_rank(runs, run):
    alphas = [rows_of(runs[world] / run / "s1" / "trajectory.jsonl") for world in (1, 2)]
    assert len(alphas[0]) == 7
    for one, two in zip(*alphas, strict=True):
        assert one["alpha"] == pytest.approx(two["alpha"], rel=1e-4)


def test_alpha_has_moved(runs):
    last = rows_of(runs[1] / "run" / "s1" / "trajectory.jsonl")[-1]["alpha"]
    assert max(last.values()) - min(last.values()) > 0.01


def test_cached_reference_gives_the_same_alpha(runs):
    folder = runs[2]
    (folder / "cached").mkdir()
    (folder / "cached" / "s0").symlink_to(folder / "run" / "s0")
    run_ranks(SCRIPT, folder, 2, [*SAME, "s1.reference_losses=cached", "s1:cached"])
    online, cached = (rows_of(folder / run / "s1" / "trajectory.jsonl") for run in ("run", "cached"))
    for one, other in zip(online, cached, strict=True):
        assert one["alpha"] == pytest.approx(other["alpha"], rel=1e-6)
    assert len(list((folder / "cached" / "reference_losses").glob("*/covered-*.json"))) == 1
