"""A job of a higher partition takes the nodes: on a real Slurm, under each way in which a site may preempt."""

import signal
from collections.abc import Sequence

import pytest

from tests.cluster.cluster import needs_root, running_cluster
from tests.cluster.stops import held, results, was_reached
from tests.cluster.user import User, person_on, training_words

TRAINING_STEPS, COUNTING_STEPS = 16, 40  # more than a woken rank can take before Slurm's second signal comes
COUNT = ["stage=s0,s1", f"s0.steps={COUNTING_STEPS}"]
TOTAL = str(sum(range(COUNTING_STEPS + 1)))
GRACE_SECONDS = 60  # a busy machine needs some of it until the ranks have saved


def preempt(user: User, runs: Sequence[str]) -> str:
    """Let a job of partition high push s0 of runs from the first two nodes after step 2; the id of that job."""
    # Rank 0 is held until Slurm wakes it up for the end: however fast this machine is, it is in the middle of its work.
    with held(user, runs[0], "s0", step=2) as rank:
        if runs[1:]:
            high = preempt(user, runs[1:])
        else:
            high = user.cluster.sbatch("true", "-p", "high", "-N2", "-w", "node1,node2", "--exclusive")
        # Slurm's own time of the preemption is earlier than its signal by what a busy machine needs to bring that.
        user.wait(lambda: was_reached(rank, (signal.SIGTERM, signal.SIGUSR2)))
        return high


def check_put_back(user: User, run: str, high: str) -> None:
    """s0 of a run has saved, was put back, went on after the other job, and s1 has waited for that."""
    job, waiting = user.job(run, "s0"), user.job(run, "s1")
    user.wait(lambda: user.rows(run, "s0", "stopped"))
    row = user.rows(run, "s0", "stopped")[-1]
    assert row["then"] == "back into the queue: restart 1 of 20" and 2 <= row["step"] < row["steps"], row
    user.wait(lambda: user.cluster.job(job)["Restarts"] == "1")
    assert user.cluster.state(waiting) == "PENDING" and not user.rows(run, "s1", "start")
    user.cluster.wait_for_state(high, "COMPLETED")
    user.wait_done(run, "s0", "s1")
    assert [(row["job"], row["restart"]) for row in user.rows(run, "s0", "start")] == [(job, 0), (job, 1)]
    assert user.job(run, "s0") == job and user.cluster.state(job) == "COMPLETED"


@needs_root
@pytest.mark.slow
def test_a_preempted_stage_changes_no_bit_where_the_site_sends_only_sigterm() -> None:
    with (
        running_cluster(nodes=4, user_signal=False, grace_seconds=GRACE_SECONDS) as cluster,
        person_on(cluster) as user,
    ):
        user.make_data()
        words = [*training_words(TRAINING_STEPS, stages=("s0",)), *training_words(1, stages=("s1", "s2"))]
        words = [*dict.fromkeys(words), "cluster.ranks_per_node=1"]
        user.type(*words, "stage=s0,s1", "name=broken", "cluster.exclude=node[3-4]")
        user.type(*words, "stage=s0", "name=whole", "cluster.exclude=node[1-2]")
        high = preempt(user, ["broken"])
        check_put_back(user, "broken", high)
        assert user.rows("broken", "s0", "stopped")[0]["reason"] in ("SIGTERM", "another rank was asked to stop")
        user.wait_done("whole", "s0")
        assert results(user.file("broken", "s0")) == results(user.file("whole", "s0"))
        assert len(results(user.file("whole", "s0"))["metrics.jsonl"]) == TRAINING_STEPS


@pytest.mark.slow
def test_a_preempted_stage_is_put_back_where_the_site_sends_the_jobs_own_signal_too(user: User) -> None:
    user.count(*COUNT, "cluster.exclude=node[3-4]")
    check_put_back(user, "count", preempt(user, ["count"]))
    assert user.file("count", "s0", "out", "model", "total.txt").read_text() == TOTAL


@needs_root
@pytest.mark.slow
def test_where_preemption_cancels_a_stage_puts_itself_back_or_says_what_to_type() -> None:
    with running_cluster(nodes=2, preempt="cancel", grace_seconds=GRACE_SECONDS) as cluster, person_on(cluster) as user:
        user.count(*COUNT, name="back")
        last = [*COUNT, "cluster.max_restarts=0"]
        user.count(*last, name="last")
        high = preempt(user, ["back", "last"])
        user.wait_gone(user.job("last", "s0"), user.job("last", "s1"))
        (row,) = user.rows("last", "s0", "stopped")
        assert row["then"].startswith("it has gone on 0 times, as often as cluster.max_restarts allows. Type: ")
        assert cluster.state(user.job("last", "s1")) == "CANCELLED"
        told = user.type("status", "name=last").stdout
        assert f"the same line continues after step {row['step']}" in told and "To continue type: " in told, told
        check_put_back(user, "back", high)

        user.count(*last, name="last")
        user.wait_done("last", "s0")
        assert user.rows("last", "s0", "start")[-1]["fresh"] is False
        for run in ("back", "last"):
            assert user.file(run, "s0", "out", "model", "total.txt").read_text() == TOTAL
