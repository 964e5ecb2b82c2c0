"""Time limits, links, scancel and used-up restarts on a real Slurm: what was saved goes on, what waits is not lost."""

import re
import signal
import time

import pytest

from tests.cluster.counted import order
from tests.cluster.stops import has_come, held, results, send, was_reached
from tests.cluster.user import User, training_words

STEPS = 16
SHORT = ["cluster.time_limit=00:01:00", "cluster.stop_lead_seconds=45"]
TWO = ["stage=s0,s1", "s0.steps=40"]  # more than a woken rank can take before Slurm's second signal comes


def real_words(name: str) -> list[str]:
    """A long s1 between a short s0 and a short s2."""
    words = [*training_words(2, stages=("s0",)), *training_words(STEPS, stages=("s1",))]
    words += [*training_words(1, stages=("s2",)), "cluster.ranks_per_node=1"]
    return [*dict.fromkeys(words), f"name={name}"]


def stops(user: User, run: str, stage: str) -> int:
    """Times that a stage was stopped."""
    return len(user.rows(run, stage, "stopped"))


def wait_for_limit(user: User, run: str, stage: str, *, stop: int) -> None:
    """Return after the stop with this number, from 1, which Slurm's warning brings in the middle of the stage."""
    before = int(user.rows(run, stage, "stopped")[-1]["step"]) if stop > 1 else 0

    def goes_on() -> bool:
        return len(user.rows(run, stage, "start")) == stop and user.steps(run, stage) >= before + 2

    user.wait(lambda: goes_on() or stops(user, run, stage) >= stop)
    if stops(user, run, stage) < stop:
        with held(user, run, stage, step=0) as rank:
            user.wait(lambda: has_come(rank, signal.SIGUSR2), seconds=90)
    user.wait(lambda: stops(user, run, stage) >= stop)


@pytest.mark.slow
def test_a_time_limit_reached_twice_changes_no_bit(user: User) -> None:
    user.make_data()
    for name in ("broken", "whole"):
        user.type(*real_words(name), "stage=s0")
    user.type(*real_words("broken"), "stage=s1,s2", *SHORT)
    # The same line with a long limit, on the other two nodes, with a lead time that no save could be done in.
    user.type(*real_words("whole"), "stage=s1", "cluster.stop_lead_seconds=1")
    job, waiting = user.job("broken", "s1"), user.job("broken", "s2-curr")
    with held(user, "whole", "s1", step=2):
        until = time.monotonic() + 1.0
        user.wait(lambda: time.monotonic() > until)

    for stop in (1, 2):
        wait_for_limit(user, "broken", "s1", stop=stop)
        row = user.rows("broken", "s1", "stopped")[-1]
        assert row["reason"] in ("SIGUSR2", "another rank was asked to stop"), row
        assert row["then"] == f"back into the queue: restart {stop} of 20" and 0 < row["step"] < STEPS, row
        user.wait(lambda number=stop: user.cluster.job(job)["Restarts"] == str(number))
        assert user.cluster.state(waiting) == "PENDING"
    assert re.search(r"restart [12] of 20", user.type("status", "name=broken").stdout)
    user.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")  # two are enough

    user.wait_done("broken", "s1", "s2-curr", seconds=400)
    user.wait_done("whole", "s1")
    assert [row["restart"] for row in user.rows("broken", "s1", "start")] == [0, 1, 2]
    assert [row["step"] for row in results(user.file("broken", "s1"))["metrics.jsonl"]] == list(range(1, STEPS + 1))
    assert results(user.file("broken", "s1")) == results(user.file("whole", "s1"))
    assert user.file("broken", "s1", "out", "weights", "curr_weights.json").is_file()
    for rank in range(2):
        said = user.file("broken", "s1", "log", f"rank{rank}.log").read_text()
        begun = [line for line in said.splitlines() if line.startswith(f"--- job {job}")]
        assert [" restart 1 " in begun[1], " restart 2 " in begun[2], len(begun)] == [True, True, 3], said
        assert "DataLoader worker" not in said, "loader processes live on when Slurm tells every process of the step"
    told = user.file("whole", "s1", "log", "rank0.log").read_text()
    assert "before the time limit may come too late. Type cluster.stop_lead_seconds=" in told


