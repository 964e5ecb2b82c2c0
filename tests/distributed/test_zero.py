"""The ZeRO engine on two ranks = one process: gradients, steps, checkpoints of any layout, resume to the bit."""

import json
from pathlib import Path

import pytest

from tests.distributed.launching import run_ranks

EQUAL = ("zero0", "zero1", "zero2", "zero3", "whole", "lora3", "offload2", "offload3")
OTHERS = ("bfloat16", "resume", "layouts", "draws", "frozen", "broken", "compiled")
FLOAT32 = 1e-5  # sums in another order
BFLOAT16 = 0.05  # 8 bits of a product, over 2 layers and 3 steps


def measured(folder: Path, world: int, checks: list[str]) -> dict[str, dict[str, float]]:
    """The greatest figure of all ranks, of every check."""
    run_ranks("zero_rank.py", folder, world, checks)
    ranks = [json.loads((folder / f"figures-{rank}.json").read_text()) for rank in range(world)]
    return {check: {key: max(rank[check][key] for rank in ranks) for key in ranks[0][check]} for check in checks}


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> dict[str, dict[str, float]]:
    return measured(tmp_path_factory.mktemp("steps"), 2, list(EQUAL))


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> dict[str, dict[str, float]]:
    return measured(tmp_path_factory.mktemp("zero"), 2, list(OTHERS))


def assert_steps_of_one_process(found: dict[str, float]) -> None:
    assert found["names"] == found["steps"] == 0
    for key in ("embeddings", "loss", "gradients", "norm", "parameters", "moments"):
        assert found[key] <= FLOAT32, f"{key}: {found[key]:.1e}"


@pytest.mark.parametrize("case", EQUAL)
def test_steps_are_those_of_one_process(steps, case):
    assert_steps_of_one_process(steps[case])


def test_one_rank_alone_takes_the_same_steps(tmp_path):
    figures = measured(tmp_path, 1, ["zero2", "lora3"])
    assert_steps_of_one_process(figures["zero2"])
    assert_steps_of_one_process(figures["lora3"])


@pytest.mark.parametrize("layout", ["1", "1-offload", "2", "3"])
def test_bfloat16_weights_have_float32_masters_and_stay_near_float32(figures, layout):
    found = {key.removesuffix(f" {layout}"): value for key, value in figures["bfloat16"].items()}
    for key in ("embeddings", "gradients", "norm", "parameters"):
        assert 0 < found[key] <= BFLOAT16, f"{key}: {found[key]:.1e}"
    assert found["wide weights"] == found["rounded masters"] == 0
    assert found["loaded"] == 0, "another stage took over other bits"
    assert found["continued"] <= 1e-3  # the order in which bfloat16 gradients are summed


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_resumed_training_is_bit_equal_to_the_unbroken_one(figures, zero):
    assert [figures["resume"][f"{key} {zero}"] for key in ("loaded", "norms", "state", "steps")] == [0, 0, 0, 0]


@pytest.mark.parametrize("change", ["zero2 torch", "zero2 1", "zero2 3", "torch 3", "torch 0"])
def test_checkpoint_of_one_layout_continues_in_another(figures, change):
    assert figures["layouts"][f"loaded {change}"] == 0
    assert figures["layouts"][f"continued {change}"] <= FLOAT32


def test_second_pass_draws_the_dropout_of_the_first_with_uneven_chunks(figures):
    assert figures["draws"] == {"passes": 0, "other": 0, "same without replay": 0}


def test_frozen_model_is_split_over_the_ranks_and_embeds_as_the_whole_one(figures):
    for kind in ("float32 False", "float32 True", "bfloat16 True"):
        found = {key.removesuffix(f" {kind}"): value for key, value in figures["frozen"].items()}
        assert found["distance"] == found["trained"] == 0 and found["held"] == pytest.approx(0.5, abs=0.01)


def test_gradient_that_is_not_finite_on_one_rank_shows_in_the_norm_of_all(figures):
    assert len(figures["broken"]) == 4 and not any(figures["broken"].values())


def test_no_operator_of_deepspeed_is_compiled(figures):
    assert figures["compiled"] == {"files": 0}
