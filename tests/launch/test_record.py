import json
import os
import subprocess
import sys

import psutil
import pytest

from tdro_hpc.launch.jobs import append_event, append_start, end_orphans, next_attempt, read_jsonl
from tdro_hpc.launch.record import (
    clear_stage,
    code_version,
    identity_of,
    inputs_of,
    mark_stale,
    read_state,
    write_done,
    write_failed,
)
from tdro_hpc.launch.stage import Stage

S0 = Stage("s0", "s0", (), ("model",), ())
S1 = Stage("s1", "s1", ("s0",), ("model", "table.txt"), ())


def make(run_dir, stage=S0, **inputs):
    stage_dir = run_dir / stage.name
    for name in stage.makes:
        path = stage_dir / "out" / name if "." in name else stage_dir / "out" / name / "weights.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("12345")
    write_done(stage_dir, stage, keys={"a": 1}, inputs=inputs, code="abc", ranks=2, seconds=1.5)
    return stage_dir


def start(stage_dir, pid, fresh=True, job="7"):
    append_start(stage_dir, job=job, pid=pid, ranks=1, keys={"a": 1}, inputs={}, fresh=fresh)


def test_done_lists_sizes_keys_and_inputs(tmp_path):
    stage_dir = make(tmp_path, S1, s0="x")
    done = json.loads((stage_dir / "DONE.json").read_text())
    assert done["outputs"] == {"out/model/weights.bin": 5, "out/table.txt": 5}
    assert done["keys"] == {"a": 1} and done["inputs"] == {"s0": "x"} and done["ranks"] == 2 and len(done["hash"]) == 64
    state = read_state(stage_dir)
    assert state.status == "done" and state.identity == identity_of(stage_dir) and state.code == "abc"


def test_done_without_its_output_is_refused(tmp_path):
    (tmp_path / "s0").mkdir()
    with pytest.raises(ValueError, match="ended without .*out/model"):
        write_done(tmp_path / "s0", S0, keys={}, inputs={}, code="", ranks=1, seconds=0)
    assert not (tmp_path / "s0" / "DONE.json").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "out/model/weights.bin is missing"), ("12", "out/model/weights.bin has 2 bytes instead of 5")],
)
def test_done_with_lost_outputs_does_not_count(tmp_path, content, words):
    stage_dir = make(tmp_path)
    path = stage_dir / "out" / "model" / "weights.bin"
    path.unlink() if content is None else path.write_text(content)
    state = read_state(stage_dir)
    assert state.status == "stale" and words in state.problem and state.identity == ""


def test_damaged_done_does_not_count(tmp_path):
    stage_dir = make(tmp_path)
    (stage_dir / "DONE.json").write_text('{"stage": "s0", ')
    assert read_state(stage_dir).status == "stale"


def test_empty_folder_is_new_and_missing_folder_too(tmp_path):
    assert read_state(tmp_path).status == read_state(tmp_path / "no").status == "new"


def test_first_cause_of_a_failure_is_kept(tmp_path):
    assert write_failed(tmp_path, rank=1, error="CUDA out of memory\nsecond line", log=tmp_path / "rank1.log")
    assert not write_failed(tmp_path, rank=0, error="connection closed", log=tmp_path / "rank0.log")
    state = read_state(tmp_path)
    assert state.status == "failed"
    assert "rank 1 on" in state.problem and "CUDA out of memory (log" in state.problem and "second" not in state.problem
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FAILED.json"]


def test_supervisor_replaces_what_the_others_said(tmp_path):
    write_failed(tmp_path, rank=0, error="connection closed", log=tmp_path)
    write_failed(tmp_path, rank=1, error="ended by SIGKILL", log=tmp_path, replace=True)
    assert json.loads((tmp_path / "FAILED.json").read_text())["rank"] == 1


