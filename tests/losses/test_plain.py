"""Calls without options take fewer steps: which these are, and that they give what all others give."""

import pytest
import torch
from torch.autograd import forward_ad

from tdro_hpc.losses import grouped_infonce, weighted_infonce
from tests.reference.loss_cases import embeddings, needs_library

pytestmark = needs_library

ROWS, COLUMNS = 9, 21


def call(function, queries, documents, temperature=0.05, positives=None, **options):
    """What is differentiated, and the losses [ROWS]."""
    positives = torch.arange(ROWS) * 2 if positives is None else positives
    if function is weighted_infonce:
        options = {"row_weights": torch.linspace(-1, 2, ROWS)} | options
        return function(queries, documents, positives, temperature=temperature, implementation="fused", **options)
    losses = function(queries, documents, positives, temperature=temperature, implementation="fused", **options)
    return losses.mul(torch.linspace(-1, 2, ROWS)).sum(), losses


def is_plain(total):
    """Whether a loss has come by the short way."""
    seen, left = set(), [total.grad_fn]
    while left:
        node = left.pop()
        seen.add(node.name())
        left += [following for following, _ in node.next_functions if following is not None]
    return bool(seen & {"PlainLossesBackward", "PlainWeightedBackward"})


both = pytest.mark.parametrize("function", [grouped_infonce, weighted_infonce])


def sides(rows=ROWS, columns=COLUMNS, width=6):
    return [vectors.float().requires_grad_() for vectors in embeddings(3, rows, columns, width=width)]


@both
@pytest.mark.parametrize("frozen", [None, 0, 1])
@pytest.mark.parametrize("columns", [COLUMNS, 3000])  # of one strip, and of several
def test_the_bits_are_those_of_a_call_with_options(function, frozen, columns):
    given = sides(columns=columns, width=64)
    if frozen is not None:
        given[frozen] = given[frozen].detach()
    asked = [side for side in given if side.requires_grad]
    short, long = (call(function, *given, temperature) for temperature in (0.05, torch.tensor(0.05)))
    assert is_plain(short[0]) and not is_plain(long[0])
    torch.testing.assert_close(short[0], long[0], rtol=1e-6, atol=0)
    found = [[losses, *torch.autograd.grad(2 * total, asked)] for total, losses in (short, long)]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@both
@pytest.mark.parametrize(
    "options",
    [
        {"query_group": torch.zeros(ROWS).long(), "document_group": torch.zeros(COLUMNS).long()},
        {"document_ids": torch.arange(COLUMNS)},
        {"document_ids": torch.arange(COLUMNS), "known_positive_ids": torch.full((ROWS, 1), -1)},
        {"false_negative_margin": -9.0},
        {"column_weights": torch.ones(COLUMNS)},
        {"symmetric": True},
        {"temperature": torch.tensor(0.05)},
        {"implementation": "torch"},
    ],
    ids=lambda options: "+".join(options),
)
def test_options_are_not_passed_over(function, options):
    queries, documents = sides()
    options = {"temperature": 0.05, "implementation": "fused"} | options
    if function is weighted_infonce:
        options["row_weights"] = torch.ones(ROWS)
    found = function(queries, documents, torch.arange(ROWS), **options)
    assert not is_plain(found[0])


@both
def test_other_embeddings_take_the_other_way_and_give_the_same(function):
    queries, documents = sides()
    total, losses = call(function, queries, documents)
    wanted = torch.autograd.grad(total, (queries, documents))
    across = [side.detach().T.contiguous().T.requires_grad_() for side in (queries, documents)]
    wider = [side.detach().double().requires_grad_() for side in (queries, documents)]
    for given, implementation in ((across, "fused"), (wider, "torch"), ((queries, across[1]), "fused")):
        options = {"row_weights": torch.linspace(-1, 2, ROWS)} if function is weighted_infonce else {}
        options |= {"temperature": 0.05, "implementation": implementation}
        found = function(*given, torch.arange(ROWS) * 2, **options)
        total = found[0] if function is weighted_infonce else found.mul(torch.linspace(-1, 2, ROWS)).sum()
        assert not is_plain(total)
        for got, want in zip(torch.autograd.grad(total, given), wanted, strict=True):
            torch.testing.assert_close(got.float(), want, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(call(function, queries, documents)[1], losses)


def test_weights_that_need_a_gradient_or_are_of_another_type_take_the_other_way():
    queries, documents = sides()
    total, _ = call(weighted_infonce, queries, documents)
    for weights in (torch.linspace(-1, 2, ROWS).requires_grad_(), torch.linspace(-1, 2, ROWS, dtype=torch.float64)):
        found, _ = call(weighted_infonce, queries, documents, row_weights=weights)
        assert is_plain(total) and not is_plain(found)
        torch.testing.assert_close(found, total)


@pytest.mark.parametrize("number", range(4))
def test_each_input_may_step_over_memory(number):
    queries, documents = sides()
    inputs = [queries, documents, torch.arange(ROWS) * 2, torch.linspace(-1, 2, ROWS)]
    found = []
    for _ in range(2):
        *given, positives, weights = inputs
        total, _ = call(weighted_infonce, *given, positives=positives, row_weights=weights)
        found.append([total, *torch.autograd.grad(total, given)])
        inputs[number] = torch.stack([inputs[number].detach()] * 2, dim=-1)[..., 0]
        if number < 2:
            inputs[number].requires_grad_()
    assert is_plain(found[0][0]) and not is_plain(found[1][0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_tangent_of_the_weights_is_refused_and_not_passed_over():
    queries, documents = sides()
    with forward_ad.dual_level():
        weights = forward_ad.make_dual(torch.ones(ROWS), torch.ones(ROWS))
        with pytest.raises(RuntimeError, match="jvp"):
            call(weighted_infonce, queries, documents, row_weights=weights)


def test_an_upstream_gradient_that_steps_over_memory_is_read_right():
    queries, documents = sides()
    weights = torch.linspace(-1, 2, 2 * ROWS)[::2]
    found = []
    for each in (weights, weights.contiguous()):
        _, losses = call(grouped_infonce, queries, documents)
        assert is_plain(losses)
        found.append(torch.autograd.grad(losses, (queries, documents), each))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@both
def test_a_gradient_of_the_gradient_is_refused(function):
    queries, documents = sides()
    total, _ = call(function, queries, documents)
    assert is_plain(total)
    factor = torch.ones((), requires_grad=True)
    gradient, _ = torch.autograd.grad(factor * total, (queries, documents), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_losses_without_the_total_ask_for_nothing():
    queries, documents = sides()
    total, losses = call(weighted_infonce, queries, documents)
    assert is_plain(total) and not losses.requires_grad
    losses.zero_()  # they are the caller's
    (again, *_) = torch.autograd.grad(total, (queries, documents))
    assert again.abs().sum() > 0


@both
def test_a_positive_that_is_no_column_is_named(function):
    queries, documents = sides()
    with pytest.raises(ValueError, match=r"positives\[2\] is 21; it must be the number of a column, 0 to 20"):
        call(function, queries, documents, positives=torch.tensor([0, 1, 21, 3, 4, 5, 6, 7, 8]))
