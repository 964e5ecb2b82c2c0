"""A tiny encoder with dropout and padding, and batches for it: what the engine, cache and rank tests train."""

from types import SimpleNamespace

import torch
from torch import nn

from tdro_hpc.config.schema import ModelConfig
from tdro_hpc.data.tokens import Tokens


class ToyEncoder(nn.Module):
    """Mean of token vectors, dropout, a matrix, unit length. Has a pooler that nothing reads, as BERT has."""

    def __init__(self, *, dropout=0.0, autocast="float32", seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.config = ModelConfig(autocast=autocast)
        self.width = 8
        self.embedding = nn.Embedding(50, 8)
        self.dense = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.unread_pooler = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
        self.widths = []  # tokens a row of every forward

    def forward(self, tokens):
        self.widths.append(tokens.input_ids.shape[1])
        mask = tokens.attention_mask.unsqueeze(-1)
        vectors = (self.embedding(tokens.input_ids) * mask).sum(1) / mask.sum(1)
        vectors = vectors + self.frozen(self.dropout(torch.tanh(self.dense(self.dropout(vectors)))))
        return nn.functional.normalize(self.norm(vectors).float(), dim=1)


def toy_tokens(seed, rows, *, width=9, side="right"):
    """Random texts of 1 to `width` tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    mask = (torch.arange(width) < lengths.unsqueeze(1)).long()
    mask = mask.flip(1) if side == "left" else mask
    return Tokens(torch.randint(1, 50, (rows, width), generator=generator) * mask, mask)


def toy_batch(seed, rows, *, per_query=3, tasks=3, own_task=None):
    """Query and passage tokens with the ids that a score block reads; ids repeat between passages."""
    generator = torch.Generator().manual_seed(seed + 1000)
    task_ids = torch.randint(tasks, (rows,), generator=generator)
    return SimpleNamespace(
        query_tokens=toy_tokens(seed, rows),
        passage_tokens=toy_tokens(seed + 1, rows * per_query),
        task_ids=task_ids,
        document_ids=torch.randint(rows * per_query, (rows * per_query,), generator=generator),
        known_positive_ids=torch.randint(-1, rows * per_query, (rows, 2), generator=generator),
        own_negatives_only=task_ids == (-1 if own_task is None else own_task),
    )


def rows_of_batch(batch, rows):
    """The batch of a rank: some of the rows, with their passages."""
    per_query = len(batch.document_ids) // len(batch.task_ids)
    passages = slice(rows.start * per_query, rows.stop * per_query)
    return SimpleNamespace(
        query_tokens=batch.query_tokens.rows(rows),
        passage_tokens=batch.passage_tokens.rows(passages),
        task_ids=batch.task_ids[rows],
        document_ids=batch.document_ids[passages],
        known_positive_ids=batch.known_positive_ids[rows],
        own_negatives_only=batch.own_negatives_only[rows],
    )
