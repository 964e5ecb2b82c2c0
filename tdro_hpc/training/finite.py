"""Watches losses and gradient norms for NaN and infinity; names the task, the rows and the step where they began."""

from collections.abc import Callable

import torch
from torch import Tensor

from tdro_hpc.data.batches import Batch
from tdro_hpc.parallel.process import any_rank


class NotFiniteError(ValueError):
    """The loss or the gradient became NaN or infinite; the last good checkpoint is kept."""


class FiniteWatch:
    """Notes the first step whose losses are not finite without waiting for the device; `check` raises."""

    def __init__(self, task_names: list[str], device: torch.device) -> None:
        self.task_names = task_names
        self._broken = torch.zeros((), dtype=torch.bool, device=device)
        self._steps: list[tuple[int, Tensor, list[Batch], Tensor]] = []  # since the last check

    def add(self, step: int, losses: Tensor, batches: list[Batch], grad_norm: Tensor) -> None:
        """Keep one step: losses [rows of all its micro-steps], grad_norm []."""
        self._broken = self._broken | ~losses.isfinite().all() | ~grad_norm.isfinite()
        self._steps.append((step, losses, batches, grad_norm))

    def check(self, describe: Callable[[str, int], str]) -> None:
        """Raise NotFiniteError if a step since the last check was not finite on any rank. All ranks call it.

        describe  (task name, row) -> words for the row, file and line
        """
        steps, self._steps = self._steps, []
        if not any_rank(bool(self._broken)):
            return
        for step, losses, batches, grad_norm in steps:
            bad = (~losses.isfinite()).nonzero().flatten().tolist()
            if bad:
                raise NotFiniteError(self._words(step, losses, batches, bad, describe))
            if not bool(grad_norm.isfinite()):
                raise NotFiniteError(
                    f"The gradient norm is {float(grad_norm)} at step {step} although every loss is finite. "
                    "The last good checkpoint is kept. Lower the learning rate, or set model.autocast=float32."
                )
        raise NotFiniteError("Another rank met a loss that is not finite; its own log names the task and the rows.")

    def _words(
        self, step: int, losses: Tensor, batches: list[Batch], bad: list[int], describe: Callable[[str, int], str]
    ) -> str:
        task_ids = torch.cat([batch.task_ids for batch in batches]).tolist()
        rows = torch.cat([batch.rows for batch in batches]).tolist()
        shown = [
            f"  task {self.task_names[task_ids[index]]}: loss {float(losses[index])} at "
            f"{describe(self.task_names[task_ids[index]], rows[index])}"
            for index in bad[:5]
        ]
        more = [f"  and {len(bad) - 5} more rows"] if len(bad) > 5 else []
        return "\n".join(
            [
                f"The loss is not finite at step {step} for {len(bad)} of {len(task_ids)} rows:",
                *shown,
                *more,
                "The last good checkpoint is kept. Look at these rows, or lower the learning rate, "
                "or set model.autocast=float32.",
            ]
        )
