"""The library's operators as torch sees them: shapes, the derivative of infonce_forward, and numbers left open."""

import pytest
import torch

from tdro_hpc.losses import fused, grouped_infonce
from tests.reference.loss_cases import choices, distance, embeddings, needs_library

pytestmark = needs_library


def problem(*, masked, requires_grad=False):
    """Queries, documents, positives, temperature, and the masks in the order of the operators."""
    queries, documents = (vectors.float().requires_grad_(requires_grad) for vectors in embeddings(1, 6, 14))
    positives, options = choices(2, 6, 14)
    ids = options["document_ids"]
    masks = options["query_group"], options["document_group"], ids, ids[positives], options["known_positive_ids"]
    masks = (*masks, 0.05, options["column_weights"].log()) if masked else (None,) * 7
    temperature = torch.tensor(0.1, requires_grad=requires_grad)
    return queries, documents, positives, temperature, masks


@pytest.fixture(autouse=True)
def library():
    assert fused.obstacle(torch.float32, "cpu") == ""
    return torch.ops.tdro_hpc


@pytest.mark.parametrize("masked", [False, True])
def test_the_operators_of_the_host_keep_to_their_schema_and_their_shapes(library, masked):
    queries, documents, positives, temperature, masks = problem(masked=masked)
    inputs, weights = (queries, documents, positives, temperature, *masks), torch.linspace(-1, 2, 6)
    found = library.infonce_losses(*inputs, True, 1 << 24)
    assert found[2].numel() > 0
    # What it keeps is for losses_backward only, and some of that memory is never written: no two calls give the same.
    torch.library.opcheck(
        library.infonce_losses.default, (*inputs, True, 1 << 24), test_utils=("test_schema", "test_faketensor")
    )
    for sides in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(library.infonce_losses_backward.default, (*inputs, *found, weights, 1 << 24, *sides))
        torch.library.opcheck(library.infonce_gradients.default, (*inputs, weights, 1 << 24, *sides))


def test_the_operators_without_options_keep_to_their_schema_and_their_shapes(library):
    queries, documents, positives, *_ = problem(masked=False)
    inputs, weights, options = (queries, documents, positives), torch.linspace(-1, 2, 6), (0.1, 1 << 24)
    _, *found = library.infonce_plain_losses(*inputs, *options)
    assert found[1].numel() > 0
    torch.library.opcheck(  # as above
        library.infonce_plain_losses.default, (*inputs, *options), test_utils=("test_schema", "test_faketensor")
    )
    for sides in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(
            library.infonce_plain_losses_backward.default, (*inputs, *found, weights, *options, *sides)
        )
        torch.library.opcheck(library.infonce_plain_weighted.default, (*inputs, weights, *options, *sides))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_sums_of_the_operator_have_a_derivative(library, masked, symmetric, given):
    queries, documents, positives, temperature, masks = problem(masked=masked, requires_grad=True)
    if symmetric:  # weights of columns do not go with it
        masks = *masks[:6], None
    scores = torch.linspace(5, 9, 6).requires_grad_() if given else None
    inputs = queries, documents, positives, scores, temperature, *masks, symmetric
    torch.library.opcheck(library.infonce_forward.default, inputs)
    wanted = [tensor for tensor in (queries, documents, scores, temperature) if tensor is not None]
    results = []
    for forward in (library.infonce_forward, plain_sums):
        sums = [values.masked_fill(values.isinf(), 0) for values in forward(*inputs)]
        total = sum((values * torch.linspace(-1, 2, len(values))).sum() for values in sums)
        results.append([*sums, *torch.autograd.grad(total, wanted, allow_unused=True)])
    assert all(distance(got, want) < 1e-5 for got, want in zip(*results, strict=True))


def plain_sums(queries, documents, positives, given, temperature, *more):
    """infonce_forward by all scores at once, which autograd follows."""
    query_group, document_group, column_ids, positive_ids, known_ids, margin, log_weights, symmetric = more
    scores = queries @ documents.T / temperature
    of_positives = scores.gather(1, positives[:, None])[:, 0] if given is None else given.clone()
    out = torch.nn.functional.one_hot(positives, len(documents)).bool()
    if query_group is not None:
        out = out | (query_group[:, None] != document_group)
        out = out | (column_ids == positive_ids[:, None]) | (column_ids == known_ids[:, :, None]).any(1)
        out = out | (scores > of_positives[:, None] - margin / temperature)
    if log_weights is not None:
        scores = scores + log_weights
    scores = scores.masked_fill(out, -torch.inf)
    columns = masked_sums(scores.T) if symmetric else scores.new_empty(0)
    return of_positives, masked_sums(scores), columns


