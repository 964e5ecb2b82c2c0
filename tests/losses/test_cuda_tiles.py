"""The bodies of the CUDA kernels, emulated on the CPU, against float64: every order of threads must give the same."""

import math

import pytest
import torch

from tdro_hpc.losses.cuda_tiles import Tile, TileMasks, shares_of, spans, stride_of
from tests.reference.emulated_tiles import AHEAD, AHEAD_FALLING, FALLING, RANDOM, RISING, emulated_tiles
from tests.reference.torch_tiles import TorchTiles

HALF_ULP = {torch.float32: 2e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # relative error of a stored share
# Shapes of tiles: groups, rows, columns. Tails of four columns and of four rows, more columns than one step of a block,
# and enough rows for blocks of four.
SHAPES = [(1, 3, 7), (1, 2, 1029), (5, 1, 8), (3, 6, 13), (1, 2050, 5), (700, 4, 6)]
ALL = ["query_group", "column_ids", "positive_ids", "known_ids", "limits", "log_weights"]
LIMITED = ["limits"]
MASKED = pytest.mark.parametrize("masked", [[], LIMITED, ALL], ids=["none", "limits", "all"])
SHAPED = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(params=[RISING, FALLING, RANDOM], ids=["rising", "falling", "random"])
def kernels(request):
    found = emulated_tiles()
    found.order_threads(request.param)
    yield found
    found.order_threads(RISING)


def tile_of(shape, seed, masked, *, temperature=0.05):
    """A tile inside of a larger problem, its products, its masks; what must not be looked at is NaN."""
    groups, rows, columns = shape
    generator = torch.Generator().manual_seed(seed)
    tile = Tile(first_row=3, first_column=5, groups=groups, rows=rows, columns=columns)
    all_rows, all_columns = tile.first_row + tile.all_rows + 2, tile.first_column + tile.all_columns + 1
    scores = torch.full((groups, rows, stride_of(columns)), math.nan)
    scores[..., :columns] = 2 * torch.rand(groups, rows, columns, generator=generator) - 1

    def draw(low, high, *sizes):
        return torch.randint(low, high, sizes, generator=generator)

    masks = TileMasks(
        temperature=torch.tensor(temperature),
        positives=draw(-2, all_columns + 2, all_rows),
        query_group=draw(0, 2, all_rows),
        document_group=draw(0, 2, all_columns),
        column_ids=draw(-1, 6, all_columns),
        positive_ids=draw(0, 6, all_rows),
        known_ids=draw(-1, 6, all_rows, 2),
        limits=1 - torch.rand(all_rows, generator=generator),
        log_weights=torch.rand(all_columns, generator=generator) - 0.5,
    )
    if "query_group" in masked:
        masks.query_group[tile.first_row] = 7  # a row of which nothing counts
    if "query_group" not in masked:
        masks = masks._replace(document_group=None)
    return tile, scores, masks._replace(**{name: None for name in ALL if name not in masked})


def exact_scores(tile, scores, masks):
    """float64 [groups, rows, columns], -inf where they do not count."""
    return TorchTiles().negatives(scores.double(), tile, masks)


def no_scores(count):
    return torch.full((count,), torch.finfo(torch.float32).min), torch.zeros(count)


def rows_of(tile):
    return slice(tile.first_row, tile.first_row + tile.all_rows)


def columns_of(tile):
    return slice(tile.first_column, tile.first_column + tile.all_columns)


def check_sums(sums, place, wanted, temperature):
    found = sums[0] + sums[1].log()
    # Rounding of a score of size 1 / T, and of the sum.
    torch.testing.assert_close(found[place].double(), wanted.flatten(), rtol=1e-6, atol=2e-7 / temperature + 2e-6)
    found[place] = -math.inf
    assert (found == -math.inf).all(), "a sum of another row or column was changed"


@SHAPED
@MASKED
@pytest.mark.parametrize("temperature", [0.05, 0.002])  # 0.002: scores of 500, far past the 88 where exp ends
def test_rows_are_summed(kernels, shape, masked, temperature):
    tile, scores, masks = tile_of(shape, 1, masked, temperature=temperature)
    sums = no_scores(len(masks.positives))
    kernels.sum_rows(scores, tile, masks, sums)
    wanted = torch.logsumexp(exact_scores(tile, scores, masks), dim=2)
    assert "query_group" not in masked or wanted[0, 0] == -math.inf
    check_sums(sums, rows_of(tile), wanted, temperature)


@SHAPED
@MASKED
def test_columns_are_summed(kernels, shape, masked):
    tile, scores, masks = tile_of(shape, 2, masked, temperature=0.002)
    sums = no_scores(tile.first_column + tile.all_columns + 1)
    kernels.sum_columns(scores, tile, masks, sums)
    wanted = torch.logsumexp(exact_scores(tile, scores, masks), dim=1)
    check_sums(sums, columns_of(tile), wanted, 0.002)


def test_sums_of_several_tiles_are_merged(kernels):
    tile, scores, masks = tile_of((1, 5, 40), 3, ALL)
    row_sums, column_sums = no_scores(len(masks.positives)), no_scores(tile.first_column + 41)
    for first, count in [(0, 12), (12, 20), (32, 8)]:
        part = Tile(tile.first_row, tile.first_column + first, 1, 5, count)
        of_part = scores[..., first : first + count].contiguous()
        kernels.sum_rows(of_part, part, masks, row_sums)
        kernels.sum_columns(of_part, part, masks, column_sums)
    wanted = exact_scores(tile, scores, masks)
    check_sums(row_sums, rows_of(tile), torch.logsumexp(wanted, dim=2), 0.05)
    check_sums(column_sums, columns_of(tile), torch.logsumexp(wanted, dim=1), 0.05)


def test_a_nan_counts_only_where_its_column_does(kernels):
    tile, scores, masks = tile_of((1, 4, 9), 4, [])
    masks.positives[:] = -1
    masks.positives[tile.first_row] = tile.first_column + 2  # its NaN is the positive's
    scores[0, 0, 2] = scores[0, 1, 2] = scores[0, 2, :9] = math.nan
    row_sums, column_sums = no_scores(len(masks.positives)), no_scores(tile.first_column + 10)
    kernels.sum_rows(scores, tile, masks, row_sums)
    kernels.sum_columns(scores, tile, masks, column_sums)
    assert (row_sums[0] + row_sums[1].log())[rows_of(tile)].isnan().tolist() == [False, True, True, False]
    assert (column_sums[0] + column_sums[1].log()).isnan().sum() == 9  # all have that of the third row


def shares_wanted(tile, scores, masks, rows, columns):
    exact = exact_scores(tile, scores, masks)
    totals, factors = (vector[rows_of(tile)].double().view(tile.groups, tile.rows, 1) for vector in rows)
    shares = factors * torch.exp(exact - totals)
    if columns is not None:
        totals, factors = (vector[columns_of(tile)].double().view(tile.groups, 1, tile.columns) for vector in columns)
        shares = shares + factors * torch.exp(exact - totals)
    return shares.masked_fill(exact == -math.inf, 0)


@SHAPED
@MASKED
@pytest.mark.parametrize("dtype", HALF_ULP, ids=str)
@pytest.mark.parametrize("with_columns", [False, True], ids=["rows", "both"])
def test_shares_take_the_place_of_scores(kernels, shape, masked, dtype, with_columns):
    tile, scores, masks = tile_of(shape, 5, masked)
    count, column_count = len(masks.positives), tile.first_column + tile.all_columns + 1
    rows = torch.full((count,), 20.0), torch.linspace(-1, 2, count)
    columns = (torch.full((column_count,), 19.0), torch.linspace(2, -1, column_count)) if with_columns else None
    wanted = shares_wanted(tile, scores, masks, rows, columns)
    residuals = torch.ones(count)
    kernels.write_shares(scores, tile, masks, rows, columns, residuals, dtype)
    found = shares_of(scores, tile.columns, dtype).double()
    # float32 rounding of a score of 20, then that of the type; float16 has steps of 6e-8 near 0.
    torch.testing.assert_close(found, wanted, rtol=HALF_ULP[dtype] + 1e-5, atol=4e-6 * 2 + 6e-8)
    assert (found[wanted == 0] == 0).all()
    lost = (wanted - found).sum(dim=2).flatten()
    torch.testing.assert_close(residuals[rows_of(tile)].double(), 1 + lost, rtol=1e-6, atol=2e-4)
    assert (residuals == 1).sum() >= count - tile.all_rows


@SHAPED
@MASKED
@pytest.mark.parametrize("dtype", HALF_ULP, ids=str)
def test_softmax_of_whole_rows(kernels, shape, masked, dtype):
    tile, scores, masks = tile_of(shape, 6, masked, temperature=0.01)
    count = len(masks.positives)
    positive_scores, weights = torch.linspace(80, 110, count), torch.linspace(-1, 2, count)
    exact = exact_scores(tile, scores, masks)
    excess = torch.logsumexp(exact, dim=2).flatten() - positive_scores[rows_of(tile)].double()
    losses = torch.logaddexp(excess, torch.zeros_like(excess))
    totals = torch.zeros(count, dtype=torch.float64)
    totals[rows_of(tile)] = positive_scores[rows_of(tile)].double() + losses
    wanted = shares_wanted(tile, scores, masks, (totals, weights), None)
    found = torch.full((count,), math.nan)
    kernels.write_softmax(scores, tile, masks, positive_scores, weights, found, None, dtype)
    # A score of 100 is rounded by 1e-5, which is a relative error of a share and of a small loss.
    torch.testing.assert_close(found[rows_of(tile)].double(), losses, rtol=6e-5, atol=6e-5)
    assert found.isnan().sum() == count - tile.all_rows
    assert (found[rows_of(tile)][losses == 0] == 0).all()  # a row without negatives
    shares = shares_of(scores, tile.columns, dtype).double()
    torch.testing.assert_close(shares, wanted, rtol=HALF_ULP[dtype] + 6e-5, atol=6e-8)


@pytest.mark.parametrize("dtype", HALF_ULP, ids=str)
def test_shares_are_rounded_as_torch_rounds(kernels, dtype):
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 65504, 65519.99, 65520, 6e-8, 2.98e-8, 2.99e-8, 6.1e-5, 1e-41]
    halves = torch.arange(0, 1 << 16, 37, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    random = torch.randn(3000) * 10.0 ** torch.randint(-10, 6, (3000,))
    factors = torch.cat([torch.tensor(special), halves, halves * (1 + 2**-11), random])
    tile = Tile(0, 0, 1, len(factors), 1)
    masks = TileMasks(torch.tensor(1.0), torch.full((len(factors),), -1), *(None,) * 7)
    scores = torch.zeros(1, len(factors), stride_of(1))
    kernels.write_shares(scores, tile, masks, (torch.zeros_like(factors), factors), None, None, dtype)
    found = shares_of(scores, 1, dtype).flatten()
    torch.testing.assert_close(found, factors.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", HALF_ULP, ids=str)
@pytest.mark.parametrize("width", [1, 300])
def test_positives_are_scored_and_added(kernels, dtype, width):
    generator = torch.Generator().manual_seed(7)
    queries, documents = (torch.randn(n, width, generator=generator).to(dtype) for n in (9, 6))
    positives = torch.tensor([4, 0, 4, 4, -1, 6, 5, 0, 2])  # some share one, two have none here
    found = kernels.positive_scores(queries, documents, positives, torch.tensor(0.25))
    pairs = queries.double() * documents.double()[positives.clamp(0, 5)]
    wanted = (pairs.sum(dim=1) / 0.25).masked_fill((positives < 0) | (positives > 5), math.nan)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5, equal_nan=True)

    factors = torch.linspace(-1, 2, 9), torch.linspace(3, 1, 9)
    gradients = torch.ones(9, width), torch.ones(6, width)
    kernels.add_positives(queries, documents, positives, factors, gradients)
    wanted = torch.ones(9, width), torch.ones(6, width)
    TorchTiles().add_positives(queries, documents, positives, factors, wanted)
    torch.testing.assert_close(gradients, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "order"),
    [((1, 3, 7), AHEAD), ((1, 2, 2100), AHEAD), ((1, 2, 2100), AHEAD_FALLING), ((1, 2050, 5), AHEAD_FALLING)],
    ids=str,
)
def test_threads_that_run_ahead_of_others_change_no_bit(shape, order):
    kernels = emulated_tiles()
    results = []
    for chosen in (RISING, order):
        kernels.order_threads(chosen)
        try:
            results.append(list(everything_of(kernels, shape)))
        finally:
            kernels.order_threads(RISING)
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def everything_of(kernels, shape):
    """What all kernels make of a tile, as bits."""
    tile, scores, masks = tile_of(shape, 9, ALL)
    row_sums, column_sums = no_scores(len(masks.positives)), no_scores(tile.first_column + tile.all_columns)
    kernels.sum_rows(scores, tile, masks, row_sums)
    kernels.sum_columns(scores, tile, masks, column_sums)
    yield from (*row_sums, *column_sums)
    vectors = torch.linspace(15, 20, len(masks.positives)), torch.linspace(-1, 2, len(masks.positives))
    losses, residuals = torch.zeros(2, len(masks.positives))
    for dtype in (torch.float32, torch.bfloat16) if shape[1] < 10 else (torch.bfloat16,):
        shares = scores.clone()
        kernels.write_shares(shares, tile, masks, vectors, None, residuals, dtype)
        yield shares_of(shares, tile.columns, dtype).float()
        shares = scores.clone()
        kernels.write_softmax(shares, tile, masks, *vectors, losses, residuals, dtype)
        yield shares_of(shares, tile.columns, dtype).float()
        yield from (losses.clone(), residuals.clone())
    generator = torch.Generator().manual_seed(9)
    queries, documents = (torch.randn(n, 300, generator=generator) for n in (9, 6))
    positives = torch.randint(-1, 7, (9,), generator=generator)
    yield kernels.positive_scores(queries, documents, positives, masks.temperature).nan_to_num()
    gradients = torch.zeros(9, 300), torch.zeros(6, 300)
    kernels.add_positives(queries, documents, positives, tuple(torch.randn(2, 9, generator=generator)), gradients)
    yield from gradients


