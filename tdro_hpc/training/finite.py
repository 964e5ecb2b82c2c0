"""Watches losses and gradient norms for NaN and infinity; names the task, the rows and the step where they began."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tdro_hpc.data.batches import Batch
from tdro_hpc.parallel.process import any_rank, sum_over_ranks


class NotFiniteError(ValueError):
    """The loss or the gradient became NaN or infinite; the last good checkpoint is kept."""


@dataclass
class _Step:
    """What one optimiser step of this rank gave."""

    number: int  # from 1 on, as in metrics and checkpoints
    losses: dict[str, Tensor]  # kind -> [rows of all its micro-steps], in the order they are computed
    batches: list[Batch]
    grad_norm: Tensor  # [], the same on all ranks

    def bad_rows(self, kind: str) -> list[int]:
        return (~self.losses[kind].isfinite()).nonzero().flatten().tolist()


class FiniteWatch:
    """Notes the first step whose losses are not finite without waiting for the device; `check` raises."""

    def __init__(self, task_names: list[str], device: torch.device) -> None:
        self.task_names = task_names
        self._broken = torch.zeros((), dtype=torch.bool, device=device)
        self._steps: list[_Step] = []  # since the last check

    def add(
        self,
        step: int,
        losses: Tensor,
        batches: list[Batch],
        grad_norm: Tensor,
        *,
        reference_losses: Tensor | None = None,
    ) -> None:
        """Keep one step, counted from 1: losses of both kinds [rows of all its micro-steps], grad_norm []."""
        kinds = {"loss": losses} if reference_losses is None else {"reference loss": reference_losses, "loss": losses}
        for values in (*kinds.values(), grad_norm):
            self._broken = self._broken | ~values.isfinite().all()
        self._steps.append(_Step(step, kinds, batches, grad_norm))

    def check(self, describe: Callable[[str, int], str]) -> None:
        """Raise NotFiniteError if a step since the last check was not finite on any rank. All ranks call it.

        describe  (task name, row) -> words for the row, file and line
        The cause is the first such step of all ranks: a rank whose own rows were fine then says that another rank
        met it, whatever its later steps gave.
        """
        steps, self._steps = self._steps, []
        if not any_rank(bool(self._broken)):
            return
        own = torch.tensor([any(step.bad_rows(kind) for kind in step.losses) for step in steps], dtype=torch.float32)
        bad_ranks = sum_over_ranks(own).tolist()  # ranks with a bad loss, of each step: all ranks hold the same steps
        for step, mine, ranks in zip(steps, own.tolist(), bad_ranks, strict=True):
            if mine:
                raise NotFiniteError(self._words(step, describe))
            if ranks:
                raise NotFiniteError(
                    f"Another rank met a loss that is not finite at step {step.number}; "
                    "its own message names the task and the rows."
                )
            if not bool(step.grad_norm.isfinite()):
                raise NotFiniteError(
                    f"The gradient norm is {float(step.grad_norm)} at step {step.number} although every loss is "
                    "finite. The last good checkpoint is kept. Lower the learning rate, or set "
                    "model.autocast=float32."
                )
        raise AssertionError("a rank noted a value that is not finite, but none holds it")

    def _words(self, step: _Step, describe: Callable[[str, int], str]) -> str:
        kind = next(kind for kind in step.losses if step.bad_rows(kind))
        losses, bad = step.losses[kind], step.bad_rows(kind)
        task_ids = torch.cat([batch.task_ids for batch in step.batches]).tolist()
        rows = torch.cat([batch.rows for batch in step.batches]).tolist()
        shown = [
            f"  task {self.task_names[task_ids[index]]}: {kind} {float(losses[index])} at "
            f"{describe(self.task_names[task_ids[index]], rows[index])}"
            for index in bad[:5]
        ]
        more = [f"  and {len(bad) - 5} more rows"] if len(bad) > 5 else []
        return "\n".join(
            [
                f"The {kind} is not finite at step {step.number} for {len(bad)} of {len(task_ids)} rows:",
                *shown,
                *more,
                "The last good checkpoint is kept. Look at these rows, or lower the learning rate, "
                "or set model.autocast=float32.",
            ]
        )
