import math
import random

import pytest
import torch

from tdro_hpc.dro import TaskWeights
from tests.reference.dro import ascend, mean_of_ratios_of_step, ratio_of_means_of_step

# Weights of the released 0.5B run (25 tasks, 1000 steps, eta 0.02), last and mean, as published to four digits.
RELEASED_CURR = [
    0.1314, 0.0940, 0.0885, 0.0875, 0.0847, 0.0838, 0.0713, 0.0623, 0.0600, 0.0563, 0.0472, 0.0425, 0.0252,
    0.0154, 0.0131, 0.0110, 0.0072, 0.0066, 0.0063, 0.0019, 0.0011, 0.0009, 0.0007, 0.0006, 0.0005,
]  # fmt: skip
RELEASED_MEAN = [
    0.0854, 0.0694, 0.0713, 0.0638, 0.0648, 0.0579, 0.0600, 0.0539, 0.0586, 0.0505, 0.0496, 0.0434, 0.0422,
    0.0336, 0.0280, 0.0289, 0.0223, 0.0221, 0.0213, 0.0161, 0.0126, 0.0119, 0.0112, 0.0105, 0.0107,
]  # fmt: skip


def random_steps(num_steps, num_micro_steps, rows, num_tasks, seed):
    draw = random.Random(seed)
    return [
        [
            [
                (draw.expovariate(1), draw.choice([0.0, draw.expovariate(1)]), draw.randrange(num_tasks))
                for _ in range(rows)
            ]
            for _ in range(num_micro_steps)
        ]
        for _ in range(num_steps)
    ]


def feed(weights, micro_step):
    losses, references, tasks = zip(*micro_step, strict=True)
    weights.accumulate(torch.tensor(losses), torch.tensor(references), torch.tensor(tasks))


def test_mean_of_ratios_follows_the_slow_rule():
    names = list("abcde")
    weights = TaskWeights(names, eta=0.05, measurement="mean_of_ratios")
    logs, current = [math.log(1 / 5)] * 5, []
    for step in random_steps(30, 3, 12, 5, seed=1):
        for micro_step in step:
            feed(weights, micro_step)
        weights.update()
        logs, current = ascend(logs, mean_of_ratios_of_step(step, 5), eta=0.05)
    assert list(weights.current.values()) == pytest.approx(current, rel=1e-5)  # float32 against float64, 30 steps


def test_missing_task_counts_zero_under_mean_of_ratios():
    weights = TaskWeights(["a", "b"], eta=0.5, measurement="mean_of_ratios")
    feed(weights, [(1.0, 1.0, 0), (1.0, 1.0, 0)])
    weights.update()
    assert weights.current["b"] < 0.5


def test_ratio_of_means_follows_the_slow_rule_and_keeps_the_value_of_a_missing_task():
    weights = TaskWeights(["a", "b", "c"], eta=0.1, measurement="ratio_of_means")
    logs, last = [math.log(1 / 3)] * 3, [None] * 3
    for step in random_steps(40, 2, 3, 3, seed=2):  # 6 rows over 3 tasks: some steps miss a task
        for micro_step in step:
            feed(weights, micro_step)
        weights.update()
        last = [new if new is not None else old for new, old in zip(ratio_of_means_of_step(step, 3), last, strict=True)]
        known = [value for value in last if value is not None]
        logs, current = ascend(logs, [sum(known) / len(known) if v is None else v for v in last], eta=0.1)
    assert list(weights.current.values()) == pytest.approx(current, rel=1e-5)


@pytest.mark.parametrize("measurement", ["ratio_of_means", "excess", "loss"])
def test_accumulation_does_not_show_in_the_weights(measurement):
    whole, split = (TaskWeights(["a", "b", "c"], measurement=measurement) for _ in range(2))
    for step in random_steps(20, 1, 24, 3, seed=3):
        feed(whole, step[0])
        for start in range(0, 24, 5):
            feed(split, step[0][start : start + 5])
        whole.update()
        split.update()
    assert torch.equal(whole.alpha, split.alpha)


def test_released_weights_come_back_from_a_constant_gradient_of_unit_length():
    gradient = torch.tensor([(math.log(weight) + 7.783) / 20 for weight in RELEASED_CURR])
    assert torch.linalg.vector_norm(gradient).item() == pytest.approx(1.0, abs=0.01)
    names = [f"task{position}" for position in range(25)]
    weights = TaskWeights(names, eta=0.02, measurement="loss")
    ids = torch.arange(25)
    for _ in range(1000):
        weights.accumulate(gradient, torch.ones(25), ids)
        weights.update()
    current, mean = torch.tensor(list(weights.current.values())), torch.tensor(list(weights.mean.values()))
    # The published figures have four digits, so the smallest weights are known to a tenth only.
    assert torch.allclose(current, torch.tensor(RELEASED_CURR), rtol=0.02, atol=1e-4)
    assert torch.allclose(mean, torch.tensor(RELEASED_MEAN), atol=0.009)


def test_ema_of_a_constant_gradient_is_near_the_last_weights():
    gradient = torch.tensor([(math.log(weight) + 7.783) / 20 for weight in RELEASED_CURR])
    weights = TaskWeights([f"task{position}" for position in range(25)], eta=0.02, measurement="loss")
    for _ in range(1000):
        weights.accumulate(gradient, torch.ones(25), torch.arange(25))
        weights.update()
    # It lags about 9 updates behind: by the share-weighted mean of the relative differences.
    assert 1e-3 < (weights.ema_alpha - weights.alpha).abs().sum().item() < 0.007


