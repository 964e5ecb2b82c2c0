"""Chains given to a Slurm whose programs are scripts with a state file: what is submitted, refused and taken back."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from tdro_hpc.launch import slurm_chain
from tdro_hpc.launch.queue import Queue
from tdro_hpc.submit import main
from tests.launch.counting import CountingJob, counting_graph
from tests.launch.fake_slurm import FakeSlurm, put_on_path

CHAIN = ("s0", "s1", "s2-curr", "eval")


@pytest.fixture
def door(tmp_path, monkeypatch, capsys) -> SimpleNamespace:
    """slurm = the fake; run(words) = (exit code, stdout, stderr); stage(name) = its folder."""
    slurm = put_on_path(tmp_path / "bin", monkeypatch)

    def run(*words: str, snapshot: str = "false") -> tuple[int, str, str]:
        keys = [f"runs_dir={tmp_path}/runs", "name=x"]
        if words[0] not in ("status", "logs", "cancel"):
            keys += ["s0.warmup_steps=0", "logging.plots=false"]
            if not any(word.startswith("cluster=") for word in words):
                keys += ["cluster=slurm", f"cluster.snapshot={snapshot}"]
        code = main([*words, *keys], graph_of=counting_graph, job_of=CountingJob)
        said = capsys.readouterr()
        return code, said.out, said.err

    return SimpleNamespace(slurm=slurm, run=run, stage=lambda name: tmp_path / "runs" / "x" / name)


def rows_of(stage_dir: Path, event: str) -> list[dict]:
    path = stage_dir / "jobs.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if row["event"] == event]


def make_done(stage_dir: Path, keys: dict) -> bytes:
    """DONE.json of a stage without outputs, and the start row that it was made by."""
    stage_dir.mkdir(parents=True, exist_ok=True)
    done = {"keys": keys, "inputs": {}, "code": "old", "seconds": 1.0, "outputs": {}}
    (stage_dir / "DONE.json").write_text(json.dumps(done))
    return (stage_dir / "DONE.json").read_bytes()


def dependencies(slurm: FakeSlurm) -> list[str]:
    return [row["dependency"].removesuffix("(unfulfilled)") for row in slurm.jobs.values()]


def test_chain_is_submitted_in_order_with_its_dependencies_and_noted(door):
    code, out, err = door.run("stage=all")
    assert (code, err) == (0, "")
    assert dependencies(door.slurm) == ["", "afterok:811", "afterok:812", "afterok:811:813"]
    assert all("--kill-on-invalid-dep=yes" in call for call in door.slurm.calls("sbatch")[1:])
    for name, job in zip(CHAIN, door.slurm.jobs, strict=True):
        (row,) = rows_of(door.stage(name), "submit")
        assert (row["job"], row["executor"], row["fresh"], row["links"]) == (job, "slurm", True, 1)
        assert (door.stage(name) / "config.yaml").is_file() and (door.stage(name) / "job.sbatch").is_file()
    assert rows_of(door.stage("eval"), "submit")[0]["after"] == ["811", "813"]
    for words in ("s1       job 812  after 811", "eval     job 814  after 811, 813", "submit cancel name=x runs_dir="):
        assert words in out
    assert len(door.slurm.calls("squeue")) == 1


def test_the_same_line_submits_nothing_twice(door):
    door.run("stage=all")
    code, out, _ = door.run("stage=all")
    assert code == 0 and len(door.slurm.calls("sbatch")) == 4 and len(door.slurm.calls("squeue")) == 2
    assert "Nothing to submit: s0 is queued (job 811), s1 is queued (job 812)" in out


def test_stage_after_one_in_the_queue_waits_for_its_job(door):
    door.run("stage=s0")
    door.slurm.change("811", state="RUNNING", reason="", nodes="node1")
    assert door.run("stage=s1")[0] == 0
    assert dependencies(door.slurm) == ["", "afterok:811"]


def test_links_follow_each_other_whatever_happens_and_the_next_stage_waits_for_the_last(door):
    code, out, _ = door.run("stage=s1", "cluster.requeue=links", "cluster.max_restarts=2")
    assert code == 0
    assert dependencies(door.slurm) == [
        "",
        "afterany:811",
        "afterany:812",
        "afterok:813",
        "afterok:813,afterany:814",
        "afterok:813,afterany:815",
    ]
    rows = rows_of(door.stage("s1"), "submit")
    assert [(row["link"], row["links"], row["fresh"]) for row in rows] == [(1, 3, True), (2, 3, False), (3, 3, False)]
    assert "s1  jobs 814 to 816, 3 links  after 813" in out
    door.run("stage=s2-curr", "cluster.requeue=links", "cluster.max_restarts=2")
    assert dependencies(door.slurm)[6] == "afterok:816"


def test_failed_submission_takes_back_what_came_before_and_shows_the_words_of_sbatch(door):
    (door.stage("s1")).mkdir(parents=True)
    (door.stage("s1") / "FAILED.json").write_text(
        json.dumps({"step": 3, "rank": 0, "host": "n", "error": "e", "log": "l"})
    )
    failed = (door.stage("s1") / "FAILED.json").read_bytes()
    done = make_done(door.stage("s0"), {})
    door.slurm.set(fail_at=3)
    code, out, err = door.run("stage=all", "force=s0,s1")
    assert code == 2 and door.slurm.jobs == {}
    assert "Job violates accounting/QOS policy" in err and "sbatch --dependency=afterok:812" in err
    assert "cancelled again: 811, 812" in err and "Traceback" not in err
    assert door.slurm.calls("scancel") == [["812", "811"]]
    assert (door.stage("s0") / "DONE.json").read_bytes() == done and not (door.stage("s0") / "STALE.json").exists()
    assert (door.stage("s1") / "FAILED.json").read_bytes() == failed
    assert not (door.stage("s1") / "config.yaml").exists()
    assert [row["job"] for row in rows_of(door.stage("s0"), "cancelled")] == ["811"]
    code, out, _ = door.run("stage=s0")
    assert code == 0 and "Nothing to do" in out  # it is done, as before


def test_job_whose_submission_lost_its_answer_is_cancelled_too(door):
    door.slurm.set(fail_at=2, lost=True)
    assert door.run("stage=s1")[0] == 2
    assert door.slurm.jobs == {}


def test_interrupt_between_two_submissions_leaves_nothing(door, monkeypatch):
    submit_job = slurm_chain.submit_job

    def interrupted(*arguments, **named) -> str:
        job = submit_job(*arguments, **named)
        if job == "812":
            os.kill(os.getpid(), signal.SIGINT)
        return job

    monkeypatch.setattr(slurm_chain, "submit_job", interrupted)
    code, _, err = door.run("stage=all")
    assert code == 130 and door.slurm.jobs == {} and "Interrupted" in err
    assert len(door.slurm.calls("sbatch")) == 2
    monkeypatch.setattr(slurm_chain, "submit_job", submit_job)
    assert door.run("stage=all")[0] == 0 and len(door.slurm.jobs) == 4


def test_job_that_can_never_start_makes_room_for_a_new_one(door):
    door.run("stage=s0")
    door.slurm.change("811", reason="DependencyNeverSatisfied")
    code, _, _ = door.run("stage=s0")
    assert code == 0 and list(door.slurm.jobs) == ["812"]
    assert rows_of(door.stage("s0"), "cancelled")[0]["job"] == "811"


def test_stage_that_another_front_door_submits_meanwhile_gets_no_second_copy(door, monkeypatch):
    newest = {name: "" for name in CHAIN}
    door.run("stage=s0")
    # As it was for a front door that had looked before: nothing submitted, nothing in the queue.
    monkeypatch.setattr("tdro_hpc.submit.newest_submissions", lambda graph, run_dir: newest)
    monkeypatch.setattr("tdro_hpc.submit.queue_of", lambda runs: Queue())
    code, out, _ = door.run("stage=s1")
    assert code == 0 and "s0  job 811  submitted meanwhile by another call" in out
    assert dependencies(door.slurm) == ["", "afterok:811"]


def test_stage_of_slurm_is_not_started_here_beside_it(door):
    door.run("stage=s0")
    code, out, err = door.run("stage=s0", "cluster=local")
    assert code == 2 and "s0 is queued as a job of Slurm (job 811)" in err and "cluster=slurm" in err
    assert not rows_of(door.stage("s0"), "start")


def test_queue_that_does_not_answer_lets_nothing_be_submitted_twice(door):
    door.run("stage=s0")
    door.slurm.set(down="Unable to contact slurm controller (connect failure)")
    code, _, err = door.run("stage=s0")
    assert code == 2 and "Unable to contact slurm controller" in err and len(door.slurm.calls("sbatch")) == 1


def test_dry_run_prints_every_script_and_its_dependency_without_slurm(door, tmp_path, monkeypatch):
    door.slurm.set(down="no controller")
    code, out, err = door.run("stage=all", "dry_run=true", snapshot="true")
    assert (code, err) == (0, "") and not (tmp_path / "runs").exists()
    line = "# sbatch --dependency=afterok:<job of s0>:<job of s2-curr> --kill-on-invalid-dep=yes "
    assert f"{line}{door.stage('eval')}/job.sbatch" in out
    assert out.count("#!/bin/bash") == 4 and "--job-name=tdro-x-eval" in out
    assert "time limit 04:00:00, a job that is stopped puts itself back, at most 20 times" in out
    assert "\x1b" not in out


def test_script_of_dry_run_is_the_one_that_is_submitted(door):
    _, shown, _ = door.run("stage=s0", "dry_run=true", snapshot="true")
    door.run("stage=s0", snapshot="true")
    script = (door.stage("s0") / "job.sbatch").read_text()
    assert script.strip() in shown


def test_check_asks_sbatch_about_every_stage(door, monkeypatch):
    looked = []
    # The package's own checks need data and a model.
    fake = SimpleNamespace(check_inputs=lambda config, run_dir, line: looked.append(run_dir))
    monkeypatch.setitem(__import__("sys").modules, "tdro_hpc.stages.check", fake)
    code, out, _ = door.run("stage=s1", "check=true")
    assert code == 0 and out.count("to start at 2026-01-01T00:00:00") == 2 and door.slurm.jobs == {} and looked
    door.slurm.set(fail_at=-1)
    code, out, _ = door.run("stage=s1", "check=true")
    assert code == 2 and "s1      refused: error: invalid partition specified: gpu" in out


def test_sweep_submits_a_chain_for_each_value(door, tmp_path):
    code, out, err = door.run("stage=s1", "s1.eta=0.01,0.02")
    assert (code, err) == (0, "") and dependencies(door.slurm) == ["", "afterok:811", "", "afterok:813"]
    for eta in ("0.01", "0.02"):
        text = (tmp_path / "runs" / f"x-eta{eta}" / "s1" / "config.yaml").read_text()
        assert f"eta: {eta}\n" in text and f"name: x-eta{eta}\n" in text
        assert f"---- s1.eta={eta}" in out
    assert len(door.slurm.calls("squeue")) == 1
    _, out, _ = door.run("stage=s1", "s1.eta=0.02,0.01")
    assert out.count("Nothing to submit") == 2


def test_failed_submission_takes_back_the_whole_sweep(door):
    door.slurm.set(fail_at=4)
    assert door.run("stage=s1", "s1.eta=0.01,0.02")[0] == 2
    assert door.slurm.jobs == {}


def test_cancel_takes_waiting_jobs_from_the_end_and_asks_running_ones_to_save(door):
    door.run("stage=all")
    door.slurm.change("811", state="RUNNING", reason="", nodes="node1")
    code, out, _ = door.run("cancel")
    assert code == 0 and door.slurm.calls("scancel") == [["814", "813", "812"], ["--signal=USR2", "811"]]
    assert (door.stage("s0") / "log" / "cancel-811").is_file()
    assert "asked job 811 to save and leave" in out and "took job 814 out of the queue" in out
    assert rows_of(door.stage("s1"), "cancelled")[0]["reason"] == "cancelled by submit cancel"
    assert "cancelled" in out.splitlines()[-2]
    assert "Nothing of" in door.run("cancel")[1]


def test_cancel_without_an_answer_of_slurm_changes_nothing(door):
    door.run("stage=s0")
    door.slurm.set(down="no controller")
    code, _, err = door.run("cancel")
    assert code == 2 and "no controller. Nothing was cancelled" in err and door.slurm.calls("scancel") == []


def test_status_names_what_is_waited_for_with_one_squeue_for_all_runs(door):
    door.run("stage=s1", "s1.eta=0.01,0.02")
    door.run("stage=s1")
    door.slurm.change("815", state="RUNNING", reason="", nodes="node[1-2]")
    before = len(door.slurm.calls("squeue"))
    code, out, _ = door.run("status", "s1.eta=0.01,0.02")
    assert code == 0 and out.count("queued: Resources (job") == 2 and "waiting for s0 (job 811)" in out
    _, out, _ = door.run("status")
    assert "running on node[1-2]" in out and "waiting for s0 (job 815)" in out
    assert len(door.slurm.calls("squeue")) == before + 2


def test_accounting_is_asked_once_and_only_when_nobody_else_tells(door):
    door.run("stage=s1")
    door.slurm.remove("811", "812")
    door.slurm.set(sacct={"811": "CANCELLED by 1000", "812": "CANCELLED by 0"})
    _, out, _ = door.run("status")
    assert len(door.slurm.calls("sacct")) == 1 and "cancelled with scancel" in out
    door.slurm.set(sacct={})
    code, out, _ = door.run("status")
    assert code == 0 and "job 811 left the queue before it began" in out


def test_logs_of_a_queued_stage_say_that_it_waits_and_show_what_the_batch_script_said(door):
    door.run("stage=s0")
    code, out, _ = door.run("logs", "stage=s0")
    assert code == 0
    slurm_log = door.stage("s0") / "log" / "slurm" / "811_0_log.err"
    slurm_log.write_text("bash: module: command not found\n")
    door.slurm.remove("811")
    code, out, _ = door.run("logs", "stage=s0", "follow=true")
    assert code == 0 and "module: command not found" in out and str(slurm_log) in out