def test_operators_refuse_what_would_be_read_beyond_its_end():
    kernels = emulated_tiles()
    tile, scores, masks = tile_of((1, 4, 9), 8, ALL)
    sums = no_scores(len(masks.positives))
    for wrong, words in [
        ({"limits": masks.limits[:6]}, "limits has 6 elements"),
        ({"column_ids": masks.column_ids.int()}, "column_ids must be int64"),
        ({"known_ids": masks.known_ids.T}, "known_ids is not contiguous"),
        ({"document_group": None}, "go together"),
        ({"column_ids": None}, "looked up in column_ids"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            kernels.sum_rows(scores, tile, masks._replace(**wrong), sums)
    with pytest.raises(RuntimeError, match="multiple of 4"):
        kernels.sum_rows(scores[..., :10].contiguous(), tile, masks, sums)
    with pytest.raises(RuntimeError, match="has 5 elements; 3 to 7 are asked for"):
        kernels.sum_rows(scores, tile, masks, no_scores(5))


@pytest.mark.parametrize(("total", "most"), [(0, 5), (1, 5), (5, 5), (200, 200), (300, 299), (4097, 4096)])
def test_spans_cover_all_in_few_parts(total, most):
    found = list(spans(total, most))
    assert [first for first, _ in found] == [sum(count for _, count in found[:i]) for i in range(len(found))]
    assert sum(count for _, count in found) == total
    assert all(0 < count <= most for _, count in found)
    assert len(found) <= (1 if total <= most else math.ceil(total / (most - most % 128)))
