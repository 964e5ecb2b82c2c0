"""The choice of the implementation, the operators as torch and its compiler see them, threads, and memory."""

import itertools
import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from tdro_hpc.losses import fused, grouped_infonce, host, infonce, torch_core, torch_ops, weighted_infonce
from tdro_hpc.losses.library import Library, load
from tests.reference.loss_cases import (
    IMPLEMENTATIONS,
    choices,
    distance,
    embeddings,
    needs_library,
    values_and_gradients,
    with_hard_negatives,
)

ROOT = Path(__file__).parents[2]
both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["infonce_forward", "infonce_backward", "infonce_forward_backward"]


@pytest.fixture
def no_library(monkeypatch):
    """As if nothing had been built."""
    absent = Library(None, reason="libtdro_kernels.so is not built. Type `make build` in /somewhere.")
    monkeypatch.setattr(fused, "_library", lambda: absent)
    caches = infonce._library_serves, infonce._warn_of_slow_loss
    for function in caches:
        function.cache_clear()
    yield
    for function in caches:
        function.cache_clear()


def example(**options):
    return grouped_infonce(torch.eye(2), torch.eye(2), torch.arange(2), temperature=0.5, **options)


def test_without_the_library_auto_warns_once_and_says_what_to_type(no_library):
    with pytest.warns(
        UserWarning, match="plain torch, slower: libtdro_kernels.so is not built. Type `make build`"
    ) as seen:
        example()
    assert len(seen) == 1 and seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        example()
        grouped_infonce(torch.eye(2).half(), torch.eye(2).half(), torch.arange(2), temperature=0.5)


def test_without_the_library_torch_and_float64_warn_of_nothing(no_library):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        example(implementation="torch")
        grouped_infonce(torch.eye(2).double(), torch.eye(2).double(), torch.arange(2), temperature=0.5)


def test_without_the_library_fused_is_an_error(no_library):
    with pytest.raises(
        ValueError, match="implementation is 'fused', but libtdro_kernels.so is not built. Type `make build`"
    ):
        example(implementation="fused")


def test_a_library_without_kernels_for_a_device_says_so(monkeypatch):
    monkeypatch.setattr(fused, "_library", lambda: Library(Path("x.so"), cpu=True, cuda=False))
    assert fused.obstacle(torch.float16, "cpu") == ""
    assert "x.so was built without cuda. Type `make build`" in fused.obstacle(torch.float32, "cuda")
    assert "serves cpu and cuda, and the embeddings are on mps" in fused.obstacle(torch.float32, "mps")


@needs_library
def test_auto_takes_the_library_where_it_serves(monkeypatch):
    called = []
    plain = host.losses
    monkeypatch.setattr(host, "losses", lambda *arguments: called.append(1) or plain(*arguments))
    example()
    assert called == [1]
    grouped_infonce(torch.eye(2).double(), torch.eye(2).double(), torch.arange(2), temperature=0.5)
    example(implementation="torch")
    assert called == [1]


@needs_library
@pytest.mark.parametrize("name", NAMES)
def test_the_compiled_operators_take_what_those_of_torch_take(name):
    compiled = getattr(torch.ops.tdro_hpc, name).default._schema
    of_torch = getattr(torch.ops.tdro_hpc, f"torch_{name}").default._schema
    assert [(a.name, str(a.type)) for a in compiled.arguments] == [(a.name, str(a.type)) for a in of_torch.arguments]
    assert [str(a.type) for a in compiled.returns] == [str(a.type) for a in of_torch.returns]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("operators", ["torch", pytest.param("compiled", marks=needs_library)])
