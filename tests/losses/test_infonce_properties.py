"""What holds of the loss for any shapes, groups, ids and masks: equality with the reference, and its symmetries."""

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tdro_hpc.losses import grouped_infonce, tiles, weighted_infonce
from tests.reference.infonce import slow_infonce
from tests.reference.loss_cases import IMPLEMENTATIONS, MASKS, choices, distance, embeddings, values_and_gradients

both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
few = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TYPES = {torch.float32: 0.0, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # the last rounding of a gradient, at worst
shapes = {"seed": st.integers(0, 10_000), "rows": st.integers(1, 40), "columns": st.integers(1, 70)}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    for name, size in {"BLOCK_ROWS": 3, "BLOCK_COLUMNS": 5, "PANEL_SCORES": 40, "PANEL_ROWS": 2}.items():
        monkeypatch.setattr(tiles, name, size)


def case(seed, rows, columns, masks, *, width=6):
    """Float32 embeddings, positives and masks; margins that no rounding decides."""
    queries, documents = (vectors.float() for vectors in embeddings(seed, rows, columns, width=width))
    positives, options = choices(seed + 1, rows, columns)
    return queries, documents, positives, {name: options[name] for name in masks}


def margin_is_clear(queries, documents, positives, options):
    """Whether no column is so near the margin that rounding decides whether it counts."""
    if "false_negative_margin" not in options:
        return True
    scores = queries.double() @ documents.double().T
    limits = scores.gather(1, positives.unsqueeze(1)) - options["false_negative_margin"]
    return bool((scores - limits).abs().min() > 1e-5)


@both
@many
@given(
    **shapes,
    width=st.integers(1, 40),
    masks=st.sampled_from(MASKS),
    keep_duplicates=st.booleans(),
    as_sorted=st.booleans(),
    symmetric=st.booleans(),
    dtype=st.sampled_from(list(TYPES)),
    temperature=st.sampled_from([1.0, 0.05, 0.002]),
)
def test_any_shape_and_masks_equal_the_reference(
    implementation, seed, rows, columns, width, masks, keep_duplicates, as_sorted, symmetric, dtype, temperature
):
    queries, documents, positives, options = case(seed, rows, columns, masks, width=width)
    queries, documents = queries.to(dtype), documents.to(dtype)
    assume(margin_is_clear(queries, documents, positives, options))
    if as_sorted and "query_group" in options:
        for name in ("query_group", "document_group"):
            options[name] = options[name].sort().values
    if symmetric:
        options.pop("column_weights", None)
    options |= {"temperature": temperature, "keep_duplicates": keep_duplicates, "symmetric": symmetric}
    inputs = queries, documents, positives, torch.linspace(-1, 2, rows)
    found = values_and_gradients(grouped_infonce, *inputs, implementation=implementation, **options)
    sides = queries.double(), documents.double()
    wanted = values_and_gradients(slow_infonce, *sides, *inputs[2:], **options)
    noise = 4e-7 / temperature + 2e-6  # of a logit: float32 rounding of a cosine, and of the sums it goes into
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-5, atol=noise)
    # Shares of a row or a column may cancel to nothing. The library has those of bfloat16 embeddings in bfloat16.
    uncancelled = 5e-3 if dtype == torch.bfloat16 and implementation == "fused" else noise / 2
    scale = inputs[3].norm() / temperature
    for got, want in zip(found[1:], wanted[1:], strict=True):
        assert (got.double() - want).norm() <= TYPES[dtype] * want.norm() + uncancelled * scale


@few
@given(**shapes, masks=st.sampled_from(MASKS))
def test_float64_equals_the_reference_to_twelve_digits(seed, rows, columns, masks):
    queries, documents, positives, options = case(seed, rows, columns, masks)
    inputs = queries.double(), documents.double(), positives, torch.linspace(-1, 2, rows)
    assume(margin_is_clear(*inputs[:3], options))
    found = values_and_gradients(grouped_infonce, *inputs, temperature=0.1, **options)
    wanted = values_and_gradients(slow_infonce, *inputs, temperature=0.1, **options)
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == torch.float64 and (got - want).norm() <= 1e-12 * (1 + want.norm())


