"""Real jobs through submitit's local executor: chains, stops, crashes, second copies."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tdro_hpc.config.load import load_config, save_config
from tdro_hpc.launch.local.executor import rendezvous_file
from tests.launch.front_door import (
    ROOT,
    finish,
    front_door,
    job_rows,
    line,
    pids_of_jobs,
    rank_pid,
    steps_done,
    submit,
    wait_for,
)

STEPS = 60
TOTAL = str(sum(range(1, STEPS + 1)))


def total_of(runs_dir: Path, stage: str) -> str:
    return (runs_dir / "demo" / stage / "out" / "model" / "total.txt").read_text()


def failed_of(runs_dir: Path, stage: str) -> dict:
    return json.loads((runs_dir / "demo" / stage / "FAILED.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """(runs_dir, what the front door said) of s0 -> s1 on two ranks."""
    runs_dir = tmp_path_factory.mktemp("runs")
    code, said = submit(runs_dir, "stage=s1", "s0.steps=4", "s0.save_every_steps=2", "cluster.ranks_per_node=2")
    assert code == 0, said
    return runs_dir, said


def test_chain_on_two_ranks_leaves_what_the_run_directory_promises(finished):
    runs_dir, said = finished
    for stage in ("s0", "s1"):
        folder = runs_dir / "demo" / stage
        assert total_of(runs_dir, stage) == "10"
        assert {"config.yaml", "jobs.jsonl", "log", "metrics.jsonl", "out", "DONE.json"} <= {
            path.name for path in folder.iterdir()
        }
        assert json.loads((folder / "DONE.json").read_text())["ranks"] == 2
        assert (folder / "log" / "rank0.log").read_text().count("begins after step 0") == 1
        assert "rank 1 of 2" in (folder / "log" / "rank1.log").read_text()
        assert job_rows(runs_dir, stage, "end")[0]["exit_codes"] == [0, 0]
        (pickle,) = folder.glob("log/attempt-1/*_submitted.pkl")
        assert not rendezvous_file(pickle).exists()
    assert {"config.yaml", "plan.json"} <= {path.name for path in (runs_dir / "demo").iterdir()}
    # Not a terminal: the lines of rank 0 come through, in order, without control characters.
    assert said.index("s0 step 4/4") < said.index("s1 step 1/4") and "\r" not in said and "\x1b" not in said
    assert said.rstrip().endswith("done  s0, s1")


def test_done_stages_are_skipped(finished):
    runs_dir, _ = finished
    code, said = submit(runs_dir, "stage=s0,s1", "s0.steps=4", "cluster.ranks_per_node=2")
    assert code == 0 and "Nothing to do" in said
    assert len(job_rows(runs_dir, "s0")) == 1


def test_drift_is_kept_by_default_and_an_error_when_strict(finished):
    runs_dir, _ = finished
    words = ("stage=s0,s1", "s0.steps=5", "cluster.ranks_per_node=2")
    sentence = "s0 was made with s0.steps=4; the config says 5: it is kept. Type force=s0 to make it again."
    code, said = submit(runs_dir, *words)
    assert code == 0 and sentence in said
    code, said = submit(runs_dir, *words, "strict=true")
    assert code == 2 and sentence in said and "Traceback" not in said


def test_dry_run_writes_nothing_and_shows_the_job(finished):
    runs_dir, _ = finished
    before = [(path, path.stat().st_mtime_ns) for path in sorted(runs_dir.rglob("*"))]
    code, said = submit(runs_dir, "stage=s1", "force=s1", "s0.steps=4", "cluster.ranks_per_node=2", "dry_run=true")
    assert code == 0 and "made again: forced" in said
    assert f"-m tdro_hpc.run {runs_dir}/demo/s1" in said and "WORLD_SIZE=2" in said
    assert [(path, path.stat().st_mtime_ns) for path in sorted(runs_dir.rglob("*"))] == before


def test_script_of_dry_run_is_correct_shell(finished):
    runs_dir, _ = finished
    for ranks in ("1", "2"):
        _, said = submit(runs_dir, "stage=s1", "force=s1", f"cluster.ranks_per_node={ranks}", "dry_run=true")
        script = said[said.index("#!/bin/bash") :]
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_script_of_dry_run_does_what_the_job_does(tmp_path):
    words = ("stage=s0", "s0.steps=30", "s0.save_every_steps=1000", "cluster.ranks_per_node=2")
    _, said = submit(tmp_path, *words, "dry_run=true")
    script = said[said.index("#!/bin/bash") :].replace("-m tdro_hpc.run", "-m tests.launch.counting run")
    keys = [word for word in line(tmp_path, *words)[4:] if not word.startswith("stage=")]
    save_config(load_config(keys).config, tmp_path / "demo" / "s0" / "config.yaml")
    first = subprocess.Popen(["bash", "-c", script], cwd=ROOT)
    wait_for(lambda: steps_done(tmp_path, "s0") >= 2)
    first.terminate()
    assert first.wait(timeout=60) == 3
    second = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    assert total_of(tmp_path, "s0") == str(sum(range(31))) and steps_done(tmp_path, "s0") == 30
    assert json.loads((tmp_path / "demo" / "s0" / "DONE.json").read_text())["ranks"] == 2
    third = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert third.returncode == 0 and third.stdout.count("s0 is done") == 1


def test_status_and_logs_of_a_finished_run(finished):
    runs_dir, _ = finished
    code, said = submit(runs_dir, "status")
    assert code == 0 and "s0" in said and "done" in said and "4/4" in said and "0.2500" in said
    code, said = submit(runs_dir, "logs", "stage=s0", "follow=true")
    assert code == 0 and "s0 step 4/4" in said and "s1 step" not in said
    code, said = submit(runs_dir, "cancel")
    assert code == 0 and "Nothing of" in said


def test_every_stop_signal_saves_and_the_same_line_continues(tmp_path):
    """Four stops, each sent to another process, then the end: the sum is that of an unbroken run."""
    words = ("stage=s0", f"s0.steps={STEPS}", "s0.save_every_steps=1000", "cluster.ranks_per_node=2")
    stops = [
        (lambda door: os.killpg(door.pid, signal.SIGINT), 130, "SIGTERM"),  # Ctrl-C: the whole foreground group
        (lambda door: os.kill(door.pid, signal.SIGTERM), 3, "SIGTERM"),
        (lambda door: os.kill(job_rows(tmp_path, "s0")[-1]["pid"], signal.SIGUSR2), 3, "SIGUSR2"),
        (lambda door: os.kill(rank_pid(tmp_path, 1), signal.SIGINT), 3, "another rank"),
    ]
    last = 0
    for stop, expected_code, reason in stops:
        with front_door(tmp_path, *words) as door:
            wait_for(lambda before=last: steps_done(tmp_path, "s0") >= before + 3)
            stop(door)
            code, said = finish(door)
        assert code == expected_code, said
        last = job_rows(tmp_path, "s0", "stopped")[-1]["step"]
        assert f"s0 stopped at step {last} of {STEPS} ({reason}" in said
        assert "Continue with: python -m tdro_hpc.submit stage=s0" in said and "Traceback" not in said
        assert pids_of_jobs(tmp_path) == []
    code, said = submit(tmp_path, *words)
    assert code == 0 and f"begins after step {last}" in said and total_of(tmp_path, "s0") == TOTAL
    assert steps_done(tmp_path, "s0") == STEPS
    assert [row["attempt"] for row in job_rows(tmp_path, "s0")] == [1, 2, 3, 4, 5]
    log = (tmp_path / "demo" / "s0" / "log" / "rank0.log").read_text()
    assert log.count("begins after step") == 5  # appended to, never cut


def test_crashes_name_their_first_cause_and_end_the_other_ranks(tmp_path):
    words = ("stage=s1", "s0.steps=8", "s0.save_every_steps=2", "cluster.ranks_per_node=2")
    orders = tmp_path / "demo" / "orders.json"
    orders.parent.mkdir()
    # s0: rank 1 is killed at step 5, as the kernel does when memory runs out. Rank 0 then waits in a collective.
    orders.write_text(json.dumps({"stage": "s0", "rank": 1, "step": 5, "how": "kill"}))
    code, said = submit(tmp_path, *words)
    # Rank 0 may have written its row of step 5 already.
    assert code == 1 and re.search(r"s0 FAILED at step [45]: rank 1 on", said) and "SIGKILL" in said, said
    failed = failed_of(tmp_path, "s0")
    assert failed["rank"] == 1 and failed["log"].endswith("s0/log/rank1.log")
    assert pids_of_jobs(tmp_path) == [] and not (tmp_path / "demo" / "s1" / "log").exists()
    # The same line: s0 continues from its checkpoint, then rank 1 of s1 raises.
    orders.write_text(json.dumps({"stage": "s1", "rank": 1, "step": 3, "how": "raise"}))
    code, said = submit(tmp_path, *words)
    assert code == 1 and "s0 begins after step 4" in said, said
    assert re.search(r"s1 FAILED at step [23]: rank 1 on", said)
    assert "the loss is not finite\nat row 7" in said and "Traceback" not in said
    assert failed_of(tmp_path, "s1")["error"] == "the loss is not finite\nat row 7"
    assert "Traceback" in Path(failed_of(tmp_path, "s1")["log"]).read_text()
    code, said = submit(tmp_path, "status")
    assert code == 0 and "failed" in said and "the loss is not finite (log" in said
    code, said = submit(tmp_path, *words)
    assert code == 0 and total_of(tmp_path, "s1") == "36" and not (tmp_path / "demo" / "s1" / "FAILED.json").exists()


def test_a_running_stage_gets_no_second_copy(tmp_path):
    words = ("stage=s0", f"s0.steps={STEPS}")
    orders = tmp_path / "demo" / "orders.json"
    orders.parent.mkdir()
    # It stands still while four programs look at it: on a busy machine they take longer than all of its steps.
    orders.write_text(json.dumps({"stage": "s0", "rank": 0, "step": 3, "how": "wait", "until": "seen"}))
    with front_door(tmp_path, *words) as first:
        wait_for(lambda: steps_done(tmp_path, "s0") >= 2)
        os.kill(first.pid, signal.SIGKILL)  # the front door is lost, the job goes on
        first.wait()
        code, said = submit_without_ending(tmp_path, "status")
        assert "running" in said and re.search(r"1 m (30|[0-2]\d) s", said)  # 90 s less what has passed since
        by_hand = line(tmp_path, program="run")[:4] + [str(tmp_path / "demo" / "s0")]
        hand = subprocess.run(by_hand, cwd=ROOT, capture_output=True, text=True, check=False)
        assert hand.returncode == 2 and "is running already" in hand.stderr
        forced_code, forced_said = submit_without_ending(tmp_path, *words, "force=s0")
        assert forced_code == 2 and "cannot be forced while it is running" in forced_said
        with front_door(tmp_path, *words) as second:
            assert second.stdout is not None
            plan = next(said for said in second.stdout if "s0  running" in said)
            (orders.parent / "seen").touch()
            code, said = finish(second)
    assert code == 0, plan + said
    assert "is running already" in plan + said
    assert len(job_rows(tmp_path, "s0")) == 1 and total_of(tmp_path, "s0") == TOTAL


def submit_without_ending(runs_dir: Path, *words: str) -> tuple[int, str]:
    done = subprocess.run(line(runs_dir, *words), cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, done.stdout + done.stderr


def test_cancel_stops_the_job_and_its_front_door(tmp_path):
    with front_door(tmp_path, "stage=s1", f"s0.steps={STEPS}") as door:
        wait_for(lambda: steps_done(tmp_path, "s0") >= 2)
        code, said = submit_without_ending(tmp_path, "cancel")
        assert code == 0 and "asked job" in said and "SIGTERM; the same line continues after step" in said
        code, said = finish(door)
    assert code == 3 and "s0 stopped at step" in said and not (tmp_path / "demo" / "s1" / "log").exists()


def test_ranks_end_with_their_supervisor_and_the_line_continues(tmp_path):
    words = ("stage=s0", f"s0.steps={STEPS}", "s0.save_every_steps=2")
    with front_door(tmp_path, *words) as door:
        wait_for(lambda: steps_done(tmp_path, "s0") >= 5)
        os.kill(job_rows(tmp_path, "s0")[0]["pid"], signal.SIGKILL)
        code, said = finish(door)
        assert code == 3 and "s0 was interrupted; step" in said
        wait_for(lambda: not pids_of_jobs(tmp_path), seconds=5)
    steps = steps_done(tmp_path, "s0")
    time.sleep(0.3)
    assert steps_done(tmp_path, "s0") == steps


def test_force_makes_again_and_what_is_wanted_of_it_too(tmp_path):
    words = ("stage=s0,s1", "s0.steps=3")
    assert submit(tmp_path, *words)[0] == 0
    first = json.loads((tmp_path / "demo" / "s1" / "DONE.json").read_text())["inputs"]["s0"]
    with front_door(tmp_path, *words, "force=s0") as door:
        wait_for(lambda: len(job_rows(tmp_path, "s0")) == 2)
        # s1 no longer counts as done, whatever happens to this front door.
        assert (tmp_path / "demo" / "s1" / "STALE.json").exists()
        os.kill(door.pid, signal.SIGTERM)
        code, said = finish(door)
    assert code == 3 and "force=" not in said[said.index("Continue with:") :]
    assert submit(tmp_path, *words)[0] == 0
    assert len(job_rows(tmp_path, "s1")) == 2
    assert json.loads((tmp_path / "demo" / "s1" / "DONE.json").read_text())["inputs"]["s0"] != first


def test_report_shows_a_stage_that_failed_or_stopped(tmp_path):
    words = ("stage=s0", f"s0.steps={STEPS}", "s0.save_every_steps=2", "logging.plots=true")
    orders = tmp_path / "demo" / "orders.json"
    orders.parent.mkdir()
    orders.write_text(json.dumps({"stage": "s0", "rank": 0, "step": 3, "how": "raise"}))
    report = tmp_path / "demo" / "report.html"
    code, said = submit(tmp_path, *words)
    assert code == 1, said
    assert 'class="failed"' in report.read_text() and "the loss is not finite" in report.read_text()
    with front_door(tmp_path, *words) as door:
        wait_for(lambda: steps_done(tmp_path, "s0") >= 5)
        door.send_signal(signal.SIGINT)
        assert finish(door)[0] == 130
    assert 'class="stopped"' in report.read_text() and 'class="failed"' not in report.read_text()