def test_operators_keep_to_their_schema_and_their_shapes(operators, name, masked):
    assert operators == "torch" or fused.obstacle(torch.float32, "cpu") == ""
    queries, documents = (vectors.float() for vectors in embeddings(1, 6, 14))
    positives, options = choices(2, 6, 14)
    columns = [options["query_group"], options["document_group"], options["document_ids"]]
    masks = *columns, options["document_ids"][positives], options["known_positive_ids"], 0.05
    masks = (*masks, options["column_weights"].log()) if masked else (None,) * 7
    rows, temperature = torch.randn(6), torch.tensor(0.1)
    rest = {
        "infonce_forward": (None, temperature, *masks, not masked),
        "infonce_backward": (rows, temperature, *masks, rows, rows, rows, *(torch.zeros(14), torch.ones(14))),
        "infonce_forward_backward": (rows, temperature, *masks),
    }[name]
    operator = getattr(torch.ops.tdro_hpc, f"torch_{name}" if operators == "torch" else name).default
    torch.library.opcheck(operator, (queries, documents, positives, *rest))


COMPILED = {
    "plain": {},
    "masks": choices(2, 9, 40)[1],
    "symmetric": {"symmetric": True},
}


@both
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", COMPILED.values(), ids=COMPILED.keys())
def test_a_function_with_the_loss_compiles_whole(implementation, weighted, options):
    queries, documents = (vectors.float() for vectors in embeddings(1, 9, 40, width=16))
    positives, weights = choices(2, 9, 40)[0], torch.linspace(-1, 2, 9)

    def total(queries, documents, temperature):
        keys = options | {"temperature": temperature, "implementation": implementation}
        if weighted:
            return weighted_infonce(2 * queries, documents, positives, row_weights=weights, **keys)[0]
        return (grouped_infonce(2 * queries, documents, positives, **keys) * weights).sum()

    results = []
    torch._dynamo.reset()
    for function in (total, torch.compile(total, fullgraph=True, backend="aot_eager")):
        sides = (
            queries.clone().requires_grad_(),
            documents.clone().requires_grad_(),
            torch.tensor(0.1, requires_grad=True),
        )
        loss = function(*sides)
        loss.backward()
        results.append([loss.detach(), *(side.grad for side in sides)])
    for got, want in zip(*results, strict=True):
        assert distance(got, want) <= 2e-6  # other operators, and the compiler may change the order of a sum
    fixed = torch.compile(lambda q, d: total(q, d, 0.1), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(fixed(queries, documents), results[0][0])


def of_every_loss(queries, documents, positives, row_weights, **options):
    """Losses and gradients of the rows, of their symmetric loss where there are no column weights, and of their sum."""
    inputs, results = (queries, documents, positives, row_weights), []
    keys = options | {"temperature": 0.02, "implementation": "fused"}
    for symmetric in (False, True)[: 1 + ("column_weights" not in options)]:
        results.extend(values_and_gradients(grouped_infonce, *inputs, symmetric=symmetric, **keys))
    sides = queries.clone().requires_grad_(), documents.clone().requires_grad_()
    total, losses = weighted_infonce(*sides, positives, row_weights=row_weights, **keys)
    total.backward()
    return [*results, losses, sides[0].grad, sides[1].grad]


def problem_of(masks, dtype, *, rows=300, columns=1500, width=70):
    """A problem of several panels and strips, and masks: some rows have no columns in their groups, and vice versa."""
    queries, documents, positives = with_hard_negatives(1, rows, columns, width=width)
    groups = {"query_group": torch.arange(rows) % 8, "document_group": torch.arange(columns) % 9 + 1}
    halves = {"query_group": torch.arange(rows) % 2, "document_group": torch.arange(columns) % 2}
    options = {"none": {}, "groups": groups, "halves": halves, "all": choices(2, rows, columns)[1]}[masks]
    return (queries.to(dtype), documents.to(dtype), positives % 40, torch.linspace(-1, 2, rows)), options


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("masks", "size"),
    [
        *((masks, {}) for masks in ("none", "groups", "all")),
        # Groups above 2^24 multiply-adds are spread over the threads, of smaller ones each is done by one thread; of
        # float32, those above 1024 columns in strips.
        ("halves", {"rows": 340, "columns": 2380, "width": 140}),
        ("halves", {"rows": 340, "columns": 1020, "width": 250}),
        ("none", {"rows": 300, "columns": 600}),
    ],
)
def test_any_number_of_threads_gives_the_same_bits(dtype, masks, size):
    inputs, options = problem_of(masks, dtype, **size)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 17):
            torch.set_num_threads(threads)
            results.append(of_every_loss(*inputs, **options))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(got, want) for got, want in zip(other, results[0], strict=True))


