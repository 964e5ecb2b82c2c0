"""Exact gradients of a loss over many embeddings in the memory of one chunk (gradient caching, arXiv 2101.06983).

Pass 1 embeds everything without gradient, the loss gives a gradient for each embedding, and pass 2 embeds each chunk
again with the same random draws and back-propagates its share. Knows nothing of the loss and nothing of the encoder.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tdro_hpc.data.tokens import Tokens
from tdro_hpc.parallel.engine import Engine

RandomState = list[Tensor]  # of the CPU's generator, and of the GPU's where the encoder is on one


@dataclass
class _Chunk:
    """Rows that are embedded together. Padding that none of them needs is cut off."""

    part: int  # which of the parts they are of
    rows: Tensor  # int64 [rows of the chunk], in their part, where the tokens are
    tokens: Tokens
    random_state: RandomState | None = None  # before pass 1 embedded it


def cached_backward(
    engine: Engine,
    parts: list[Tokens],
    chunk_rows: list[int],
    loss_of: Callable[[list[Tensor]], Tensor],
    *,
    synchronise: bool,
) -> Tensor:
    """Add the gradients of loss_of(embeddings of all parts) to the engine's parameters; returns the loss [], detached.

    parts        one a side, each with at least one row
    chunk_rows   rows of a chunk, a number a part; >= 1
    loss_of      embeddings of each part, in the order of its rows -> loss []. Called once; it may keep what it
                 computes, and may gather over ranks
    synchronise  average the gradients over ranks with the last chunk
    Dropout draws are per chunk: they equal those of engine.embed on the same chunks in the same order.
    """
    assert len(parts) == len(chunk_rows), f"{len(parts)} parts, but {len(chunk_rows)} chunk sizes"
    chunks = [chunk for part, tokens in enumerate(parts) for chunk in split_by_length(tokens, part, chunk_rows[part])]
    embeddings = _embed_all(engine, parts, chunks)
    loss = loss_of(embeddings)
    gradients = torch.autograd.grad(loss, embeddings, materialize_grads=True)
    for chunk in chunks:
        assert chunk.random_state is not None, "pass 1 comes first"
        _restore(chunk.random_state, engine.process.device)
        (embedding,) = engine.embed([chunk.tokens])
        rows = chunk.rows.to(embedding.device, non_blocking=True)
        surrogate = (embedding * gradients[chunk.part][rows]).sum()
        engine.backward(surrogate, synchronise=synchronise and chunk is chunks[-1])
    return loss.detach()


def split_by_length(tokens: Tokens, part: int, chunk_rows: int) -> list[_Chunk]:
    """Chunks of rows of like length, the longest first: if memory does not suffice, that shows at once."""
    mask = tokens.attention_mask
    assert len(mask) > 0 and chunk_rows >= 1, f"{len(mask)} rows in chunks of {chunk_rows}"
    order = torch.argsort(mask.sum(dim=1), descending=True, stable=True)
    first_used, unused_at_end = mask.argmax(dim=1), mask.flip(1).argmax(dim=1)
    # The widths of the chunks are shapes, so they are needed on the host: one copy a part.
    first_columns, ends = torch.stack([first_used, mask.shape[1] - unused_at_end])[:, order].tolist()
    chunks = []
    for start, rows in zip(range(0, len(mask), chunk_rows), order.split(chunk_rows), strict=True):
        stop = start + len(rows)
        columns = slice(min(first_columns[start:stop]), max(ends[start:stop]))
        chosen = tokens.rows(rows)
        chunks.append(_Chunk(part, rows, Tokens(chosen.input_ids[:, columns], chosen.attention_mask[:, columns])))
    return chunks


def _embed_all(engine: Engine, parts: list[Tokens], chunks: list[_Chunk]) -> list[Tensor]:
    """Pass 1: embeddings of each part, in the order of its rows, as leaves that collect a gradient."""
    embeddings: list[Tensor | None] = [None] * len(parts)
    for chunk in chunks:
        chunk.random_state = _captured(engine.process.device)
        embedding = engine.embed_frozen(chunk.tokens)
        whole = embeddings[chunk.part]
        if whole is None:
            whole = embedding.new_empty(len(parts[chunk.part].input_ids), embedding.shape[1])
            embeddings[chunk.part] = whole
        whole[chunk.rows.to(embedding.device, non_blocking=True)] = embedding
    return [whole.requires_grad_() for whole in embeddings if whole is not None]


def _captured(device: torch.device) -> RandomState:
    on_gpu = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_gpu]


def _restore(state: RandomState, device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
