"""Rows of Slurm jobs and a queue in, the state of the stage out."""

import json
import os
from pathlib import Path

import pytest

from tdro_hpc.launch.jobs import (
    append_event,
    append_start,
    append_submit,
    end_orphans,
    has_slurm_rows,
    read_jsonl,
    running_job,
    seconds_spent,
)
from tdro_hpc.launch.queue import Queue, QueueJob
from tdro_hpc.launch.record import clear_stage, read_state, write_failed

DOWN = Queue(problem="Unable to contact slurm controller")
EMPTY = Queue()


def queue_of(*jobs: QueueJob) -> Queue:
    return Queue({job.job: job for job in jobs})


def waits(job: str, reason: str = "Priority", dependency: str = "") -> QueueJob:
    return QueueJob(job, "PENDING", reason, dependency)


def runs(job: str, nodes: str = "node[1-2]") -> QueueJob:
    return QueueJob(job, "RUNNING", nodes=nodes)


def submit(stage_dir: Path, *jobs: str, fresh: bool = True, most: int = 20) -> None:
    """One submission of as many links as there are jobs."""
    for link, job in enumerate(jobs, start=1):
        append_submit(
            stage_dir,
            job=job,
            keys={"steps": 10},
            fresh=fresh and link == 1,
            after=["811"],
            link=link,
            links=len(jobs),
            max_restarts=most,
            code="/run/code/abc",
        )


def begin(stage_dir: Path, job: str, *, fresh: bool = True, restart: int = 0) -> None:
    append_start(
        stage_dir,
        job=job,
        pid=os.getpid(),
        ranks=4,
        keys={"steps": 10},
        inputs={"s0": "s0-1"},
        fresh=fresh,
        restart=restart,
        executor="slurm",
    )


def stop(stage_dir: Path, job: str) -> None:
    append_event(stage_dir, "stopped", job=job, step=5, steps=10, reason="SIGUSR2", then="it was put back")


def save(stage_dir: Path, step: int) -> None:
    path = stage_dir / f"checkpoints/step-{step:08d}/state.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")


def fail(stage_dir: Path) -> None:
    write_failed(stage_dir, rank=1, error="NaN", log=stage_dir / "log/rank1.log")


def done(stage_dir: Path) -> None:
    value = {"keys": {"steps": 10}, "inputs": {}, "code": "abc", "seconds": 5.0, "outputs": {}}
    (stage_dir / "DONE.json").write_text(json.dumps(value))


def test_row_of_a_submission_holds_what_a_job_needs_to_know(tmp_path):
    submit(tmp_path, "812", most=3)
    (row,) = read_jsonl(tmp_path / "jobs.jsonl")
    assert row.pop("time") > 0
    assert row == {
        "event": "submit",
        "job": "812",
        "executor": "slurm",
        "keys": {"steps": 10},
        "fresh": True,
        "after": ["811"],
        "link": 1,
        "links": 1,
        "max_restarts": 3,
        "code": "/run/code/abc",
    }
    assert has_slurm_rows(tmp_path) and not has_slurm_rows(tmp_path / "other")


def test_a_job_that_waits_is_queued_with_slurms_reason(tmp_path):
    submit(tmp_path, "812", most=3)
    state = read_state(tmp_path, queue=queue_of(waits("812", "Resources"), runs("900")))
    assert (state.status, state.executor, state.job, state.jobs) == ("queued", "slurm", "812", ("812",))
    assert (state.queue_reason, state.nodes, state.keys, state.pid) == ("Resources", "", {"steps": 10}, 0)
    assert (state.restarts, state.max_restarts, state.attempt) == (0, 3, 0)


def test_a_job_that_runs_is_running_on_its_nodes(tmp_path):
    submit(tmp_path, "812")
    begin(tmp_path, "812")
    stop(tmp_path, "812")
    begin(tmp_path, "812", fresh=False, restart=1)
    state = read_state(tmp_path, queue=queue_of(runs("812")))
    # The process id is one of this machine here, which must not matter.
    assert (state.status, state.nodes, state.pid, state.inputs) == ("running", "node[1-2]", 0, {"s0": "s0-1"})
    assert (state.attempt, state.restarts, state.max_restarts) == (2, 1, 20)