def of_many_problems():
    """Whole and in parts; a width of whole blocks of 32 and one of not."""
    found, megabyte = [], host.MEGABYTE
    for room, dtype, masks in itertools.product((megabyte, 0), DTYPES, ("none", "groups", "all")):
        for width in (64, 70):
            host.MEGABYTE = room
            inputs, options = problem_of(masks, dtype, width=width)
            found += of_every_loss(*inputs, **options)
    host.MEGABYTE = megabyte
    return found


POISONED = """
import sys
import torch
from tests.losses import test_fused
fresh = torch.empty(100_003)
print(float(fresh.min()), float(fresh.max()))
torch.save(test_fused.of_many_problems(), sys.argv[1])
"""


@needs_library
@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc fills memory that nobody has written")
def test_nothing_is_left_unwritten(tmp_path):
    """The library's tensors come from malloc, past torch's own filling: glibc puts 3e38 into what it hands out."""
    found = tmp_path / "found.pt"
    done = subprocess.run(
        [sys.executable, "-c", POISONED, found],
        cwd=ROOT,
        env={**os.environ, "MALLOC_PERTURB_": "128", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [float(word) > 3e38 for word in done.stdout.split()] == [True, True]
    wanted = of_many_problems()
    assert all(result.isfinite().all() for result in wanted)
    assert all(torch.equal(got, want) for got, want in zip(torch.load(found), wanted, strict=True))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "num_groups"), [(16, None), (160, None), (16, 2), (16, 60)])
def test_what_is_kept_of_the_scores_changes_no_gradient(dtype, width, num_groups, monkeypatch):
    """Of 600 x 7800 scores the first panels are kept; the other scores are computed once more."""
    queries, documents, positives = with_hard_negatives(1, 600, 7800, width=width)
    inputs = queries.to(dtype), documents.to(dtype), positives, torch.linspace(-1, 2, 600)
    keys = {"temperature": torch.tensor(0.05), "implementation": "fused"}  # a number alone may not go by `host`
    if num_groups is not None:
        keys |= {"query_group": torch.arange(600) % num_groups, "document_group": torch.arange(7800) % num_groups}
    plain, kept_floats = host.losses, []

    def noted(*arguments):
        results = plain(*arguments)
        kept_floats.append(results[2].numel())
        return results

    monkeypatch.setattr(host, "losses", noted)
    found = values_and_gradients(grouped_infonce, *inputs, **keys)
    assert 0 < kept_floats[0] <= 2**22 and (num_groups is not None or kept_floats[0] < 600 * 7800)
    monkeypatch.setattr(host, "losses", lambda *arguments: plain(*arguments[:-1], False))
    again = values_and_gradients(grouped_infonce, *inputs, **keys)
    assert torch.equal(found[0], again[0])
    rounding = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert all(distance(got, want) < rounding for got, want in zip(found[1:], again[1:], strict=True))


@needs_library
@pytest.mark.parametrize("num_groups", [None, 2])
def test_few_columns_of_which_one_panel_of_three_is_kept(num_groups, monkeypatch):
    """600 x 600 scores by blocks, in panels of 256 rows; of two groups those of a row's own."""
    rows = 600 * (num_groups or 1)
    queries, documents, positives = with_hard_negatives(1, rows, rows)
    inputs = queries.float(), documents.float(), positives, torch.linspace(-1, 2, rows)
    keys = {"temperature": torch.tensor(0.05), "implementation": "fused"}  # a number alone may not go by `host`
    if num_groups is not None:
        keys |= {"query_group": torch.arange(rows) % num_groups, "document_group": torch.arange(rows) % num_groups}
    plain, panels = host.losses, []

    def noted(*arguments):
        results = plain(*arguments)
        panels.append(results[2].numel() / (601 * 256))
        return results

    monkeypatch.setattr(host, "losses", noted)
    all_kept, one_kept = (
        values_and_gradients(grouped_infonce, *inputs, workspace_mb=megabytes, **keys) for megabytes in (16, 3)
    )
    assert panels[0] == 3 * (num_groups or 1) and 1 <= panels[1] < 2
    assert torch.equal(all_kept[0], one_kept[0])
    assert all(distance(got, want) < 1e-5 for got, want in zip(all_kept[1:], one_kept[1:], strict=True))


