"""How the CUDA implementation puts tiles together, on the CPU: against float64 with all scores in memory."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tdro_hpc.losses import cuda_core, cuda_tiles
from tdro_hpc.losses.library import load
from tests.reference import dense_core
from tests.reference.emulated_tiles import emulated_tiles
from tests.reference.loss_cases import distance, embeddings, needs_library, with_hard_negatives
from tests.reference.torch_tiles import TorchTiles

ROWS, COLUMNS, WIDTH = 23, 37, 6
NAMES = "query_group", "document_group", "column_ids", "positive_ids", "known_ids", "margin", "log_weights"
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of shares, relative
# Bytes and rows that cut the examples as large problems are cut on a device. The first leave everything in one tile.
SIZES = {
    "whole": {},
    "cut": {"SCORE_BYTES": 4 * 16 * 5, "SUM_BYTES": 4 * 5 * 9, "SUM_ROWS": 5, "GRADIENT_ROWS": 7, "ALIGNMENT": 1},
    "panels": {"SCORE_BYTES": 4 * 40 * 4, "SUM_BYTES": 4 * 99, "ALIGNMENT": 2, "PANEL_ROWS": 3},
    "copies": {"COPY_BYTES": 2 * 60 * 4, "BATCHED_SCORES": 30, "ALIGNMENT": 1, "PANEL_ROWS": 2},
    "batched": {"SUM_BYTES": 4 * 8 * 30, "COPY_BYTES": 10**4},
}
CUT = pytest.mark.parametrize("sizes", SIZES)
GROUPED = pytest.mark.parametrize("grouped", ["no groups", "groups on the host", "groups in tiles"])


def set_sizes(monkeypatch, sizes):
    for name, value in SIZES[sizes].items():
        monkeypatch.setattr(cuda_core if name == "PANEL_ROWS" else cuda_tiles, name, value)


def problem(seed, *, grouped="no groups", masked=NAMES[2:], rows=ROWS, columns=COLUMNS, num_groups=4):
    """Queries, documents, positives, and the masks in the order of the operators."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, *sizes):
        return torch.randint(low, high, sizes, generator=generator)

    sides = embeddings(seed, rows, columns, width=WIDTH)
    queries, documents = (dense_core.on_grid(side).float() for side in sides)
    masks = {
        "query_group": draw(0, num_groups, rows),
        "document_group": draw(1, num_groups + 1, columns),  # some groups are on one side only
        "column_ids": draw(-1, columns // 2, columns),
        "positive_ids": draw(0, columns // 2, rows),
        "known_ids": draw(-1, columns // 2, rows, 2),
        "margin": dense_core.MARGIN,
        "log_weights": torch.rand(columns, generator=generator) - 0.5,
    }
    kept = set(masked) | (set() if grouped == "no groups" else set(NAMES[:2]))
    if kept & {"positive_ids", "known_ids"}:
        kept |= {"column_ids"}
    return queries, documents, draw(0, columns, rows), [masks[name] if name in kept else None for name in NAMES]


def kernels_of(kind, grouped):
    make = emulated_tiles if kind == "emulated" else TorchTiles
    return make(groups_in_tiles=grouped == "groups in tiles")


def check_all(kernels, queries, documents, positives, masks, *, temperature=0.02, symmetric=False):
    """forward, backward and forward_backward against float64, on the same values of the embeddings."""
    temperature = torch.tensor(temperature)
    noise = 4e-7 / float(temperature) + 2e-6
    sides = queries, documents, positives
    found = cuda_core.forward(*sides, None, temperature, *masks, symmetric, kernels=kernels)
    wanted = dense_core.forward(*sides, None, temperature, *masks, symmetric)
    assert [got.dtype for got in found] == [torch.float32, torch.float64, torch.float64]
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=noise)

    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(len(queries), generator=generator) / max(1, len(queries))
    excess = (wanted[1] - wanted[0]).float()
    losses = torch.nn.functional.softplus(excess)
    vectors = [wanted[0].float() + losses, weights, weights * torch.expm1(-losses), None, None]
    if symmetric:
        totals = torch.logaddexp(wanted[2], wanted[0].max()).float()  # any finite total that is large enough
        vectors[3:] = totals, torch.randn(len(documents), generator=generator) / len(documents)
    arguments = *sides, wanted[0].float(), temperature, *masks, *vectors
    bound = ROUNDING[queries.dtype] + 5 * noise
    exact = dense_core.backward(*arguments)
    for got, want in zip(cuda_core.backward(*arguments, kernels=kernels), exact, strict=True):
        assert got.dtype == torch.float32 and got.shape == want.shape
        assert distance(got, want) <= bound

    arguments = *sides, weights, temperature, *masks
    found = cuda_core.forward_backward(*arguments, kernels=kernels)
    exact = dense_core.forward_backward(*arguments)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-5, atol=noise)
    for got, want in zip(found[1:], exact[1:], strict=True):
        assert distance(got, want) <= bound


@CUT
@GROUPED
@pytest.mark.parametrize("kind", ["torch", "emulated"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_results_equal_float64(monkeypatch, sizes, grouped, kind, dtype):
    set_sizes(monkeypatch, sizes)
    queries, documents, positives, masks = problem(1, grouped=grouped)
    check_all(kernels_of(kind, grouped), queries.to(dtype), documents.to(dtype), positives, masks)


@CUT
@GROUPED
@pytest.mark.parametrize("kind", ["torch", "emulated"])
@pytest.mark.parametrize("temperature", [1.0, 0.002])
def test_columns_are_summed_too_when_symmetric(monkeypatch, sizes, grouped, kind, temperature):
    set_sizes(monkeypatch, sizes)
    queries, documents, positives, masks = problem(2, grouped=grouped, masked=NAMES[2:6])
    kernels = kernels_of(kind, grouped)
    check_all(kernels, queries, documents, positives, masks, temperature=temperature, symmetric=True)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 30),
    columns=st.integers(2, 40),
    num_groups=st.integers(1, 12),
    grouped=st.sampled_from(["no groups", "groups on the host", "groups in tiles"]),
    masked=st.sets(st.sampled_from(NAMES[2:])),
    sizes=st.sampled_from(list(SIZES)),
)
def test_any_shape_and_masks(seed, rows, columns, num_groups, grouped, masked, sizes):
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_sizes(monkeypatch, sizes)
        given_ = problem(seed, grouped=grouped, masked=masked, rows=rows, columns=columns, num_groups=num_groups)
        check_all(TorchTiles(groups_in_tiles=grouped == "groups in tiles"), *given_)


@pytest.mark.parametrize("sizes", ["whole", "copies", "batched"])
@pytest.mark.parametrize("kind", ["torch", "emulated"])
def test_rows_with_columns_of_their_own_are_computed_together(monkeypatch, sizes, kind):
    set_sizes(monkeypatch, sizes)
    queries, documents, positives, masks = problem(3, rows=12, columns=48, masked=[])
    groups = torch.arange(12)
    masks[:2] = groups, groups.repeat_interleave(4)
    check_all(kernels_of(kind, "groups on the host"), queries, documents, positives, masks)
    tiles = cuda_tiles.group_tiles(queries, documents, *masks[:2])[2]
    assert len(tiles) < 12 and sum(tile.groups for tile in tiles) == 12


@CUT
@GROUPED
def test_shards_of_the_columns_add_up(monkeypatch, sizes, grouped):
    set_sizes(monkeypatch, sizes)
    kernels = kernels_of("torch", grouped)
    queries, documents, positives, masks = problem(4, grouped=grouped)
    temperature = torch.tensor(0.02)
    scores, exact, _ = dense_core.forward(queries, documents, positives, None, temperature, *masks, False)
    total = torch.full((ROWS,), -math.inf)
    shards = []
    for first, last in [(0, 11), (11, 12), (12, COLUMNS)]:
        of_columns = [masks[1], masks[2], masks[6]]
        query_group, _, _, positive_ids, known_ids, margin, _ = masks
        group, ids, weights = (None if x is None else x[first:last].contiguous() for x in of_columns)
        shard = query_group, group, ids, positive_ids, known_ids, margin, weights
        shards.append((first, last, shard))
        arguments = queries, documents[first:last], positives - first, scores.float(), temperature, *shard, False
        found, row_negatives, _ = cuda_core.forward(*arguments, kernels=kernels)
        assert torch.equal(found, scores.float()) and found is not arguments[3]
        total = torch.logaddexp(total, row_negatives)
    torch.testing.assert_close(total.double(), exact, rtol=0, atol=3e-5)

    vectors = torch.logaddexp(total, scores.float()), torch.ones(ROWS), torch.linspace(-1, 0, ROWS), None, None
    wanted = dense_core.backward(queries, documents, positives, scores, temperature, *masks, *vectors)
    query_gradient, document_gradients = 0, []
    for first, last, shard in shards:
        arguments = queries, documents[first:last], positives - first, scores.float(), temperature, *shard, *vectors
        of_queries, of_documents = cuda_core.backward(*arguments, kernels=kernels)
        query_gradient = query_gradient + of_queries
        document_gradients.append(of_documents)
    assert distance(query_gradient, wanted[0]) < 2e-4
    assert distance(torch.cat(document_gradients), wanted[1]) < 2e-4


@GROUPED
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_nothing_on_one_side(grouped, shape):
    rows, columns = shape
    kernels = kernels_of("emulated", grouped)
    queries, documents = torch.randn(rows, WIDTH), torch.randn(columns, WIDTH)
    positives = torch.full((rows,), 99)
    groups = (None, None) if grouped == "no groups" else (torch.zeros(rows).long(), torch.zeros(columns).long())
    masks = *groups, None, None, None, 0.1, None
    vectors = torch.ones(rows), torch.ones(rows), torch.ones(rows), torch.ones(columns), torch.ones(columns)
    given_ = queries, documents, positives, torch.ones(rows), torch.tensor(0.1), *masks
    _, row_negatives, column_negatives = cuda_core.forward(*given_, True, kernels=kernels)
    assert torch.equal(row_negatives, torch.full((rows,), -math.inf))
    assert torch.equal(column_negatives, torch.full((columns,), -math.inf))
    for gradient, side in zip(
        cuda_core.backward(*given_, *vectors, kernels=kernels), (queries, documents), strict=True
    ):
        assert gradient.shape == side.shape and not gradient.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_at_a_temperature_of_0002_is_exact_to_half_a_percent(dtype):
    queries, documents, positives = with_hard_negatives(5, 32, 256)
    queries, documents = queries.to(dtype), documents.to(dtype)
    weights = torch.full((32,), 1e-6)  # as of a batch of a million rows: below what float16 can hold
    arguments = queries, documents, positives, weights, torch.tensor(0.002), *(None,) * 7
    found = cuda_core.forward_backward(*arguments, kernels=emulated_tiles())
    wanted = dense_core.forward_backward(*arguments)
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-4, atol=2e-4)
    for got, want in zip(found[1:], wanted[1:], strict=True):
        assert distance(got, want) < 5e-3


