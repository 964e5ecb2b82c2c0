"""grouped_infonce and weighted_infonce above one panel, tile and strip of the library, against float64.

The library has panels of 256 rows. Up to 1024 columns of float32 and float16, 2 MiB of documents, it goes by blocks of
32 rows, then by blocks of dimensions; else there are strips, each of tiles of up to 128 columns.
"""

from functools import lru_cache

import pytest
import torch
from torch.nn.functional import normalize

from tdro_hpc.losses import grouped_infonce, host, weighted_infonce
from tests.reference import dense_core
from tests.reference.loss_cases import IMPLEMENTATIONS, choices, distance, embeddings, needs_library

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of the gradients, relative, on the same values. Float32 at T = 0.05: cosines that are off by 3e-8 are logits that are
# off by 6e-7, and so are sums. Half precision: the last rounding, 1.7e-3 and 2.1e-4, and shares in bfloat16.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 4e-4}
TEMPERATURE_BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 1e-4}
IDS = ["document_ids"]
KNOWN = ["document_ids", "known_positive_ids"]
GROUPS = ["query_group", "document_group"]
OPTIONS = {
    "none": [],
    "ids": IDS,
    "known": KNOWN,
    "margin": ["false_negative_margin"],
    "weights": ["column_weights"],
    "groups": GROUPS,
    "symmetric": ["symmetric"],
    "masks": [*KNOWN, "false_negative_margin", "column_weights"],
    "all": [*KNOWN, *GROUPS, "false_negative_margin", "column_weights"],
    "all symmetric": [*KNOWN, *GROUPS, "false_negative_margin", "symmetric"],
}

implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
types = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def results_of(queries, documents, positives, row_weights, *, weighted, temperature, **options):
    """As of the reference: losses and three gradients."""
    sides = queries.clone().requires_grad_(), documents.clone().requires_grad_()
    learned = torch.tensor(temperature, requires_grad=True)
    if weighted:
        total, losses = weighted_infonce(*sides, positives, row_weights=row_weights, temperature=learned, **options)
        total.backward()
    else:
        losses = grouped_infonce(*sides, positives, temperature=learned, **options)
        losses.backward(row_weights)
    return dense_core.Results(losses.detach(), sides[0].grad, sides[1].grad, learned.grad)


