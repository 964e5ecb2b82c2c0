"""The operators of the loss on a GPU: results, memory, graphs, streams. Everything else is tested on the CPU."""

import math
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tdro_hpc.losses import cuda_core, fused
from tdro_hpc.losses.cuda_tiles import TileOps
from tdro_hpc.losses.library import load
from tests.reference import dense_core
from tests.reference.loss_cases import distance, with_hard_negatives

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SANITIZER = shutil.which("compute-sanitizer")
MEBIBYTE = 1 << 20
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # of gradients, relative
SHAPES = [(1, 1, 8), (130, 517, 72), (700, 5000, 384), (2100, 2300, 264)]
OPERATORS = torch.ops.tdro_hpc


@pytest.fixture(autouse=True)
def operators():
    """The operators of CUDA, and memory in which whatever is not written is NaN."""
    assert load().cuda, f"the library was built without CUDA: {load()}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("tdro_hpc::infonce_forward", "CUDA"):
        cuda_core.register()
    for megabytes in (1, 64, 512):
        torch.full((megabytes * MEBIBYTE // 4,), math.nan, device="cuda")


def problem(seed, rows, columns, width, dtype, grouped):
    """Everything that the operators take, on the host."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, *sizes):
        return torch.randint(low, high, sizes, generator=generator)

    sides = [torch.nn.functional.normalize(torch.randn(n, width, generator=generator)) for n in (rows, columns)]
    groups = (None, None) if grouped == "none" else (draw(0, 7, rows), draw(0, 7, columns))
    ids = draw(-1, columns, columns), draw(0, columns, rows), draw(-1, columns, rows, 3)
    masks = *groups, *ids, dense_core.MARGIN, torch.rand(columns, generator=generator) - 0.5
    return *(dense_core.on_grid(side).to(dtype) for side in sides), draw(0, columns, rows), masks


def on_device(values, *, host_groups=False):
    """Tensors moved to the GPU; of masks, the first two stay where they are for groups on the host."""
    moved = [value.cuda() if isinstance(value, torch.Tensor) else value for value in values]
    return [*values[:2], *moved[2:]] if host_groups else moved


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("grouped", ["none", "host", "device"])
def test_results_equal_float64(shape, dtype, grouped):
    seed = secrets.randbits(32)
    queries, documents, positives, masks = problem(seed, *shape, dtype, grouped)
    temperature = torch.tensor(0.02)
    sides = on_device((queries, documents, positives))
    device_masks = on_device(masks, host_groups=grouped == "host")
    symmetric_masks, device_symmetric = (*masks[:6], None), (*device_masks[:6], None)

    found = OPERATORS.infonce_forward(*sides, None, temperature, *device_symmetric, True)
    wanted = dense_core.forward(queries, documents, positives, None, temperature, *symmetric_masks, True)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.cpu().double(), want, rtol=0, atol=4e-5, msg=lambda text: f"seed {seed}: {text}")

    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(shape[0], generator=generator) / shape[0]
    totals = torch.logaddexp(wanted[0], wanted[1]).float()
    column_totals = torch.logaddexp(wanted[2], wanted[2].max()).float().nan_to_num(neginf=0.0)
    vectors = totals, weights, -weights, column_totals, torch.ones(shape[1]) / shape[1]
    given = wanted[0].float()
    exact = dense_core.backward(queries, documents, positives, given, temperature, *symmetric_masks, *vectors)
    arguments = *sides, given.cuda(), temperature.cuda(), *device_symmetric, *on_device(vectors)
    for got, want in zip(OPERATORS.infonce_backward(*arguments), exact, strict=True):
        assert distance(got.cpu(), want) <= BOUNDS[dtype], f"seed {seed}"

    exact = dense_core.forward_backward(queries, documents, positives, weights, temperature, *masks)
    found = OPERATORS.infonce_forward_backward(*sides, weights.cuda(), temperature, *device_masks)
    torch.testing.assert_close(
        found[0].cpu().double(), exact[0], rtol=1e-4, atol=4e-5, msg=lambda text: f"{seed} {text}"
    )
    for got, want in zip(found[1:], exact[1:], strict=True):
        assert distance(got.cpu(), want) <= BOUNDS[dtype], f"seed {seed}"


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("groups", [1, 5])
def test_products_are_float32_and_add_in_place(dtype, groups):
    left, right = (torch.randn(groups, *shape, device="cuda", dtype=dtype) for shape in [(70, 96), (96, 40)])
    wanted = left.double() @ right.double()
    out = torch.full((groups, 70, 48), math.nan, device="cuda")[..., :40]
    TileOps().multiply(left, right, out, accumulate=False)
    assert distance(out, wanted) < 1e-6
    TileOps().multiply(left, right, out, accumulate=True)
    assert distance(out, 2 * wanted) < 1e-6
    transposed = torch.full((groups, 96, 40), math.nan, device="cuda")
    TileOps().multiply(left.mT, out.to(dtype), transposed, accumulate=False)
    assert distance(transposed, left.double().mT @ out.to(dtype).double()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_at_a_temperature_of_0002(dtype):
    queries, documents, positives = with_hard_negatives(secrets.randbits(32), 256, 2048, width=1024)
    arguments = queries.to(dtype), documents.to(dtype), positives, torch.full((256,), 1e-6), torch.tensor(0.002)
    wanted = dense_core.forward_backward(*arguments, *(None,) * 7)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = OPERATORS.infonce_forward_backward(*on_device(arguments), *(None,) * 7)
    assert distance(found[0].cpu(), wanted[0]) < 1e-4
    for got, want in zip(found[1:], wanted[1:], strict=True):
        assert distance(got.cpu(), want) <= 5e-3


def large(dtype=torch.bfloat16, *, rows=8192, columns=65536, width=1024):
    sides = [torch.randn(n, width, device="cuda", dtype=dtype) / width**0.5 for n in (rows, columns)]
    return *sides, torch.randint(0, columns, (rows,), device="cuda")


def run_all(queries, documents, positives, temperature, *masks):
    """Results of all operators."""
    rows = torch.ones(len(queries), device="cuda")
    found = OPERATORS.infonce_forward(queries, documents, positives, None, temperature, *masks, True)
    columns = found[2].clamp_min(100.0).float(), torch.ones(len(documents), device="cuda")
    vectors = torch.logaddexp(found[0].double(), found[1]).float(), rows, -rows, *columns
    backward = OPERATORS.infonce_backward(queries, documents, positives, found[0], temperature, *masks, *vectors)
    both = OPERATORS.infonce_forward_backward(queries, documents, positives, rows, temperature, *masks)
    return *found, *backward, *both


@pytest.mark.parametrize("columns", [24576, 65536])  # with three matrix products and with four
def test_workspace_is_at_most_256_mebibytes(columns):
    sides = large(columns=columns)
    weights, temperature = torch.ones(len(sides[0]), device="cuda"), torch.tensor(0.02, device="cuda")
    OPERATORS.infonce_forward_backward(*large(rows=256, columns=512), weights[:256], temperature, *(None,) * 7)
    torch.cuda.synchronize()  # the workspace of cuBLAS is there now
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = OPERATORS.infonce_forward_backward(*sides, weights, temperature, *(None,) * 7)
    bytes_of_results = sum(result.nbytes for result in results)
    assert torch.cuda.max_memory_allocated() - before - bytes_of_results <= 256 * MEBIBYTE


def test_nothing_waits_for_the_device_and_the_bits_are_the_same_each_time():
    sides, temperature = large(rows=3000, columns=9001), torch.tensor(0.02, device="cuda")
    groups = torch.randint(0, 5, (3000,), device="cuda"), torch.randint(0, 5, (9001,), device="cuda")
    for masks in [(None,) * 7, (*groups, None, None, None, 0.1, None)]:
        first = run_all(*sides, temperature, *masks)
        torch.cuda.set_sync_debug_mode("error")
        try:
            second = run_all(*sides, temperature, *masks)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for got, want in zip(second, first, strict=True):
            assert torch.equal(got, want)


def test_a_graph_of_the_operators_can_be_replayed():
    sides, temperature = large(rows=1500, columns=5003), torch.tensor(0.02, device="cuda")
    masks = (None,) * 7
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run_all(*sides, temperature, *masks)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_all(*sides, temperature, *masks)
    for side, fresh in zip(sides, large(rows=1500, columns=5003), strict=True):
        side.copy_(fresh)
    temperature.fill_(0.05)
    graph.replay()
    for got, want in zip(captured, run_all(*sides, temperature, *masks), strict=True):
        assert torch.equal(got, want)


def test_groups_on_the_host_are_refused_in_a_graph():
    sides, temperature = large(rows=100, columns=200), torch.tensor(0.02, device="cuda")
    masks = torch.zeros(100).long(), torch.zeros(200).long(), *(None,) * 5
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(ValueError, match="query_group is on the host"), torch.cuda.graph(graph):
        OPERATORS.infonce_forward(*sides, None, temperature, *masks, False)


def test_work_goes_to_the_current_stream():
    sides, temperature = large(rows=500, columns=3001), torch.tensor(0.02, device="cuda")
    queries = sides[0].clone()
    wanted = run_all(*sides, temperature, *(None,) * 7)
    sides[0].fill_(math.nan)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # the queries come late
        sides[0].copy_(queries)
        found = run_all(*sides, temperature, *(None,) * 7)
    stream.synchronize()
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got, want)


def run_small_problems():
    """All operators on every type and kind of groups, in sizes that fill no block; for a process of its own."""
    assert fused.obstacle(torch.float32, "cuda") == ""
    for shape in SHAPES[:2]:
        for dtype in BOUNDS:
            for grouped in ("none", "host", "device"):
                *sides, masks = problem(0, *shape, dtype, grouped)
                masks = on_device((*masks[:6], None), host_groups=grouped == "host")
                run_all(*on_device(sides), torch.tensor(0.02), *masks)
    torch.cuda.synchronize()


@pytest.mark.skipif(SANITIZER is None, reason="needs compute-sanitizer of the CUDA toolkit on PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_has_nothing_to_say(tool):
    """No access outside of a tensor by any kernel, and no race for shared memory in those of the library."""
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "1", "--report-api-errors", "no"]  # torch tries calls out
    command += ["--kernel-name", "kernel_substring=tdro_tiles"] if tool == "racecheck" else []
    code = "from tests.losses.test_cuda_device import run_small_problems; run_small_problems(); print('all ran')"
    # Each tensor in memory of its own: what is read beyond it is another's in a block of torch's cache.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [*command, sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0 and "all ran" in done.stdout, done.stdout + done.stderr
    assert "SUMMARY: 0 " in done.stdout, done.stdout
