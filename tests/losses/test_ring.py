"""The ring of one rank, which sends to itself: the same numbers as without it. More ranks: tests/distributed."""

import pytest
import torch

from tdro_hpc.losses import grouped_infonce
from tdro_hpc.losses.ring import ring_infonce
from tests.reference.loss_cases import IMPLEMENTATIONS, embeddings

ROWS, PER_QUERY = 5, 3


def problem(dtype=torch.float32):
    queries, documents = (part.to(dtype).requires_grad_() for part in embeddings(3, ROWS, ROWS * PER_QUERY))
    return queries, documents, PER_QUERY * torch.arange(ROWS)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_rank_alone_gets_the_loss_of_its_columns(dtype, implementation):
    queries, documents, positives = problem(dtype)
    options = {"temperature": 0.1, "implementation": implementation, "false_negative_margin": -0.5}
    groups = torch.tensor([0, 0, 1, 1, 1])
    options |= {"query_group": groups, "document_group": groups.repeat_interleave(PER_QUERY)}
    found = ring_infonce(queries, documents, positives, sizes=[len(documents)], **options)
    wanted = grouped_infonce(queries, documents, positives, **options)
    assert wanted.abs().sum() > 1
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)  # the same sums, added up once more
    weights = torch.arange(1.0, ROWS + 1)
    gradients = [torch.autograd.grad((weights * losses).sum(), [queries, documents]) for losses in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_temperature_may_be_learned(implementation):
    queries, documents, positives = problem()
    temperatures = [torch.tensor(0.1, requires_grad=True) for _ in range(2)]
    options = {"implementation": implementation}
    losses = ring_infonce(queries, documents, positives, sizes=[len(documents)], temperature=temperatures[0], **options)
    wanted = grouped_infonce(queries, documents, positives, temperature=temperatures[1], **options)
    upstream = torch.linspace(-1, 2, ROWS)
    (upstream * losses).sum().backward()
    (upstream * wanted).sum().backward()
    assert temperatures[1].grad.abs() > 1
    torch.testing.assert_close(temperatures[0].grad, temperatures[1].grad, rtol=1e-5, atol=0)


def test_side_without_gradient_gets_none_and_losses_alone_make_no_graph():
    queries, documents, positives = problem()
    losses = ring_infonce(queries, documents.detach(), positives, sizes=[len(documents)], temperature=0.1)
    losses.sum().backward()
    assert queries.grad is not None and documents.grad is None
    with torch.no_grad():
        alone = ring_infonce(queries, documents, positives, sizes=[len(documents)], temperature=0.1)
    assert not alone.requires_grad and torch.equal(alone, losses)


def test_what_grouped_infonce_refuses_is_refused():
    queries, documents, positives = problem()
    with pytest.raises(ValueError, match="temperature is 0.0; it must be a number > 0"):
        ring_infonce(queries, documents, positives, sizes=[len(documents)], temperature=0.0)
    with pytest.raises(ValueError, match=r"positives has shape \[4\]; it must be \[5\]"):
        ring_infonce(queries, documents, positives[1:], sizes=[len(documents)], temperature=0.1)
    with pytest.raises(ValueError, match="positives.4. is 15; it must be the number of a column, 0 to 14"):
        ring_infonce(queries, documents, positives + 3, sizes=[len(documents)], temperature=0.1)
    with pytest.raises(AssertionError, match=r"15 columns, but \[14\] were announced"):
        ring_infonce(queries, documents, positives, sizes=[14], temperature=0.1)
