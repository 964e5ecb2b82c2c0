"""What others compute the loss with. Each is a function: Inputs -> a function that makes loss and gradients once."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from infonce_lib.cases import Inputs, keywords_of, negatives_mask


class Outcome(NamedTuple):
    """The mean loss and its gradients."""

    loss: Tensor  # []
    queries: Tensor  # [rows, width]
    documents: list[
        Tensor
    ]  # [columns, width]; or, of a peer that wants them apart, [rows, width] for each column of a row


Step = Callable[[], Outcome]


def by_autograd(inputs: Inputs, loss_of: Callable[[], Tensor]) -> Step:
    """The step of a loss that torch differentiates; gradients are asked for as gradient caching does."""

    def step() -> Outcome:
        loss = loss_of()
        queries, documents = torch.autograd.grad(loss, (inputs.queries, inputs.documents))
        return Outcome(loss.detach(), queries, [documents])

    return step


def naive(inputs: Inputs) -> Step:
    """All scores, then cross entropy: the text of most trainers."""
    temperature = inputs.case.temperature

    def loss_of() -> Tensor:
        scores = torch.matmul(inputs.queries, inputs.documents.transpose(0, 1))
        return functional.cross_entropy(scores / temperature, inputs.positives)

    return by_autograd(inputs, loss_of)


def naive_rows(inputs: Inputs) -> Step:
    """The same with a loss a row, which the caller weights."""
    temperature = inputs.case.temperature

    def loss_of() -> Tensor:
        scores = torch.matmul(inputs.queries, inputs.documents.transpose(0, 1))
        return functional.cross_entropy(scores / temperature, inputs.positives, reduction="none").mean()

    return by_autograd(inputs, loss_of)


def naive_mask(inputs: Inputs) -> Step:
    """All scores, those of other groups masked: what a mask costs where groups save no work."""
    keywords, rows = keywords_of("sorted groups", inputs.case.shape), torch.arange(inputs.case.shape.rows)
    outside = ~negatives_mask(inputs, keywords)
    outside[rows, inputs.positives] = False

    def loss_of() -> Tensor:
        scores = torch.matmul(inputs.queries, inputs.documents.transpose(0, 1)) / inputs.case.temperature
        return functional.cross_entropy(scores.masked_fill(outside, -math.inf), inputs.positives)

    return by_autograd(inputs, loss_of)


def naive_loop(inputs: Inputs) -> Step:
    """A loop over sorted groups with all scores of each."""
    keywords, shape = keywords_of("sorted groups", inputs.case.shape), inputs.case.shape
    sizes = torch.bincount(keywords["query_group"]).tolist()
    sizes = [size for size in sizes if size]
    targets = [torch.arange(size) * (1 + shape.negatives) for size in sizes]

    def loss_of() -> Tensor:
        parts = inputs.documents.split([size * (1 + shape.negatives) for size in sizes])
        losses = [
            functional.cross_entropy(rows @ columns.T / inputs.case.temperature, target, reduction="sum")
            for rows, columns, target in zip(inputs.queries.split(sizes), parts, targets, strict=True)
        ]
        return torch.stack(losses).sum() / shape.rows

    return by_autograd(inputs, loss_of)


def torch_chunked(inputs: Inputs, **settings: Any) -> Step:
    """torch's own chunked loss over a linear layer whose weights are the documents."""
    from torch.nn import LinearCrossEntropyOptions

    options = LinearCrossEntropyOptions(**settings)

    def loss_of() -> Tensor:
        scaled = inputs.queries / inputs.case.temperature
        return functional.linear_cross_entropy(scaled, inputs.documents, inputs.positives, options=options)

    return by_autograd(inputs, loss_of)


def checkpointed_rows(inputs: Inputs, *, rows: int) -> Step:
    """Scores of some rows at a time, computed again in the backward pass."""
    num_rows = inputs.case.shape.rows

    def block(queries: Tensor, positives: Tensor) -> Tensor:
        return functional.cross_entropy(queries @ inputs.documents.T, positives, reduction="sum")

    def loss_of() -> Tensor:
        scaled = inputs.queries / inputs.case.temperature
        blocks = zip(scaled.split(rows), inputs.positives.split(rows), strict=True)
        sums = [checkpoint(block, *parts, use_reentrant=False, preserve_rng_state=False) for parts in blocks]
        return torch.stack(sums).sum() / num_rows

    return by_autograd(inputs, loss_of)