@both
@few
@given(**shapes, masks=st.sampled_from(MASKS))
def test_order_of_rows_and_columns_does_not_matter(implementation, seed, rows, columns, masks):
    queries, documents, positives, options = case(seed, rows, columns, masks)
    generator = torch.Generator().manual_seed(seed)
    by_row, by_column = torch.randperm(rows, generator=generator), torch.randperm(columns, generator=generator)
    keys = {"temperature": 0.1, "implementation": implementation}
    plain = values_and_gradients(grouped_infonce, queries, documents, positives, torch.ones(rows), **options, **keys)
    sides = {"query_group": by_row, "known_positive_ids": by_row}
    sides |= {name: by_column for name in ("document_group", "document_ids", "column_weights")}
    moved = {name: value[sides[name]] if name in sides else value for name, value in options.items()}
    inputs = queries[by_row], documents[by_column], by_column.argsort()[positives[by_row]], torch.ones(rows)
    assume(margin_is_clear(queries, documents, positives, options))
    found = values_and_gradients(grouped_infonce, *inputs, **moved, **keys)
    wanted = plain[0][by_row], plain[1][by_row], plain[2][by_column]
    for got, want in zip(found, wanted, strict=True):
        assert (got - want).norm() <= 1e-5 * (1 + want.norm())


@both
@few
@given(**shapes)
def test_symmetric_is_the_mean_of_both_directions(implementation, seed, rows, columns):
    columns = rows + columns
    queries, documents, _, _ = case(seed, rows, columns, [])
    documents, positives = documents[:rows], torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    keys = {"temperature": 0.1, "implementation": implementation}
    losses = grouped_infonce(queries, documents, positives, symmetric=True, **keys)
    forth = grouped_infonce(queries, documents, positives, **keys)
    back = grouped_infonce(documents, queries, positives.argsort(), **keys)[positives]
    torch.testing.assert_close(losses, (forth + back) / 2, rtol=1e-5, atol=1e-5)


@both
@few
@given(**shapes, masks=st.sampled_from(MASKS))
def test_gradients_of_both_sides_are_of_the_same_scores(implementation, seed, rows, columns, masks):
    queries, documents, positives, options = case(seed, rows, columns, masks)
    keys = options | {"temperature": 0.1, "implementation": implementation}
    _, of_queries, of_documents = values_and_gradients(
        grouped_infonce, queries, documents, positives, torch.ones(rows), **keys
    )
    # Scores are bilinear: <queries, their gradient> and <documents, theirs> are both sum of score x its gradient.
    inner = [(a.double() * b.double()).sum() for a, b in ((queries, of_queries), (documents, of_documents))]
    assert abs(inner[0] - inner[1]) <= 1e-5 * rows / 0.1


@both
@few
@given(**shapes, masks=st.sampled_from(MASKS), factor=st.sampled_from([0.0, 1.0, -2.5, 1e4]))
def test_weighted_is_linear_in_its_weights(implementation, seed, rows, columns, masks, factor):
    queries, documents, positives, options = case(seed, rows, columns, masks)
    keys = options | {"temperature": 0.1, "implementation": implementation}
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(seed))
    gradients = []
    for row_weights, scale in ((weights, factor), (factor * weights, 1.0)):
        sides = queries.clone().requires_grad_(), documents.clone().requires_grad_()
        total, losses = weighted_infonce(*sides, positives, row_weights=row_weights, **keys)
        (scale * total).backward()
        assert total.item() == pytest.approx((row_weights * losses).sum().item(), rel=1e-5, abs=1e-6)
        gradients.append([side.grad for side in sides])
    assert all(distance(got, want) <= 1e-5 or want.norm() < 1e-6 for got, want in zip(*gradients, strict=True))


@both
@few
@given(**shapes)
def test_one_group_is_no_group_and_groups_are_separate_batches(implementation, seed, rows, columns):
    queries, documents, positives, options = case(seed, rows, columns, ["query_group", "document_group"])
    keys = {"temperature": 0.1, "implementation": implementation}
    positives_inside = torch.zeros_like(positives)
    one = {"query_group": torch.full((rows,), 9), "document_group": torch.full((columns,), 9)}
    together = grouped_infonce(queries, documents, positives_inside, **one, **keys)
    plain = grouped_infonce(queries, documents, positives_inside, **keys)
    torch.testing.assert_close(together, plain, rtol=1e-5, atol=1e-5)
    losses = grouped_infonce(queries, documents, positives, **options, **keys)
    for group in options["query_group"].unique():
        members, theirs = options["query_group"] == group, options["document_group"] == group
        for row in members.nonzero().flatten().tolist():
            kept = theirs.clone()
            kept[positives[row]] = True
            place = kept[: positives[row]].sum()
            alone = grouped_infonce(queries[row : row + 1], documents[kept], place.reshape(1), **keys)
            torch.testing.assert_close(losses[row : row + 1], alone, rtol=1e-5, atol=1e-5)
