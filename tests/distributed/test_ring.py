"""Columns that go round 2 and 4 ranks against all columns in one process. One launch for each number of ranks."""

import pytest
import torch

from tdro_hpc.losses.infonce import grouped_infonce
from tdro_hpc.parallel.process import Process
from tests.distributed.launching import run_ranks
from tests.distributed.ring_rank import CASES, ROWS, TYPES, check_all, chosen, problem, temperature_of
from tests.reference.loss_cases import needs_library

ALONE = Process(data_rank=0, data_size=1, local_rank=0, device=torch.device("cpu"))
CLOSE = {
    "float64": {"rtol": 1e-10, "atol": 1e-12},
    "float32": {"rtol": 1e-4, "atol": 2e-5},  # sums in another order, divided by a temperature of 0.05
    "bfloat16": {
        "rtol": 1e-2,
        "atol": 3e-2,
    },  # of gradients up to 20; 8 bits for each, and for a share where it is fused
    "float16": {"rtol": 2e-3, "atol": 4e-3},  # 11 bits
}
WAYS = [
    *((dtype, "torch") for dtype in TYPES),
    *(pytest.param(dtype, "fused", marks=needs_library) for dtype in ("float32", "bfloat16", "float16")),
]


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"ring{request.param}")
    run_ranks("ring_rank.py", folder, request.param, [])
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.fixture(scope="module")
def alone():
    return check_all(ALONE)


def whole_problem(world, case, dtype):
    """Losses and gradients of all rows over all columns, float64, of the same embeddings as in `dtype`.

    The gradient of a temperature is that of each rank's rows [ranks].
    """
    parts = [problem(rank, world, TYPES[dtype]) for rank in range(world)]
    queries, documents = (torch.cat([part[i].detach().double() for part in parts]).requires_grad_() for i in (0, 1))
    first, positives = 0, []
    for part in parts:
        positives.append(first + part[2])
        first += len(part[1])
    options = {name: part for name, part in chosen(parts[0][3], case).items() if not isinstance(part, torch.Tensor)}
    for name in set(chosen(parts[0][3], case)) - set(options):
        options[name] = torch.cat([part[3][name] for part in parts])
    temperature = temperature_of(case)
    losses = grouped_infonce(queries, documents, torch.cat(positives), temperature=temperature, **options)
    weighted = torch.cat([part[4] for part in parts]).double() * losses
    gradients = torch.autograd.grad(weighted.sum(), [queries, documents], retain_graph=True)
    wanted = {"losses": losses.detach(), "queries": gradients[0], "documents": gradients[1]}
    if temperature.requires_grad:
        of_ranks = [rows.sum() for rows in weighted.split([len(part[0]) for part in parts])]
        wanted["temperature"] = torch.cat(
            [torch.autograd.grad(total, [temperature], retain_graph=True)[0].reshape(1) for total in of_ranks]
        )
    return wanted


@pytest.mark.parametrize(("dtype", "implementation"), WAYS)
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_all_columns_in_one_process(ranks, case, dtype, implementation):
    wanted = whole_problem(len(ranks), case, dtype)
    assert wanted["losses"].abs().sum() > 1 and wanted["documents"].abs().max() > 0.1
    for name in ("losses", "queries", "documents"):
        found = torch.cat([rank["exact"][case, dtype, implementation][name] for rank in ranks])
        of_sums = "float32" if dtype in ("bfloat16", "float16") and name == "losses" else dtype
        assert found.dtype == TYPES[of_sums], name
        torch.testing.assert_close(found.double(), wanted[name], **CLOSE[of_sums])


@pytest.mark.parametrize(("dtype", "implementation"), WAYS)
def test_gradient_of_a_temperature_is_that_of_the_rows_of_each_rank(ranks, dtype, implementation):
    """So that their sum is the gradient of the whole batch."""
    wanted = whole_problem(len(ranks), "learned temperature", dtype)["temperature"]
    found = [rank["exact"]["learned temperature", dtype, implementation]["temperature"] for rank in ranks]
    assert wanted.abs().min() > 10
    torch.testing.assert_close(torch.stack(found), wanted, rtol=CLOSE[dtype]["rtol"], atol=0)


@pytest.mark.parametrize("way", ["ring", "gather"])
def test_training_steps_plain_and_cached_are_those_of_one_process(ranks, alone, way):
    wanted = alone["training"]["gather"]
    assert wanted["losses"][0].abs().sum() > 0.1
    for number in (0, 1):  # plain, cached
        losses = torch.cat([rank["training"][way]["losses"][number] for rank in ranks])
        torch.testing.assert_close(losses, wanted["losses"][number], **CLOSE["float32"])
        for rank in ranks:
            found = rank["training"][way]["gradients"][number]
            torch.testing.assert_close(found, wanted["gradients"][number], **CLOSE["float32"])
    assert len(losses) == ROWS


def test_columns_go_round_above_the_limit_and_all_ranks_agree(ranks, alone):
    world = len(ranks)
    for number, columns in enumerate((970, 980)):
        sizes = [columns + 1 - 2 * (rank % 2) for rank in range(world)]
        for rank, result in enumerate(ranks):
            ring_sizes, here = result["choice"][number]
            assert (ring_sizes, here) == ((sizes, sizes[rank]) if columns == 980 else (None, sum(sizes)))
    assert [sizes for sizes, _ in alone["choice"]] == [None, None], "one rank has nobody to pass columns to"


@pytest.mark.parametrize("way", ["ring", "gather"])
def test_a_rank_makes_its_share_of_the_scores(ranks, alone, way):
    """1 / W of those of the whole batch, which every rank makes where all rows are gathered too."""
    world = len(ranks)
    whole_batch = 2 * (4 * world) * (512 * world)  # forward and backward
    assert alone["cost"][way]["scores"] * world**2 == whole_batch
    assert [rank["cost"][way]["scores"] for rank in ranks] == [whole_batch // world] * world


def test_ring_holds_two_shards_and_their_gradients_whatever_the_number_of_ranks(ranks):
    world = len(ranks)
    for rank in ranks:
        ring, gather = rank["cost"]["ring"], rank["cost"]["gather"]
        assert min(2, world - 1) <= ring["forward"] < 2.2
        assert ring["backward"] < 5.2, "two shards, and three of gradients: made, sent, received"
        assert gather["forward"] >= world and gather["backward"] >= world


def last(events, event):
    return len(events) - 1 - events[::-1].index(event)


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_next_columns_are_under_way_while_a_rank_computes_with_the_present_ones(ranks, way):
    world = len(ranks)
    for events in (rank["order"][way] for rank in ranks):
        for turn in range(world - 1):
            assert events.index(f"columns {turn} begun") < events.index(f"turn {turn} computing"), events
            assert events.index(f"turn {turn} computed") < events.index(f"columns {turn} waited for"), events
            assert last(events, f"columns {turn} waited for") < events.index(f"turn {turn + 1} computing"), events
        assert f"turn {world - 1} computed" in events and f"columns {world - 1} begun" not in events


def test_gradients_of_columns_are_under_way_while_a_rank_computes_those_of_the_next(ranks):
    world = len(ranks)
    for events in (rank["order"]["backward"] for rank in ranks):
        for turn in range(world - 1):
            assert events.index(f"turn {turn} computed") < events.index(f"gradients {turn} begun"), events
            assert events.index(f"gradients {turn} begun") < events.index(f"turn {turn + 1} computing"), events
            assert events.index(f"turn {turn + 1} computed") < events.index(f"gradients {turn} waited for"), events
        assert f"gradients {world - 1} waited for" in events, "they end with their owner"
