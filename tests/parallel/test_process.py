"""One process alone: no group, the same functions. Several ranks are in tests/distributed."""

import pytest
import torch

from tdro_hpc.config.schema import ParallelConfig
from tdro_hpc.parallel import process
from tdro_hpc.parallel.gather import gather_ids, gather_rows, gather_values, rows_of_ranks


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def start(world=1, rendezvous="", **keys):
    config = ParallelConfig(**{"backend": "gloo", **keys})
    return process.start_process(config, rank=0, world=world, local_rank=0, rendezvous=rendezvous)


def test_one_rank_needs_no_group_and_no_rendezvous(threads):
    alone = start()
    assert (alone.data_rank, alone.data_size, alone.device.type) == (0, 1, "cpu")
    assert not torch.distributed.is_initialized()
    process.wait_for_all()
    process.end_process()


def test_collectives_of_one_rank_give_back_what_they_got():
    tensor = torch.arange(3.0, requires_grad=True)
    assert process.any_rank(True) is True and process.any_rank(False) is False
    total, first = process.sum_over_ranks(tensor), process.broadcast_from_first(tensor)
    assert total.tolist() == first.tolist() == [0, 1, 2]
    total += 1
    first += 1
    assert tensor.tolist() == [0, 1, 2], "the results are new tensors"
    assert gather_rows(tensor) is tensor
    assert gather_values(tensor).requires_grad is False
    assert gather_ids(torch.tensor([4])).tolist() == [4]
    assert rows_of_ranks(5) == [5]
    assert (process.group_size(), process.group_rank()) == (1, 0)


def test_threads_are_those_asked_for_or_the_share_of_the_rank(threads, monkeypatch):
    start(threads_per_rank=3)
    assert torch.get_num_threads() == 3
    monkeypatch.setattr(process, "_usable_cores", lambda: 8)
    config = ParallelConfig(backend="gloo")
    process.start_process(config, rank=0, world=1, local_rank=0, rendezvous="", local_world=4)
    assert torch.get_num_threads() == 2


def test_rendezvous_that_cannot_be_read_is_named(threads):
    with pytest.raises(ValueError, match="rendezvous is 'somewhere'; 2 ranks find each other through file://"):
        start(world=2, rendezvous="somewhere")


def test_backend_is_nccl_exactly_where_cuda_is(monkeypatch):
    for there, backend in ((False, "gloo"), (True, "nccl")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert process.backend_of(ParallelConfig()) == backend
        assert process.backend_of(ParallelConfig(backend="gloo")) == "gloo"


def test_nccl_without_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="Set parallel.backend=gloo"):
        start(backend="nccl")


def test_rank_without_a_gpu_is_told_how_many_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="Local rank 2 has no GPU: this node has 2. Set cluster.ranks_per_node=2"):
        process.start_process(ParallelConfig(), rank=2, world=3, local_rank=2, rendezvous="file:///x")