def masked_sums(scores):
    """logsumexp of each row, without the NaN gradients of a row of nothing."""
    nothing = scores.isinf().all(1)
    sums = torch.logsumexp(scores.masked_fill(nothing[:, None], 0), dim=1)
    return sums.masked_fill(nothing, -torch.inf)


def test_temperatures_and_batches_of_any_size_share_one_compiled_function():
    compiled = torch.compile(
        lambda queries, documents, temperature: grouped_infonce(
            queries, documents, torch.arange(len(queries)), temperature=temperature, implementation="fused"
        ),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for rows, temperature in ((6, 0.1), (9, 0.05), (12, 0.02)):
        sides = [vectors.float() for vectors in embeddings(rows, rows, 2 * rows)]
        found = compiled(*sides, temperature)
        wanted = grouped_infonce(*sides, torch.arange(rows), temperature=temperature, implementation="torch")
        assert distance(found, wanted) < 1e-5


def test_an_input_of_another_type_is_refused(library):
    """Totals are float32 and the sums that they come from float64: read as the other they would be any numbers."""
    queries, documents, positives, temperature, masks = problem(masked=False)
    scores, sums, _ = library.infonce_forward(queries, documents, positives, None, temperature, *masks, False)
    inputs = queries, documents, positives, scores, temperature, *masks
    for shares in ((sums, scores, scores), (scores, scores.double(), scores)):
        with pytest.raises(RuntimeError, match="of another type than torch.float32"):
            library.infonce_backward(*inputs, *shares, None, None)
    with pytest.raises(RuntimeError, match="of another type than torch.int64"):
        library.infonce_forward(queries, documents, positives.int(), None, temperature, *masks, False)


def test_an_input_of_another_length_is_refused(library):
    queries, documents, positives, temperature, masks = problem(masked=False)
    inputs, weights, options = (queries, documents, positives), torch.ones(6), (0.1, 1 << 24)
    _, sums, kept = library.infonce_plain_losses(*inputs, *options)
    with pytest.raises(RuntimeError, match=r"positives must be \[rows\]"):
        library.infonce_forward(queries, documents, positives[:2], None, temperature, *masks, False)
    with pytest.raises(RuntimeError, match=r"row_weights must be \[rows\]"):
        library.infonce_plain_weighted(*inputs, weights[:2], *options, True, True)
    for given in ((sums, kept, weights[:2]), (sums[:, :3].contiguous(), kept, weights)):
        with pytest.raises(RuntimeError, match=r"must be \[(2, )?rows\]"):
            library.infonce_plain_losses_backward(*inputs, *given, *options, True, True)


@pytest.mark.parametrize("workspace", [1 << 21, 1 << 26])
def test_groups_whose_exponentials_fit_are_scored_once(library, workspace):
    """The exponentials of 32 rows with all 24,000 columns need 3 MB, with those of their group 0.25 MB."""
    queries, documents = (side.float() for side in embeddings(1, 96, 24_000, width=32))
    groups = torch.arange(12)
    masks = groups.repeat_interleave(8), groups.repeat_interleave(2000), *(None,) * 5
    inputs = queries, documents, torch.arange(96) * 250, torch.tensor(0.05), *masks
    weights = torch.linspace(-1, 2, 96)
    found = library.infonce_gradients(*inputs, weights, workspace, True, True)
    for group in groups.tolist():
        rows, columns = slice(8 * group, 8 * group + 8), slice(2000 * group, 2000 * group + 2000)
        own = queries[rows], documents[columns], inputs[2][rows] - columns.start, inputs[3], *(None,) * 7
        alone = library.infonce_gradients(*own, weights[rows], 1 << 26, True, True)
        for got, want, part in zip(found, alone, (rows, rows, rows, columns), strict=True):
            assert torch.equal(got[part], want)
