"""Losses, gradients and optimiser steps of 2 and 4 ranks against one process. One launch for each number of ranks."""

import pytest
import torch

from tdro_hpc.parallel.process import Process
from tests.distributed.launching import run_ranks
from tests.distributed.loss_rank import (
    LOSS,
    POLICIES,
    ROWS,
    TRAINING,
    check_all,
    gradients,
    losses_of,
    parts_of,
    slices,
    uneven_batch,
)
from tests.reference.infonce import slow_infonce
from tests.reference.loss_cases import needs_library
from tests.reference.toy import ToyEncoder, rows_of_batch, toy_batch

CLOSE = {"rtol": 1e-4, "atol": 1e-6}  # float32 sums in another order, divided by a temperature of 0.05


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    run_ranks("loss_rank.py", folder, request.param, [])
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.fixture(scope="module")
def alone():
    return check_all(Process(data_rank=0, data_size=1, local_rank=0, device=torch.device("cpu")))


def split_losses(batch, negatives, world):
    """Row losses of one process where each rank of `world` would see its own rows only; and the encoder."""
    encoder = ToyEncoder()
    mine = [rows_of_batch(batch, rows) for rows in slices(world)]
    embedded = [(part, [encoder(tokens) for tokens in parts_of(part)]) for part in mine]
    return torch.cat([losses_of(embeddings, part, negatives) for part, embeddings in embedded]), encoder


@pytest.mark.parametrize("negatives", POLICIES)
def test_losses_and_gradients_are_those_of_one_process(ranks, alone, negatives):
    if negatives in ("group", "world"):
        wanted = alone["policies"][negatives]["losses"]
        wanted_gradients = alone["policies"][negatives]["gradients"]
    else:  # task and batch: a rank's own rows are the batch
        losses, encoder = split_losses(toy_batch(1, ROWS, own_task=1), negatives, len(ranks))
        losses.mean().backward()
        wanted, wanted_gradients = losses.detach(), gradients(encoder)
    found = [rank["policies"][negatives] for rank in ranks]
    assert wanted.abs().sum() > 0.1, "the rows have something to learn"
    torch.testing.assert_close(torch.cat([rank["losses"] for rank in found]), wanted, **CLOSE)
    for rank in found:
        torch.testing.assert_close(rank["gradients"], wanted_gradients, **CLOSE)


@pytest.mark.parametrize("negatives", ["group", "world"])
def test_a_step_is_that_of_one_process_and_equal_on_all_ranks(ranks, alone, negatives):
    wanted = alone["policies"][negatives]
    assert wanted["norm"] > TRAINING.max_grad_norm, "the step is clipped"
    for rank in ranks:
        found = rank["policies"][negatives]
        torch.testing.assert_close(found["norm"], wanted["norm"], **CLOSE)
        torch.testing.assert_close(found["parameters"], wanted["parameters"], rtol=1e-3, atol=1e-4)  # Adam's first step
        for name, value in found["parameters"].items():
            assert torch.equal(value, ranks[0]["policies"][negatives]["parameters"][name]), name


def test_cached_and_accumulated_gradients_are_those_of_one_uncached_process(ranks):
    encoder = ToyEncoder()
    for batch in (toy_batch(1, ROWS, own_task=1), toy_batch(50, ROWS)):
        embeddings = [encoder(tokens) for tokens in parts_of(batch)]
        (losses_of(embeddings, batch, "world").mean() / 2).backward()
    assert len({chunks for _, chunks in (rank["cache"] for rank in ranks)}) > 1, "ranks wait for none of the others'"
    for rank in ranks:
        torch.testing.assert_close(rank["cache"][0], gradients(encoder), **CLOSE)


@pytest.mark.parametrize("encoder", ["dropout", "backbone"])
def test_cache_replays_dropout_on_every_rank(ranks, alone, encoder):
    checked = [rank[encoder] for rank in [alone, *ranks] if rank[encoder] is not None]
    assert len(checked) == (1 + len(ranks) if encoder == "dropout" else 2 if len(ranks) == 2 else 0)
    for found in checked:
        assert not torch.allclose(*found["drawn anew"], atol=1e-3)
        assert len(found["gradients"][0]) > 2 and all(part.abs().max() > 0 for part in found["gradients"][0].values())
        torch.testing.assert_close(*found["loss"], **CLOSE)
        torch.testing.assert_close(*found["gradients"], **CLOSE)
        assert torch.equal(*found["generators"]), "the generator ends where one pass would leave it"