@needs_library
def test_nothing_is_kept_where_no_gradient_follows(monkeypatch):
    plain, kept_floats = host.losses, []

    def noted(*arguments):
        results = plain(*arguments)
        kept_floats.append(results[2].numel())
        return results

    monkeypatch.setattr(host, "losses", noted)
    with torch.no_grad():
        grouped_infonce(torch.eye(2, requires_grad=True), torch.eye(2), torch.arange(2), temperature=0.5)
    example()
    assert kept_floats == [0, 0]


MEMORY = """
import multiprocessing, re, sys, torch
from pathlib import Path
from tdro_hpc.losses import grouped_infonce, weighted_infonce
def step(implementation, loss, dtype, rows, columns):
    queries, documents = (torch.empty(n, 32, dtype=getattr(torch, dtype)).normal_(0, 0.1) for n in (rows, columns))
    inputs = queries.requires_grad_(), documents.requires_grad_(), torch.arange(rows)
    options = {"temperature": 0.1, "implementation": implementation, "workspace_mb": 16}
    before = peak_mib()
    if loss == "weighted":
        weighted_infonce(*inputs, row_weights=torch.ones(rows), **options)[0].backward()
    else:
        grouped_infonce(*inputs, symmetric=loss == "symmetric", **options).mean().backward()
    return peak_mib() - before
def peak_mib():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
def of_step(*arguments):
    *arguments, rows, columns = arguments
    step(*arguments, 64, 256)
    return step(*arguments, rows, columns)
torch.set_num_threads(1)
cases = [case.split() for case in sys.argv[1:]]
cases = [(*words, int(rows), int(columns)) for *words, rows, columns in cases]
with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:  # a process, and a peak, for each
    print(*pool.starmap(of_step, cases, chunksize=1))
"""


SMALL, LARGE = "4096 16384", "8192 32768"  # scores of 256 MiB and 1 GiB, float32 gradients of 2.5 and 5 MiB
PEAKS = {  # MiB above the embeddings: gradients and, of the library, 16 MiB beside them, and what an allocator wastes
    "torch": (64, [f"torch {loss} float32 {SMALL}" for loss in ("grouped", "symmetric", "weighted")]),
    "fused": (
        24,
        [
            *(f"fused {loss} float32 {SMALL}" for loss in ("grouped", "symmetric", "weighted")),
            *(f"fused {loss} bfloat16 {SMALL}" for loss in ("grouped", "weighted")),
            *(f"fused weighted {dtype} {LARGE}" for dtype in ("float32", "bfloat16")),
        ],
    ),
}


@both
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_peak_memory_is_far_below_the_scores(implementation):
    most_mib, cases = PEAKS[implementation]
    answer = subprocess.run(
        [sys.executable, "-c", MEMORY, *cases], cwd=ROOT, capture_output=True, text=True, check=True
    )
    peaks = dict(zip(cases, map(float, answer.stdout.split()), strict=True))

    assert max(peaks.values()) < most_mib, peaks


def test_shapes_without_values_are_those_of_the_results():
    queries, documents = embeddings(1, 6, 14)
    positives, masks, temperature = torch.arange(6), (None,) * 7, torch.tensor(0.1, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        sides = queries.to(dtype), documents.to(dtype), positives
        for symmetric in (False, True):
            arguments = *sides, None, temperature, *masks, symmetric
            found, wanted = torch_ops.forward_shapes(*arguments), torch_core.forward(*arguments)
            assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in wanted]
        arguments = *sides, torch.ones(6), temperature, *masks
        found, wanted = torch_ops.forward_backward_shapes(*arguments), torch_core.forward_backward(*arguments)
        assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in wanted]


@needs_library
def test_the_library_is_loaded_once():
    assert load() is load() and fused._library() is fused._library()
