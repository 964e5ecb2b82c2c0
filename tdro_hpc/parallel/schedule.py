"""Learning rate of each optimiser step: a pure function, so a resumed run needs nothing but the number of the step."""

import math

from tdro_hpc.config.schema import TrainingConfig


def learning_rate_at(step: int, training: TrainingConfig) -> float:
    """Linear from 0 over the warm-up, then a cosine that ends at min_learning_rate_ratio of the peak.

    step  optimiser steps already done, 0 .. training.steps
    The first step of a warm-up has rate 0, as in the trainer of the released runs.
    """
    if step < training.warmup_steps:
        return training.learning_rate * step / training.warmup_steps
    progress = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    floor = training.min_learning_rate_ratio
    return training.learning_rate * (floor + (1 - floor) * cosine)