def test_gather_takes_any_number_of_rows_and_sums_their_gradients(ranks):
    world = len(ranks)
    wanted = torch.cat([torch.full((rank, 2), float(rank)) for rank in range(world)])
    asked = world * (world + 1) / 2  # 1 + 2 + ... + world, with no factor of the number of ranks
    for number, rank in enumerate(ranks):
        found = rank["gather"]
        assert torch.equal(found["rows"], wanted)
        assert torch.equal(found["gradient"], torch.full((number, 2), asked))
        assert torch.equal(found["scattered"], found["gradient"]), "the path that nccl takes"
        assert torch.equal(found["equal_gradient"], torch.full((3, 2), asked))
        assert found["ids"].tolist() == [10 * r + i for r in range(world) for i in range(r)]
        assert found["values"].tolist() == [0.5 * r for r in range(world)]


def test_small_collectives_agree(ranks):
    world = len(ranks)
    for rank in ranks:
        found = rank["gather"]
        assert (found["none"], found["last"]) == (False, True)
        assert found["sum"].tolist() == [world, world * (world - 1) / 2]
        assert found["first"].tolist() == [5.0]


def test_resumed_step_is_bit_equal_to_the_unbroken_one(ranks, alone):
    for rank in [alone, *ranks]:
        unbroken, resumed = rank["resume"]
        assert unbroken.keys() == resumed.keys()
        assert [name for name, value in unbroken.items() if not torch.equal(value, resumed[name])] == []


def test_world_losses_with_unequal_rows_are_those_of_one_process(ranks, alone):
    assert LOSS.mask_duplicates and LOSS.mask_known_positives
    torch.testing.assert_close(torch.cat([rank["uneven"] for rank in ranks]), alone["uneven"], **CLOSE)


def uneven_by_hand(own):
    """Losses of all rows and gradients of their weighted sum, float64, one row at a time."""
    batch, vectors, weights = uneven_batch(own)
    queries, documents = (part.requires_grad_() for part in vectors)
    per_query = len(documents) // len(queries)
    groups = (torch.arange(len(queries)) == 0).long()
    losses = slow_infonce(
        queries,
        documents,
        per_query * torch.arange(len(queries)),
        temperature=0.05,
        query_group=groups if own else None,
        document_group=groups.repeat_interleave(per_query) if own else None,
        document_ids=batch.document_ids,
        known_positive_ids=batch.known_positive_ids,
        false_negative_margin=LOSS.false_negative_margin,
    )
    (weights * losses).sum().backward()
    return {"losses": losses.detach(), "queries": queries.grad, "documents": documents.grad}


@pytest.mark.parametrize("weighted", [False, True], ids=["rows", "weighted"])
@pytest.mark.parametrize("own", [False, True], ids=["all", "own"])
@pytest.mark.parametrize(
    ("dtype", "implementation"),
    [
        ("torch.float64", "torch"),
        ("torch.float32", "torch"),
        pytest.param("torch.float32", "fused", marks=needs_library),
    ],
)
@pytest.mark.parametrize("way", ["gather", "ring"])
def test_unequal_batches_of_ranks_are_one_batch(ranks, alone, way, dtype, implementation, own, weighted):
    wanted = uneven_by_hand(own)
    close = {"rtol": 1e-10, "atol": 1e-12} if dtype == "torch.float64" else CLOSE
    assert wanted["losses"].min() > 0.01 and wanted["documents"].abs().max() > 0.1
    case = way, own, dtype, implementation, weighted
    assert len({len(rank["columns"][case]["losses"]) for rank in ranks}) > 1
    for together in ([alone], ranks):
        for name, value in wanted.items():
            found = torch.cat([rank["columns"][case][name] for rank in together])
            assert str(found.dtype) == dtype
            torch.testing.assert_close(found.double(), value, **close)