def test_a_job_that_was_put_back_is_queued_and_keeps_what_it_has(tmp_path):
    submit(tmp_path, "812")
    begin(tmp_path, "812")
    save(tmp_path, 5)
    stop(tmp_path, "812")
    append_event(tmp_path, "end", job="812", exit_codes=[75])
    state = read_state(tmp_path, queue=queue_of(waits("812", "BeginTime")))
    assert (state.status, state.queue_reason, state.step, state.attempt) == ("queued", "BeginTime", 5, 1)
    assert read_state(tmp_path, queue=EMPTY).status == "stopped"


def test_a_job_that_leaves_counts_until_it_is_gone(tmp_path):
    submit(tmp_path, "812")
    begin(tmp_path, "812")
    fail(tmp_path)
    assert read_state(tmp_path, queue=queue_of(QueueJob("812", "COMPLETING"))).status == "running"
    assert read_state(tmp_path, queue=EMPTY).status == "failed"


def test_a_queued_job_that_begins_anew_has_nothing_of_the_making_before(tmp_path):
    submit(tmp_path, "812")
    begin(tmp_path, "812")
    save(tmp_path, 5)
    submit(tmp_path, "820", fresh=True)
    state = read_state(tmp_path, queue=queue_of(waits("820")))
    assert (state.status, state.step, state.inputs, state.job) == ("queued", 0, {}, "820")
    # Lost before it began: it is to begin anew all the same.
    assert (read_state(tmp_path, queue=EMPTY).status, read_state(tmp_path, queue=EMPTY).step) == ("stopped", 0)


def test_a_queued_job_that_continues_shows_where(tmp_path):
    submit(tmp_path, "812")
    begin(tmp_path, "812")
    save(tmp_path, 5)
    submit(tmp_path, "820", fresh=False)
    state = read_state(tmp_path, queue=queue_of(waits("820")))
    assert (state.status, state.step, state.inputs) == ("queued", 5, {"s0": "s0-1"})
    assert (state.restarts, state.job) == (0, "820")


def test_a_job_that_left_the_queue_before_it_began_is_named(tmp_path):
    submit(tmp_path, "812")
    state = read_state(tmp_path, queue=EMPTY)
    assert (state.status, state.problem) == ("new", "job 812 left the queue before it began")
    assert (state.job, state.jobs, state.executor) == ("812", (), "slurm")
    log = tmp_path / "log" / "slurm" / "812_0_log.err"
    log.parent.mkdir(parents=True)
    log.write_text("srun: Terminating\nline 31: /no/python: No such file or directory\n\n")
    assert f"began; it said: line 31: /no/python: No such file or directory (log {log})" in (
        read_state(tmp_path, queue=EMPTY).problem
    )
    append_event(tmp_path, "cancelled", job="812", reason="cancelled by submit cancel")
    assert read_state(tmp_path, queue=EMPTY).problem == (
        "job 812 was cancelled before it began: cancelled by submit cancel"
    )


def test_a_lost_job_leaves_a_stage_that_is_to_be_made_again(tmp_path):
    submit(tmp_path, "812")
    (tmp_path / "STALE.json").write_text("{}")
    state = read_state(tmp_path, queue=EMPTY)
    assert (state.status, state.problem) == (
        "stale",
        "it was to be made again, but job 812 left the queue before it began",
    )
    assert read_state(tmp_path, queue=queue_of(waits("812"))).status == "queued"


def test_a_job_that_waits_for_a_failed_one_does_not_count_but_is_named(tmp_path):
    submit(tmp_path, "812")
    queue = queue_of(waits("812", "DependencyNeverSatisfied", "afterok:811(failed)"))
    state = read_state(tmp_path, queue=queue)
    assert (state.status, state.jobs, state.dead_jobs) == ("new", (), ("812",))
    assert state.problem == "job 812 could never start: what it waited for has failed"
    assert running_job(tmp_path, queue) is None


def test_without_an_answer_of_squeue_nothing_is_known(tmp_path):
    submit(tmp_path, "812")
    state = read_state(tmp_path, queue=DOWN)
    assert (state.status, state.job) == ("unknown", "812") and "Unable to contact" in state.problem
    begin(tmp_path, "812")
    stop(tmp_path, "812")
    assert read_state(tmp_path, queue=DOWN).status == "unknown"  # it may have been put back
    append_event(tmp_path, "cancelled", job="812", reason="by cancel")
    assert read_state(tmp_path, queue=DOWN).status == "unknown"  # it may still be saving


