"""Task sizes and weights in, (task, row) of every position of every global micro-batch out. Reads no rows.

A draw is a pure function of (seed, step, micro-step, position). Rows of a task come in epochs: an epoch is a
permutation of the task keyed by (seed, task, epoch), so every row comes once an epoch, in another order each time.
Which epoch a draw is in follows from how often its task was drawn before; these counts are the whole state.
"""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tdro_hpc.data.draws import draw_uniforms, draw_words, permute

# Steps whose draws are counted together when the counts of a later step are wanted: bounds the memory of that.
_COUNTED_POSITIONS = 1 << 20
# Targets this close below a whole number are that number: sums of float64 shares are not exact.
_WHOLE = 1e-9


class Mixture:
    """Which task and row stands at each position of each global micro-batch."""

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        *,
        rows_per_micro_step: int,
        micro_steps: int,
        batching: str,
        stratified: bool,
        seed: int,
    ) -> None:
        """
        sizes    rows of every task        weights  share of every task, >= 0; normalised here
        rows_per_micro_step                rows of one micro-batch of all ranks together
        micro_steps                        micro-batches of one optimiser step
        batching    homogeneous = one task a global micro-batch; mixed = one task a row
        stratified  mixed only: every task of weight > 0 is in every optimiser step. Counts of a step then differ by
                    less than 1 from rows x share, and their expectation is exactly that, as long as rows x share >= 1.
                    Rarer tasks get one row a step, and the others are scaled down to make room: a bias, of less than
                    1 row a step and rare task.
        raises   ValueError for weights, sizes or settings that no batch can be drawn from
        """
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.weights = _checked_weights(np.asarray(weights, dtype=np.float64), self.sizes)
        self.rows_per_micro_step, self.micro_steps = rows_per_micro_step, micro_steps
        self.seed = seed
        self._active = np.flatnonzero(self.weights)
        self._upper = np.cumsum(self.weights[self._active])
        self._upper[-1] = 1.0
        self._homogeneous = batching == "homogeneous"
        self._quotas: np.ndarray | None = None
        if stratified:
            self._quotas = _quotas(self.weights[self._active], rows_per_micro_step * micro_steps, batching)
        start = (0, np.zeros(len(self.sizes), dtype=np.int64))
        self._loaded, self._latest = start, start

    def draw(self, step: int, micro_step: int) -> tuple[np.ndarray, np.ndarray]:
        """Task index and row index of each position of one global micro-batch: int64 [rows], int64 [rows]."""
        assert step >= 0 and 0 <= micro_step < self.micro_steps, f"no micro-step {micro_step} of step {step}"
        tasks_of_step = self._tasks(np.asarray([step]))[0]  # [micro_steps, rows]
        tasks = tasks_of_step[micro_step]
        earlier = np.bincount(tasks_of_step[:micro_step].ravel(), minlength=len(self.sizes))
        draws = (self._draws_before(step) + earlier)[tasks] + _occurrences(tasks)
        sizes = self.sizes[tasks]
        keys = draw_words(self.seed, "order of rows", tasks, draws // sizes)
        return tasks, permute(draws % sizes, sizes, keys)

    def state(self, step: int) -> dict:
        """What a checkpoint taken before `step` keeps: each task's draws so far. JSON types."""
        return {"step": step, "draws": self._draws_before(step).tolist(), "sizes": self.sizes.tolist()}

    def load_state(self, state: dict) -> None:
        """Continue from a state() without counting the steps before it.

        raises ValueError when the tasks have other sizes than then: their epochs could not be continued.
        """
        if list(state["sizes"]) != self.sizes.tolist():
            raise ValueError(
                f"The checkpoint was made with tasks of {list(state['sizes'])} rows; now they have "
                f"{self.sizes.tolist()}. Bring the same task files back, or start the stage again with force=<stage>."
            )
        self._loaded = self._latest = (int(state["step"]), np.asarray(state["draws"], dtype=np.int64))

    def _tasks(self, steps: np.ndarray) -> np.ndarray:
        """Task of every position: int64 [steps, micro_steps, rows]."""
        shape = (len(steps), self.micro_steps, self.rows_per_micro_step)
        if self._homogeneous:
            picks = draw_uniforms(self.seed, "task of batch", steps[:, None], np.arange(self.micro_steps))
            return np.broadcast_to(self._picked(picks)[:, :, None], shape)
        positions = np.arange(self.micro_steps * self.rows_per_micro_step)
        if self._quotas is None:
            picks = draw_uniforms(self.seed, "task of row", steps[:, None], positions)
            return self._picked(picks).reshape(shape)
        order = np.argsort(draw_words(self.seed, "order of step", steps[:, None], positions), axis=1)
        tasks = np.stack([np.repeat(self._active, counts) for counts in self._stratified_counts(steps)])
        return np.take_along_axis(tasks, order, axis=1).reshape(shape)

    def _picked(self, uniforms: np.ndarray) -> np.ndarray:
        return self._active[np.searchsorted(self._upper, uniforms, side="right")]

    def _stratified_counts(self, steps: np.ndarray) -> np.ndarray:
        """Rows of every active task in each step: int64 [steps, active tasks].

        The whole part of a quota is certain. What is left of all quotas is laid end to end and sampled at unit
        distances from one random offset a step (systematic sampling), so a task gets 0 or 1 more, with the right odds.
        """
        assert self._quotas is not None, "counts are fixed under stratified only"
        certain = np.floor(self._quotas + _WHOLE)
        ends = np.cumsum(np.maximum(self._quotas - certain, 0.0))
        left = self.rows_per_micro_step * self.micro_steps - certain.sum()
        ends = ends * (left / ends[-1]) if left else np.zeros_like(ends)
        ends[-1] = left  # exactly, so that each step has exactly its rows
        offsets = draw_uniforms(self.seed, "offset of step", steps)
        passed = np.floor(ends[None, :] + offsets[:, None])
        return (certain + np.diff(passed, axis=1, prepend=0.0)).astype(np.int64)

    def _draws_before(self, step: int) -> np.ndarray:
        """How often each task was drawn in all steps before `step`: int64 [tasks]. Counts on from the nearest known."""
        start = (0, np.zeros(len(self.sizes), dtype=np.int64))
        known, counts = max((point for point in (start, self._loaded, self._latest) if point[0] <= step), key=_step_of)
        counts = counts.copy()
        chunk = max(1, _COUNTED_POSITIONS // (self.rows_per_micro_step * self.micro_steps))
        for first in range(known, step, chunk):
            counts += self._counts_of(np.arange(first, min(first + chunk, step)))
        self._latest = (step, counts)
        return counts

    def _counts_of(self, steps: np.ndarray) -> np.ndarray:
        if self._quotas is None:
            return np.bincount(self._tasks(steps).ravel(), minlength=len(self.sizes))
        counts = np.zeros(len(self.sizes), dtype=np.int64)
        counts[self._active] = self._stratified_counts(steps).sum(axis=0)
        return counts


def weights_of(spec: str, task_names: Sequence[str], sizes: Sequence[int]) -> np.ndarray:
    """Share of every task, float64 [tasks] that sums to 1, from a config value.

    spec    uniform; size; temperature:<exponent> (share ~ rows ** exponent: 0 = uniform, 1 = size); or a weights JSON
            in the structure of the released ones, whose absent tasks get 0
    raises  ValueError  for an unknown word, a JSON without weights, or a task in it that is not in the data
    """
    kind, _, argument = spec.partition(":")
    if kind in ("uniform", "size") and not argument:
        exponent = 0.0 if kind == "uniform" else 1.0
    elif kind == "temperature":
        exponent = _exponent(spec, argument)
    else:
        return _weights_of_file(spec, task_names)
    shares = np.asarray(sizes, dtype=np.float64) ** exponent
    return shares / shares.sum()


def _exponent(spec: str, argument: str) -> float:
    try:
        return float(argument)
    except ValueError:
        raise ValueError(f"weights is {spec!r}; after the colon comes a number, as in temperature:0.5.") from None


def _weights_of_file(spec: str, task_names: Sequence[str]) -> np.ndarray:
    path = Path(spec).expanduser()
    if not path.is_file():
        raise ValueError(
            f"weights is {spec!r}, which is neither a file nor one of uniform, size, temperature:<exponent>. "
            "Type one of these words (temperature:0.5, say) or the path of a weights JSON."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        shares = {str(name): float(share) for name, share in content["domain_weights"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no weights JSON ({type(error).__name__}: {error}). It must hold the map domain_weights, "
            'as in {"domain_weights": {"nq": 0.7, "squad": 0.3}}.'
        ) from None
    unknown = [name for name in shares if name not in task_names]
    if unknown:
        near = difflib.get_close_matches(unknown[0], task_names, n=1) or list(task_names)[:1]
        raise ValueError(
            f"{path} weighs {', '.join(unknown)}, which {'is' if len(unknown) == 1 else 'are'} not among the tasks of "
            f"the data (nearest to {unknown[0]}: {near[0]}). Take the name out of the file or add the task to the data."
        )
    weights = np.asarray([shares.get(name, 0.0) for name in task_names])
    if not np.all(np.isfinite(weights)) or np.any(weights < 0) or weights.sum() <= 0:
        raise ValueError(f"The weights in {path} must be >= 0 with a sum > 0; they are {shares}.")
    return weights / weights.sum()


def _checked_weights(weights: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    assert weights.shape == sizes.shape, f"{len(weights)} weights for {len(sizes)} tasks"
    if not np.all(np.isfinite(weights)) or np.any(weights < 0) or weights.sum() <= 0:
        raise ValueError(f"Task weights must be >= 0 with a sum > 0; they are {weights.tolist()}. Correct the weights.")
    empty = np.flatnonzero((sizes < 1) & (weights > 0))
    if len(empty):
        raise ValueError(
            f"Task number {', '.join(map(str, empty))} (counted from 0) has no rows but a weight > 0. "
            "Remove the task with data.only, or give it rows."
        )
    return weights / weights.sum()


def _quotas(shares: np.ndarray, num_rows: int, batching: str) -> np.ndarray:
    """Expected rows of every task in a step: num_rows x share, raised to 1 where it is less; sums to num_rows."""
    if batching != "mixed":
        raise ValueError(
            f"stratified=true needs batching=mixed; batching is {batching}, where a micro-batch has one task. "
            "Set stratified=false or batching=mixed of this stage."
        )
    if num_rows < len(shares):
        raise ValueError(
            f"stratified=true: one optimiser step has {num_rows} rows, too few for {len(shares)} tasks of weight > 0. "
            "Set queries_per_rank or accumulation_steps higher, or stratified=false."
        )
    rare = np.zeros(len(shares), dtype=bool)
    while True:
        quotas = np.ones(len(shares))
        if not rare.all():
            quotas[~rare] = shares[~rare] * (num_rows - rare.sum()) / shares[~rare].sum()
        below = ~rare & (quotas < 1.0 - _WHOLE)
        if not below.any():
            return quotas
        rare |= below


def _occurrences(values: np.ndarray) -> np.ndarray:
    """How often each element's value came before it: [7, 5, 7] -> [0, 0, 1]."""
    order = np.argsort(values, kind="stable")
    in_order = values[order]
    starts = np.searchsorted(in_order, in_order, side="left")
    result = np.empty_like(order)
    result[order] = np.arange(len(values)) - starts
    return result


def _step_of(point: tuple[int, np.ndarray]) -> int:
    return point[0]
