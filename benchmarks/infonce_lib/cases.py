"""A shape in, embeddings out, and what the loss must be for them in float64 through the whole score matrix."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NUM_GROUPS = 25
KNOWN_IDS = 4  # other positives of a row that are looked up
MARGIN = 0.3  # in units of q . d; leaves out about one column in ten at width 384


@dataclass(frozen=True)
class Shape:
    """B rows, each with its positive and n negatives of its own among the B * (1 + n) columns, of width d."""

    rows: int
    negatives: int
    width: int

    @property
    def columns(self) -> int:
        return self.rows * (1 + self.negatives)

    @property
    def flops(self) -> int:
        """Of the three matrix products that nobody can avoid: scores and the two gradients."""
        return 6 * self.rows * self.columns * self.width

    def gradient_bytes(self, dtype: str) -> int:
        """Of the gradients of queries and documents."""
        return (self.rows + self.columns) * self.width * getattr(torch, dtype).itemsize

    def __str__(self) -> str:
        return f"{self.rows}, {self.negatives}, {self.width}"


@dataclass(frozen=True)
class Case:
    """Embeddings of a shape and how the loss is asked for."""

    shape: Shape
    dtype: str  # float32 or bfloat16
    temperature: float
    implementation: str  # of this project's loss: fused, torch or auto


@dataclass
class Inputs:
    """What an implementation gets; queries and documents want a gradient."""

    queries: Tensor  # [rows, width]
    documents: Tensor  # [columns, width]; the positive of row i is column i * (1 + negatives)
    positives: Tensor  # int64 [rows]
    case: Case


def build_inputs(case: Case, *, seed: int = 0) -> Inputs:
    """Unit vectors; a positive has a cosine of about 0.37 with its query, so that the loss is of order 1."""
    shape, draw = case.shape, torch.Generator().manual_seed(seed)
    queries = torch.nn.functional.normalize(torch.randn(shape.rows, shape.width, generator=draw), dim=1)
    documents = torch.randn(shape.columns, shape.width, generator=draw).div_(math.sqrt(shape.width))
    documents[:: 1 + shape.negatives] += 0.4 * queries
    documents.div_(documents.norm(dim=1, keepdim=True))
    return inputs_of(queries, documents, case)


def build_close_inputs(case: Case, *, seed: int = 0) -> Inputs:
    """Unit vectors that all share a direction, as those of a trained encoder: there scores in bfloat16 lose most.

    Cosines with a query are about 0.97 for its positive, 0.96 for its own negatives and 0.87 for other columns.
    """
    shape, draw = case.shape, torch.Generator().manual_seed(seed)

    def noise(rows: int) -> Tensor:
        return torch.randn(rows, shape.width, generator=draw) / math.sqrt(shape.width)

    queries = torch.nn.functional.normalize(3 * noise(1) + noise(shape.rows), dim=1)
    documents = queries.repeat_interleave(1 + shape.negatives, dim=0)
    strength = torch.full((shape.columns, 1), 0.30)
    strength[:: 1 + shape.negatives] = 0.25
    documents = torch.nn.functional.normalize(documents + strength * noise(shape.columns), dim=1)
    return inputs_of(queries, documents, case)


def inputs_of(queries: Tensor, documents: Tensor, case: Case) -> Inputs:
    """These embeddings in the type of the case."""
    dtype = getattr(torch, case.dtype)
    positives = torch.arange(case.shape.rows) * (1 + case.shape.negatives)
    return Inputs(queries.to(dtype).requires_grad_(), documents.to(dtype).requires_grad_(), positives, case)


Keywords = dict[str, Any]  # of grouped_infonce


def _ids(shape: Shape, draw: torch.Generator) -> Keywords:
    """Every text stands twice among the columns, more or less."""
    return {"document_ids": torch.randint(max(1, shape.columns // 2), (shape.columns,), generator=draw)}


def _known(shape: Shape, draw: torch.Generator) -> Keywords:
    known = torch.randint(-1, shape.columns, (shape.rows, KNOWN_IDS), generator=draw)
    return {"document_ids": torch.arange(shape.columns), "known_positive_ids": known}


def _grouped(query_group: Tensor, shape: Shape) -> Keywords:
    return {"query_group": query_group, "document_group": query_group.repeat_interleave(1 + shape.negatives)}


def _sorted_groups(shape: Shape, draw: torch.Generator) -> Keywords:
    return _grouped(torch.arange(shape.rows) * NUM_GROUPS // shape.rows, shape)


def _mixed_groups(shape: Shape, draw: torch.Generator) -> Keywords:
    sizes = torch.arange(shape.rows) * NUM_GROUPS // shape.rows
    return _grouped(sizes[torch.randperm(shape.rows, generator=draw)], shape)


def _column_weights(shape: Shape, draw: torch.Generator) -> Keywords:
    return {"column_weights": torch.rand(shape.columns, generator=draw) + 0.5}


VARIANTS: dict[str, Callable[[Shape, torch.Generator], Keywords]] = {
    "plain": lambda shape, draw: {},
    "symmetric": lambda shape, draw: {"symmetric": True},
    "ids": _ids,
    "known": _known,
    "margin": lambda shape, draw: {"false_negative_margin": MARGIN},
    "column weights": _column_weights,
    "sorted groups": _sorted_groups,
    "mixed groups": _mixed_groups,
    "own candidates": lambda shape, draw: _grouped(torch.arange(shape.rows), shape),
}


def keywords_of(variant: str, shape: Shape) -> Keywords:
    """Arguments of grouped_infonce for a variant; the same at every call."""
    return VARIANTS[variant](shape, torch.Generator().manual_seed(7))


def exact_losses(inputs: Inputs, keywords: Keywords, queries: Tensor, documents: Tensor) -> Tensor:
    """Loss of every row [rows] for float64 embeddings, by the definition: slow and obvious."""
    raw = queries @ documents.T
    rows, temperature = torch.arange(len(queries)), inputs.case.temperature
    positive_raw = raw[rows, inputs.positives]
    counts = negatives_mask(inputs, keywords)
    if "false_negative_margin" in keywords:
        counts &= raw.detach() <= (positive_raw - keywords["false_negative_margin"]).detach().unsqueeze(1)
    scores = raw / temperature
    if "column_weights" in keywords:
        scores = scores + keywords["column_weights"].double().log()
    scores = scores.masked_fill(~counts, -math.inf)
    positive = positive_raw / temperature
    losses = torch.logaddexp(torch.logsumexp(scores, dim=1), positive) - positive
    if keywords.get("symmetric"):
        backward = torch.logsumexp(scores, dim=0)[inputs.positives]
        losses = (losses + torch.logaddexp(backward, positive) - positive) / 2
    return losses


def negatives_mask(inputs: Inputs, keywords: Keywords) -> Tensor:
    """Which columns are negatives of a row by groups and ids, bool [rows, columns]."""
    shape = inputs.case.shape
    counts = torch.ones(shape.rows, shape.columns, dtype=torch.bool)
    counts[torch.arange(shape.rows), inputs.positives] = False
    if "query_group" in keywords:
        counts &= keywords["query_group"].unsqueeze(1) == keywords["document_group"]
    if "document_ids" in keywords:
        ids = keywords["document_ids"]
        counts &= ids[inputs.positives].unsqueeze(1) != ids
        for known in keywords.get("known_positive_ids", torch.empty(shape.rows, 0)).unbind(1):
            counts &= known.unsqueeze(1) != ids
    return counts