def test_what_the_files_tell_needs_no_squeue(tmp_path):
    cancelled, failed, finished = tmp_path / "cancelled", tmp_path / "failed", tmp_path / "finished"
    for stage_dir in (cancelled, failed, finished):
        submit(stage_dir, "812")
    append_event(cancelled, "cancelled", job="812", reason="by cancel")
    begin(failed, "812")
    fail(failed)
    done(finished)
    assert read_state(cancelled, queue=DOWN).status == "new"
    assert read_state(failed, queue=DOWN).status == "failed"
    assert read_state(finished, queue=DOWN).status == "done"
    assert read_state(tmp_path / "never", queue=DOWN).status == "new"


def test_a_failure_before_this_submission_says_nothing_of_it(tmp_path):
    submit(tmp_path, "812")
    begin(tmp_path, "812")
    fail(tmp_path)
    submit(tmp_path, "820", fresh=False)
    assert read_state(tmp_path, queue=DOWN).status == "unknown"
    assert read_state(tmp_path).status == "queued"


def test_nobody_asks_slurm_on_the_nodes_and_the_rows_tell(tmp_path):
    told = []
    for act in (
        lambda: submit(tmp_path, "812"),
        lambda: begin(tmp_path, "812"),
        lambda: stop(tmp_path, "812"),
        lambda: begin(tmp_path, "812", fresh=False, restart=1),
        lambda: append_event(tmp_path, "end", job="812", exit_codes=[137]),
        lambda: fail(tmp_path),
        lambda: done(tmp_path),
    ):
        act()
        told.append(read_state(tmp_path).status)
    assert told == ["queued", "running", "stopped", "running", "stopped", "failed", "done"]


def test_links_in_the_queue_are_all_named_in_their_order(tmp_path):
    submit(tmp_path, "700", "701", "702")  # an earlier submission, long over
    submit(tmp_path, "812", "813", "814", most=2)
    queue = queue_of(
        waits("814", "Dependency", "afterany:813(unfulfilled)"),
        runs("812"),
        waits("813", "Dependency", "afterany:812(unfulfilled)"),
        runs("702"),
    )
    state = read_state(tmp_path, queue=queue)
    assert (state.status, state.jobs, state.job, state.max_restarts) == ("running", ("812", "813", "814"), "812", 2)
    begin(tmp_path, "812")
    stop(tmp_path, "812")
    assert read_state(tmp_path).status == "queued"  # the next link goes on
    begin(tmp_path, "813", fresh=False)
    state = read_state(tmp_path, queue=queue_of(runs("813"), waits("814", "Dependency")))
    assert (state.jobs, state.job, state.restarts) == (("813", "814"), "813", 1)


