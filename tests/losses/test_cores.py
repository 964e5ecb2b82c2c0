"""The three functions that both implementations give: parts of the columns, the work they do, the memory they take."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tdro_hpc.losses import fused, grouped_infonce, tiles, torch_core, weighted_infonce
from tests.reference.loss_cases import IMPLEMENTATIONS, choices, distance, embeddings, needs_library

CORES = [torch_core, pytest.param(fused, marks=needs_library)]
TEMPERATURE = torch.tensor(0.05)


def masks_of(options, columns):
    """The masks as the three functions take them, for a slice of the columns; `positive_ids` of all."""
    return (
        options["query_group"],
        options["document_group"][columns].contiguous(),
        options["document_ids"][columns].contiguous(),
        options["positive_ids"],
        options["known_positive_ids"],
        options["false_negative_margin"],
        options["column_weights"].log()[columns].contiguous(),
    )


def problem(rows=9, columns=40, width=13):
    fused.obstacle(torch.float32, "cpu")  # loads the library
    queries, documents = (vectors.float() for vectors in embeddings(1, rows, columns, width=width))
    positives, options = choices(2, rows, columns)
    options["positive_ids"] = options["document_ids"][positives]
    return queries, documents, positives, options


@pytest.mark.parametrize("core", CORES)
def test_parts_of_the_columns_add_up_to_the_whole(core):
    queries, documents, positives, options = problem()
    whole = masks_of(options, slice(None))
    scores, negatives, none = core.forward(queries, documents, positives, None, TEMPERATURE, *whole, False)
    assert none.shape == (0,)
    factors, positive_factors = torch.linspace(-1, 2, 9), torch.linspace(2, -1, 9)
    shares = negatives.clamp(min=-1e30).float(), factors, positive_factors, None, None
    wanted = core.backward(queries, documents, positives, scores, TEMPERATURE, *whole, *shares)
    merged, for_queries, for_documents = torch.full((9,), -torch.inf), 0, []
    for part in (slice(0, 7), slice(7, 8), slice(8, 40)):
        masks, shard, local = masks_of(options, part), documents[part].contiguous(), positives - part.start
        kept, sums, _ = core.forward(queries, shard, local, scores, TEMPERATURE, *masks, False)
        assert torch.equal(kept, scores) and kept.data_ptr() != scores.data_ptr()
        merged = torch.logaddexp(merged, sums)
        gradients = core.backward(queries, shard, local, scores, TEMPERATURE, *masks, *shares)
        for_queries = for_queries + gradients[0]
        for_documents.append(gradients[1])
    torch.testing.assert_close(merged, negatives, rtol=1e-5, atol=1e-6)  # float32 sums in another order
    assert distance(for_queries, wanted[0]) < 1e-5 and distance(torch.cat(for_documents), wanted[1]) < 1e-5


@needs_library
@pytest.mark.parametrize("symmetric", [False, True])
def test_both_give_the_same(symmetric):
    queries, documents, positives, options = problem(rows=70, columns=300, width=65)
    masks = masks_of(options, slice(None))
    masks = masks[:-1] + (None,) if symmetric else masks
    found, wanted = (
        core.forward(queries, documents, positives, None, TEMPERATURE, *masks, symmetric)
        for core in (fused, torch_core)
    )
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # logits up to 20, float32
    generator = torch.Generator().manual_seed(0)
    row_totals, column_totals = (sums.clamp(min=-1e30).float() for sums in wanted[1:])
    row_factors, positive_factors = torch.randn(2, 70, generator=generator)
    column_factors = torch.randn(300, generator=generator) if symmetric else None
    shares = row_totals, row_factors, positive_factors, column_totals if symmetric else None, column_factors
    found, wanted = (
        core.backward(queries, documents, positives, wanted[0], TEMPERATURE, *masks, *shares)
        for core in (fused, torch_core)
    )
    assert all(distance(got, want) < 2e-5 for got, want in zip(found, wanted, strict=True))


@pytest.mark.parametrize("core", CORES)
def test_no_rows_or_no_columns_is_no_special_case(core):
    fused.obstacle(torch.float32, "cpu")
    nothing, masks = torch.zeros(0, dtype=torch.int64), (None,) * 7
    some, none = torch.ones(3, 5), torch.ones(0, 5)
    scores, rows, columns = core.forward(none, some, nothing, None, TEMPERATURE, *masks, True)
    assert scores.shape == rows.shape == (0,) and torch.equal(columns, torch.full((3,), -torch.inf))
    elsewhere, given = torch.tensor([-1, 0, 7]), torch.ones(3)
    scores, rows, columns = core.forward(some, none, elsewhere, given, TEMPERATURE, *masks, True)
    assert torch.equal(rows, torch.full((3,), -torch.inf)) and columns.shape == (0,)
    shares = torch.zeros(3), torch.ones(3), torch.ones(3), None, None
    for_queries, for_documents = core.backward(some, none, elsewhere, given, TEMPERATURE, *masks, *shares)
    assert torch.equal(for_queries, torch.zeros(3, 5)) and for_documents.shape == (0, 5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_gradient_of_a_batch_without_rows(implementation):
    documents = torch.ones(3, 5, requires_grad=True)
    inputs = torch.ones(0, 5), documents, torch.zeros(0, dtype=torch.int64)
    options = {"temperature": 0.1, "implementation": implementation}
    grouped_infonce(*inputs, **options).sum().backward()
    total, losses = weighted_infonce(*inputs, row_weights=torch.ones(0), **options)
    total.backward()
    assert total == 0 and losses.shape == (0,) and torch.equal(documents.grad, torch.zeros(3, 5))


def test_gradcheck():
    queries, documents = (vectors.requires_grad_() for vectors in embeddings(3, 5, 9))
    positives, options = choices(4, 5, 9)
    weights, temperature = torch.linspace(-1, 2, 5).double(), torch.tensor(0.2, dtype=torch.float64, requires_grad=True)

    def grouped(queries, documents, temperature):
        return grouped_infonce(queries, documents, positives, temperature=temperature, **options) * weights

    def both_directions(queries, documents, temperature):
        keys = {name: value for name, value in options.items() if name != "column_weights"}
        return grouped_infonce(queries, documents, positives, temperature=temperature, symmetric=True, **keys) * weights

    def weighted(queries, documents, temperature, weights):
        return weighted_infonce(queries, documents, positives, temperature=temperature, row_weights=weights, **options)[
            0
        ]

    inputs = queries, documents, temperature
    assert torch.autograd.gradcheck(grouped, inputs)
    assert torch.autograd.gradcheck(both_directions, inputs)
    assert torch.autograd.gradcheck(weighted, (*inputs, weights.requires_grad_()))


class Watch(TorchDispatchMode):
    """Largest tensor that any operation makes, and the work of the products."""

    PRODUCTS = {torch.ops.aten.mm.default: 0, torch.ops.aten.bmm.default: 0, torch.ops.aten.addmm_.default: 1}

    def __init__(self):
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        if function in self.PRODUCTS:
            self.products += result.numel() * args[self.PRODUCTS[function]].shape[-1]
        return result


def watched(loss, rows, columns, *, width=4, **options):
    queries, documents = (vectors.float().requires_grad_() for vectors in embeddings(9, rows, columns, width=width))
    with Watch() as watch:
        loss(queries, documents, torch.arange(rows) * (columns // rows), temperature=0.05, **options).backward()
    return watch


def mean(*inputs, **options):
    return grouped_infonce(*inputs, **options).mean()


def weighted(queries, *inputs, **options):
    return weighted_infonce(queries, *inputs, row_weights=torch.ones(len(queries)), **options)[0]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("loss", [mean, weighted])
def test_no_tensor_is_as_large_as_the_scores(implementation, loss):
    rows, columns = 2000, 20000
    # The library keeps exponentials of some rows between forward and backward: at most 16 MB.
    limit = 2**22 if implementation == "fused" else tiles.BLOCK_ROWS * tiles.BLOCK_COLUMNS
    ids = torch.arange(columns)
    known = torch.full((rows, 1), -1)
    groups = {"query_group": torch.zeros(rows, dtype=torch.int64), "document_group": torch.zeros_like(ids)}
    own = {"query_group": torch.arange(rows), "document_group": ids // (columns // rows)}
    every = {"document_ids": ids, "known_positive_ids": known, "false_negative_margin": 0.1}
    for options in ({}, groups, own, every, {"symmetric": True}, own | {"symmetric": True}):
        watch = watched(loss, rows, columns, implementation=implementation, **options)
        assert watch.largest <= limit < rows * columns / 8


@pytest.mark.parametrize("loss", [mean, weighted])
@pytest.mark.parametrize("order", ["sorted", "shuffled"])
@pytest.mark.parametrize("num_groups", [1, 25, 600])
def test_work_is_the_sum_over_groups(order, num_groups, loss):
    per_row, rows = 4, 600
    query_group = torch.arange(rows) * num_groups // rows
    if order == "shuffled":
        query_group = query_group[torch.randperm(rows, generator=torch.Generator().manual_seed(0))]
    document_group = query_group.repeat_interleave(per_row)
    groups = {"query_group": query_group, "document_group": document_group}
    watch = watched(loss, rows, rows * per_row, implementation="torch", **groups)
    pairs = sum(int((query_group == group).sum()) ** 2 * per_row for group in range(num_groups))
    # Products of width 4: the scores, twice where the weights come after the losses, and the two gradients.
    assert watch.products == (4 if loss is mean else 3) * 4 * pairs
