"""Losses of the frozen reference: from the model beside the proxy, or computed once and read from files.

A reference loss depends only on the row, its chosen passages and its instruction (`Batch.draw_ids`), because the
reference is in evaluation mode and never changes. Under policies other than `group` it also depends on the other rows
of its batch, so caching is offered for `group` only.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tdro_hpc.atomic import replaced_file
from tdro_hpc.data.batches import Batch
from tdro_hpc.parallel.process import Process, any_rank


class ReferenceLosses(Protocol):
    """Something that knows the reference's loss of every row."""

    def losses(self, batch: Batch) -> Tensor:
        """[rows] float32, nats, on the batch's device."""
        ...


class OnlineReference:
    """The reference model beside the proxy.

    row_losses  batch -> [rows] losses of the frozen model, without gradient
    """

    def __init__(self, row_losses: Callable[[Batch], Tensor]) -> None:
        self._row_losses = row_losses

    def losses(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return self._row_losses(batch)


class CachedReference:
    """Losses read from the files of `compute_reference_losses`; the model is not loaded.

    raises ValueError if the folder has no file, or, from `losses`, if a row of the batch is not in it
    """

    def __init__(self, folder: Path) -> None:
        pieces = [_read(path) for path in _files(folder)]
        if not pieces:
            raise ValueError(f"{folder} has no reference losses. Run s1 with s1.reference_losses=cached to make them.")
        ids, values = (np.concatenate(column) for column in zip(*pieces, strict=True))
        ids, first = np.unique(ids, return_index=True)
        self.folder = folder
        self._ids = torch.from_numpy(ids)
        self._values = torch.from_numpy(values[first])

    def __len__(self) -> int:
        return len(self._ids)

    def has(self, batch: Batch) -> bool:
        """Every row of the batch is cached."""
        return bool(self._found(batch.draw_ids.cpu())[1].all())

    def losses(self, batch: Batch) -> Tensor:
        positions, found = self._found(batch.draw_ids.cpu())
        if not bool(found.all()):
            raise ValueError(
                f"{int((~found).sum())} of {len(found)} rows are not among the {len(self)} reference losses in "
                f"{self.folder}. The data or s1's batches changed: remove that folder, then type the same line again."
            )
        return self._values[positions].to(batch.draw_ids.device)

    def _found(self, draw_ids: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.searchsorted(self._ids, draw_ids).clamp_max(len(self._ids) - 1)
        return positions, self._ids[positions] == draw_ids


def compute_reference_losses(
    folder: Path,
    steps: Iterator[list[Batch]],
    row_losses: Callable[[Batch], Tensor],
    *,
    process: Process,
    steps_per_file: int,
    should_stop: Callable[[], bool],
    progress: Callable[[int], None],
) -> bool:
    """Write the reference loss of every row of `steps`, a file each `steps_per_file` steps; False if asked to stop.

    Rows that are in the folder already are not computed again, so a stopped pass continues where it was. All ranks call
    it together; each replica writes its rows once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = CachedReference(folder) if _files(folder) else None
    ids: list[np.ndarray] = []
    values: list[np.ndarray] = []
    number = 0
    for number, batches in enumerate(steps, start=1):
        for batch in batches:
            # The ranks of a replica embed together, so none goes on alone where a disk shows them different files.
            if any_rank(known is None or not known.has(batch)):
                with torch.no_grad():
                    losses = row_losses(batch)
                ids.append(batch.draw_ids.cpu().numpy())
                values.append(losses.float().cpu().numpy())
        if number % steps_per_file == 0:
            _write(folder, process, number, ids, values)
            ids, values = [], []
            progress(number)
            if should_stop():
                return False
    _write(folder, process, number, ids, values)
    return True


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("losses-*.npz"))


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return file["draw_ids"], file["losses"]


def _write(folder: Path, process: Process, number: int, ids: list[np.ndarray], values: list[np.ndarray]) -> None:
    if not ids or process.pipeline_rank or process.tensor_rank:
        return
    # Named by the rows it holds, so that a pass with another number of ranks adds files and overwrites none.
    name = f"losses-{int(ids[0][0]):016x}-{process.data_rank}-{number}.npz"
    with replaced_file(folder / name) as temporary, open(temporary, "wb") as file:
        np.savez(file, draw_ids=np.concatenate(ids), losses=np.concatenate(values))
