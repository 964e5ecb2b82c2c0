"""srun's own lines, as Slurm 22.05 wrote them, tell which rank was first."""

import time

import pytest

from tdro_hpc.launch.job.first_cause import cause_in, ended_by_slurm, is_second_hand, wait_for_another

KILLED = """\
srun: error: node2: task 3: Killed
srun: launch/slurm: _step_signal: Terminating StepId=230017.0
slurmstepd-node1: error: *** STEP 230017.0 ON node1 CANCELLED AT 2026-11-21T05:50:52 ***
srun: error: node2: task 2: Terminated
srun: error: node1: tasks 0-1: Killed
srun: Force Terminated StepId=230017.0
"""
LOST_NODE = """\
srun: error: Node failure on node2
slurmstepd-node1: error: *** JOB 9 ON node1 CANCELLED AT 2026-11-21T05:52:24 DUE TO NODE FAILURE, SEE SLURMCTLD LOG ***
srun: error: node1: task 1: Terminated
"""


@pytest.mark.parametrize(
    ("text", "rank", "host", "words"),
    [
        (KILLED, 3, "node2", "ended by SIGKILL"),
        (
            "srun: error: node1: task 1: Exited with exit code 9\nsrun: error: node1: task 0: Killed",
            1,
            "node1",
            "code 9",
        ),
        ("srun: error: node1: task 0: Terminated\nsrun: error: node1: task 1: Out Of Memory", 1, "node1", "memory"),
        ("srun: error: gpu[03-05,07]: tasks 24-31: Segmentation fault", 24, "gpu03", "Segmentation fault"),
        ("srun: error: Unable to create step for job 5: Invalid generic resource", 0, "", "Unable to create step"),
        ("srun: error: Unable to confirm allocation for job 5: Unable to contact slurm controller", 0, "", "confirm"),
        ("srun: error: Task launch for StepId=5.0 failed on node node2: No such file", 0, "", "Task launch"),
    ],
)
def test_first_cause(text, rank, host, words):
    cause = cause_in(text)
    assert cause is not None and (cause.rank, cause.host, cause.signal) == (rank, host, False)
    assert words in cause.words


def test_stop_signal_is_no_failure():
    cause = cause_in("srun: error: node1: task 1: User defined signal 2\nsrun: error: node2: tasks 2-3: Terminated")
    assert cause is not None and cause.signal and cause.rank == 1
    assert cause_in("srun: Job step aborted: Waiting up to 7 seconds for job step to finish.") is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (LOST_NODE, "NODE FAILURE"),
        ("srun: error: Node failure on node1\n", "NODE FAILURE"),
        ("slurmstepd: error: *** JOB 9 ON n1 CANCELLED AT 2026-11-21T05:52:24 DUE TO TIME LIMIT ***", "TIME LIMIT"),
        ("slurmstepd: error: *** JOB 9 ON n1 CANCELLED AT 2026-11-21T05:52:24 DUE TO PREEMPTION ***", "PREEMPTION"),
        ("slurmstepd: error: *** JOB 9 ON n1 CANCELLED AT 2026-11-21T05:52:24 ***", ""),
        (KILLED, None),  # of the step alone: srun ended it
    ],
)
def test_what_slurm_ended_itself(text, why):
    assert ended_by_slurm(text) == why


def test_second_hand_errors_are_known_and_wait():
    assert is_second_hand("RuntimeError: Connection closed by peer [127.0.0.1]:22688")
    assert not is_second_hand("the loss is not finite")


def test_waiting_ends_when_another_rank_has_spoken(tmp_path):
    (tmp_path / "FAILED.json").touch()
    began = time.monotonic()
    wait_for_another(tmp_path / "FAILED.json", 60)
    wait_for_another(tmp_path / "none", 0.1)
    assert time.monotonic() - began < 5
