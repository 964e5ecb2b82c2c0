"""What dies around a stage on a real Slurm, daemons and nodes, costs no result and starts nothing twice."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tdro_hpc.launch.jobs import is_alive
from tests.cluster.counted import ALONE, CHAIN, log_of, order, told_of, total
from tests.cluster.user import User, training_words


@pytest.fixture
def whole(user: User) -> Iterator[User]:
    """A person on a cluster whose daemons all run again at the end."""
    try:
        yield user
    finally:
        user.cluster.testcluster("up")
        user.cluster.wait_until_ready()


def wait_for_step(user: User, run: str, step: int) -> None:
    """Return when s0 has got so far."""
    user.wait(lambda: user.steps(run, "s0") >= step)


def may_go_on(user: User, name: str) -> None:
    """What waits for this file by order goes on."""
    user.file("count", name).touch()


def wait_until_saved(user: User) -> None:
    """Return when slurmctld has saved the newest job: what is younger is forgotten when it is killed."""
    saved = user.cluster.directory / "state" / "job_state"
    submitted = user.rows("count", "s1", "submit")[-1]["time"]
    user.cluster.wait_until(lambda: saved.stat().st_mtime > submitted)


@pytest.mark.slow
def test_daemons_die_and_come_back(whole: User) -> None:
    """slurmd dies under a stage, then slurmctld while one job runs and one waits: the chain goes on, none is twice."""
    user, cluster = whole, whole.cluster
    order(user, "count", stage="s0", rank=1, step=4, how="wait", until="go-4")
    user.count(*CHAIN)
    jobs = [user.job("count", stage) for stage in ("s0", "s1")]
    wait_for_step(user, "count", 3)
    cluster.kill_slurmd("node2")
    order(user, "count", stage="s0", rank=1, step=8, how="wait", until="go-8")
    may_go_on(user, "go-4")
    wait_for_step(user, "count", 7)  # steps go on without slurmd
    cluster.start_slurmd("node2")
    cluster.wait_until_ready()
    wait_until_saved(user)

    cluster.kill_slurmctld()
    told = user.type("status", "name=count").stdout
    assert "What waits or runs on the cluster is not known" in told and "squeue" in told
    assert told.count("squeue did not answer") == 2 and "/12 " in told, told
    refused = user.count(*CHAIN, status=2).stderr
    assert f"s0 may be in Slurm's queue (job {jobs[0]}), but squeue did not answer" in refused, refused
    assert "type the same line again when it answers" in refused and "Traceback" not in refused
    may_go_on(user, "go-8")
    wait_for_step(user, "count", 9)  # and without slurmctld
    cluster.start_slurmctld()
    cluster.wait_until_ready()
    told = user.count(*CHAIN).stdout
    assert "Nothing to" in told, told

    user.wait_done("count", "s0", "s1")
    user.wait_gone(*jobs)
    for stage, job in zip(("s0", "s1"), jobs, strict=True):
        assert [row["event"] for row in user.rows("count", stage)] == ["submit", "start", "end"], stage
        assert cluster.job(job)["Restarts"] == "0"
        assert total(user, "count", stage) == sum(range(13))


@pytest.mark.slow
def test_nodes_are_lost(whole: User) -> None:
    """One node loses power under a job of two nodes; another is given up by Slurm, but its rank lives on."""
    user, cluster = whole, whole.cluster
    user.make_data()
    order(user, "count", stage="s0", rank=1, step=7, how="wait", until="never")
    user.count(*CHAIN)
    real = [word for word in training_words(60) if word != "s0.save_every_steps=500"]
    real += [*ALONE[1:], "stage=s0", "s0.save_every_steps=5"]
    user.type(*real, "name=zombie", "cluster.exclude=node[1-2]")
    wait_for_step(user, "count", 6)
    jobs = [user.job("count", stage) for stage in ("s0", "s1")]
    assert cluster.job(jobs[0])["NodeList"] == "node[1-2]"
    cluster.power_off("node2")
    lost = wait_and_freeze(user, "zombie")
    user.type(*real, "name=unbroken", f"cluster.exclude={lost['host']}")

    ends_elsewhere(user, jobs)
    user.wait_done("zombie", "s0")
    user.wait_done("unbroken", "s0")
    wakes_up_and_writes_nothing(user, lost)
    assert weights(user, "zombie") and weights(user, "zombie") == weights(user, "unbroken")


def wait_and_freeze(user: User, run: str) -> dict[str, Any]:
    """Start row of s0: its rank stands still after it has saved, and the slurmd of its node is dead."""
    user.wait(lambda: user.steps(run, "s0") >= 7)
    (row,) = user.rows(run, "s0", "start")
    os.kill(row["pid"], signal.SIGSTOP)
    assert not user.file(run, "s0", "DONE.json").exists(), "too few steps: it is done already"
    user.cluster.kill_slurmd(row["host"])
    return row


def ends_elsewhere(user: User, jobs: list[str]) -> None:
    """The job of two nodes goes on where there is power, and what waits for it goes on waiting."""
    user.wait(lambda: user.cluster.job(jobs[0])["Restarts"] == "1")
    assert user.cluster.state(jobs[1]) == "PENDING"
    assert "waiting for s0" in told_of(user, "count", "s1")
    user.wait(lambda: len(user.rows("count", "s0", "start")) == 2)
    assert "running on node" in told_of(user, "count", "s0") and "restart 1 of" in told_of(user, "count", "s0")
    user.wait_done("count", "s0", "s1")
    user.wait_gone(*jobs)
    assert "s0 begins after step 4" in log_of(user, "count", "s0")
    assert [total(user, "count", stage) for stage in ("s0", "s1")] == [sum(range(13))] * 2
    assert [user.cluster.job(job)["Restarts"] for job in jobs] == ["1", "0"]
    assert [row["restart"] for row in user.rows("count", "s0", "start")] == [0, 1]


def files_of(stage_dir: Path) -> dict[str, bytes]:
    """Content of every file of a stage except its logs."""
    files = [
        path for path in stage_dir.rglob("*") if path.is_file() and "log" not in path.parts[len(stage_dir.parts) :]
    ]
    return {str(path.relative_to(stage_dir)): path.read_bytes() for path in files}


def weights(user: User, run: str) -> dict[str, bytes]:
    """Files with weights that s0 has made."""
    return {name: text for name, text in files_of(user.file(run, "s0", "out")).items() if name.endswith(".safetensors")}


def wakes_up_and_writes_nothing(user: User, lost: dict[str, Any]) -> None:
    """The rank on the node that Slurm had given up goes on, finds that it has a successor, and leaves."""
    starts = user.rows("zombie", "s0", "start")
    assert [(row["restart"], row["host"] == lost["host"]) for row in starts] == [(0, True), (1, False)]
    assert "s0 continues after step" in log_of(user, "zombie", "s0")
    before = files_of(user.file("zombie", "s0"))
    os.kill(lost["pid"], signal.SIGCONT)
    user.wait(lambda: "writes nothing more" in log_of(user, "zombie", "s0"))
    user.wait(lambda: not is_alive(lost["pid"], lost["started"]))
    assert f"took s0 over on {starts[1]['host']}" in log_of(user, "zombie", "s0")
    assert files_of(user.file("zombie", "s0")) == before
    assert "done" in told_of(user, "zombie", "s0")