@pytest.mark.slow
def test_where_requeue_is_forbidden_links_go_on(user: User) -> None:
    user.file("links").mkdir(parents=True)
    user.file("links", "orders.json").write_text('{"stage": "s2-curr", "rank": 1, "step": 3, "how": "raise"}')
    line = ["stage=all", "s0.steps=30", "cluster.requeue=links", "cluster.max_restarts=1"]  # a signal comes in between
    user.count(*line, name="links")
    stages = ("s0", "s1", "s2-curr", "eval")
    jobs = {stage: [str(row["job"]) for row in user.rows("links", stage, "submit")] for stage in stages}
    first, second = jobs["s0"]
    assert user.cluster.job(first)["Requeue"] == "0"
    assert f"afterany:{first}" in user.cluster.job(second)["Dependency"]
    assert f"afterok:{second}" in user.cluster.job(jobs["s1"][0])["Dependency"]

    assert send(user, "links", "s0", signal.SIGUSR2, step=2) == first
    user.wait_done("links", "s0")
    stopped = user.rows("links", "s0", "stopped")
    assert [row["then"] for row in stopped] == ["the next link continues (2 of 2)"]
    assert [row["job"] for row in user.rows("links", "s0", "start")] == [first, second]
    assert user.file("links", "s0", "out", "model", "total.txt").read_text() == str(sum(range(31)))
    assert user.cluster.job(first)["ExitCode"] == "75:0"

    # s1 is done by its first link, s2-curr crashes in its first: what comes after either has nothing to do.
    user.wait_done("links", "s1")
    user.wait_gone(*jobs["s1"])
    assert user.cluster.job(jobs["s1"][1])["ExitCode"] == "0:0"
    user.wait_gone(*jobs["s2-curr"], *jobs["eval"])
    assert [user.cluster.job(job)["ExitCode"] for job in jobs["s2-curr"]] == ["1:0", "1:0"]
    assert [len(user.rows("links", stage, "start")) for stage in stages] == [2, 1, 1, 0]
    assert user.failed("links", "s2-curr")["rank"] == 1
    assert [user.cluster.state(job) for job in jobs["eval"]] == ["CANCELLED", "CANCELLED"]
    told = user.type("status", "name=links").stdout
    assert told.count("dead: s2-curr failed at step ") == 2, told
    assert told.count(": rank 1 on node2: the loss is not finite") == 2, told


@pytest.mark.slow
def test_scancel_and_used_up_restarts_end_a_stage_that_the_same_line_continues(user: User) -> None:
    lines = {"used": [*TWO, "cluster.max_restarts=1"], "asked": TWO, "ended": TWO}
    for name, line in lines.items():
        order(
            user, name, stage="s0", rank=0, step=3, how="wait", until="told"
        )  # else it may be done before the others run
        user.count(*line, name=name)
    first = {name: user.job(name, "s0") for name in lines}
    waiting = {name: user.job(name, "s1") for name in lines}

    send(user, "used", "s0", signal.SIGUSR2, step=2)
    order(user, "used", stage="s0", rank=0, step=6, how="wait", until="told again")
    user.file("used", "told").touch()
    send(user, "asked", "s0", signal.SIGTERM, step=2)
    user.file("asked", "told").touch()
    with held(user, "ended", "s0", step=2) as rank:
        user.file("ended", "told").touch()
        user.cluster.run("scancel", first["ended"])
        user.wait(lambda: was_reached(rank, (signal.SIGTERM,)))
    user.wait(lambda: len(user.rows("used", "s0", "start")) == 2)
    send(user, "used", "s0", signal.SIGUSR2, step=4)
    user.file("used", "told again").touch()
    user.wait_gone(*first.values(), *waiting.values())

    expected = {
        "used": (["back into the queue: restart 1 of 1", "it has gone on 1 times, as often as"], "1"),
        "asked": (["SIGTERM came, and Slurm does not say that it was preempted"], "0"),
        "ended": (["Slurm is ending the job: it was cancelled"], "0"),
    }
    for name, (words, restarts) in expected.items():
        told = [row["then"] for row in user.rows(name, "s0", "stopped")]
        assert len(told) == len(words) and all(map(str.startswith, told, words)), told
        assert f"Type: python -m tdro_hpc.submit config={user.file(name, 's0', 'config.yaml')}" in told[-1]
        facts = user.cluster.job(first[name])
        assert facts["Restarts"] == restarts, name
        if name == "ended":
            assert facts["JobState"] == "CANCELLED"  # its code depends on which of its processes left first
        else:
            assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "75:0"), name
        assert user.cluster.state(waiting[name]) == "CANCELLED" and not user.rows(name, "s1", "start")
        assert "stopped" in user.type("status", f"name={name}").stdout

    for name, line in lines.items():
        user.count(*line, name=name)
    for name in lines:
        user.wait_done(name, "s0")
        assert user.file(name, "s0", "out", "model", "total.txt").read_text() == str(sum(range(41)))
        assert user.rows(name, "s0", "start")[-1]["fresh"] is False