def problem(rows, columns, *, width=72):
    """Embeddings of which every type holds the values, around some subjects, and every option."""
    generator = torch.Generator().manual_seed(rows)
    queries, documents = embeddings(rows, rows, columns, width=width)
    positives, options = choices(rows, rows, columns)
    subjects = documents[:20].repeat(columns // 20 + 1, 1)[:columns]
    documents = normalize(subjects + 0.5 * documents, dim=1)
    queries = normalize(documents[positives] + 0.7 * queries, dim=1)
    options |= {
        # Groups above a panel and a strip; ids below 0; rows without columns, and columns without rows.
        "query_group": torch.tensor([4, 4, 4, -3, 9])[torch.randint(5, (rows,), generator=generator)],
        "document_group": torch.tensor([4, 4, 4, -3, 8])[torch.randint(5, (columns,), generator=generator)],
        "false_negative_margin": dense_core.MARGIN,
        "symmetric": True,
    }
    sides = [dense_core.on_grid(side) for side in (queries, documents)]
    return *sides, positives, torch.linspace(-1, 2, rows), options


def check(found, wanted, dtype):
    """Losses of up to 10 and gradients at T = 0.05."""
    assert found.losses.dtype == torch.float32 and found.of_queries.dtype == found.of_documents.dtype == dtype
    torch.testing.assert_close(found.losses.double(), wanted.losses, rtol=1e-6, atol=3e-6)
    for got, want in zip(found[1:3], wanted[1:3], strict=True):
        assert distance(got, want) <= BOUNDS[dtype]
    assert distance(found.of_temperature, wanted.of_temperature) <= TEMPERATURE_BOUNDS[dtype]


@lru_cache(maxsize=1)
def problem_and_wanted(rows, columns, names):
    *inputs, options = problem(rows, columns)
    options = {name: options[name] for name in OPTIONS[names]} | {"temperature": 0.05}
    return inputs, options, dense_core.losses_and_gradients(*inputs, **options)


@implementations
@types
@pytest.mark.parametrize("names", OPTIONS)
@pytest.mark.parametrize(("rows", "columns"), [(700, 2000), (257, 97), (512, 385)])
def test_above_one_panel_and_tile(rows, columns, names, dtype, implementation):
    (queries, documents, *rest), options, wanted = problem_and_wanted(rows, columns, names)
    for weighted in (False, True):
        keys = options | {"weighted": weighted, "implementation": implementation}
        check(results_of(queries.to(dtype), documents.to(dtype), *rest, **keys), wanted, dtype)


def sizes_problem():
    rows_of, columns_of = [3, 1, 2, 5, 4, 20, 8], [1, 1, 2, 33, 0, 1000, 100_000]
    rows, columns = sum(rows_of), sum(columns_of)
    generator = torch.Generator().manual_seed(3)

    def shuffled(sizes):
        ids = torch.repeat_interleave(torch.arange(len(sizes)) - 3, torch.tensor(sizes))
        return ids[torch.randperm(len(ids), generator=generator)]

    options = {"query_group": shuffled(rows_of), "document_group": shuffled(columns_of), "temperature": 0.05}
    queries, documents = embeddings(4, rows, columns, width=32)
    # Half of the positives in the row's own group, where it has columns, the others anywhere.
    positives = torch.randint(columns, (rows,), generator=generator)
    for row in range(0, rows, 2):
        own = (options["document_group"] == options["query_group"][row]).nonzero().flatten()
        if len(own):
            positives[row] = own[int(torch.randint(len(own), (1,), generator=generator))]
    return dense_core.on_grid(queries), dense_core.on_grid(documents), positives, torch.linspace(-1, 2, rows), options


@lru_cache(maxsize=1)
def sizes_problem_and_wanted():
    *inputs, options = sizes_problem()
    return inputs, options, dense_core.losses_and_gradients(*inputs, chunk_rows=16, **options)


@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_groups_of_one_and_of_a_hundred_thousand_columns_in_one_call(dtype, implementation):
    (queries, documents, *rest), options, wanted = sizes_problem_and_wanted()
    for weighted in (False, True):
        keys = options | {"weighted": weighted, "implementation": implementation}
        check(results_of(queries.to(dtype), documents.to(dtype), *rest, **keys), wanted, dtype)


@lru_cache(maxsize=1)
def near_one(dtype):
    """Unit vectors around one centre, with cosines of 0.997."""
    queries, documents = embeddings(5, 3, 100_000, width=40, spread=0.05)
    positives, row_weights = torch.tensor([99_999, 0, 50_000]), torch.tensor([0.1, 1.0, 0.4])
    return queries.to(dtype), documents.to(dtype), positives, row_weights


@lru_cache(maxsize=1)
def near_one_and_wanted(dtype, temperature):
    return near_one(dtype), dense_core.losses_and_gradients(*near_one(dtype), temperature=temperature)


@implementations
@pytest.mark.parametrize("temperature", [0.05, 0.01, 0.002])
@types
def test_a_hundred_thousand_columns_near_cosine_one(dtype, temperature, implementation):
    inputs, wanted = near_one_and_wanted(dtype, temperature)
    noise = 4e-7 / temperature + 3e-5  # of a logit: float32 rounding of a cosine, and of sums of so many
    bound = max(BOUNDS[dtype], 5 * noise)  # of a query's: a difference of vectors that are 15 times as long
    for weighted in (False, True):
        found = results_of(*inputs, weighted=weighted, temperature=temperature, implementation=implementation)
        torch.testing.assert_close(found.losses.double(), wanted.losses, rtol=0, atol=noise)
        assert distance(found.of_queries, wanted.of_queries) <= bound
        assert distance(found.of_documents, wanted.of_documents) <= BOUNDS[dtype]
        # The products of queries and their gradients cancel, all but a thousandth of their lengths.
        lengths = inputs[0].double().norm(dim=1) * wanted.of_queries.norm(dim=1)
        assert abs(found.of_temperature - wanted.of_temperature) <= bound * lengths.sum() / temperature


ROWS, COLUMNS = 600, 1400
SIDES = "queries", "documents", "temperature"


@pytest.fixture
def parts(monkeypatch):
    """The side of each part that is computed from losses, 0 = queries."""
    seen, of_part = [], host._of_part
    monkeypatch.setattr(host, "_of_part", lambda *arguments: seen.append(arguments[-1]) or of_part(*arguments))
    return seen


@pytest.fixture
def little_room(monkeypatch):
    """A call has a quarter of the gradients at most: several parts of each side where they are of half precision."""
    monkeypatch.setattr(host, "MEGABYTE", 0)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("names", ["none", "groups", "masks", "all"])
def test_gradients_in_parts_equal_float64(names, dtype, parts, little_room):
    (queries, documents, *rest), options, wanted = problem_and_wanted(ROWS, COLUMNS, names)
    with_losses = [0, 6] if dtype == torch.bfloat16 else [3, 6]  # weighted: those of queries come with the losses
    for weighted, num_parts in ((False, [3, 6]), (True, with_losses)):
        parts.clear()
        keys = options | {"weighted": weighted, "implementation": "fused"}
        check(results_of(queries.to(dtype), documents.to(dtype), *rest, **keys), wanted, dtype)
        assert [parts.count(side) for side in (0, 1)] == num_parts


@needs_library
@pytest.mark.parametrize("weighted", [False, True])
def test_workspace_mb_decides_whether_there_are_parts(weighted, parts):
    """Float32 sums of 5 MiB: too much for 1 MiB and not for 16."""
    *inputs, options = problem(ROWS, COLUMNS, width=640)
    options = {name: options[name] for name in GROUPS} | {"temperature": 0.05}
    wanted = dense_core.losses_and_gradients(*inputs, **options)
    queries, documents = (side.bfloat16() for side in inputs[:2])
    for workspace_mb, parted in ((16, False), (1, True)):
        keys = options | {"weighted": weighted, "workspace_mb": workspace_mb, "implementation": "fused"}
        check(results_of(queries, documents, *inputs[2:], **keys), wanted, torch.bfloat16)
        assert bool(parts) == parted


def gradients_of(asked, inputs, *, weighted, **options):
    """Losses, and gradients of queries, documents and temperature, None if not asked for; of each of two backwards."""
    queries, documents, positives, row_weights = inputs
    sides = queries.clone(), documents.clone(), torch.tensor(0.05)
    sides = [side.requires_grad_(name in asked) for side, name in zip(sides, SIDES, strict=True)]
    keys = options | {"temperature": sides[2], "implementation": "fused"}
    if weighted:
        total, losses = weighted_infonce(*sides[:2], positives, row_weights=row_weights, **keys)
    else:
        losses = grouped_infonce(*sides[:2], positives, **keys)
        total = (row_weights * losses).sum()
    found = []
    for _ in range(2):
        total.backward(retain_graph=True)
        found.append([losses.detach(), *(side.grad for side in sides)])
        for side in sides:
            side.grad = None
    return found


@needs_library
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("names", ["none", "all"])
def test_a_frozen_side_gets_no_gradient_and_the_others_the_same_bits(names, dtype, weighted, little_room):
    *inputs, options = problem(ROWS, COLUMNS)
    inputs[:2] = [side.to(dtype) for side in inputs[:2]]
    options = {name: options[name] for name in OPTIONS[names]} | {"weighted": weighted}
    wanted, again = gradients_of(SIDES, inputs, **options)
    assert all(torch.equal(first, second) for first, second in zip(wanted, again, strict=True))
    for asked in (SIDES[:1], SIDES[1:2], SIDES[2:], SIDES[::2], SIDES[1:], SIDES[:2]):
        for found in gradients_of(asked, inputs, **options):
            assert torch.equal(found[0], wanted[0])
            for name, got, want in zip(SIDES, found[1:], wanted[1:], strict=True):
                assert got is None if name not in asked else torch.equal(got, want), (asked, name)


@implementations
@pytest.mark.parametrize("length", [1.0, 16.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_steps_in_float16_stay_finite_at_the_lowest_temperature(weighted, length, implementation):
    """Scores of 500, and of 128000, which float16 cannot hold."""
    queries, documents = ((length * side).half() for side in embeddings(1, 64, 256, width=64, spread=0.05))
    positives, row_weights = torch.arange(64) * 4, torch.full((64,), 1 / 64)
    options = {"temperature": 0.002, "weighted": weighted, "implementation": implementation}
    rate, mean_losses = 1e-3 / length**2, []
    for _ in range(3):
        found = results_of(queries, documents, positives, row_weights, **options)
        wanted = dense_core.losses_and_gradients(queries, documents, positives, row_weights, temperature=0.002)
        assert all(result.isfinite().all() for result in found)
        # A score is a sum in float32, of numbers of this length, over 0.002.
        torch.testing.assert_close(found.losses.double(), wanted.losses, rtol=0, atol=4e-4 * length**2)
        mean_losses.append(float(wanted.losses.mean()))
        queries = queries - rate * found.of_queries
        documents = documents - rate * found.of_documents
    assert queries.dtype == torch.float16 and queries.isfinite().all() and documents.isfinite().all()
    assert mean_losses == sorted(mean_losses, reverse=True)


@implementations
def test_small_gradients_in_float16_survive_where_the_loss_is_scaled(implementation):
    """Of 1e-6 of a loss they are nothing in float16: they are rounded after the scale is known."""
    queries, documents = (side.half() for side in embeddings(1, 8, 32, width=64, spread=0.05))
    positives, weights = 4 * torch.arange(8), torch.full((8,), 1e-6)
    options = {"temperature": 1.0, "implementation": implementation}
    found = []
    for row_weights, scale in ((weights, 65536.0), (65536 * weights, 1.0)):
        sides = queries.clone().requires_grad_(), documents.clone().requires_grad_()
        total, _ = weighted_infonce(*sides, positives, row_weights=row_weights, **options)
        (scale * total).backward()
        found.append([side.grad for side in sides])
    for got, want in zip(*found, strict=True):
        assert want.abs().max() > 1e-4 and distance(got, want) < 1e-3