def test_links_of_a_submission_that_broke_off_are_those_that_were_noted(tmp_path):
    submit(tmp_path, "700", "701")
    submit(tmp_path, "812", "813", "814")
    text = (tmp_path / "jobs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "jobs.jsonl").write_text("".join(text[:-1]))  # the third could not be noted
    queue = queue_of(waits("813"), waits("812"), runs("700"))
    assert read_state(tmp_path, queue=queue).jobs == ("812", "813")


@pytest.mark.parametrize("ended", ["failed", "done"])
def test_links_after_the_end_of_a_stage_do_not_count(tmp_path, ended):
    submit(tmp_path, "812", "813", "814")
    begin(tmp_path, "812")
    (fail if ended == "failed" else done)(tmp_path)
    queue = queue_of(waits("813", "Resources"), waits("814", "Dependency", "afterany:813(unfulfilled)"))
    state = read_state(tmp_path, queue=queue)
    assert (state.status, state.jobs, state.dead_jobs) == (ended, (), ("813", "814"))
    assert running_job(tmp_path, queue) is None


def test_a_job_submitted_by_hand_counts_while_it_is_in_the_queue(tmp_path):
    submit(tmp_path, "700")
    begin(tmp_path, "812")
    state = read_state(tmp_path, queue=queue_of(QueueJob("812", "RUNNING", script="/w/slurm/stage.sbatch s1")))
    assert (state.status, state.job, state.jobs) == ("running", "812", ("812",))
    assert read_state(tmp_path, queue=EMPTY).status == "stopped"
    assert read_state(tmp_path, queue=DOWN).status == "unknown"


def test_a_job_that_could_not_be_noted_counts_too(tmp_path):
    stray = QueueJob("812", "PENDING", "Resources", script=f"{tmp_path}/log/slurm/submission_file_1.sh")
    state = read_state(tmp_path, queue=queue_of(stray))
    assert (state.status, state.jobs, state.executor) == ("queued", ("812",), "slurm")
    row = running_job(tmp_path, queue_of(stray))
    assert row is not None and row["job"] == "812" and row["executor"] == "slurm"


def test_running_job_is_the_newest_row_of_the_job_in_the_queue(tmp_path):
    submit(tmp_path, "812", "813")
    queue = queue_of(waits("812"), waits("813", "Dependency"))
    assert running_job(tmp_path) is None
    row = running_job(tmp_path, queue)
    assert row is not None and (row["event"], row["job"]) == ("submit", "812")
    begin(tmp_path, "812")
    row = running_job(tmp_path, queue_of(runs("812"), waits("813", "Dependency")))
    assert row is not None and (row["event"], row["job"], row["executor"]) == ("start", "812", "slurm")
    assert running_job(tmp_path, EMPTY) is running_job(tmp_path, DOWN) is None


def test_a_local_job_after_slurm_jobs_is_local_again(tmp_path):
    submit(tmp_path, "812")
    begin(tmp_path, "812")
    append_start(tmp_path, job="7", pid=os.getpid(), ranks=1, keys={}, inputs={}, fresh=False)
    state = read_state(tmp_path, queue=DOWN)
    assert (state.status, state.executor, state.pid) == ("running", "local", os.getpid())
    append_event(tmp_path, "end", job="7", exit_codes=[0])
    assert read_state(tmp_path, queue=DOWN).status == "stopped"


def test_rows_of_earlier_versions_are_local(tmp_path):
    append_start(tmp_path, job="7", pid=os.getpid(), ranks=1, keys={}, inputs={}, fresh=True)
    (row,) = read_jsonl(tmp_path / "jobs.jsonl")
    del row["executor"], row["restart"]
    (tmp_path / "jobs.jsonl").write_text(json.dumps(row) + "\n")
    assert not has_slurm_rows(tmp_path)
    assert (read_state(tmp_path).status, read_state(tmp_path).executor) == ("running", "local")


def test_nothing_is_ended_here_for_a_slurm_job_with_the_number_of_a_process(tmp_path, monkeypatch):
    monkeypatch.setattr("tdro_hpc.launch.jobs.end_group", lambda leader: pytest.fail("a group was ended"))
    gone = 2**22 + 1
    row = {"event": "start", "job": str(gone), "pid": gone, "started": 0, "host": os.uname().nodename, "time": 0}
    (tmp_path / "jobs.jsonl").write_text(json.dumps(row | {"executor": "slurm"}) + "\n")
    end_orphans(tmp_path)


def test_seconds_of_a_job_with_several_starts_are_added_up():
    def row(event: str, at: float, job: str = "812") -> dict[str, object]:
        return {"event": event, "job": job, "time": at}

    rows = [
        row("submit", 0),
        *[row("start", 10), row("stopped", 30), row("end", 32)],  # 22, up to the last row of the attempt
        *[row("start", 100), row("stopped", 105)],  # 5: Slurm had taken it before the last row
        row("start", 200),  # killed without a word: its end is not known
        *[row("start", 300), row("end", 301)],  # 1
        row("end", 999, job="other"),
        row("start", 400),  # at work
    ]
    assert seconds_spent(rows) == 28


def test_a_job_that_clears_its_stage_keeps_what_it_runs_from(tmp_path):
    for name in ("config.yaml", "job.sbatch", "metrics.jsonl", "jobs.jsonl", "DONE.json"):
        (tmp_path / name).write_text("x")
    clear_stage(tmp_path, keep=("config.yaml", "job.sbatch"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "job.sbatch", "jobs.jsonl"]
