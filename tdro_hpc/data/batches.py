"""Tasks, a mixture and a tokenizer in; tokenised batches of one rank out. Does not know models or losses.

What a row draws (positive, negatives, instructions) is keyed by (seed, purpose, step, position in the global optimiser
step), so the ranks' batches put together are the same for any number of ranks, and for any number of loader workers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdro_hpc.config.schema import DataConfig, TrainingConfig
from tdro_hpc.data.draws import draw_integers, draw_words, hash_words, text_hash
from tdro_hpc.data.loader import read_ahead
from tdro_hpc.data.mixture import Mixture
from tdro_hpc.data.record import Record
from tdro_hpc.data.tasks import Task
from tdro_hpc.data.tokens import Tokenizer, Tokens, with_instruction

_LAST_WORD = np.uint64(2**64 - 1)
_POSITIVE_INT64 = np.uint64(2**63 - 1)


@dataclass
class Batch:
    """One micro-batch of one rank."""

    query_tokens: Tokens  # [rows]
    passage_tokens: Tokens  # [rows * passages_per_query]; passage i * passages_per_query is the positive of row i
    task_ids: Tensor  # int64 [rows]
    rows: Tensor  # int64 [rows], row in its task
    document_ids: Tensor  # int64 [rows * passages_per_query], 63-bit hash of the passage's text, instruction left out
    known_positive_ids: Tensor  # int64 [rows, known], the row's other positives, padded with -1
    own_negatives_only: Tensor  # bool [rows], the task's policy is `group`
    draw_ids: Tensor  # int64 [rows], hash of (task, row, passages, instructions): key of a cached reference loss
    global_task_counts: Tensor  # int64 [tasks], rows of every task in the global micro-batch

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device; the copies may still be under way on a CUDA stream."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            is_tokens = isinstance(value, Tokens)
            moved[field.name] = value.to(device) if is_tokens else value.to(device, non_blocking=True)
        return Batch(**moved)


@dataclass(frozen=True)
class _DrawnRow:
    """One row with all its choices made; texts without instruction."""

    query: str
    passages: list[str]  # the positive first
    known_positives: list[str]
    query_instruction: str
    passage_instruction: str


class Batches:
    """A pure function of (step, micro_step) for one rank, and its read-ahead."""

    def __init__(
        self,
        tasks: dict[str, Task],
        mixture: Mixture,
        tokenizer: Tokenizer,
        config: DataConfig,
        training: TrainingConfig,
        *,
        data_rank: int,
        data_size: int,
        seed: int,
    ) -> None:
        """The rank has rows [data_rank, data_rank + 1) * rows_per_micro_step / data_size of each global micro-batch."""
        assert len(tasks) == len(mixture.sizes), f"{len(tasks)} tasks, {len(mixture.sizes)} in the mixture"
        assert mixture.rows_per_micro_step % data_size == 0, "every rank has the same number of rows"
        self.mixture = mixture
        self._tasks = list(tasks.values())
        self._task_words = np.asarray([text_hash(name) for name in tasks], dtype=np.uint64)
        self._tokenizer = tokenizer
        self._needed = training.passages_per_query - 1
        self._stage_negatives = training.negatives
        self._query_limits = [task.config.query_max_tokens or config.query_max_tokens for task in self._tasks]
        self._passage_limits = [task.config.passage_max_tokens or config.passage_max_tokens for task in self._tasks]
        rows = mixture.rows_per_micro_step // data_size
        self._own = slice(data_rank * rows, (data_rank + 1) * rows)
        self._seed = seed

    def batch(self, step: int, micro_step: int) -> Batch:
        """This rank's slice of one global micro-batch."""
        global_tasks, global_rows = self.mixture.draw(step, micro_step)
        task_ids, rows = global_tasks[self._own], global_rows[self._own]
        first = micro_step * len(global_tasks)
        positions = np.arange(first, first + len(global_tasks))[self._own]
        drawn = self._drawn_rows(task_ids, rows, step, positions)
        documents = np.asarray([[text_hash(text) for text in row.passages] for row in drawn])
        queries = [with_instruction(row.query, row.query_instruction) for row in drawn]
        passages = [with_instruction(text, row.passage_instruction) for row in drawn for text in row.passages]
        query_limits = [self._query_limits[task] for task in task_ids]
        passage_limits = [self._passage_limits[task] for task in task_ids for _ in range(self._needed + 1)]
        own_only = [self._tasks[task].config.negatives == "group" for task in task_ids]
        return Batch(
            query_tokens=self._tokenizer.encode(queries, max_tokens=query_limits),
            passage_tokens=self._tokenizer.encode(passages, max_tokens=passage_limits),
            task_ids=torch.tensor(task_ids),
            rows=torch.tensor(rows),
            document_ids=torch.tensor(documents.reshape(-1)),
            known_positive_ids=torch.tensor(_padded_ids([row.known_positives for row in drawn])),
            own_negatives_only=torch.tensor(own_only, dtype=torch.bool),
            draw_ids=torch.tensor(self._draw_ids(task_ids, rows, documents, drawn)),
            global_task_counts=torch.tensor(np.bincount(global_tasks, minlength=len(self._tasks))),
        )

    def iterate(self, first_step: int, num_steps: int, *, num_workers: int) -> Iterator[list[Batch]]:
        """The micro-batches of each of `num_steps` optimiser steps, in order; see read_ahead."""
        return read_ahead(self._step_batches, range(first_step, first_step + num_steps), num_workers=num_workers)

    def _step_batches(self, step: int) -> list[Batch]:
        return [self.batch(step, micro_step) for micro_step in range(self.mixture.micro_steps)]

    def _drawn_rows(self, task_ids: np.ndarray, rows: np.ndarray, step: int, positions: np.ndarray) -> list[_DrawnRow]:
        records = [self._record(int(task), int(row)) for task, row in zip(task_ids, rows, strict=True)]
        num_positives = np.asarray([len(record.positives) for record in records])
        num_negatives = np.asarray([len(record.negatives) for record in records])
        num_instructions = np.asarray([max(1, len(self._tasks[task].config.instructions)) for task in task_ids])
        positives = draw_integers(num_positives, self._seed, "positive", step, positions)
        negatives = drawn_without_replacement(
            num_negatives, self._needed, draw_words(self._seed, "negatives", step, positions)
        )
        query_wordings = draw_integers(num_instructions, self._seed, "query instruction", step, positions)
        passage_wordings = draw_integers(num_instructions, self._seed, "passage instruction", step, positions)
        drawn = []
        for i, record in enumerate(records):
            task = self._tasks[task_ids[i]]
            positive_texts = [candidate.full_text for candidate in record.positives]
            positive = positive_texts[positives[i]]
            if num_negatives[i]:
                own = record.negatives
                texts = [own[k].full_text for k in negatives[i]]
            else:
                texts = self._borrowed_passages(int(task_ids[i]), int(rows[i]), step, int(positions[i]))
            wordings = task.config.instructions or [""]
            drawn.append(
                _DrawnRow(
                    query=record.query,
                    passages=[positive, *texts],
                    known_positives=[text for text in positive_texts if text != positive],
                    query_instruction=wordings[query_wordings[i]],
                    passage_instruction=wordings[passage_wordings[i]] if task.config.symmetric else "",
                )
            )
        return drawn

    def _record(self, task: int, row: int) -> Record:
        record = self._tasks[task].record(row)
        if not record.positives:
            raise ValueError(
                f"Row {row} of task {self._tasks[task].name} ({self._tasks[task].path}) has no positive passage. "
                "Give it one, or take the row out of the file."
            )
        return record

    def _borrowed_passages(self, task_id: int, row: int, step: int, position: int) -> list[str]:
        """Positives of other rows of the task, for a row without negatives of its own.

        They are what the policies task, batch and world would put beside the row anyway. Under `group` a row is scored
        against its own negatives only, and borrowed ones would make its loss mean something else: an error instead.
        """
        task = self._tasks[task_id]
        if not self._needed:
            return []
        if "group" in (task.config.negatives, self._stage_negatives):
            raise ValueError(
                f"Row {row} of task {task.name} ({task.path}) has no negative passages, and negatives=group scores a "
                f"row against its own {self._needed} only. Mine negatives for the task, leave it out with data.only, "
                "or set negatives=task of this stage (and negatives: stage of the task)."
            )
        if len(task) < 2:
            raise ValueError(
                f"The only row of task {task.name} ({task.path}) has no negative passages, and there is no other row "
                "to borrow from. Add rows or negatives, or leave the task out with data.only."
            )
        slots = np.arange(self._needed)
        others = draw_integers(len(task) - 1, self._seed, "borrowed row", step, position, slots)
        texts = []
        for slot, other in zip(slots.tolist(), others.tolist(), strict=True):
            lender = self._record(task_id, other + (other >= row))
            choice = draw_integers(len(lender.positives), self._seed, "borrowed positive", step, position, slot)
            texts.append(lender.positives[int(choice)].full_text)
        return texts

    def _draw_ids(
        self, task_ids: np.ndarray, rows: np.ndarray, documents: np.ndarray, drawn: list[_DrawnRow]
    ) -> np.ndarray:
        wordings = np.asarray([[text_hash(row.query_instruction), text_hash(row.passage_instruction)] for row in drawn])
        words = hash_words(self._task_words[task_ids], rows, *documents.T, *wordings.T)
        return (words & _POSITIVE_INT64).astype(np.int64)


def drawn_without_replacement(num_choices: np.ndarray, needed: int, keys: np.ndarray) -> np.ndarray:
    """`needed` random choices of 0 .. num_choices - 1 for each row: int64 [rows, needed].

    num_choices  int64 [rows]    rows with fewer choices than needed draw with replacement, as the released code does;
                                 rows with none get 0s
    keys         uint64 [rows]   seed of each row's choices
    """
    slots = np.arange(max(int(num_choices.max(initial=0)), needed))
    words = hash_words(keys[:, None], slots)  # [rows, slots]
    repeated = (words[:, :needed] % np.maximum(num_choices, 1).astype(np.uint64)[:, None]).astype(np.int64)
    # Choices in the order of random words are a random order; those a row does not have go to the end.
    ordered = np.argsort(np.where(slots < num_choices[:, None], words, _LAST_WORD), axis=1, kind="stable")[:, :needed]
    return np.where((num_choices >= needed)[:, None], ordered, repeated)


def _padded_ids(texts: list[list[str]]) -> np.ndarray:
    ids = np.full((len(texts), max(map(len, texts), default=0)), -1, dtype=np.int64)
    for row, of_row in enumerate(texts):
        ids[row, : len(of_row)] = [text_hash(text) for text in of_row]
    return ids
