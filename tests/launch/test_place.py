"""Where a process stands: from Slurm's variables, and when it is no rank of Slurm at all."""

import pytest

from tdro_hpc.launch.job.place import hosts_of, is_rank_of_slurm, place_by_hand, place_in_slurm

# As srun set them for task 3 of two nodes with two tasks each, measured with Slurm 22.05.
RANK = {
    "SLURM_JOB_ID": "230001",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
# The batch script itself, in the same job.
BATCH = {name: value for name, value in RANK.items() if not name.startswith("SLURM_STEP")} | {"SLURM_PROCID": "0"}


def test_rank_of_two_nodes():
    place = place_in_slurm(RANK)
    assert (place.job, place.rank, place.world, place.local_rank, place.local_world) == ("230001", 3, 4, 1, 2)
    assert (place.rendezvous, place.executor, place.restart) == ("tcp://node1:20001", "slurm", 0)


def test_every_restart_meets_at_another_port():
    assert place_in_slurm(RANK | {"SLURM_RESTART_COUNT": "2"}).rendezvous == "tcp://node1:20003"
    assert place_in_slurm(RANK | {"SLURM_JOB_ID": "19999", "SLURM_RESTART_COUNT": "1"}).rendezvous.endswith(":20000")


def test_one_node_meets_on_loopback_and_one_task_nowhere():
    one_node = RANK | {"SLURM_STEP_NODELIST": "gpu7", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0"}
    assert place_in_slurm(one_node).rendezvous == "tcp://127.0.0.1:20001"
    assert place_in_slurm(one_node).local_world == 4
    alone = one_node | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    assert (place_in_slurm(alone).rendezvous, place_in_slurm(alone).world) == ("", 1)


def test_nodes_with_unlike_numbers_of_tasks():
    step = RANK | {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_STEP_NUM_TASKS": "5", "SLURM_NODEID": "2"}
    assert place_in_slurm(step | {"SLURM_STEP_NODELIST": "node[1-3]"}).local_world == 1


def test_node_lists_are_expanded():
    assert hosts_of("gpu[01-03,07],cpu1") == ["gpu01", "gpu02", "gpu03", "gpu07", "cpu1"]


@pytest.mark.parametrize(
    ("environment", "terminal", "expected"),
    [
        (RANK, False, True),
        (BATCH, False, False),  # a batch script that calls python without srun
        (RANK, True, False),  # srun --pty bash
        (RANK | {"SLURM_STEP_ID": str(0xFFFFFFFA)}, False, False),  # the shell of salloc
        (RANK | {"RANK": "0", "WORLD_SIZE": "2"}, False, False),  # a person's own launcher in an allocation
        (RANK | {"WORLD_SIZE": "2"}, False, True),
        ({"SLURM_JOB_ID": "5"}, False, False),
        ({}, False, False),
    ],
)
def test_only_a_task_of_srun_is_a_rank(environment, terminal, expected):
    assert is_rank_of_slurm(environment, terminal=terminal) is expected


def test_place_by_hand():
    assert (place_by_hand({}).rank, place_by_hand({}).world, place_by_hand({}).executor) == (0, 1, "local")
    place = place_by_hand({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "5"})
    assert (place.rank, place.world, place.local_rank, place.rendezvous) == (3, 4, 1, "tcp://n1:5")
    with pytest.raises(ValueError, match="WORLD_SIZE is 4, but RANK and MASTER_PORT is not set"):
        place_by_hand({"WORLD_SIZE": "4", "MASTER_ADDR": "n1"})
