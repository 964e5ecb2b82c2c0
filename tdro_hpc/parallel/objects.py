"""Small Python values of all ranks on all ranks: what is written where, what went wrong. Never tensors of the model."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from tdro_hpc.parallel.process import world_size

T = TypeVar("T")


def gather_objects(value: T) -> list[T]:
    """`value` of every rank, in the order of world ranks. All ranks call it together."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_all_ranks(action: Callable[[], T], *, what: str) -> list[T]:
    """What `action` returned on every rank, in the order of world ranks. All ranks call it together.

    what    the action in words, after `could not`
    raises  on all ranks when it failed on one: there its own error, elsewhere RuntimeError with the words of that one.
            Without it the others would wait for the rank that failed.
    """
    result: T | None = None
    error: Exception | None = None
    try:
        result = action()
    except Exception as problem:
        error = problem
    answers = gather_objects((result, f"{type(error).__name__}: {error}" if error else ""))
    if error is not None:
        raise error
    for rank, (_, words) in enumerate(answers):
        if words:
            raise RuntimeError(f"Another rank could not {what}: rank {rank}: {words}")
    return [result for result, _ in answers]  # type: ignore[misc]  # None only where it failed
