"""Texts and a model in, unit vectors on disk out: kept, used again, and continued where a run was interrupted.

Texts are taken longest first and cut into parts of a fixed size; part p belongs to rank p modulo ranks. Parts and
batches do not depend on the number of ranks, so the vectors do not either, and a part that is done stays done.
Never searches and never reads a test set.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from tdro_hpc.atomic import write_json
from tdro_hpc.data.tokens import Tokenizer, Tokens, with_instruction
from tdro_hpc.parallel.process import Process, wait_for_all
from tdro_hpc.retrieval.embeddings import Embeddings, read_note
from tdro_hpc.retrieval.progress import Progress
from tdro_hpc.training.stop import StopFlag, Stopped

PART_ROWS = 65_536  # rows of one file at most
SMALLEST_PART_ROWS = 256
_BATCHES_A_BLOCK = 8  # about; progress is kept after every block
_CHARACTERS_A_TOKEN = 2  # a low guess, so that blocks hold enough tokens in every script
_LONGEST_BLOCK_ROWS = 8192


class Texts(Protocol):
    """One side of a test set, read text by text."""

    lengths: np.ndarray  # int64 [rows], characters
    fingerprint: str  # changes when a text does

    def text(self, row: int) -> str: ...


@dataclass(frozen=True)
class Side:
    """How the texts of one side are put to the model."""

    name: str  # queries or documents
    instruction: str  # before every text; empty = none
    max_tokens: int  # longer texts are cut


@dataclass(frozen=True)
class TextModel:
    """A model as this file sees it."""

    embed: Callable[[Tokens], Tensor]  # tokens on the CPU -> [rows, width], on whichever device the model is
    tokenizer: Tokenizer
    width: int
    identity: dict[str, Any]  # what makes its vectors what they are: fingerprint, pooling, similarity, precision


@dataclass(frozen=True)
class EncodingRun:
    """What all texts of a run share."""

    stage: str  # for messages
    batch_tokens: int  # rows x longest row of one batch, padding included
    process: Process
    stop: StopFlag
    progress: Progress


def model_fingerprint(encoder: nn.Module, tokenizer: Tokenizer) -> str:
    """32 hex digits that change when a weight of the encoder does, or how its tokenizer splits a probe text."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        # numpy has no bfloat16: the bytes are hashed.
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy(force=True))
    probe = tokenizer.encode(["Probe 1: na\u00efve caf\u00e9, \u6771\u4eac?\n def f(x):"], max_tokens=64)
    digest.update(probe.input_ids.numpy().tobytes())
    return digest.hexdigest()


