"""Exact gradients of a loss over many embeddings in the memory of one chunk (gradient caching, arXiv 2101.06983).

The engine embeds all chunks without gradient, the loss gives a gradient for each embedding, and the engine embeds each
chunk again with the same random draws and back-propagates its share. Knows nothing of the loss and of the encoder; the
same few lines serve every engine, pipelines included.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tdro_hpc.data.tokens import Tokens
from tdro_hpc.parallel.engine import Engine, FrozenModel


@dataclass
class Chunk:
    """Rows that are embedded together. Padding that none of them needs is cut off."""

    part: int  # which of the parts they are of
    rows: Tensor  # int64 [rows of the chunk], in their part, where the tokens are
    tokens: Tokens


def cached_backward(
    engine: Engine,
    parts: list[Tokens],
    chunk_tokens: int,
    loss_of: Callable[[list[Tensor]], Tensor],
    *,
    synchronise: bool,
) -> Tensor:
    """Add the gradients of loss_of(embeddings of all parts) to the engine's parameters; returns the loss [], detached.

    parts         one a side, each with at least one row
    chunk_tokens  tokens of a chunk with its padding, >= 1; a row that is longer is a chunk of its own
    loss_of       embeddings of each part, in the order of its rows -> loss []. Called once; it may keep what it
                  computes, and may gather over ranks
    synchronise   average the gradients over ranks with the last chunk
    Dropout draws are per chunk: they equal those of engine.embed on the chunks of `split_parts` in their order. Data
    ranks may have different numbers of chunks.
    """
    chunks = split_parts(parts, chunk_tokens)
    tokens = [chunk.tokens for chunk in chunks]
    embeddings = _in_order(parts, chunks, engine.embed_chunks(tokens))
    loss = loss_of(embeddings)
    gradients = torch.autograd.grad(loss, embeddings, materialize_grads=True)
    shares = [gradients[chunk.part][chunk.rows.to(gradients[chunk.part].device, non_blocking=True)] for chunk in chunks]
    engine.backward_chunks(tokens, shares, synchronise=synchronise)
    return loss.detach()


def embed_parts(model: FrozenModel, parts: list[Tokens], chunk_tokens: int | None) -> list[Tensor]:
    """Embeddings [rows, width] of each part, in the order of its rows, without gradient.

    chunk_tokens  as in `cached_backward`; None = each part whole, where the model can
    """
    if chunk_tokens is None:
        return model.embed_chunks(parts)
    chunks = split_parts(parts, chunk_tokens)
    return [
        whole.detach() for whole in _in_order(parts, chunks, model.embed_chunks([chunk.tokens for chunk in chunks]))
    ]


def split_parts(parts: list[Tokens], chunk_tokens: int) -> list[Chunk]:
    """Chunks of all parts, from the fewest tokens to the most: pass 2 begins with the one that needs most memory."""
    chunks = [chunk for part, tokens in enumerate(parts) for chunk in split_by_length(tokens, part, chunk_tokens)]
    return sorted(chunks, key=lambda chunk: chunk.tokens.input_ids.numel())


def split_by_length(tokens: Tokens, part: int, chunk_tokens: int) -> list[Chunk]:
    """Chunks of rows of like length, the longest first, each of at most `chunk_tokens` tokens or of one row."""
    mask = tokens.attention_mask
    assert len(mask) > 0 and chunk_tokens >= 1, f"{len(mask)} rows in chunks of {chunk_tokens} tokens"
    order = torch.argsort(mask.sum(dim=1), descending=True, stable=True)
    first_used, unused_at_end = mask.argmax(dim=1), mask.flip(1).argmax(dim=1)
    # The shapes of the chunks are needed on the host: one copy a part.
    first_columns, ends = torch.stack([first_used, mask.shape[1] - unused_at_end])[:, order].tolist()
    chunks = []
    for start, stop, first, end in _spans(first_columns, ends, chunk_tokens):
        rows = order[start:stop]
        chosen = tokens.rows(rows)
        chunks.append(Chunk(part, rows, Tokens(chosen.input_ids[:, first:end], chosen.attention_mask[:, first:end])))
    return chunks


def _spans(first_columns: list[int], ends: list[int], chunk_tokens: int) -> list[tuple[int, int, int, int]]:
    """(first row, last + 1, first column, last + 1) of each chunk, for rows whose real tokens are first .. end - 1."""
    spans: list[tuple[int, int, int, int]] = []
    for row, (first, end) in enumerate(zip(first_columns, ends, strict=True)):
        if spans:
            start, _, chunk_first, chunk_end = spans[-1]
            chunk_first, chunk_end = min(chunk_first, first), max(chunk_end, end)
            if (row + 1 - start) * (chunk_end - chunk_first) <= chunk_tokens:
                spans[-1] = (start, row + 1, chunk_first, chunk_end)
                continue
        spans.append((row, row + 1, first, end))
    return spans


def _in_order(parts: list[Tokens], chunks: list[Chunk], embedded: list[Tensor]) -> list[Tensor]:
    """Embeddings [rows, width] of each part, in the order of its rows, as leaves that collect a gradient."""
    wholes = [embedded[0].new_empty(len(part.input_ids), embedded[0].shape[1]) for part in parts]
    for chunk, embedding in zip(chunks, embedded, strict=True):
        wholes[chunk.part][chunk.rows.to(embedding.device, non_blocking=True)] = embedding
    return [whole.requires_grad_() for whole in wholes]