class Watched(TorchDispatchMode):
    """Notes the bytes of new memory, and refuses what would wait for a device."""

    WAITS = "_local_scalar_dense", "nonzero", "equal", "_unique2", "is_nonzero", "bincount", "masked_select"

    def __init__(self):
        super().__init__()
        self.most_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function._schema.name.split("::")[1] not in self.WAITS, f"{function} waits for the device"
        out = function(*args, **(kwargs or {}))
        for result in out if isinstance(out, tuple | list) else [out]:
            if isinstance(result, torch.Tensor):
                self.most_bytes = max(self.most_bytes, result.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("grouped", ["no groups", "groups in tiles"])
@pytest.mark.parametrize("sizes", ["whole", "cut"])
def test_nothing_waits_for_the_device(monkeypatch, grouped, sizes):
    set_sizes(monkeypatch, sizes)
    kernels = kernels_of("emulated", grouped)
    queries, documents, positives, masks = problem(6, grouped=grouped)
    given_ = queries, documents, positives
    temperature, rows, columns = torch.tensor(0.02), torch.ones(ROWS), torch.ones(COLUMNS)
    with Watched():
        scores, _, _ = cuda_core.forward(*given_, None, temperature, *masks, True, kernels=kernels)
        vectors = 100 * rows, rows, rows, 100 * columns, columns
        cuda_core.backward(*given_, scores, temperature, *masks, *vectors, kernels=kernels)
        cuda_core.forward_backward(*given_, rows, temperature, *masks, kernels=kernels)


@GROUPED
@pytest.mark.parametrize("kind", ["torch", "emulated"])
def test_memory_is_bounded_whatever_the_columns(monkeypatch, grouped, kind):
    set_sizes(monkeypatch, "cut")
    queries, documents, positives, masks = problem(7, grouped=grouped, masked=[], rows=70, columns=400, num_groups=2)
    watched = Watched()
    watched.WAITS = ()  # groups on the host are looked at
    with watched:
        arguments = queries, documents, positives, torch.ones(70), torch.tensor(0.02), *masks
        cuda_core.forward_backward(*arguments, kernels=kernels_of(kind, grouped))
    outside = 4 * documents.numel()  # a gradient; all scores would be 112,000 bytes
    assert watched.most_bytes <= max(outside, 4 * 16 * 5 + 4 * 8 * 7)


@needs_library
def test_operators_are_served_on_cuda():
    if not load().cuda:
        pytest.skip("the compiled library was built without CUDA")
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if not has_kernel("tdro_hpc::infonce_forward", "CUDA"):
        cuda_core.register()
    for name in ("forward", "backward", "forward_backward"):
        assert has_kernel(f"tdro_hpc::infonce_{name}", "CUDA")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_the_benchmark_says_that_it_needs_a_gpu():
    command = [sys.executable, "benchmarks/infonce_gpu.py"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "needs a CUDA device" in done.stdout
