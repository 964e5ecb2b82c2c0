"""What a person is told of stages, from plain data; the table again and again; and how long 200 runs take."""

import io
import json
import time
from pathlib import Path

import pytest

from tdro_hpc.launch.look import watch as watching
from tdro_hpc.launch.look.reasons import SeenStage, reason, state_word, unexplained_job
from tdro_hpc.launch.look.status import status_text
from tdro_hpc.launch.queue import Queue, QueueJob
from tdro_hpc.launch.record import StageState

FAILURE = "at step 400: rank 3 on node2: CUDA out of memory (log s1/log/rank3-error.txt)"


def seen(name: str, status: str, *rows: dict, needs: tuple[str, ...] = (), **state) -> SeenStage:
    numbered = tuple({"time": float(index), **row} for index, row in enumerate(rows))
    values = {"executor": "slurm", "job": "813", "max_restarts": 20, **state}
    return SeenStage(Path("x") / name, needs, StageState(status=status, **values), numbered)


def told(stage: SeenStage, *others: SeenStage, accounting: dict | None = None) -> tuple[str, str]:
    stages = {other.name: other for other in (*others, stage)}
    return state_word(stage, stages), reason(stage, stages, accounting or {})


SUBMIT = {"event": "submit", "job": "813", "executor": "slurm", "link": 1}
START = {"event": "start", "job": "813"}
STOPPED = {"event": "stopped", "job": "813", "step": 120, "steps": 400, "reason": "SIGUSR2"}
BACK = {**STOPPED, "then": "back into the queue: restart 2 of 20"}


@pytest.mark.parametrize(
    ("stage", "state", "words"),
    [
        (seen("s2", "running", nodes="node1,node2"), "running", "running on node1,node2"),
        (seen("s2", "running", nodes="n1", restarts=2), "running", "running on n1, restart 2 of 20"),
        (seen("s2", "queued", SUBMIT, queue_reason="Resources"), "queued", "queued: Resources (job 813)"),
        (
            seen("s2", "queued", SUBMIT, START, BACK, queue_reason="BeginTime", restarts=1),
            "queued",
            "requeued after SIGUSR2 at step 120, restart 2 of 20; queued: BeginTime (job 813)",
        ),
        (
            seen("s2", "queued", SUBMIT, START, queue_reason="BeginTime"),
            "queued",
            "requeued by Slurm (preemption or a failed node), restart 1 of 20; queued: BeginTime (job 813)",
        ),
        (seen("s2", "failed", problem="at step 4: rank 0"), "failed", "dead: s2 failed at step 4: rank 0"),
        (seen("s2", "failed", problem="rank 0 on n1: no module"), "failed", "dead: s2 failed: rank 0 on n1: no module"),
        (
            seen("s2", "stopped", SUBMIT, START, {**STOPPED, "then": "preempted; Slurm puts it back"}, step=120),
            "stopped",
            "preempted at step 120 and not requeued; the same line continues after step 120",
        ),
        (
            seen("s2", "stopped", SUBMIT, START, {**STOPPED, "then": "no more restarts. Type: x"}, step=99),
            "stopped",
            "stopped by SIGUSR2 at step 120: no more restarts; the same line continues after step 99",
        ),
        (
            seen("s2", "stopped", SUBMIT, START, {"event": "cancelled", "job": "813", "reason": "by me"}, step=9),
            "stopped",
            "job 813: by me; the same line continues after step 9",
        ),
        (
            seen("s2", "stopped", SUBMIT, START),
            "stopped",
            "job 813: gone from the queue without a word; the same line continues from the beginning",
        ),
        (seen("s2", "unknown", problem="socket timed out"), "unknown", "job 813: squeue did not answer"),
        (seen("s2", "new", executor="local", job=""), "waiting", "not started yet"),
    ],
)  # fmt: skip
def test_reason_in_words(stage, state, words):
    word, text = told(stage)
    assert word == state and text.startswith(words)


def test_stage_behind_another_names_it_and_its_job():
    s1 = seen("s1", "running", job="812", jobs=("812",))
    stage = seen("s2", "queued", SUBMIT, needs=("s1",), queue_reason="Dependency")
    assert told(stage, s1) == ("queued", "waiting for s1 (job 812)")
    links = seen("s1", "running", job="812", jobs=("812", "813", "814"))
    assert told(stage, links)[1] == "waiting for s1 (job 814)"


def test_dependents_of_a_failed_stage_tell_its_first_cause_however_far_they_are():
    s1 = seen("s1", "failed", problem=FAILURE)
    s2 = seen("s2", "new", SUBMIT, needs=("s1",), problem="job 813 left the queue before it began")
    last = seen("eval", "new", needs=("s2",), executor="local", job="")
    assert told(s2, s1) == ("dead", f"dead: s1 failed {FAILURE}")
    assert told(last, s1, s2) == ("dead", f"dead: s1 failed {FAILURE}")
    assert told(s1) == ("failed", f"dead: s1 failed {FAILURE}")


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("TIMEOUT", "time limit"),
        ("NODE_FAIL", "a node failed"),
        ("OUT_OF_MEMORY", "more memory"),
        ("CANCELLED", "cancelled with scancel"),
        ("PREEMPTED", "preempted and not requeued"),
        ("REVOKED", "Slurm says REVOKED"),
    ],
)
def test_accounting_explains_what_own_files_do_not(end, words):
    begun = seen("s2", "stopped", SUBMIT, START, step=5)
    assert unexplained_job(begun) == "813"
    assert words in told(begun, accounting={"813": end})[1]
    waiting = seen("s2", "new", SUBMIT, problem="job 813 left the queue before it began")
    assert words in told(waiting, accounting={"813": end})[1]


