"""Learning rates against the scheduler of transformers."""

import pytest
import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from tdro_hpc.config.schema import TrainingConfig
from tdro_hpc.parallel.schedule import learning_rate_at


@pytest.mark.parametrize("warmup", [0, 1, 7, 40])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_rates_are_those_of_transformers(warmup, ratio):
    training = TrainingConfig(steps=40, warmup_steps=warmup, learning_rate=3e-4, min_learning_rate_ratio=ratio)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=3e-4)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, 40, min_lr_rate=ratio)
    for step in range(41):
        assert learning_rate_at(step, training) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_rate_never_rises_again_after_the_last_step():
    training = TrainingConfig(steps=10, warmup_steps=2, learning_rate=1.0)
    assert learning_rate_at(25, training) == pytest.approx(0.1)