def test_ema_and_mean_follow_their_definitions():
    weights = TaskWeights(["a", "b"], eta=0.3, measurement="loss", ema=0.25, initial={"a": 3.0, "b": 1.0})
    ema, seen = [0.75, 0.25], []
    for _ in range(5):
        feed(weights, [(2.0, 1.0, 0), (1.0, 1.0, 1)])
        weights.update()
        current = list(weights.current.values())
        seen.append(current)
        ema = [0.75 * old + 0.25 * new for old, new in zip(ema, current, strict=True)]
    assert list(weights.ema.values()) == pytest.approx(ema, rel=1e-5)
    assert list(weights.mean.values()) == pytest.approx(
        [sum(column) / 5 for column in zip(*seen, strict=True)], rel=1e-5
    )


def test_update_raises_weight_of_task_that_trails():
    weights = TaskWeights(["easy", "hard"])
    feed(weights, [(1.0, 1.0, 0), (3.0, 1.0, 1)])
    weights.update()
    assert weights.current["hard"] > 0.5 > weights.current["easy"]
    assert sum(weights.current.values()) == pytest.approx(1.0)


def test_step_on_log_weights_is_never_longer_than_eta():
    weights = TaskWeights(["a", "b", "c"], eta=0.02)
    before = weights.log_weights.detach().clone()
    feed(weights, [(100.0, 0.001, 0), (1.0, 5.0, 1), (2.0, 2.0, 2)])
    weights.update()
    ratio = weights.log_weights.detach() - before
    assert (ratio.max() - ratio.min()).item() <= 0.02 + 1e-6


def test_task_solved_by_the_reference_does_not_own_the_gradient():
    weights = TaskWeights(["solved", "open"], eta=1.0)
    feed(weights, [(0.001, 0.0, 0), (2.0, 1.0, 1)])
    weights.update()
    assert weights.current["open"] > weights.current["solved"]


@pytest.mark.parametrize(
    ("measurement", "place"),  # place 0: the loss, 1: the reference loss, which `loss` does not read
    [*((name, place) for name in ("ratio_of_means", "mean_of_ratios", "excess") for place in (0, 1)), ("loss", 0)],
)
def test_what_is_not_finite_shows_in_the_weights(measurement, place):
    weights = TaskWeights(["a", "b"], measurement=measurement)
    rows = [[1.0, 1.0, 0], [2.0, 1.0, 1]]
    rows[0][place] = float("nan")
    feed(weights, rows)
    weights.update()
    assert not weights.alpha.isfinite().any()


def test_equal_zeros_move_nothing():
    weights = TaskWeights(["a", "b"], measurement="loss")
    feed(weights, [(0.0, 1.0, 0), (0.0, 1.0, 1)])
    weights.update()
    assert weights.current == {"a": pytest.approx(0.5), "b": pytest.approx(0.5)}


@pytest.mark.parametrize("optimizer", ["adamw", "adagrad", "rmsprop"])
def test_moments_follow_the_first_rank_when_sums_round_apart(optimizer, monkeypatch):
    first, second = (TaskWeights(["a", "b", "c"], measurement="loss", optimizer=optimizer) for _ in range(2))
    sent = []
    for step in random_steps(5, 1, 9, 3, seed=6):
        monkeypatch.setattr("tdro_hpc.dro.weights.broadcast_from_first", lambda t: sent.append(t.clone()) or t)
        feed(first, step[0])
        first.update()
        monkeypatch.setattr("tdro_hpc.dro.weights.broadcast_from_first", lambda t: sent.pop(0))
        feed(second, [(loss * 1.001 + 0.001, reference, task) for loss, reference, task in step[0]])
        second.update()
    states = [weights.state_dict()["tensors"] for weights in (first, second)]
    compared = [key for key in states[0] if "optimizer." in key or "alpha" in key]
    assert len(compared) > 3
    for key in compared:
        assert torch.equal(states[0][key], states[1][key]), key


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adagrad", "rmsprop"])
def test_resumed_weights_are_bit_equal(optimizer):
    steps = random_steps(12, 2, 8, 3, seed=4)
    names = ["a", "b", "c"]
    unbroken, first, second = (TaskWeights(names, eta=0.1, optimizer=optimizer) for _ in range(3))
    for number, step in enumerate(steps):
        broken = first if number < 5 else second
        if number == 5:
            second.load_state_dict(first.state_dict())
        for micro_step in step:
            feed(unbroken, micro_step)
            feed(broken, micro_step)
        unbroken.update()
        broken.update()
    assert torch.equal(unbroken.alpha, second.alpha)
    assert torch.equal(unbroken.mean_alpha, second.mean_alpha)
    assert torch.equal(unbroken.ema_alpha, second.ema_alpha)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="must be one of ratio_of_means"):
        TaskWeights(["a"], measurement="ratio")
    with pytest.raises(ValueError, match="each once"):
        TaskWeights(["a", "a"])
    with pytest.raises(ValueError, match="look at b"):
        TaskWeights(["a", "b"], initial={"a": 1.0})
    with pytest.raises(ValueError, match="one length"):
        TaskWeights(["a"]).accumulate(torch.ones(2), torch.ones(2), torch.zeros(3, dtype=torch.int64))
    for wrong in (-1, 1):
        with pytest.raises(ValueError, match=f"task_ids go from {wrong} to {wrong}; 1 tasks have"):
            TaskWeights(["a"]).accumulate(torch.ones(1), torch.ones(1), torch.tensor([wrong]))
    with pytest.raises(ValueError, match="update\\(\\) without accumulate"):
        TaskWeights(["a"]).update()
    other = TaskWeights(["a", "b"])
    with pytest.raises(ValueError, match="this run has"):
        other.load_state_dict(TaskWeights(["a", "c"]).state_dict())
