"""CPUs and memory of a job follow from its GPUs and from the shape of a node."""

import pytest

from tdro_hpc.config.cluster import ClusterConfig
from tdro_hpc.config.derived import plan_lines
from tdro_hpc.config.resources import cpus_per_rank, gpus_of_job, memory_per_node_gb, resource_lines
from tdro_hpc.config.schema import Config


def node(**changes: object) -> ClusterConfig:
    given = {"gpus_per_node": 4, "node_gpus": 8, "node_cpus": 128, "node_memory_gb": 1000.0} | changes
    return ClusterConfig(executor="slurm", **given)


@pytest.mark.parametrize(
    ("cluster", "cpus", "memory", "memory_of_one"),
    [
        (node(), 16, 500, 125),
        (node(gpus_per_node=8), 16, 1000, 125),
        (node(ranks_per_node=2), 32, 500, 250),
        (node(node_gpus=0), 32, 1000, 250),  # the shape of the node is that of the job
        (node(gpus_per_node=0), 128, 1000, 1000),  # without GPUs a job has the node for itself
        (node(gpus_per_node=0, ranks_per_node=2), 64, 1000, 500),
        (node(node_cpus=0), 0, 500, 125),  # 0 = not asked for
        (node(node_memory_gb=0.0), 16, 0, 0),
        (node(node_cpus=3, node_memory_gb=0.5), 1, 1, 1),
    ],
)
def test_a_job_gets_its_share_of_a_node(cluster, cpus, memory, memory_of_one):
    assert cpus_per_rank(cluster) == cpus
    assert memory_per_node_gb(cluster) == memory
    assert memory_per_node_gb(cluster, "one") == memory_of_one


@pytest.mark.parametrize(
    ("cluster", "expected"),
    [(node(), 1), (node(ranks_per_node=2), 2), (node(ranks_per_node=3), 2), (node(gpus_per_node=0), 0)],
)
def test_a_single_process_gets_the_gpus_of_one_rank(cluster, expected):
    assert gpus_of_job(cluster, "one") == expected
    assert gpus_of_job(cluster) == cluster.gpus_per_node


def test_figures_are_equations_in_the_words_of_the_keys():
    assert resource_lines(node()) == [
        "CPUs per rank 16 = 128 node_cpus x 4 gpus_per_node / 8 node_gpus / 4 gpus_per_node",
        "memory per node 500 GB = 1,000 node_memory_gb x 4 gpus_per_node / 8 node_gpus",
    ]
    assert resource_lines(node(ranks_per_node=3), "one") == [
        "CPUs per rank 21 = 128 node_cpus x 4 gpus_per_node / 8 node_gpus / 3 ranks_per_node, rounded down",
        "memory per node 166 GB = 1,000 node_memory_gb x 4 gpus_per_node / 8 node_gpus / 3 ranks_per_node"
        ", rounded down",
    ]
    assert resource_lines(node(node_gpus=0, node_cpus=2, node_memory_gb=0.0)) == [
        "CPUs per rank 1 = 2 node_cpus / 4 gpus_per_node, but at least 1"
    ]


def test_nothing_is_said_of_what_the_site_decides_or_of_this_machine():
    assert resource_lines(node(node_cpus=0, node_memory_gb=0.0)) == []
    assert resource_lines(ClusterConfig(gpus_per_node=4)) == []


@pytest.mark.parametrize("kind", ["prepare", "s0", "s1", "s2", "eval"])
def test_the_plan_shows_the_figures_of_each_kind_of_stage(kind):
    shown = plan_lines(Config(cluster=node()), kind)
    assert shown[-2:] == resource_lines(node(), "one" if kind == "prepare" else "all")
    assert not [line for line in plan_lines(Config(), kind) if "CPUs" in line or "memory per node" in line]
