"""Where all cosines are near 1, gradients are small differences of large sums: float32 and bfloat16 against float64."""

from functools import lru_cache

import pytest
import torch

from tdro_hpc.losses import grouped_infonce, weighted_infonce
from tests.reference import dense_core
from tests.reference.loss_cases import IMPLEMENTATIONS, distance, embeddings

ROWS, COLUMNS = 300, 3000
POSITIVES = 10 * torch.arange(ROWS)
TEMPERATURES = [0.05, 0.01, 0.002]
WAYS = ["rows", "weighted", "compiled"]


def sides_in(dtype, *, rows=ROWS, columns=COLUMNS, spread=0.05):
    return [side.to(dtype) for side in embeddings(3, rows, columns, width=64, spread=spread)]


@lru_cache
def wanted(dtype, temperature, symmetric):
    row_weights = torch.full((ROWS,), 1 / ROWS, dtype=torch.float64)
    options = {"temperature": temperature, "symmetric": symmetric}
    return dense_core.losses_and_gradients(*sides_in(dtype), POSITIVES, row_weights, **options)


def gradients(dtype, way, **options):
    """Of queries, documents and temperature, of the mean loss."""

    def total(queries, documents, temperature):
        keys = options | {"temperature": temperature}
        if way == "weighted":
            weights = torch.full((ROWS,), 1 / ROWS)
            return weighted_infonce(queries, documents, POSITIVES, row_weights=weights, **keys)[0]
        return grouped_infonce(queries, documents, POSITIVES, **keys).mean()

    if way == "compiled":
        torch._dynamo.reset()
        total = torch.compile(total, fullgraph=True, backend="aot_eager")
    inputs = [*sides_in(dtype), torch.tensor(options.pop("temperature"))]
    return torch.autograd.grad(total(*(side.requires_grad_() for side in inputs)), inputs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_what_all_have_in_common_cancels(way, temperature, symmetric, implementation):
    """A logit of 500 is a float32 in steps of 3e-5: shares by such totals, and of such scores, do not add up to 0."""
    options = {"temperature": temperature, "symmetric": symmetric, "implementation": implementation}
    of_queries, of_documents, of_temperature = gradients(torch.float32, way, **options)
    exact = wanted(torch.float32, temperature, symmetric)
    assert distance(of_queries, exact.of_queries) < 5e-5
    assert distance(of_documents, exact.of_documents) < 4e-6
    assert distance(of_temperature, exact.of_temperature) < 1e-3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_bfloat16_gradients_are_off_by_their_own_rounding_only(temperature, symmetric, implementation):
    """All shares of a row may be rounded alike: what that takes from a column is given back along the mean query."""
    options = {"temperature": temperature, "symmetric": symmetric, "implementation": implementation}
    exact = wanted(torch.bfloat16, temperature, symmetric)
    for way in WAYS[:2]:
        found = gradients(torch.bfloat16, way, **options)
        for got, want in zip(found, (exact.of_queries, exact.of_documents), strict=False):
            assert distance(got, want) < 1.1 * distance(want.bfloat16(), want) < 2e-3