def encode_texts(texts: Texts, model: TextModel, folder: Path, side: Side, run: EncodingRun) -> Embeddings:
    """Vectors of all texts, memory-mapped from `folder`; only what is not there yet is encoded.

    A manifest keeps what the vectors were made from. Where that differs, the differing values are named in a line and
    all is encoded again. All ranks call it together; each comes back when all parts are whole.
    raises  Stopped when a stop was asked for: blocks that are done stay done
            ValueError if the model gives a vector with NaN or infinity
    """
    order = np.argsort(-texts.lengths, kind="stable")
    part_rows = min(PART_ROWS, max(SMALLEST_PART_ROWS, -(-len(order) // 64)))
    parts = [order[start : start + part_rows] for start in range(0, len(order), part_rows)]
    if run.process.data_rank == 0:
        identity = {**_identity(texts, model, side), "part_rows": part_rows}
        _keep_or_clear(folder, identity, run.progress.say)
    wait_for_all()
    for number in range(run.process.data_rank, len(parts), run.process.data_size):
        path = folder / f"part-{number:05d}.npy"
        _encode_part(texts, parts[number], model, path, side, run)
        if run.stop.requested:
            break
    # A rank that was not asked to stop comes here after its last part: ranks leave together.
    if run.stop.agreed() and rows_done(folder) < len(order):
        reason = run.stop.reason or "another rank was asked to stop"
        raise Stopped(run.stage, run.progress.rows_before + rows_done(folder), run.progress.rows, reason)
    wait_for_all()
    run.progress.finish_texts(len(order))
    paths = [folder / f"part-{number:05d}.npy" for number in range(len(parts))]
    return Embeddings([np.load(path, mmap_mode="r") for path in paths], order)


def rows_done(folder: Path) -> int:
    """Rows of a folder that are encoded and safe on disk, over all ranks."""
    return sum(int(read_note(note).get("rows_done", 0)) for note in folder.glob("part-*.json"))


def _identity(texts: Texts, model: TextModel, side: Side) -> dict[str, Any]:
    return {
        **model.identity,
        **{("side" if key == "name" else key): value for key, value in asdict(side).items()},
        "texts": texts.fingerprint,
        "rows": len(texts.lengths),
        "width": model.width,
    }


def _keep_or_clear(folder: Path, identity: dict[str, Any], say: Callable[[str], None]) -> None:
    """Leave parts of the same identity alone; else name what differs, remove them and note the new identity."""
    kept = read_note(folder / "manifest.json")
    if kept == identity:
        return
    changes = [
        f"{key} was {kept.get(key)!r}, is {identity.get(key)!r}"
        for key in sorted(kept.keys() | identity.keys())
        if kept.get(key) != identity.get(key)
    ]
    if kept:
        say(f"{folder}: encoding again, because {'; '.join(changes)}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / "manifest.json", identity)


def _encode_part(texts: Texts, rows: np.ndarray, model: TextModel, path: Path, side: Side, run: EncodingRun) -> None:
    """Encode one part block by block from where it stands; comes back early when a stop was asked for."""
    note = path.with_suffix(".json")
    done = int(read_note(note).get("rows_done", 0)) if path.is_file() else 0
    if done == len(rows):
        return
    if not done:
        note.unlink(missing_ok=True)  # a note without its vectors would vouch for a file of zeros
    shape = (len(rows), model.width)
    vectors = np.lib.format.open_memmap(path, mode="r+" if done else "w+", dtype=np.float32, shape=shape)
    blocks = _block_ends(texts.lengths[rows], done, side.max_tokens, run.batch_tokens)
    for start, end, tokens in _tokenised_ahead(texts, rows, model.tokenizer, side, [done, *blocks]):
        vectors[start:end] = _embed_block(tokens, model, run.batch_tokens)
        finite = np.isfinite(vectors[start:end]).all(axis=1)
        if not finite.all():
            row = int(rows[start + int(np.argmin(finite))])
            raise ValueError(
                f"{run.stage}: the vector of row {row} of the {side.name} has NaN or infinity "
                f"({texts.text(row)[:80]!r}). The weights may have diverged in training; "
                "model.autocast=float32 rules out overflow."
            )
        # The note follows the vectors: rows that it counts are on disk whatever happens next.
        vectors.flush()
        write_json(note, {"rows_done": end})
        if run.process.data_rank == 0 and run.progress.due():
            run.progress.write(rows_done(path.parent))
        if run.stop.requested:
            return


def _block_ends(lengths: np.ndarray, done: int, max_tokens: int, batch_tokens: int) -> list[int]:
    """Ends of the blocks after `done`: a few batches each, by a guess at the tokens from the characters."""
    guesses = np.minimum(lengths // _CHARACTERS_A_TOKEN + 1, max_tokens)
    ends, held = [], 0
    start = done
    for row in range(done, len(lengths)):
        held += int(guesses[row])
        if held >= _BATCHES_A_BLOCK * batch_tokens or row + 1 - start == _LONGEST_BLOCK_ROWS:
            ends.append(row + 1)
            start, held = row + 1, 0
    if start < len(lengths):
        ends.append(len(lengths))
    return ends


def _tokenised_ahead(
    texts: Texts, rows: np.ndarray, tokenizer: Tokenizer, side: Side, edges: list[int]
) -> Iterator[tuple[int, int, Tokens]]:
    """(start, end, tokens) of each block; a thread reads and tokenises the next one while this one is encoded."""

    def tokens_of(start: int, end: int) -> Tokens:
        block = [with_instruction(texts.text(row), side.instruction) for row in rows[start:end].tolist()]
        return tokenizer.encode(block, max_tokens=side.max_tokens)

    spans = list(zip(edges[:-1], edges[1:], strict=True))
    with ThreadPoolExecutor(max_workers=1) as reader:
        ahead = reader.submit(tokens_of, *spans[0])
        for place, (start, end) in enumerate(spans):
            tokens = ahead.result()
            if place + 1 < len(spans):
                ahead = reader.submit(tokens_of, *spans[place + 1])
            yield start, end, tokens


def _embed_block(tokens: Tokens, model: TextModel, batch_tokens: int) -> np.ndarray:
    """float32 [rows, width] of a block, embedded longest first in batches of at most `batch_tokens`."""
    lengths = tokens.attention_mask.sum(dim=1).numpy()
    order = np.argsort(-lengths, kind="stable")
    vectors = np.empty((len(order), model.width), np.float32)
    start = 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        chosen = order[start : start + max(1, batch_tokens // longest)]
        batch = _narrowed(tokens.rows(torch.from_numpy(chosen)))
        with torch.inference_mode():
            vectors[chosen] = model.embed(batch).float().numpy(force=True)
        start += len(chosen)
    return vectors


def _narrowed(tokens: Tokens) -> Tokens:
    """The tokens without columns that are padding in every row, on whichever side that is."""
    columns = tokens.attention_mask.any(dim=0)
    return Tokens(tokens.input_ids[:, columns], tokens.attention_mask[:, columns])
