"""Rank 0 begins: what the front door's rows mean, and what a person who starts a stage by hand is told."""

import json
from pathlib import Path

import pytest

from tdro_hpc.config.load import load_config
from tdro_hpc.config.schema import Config
from tdro_hpc.launch.job import begin as module
from tdro_hpc.launch.job import hold
from tdro_hpc.launch.job.begin import begin_by_hand, begin_in_slurm, rows_of_submission
from tdro_hpc.launch.job.place import Place
from tdro_hpc.launch.jobs import append_submit, read_jsonl
from tdro_hpc.launch.queue import Queue, QueueJob
from tdro_hpc.launch.record import write_done
from tests.launch.counting import counting_graph

CONFIG = Config(name="demo")
STAGE = counting_graph(CONFIG)["s0"]


@pytest.fixture(autouse=True)
def free():
    yield
    hold.let_go()


@pytest.fixture
def stage_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "demo" / "s0"
    (folder / "checkpoints" / "step-00000005").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000005" / "state.json").write_text("{}")
    for name in ("config.yaml", "job.sbatch", "metrics.jsonl"):
        (folder / name).write_text("")
    fail(folder)
    return folder


def fail(folder: Path) -> None:
    (folder / "FAILED.json").write_text(json.dumps({"rank": 0, "host": "n", "step": 0, "error": "x", "log": "l"}))


def submit(stage_dir: Path, job: str, *, fresh: bool, link: int = 1, links: int = 1) -> None:
    append_submit(stage_dir, job=job, keys={}, fresh=fresh, after=[], link=link, links=links, max_restarts=3, code="")


def begin(stage_dir: Path, job: str, restart: int = 0) -> int | None:
    place = Place(job=job, executor="slurm", restart=restart)
    return begin_in_slurm(stage_dir, place, keys={"seed": 1}, inputs={}, row_seconds=0.1)


def last(stage_dir: Path) -> dict:
    return read_jsonl(stage_dir / "jobs.jsonl")[-1]


def done(stage_dir: Path) -> None:
    (stage_dir / "out" / "model").mkdir(parents=True)
    (stage_dir / "out" / "model" / "x").write_text("x")
    write_done(stage_dir, STAGE, keys={}, inputs={}, code="", ranks=1, seconds=1.0)


def test_fresh_submission_clears_all_but_what_its_job_runs_from(stage_dir):
    submit(stage_dir, "812", fresh=True)
    assert begin(stage_dir, "812") is None
    left = sorted(path.name for path in stage_dir.iterdir())
    assert left == ["config.yaml", "job.sbatch", "jobs.jsonl", "log"]
    row = last(stage_dir)
    assert (row["event"], row["fresh"], row["restart"], row["executor"]) == ("start", True, 0, "slurm")
    assert json.loads((stage_dir / "log" / "holder.json").read_text())["job"] == "812"


def test_restart_continues(stage_dir):
    submit(stage_dir, "812", fresh=True)
    begin(stage_dir, "812")
    (stage_dir / "checkpoints").mkdir()
    fail(stage_dir)  # of a rank whose partner's node was lost
    assert begin(stage_dir, "812", restart=1) is None
    assert (stage_dir / "checkpoints").exists() and not (stage_dir / "FAILED.json").exists()
    assert (last(stage_dir)["fresh"], last(stage_dir)["restart"]) == (False, 1)


def test_job_without_a_row_continues_what_is_there(stage_dir):
    assert begin(stage_dir, "812") is None
    assert (stage_dir / "checkpoints").exists() and last(stage_dir)["fresh"] is False


def test_done_stage_is_left_alone(stage_dir):
    submit(stage_dir, "812", fresh=True, links=2)
    done(stage_dir)
    assert begin(stage_dir, "812") == 0
    assert last(stage_dir)["event"] == "submit" and (stage_dir / "DONE.json").exists()


