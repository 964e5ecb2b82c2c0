"""Losses of the proxy and the reference in, weights over tasks out: the ascent half of tDRO (arXiv 2408.10613, sec. 3).

Every rank holds the same weights: what was measured is summed over ranks, and rank 0's result is broadcast.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tdro_hpc.dro.measurement import MEASUREMENTS_OF_SUMS, mean_of_ratios, task_sums
from tdro_hpc.parallel.gather import gather_ids, gather_values
from tdro_hpc.parallel.process import broadcast_from_first, sum_over_ranks


def build_weight_optimizer(name: str, log_weights: Tensor, *, eta: float) -> torch.optim.Optimizer:
    """Torch optimiser that ascends log alpha with step `eta`; sgd is the paper's, the others are torch's defaults."""
    makers = {
        "sgd": torch.optim.SGD,
        "adamw": torch.optim.AdamW,
        "adagrad": torch.optim.Adagrad,
        "rmsprop": torch.optim.RMSprop,
    }
    if name not in makers:
        raise ValueError(f"The weight optimiser is {name!r}; it must be one of {', '.join(makers)}.")
    more = {"weight_decay": 0.0} if name == "adamw" else {}
    return makers[name]([log_weights], lr=eta, maximize=True, **more)


class TaskWeights:
    """Weights alpha over tasks, moved toward the tasks where the proxy trails the reference.

    task_names   names, in the order of the ids that `accumulate` gets
    eta          step of log alpha an update; the gradient is scaled to unit L2 length first
    measurement  ratio_of_means (the paper), mean_of_ratios (the released code), excess, loss
    initial      name -> weight at the start, normalised here; None = uniform
    ema          share of the newest weights in `.ema`
    After `update`: `.current`, `.mean` (of all updates, start excluded) and `.ema` are dicts name -> float.
    """

    def __init__(
        self,
        task_names: Sequence[str],
        *,
        eta: float = 0.02,
        measurement: str = "ratio_of_means",
        initial: dict[str, float] | None = None,
        ema: float = 0.1,
        optimizer: str = "sgd",
        device: torch.device | str = "cpu",
    ) -> None:
        self.task_names = list(task_names)
        if measurement not in (*MEASUREMENTS_OF_SUMS, "mean_of_ratios"):
            choices = ", ".join((*MEASUREMENTS_OF_SUMS, "mean_of_ratios"))
            raise ValueError(f"The measurement is {measurement!r}; it must be one of {choices}.")
        if not (math.isfinite(eta) and eta > 0):
            raise ValueError(f"eta is {eta}; it must be > 0 (usual: 0.02).")
        self.measurement = measurement
        self.ema_share = ema
        start = torch.tensor(_initial_weights(self.task_names, initial), dtype=torch.float32, device=device)
        self.log_weights = start.log().requires_grad_()
        self.optimizer = build_weight_optimizer(optimizer, self.log_weights, eta=eta)
        self.alpha = start.clone()  # [tasks] float32, sums to 1
        self.mean_alpha = torch.zeros_like(start)
        self.ema_alpha = start.clone()
        self.measured = torch.zeros(len(start), dtype=torch.float64, device=device)  # last value of every task
        self.seen = torch.zeros(len(start), dtype=torch.bool, device=device)  # has been measured at least once
        self.updates = 0
        self._reset()

    def _reset(self) -> None:
        num_tasks = len(self.task_names)
        self._sums = torch.zeros(4, num_tasks, dtype=torch.float64, device=self.alpha.device)
        self._ratios = torch.zeros(num_tasks, device=self.alpha.device)
        self._micro_steps = 0

    def accumulate(self, losses: Tensor, reference_losses: Tensor, task_ids: Tensor) -> None:
        """Add the rows of one micro-step. Under several ranks each gives its own rows and all ranks call it together.

        losses, reference_losses [rows] float, nats      task_ids [rows] int64
        raises ValueError if the shapes differ, or if ids on the CPU are not those of tasks
        """
        if not losses.shape == reference_losses.shape == task_ids.shape:
            raise ValueError(
                f"losses {list(losses.shape)}, reference_losses {list(reference_losses.shape)} and task_ids "
                f"{list(task_ids.shape)} must be three vectors of one length."
            )
        num_tasks, device = len(self.task_names), self.alpha.device
        # On a GPU the look would wait for it; there, the indexing itself stops at an id that is no task's.
        if task_ids.device.type == "cpu" and bool(((task_ids < 0) | (task_ids >= num_tasks)).any()):
            raise ValueError(
                f"task_ids go from {int(task_ids.min())} to {int(task_ids.max())}; "
                f"{num_tasks} tasks have the ids 0 to {num_tasks - 1}."
            )
        losses, reference_losses = losses.detach().to(device), reference_losses.detach().to(device)
        task_ids = task_ids.to(device)
        self._sums += task_sums(losses, reference_losses, task_ids, num_tasks)
        if self.measurement == "mean_of_ratios":
            world = gather_values(losses), gather_values(reference_losses), gather_ids(task_ids)
            self._ratios += mean_of_ratios(*world, num_tasks)
        self._micro_steps += 1

    def update(self) -> None:
        """Move the weights by one step of gradient ascent on log alpha; needs at least one `accumulate` before it.

        A task without rows keeps its last measured value (mean_of_ratios: counts as 0, as in the released code); one
        that was never measured takes the mean of the others, so that it moves neither way.
        """
        if self._micro_steps == 0:
            raise ValueError("update() without accumulate(): give it the losses of at least one micro-step first.")
        self.step_sums = sum_over_ranks(self._sums)
        # Rank 0's: sums on GPUs may differ in the last bit, and the optimiser's moments must agree on all ranks.
        self.gradient = broadcast_from_first(self._measure(self.step_sums))
        length = torch.linalg.vector_norm(self.gradient)
        # Only a length of 0 is no step: what is not finite goes on into the weights, where the training loop sees it.
        unit = torch.where(length == 0, torch.zeros_like(self.gradient), self.gradient / length)
        self.log_weights.grad = unit.to(self.log_weights.dtype)
        self.optimizer.step()
        with torch.no_grad():
            # Normalised at each update: log alpha then stays bounded however long the run is.
            self.log_weights.copy_(broadcast_from_first(torch.log_softmax(self.log_weights, dim=0)))
            self.alpha = self.log_weights.exp()
            self.mean_alpha = (self.updates * self.mean_alpha + self.alpha) / (self.updates + 1)
            self.ema_alpha = (1 - self.ema_share) * self.ema_alpha + self.ema_share * self.alpha
        self.updates += 1
        self._reset()

    def _measure(self, sums: Tensor) -> Tensor:
        if self.measurement == "mean_of_ratios":
            self.measured = (self._ratios / self._micro_steps).double()
            self.seen = self.seen | (sums[3] > 0)
            return self.measured
        present = sums[3] > 0
        fresh = MEASUREMENTS_OF_SUMS[self.measurement](sums)
        self.measured = torch.where(present, fresh, self.measured)
        self.seen = self.seen | present
        mean_of_seen = (self.measured * self.seen).sum() / self.seen.sum()
        return torch.where(self.seen, self.measured, mean_of_seen)

    @property
    def current(self) -> dict[str, float]:
        """Weights after the last update, by name."""
        return self._by_name(self.alpha)

    @property
    def mean(self) -> dict[str, float]:
        """Mean of the weights over all updates, by name; the weights at the start are not in it."""
        return self._by_name(self.mean_alpha if self.updates else self.alpha)

    @property
    def ema(self) -> dict[str, float]:
        """Exponential moving average of the weights, begun at the initial ones, by name."""
        return self._by_name(self.ema_alpha)

    def _by_name(self, values: Tensor) -> dict[str, float]:
        return dict(zip(self.task_names, values.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as tensors and plain values; taken between two updates."""
        assert self._micro_steps == 0, "weights are saved between optimiser steps only"
        optimizer = self.optimizer.state_dict()["state"].get(0, {})
        tensors = {
            "log_weights": self.log_weights.detach(),
            "alpha": self.alpha,
            "mean_alpha": self.mean_alpha,
            "ema_alpha": self.ema_alpha,
            "measured": self.measured,
            "seen": self.seen,
        }
        tensors |= {f"optimizer.{key}": value for key, value in optimizer.items() if isinstance(value, Tensor)}
        return {"tensors": tensors, "values": {"task_names": self.task_names, "updates": self.updates}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; raises ValueError if the tasks are others than those of this run."""
        names = state["values"]["task_names"]
        if names != self.task_names:
            raise ValueError(f"The checkpoint has the weights of tasks {names}; this run has {self.task_names}.")
        tensors = {key: value.to(self.alpha.device) for key, value in state["tensors"].items()}
        with torch.no_grad():
            self.log_weights.copy_(tensors["log_weights"])
        for key in ("alpha", "mean_alpha", "ema_alpha", "measured", "seen"):
            setattr(self, key, tensors[key].clone())
        self.updates = state["values"]["updates"]
        moments = {key.removeprefix("optimizer."): value for key, value in tensors.items() if "." in key}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": {0: moments} if moments else {}, "param_groups": groups})


def _initial_weights(task_names: list[str], initial: dict[str, float] | None) -> list[float]:
    if not task_names or len(set(task_names)) != len(task_names):
        raise ValueError(f"task_names is {task_names}; it must hold at least one name, each once.")
    if initial is None:
        return [1.0 / len(task_names)] * len(task_names)
    wrong = sorted(set(task_names) ^ set(initial))
    if wrong:
        raise ValueError(f"initial must give a weight for every task and no other; look at {', '.join(wrong)}.")
    if min(initial.values()) <= 0:
        raise ValueError("initial has a weight <= 0; a task at 0 can never return. Leave the task out instead.")
    total = sum(initial.values())
    return [initial[name] / total for name in task_names]