def test_accounting_is_not_asked_where_own_files_tell():
    assert unexplained_job(seen("s2", "stopped", SUBMIT, START, STOPPED)) == ""
    assert unexplained_job(seen("s2", "queued", SUBMIT)) == ""
    assert unexplained_job(seen("s2", "failed", SUBMIT, START)) == ""
    assert unexplained_job(seen("s2", "stopped", START, executor="local")) == ""
    # It went on after that stop, or was put back and taken out of the queue since.
    assert unexplained_job(seen("s2", "stopped", SUBMIT, START, STOPPED, START)) == "813"
    assert unexplained_job(seen("s2", "stopped", SUBMIT, START, BACK)) == "813"


def run_with(folder: Path, *submitted: str) -> Path:
    """A run of s0 -> s1 whose first stages were submitted with these jobs."""
    names = ["s0", "s1"]
    stages = [{"name": name, "kind": name, "needs": names[:k], "action": "run"} for k, name in enumerate(names)]
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps({"line": "python -m x", "time": 0, "stages": stages}))
    for name, job in zip(names, submitted, strict=False):
        (folder / name).mkdir()
        row = {"event": "submit", "time": time.time(), "job": job, "executor": "slurm", "keys": {}, "fresh": True}
        more = {"after": [], "link": 1, "links": 1, "max_restarts": 20, "code": ""}
        (folder / name / "jobs.jsonl").write_text(json.dumps({**row, **more}) + "\n")
    return folder


def queue_with(*jobs: str, **values: str) -> Queue:
    return Queue(
        {job: QueueJob(job, values.get("state", "PENDING"), values.get("reason", "Resources")) for job in jobs}
    )


def test_table_shows_the_job_and_says_what_to_type_when_a_stage_has_failed(tmp_path):
    run_dir = run_with(tmp_path / "a", "811", "812")
    lines = status_text([run_dir], queue_with("811", "812")).splitlines()
    assert lines[1].split() == ["stage", "state", "job", "attempt", "step", "loss", "eta", "reason"]
    assert lines[2].split()[:4] == ["s0", "queued", "811", "-"] and "To continue" not in lines[-1]
    failed = {"step": 4, "rank": 1, "host": "n1", "error": "out of memory\nmore", "log": "l"}
    start = {"event": "start", "time": time.time(), "job": "811", "executor": "slurm", "restart": 1, "fresh": True,
             "keys": {}, "inputs": {}, "host": "n1", "pid": 1, "attempt": 2}  # fmt: skip
    with open(run_dir / "s0" / "jobs.jsonl", "a") as file:
        file.write(json.dumps(start) + "\n")
    (run_dir / "s0" / "FAILED.json").write_text(json.dumps(failed))
    lines = status_text([run_dir], queue_with()).splitlines()
    assert lines[2].split()[:4] == ["s0", "failed", "811", "2/21"]
    assert lines[3].split()[1] == "dead" and lines[3].endswith("n1: out of memory (log l)")
    assert lines[4] == "To continue type: python -m x"


def test_queue_that_does_not_answer_is_said_and_explains_nothing(tmp_path):
    run_dir = run_with(tmp_path / "a", "811")
    text = status_text([run_dir], Queue(problem="squeue did not answer within 10 s"))
    assert "unknown" in text and text.endswith("not known: squeue did not answer within 10 s")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("out", [io.StringIO(), Terminal()], ids=["file", "terminal"])
def test_watching_ends_when_nothing_is_at_work_and_asks_seldom(tmp_path, monkeypatch, out):
    run_dir = run_with(tmp_path / "a", "811")
    queues = [queue_with("811"), queue_with("811"), queue_with("811", reason="Priority"), queue_with()]
    asked, clock = [], [0.0]
    monkeypatch.setattr(watching, "queue_of", lambda runs: asked.append(clock[0]) or queues[len(asked) - 1])
    monkeypatch.setattr(watching.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr("tdro_hpc.launch.look.status.ask_accounting", lambda jobs: {})

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    watching.watch([run_dir], out, sleep=sleep)
    assert asked == [0.0, 10.0, 20.0, 30.0]
    text = " ".join(out.getvalue().split())  # a terminal of 80 columns wraps
    assert "queued: Priority (job 811)" in text and "left the queue before it began" in text
    if not out.isatty():
        assert text.count("queued: Resources") == 1  # the second look saw nothing new


def test_interrupt_ends_the_watching_quietly(tmp_path, monkeypatch):
    run_dir = run_with(tmp_path / "a", "811")
    monkeypatch.setattr(watching, "queue_of", lambda runs: queue_with("811"))

    def sleep(seconds: float) -> None:
        raise KeyboardInterrupt

    watching.watch([run_dir], io.StringIO(), sleep=sleep)
