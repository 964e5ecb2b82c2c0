"""A function of the step number in, its results in order and read ahead out. Knows nothing of rows or tokens."""

import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

# Results that each worker process keeps ready.
_AHEAD = 2
# Forking takes milliseconds and shares what is open; starting afresh imports torch and transformers in every worker.
# It is safe here because the workers touch no CUDA, no collective and no threads of the parent (see _prepare_worker).
# Other systems' frameworks do not survive a fork.
_START_METHOD = "fork" if sys.platform == "linux" else "spawn"


def read_ahead(load: Callable[[int], Any], steps: range, *, num_workers: int) -> Iterator[Any]:
    """load(step) of every step in order, computed ahead by `num_workers` processes; 0 = when asked, in this process.

    An error in a worker is raised here as it was raised there, when its step is due.
    """
    if num_workers == 0:
        yield from map(load, steps)
        return
    loader = DataLoader(
        _Steps(load, steps),
        batch_size=None,
        shuffle=False,
        num_workers=num_workers,
        prefetch_factor=_AHEAD,
        collate_fn=_unchanged,
        worker_init_fn=_prepare_worker,
        multiprocessing_context=_START_METHOD,
    )
    for packed in loader:
        result, error, trace = pickle.loads(packed)
        if error is not None:
            raise error from RuntimeError(f"in a loader process:\n{trace}")
        yield result


class _Steps(Dataset):
    """Results as bytes: these go through a pipe, while tensors would need /dev/shm, which containers keep small."""

    def __init__(self, load: Callable[[int], Any], steps: range) -> None:
        self._load, self._steps = load, steps

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, index: int) -> bytes:
        try:
            return pickle.dumps((self._load(self._steps[index]), None, ""), pickle.HIGHEST_PROTOCOL)
        except Exception as error:  # carried to the parent and raised there: DataLoader would rewrite its message
            return _packed_error(error, traceback.format_exc())


def _packed_error(error: Exception, trace: str) -> bytes:
    try:
        packed = pickle.dumps((None, error, trace))
        pickle.loads(packed)  # some exceptions are written but cannot be read back
        return packed
    except Exception:
        return pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}"), trace))


def _unchanged(packed: Any) -> Any:
    return packed


def _prepare_worker(worker: int) -> None:
    # A stop signal goes to the whole process group. The parent decides when to stop and still needs batches until then.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # Thread pools of the parent do not exist after a fork. With this variable at true, as some shells have it, the
    # tokenizers library would wait for its own for ever.
    os.putenv("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(1)