class _NoModel(torch.nn.Module):
    """Stands where sentence-transformers' losses want a model, of which they look at the first module's type only."""

    def __getitem__(self, index: int) -> torch.nn.Module:
        return torch.nn.Identity()


def sentence_transformers_cached(inputs: Inputs, *, mini_batch_size: int, similarity: str) -> Step:
    """The loss stage of CachedMultipleNegativesRankingLoss, on embeddings in its own layout."""
    from sentence_transformers import util
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    shape = inputs.case.shape
    loss_of = CachedMultipleNegativesRankingLoss(
        _NoModel(),
        scale=1 / inputs.case.temperature,
        similarity_fct=getattr(util, similarity),
        mini_batch_size=mini_batch_size,
    )
    columns = inputs.documents.detach().view(shape.rows, 1 + shape.negatives, shape.width).unbind(1)
    leaves = [inputs.queries.detach(), *(column.clone() for column in columns)]
    # Their own columns replace the documents: what is measured is not to hold both.
    inputs.documents = inputs.documents.detach().new_empty(0)

    def step() -> Outcome:
        for leaf in leaves:
            leaf.grad = None
            leaf.requires_grad_()
        loss = loss_of.calculate_loss([[leaf] for leaf in leaves], with_backward=True)
        queries, *documents = [leaf.grad for leaf in leaves if leaf.grad is not None]
        return Outcome(loss, queries, documents)

    return step


PANEL_ROWS, TILE_COLUMNS = 256, 2048


def tiled_probe(inputs: Inputs) -> Step:
    """Two sweeps over tiles of scores that stay in cache, in Python: what a compiled loss must not be slower than.

    A tile keeps exp(score - highest of the tile's row); the second sweep puts what is missing to the softmax into the
    small factors of the two products. float32 products go through oneDNN's linear layer.
    """
    half = inputs.case.dtype == "bfloat16"

    def product(left: Tensor, right: Tensor) -> Tensor:  # left @ right.T
        if half:
            return torch.mm(left.bfloat16(), right.bfloat16().T).float()
        return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")

    @torch.no_grad()
    def step() -> Outcome:
        queries, documents, positives = inputs.queries, inputs.documents, inputs.positives
        document_gradient = torch.zeros_like(documents, dtype=torch.float32)
        query_gradient = torch.zeros_like(queries, dtype=torch.float32)
        total_loss, factor = queries.new_zeros((), dtype=torch.float32), 1 / (len(queries) * inputs.case.temperature)
        for first in range(0, len(queries), PANEL_ROWS):
            rows = slice(first, first + PANEL_ROWS)
            panel = queries[rows].float()
            loss, totals, tiles = _first_sweep(panel / inputs.case.temperature, documents, product)
            positive_documents = documents[positives[rows]].float()
            total_loss += loss - (panel * positive_documents).sum() / inputs.case.temperature
            for tile, (shares, highest) in enumerate(tiles):
                columns = slice(tile * TILE_COLUMNS, (tile + 1) * TILE_COLUMNS)
                missing = (highest - totals).exp_().mul_(factor).unsqueeze(1)
                query_gradient[rows] += product(shares, documents[columns].T) * missing
                document_gradient[columns] += product(shares.T, (panel * missing).T)
            query_gradient[rows] -= positive_documents * factor
            document_gradient.index_add_(0, positives[rows], panel, alpha=-factor)
        gradients = query_gradient.to(queries.dtype), [document_gradient.to(documents.dtype)]
        return Outcome(total_loss / len(queries), *gradients)

    return step


def _first_sweep(
    scaled: Tensor, documents: Tensor, product: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Sum of the rows' logsumexp [], the logsumexp [rows], and of each tile its shares and the highest scores."""
    tiles, sums = [], []
    for columns in documents.split(TILE_COLUMNS):
        shares = product(scaled, columns)
        highest = shares.amax(dim=1)
        shares.sub_(highest.unsqueeze(1)).exp_()
        sums.append(highest + shares.sum(dim=1).log_())
        tiles.append((shares.bfloat16() if documents.dtype == torch.bfloat16 else shares, highest))
    totals = torch.logsumexp(torch.stack(sums), dim=0)
    return totals.sum(), totals, tiles