def test_failure_names_the_newest_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "steps": 9}\n{"step": 4, "steps": 9}\n{"st')
    write_failed(tmp_path, rank=0, error="NaN", log=tmp_path)
    assert read_state(tmp_path).problem.startswith("at step 4: rank 0")


def test_running_needs_the_same_process_not_only_the_same_id(tmp_path):
    start(tmp_path, os.getpid())
    assert read_state(tmp_path).status == "running" and read_state(tmp_path).pid == os.getpid()
    row = read_jsonl(tmp_path / "jobs.jsonl")[0]
    (tmp_path / "jobs.jsonl").write_text(json.dumps(row | {"started": row["started"] - 60}) + "\n")
    assert read_state(tmp_path).status == "stopped"


def test_a_dead_process_is_not_running(tmp_path):
    start(tmp_path, 2**22 + 1)  # above the largest process id
    assert read_state(tmp_path).status == "stopped"


def test_orphans_of_a_killed_supervisor_are_ended_and_nobody_else(tmp_path):
    sleep = [sys.executable, "-c", "import time; time.sleep(100)"]
    # The group outlives its leader; a bystander has a group of its own.
    leader = subprocess.Popen(
        ["bash", "-c", "sleep 100 & echo $!; wait"], stdout=subprocess.PIPE, start_new_session=True
    )
    bystander = subprocess.Popen(sleep, start_new_session=True)
    assert leader.stdout is not None
    orphan = psutil.Process(int(leader.stdout.readline()))
    start(tmp_path, leader.pid, job=str(leader.pid))
    end_orphans(tmp_path)
    assert orphan.is_running() and leader.poll() is None  # nothing is done while the leader lives
    leader.kill()
    leader.wait()
    end_orphans(tmp_path)
    orphan.wait(timeout=5)
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
    leader.stdout.close()


def test_an_ended_job_is_not_running(tmp_path):
    start(tmp_path, os.getpid())
    append_event(tmp_path, "end", job="7", exit_codes=[0])
    assert read_state(tmp_path).status == "stopped"


def test_a_job_on_another_machine_runs_as_long_as_it_gives_signs_of_life(tmp_path):
    start(tmp_path, os.getpid())
    row = read_jsonl(tmp_path / "jobs.jsonl")[0] | {"host": "elsewhere", "time": 0}
    (tmp_path / "jobs.jsonl").write_text(json.dumps(row) + "\n")
    assert read_state(tmp_path).status == "stopped"
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "alive").touch()
    assert read_state(tmp_path).status == "running"


def test_running_wins_over_what_an_earlier_attempt_left(tmp_path):
    write_failed(tmp_path, rank=0, error="x", log=tmp_path)
    start(tmp_path, os.getpid())
    assert read_state(tmp_path).status == "running"


def test_stopped_says_after_which_step_it_continues(tmp_path):
    start(tmp_path, 2**22 + 1)
    for step in (3, 12):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step-{step:08d}" / "state.json").write_text("{}")
    (tmp_path / "checkpoints" / "step-00000099").mkdir()  # not whole
    assert read_state(tmp_path).step == 12


def test_attempts_are_counted_and_a_half_written_row_is_left_out(tmp_path):
    start(tmp_path, 1)
    start(tmp_path, 1, fresh=False)
    with open(tmp_path / "jobs.jsonl", "a") as file:
        file.write('{"event": "sta')
    assert next_attempt(tmp_path) == 3


def test_clearing_keeps_logs_and_jobs(tmp_path):
    stage_dir = make(tmp_path)
    start(stage_dir, 1)
    (stage_dir / "log").mkdir()
    (stage_dir / "log" / "rank0.log").write_text("words")
    (stage_dir / "checkpoints").mkdir()
    clear_stage(stage_dir)
    assert sorted(path.name for path in stage_dir.iterdir()) == ["jobs.jsonl", "log"]


def test_stale_mark_survives_until_it_is_made_again(tmp_path):
    stage_dir = make(tmp_path)
    mark_stale(stage_dir)
    assert read_state(stage_dir).status == "stale"
    make(tmp_path)
    assert read_state(stage_dir).status == "done" and not (stage_dir / "STALE.json").exists()


def test_a_stage_looks_for_its_inputs(tmp_path):
    with pytest.raises(ValueError, match=r"s1 needs s0, but .*s0/DONE.json is missing .*stage=s0,s1"):
        inputs_of(S1, tmp_path)
    stage_dir = make(tmp_path)
    assert inputs_of(S1, tmp_path) == {"s0": identity_of(stage_dir)}


def test_made_again_is_another_identity(tmp_path):
    first = identity_of(make(tmp_path))
    assert identity_of(make(tmp_path)) != first


def test_code_version_names_a_commit_or_a_version():
    assert len(code_version()) >= 7
