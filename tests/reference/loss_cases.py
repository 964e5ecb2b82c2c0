"""Embeddings, ids and masks for the tests of the loss, and the implementations that they run on."""

import os

import pytest
import torch
from torch.nn.functional import normalize

from tdro_hpc.losses.library import load

# In a CI run, a library that was not built fails its tests instead of leaving them out.
needs_library = pytest.mark.skipif(
    load().path is None and "CI" not in os.environ, reason=f"the compiled library is not here: {load().reason}"
)
IMPLEMENTATIONS = ["torch", pytest.param("fused", marks=needs_library)]


def embeddings(seed, rows, columns, *, width=6, spread=1.0):
    """Unit vectors; a small spread brings all cosines near 1."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(1, width, generator=generator, dtype=torch.float64)
    draw = [torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (rows, columns)]
    return [normalize(centre * (spread < 1) + spread * vectors, dim=1) for vectors in draw]


def with_hard_negatives(seed, rows, columns, *, width=64):
    """Unit vectors as a trained encoder and mined negatives make them: a row's first column is its positive, the others
    of its own are nearly as near, all other columns have a cosine around 0.3."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count):
        return torch.randn(count, width, generator=generator, dtype=torch.float64) / width**0.5

    per_row = columns // rows
    subjects = normalize(0.7 * draw(1) + draw(rows), dim=1)
    documents = normalize(subjects.repeat_interleave(per_row, dim=0) + 0.1 * draw(rows * per_row), dim=1)
    return normalize(subjects + 0.3 * draw(rows), dim=1), documents, torch.arange(rows) * per_row


def choices(seed, rows, columns):
    """Positives, and every group, id and known id that the loss takes; ids repeat, groups may be empty."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high, *shape, low=0):
        return torch.randint(low, high, shape, generator=generator)

    return draw(columns, rows), {
        "query_group": draw(5, rows),
        "document_group": draw(6, columns),
        "document_ids": draw(max(2, columns // 2), columns),
        "known_positive_ids": draw(max(2, columns // 2), rows, 2, low=-1),
        "false_negative_margin": 0.05,
        "column_weights": 0.5 + torch.rand(columns, generator=generator),
    }


MASKS = [
    [],
    ["query_group", "document_group"],
    ["document_ids"],
    ["document_ids", "known_positive_ids"],
    ["false_negative_margin"],
    ["column_weights"],
    ["query_group", "document_group", "document_ids", "known_positive_ids", "false_negative_margin"],
]


def values_and_gradients(function, queries, documents, positives, upstream, **options):
    """Losses, and the gradients of sum(upstream * losses) on both sides."""
    queries, documents = queries.detach().clone().requires_grad_(), documents.detach().clone().requires_grad_()
    losses = function(queries, documents, positives, **options)
    losses.backward(upstream.to(losses.dtype))
    return losses.detach(), queries.grad, documents.grad


def distance(found, wanted):
    """|found - wanted| / |wanted|, 0 for 0 and 0."""
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-300)).item()
