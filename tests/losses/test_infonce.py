"""grouped_infonce and weighted_infonce against a slow float64 reference, by both implementations."""

import pytest
import torch

from tdro_hpc.losses import grouped_infonce, tiles, weighted_infonce
from tests.reference.infonce import slow_infonce
from tests.reference.loss_cases import (
    IMPLEMENTATIONS,
    MASKS,
    choices,
    distance,
    embeddings,
    values_and_gradients,
    with_hard_negatives,
)

pytestmark = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
TEMPERATURES = [1.0, 0.05, 0.01, 0.002]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of torch as small as the examples, so that these have several. Those of the library are fixed."""
    for name, size in {"BLOCK_ROWS": 3, "BLOCK_COLUMNS": 5, "PANEL_SCORES": 40, "PANEL_ROWS": 2}.items():
        monkeypatch.setattr(tiles, name, size)


def noise_of(temperature):
    """Error of a logit: float32 rounding of a cosine, divided by the temperature, and that of the sums it goes into."""
    return 4e-7 / temperature + 2e-6


def check(queries, documents, positives, upstream, *, implementation, **options):
    """Float32 results against the reference on the same values."""
    queries, documents = queries.float(), documents.float()
    found = values_and_gradients(
        grouped_infonce, queries, documents, positives, upstream, implementation=implementation, **options
    )
    wanted = values_and_gradients(slow_infonce, queries, documents, positives, upstream, **options)
    noise = noise_of(options["temperature"])
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0].double(), wanted[0].double(), rtol=1e-5, atol=noise)
    for got, want in zip(found[1:], wanted[1:], strict=True):
        assert (got - want).norm() <= 5 * noise * want.norm()  # near cosine 1 it is a difference of near vectors


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("spread", [1.0, 0.05])
@pytest.mark.parametrize("masks", MASKS, ids=lambda names: "+".join(names) or "none")
def test_float32_equals_slow_float64_reference(implementation, temperature, spread, masks):
    queries, documents = embeddings(1, 7, 23, spread=spread)
    positives, options = choices(2, 7, 23)
    options = {name: options[name] for name in masks} | {"temperature": temperature}
    check(queries, documents, positives, torch.linspace(-1, 2, 7), implementation=implementation, **options)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("spread", [1.0, 0.05])
@pytest.mark.parametrize("masks", [MASKS[0], MASKS[-1]], ids=["none", "all"])
def test_symmetric_equals_slow_float64_reference_also_where_rows_share_a_positive(
    implementation, temperature, spread, masks
):
    queries, documents = embeddings(1, 9, 12, spread=spread)
    _, options = choices(2, 9, 12)
    options = {name: options[name] for name in masks} | {"temperature": temperature, "symmetric": True}
    positives = torch.tensor([0, 3, 3, 3, 7, 11, 7, 5, 2])
    check(queries, documents, positives, torch.linspace(-1, 2, 9), implementation=implementation, **options)


@pytest.mark.parametrize(
    ("rows", "columns", "width"),
    [(1, 1, 1), (1, 2, 1), (2, 3, 7), (17, 33, 65), (64, 64, 31), (130, 260, 16), (33, 4100, 19), (600, 70, 8)],
)
def test_shapes_that_fill_no_tile_of_the_library(monkeypatch, implementation, rows, columns, width):
    monkeypatch.undo()
    queries, documents = embeddings(3, rows, columns, width=width)
    positives, options = choices(4, rows, columns)
    for names in (MASKS[0], MASKS[1], MASKS[-1]):
        chosen = {name: options[name] for name in names} | {"temperature": 0.05}
        check(queries, documents, positives, torch.ones(rows), implementation=implementation, **chosen)


def test_a_hundred_thousand_columns(monkeypatch, implementation):
    monkeypatch.undo()
    queries, documents = embeddings(5, 3, 100_000, width=8)
    positives = torch.tensor([99_999, 0, 50_000])
    check(queries, documents, positives, torch.ones(3), implementation=implementation, temperature=0.05)


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
@pytest.mark.parametrize("sizes", [[40], [1] * 40, [1, 1, 2, 3, 33], [20, 0, 20]], ids=str)
def test_groups_of_any_size_and_order(implementation, order, sizes):
    rows = sum(sizes)
    generator = torch.Generator().manual_seed(0)
    query_group = torch.repeat_interleave(torch.arange(len(sizes)) - 2, torch.tensor(sizes))  # ids below 0 as well
    document_group = query_group.repeat_interleave(3)
    if order == "shuffled":
        query_group = query_group[torch.randperm(rows, generator=generator)]
        document_group = document_group[torch.randperm(3 * rows, generator=generator)]
    queries, documents = embeddings(6, rows, 3 * rows)
    groups = {"query_group": query_group, "document_group": document_group, "temperature": 0.05}
    positives = torch.randint(3 * rows, (rows,), generator=generator)
    for symmetric in (False, True):
        upstream = torch.linspace(-1, 2, rows)
        options = groups | {"symmetric": symmetric, "implementation": implementation}
        check(queries, documents, positives, upstream, **options)


# Of the gradients, relative, on the same values in float64: the last rounding is 1.7e-3 and 2.1e-4; the library forms
# gradients of bfloat16 embeddings from shares in bfloat16.
HALF_BOUNDS = {torch.bfloat16: 3e-3, torch.float16: 4e-4}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", HALF_BOUNDS, ids=str)
def test_half_precision_gradients_are_as_good_as_their_type_at_every_temperature(
    monkeypatch, implementation, dtype, temperature, symmetric
):
    monkeypatch.undo()
    options = {"temperature": temperature, "symmetric": symmetric}
    upstream = torch.linspace(0.1, 1, 48)
    bound = HALF_BOUNDS[dtype]
    near_one = *embeddings(1, 48, 192, width=64, spread=0.05), torch.arange(48) * 4
    for queries, documents, positives in (with_hard_negatives(1, 48, 192), near_one):
        inputs = queries.to(dtype), documents.to(dtype), positives, upstream
        found = values_and_gradients(grouped_infonce, *inputs, implementation=implementation, **options)
        wanted = values_and_gradients(
            slow_infonce, inputs[0].double(), inputs[1].double(), positives, upstream, **options
        )
        assert found[0].dtype == torch.float32 and found[1].dtype == found[2].dtype == dtype
        assert distance(found[0], wanted[0]) <= 1e-4
        assert all(distance(got, want) <= bound for got, want in zip(found[1:], wanted[1:], strict=True))


@pytest.mark.parametrize("rows", [1, 2, 3, 33])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_BOUNDS], ids=str)
def test_symmetric_gradients_of_documents_that_are_far_from_all_queries(implementation, dtype, rows):
    """Scores of -300 at T = 0.002: any row of zeros that a tile is filled up with would be e^300 nearer."""
    queries, documents = embeddings(1, rows, 5, width=16, spread=0.05)
    inputs = queries.to(dtype), -documents.to(dtype), torch.arange(rows) % 5, torch.linspace(-1, 2, rows)
    options = {"temperature": 0.002, "symmetric": True}
    found = values_and_gradients(grouped_infonce, *inputs, implementation=implementation, **options)
    wanted = values_and_gradients(slow_infonce, *(side.double() for side in inputs[:2]), *inputs[2:], **options)
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-5, atol=noise_of(0.002))
    bound = 1e-2 if dtype == torch.bfloat16 else 5 * noise_of(0.002)  # near cosine 1, as above; rows share positives
    assert all(distance(got, want) <= bound for got, want in zip(found[1:], wanted[1:], strict=True))


def test_float32_gradients_with_hard_negatives_at_the_lowest_temperature(monkeypatch, implementation):
    monkeypatch.undo()
    queries, documents, positives = with_hard_negatives(1, 48, 192)
    inputs = queries.float(), documents.float(), positives, torch.linspace(0.1, 1, 48)
    found = values_and_gradients(grouped_infonce, *inputs, temperature=0.002, implementation=implementation)
    wanted = values_and_gradients(slow_infonce, *inputs, temperature=0.002)
    assert distance(found[0], wanted[0]) <= 5e-5  # logits of 400, that float32 has in steps of 3e-5
    assert all(distance(got, want) <= 2e-4 for got, want in zip(found[1:], wanted[1:], strict=True))


def test_autocast_and_lower_matmul_precision_change_nothing(monkeypatch, implementation):
    monkeypatch.undo()  # small products are made in float32 anyhow
    queries, documents = (vectors.float() for vectors in embeddings(5, 256, 256, width=256, spread=0.05))
    inputs = queries, documents, torch.arange(256), torch.ones(256)
    options = {"temperature": 0.002, "implementation": implementation, "symmetric": True}
    plain = values_and_gradients(grouped_infonce, *inputs, **options)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = values_and_gradients(grouped_infonce, *inputs, **options)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(got, want) for got, want in zip(found, plain, strict=True))


def test_precision_set_for_a_backend_changes_nothing(monkeypatch, implementation):
    monkeypatch.undo()
    queries, documents = (vectors.float() for vectors in embeddings(5, 256, 256, width=256, spread=0.05))
    inputs = queries, documents, torch.arange(256), torch.ones(256)
    options = {"temperature": 0.002, "implementation": implementation}
    plain = values_and_gradients(grouped_infonce, *inputs, **options)
    for backend, lower in ((torch.backends.cuda.matmul, "tf32"), (torch.backends.mkldnn.matmul, "bf16")):
        before, backend.fp32_precision = backend.fp32_precision, lower
        try:
            found = values_and_gradients(grouped_infonce, *inputs, **options)
            assert backend.fp32_precision == lower
        finally:
            backend.fp32_precision = before
        assert all(torch.equal(got, want) for got, want in zip(found, plain, strict=True))


def test_two_float_types_give_each_side_its_own_gradient(implementation):
    queries, documents = embeddings(5, 6, 12)
    queries, documents = queries.bfloat16(), documents.float()
    inputs = documents, torch.arange(6) * 2, torch.ones(6)
    options = {"temperature": 0.05, "implementation": implementation}
    plain = values_and_gradients(grouped_infonce, queries.float(), *inputs, **options)
    found = values_and_gradients(grouped_infonce, queries, *inputs, **options)
    assert torch.equal(found[0], plain[0]) and torch.equal(found[2], plain[2])
    assert found[1].dtype == torch.bfloat16 and torch.equal(found[1], plain[1].bfloat16())


def test_inputs_that_are_not_contiguous(implementation):
    queries, documents = (vectors.float() for vectors in embeddings(5, 6, 12))
    positives, options = choices(6, 6, 12)
    options |= {"temperature": 0.05, "implementation": implementation}
    plain = values_and_gradients(grouped_infonce, queries, documents, positives, torch.ones(6), **options)

    def strided(tensor):
        return torch.stack([tensor, tensor], dim=-1)[..., 0] if isinstance(tensor, torch.Tensor) else tensor

    options = {name: strided(value) for name, value in options.items()}
    wide = strided(queries).requires_grad_(), strided(documents).requires_grad_()
    assert not wide[0].is_contiguous() and not options["known_positive_ids"].is_contiguous()
    losses = grouped_infonce(*wide, strided(positives), **options)
    losses.backward(torch.ones(1).expand(6))
    assert torch.equal(losses, plain[0])
    assert torch.equal(wide[0].grad, plain[1]) and torch.equal(wide[1].grad, plain[2])


@pytest.mark.parametrize("symmetric", [False, True])
def test_temperature_may_be_learned(implementation, symmetric):
    queries, documents = (vectors.float() for vectors in embeddings(7, 6, 12))
    positives, options = choices(8, 6, 12)
    options = {name: options[name] for name in ("document_ids", "query_group", "document_group")}
    options |= {"symmetric": symmetric} if symmetric else {"column_weights": torch.linspace(0.5, 2, 12)}
    upstream = torch.linspace(-1, 2, 6)
    wanted = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    (slow_infonce(queries, documents, positives, temperature=wanted, **options) * upstream).sum().backward()
    found = [torch.tensor(0.05, requires_grad=True) for _ in range(2)]
    options["implementation"] = implementation
    (grouped_infonce(queries, documents, positives, temperature=found[0], **options) * upstream).sum().backward()
    weighted_infonce(queries, documents, positives, row_weights=upstream, temperature=found[1], **options)[0].backward()
    for temperature in found:
        assert temperature.grad.dtype == torch.float32
        assert temperature.grad.item() == pytest.approx(wanted.grad.item(), rel=1e-4)  # float32 sums that cancel


@pytest.mark.parametrize(
    ("masks", "symmetric"),
    [(masks, False) for masks in MASKS] + [([], True), (MASKS[-1], True)],
    ids=lambda value: "+".join(value) or "none" if isinstance(value, list) else "both" if value else "one",
)
def test_weighted_infonce_is_grouped_infonce_weighted(implementation, masks, symmetric):
    queries, documents = (vectors.float() for vectors in embeddings(9, 7, 23))
    positives, options = choices(10, 7, 23)
    options = {name: options[name] for name in masks}
    options |= {"temperature": 0.02, "symmetric": symmetric, "implementation": implementation}
    weights = torch.linspace(-1, 2, 7)
    plain = values_and_gradients(grouped_infonce, queries, documents, positives, 3 * weights, **options)
    queries.requires_grad_(), documents.requires_grad_(), weights.requires_grad_()
    total, losses = weighted_infonce(queries, documents, positives, row_weights=weights, **options)
    (3 * total).backward()
    assert not losses.requires_grad
    torch.testing.assert_close(losses, plain[0], rtol=1e-5, atol=1e-6)  # sums in another order
    torch.testing.assert_close(total, (weights * plain[0]).sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights.grad, 3 * plain[0], rtol=1e-5, atol=1e-6)
    for got, want in ((queries.grad, plain[1]), (documents.grad, plain[2])):
        assert distance(got, want) <= 5 * noise_of(0.02)


def test_without_gradient_nothing_is_kept(implementation):
    queries, documents = (vectors.float().requires_grad_() for vectors in embeddings(11, 6, 12))
    inputs, options = (queries, documents, torch.arange(6)), {"temperature": 0.05, "implementation": implementation}
    plain = grouped_infonce(*inputs, **options)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            losses = grouped_infonce(*inputs, **options)
            total, again = weighted_infonce(*inputs, row_weights=torch.ones(6), **options)
        assert torch.equal(losses, plain) and torch.equal(again, plain) and not total.requires_grad
    frozen = values_and_gradients(
        lambda q, d, p, **keys: grouped_infonce(q, d.detach(), p, **keys), *inputs, torch.ones(6), **options
    )
    both = values_and_gradients(grouped_infonce, *inputs, torch.ones(6), **options)
    assert torch.equal(frozen[1], both[1]) and frozen[2] is None


def test_a_kept_graph_gives_the_same_gradients_again(implementation):
    queries, documents = (vectors.float().requires_grad_() for vectors in embeddings(12, 6, 12))
    inputs, options = (queries, documents, torch.arange(6)), {"temperature": 0.05, "implementation": implementation}
    losses = grouped_infonce(*inputs, **options)
    total, _ = weighted_infonce(*inputs, row_weights=torch.ones(6), **options)
    for loss in (losses.sum(), total):
        first = torch.autograd.grad(loss, inputs[:2], retain_graph=True)
        copies = [gradient.clone() for gradient in first]
        for gradient in first:
            gradient.zero_()  # they are the caller's
        second = torch.autograd.grad(2 * loss, inputs[:2])
        assert all(torch.equal(2 * got, want) for got, want in zip(copies, second, strict=True))
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(loss, inputs[:2])


def test_same_inputs_give_the_same_bits(implementation):
    queries, documents = (vectors.float() for vectors in embeddings(10, 9, 21))
    positives, options = choices(11, 9, 21)
    options |= {"temperature": 0.02, "implementation": implementation}
    runs = [
        values_and_gradients(grouped_infonce, queries, documents, positives, torch.ones(9), **options) for _ in range(2)
    ]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_buffers_are_handed_over_and_not_copied(implementation, weighted):
    queries, documents = (vectors.float().requires_grad_() for vectors in embeddings(12, 4, 8))
    addresses = []
    for side in (queries, documents):
        side.register_hook(lambda gradient: addresses.append(gradient.data_ptr()))
    options = {"temperature": 0.1, "implementation": implementation}
    if weighted:
        weights = torch.ones(4)
        weighted_infonce(queries, documents, torch.arange(4), row_weights=weights, **options)[0].backward()
    else:
        grouped_infonce(queries, documents, torch.arange(4), **options).sum().backward()
    assert sorted(addresses) == sorted([queries.grad.data_ptr(), documents.grad.data_ptr()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_losses_and_weights_may_be_changed_in_place_before_the_backward(dtype, implementation):
    queries, documents = (vectors.to(dtype).requires_grad_() for vectors in embeddings(13, 4, 8))
    inputs, options = (queries, documents, torch.arange(4)), {"temperature": 0.1, "implementation": implementation}
    plain = values_and_gradients(grouped_infonce, *inputs, torch.full((4,), 3.0), **options)
    grouped_infonce(*inputs, **options).mul_(3).sum().backward()
    torch.testing.assert_close(queries.grad, plain[1])
    queries.grad = None
    weights = torch.full((4,), 3.0, requires_grad=True)
    total, losses = weighted_infonce(*inputs, row_weights=weights, **options)
    losses.zero_()
    total.backward()
    torch.testing.assert_close(queries.grad, plain[1])
    torch.testing.assert_close(weights.grad, plain[0])
    queries.grad, weights = None, torch.full((4,), 3.0)
    total, losses = weighted_infonce(*inputs, row_weights=weights, **options)
    losses.zero_(), weights.zero_()
    total.backward()
    torch.testing.assert_close(queries.grad, plain[1])
