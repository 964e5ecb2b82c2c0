"""The batch shell's last word: exit codes, and FAILED.json for ranks that could not speak."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tdro_hpc.config.load import save_config
from tdro_hpc.config.schema import Config, LoggingConfig
from tdro_hpc.launch.commands import Outcome
from tdro_hpc.launch.job import aftermath, requeue
from tdro_hpc.launch.job.aftermath import Attempt, settle, words_of_attempt
from tdro_hpc.launch.jobs import append_event

ROOT = Path(__file__).parents[2]
CONFIG = Config(name="demo", logging=LoggingConfig(plots=False))
KILLED = "srun: error: node2: task 3: Killed\nsrun: error: node1: tasks 0-1: Killed\n"


@pytest.fixture
def stage_dir(tmp_path: Path) -> Path:
    save_config(CONFIG, tmp_path / "demo" / "s0" / "config.yaml")
    return tmp_path / "demo" / "s0"


def started(stage_dir: Path, job: str = "812", restart: int = 0) -> None:
    append_event(stage_dir, "start", job=job, restart=restart, executor="slurm", fresh=not restart)


def submitted(stage_dir: Path, job: str = "812", link: int = 1) -> None:
    append_event(stage_dir, "submit", job=job, executor="slurm", fresh=True, link=link, links=2)


def ended(stage_dir: Path, code: int, words: str = "", *, job: str = "812", restart: int = 0) -> int:
    log = stage_dir / "log" / "slurm" / f"{job}_0_log.err"
    return settle(Attempt(stage_dir, job, restart, code, words, log, aftermath.read_jsonl(stage_dir / "jobs.jsonl")))


def failed(stage_dir: Path) -> dict:
    return json.loads((stage_dir / "FAILED.json").read_text())


def fail_as(stage_dir: Path, error: str) -> None:
    value = {"stage": "s0", "step": 3, "rank": 2, "host": "node2", "error": error, "log": "log/rank2.log"}
    (stage_dir / "FAILED.json").write_text(json.dumps(value))


def events(stage_dir: Path) -> list[str]:
    return [row["event"] for row in aftermath.read_jsonl(stage_dir / "jobs.jsonl")]


def test_zero_only_with_done(stage_dir):
    started(stage_dir)
    (stage_dir / "DONE.json").write_text("{}")
    assert ended(stage_dir, 0) == 0 and ended(stage_dir, 1) == 0
    (stage_dir / "DONE.json").unlink()
    assert ended(stage_dir, 0) == 1
    assert "without DONE.json" in failed(stage_dir)["error"]
    assert events(stage_dir) == ["start", "end", "end", "end"]


def test_stop_of_this_attempt_is_75_and_one_of_an_earlier_is_not(stage_dir):
    started(stage_dir)
    append_event(stage_dir, "stopped", job="812", step=5, steps=9, reason="SIGUSR2", then="")
    assert ended(stage_dir, 0) == 75
    started(stage_dir, restart=1)
    assert ended(stage_dir, 137, KILLED, restart=1) == 1


def test_killed_rank_is_named_from_the_lines_of_srun(stage_dir):
    started(stage_dir)
    (stage_dir / "metrics.jsonl").write_text('\n{"step": 25}\n')
    (stage_dir / "log").mkdir()
    (stage_dir / "log" / "rank3.log").touch()
    assert ended(stage_dir, 143, KILLED) == 1
    value = failed(stage_dir)
    assert (value["rank"], value["host"], value["step"], value["stage"]) == (3, "node2", 25, "s0")
    assert "SIGKILL" in value["error"] and value["log"].endswith("s0/log/rank3.log")


def test_first_hand_word_of_a_rank_stays_and_second_hand_gives_way(stage_dir):
    started(stage_dir)
    fail_as(stage_dir, "the loss is not finite")
    assert ended(stage_dir, 1, KILLED) == 1 and failed(stage_dir)["error"] == "the loss is not finite"
    fail_as(stage_dir, "RuntimeError: Connection closed by peer")
    assert ended(stage_dir, 1, "srun: Job step aborted\n") == 1 and "Connection closed" in failed(stage_dir)["error"]
    assert ended(stage_dir, 1, KILLED) == 1 and failed(stage_dir)["rank"] == 3


def test_failure_before_any_rank_came_to_life(stage_dir):
    fail_as(stage_dir, "of an earlier submission")
    os.utime(stage_dir / "FAILED.json", (1.0, 1.0))
    submitted(stage_dir)
    assert ended(stage_dir, 1, "module: no such module cuda/99\n") == 1
    assert "exit code 1" in failed(stage_dir)["error"] and "no such module cuda/99" in failed(stage_dir)["error"]
    assert ended(stage_dir, 1, "srun: error: Unable to create step for job 812: Invalid gres\n") == 1
    words = "a line of cluster.setup failed with exit code 127: module load cuda/99"
    submitted(stage_dir, "813")
    os.utime(stage_dir / "FAILED.json", (1.0, 1.0))
    assert ended(stage_dir, 127, f"module: command not found\n{words}\n", job="813") == 1
    assert failed(stage_dir)["error"].split("\n") == [words, "module: command not found", words]


def test_link_after_a_failed_one_keeps_its_cause(stage_dir):
    submitted(stage_dir)
    submitted(stage_dir, "813", 2)
    started(stage_dir)
    fail_as(stage_dir, "the loss is not finite")
    os.utime(stage_dir / "FAILED.json", (1.0, 1.0))
    assert ended(stage_dir, 1, job="813") == 1 and failed(stage_dir)["error"] == "the loss is not finite"


def test_mistake_by_hand_leaves_the_stage_as_it_was(stage_dir):
    assert ended(stage_dir, 2) == 2 and not (stage_dir / "FAILED.json").exists()
    # srun ends the other ranks, and its own code is then that of a signal.
    words = "srun: error: node1: task 0: Exited with exit code 2\nsrun: error: node1: task 1: Terminated"
    assert ended(stage_dir, 143, words) == 2 and not (stage_dir / "FAILED.json").exists()
    submitted(stage_dir)
    assert ended(stage_dir, 2) == 1


@pytest.mark.parametrize("why", [" DUE TO PREEMPTION", " DUE TO NODE FAILURE, SEE LOG", ""])
def test_job_that_slurm_ended_has_not_failed(stage_dir, why):
    started(stage_dir)
    fail_as(stage_dir, "RuntimeError: Connection closed by peer")
    words = f"slurmstepd: error: *** JOB 812 ON node1 CANCELLED AT 2026-11-21T05:52:24{why} ***\n{KILLED}"
    assert ended(stage_dir, 143, words) == 75 and events(stage_dir)[-1] == "stopped"


def test_time_limit_before_a_save_says_what_to_change(stage_dir):
    started(stage_dir)
    words = "slurmstepd: error: *** JOB 812 ON node1 CANCELLED AT 2026-11-21T05:52:24 DUE TO TIME LIMIT ***\n"
    assert ended(stage_dir, 143, words) == 1 and "cluster.stop_lead_seconds" in failed(stage_dir)["error"]


def test_signal_before_the_ranks_could_listen_goes_back_into_the_queue(stage_dir, monkeypatch):
    calls = []
    shown = "JobState=RUNNING Reason=None Restarts=0 PreemptTime=2026-11-21T05:52:24"
    monkeypatch.setattr(requeue, "run_command", lambda command, **_: calls.append(command) or Outcome(0, shown, ""))
    assert ended(stage_dir, 143, "srun: error: node1: tasks 0-1: Terminated\n") == 75
    assert calls[-1] == ["scontrol", "requeue", "812"] and not (stage_dir / "FAILED.json").exists()


def test_batch_shell_of_a_lost_node_notes_nothing(stage_dir):
    started(stage_dir)
    started(stage_dir, restart=1)
    (stage_dir / "log").mkdir()
    (stage_dir / "log" / "holder.json").write_text(json.dumps({"job": "812", "restart": 1, "host": "node2"}))
    assert ended(stage_dir, 143, KILLED, restart=0) == 75 and events(stage_dir) == ["start", "start"]
    # A later attempt that comes to grief before its ranks begin is no such copy.
    assert ended(stage_dir, 1, "boom", restart=2) == 1


def test_failure_is_drawn(stage_dir):
    save_config(replace(CONFIG, logging=LoggingConfig(plots=True)), stage_dir / "config.yaml")
    started(stage_dir)
    assert ended(stage_dir, 143, KILLED) == 1


def test_lines_of_earlier_attempts_do_not_count():
    text = f"--- job 812 restart 0\n{KILLED}*** JOB 812 ON n CANCELLED AT x DUE TO JOB REQUEUE ***\nnow\n"
    assert words_of_attempt(text, "812", 1).strip() == "now"
    assert words_of_attempt(text, "812", 0).startswith(f"\n{KILLED}")
    assert words_of_attempt(text + "--- job 812 restart 1\nlater\n", "812", 1).strip() == "later"


def test_program_is_quick_without_torch_and_reads_its_own_standard_error(stage_dir):
    started(stage_dir)
    error = stage_dir / "batch.err"
    error.write_text(f"--- job 812 restart 0\n{KILLED}")
    code = "import sys, tdro_hpc.launch.job.aftermath as a; c = a.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    words = [sys.executable, "-c", f"{code}; sys.exit(c)", str(stage_dir), "143", "812", "0"]
    began = time.monotonic()
    with open(error, "ab") as file:
        assert subprocess.run(words, cwd=ROOT, stderr=file, check=False).returncode == 1
    assert time.monotonic() - began < 5
    assert failed(stage_dir)["rank"] == 3 and failed(stage_dir)["log"] == str(error)


def test_job_is_found_without_being_named(stage_dir, monkeypatch):
    started(stage_dir, restart=0)
    started(stage_dir, restart=2)
    monkeypatch.setenv("SLURM_JOB_ID", "812")
    attempt = aftermath.attempt_of([str(stage_dir), "1"])
    assert (attempt.job, attempt.restart, attempt.begun) == ("812", 2, 1)
    monkeypatch.delenv("SLURM_JOB_ID")
    assert aftermath.attempt_of([str(stage_dir), "1"]).job == "812"
    assert aftermath.main([]) == 2
