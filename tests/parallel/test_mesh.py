"""The grid of ranks, without starting any."""

import pytest

from tdro_hpc.parallel.mesh import Mesh, mesh_of

MESH = Mesh(pipeline_size=2, data_size=3, tensor_size=2)


def test_tensor_ranks_are_neighbours_and_pipeline_ranks_furthest_apart():
    assert [MESH.place(rank) for rank in range(12)] == [(p, d, t) for p in (0, 1) for d in (0, 1, 2) for t in (0, 1)]
    assert all(MESH.rank(*MESH.place(rank)) == rank for rank in range(12))


def test_groups_along_each_axis():
    assert MESH.data_groups() == [[0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9, 11]]
    assert MESH.replica_groups() == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    assert MESH.tensor_groups() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]


def test_order_is_that_of_deepspeeds_topology():
    topology = pytest.importorskip("deepspeed.runtime.pipe.topology")
    theirs = topology.PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=3)
    for rank in range(12):
        pipeline, data, tensor = MESH.place(rank)
        assert theirs.get_rank(pipe=pipeline, data=data, model=tensor) == rank


def test_number_of_ranks_that_leaves_a_part_of_a_replica_is_refused():
    assert mesh_of(8, pipeline_size=2, tensor_size=2) == Mesh(2, 2, 2)
    with pytest.raises(ValueError, match=r"6 ranks cannot .* parallel.tp=2 = 4 ranks. Start 4, 8, 16 ... ranks"):
        mesh_of(6, pipeline_size=2, tensor_size=2)