def test_links_clear_once_and_stop_at_a_failure(stage_dir):
    for link, job in enumerate(("812", "813", "814"), start=1):
        submit(stage_dir, job, fresh=link == 1, link=link, links=3)
    # The first link never ran: the second one clears in its place, and FAILED.json was of before.
    assert begin(stage_dir, "813") is None
    assert last(stage_dir)["fresh"] is True and not (stage_dir / "checkpoints").exists()
    (stage_dir / "checkpoints").mkdir()
    assert begin(stage_dir, "814") is None
    assert last(stage_dir)["fresh"] is False and (stage_dir / "checkpoints").exists()
    fail(stage_dir)
    submit(stage_dir, "815", fresh=False, link=4, links=4)
    assert begin(stage_dir, "815") == 1
    assert (stage_dir / "FAILED.json").exists() and last(stage_dir)["job"] == "815"


def test_rows_of_a_submission_begin_with_its_first_link():
    rows = [{"event": "submit", "job": str(job), "link": link} for job, link in ((1, 1), (2, 2), (3, 1), (4, 2))]
    assert [row["job"] for row in rows_of_submission(rows, "4")] == ["3", "4"]
    assert [row["job"] for row in rows_of_submission(rows, "2")] == ["1", "2", "3", "4"]
    assert rows_of_submission(rows, "9") == []


def by_hand(stage_dir: Path, *, keys=None, job="900", save=True, executor="slurm", restart=0):
    place = Place(job=job, executor=executor, restart=restart)
    keys = {"seed": 1} if keys is None else keys
    return begin_by_hand(stage_dir, CONFIG, STAGE, place, keys=keys, inputs={}, save=save)


def test_by_hand_writes_the_config_and_refuses_other_keys_once_begun(stage_dir, monkeypatch):
    monkeypatch.setattr(module, "ask_queue", lambda: Queue())
    assert by_hand(stage_dir) is None
    assert load_config([f"config={stage_dir / 'config.yaml'}"]).config == CONFIG
    with pytest.raises(ValueError, match=r"begun with seed=1, and the config says 2. .* force=s0 name=demo"):
        by_hand(stage_dir, keys={"seed": 2}, job="901")
    assert by_hand(stage_dir, job="901") is None
    assert by_hand(stage_dir, job="901", keys={"seed": 2}, restart=1) is None  # Slurm has put it back


def test_by_hand_with_nothing_saved_begins_anew_with_other_keys(stage_dir, monkeypatch):
    monkeypatch.setattr(module, "ask_queue", lambda: Queue())
    assert by_hand(stage_dir) is None
    (stage_dir / "checkpoints" / "step-00000005" / "state.json").unlink()
    assert by_hand(stage_dir, keys={"seed": 2}, job="901") is None


def test_by_hand_is_refused_while_slurm_has_the_stage(stage_dir, monkeypatch):
    submit(stage_dir, "812", fresh=False)
    monkeypatch.setattr(module, "ask_queue", lambda: Queue({"812": QueueJob("812", "PENDING")}))
    for executor in ("slurm", "local"):
        with pytest.raises(ValueError, match="s0 is running already: job 812"):
            by_hand(stage_dir, executor=executor)
    assert by_hand(stage_dir, job="812") is None


def test_by_hand_is_refused_while_nobody_knows_whether_slurm_has_the_stage(stage_dir, monkeypatch):
    submit(stage_dir, "7", fresh=False)
    monkeypatch.setattr(module, "ask_queue", lambda: Queue(problem="Unable to contact slurm controller"))
    place = Place(job="8", executor="slurm")
    with pytest.raises(ValueError, match="job 7, but squeue did not answer: Unable to contact slurm controller"):
        begin_by_hand(stage_dir, CONFIG, STAGE, place, keys={}, inputs={}, save=False)
    assert last(stage_dir)["event"] == "submit"


def test_by_hand_of_a_done_and_of_a_stale_stage(stage_dir):
    done(stage_dir)
    assert by_hand(stage_dir) == 0
    (stage_dir / "out" / "model" / "x").unlink()
    with pytest.raises(ValueError, match="has to be made again"):
        by_hand(stage_dir)
