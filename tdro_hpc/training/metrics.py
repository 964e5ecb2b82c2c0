"""Tensors of each step in, rows of metrics.jsonl, trajectory.jsonl and a step line out: one host copy an interval.

This is the only file that moves numbers to the host for looking at. Rows are the same for an interrupted and an
unbroken run except under "clock".
"""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdro_hpc.atomic import write_text
from tdro_hpc.parallel.process import sum_over_ranks
from tdro_hpc.training.checkpoint import State


@dataclass
class StepValues:
    """What one optimiser step reports. Tensors stay on the device."""

    task_sums: Tensor  # [4, tasks] float64 of this rank: loss, reference loss, excess, rows (dro.measurement.task_sums)
    grad_norm: Tensor  # [] before clipping, the same on all ranks
    alpha: Tensor | None = None  # [tasks] weights after the step, s1 only
    gradient: Tensor | None = None  # [tasks] what the measurement gave for every task, s1 only


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file written here; [] when it is missing. A half-written last line is left out."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


def keep_rows_until(path: Path, step: int) -> None:
    """Drop rows after `step`: a run that continues from a checkpoint writes them again."""
    if not path.is_file():
        return
    kept = [json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= step]
    write_text(path, "".join(kept))


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows at the end, one write: a reader sees whole lines."""
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


class Metrics:
    """Gathers the values of an interval and writes them at its end. Its open interval is part of a checkpoint."""

    def __init__(
        self,
        stage_dir: Path,
        *,
        stage: str,
        steps: int,
        task_names: list[str],
        queries_per_step: int,
        first_rank: bool,
        tensorboard: bool,
        say: Callable[[str], None] = print,
    ) -> None:
        self.stage, self.steps, self.task_names = stage, steps, task_names
        self.queries_per_step = queries_per_step
        self.path = stage_dir / "metrics.jsonl"
        self.trajectory_path = stage_dir / "trajectory.jsonl"
        self.first_rank = first_rank
        self.say = say
        self._writer = _tensorboard_writer(stage_dir / "tensorboard") if tensorboard and first_rank else None
        self._sums = torch.zeros(4, len(task_names), dtype=torch.float64)
        self._grad_norms: list[Tensor] = []
        self._alphas: list[Tensor] = []
        self._gradients: list[Tensor] = []
        self._interval_began = time.monotonic()
        self._steps_since_start = 0

    def resume(self, step: int) -> None:
        """Forget rows after `step`, which will be written again, and begin the clock."""
        if self.first_rank:
            keep_rows_until(self.path, step)
            # The steps of the open interval are in the state and are written at its end.
            keep_rows_until(self.trajectory_path, step - len(self._grad_norms))
        self._interval_began = time.monotonic()

    def add(self, values: StepValues) -> None:
        """Keep the values of one step on the device. All ranks call it."""
        # Summed over ranks at every step, not at the end of the interval: a checkpoint in the middle of it is made by
        # one rank, and sums in another order would differ in the last bit.
        self._sums = self._sums.to(values.task_sums.device) + sum_over_ranks(values.task_sums)
        self._move_to(values.grad_norm.device)
        self._grad_norms.append(values.grad_norm.detach().double())
        if values.alpha is not None and values.gradient is not None:
            self._alphas.append(values.alpha.detach().double())
            self._gradients.append(values.gradient.detach().double())
        self._steps_since_start += 1

    def _move_to(self, device: torch.device) -> None:
        """Bring what a checkpoint loaded on the host to the device of the new values: one stack takes one device."""
        if self._grad_norms and self._grad_norms[0].device != device:
            for kept in (self._grad_norms, self._alphas, self._gradients):
                kept[:] = [value.to(device) for value in kept]

    def write(self, step: int, *, learning_rate: float) -> None:
        """End the interval at `step`: a row of metrics, a row of trajectory a step, a line. All ranks call it."""
        sums = self._sums
        num_steps, num_tasks = len(self._grad_norms), len(self.task_names)
        pieces = [sums.flatten(), torch.stack(self._grad_norms), *self._alphas, *self._gradients]
        flat = torch.cat([piece.to(sums.device) for piece in pieces]).cpu()
        host_sums = flat[: 4 * num_tasks].view(4, num_tasks)
        grad_norms = flat[4 * num_tasks : 4 * num_tasks + num_steps]
        curves = flat[4 * num_tasks + num_steps :].view(-1, num_tasks)  # alphas, then gradients, a row a step
        row = self._row(step, host_sums, grad_norms, learning_rate)
        if self._alphas:
            row["alpha"] = self._by_name(curves[num_steps - 1])
        if self.first_rank:
            append_rows(self.path, [row])
            if self._alphas:
                append_rows(self.trajectory_path, self._trajectory(step, curves, num_steps))
            self.say(self.line_of(row))
            if self._writer is not None:
                _write_scalars(self._writer, row)
        self._sums = torch.zeros_like(self._sums)
        self._grad_norms, self._alphas, self._gradients = [], [], []
        self._interval_began, self._steps_since_start = time.monotonic(), 0

    def _row(self, step: int, sums: Tensor, grad_norms: Tensor, learning_rate: float) -> dict[str, Any]:
        counts = sums[3]
        seen = {name: position for position, name in enumerate(self.task_names) if counts[position] > 0}
        means = (sums[:3] / counts.clamp_min(1)).tolist()
        rows = counts.tolist()
        seconds = max(time.monotonic() - self._interval_began, 1e-9)
        per_second = self._steps_since_start / seconds
        row: dict[str, Any] = {
            "stage": self.stage,
            "step": step,
            "steps": self.steps,
            "loss": float(sums[0].sum() / counts.sum()),
            "grad_norm": float(grad_norms.mean()),
            "learning_rate": learning_rate,
            "task_loss": {name: means[0][position] for name, position in seen.items()},
            "task_rows": {name: int(rows[position]) for name, position in seen.items()},
        }
        if float(sums[1].abs().sum()) > 0:
            row["task_reference_loss"] = {name: means[1][position] for name, position in seen.items()}
        row["clock"] = {
            "time": time.time(),
            "queries_per_second": self.queries_per_step * per_second,
            "eta_seconds": (self.steps - step) / per_second if per_second else None,
        }
        return row

    def _trajectory(self, step: int, curves: Tensor, num_steps: int) -> list[dict[str, Any]]:
        first = step - num_steps + 1
        return [
            {
                "step": first + position,
                "alpha": self._by_name(curves[position]),
                "measurement": self._by_name(curves[num_steps + position]),
            }
            for position in range(num_steps)
        ]

    def _by_name(self, values: Tensor) -> dict[str, float]:
        return dict(zip(self.task_names, values.tolist(), strict=True))

    def line_of(self, row: dict[str, Any]) -> str:
        """The step line: s1 step 1200/4000 30% | loss 1.8342 | ..."""
        clock = row["clock"]
        parts = [
            f"{self.stage} step {row['step']}/{self.steps} {100 * row['step'] // self.steps}%",
            f"loss {row['loss']:.4f}",
            f"grad {row['grad_norm']:.2f}",
            f"lr {row['learning_rate']:.1e}",
            f"{clock['queries_per_second']:.0f} q/s",
            f"eta {duration_of(clock['eta_seconds'] or 0)}",
        ]
        if "alpha" in row:
            ranked = sorted(row["alpha"].items(), key=lambda pair: pair[1])
            (least, low), (most, high) = ranked[0], ranked[-1]
            parts.append(f"alpha max {most} {high:.3f} min {least} {low:.3f}")
        return " | ".join(parts)

    def state_dict(self) -> State:
        """The open interval: sums and the values of its steps."""
        tensors = {"sums": self._sums, "grad_norms": torch.stack(self._grad_norms or [torch.zeros(())])}
        if self._alphas:
            tensors |= {"alphas": torch.stack(self._alphas), "gradients": torch.stack(self._gradients)}
        return {"tensors": tensors, "values": {"open_steps": len(self._grad_norms)}}

    def load_state_dict(self, state: State) -> None:
        """Continue the interval of `state_dict`."""
        tensors = state["tensors"]
        self._sums = tensors["sums"]
        self._grad_norms = list(tensors["grad_norms"])[: state["values"]["open_steps"]]
        self._alphas = list(tensors.get("alphas", []))
        self._gradients = list(tensors.get("gradients", []))


def duration_of(seconds: float) -> str:
    """Short words for a time: 45s, 12m, 3h05m."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _tensorboard_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "logging.tensorboard=true needs the package tensorboard, which is not installed. "
            "Type: pip install tensorboard, or set logging.tensorboard=false."
        ) from error
    return SummaryWriter(str(folder))


def _write_scalars(writer: Any, row: dict[str, Any]) -> None:
    for key in ("loss", "grad_norm", "learning_rate"):
        writer.add_scalar(key, row[key], row["step"])
    for key in ("task_loss", "task_reference_loss", "alpha"):
        for name, value in row.get(key, {}).items():
            writer.add_scalar(f"{key}/{name}", value, row["step"])
    writer.flush()
