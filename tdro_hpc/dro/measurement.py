"""Per-row losses in, one number a task out: how much each task asks for. Knows nothing of weights, ranks or models.

Four measurements. `ratio_of_means`, `excess` and `loss` are made of sums and counts over a whole optimiser step, so the
split into ranks and micro-steps cannot change them. `mean_of_ratios` follows the released code and cannot be written
that way: its denominator is normalised by the batch of one micro-step.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Normalised reference losses under this are replaced by 1 in the released code: such rows count as almost nothing.
DEAD_ZONE = 1e-4

# Smallest sum of reference losses that they are divided by: where all are 0, so are the quotients.
SMALLEST_SUM = 1e-12

# Smallest mean reference loss, in nats, that ratio_of_means divides by: a task whose reference loss is 0 to the last
# digit (usual at temperature 0.002) would otherwise own the whole gradient.
REFERENCE_FLOOR = 1e-2


def mean_of_ratios(losses: Tensor, reference_losses: Tensor, task_ids: Tensor, num_tasks: int) -> Tensor:
    """Mean over a task's rows of loss / normalised reference loss, for one micro-step of all ranks.

    losses, reference_losses [rows] float, nats, >= 0      task_ids [rows] int64, 0 <= id < num_tasks
    returns [num_tasks] float32; 0 for a task without rows

    The reference losses are divided by their sum over the micro-step; where the quotient is under DEAD_ZONE, 1 stands
    in its place. Source: the released tDRO code, which differs from the paper's formula (ratio_of_means).
    """
    losses, reference_losses = losses.float(), reference_losses.float()
    normalised = reference_losses / reference_losses.abs().sum().clamp_min(SMALLEST_SUM)
    denominator = torch.where(normalised < DEAD_ZONE, torch.ones_like(normalised), normalised)
    ratios = (losses / denominator).clamp_min(0.0)
    totals = torch.zeros(num_tasks, device=losses.device).index_add_(0, task_ids, ratios)
    counts = torch.zeros(num_tasks, device=losses.device).index_add_(0, task_ids, torch.ones_like(ratios))
    return totals / counts.clamp_min(1.0)


def task_sums(losses: Tensor, reference_losses: Tensor, task_ids: Tensor, num_tasks: int) -> Tensor:
    """Sums that the other measurements are made of; those of several micro-steps and ranks may be added.

    losses, reference_losses [rows] float, nats      task_ids [rows] int64
    returns [4, num_tasks] float64: sum of losses, of reference losses, of max(0, loss - reference loss), and rows.
    float64, so that the order of the additions does not show.
    """
    losses, reference_losses = losses.double(), reference_losses.double()
    columns = torch.stack(
        [losses, reference_losses, (losses - reference_losses).clamp_min(0.0), torch.ones_like(losses)]
    )  # [4, rows]
    return torch.zeros(4, num_tasks, dtype=torch.float64, device=losses.device).index_add_(1, task_ids, columns)


def ratio_of_means(sums: Tensor) -> Tensor:
    """Mean loss of a task over its mean reference loss (arXiv 2408.10613, eq. 6), the latter at least REFERENCE_FLOOR.

    sums [4, tasks] of `task_sums`; returns [tasks] float64, meaningless where a task has no rows
    """
    counts = sums[3].clamp_min(1.0)
    return (sums[0] / counts) / (sums[1] / counts).clamp_min(REFERENCE_FLOOR)


def excess(sums: Tensor) -> Tensor:
    """Mean of max(0, loss - reference loss) a task, in nats, as in DoReMi. sums [4, tasks] of `task_sums`."""
    return sums[2] / sums[3].clamp_min(1.0)


def loss(sums: Tensor) -> Tensor:
    """Mean loss a task, in nats: the measurement of GroupDRO. sums [4, tasks] of `task_sums`."""
    return sums[0] / sums[3].clamp_min(1.0)


MEASUREMENTS_OF_SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "ratio_of_means": ratio_of_means,
    "excess": excess,
    "loss": loss,
}
