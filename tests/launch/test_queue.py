"""What squeue and sacct print, read; the programs themselves are small scripts on PATH."""

import os
import time
from pathlib import Path

import pytest

from tdro_hpc.launch.queue import (
    FIELD,
    FORMAT,
    Queue,
    QueueJob,
    ask_accounting,
    ask_queue,
    parse_queue,
    seconds_of,
)


def printed(*jobs: str) -> str:
    """Lines as squeue prints them; a test writes @ for what stands between the fields."""
    return "".join(job.replace("@", FIELD) + "\n" for job in jobs)


def queue_of(*jobs: QueueJob) -> Queue:
    return Queue({job.job: job for job in jobs})


def put(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, body: str) -> None:
    """A program of this name, before all others on PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_running_and_waiting_jobs_are_read():
    queue = parse_queue(
        printed(
            "812@RUNNING@1-02:03:04@node[1-2]@(null)@None@/w/runs/x/s0/log/slurm/812_submission.sh",
            "813@PENDING@4:00:00@@afterok:812(unfulfilled)@Dependency@/w/runs/x/s1/log/slurm/a.sh --fast",
        )
    )
    assert queue.problem == ""
    assert queue.jobs["812"] == QueueJob(
        job="812",
        state="RUNNING",
        nodes="node[1-2]",
        script="/w/runs/x/s0/log/slurm/812_submission.sh",
        seconds_left=93784,
    )
    waiting = queue.jobs["813"]
    assert (waiting.reason, waiting.dependency, waiting.nodes) == ("Dependency", "afterok:812(unfulfilled)", "")
    assert waiting.waits and not queue.jobs["812"].waits


def test_names_with_bars_and_blanks_stay_whole():
    queue = parse_queue(printed("812@PENDING@INVALID@@@Nodes down | drained, see admin@/w/my | runs/x y/s0/job.sbatch"))
    assert queue.jobs["812"].script == "/w/my | runs/x y/s0/job.sbatch"
    assert queue.jobs["812"].reason == "Nodes down | drained, see admin"
    assert queue.job_of(Path("/w/my | runs/x y/s0"), []) == queue.jobs["812"]


def test_cluster_of_a_federation_is_left_out_of_ids():
    queue = parse_queue(printed("812;alpha@RUNNING@UNLIMITED@node1@@@/w/job.sbatch"))
    assert list(queue.jobs) == ["812"]
    assert queue.job_of(Path("/elsewhere"), ["812;alpha"]) == queue.jobs["812"]


def test_nothing_printed_is_an_empty_queue():
    assert parse_queue("") == parse_queue("\n") == Queue()


def test_a_line_that_cannot_be_read_is_a_problem_and_not_a_missing_job():
    queue = parse_queue(printed("812@RUNNING@1:00@node1@@@/w/a") + "Welcome to the cluster!\n")
    assert not queue.jobs and "Welcome to the cluster!" in queue.problem


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1-02:03:04", 93784),
        ("02:03:04", 7384),
        ("02:03", 123),
        ("0:00", 0),
        ("59", 59),
        ("INVALID", -1),
        ("UNLIMITED", -1),
        ("NOT_SET", -1),
        ("", -1),
    ],
)
def test_durations(text, seconds):
    assert seconds_of(text) == seconds


def test_a_job_is_found_by_its_id_and_by_where_its_script_lies(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    stage_dir = tmp_path / "link" / "s0"
    noted = QueueJob("812", "RUNNING", script="/by/hand/stage.sbatch s0")
    links = [QueueJob(job, "PENDING", script=f"{stage_dir}/log/slurm/{job}.sh") for job in ("1000", "999")]
    neighbour = QueueJob("5", "RUNNING", script=f"{tmp_path}/link/s0-b/log/slurm/5.sh x/{stage_dir}/a")
    queue = queue_of(*links, neighbour, noted)
    assert [job.job for job in queue.jobs_of(stage_dir, ["812", "1"])] == ["812", "999", "1000"]
    assert [job.job for job in queue.jobs_of(tmp_path / "real" / "s0", ["1000"])] == ["1000", "999"]
    assert queue.job_of(tmp_path / "s0", ["1"]) is None


def test_what_waits_for_a_failed_job_never_starts_nor_what_waits_for_that():
    dead = QueueJob("813", "PENDING", "DependencyNeverSatisfied", "afterok:812(failed)")
    behind = QueueJob("814", "PENDING", "Dependency", "afterok:813(unfulfilled)")
    noticed_late = QueueJob("815", "PENDING", "Dependency", "afterok:810(unfulfilled),afterok:812(failed)")
    well = QueueJob("816", "PENDING", "Dependency", "afterok:820(unfulfilled)")
    running = QueueJob("820", "RUNNING")
    queue = queue_of(dead, behind, noticed_late, well, running)
    assert [job.job for job in queue.jobs.values() if queue.never_starts(job)] == ["813", "814", "815"]


def test_a_long_row_of_jobs_behind_a_failed_one_is_seen_through():
    row = [QueueJob(str(job), "PENDING", "Dependency", f"afterany:{job - 1}(unfulfilled)") for job in range(2, 3000)]
    queue = queue_of(QueueJob("1", "PENDING", "DependencyNeverSatisfied"), *row)
    assert all(queue.never_starts(job) for job in queue.jobs.values())


def test_squeue_is_asked_once_for_this_user_whatever_the_settings_of_the_user_say(tmp_path, monkeypatch):
    put(tmp_path / "bin", monkeypatch, "squeue", f'echo "$SQUEUE_STATES$SQUEUE_FORMAT2 $*" >> {tmp_path}/calls')
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    monkeypatch.setenv("SQUEUE_FORMAT2", "jobid")
    assert ask_queue() == Queue()
    assert (tmp_path / "calls").read_text() == f" --user={os.getuid()} --all --noheader --format={FORMAT}\n"


def test_a_slurm_that_is_down_is_a_problem_in_its_own_words(tmp_path, monkeypatch):
    put(tmp_path / "bin", monkeypatch, "squeue", "echo 'slurm_load_jobs error: Unable to contact' >&2; exit 1")
    assert ask_queue() == Queue(problem="slurm_load_jobs error: Unable to contact")
    put(tmp_path / "bin", monkeypatch, "squeue", "exit 3")
    assert ask_queue().problem == "squeue left with exit code 3 and no word"


def test_a_squeue_that_hangs_is_given_up_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr("tdro_hpc.launch.queue._SECONDS", 0.5)
    # A wrapper: what it starts keeps the pipe open, and must not outlive the question.
    put(tmp_path / "bin", monkeypatch, "squeue", f"(sleep 3; touch {tmp_path}/lived) & wait")
    began = time.monotonic()
    assert ask_queue() == Queue(problem="squeue did not answer within 0.5 s")
    assert time.monotonic() - began < 2.5
    time.sleep(3.0 - (time.monotonic() - began) + 0.3)
    assert not (tmp_path / "lived").exists()


def test_no_squeue_is_said_in_words(tmp_path, monkeypatch):
    put(tmp_path / "bin", monkeypatch, "env", 'echo "env: squeue: No such file" >&2; exit 127')
    assert ask_queue() == Queue(problem="squeue is not installed here")


def test_accounting_tells_the_last_state_of_jobs(tmp_path, monkeypatch):
    body = f"echo \"$*\" >> {tmp_path}/calls; echo '812|TIMEOUT'; echo '813|CANCELLED by 1000'; echo '814|'"
    put(tmp_path / "bin", monkeypatch, "sacct", body)
    assert ask_accounting(["812;alpha", "813", "812", "814"]) == {"812": "TIMEOUT", "813": "CANCELLED"}
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert call.endswith("--jobs=812,813,814")


def test_accounting_that_is_off_or_not_installed_tells_nothing(tmp_path, monkeypatch):
    put(tmp_path / "bin", monkeypatch, "sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert ask_accounting(["812"]) == {}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ask_accounting(["812"]) == {} == ask_accounting([])
