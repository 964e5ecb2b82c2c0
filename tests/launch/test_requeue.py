"""What follows a stop: a table over plain data, and the one call to Slurm."""

import json

import pytest

from tdro_hpc.config.cluster import ClusterConfig
from tdro_hpc.launch.commands import Outcome
from tdro_hpc.launch.job import requeue as module
from tdro_hpc.launch.job.place import Place
from tdro_hpc.launch.job.requeue import JobFacts, Stop, after_stop, facts_in, sequel_of

RUNNING = JobFacts("RUNNING", "None", False, 0)
PREEMPTED = JobFacts("RUNNING", "None", True, 0)
CANCELLED = JobFacts("COMPLETING", "None", False, 0)
LIMIT = JobFacts("COMPLETING", "TimeLimit", False, 0)
PLACE = Place(job="812", executor="slurm")
SHOWN = "JobId=812 JobName=x\n   JobState={state} Reason={reason} Restarts={restarts} PreemptTime={time}\n"


def stop(reason="SIGUSR2", **changes):
    return Stop(**{"reason": reason, "restart": 1, "max_restarts": 3, "links": False, "again": "LINE", **changes})


@pytest.mark.parametrize(
    ("case", "facts", "requeued", "words"),
    [
        (stop(), RUNNING, True, "back into the queue: restart 2 of 3"),
        (stop("another rank was asked to stop"), RUNNING, True, "restart 2 of 3"),
        (stop("SIGTERM"), PREEMPTED, True, "restart 2 of 3"),
        (stop("SIGUSR2"), PREEMPTED, True, "restart 2 of 3"),
        (stop("SIGUSR2"), LIMIT, True, "restart 2 of 3"),
        (stop("SIGTERM"), LIMIT, True, "restart 2 of 3"),
        (stop("SIGUSR2"), JobFacts(), True, "restart 2 of 3"),
        (stop("SIGTERM"), CANCELLED, False, "it was cancelled. Type: LINE"),
        (stop("SIGUSR2"), CANCELLED, False, "it was cancelled"),
        (stop("SIGTERM"), JobFacts(), False, "Slurm does not say why"),
        (stop("SIGTERM"), RUNNING, False, "does not say that it was preempted"),
        (stop("SIGINT"), RUNNING, False, "SIGINT came"),
        (stop("SIGTERM"), JobFacts("COMPLETING", "None", True, 0), False, "Slurm puts it back where the site allows"),
        (stop(cancelled=True), RUNNING, False, "cancelled. Type: LINE"),
        (stop(restart=3), RUNNING, False, "gone on 3 times, as often as cluster.max_restarts allows. Type: LINE"),
        (stop(max_restarts=0, restart=0), RUNNING, False, "gone on 0 times"),
        (stop(links=True, link=1, num_links=3), RUNNING, False, "the next link continues (2 of 3)"),
        (stop(links=True, link=3, num_links=3), RUNNING, False, "that was the last link (3 of 3). Type: LINE"),
        (stop("SIGTERM", links=True, link=1, num_links=3), PREEMPTED, False, "the next link continues"),
        (stop(links=True, link=1, num_links=3, cancelled=True), RUNNING, False, "cancelled"),
    ],
)
def test_what_follows_a_stop(case, facts, requeued, words):
    sequel = sequel_of(case, facts)
    assert sequel.requeue is requeued and words in sequel.then


def test_facts_are_read_from_scontrol():
    text = SHOWN.format(state="RUNNING", reason="None", restarts=2, time="2026-11-21T05:24:04")
    assert facts_in(text) == JobFacts("RUNNING", "None", True, 2)
    assert facts_in(text.replace("2026-11-21T05:24:04", "None")).preempted is False
    assert facts_in("") == JobFacts()


class Scontrol:
    """Answers in the place of scontrol."""

    def __init__(self, monkeypatch, requeue, *, shown=None):
        self.calls, self.requeue = [], list(requeue)
        self.shown = shown or SHOWN.format(state="RUNNING", reason="None", restarts=0, time="None")
        monkeypatch.setattr(module, "run_command", self)

    def __call__(self, command, *, seconds=30.0):
        self.calls.append(command[1])
        return Outcome(0, self.shown, "") if command[1] == "show" else self.requeue.pop(0)


def rows(stage_dir):
    return [json.loads(line) for line in (stage_dir / "jobs.jsonl").read_text().splitlines()]


def obey(stage_dir, **cluster):
    return after_stop(stage_dir, ClusterConfig(executor="slurm", **cluster), PLACE, step=5, steps=9, reason="SIGUSR2")


def test_accepted_requeue_is_noted_before_it_is_asked_for(tmp_path, monkeypatch):
    scontrol = Scontrol(monkeypatch, [Outcome(0, "", "")])
    assert obey(tmp_path / "s0") == (0, "back into the queue: restart 1 of 20")
    (row,) = rows(tmp_path / "s0")
    assert (row["event"], row["step"], row["steps"], row["reason"]) == ("stopped", 5, 9, "SIGUSR2")
    assert row["then"] == "back into the queue: restart 1 of 20" and scontrol.calls == ["show", "requeue"]


def test_refused_requeue_gives_the_words_of_slurm(tmp_path, monkeypatch):
    Scontrol(monkeypatch, [Outcome(1, "", "Requested operation is presently disabled\n")])
    code, then = obey(tmp_path / "s0")
    assert code == 75 and "Requested operation is presently disabled" in then and "stage=s0" in then
    assert rows(tmp_path / "s0")[-1]["then"] == then


def test_scontrol_that_is_ended_with_its_job_has_been_heard(tmp_path, monkeypatch):
    Scontrol(monkeypatch, [Outcome(-15, "", "")])
    assert obey(tmp_path / "s0")[0] == 0


def test_busy_controller_is_asked_again(tmp_path, monkeypatch):
    busy = Outcome(1, "", "slurm_requeue error: Unable to contact slurm controller (connect failure)")
    scontrol = Scontrol(monkeypatch, [busy, Outcome(0, "", "")])
    assert obey(tmp_path / "s0")[0] == 0 and scontrol.calls == ["show", "requeue", "show", "requeue"]


def test_mark_of_the_front_door_and_links_keep_slurm_out(tmp_path, monkeypatch):
    scontrol = Scontrol(monkeypatch, [])
    (tmp_path / "s0" / "log").mkdir(parents=True)
    (tmp_path / "s0" / "log" / "cancel-812").touch()
    assert obey(tmp_path / "s0")[0] == 75
    submit = {"event": "submit", "job": "812", "link": 1, "links": 2}
    (tmp_path / "s1").mkdir()
    (tmp_path / "s1" / "jobs.jsonl").write_text(json.dumps(submit) + "\n")
    assert obey(tmp_path / "s1", requeue="links") == (75, "the next link continues (2 of 2)")
    assert scontrol.calls == ["show", "show"]
