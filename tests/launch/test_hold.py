"""A copy of a job that lives on a lost node writes nothing after another attempt has begun."""

import json

import pytest

from tdro_hpc.launch.job import hold


@pytest.fixture(autouse=True)
def free():
    yield
    hold.let_go()


def test_without_a_hold_every_check_passes(tmp_path):
    hold.let_go()
    hold.check_hold()
    assert hold.taken_over() == ""


def test_owner_passes_until_a_restart_takes_the_stage(tmp_path):
    hold.take_hold(tmp_path / "s0", "812", 0)
    hold.check_hold()
    owner = json.loads((tmp_path / "s0" / "log" / "holder.json").read_text())
    assert (owner["job"], owner["restart"]) == ("812", 0) and owner["host"] and owner["time"] > 1e9
    (tmp_path / "s0" / "log" / "holder.json").write_text(json.dumps({**owner, "restart": 1, "host": "node9"}))
    with pytest.raises(hold.TakenOver, match=r"Job 812 \(restart 1\) took s0 over on node9; this copy, job 812"):
        hold.check_hold()


def test_another_job_takes_over_too_and_other_ranks_notice(tmp_path):
    hold.take_hold(tmp_path / "s0", "813", 0)
    hold.join_hold(tmp_path / "s0", "812", 0)
    assert "Job 813" in hold.taken_over()
    hold.join_hold(tmp_path / "s0", "813", 0)
    hold.check_hold()


def test_missing_file_is_nobody_elses_claim(tmp_path):
    hold.take_hold(tmp_path / "s0", "812", 0)
    (tmp_path / "s0" / "log" / "holder.json").unlink()
    hold.check_hold()
