"""grouped_infonce against a slow float64 reference, and the defects that its peers had."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from tdro_hpc.losses import grouped_infonce, tiles
from tests.reference.infonce import slow_infonce


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "BLOCK_ROWS", 3)
    monkeypatch.setattr(tiles, "BLOCK_COLUMNS", 5)


def embeddings(seed, rows, columns, *, width=6, spread=1.0):
    """Unit vectors; a small spread brings all cosines near 1."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(1, width, generator=generator, dtype=torch.float64)
    draw = [torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (rows, columns)]
    return [normalize(centre * (spread < 1) + spread * vectors, dim=1) for vectors in draw]


def choices(seed, rows, columns):
    """Positives, and every group, id and known id that the function takes; ids repeat, groups may be empty."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high, *shape, low=0):
        return torch.randint(low, high, shape, generator=generator)

    return draw(columns, rows), {
        "query_group": draw(5, rows),
        "document_group": draw(6, columns),
        "document_ids": draw(max(2, columns // 2), columns),
        "known_positive_ids": draw(max(2, columns // 2), rows, 2, low=-1),
        "false_negative_margin": 0.05,
    }


def values_and_gradients(function, queries, documents, positives, upstream, **options):
    queries, documents = queries.detach().clone().requires_grad_(), documents.detach().clone().requires_grad_()
    losses = function(queries, documents, positives, **options)
    losses.backward(upstream.to(losses.dtype))
    return losses.detach(), queries.grad, documents.grad


MASKS = [
    [],
    ["query_group", "document_group"],
    ["document_ids"],
    ["document_ids", "known_positive_ids"],
    ["false_negative_margin"],
    ["query_group", "document_group", "document_ids", "known_positive_ids", "false_negative_margin"],
]


@pytest.mark.parametrize("temperature", [0.05, 0.01, 0.002])
@pytest.mark.parametrize("spread", [1.0, 0.05])
@pytest.mark.parametrize("masks", MASKS, ids=lambda names: "+".join(names) or "none")
def test_float32_equals_slow_float64_reference(temperature, spread, masks):
    queries, documents = (vectors.float() for vectors in embeddings(1, 7, 23, spread=spread))
    positives, options = choices(2, 7, 23)
    options = {name: options[name] for name in masks} | {"temperature": temperature}
    upstream = torch.linspace(-1, 2, 7)
    found = values_and_gradients(grouped_infonce, queries, documents, positives, upstream, **options)
    wanted = values_and_gradients(slow_infonce, queries, documents, positives, upstream, **options)
    assert found[0].dtype == torch.float32
    noise = 4e-7 / temperature  # float32 rounding of a cosine, after the division: an absolute error of the logits
    torch.testing.assert_close(found[0].double(), wanted[0].double(), rtol=1e-5, atol=noise)
    for got, want in zip(found[1:], wanted[1:], strict=True):
        assert (got - want).norm() <= 5 * noise * want.norm()  # near cosine 1 it is a difference of near vectors


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(0, 9),
    columns=st.integers(1, 21),
    masks=st.sampled_from(MASKS),
    keep_duplicates=st.booleans(),
    as_sorted=st.booleans(),
)
def test_any_shape_groups_and_masks_equal_the_reference(seed, rows, columns, masks, keep_duplicates, as_sorted):
    queries, documents = embeddings(seed, rows, columns)
    positives, options = choices(seed + 1, rows, columns)
    if as_sorted:
        options["query_group"] = options["query_group"].sort().values
        options["document_group"] = options["document_group"].sort().values
    options = {name: options[name] for name in masks}
    options |= {"temperature": 0.1, "keep_duplicates": keep_duplicates}
    upstream = torch.linspace(1, 2, rows)
    found = values_and_gradients(grouped_infonce, queries, documents, positives, upstream, **options)
    wanted = values_and_gradients(slow_infonce, queries, documents, positives, upstream, **options)
    assert found[0].dtype == torch.float64
    for got, want in zip(found, wanted, strict=True):
        want = torch.zeros_like(got) if want is None else want
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)  # float64 sums in another order


def test_gradcheck():
    queries, documents = (vectors.requires_grad_() for vectors in embeddings(3, 5, 9))
    positives, options = choices(4, 5, 9)

    def weighted(queries, documents):
        losses = grouped_infonce(queries, documents, positives, temperature=0.2, **options)
        return losses * torch.linspace(-1, 2, 5)

    assert torch.autograd.gradcheck(weighted, (queries, documents))


def test_easy_positive_keeps_its_relative_accuracy():
    queries = torch.tensor([[1.0, 0.0]])
    documents = torch.tensor([[1.0, 0.0], [0.84, 0.0]])  # loss log(1 + e^-16), which 1 + e^-16 in float32 rounds away
    losses = grouped_infonce(queries, documents, torch.tensor([0]), temperature=0.01)
    assert losses.tolist() == pytest.approx([1.1253517e-7], rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_scored_in_float32_even_under_autocast(dtype):
    queries, documents = (vectors.to(dtype) for vectors in embeddings(5, 6, 12, spread=0.05))
    positives, upstream = torch.arange(6) * 2, torch.ones(6)
    plain = values_and_gradients(
        grouped_infonce, queries.float(), documents.float(), positives, upstream, temperature=0.002
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = values_and_gradients(grouped_infonce, queries, documents, positives, upstream, temperature=0.002)
    assert found[0].dtype == torch.float32 and found[1].dtype == found[2].dtype == dtype
    assert torch.equal(found[0], plain[0])
    assert torch.equal(found[1], plain[1].to(dtype)) and torch.equal(found[2], plain[2].to(dtype))


def test_float32_inputs_are_not_rounded_by_autocast_or_by_lower_matmul_precision():
    queries, documents = (vectors.float() for vectors in embeddings(5, 6, 12, spread=0.05))
    positives, upstream = torch.arange(6) * 2, torch.ones(6)
    plain = values_and_gradients(grouped_infonce, queries, documents, positives, upstream, temperature=0.002)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = values_and_gradients(grouped_infonce, queries, documents, positives, upstream, temperature=0.002)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(got, want) for got, want in zip(found, plain, strict=True))


def test_scores_of_500_do_not_overflow():
    queries, documents = 30 * torch.eye(3), 30 * torch.eye(3)[[0, 1, 2, 0]]  # scores 0 and 900
    positives = torch.tensor([1, 1, 2])
    found = values_and_gradients(grouped_infonce, queries, documents, positives, torch.ones(3), temperature=1.8)
    assert found[0].tolist() == pytest.approx([500 + 0.6931472, 0, 0])
    assert all(gradient.isfinite().all() for gradient in found[1:])


def test_row_without_negatives_has_loss_zero_and_no_gradient():
    queries, documents = embeddings(6, 3, 4)
    groups = {"query_group": torch.tensor([0, 1, 7]), "document_group": torch.tensor([0, 1, 1, 3])}
    positives = torch.tensor([0, 1, 3])  # alone in group 0; one negative in group 1; group 7 has no column at all
    losses, query_gradient, _ = values_and_gradients(
        grouped_infonce, queries, documents, positives, torch.ones(3), temperature=0.05, **groups
    )
    assert losses[0] == 0 and losses[1] > 0 and losses[2] == 0
    assert (query_gradient[[0, 2]] == 0).all() and (query_gradient[1] != 0).any()


def test_positive_of_another_group_counts():
    queries, documents = embeddings(7, 1, 3)
    losses = grouped_infonce(
        queries,
        documents,
        torch.tensor([2]),
        temperature=0.5,
        query_group=torch.tensor([1]),
        document_group=torch.tensor([1, 0, 0]),
    )
    logits = (documents[[2, 0]] @ queries[0]) / 0.5
    assert losses[0].item() == pytest.approx((torch.logsumexp(logits, 0) - logits[0]).item())


def test_padding_of_known_positives_matches_no_column():
    queries, documents = embeddings(8, 1, 3)
    ids = {"document_ids": torch.tensor([5, -1, -1]), "known_positive_ids": torch.tensor([[-1]])}
    plain = grouped_infonce(queries, documents, torch.tensor([0]), temperature=0.1)
    assert torch.equal(grouped_infonce(queries, documents, torch.tensor([0]), temperature=0.1, **ids), plain)


class Watch(TorchDispatchMode):
    """Largest tensor that any operation makes, and the number of scores that are computed."""

    def __init__(self):
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.products += result.numel() * args[0].shape[-1]
        return result


def watched(rows, columns, *, width=4, **options):
    queries, documents = (vectors.float().requires_grad_() for vectors in embeddings(9, rows, columns, width=width))
    positives = torch.arange(rows) * (columns // rows)
    with Watch() as watch:
        grouped_infonce(queries, documents, positives, temperature=0.05, **options).mean().backward()
    return watch


def test_the_score_matrix_is_never_allocated(monkeypatch):
    monkeypatch.undo()
    rows, columns = 2000, 8000
    ids = torch.arange(columns)
    known = torch.full((rows, 1), -1)
    groups = {"query_group": torch.zeros(rows, dtype=torch.int64), "document_group": torch.zeros_like(ids)}
    for options in ({}, groups, {"document_ids": ids, "known_positive_ids": known, "false_negative_margin": 0.1}):
        assert watched(rows, columns, **options).largest <= tiles.BLOCK_ROWS * tiles.BLOCK_COLUMNS < rows * columns / 8


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
@pytest.mark.parametrize("num_groups", [1, 25, 600])
def test_work_is_the_sum_over_groups(monkeypatch, order, num_groups):
    monkeypatch.undo()
    per_row, rows = 4, 600
    query_group = torch.arange(rows) * num_groups // rows
    if order == "shuffled":
        query_group = query_group[torch.randperm(rows, generator=torch.Generator().manual_seed(0))]
    document_group = query_group.repeat_interleave(per_row)
    watch = watched(rows, rows * per_row, query_group=query_group, document_group=document_group)
    pairs = sum(int((query_group == group).sum()) ** 2 * per_row for group in range(num_groups))
    assert watch.products == 4 * 4 * pairs  # four products of width 4: the scores twice, and the two gradients


def test_same_inputs_give_the_same_bits():
    queries, documents = (vectors.float() for vectors in embeddings(10, 9, 21))
    positives, options = choices(11, 9, 21)
    runs = [
        values_and_gradients(grouped_infonce, queries, documents, positives, torch.ones(9), temperature=0.02, **options)
        for _ in range(2)
    ]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_gradient_buffers_are_handed_over_and_not_copied():
    queries, documents = (vectors.float().requires_grad_() for vectors in embeddings(12, 4, 8))
    addresses = []
    for side in (queries, documents):
        side.register_hook(lambda gradient: addresses.append(gradient.data_ptr()))
    grouped_infonce(queries, documents, torch.arange(4), temperature=0.1).sum().backward()
    assert sorted(addresses) == sorted([queries.grad.data_ptr(), documents.grad.data_ptr()])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("masks", [MASKS[0], MASKS[-1]], ids=["none", "all"])
def test_cuda_gives_what_the_cpu_gives_and_the_same_bits_each_time(masks):
    queries, documents = (vectors.float() for vectors in embeddings(14, 40, 90))
    positives, options = choices(15, 40, 90)
    positives = positives % 7  # many rows share a positive: their gradients must be summed in one order
    options = {name: options[name] for name in masks}
    wanted = values_and_gradients(
        grouped_infonce, queries, documents, positives, torch.ones(40), temperature=0.02, **options
    )
    on_gpu = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    inputs = queries.cuda(), documents.cuda(), positives.cuda(), torch.ones(40).cuda()
    first, again = (values_and_gradients(grouped_infonce, *inputs, temperature=0.02, **on_gpu) for _ in range(2))
    for got, want, repeated in zip(first, wanted, again, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4)  # float32 scores over a temperature of 0.02
        assert torch.equal(got, repeated)


def test_losses_may_be_changed_in_place_before_the_backward():
    queries, documents = (vectors.requires_grad_() for vectors in embeddings(13, 4, 8))
    plain = values_and_gradients(
        grouped_infonce, queries, documents, torch.arange(4), torch.full((4,), 3.0), temperature=0.1
    )
    grouped_infonce(queries, documents, torch.arange(4), temperature=0.1).mul_(3).sum().backward()
    torch.testing.assert_close(queries.grad, plain[1])


GOOD = {
    "queries": torch.ones(2, 3),
    "documents": torch.ones(4, 3),
    "positives": torch.tensor([0, 2]),
    "temperature": 0.1,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; it must be a number > 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": torch.tensor(0.1)}, "must be a number"),
        ({"documents": torch.ones(4, 2)}, r"queries are \[2, 3\] and documents \[4, 2\]"),
        ({"documents": torch.ones(4, 3).double()}, "one float type"),
        ({"queries": torch.ones(2, 3).long(), "documents": torch.ones(4, 3).long()}, "one float type"),
        ({"documents": torch.ones(4, 3, device="meta")}, "documents on meta"),
        ({"positives": torch.tensor([0, 4])}, r"positives\[1\] is 4; it must be the number of a column, 0 to 3"),
        ({"positives": torch.tensor([-1, 0])}, r"positives\[0\] is -1"),
        ({"positives": torch.tensor([0])}, r"positives has shape \[1\]; it must be \[2\]"),
        ({"positives": torch.tensor([0, 1]).int()}, "positives is torch.int32; it must be torch.int64"),
        ({"query_group": torch.tensor([0, 1])}, "give both or none"),
        ({"known_positive_ids": torch.tensor([[1], [1]])}, "give document_ids too"),
        ({"document_ids": torch.arange(3)}, r"document_ids has shape \[3\]; it must be \[4\]"),
        ({"false_negative_margin": float("inf")}, "false_negative_margin is inf"),
    ],
)
def test_wrong_arguments_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        grouped_infonce(**(GOOD | change))
