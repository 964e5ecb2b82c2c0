"""What a person does with Slurm's own commands: slurm/chain.sh, a second copy, scancel; and submit cancel beside it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.stops import held
from tests.cluster.user import PATIENCE_SECONDS, ROOT, User, training_words

ONE_RANK = ["cluster.nodes=1", "s0.save_every_steps=1000"]
NODES = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", "--mem=8G", "--time=00:30:00", "--signal=USR2@20"]


def by_hand(user: User, *command: str) -> "subprocess.CompletedProcess[str]":
    """A command of slurm/ as a person types it, with an environment in which `python` has the package."""
    programs = f"{Path(sys.executable).parent}:{user.cluster.environment['PATH']}"
    environment = {**user.cluster.environment, "PYTHONPATH": str(ROOT), "PATH": programs}
    return user.cluster.run(*command, cwd=user.folder, env=environment)


def files_of(stage_dir: Path) -> dict[str, bytes]:
    """Weights that a stage has made: tensors and JSON, byte for byte."""
    found = [*stage_dir.glob("out/**/*.safetensors"), *stage_dir.glob("out/weights/*.json")]
    return {str(path.relative_to(stage_dir)): path.read_bytes() for path in sorted(found)}


@pytest.mark.slow
def test_a_chain_by_hand_makes_what_the_front_door_makes(user: User) -> None:
    user.make_data()
    words = training_words()
    keys = [word for word in words if word != "cluster=testcluster"]
    user.type(*words, "stage=s1", "name=door")
    told = by_hand(user, str(ROOT / "slurm" / "chain.sh"), "s0", "s1", *keys, "name=hand", "--", *NODES).stdout
    first, second = re.findall(r"job (\d+)", told)[:2]
    # A second copy of s0 while the first is in the middle of its work.
    stage = [str(ROOT / "slurm" / "stage.sbatch"), "s0", *keys, "name=hand"]
    with held(user, "hand", "s0", step=2):
        copy = by_hand(user, "sbatch", "--parsable", *NODES, *stage).stdout.strip()
        told = user.type("status", "name=hand").stdout
        assert re.search(rf"^s0 +running +{first} ", told, re.MULTILINE), told
        user.wait_gone(copy)
    user.wait_done("hand", "s0", "s1")
    user.wait_done("door", "s0", "s1")
    user.wait_gone(first, second)
    assert [row["job"] for row in user.rows("hand", "s0", "start")] == [first]
    assert user.cluster.job(copy)["ExitCode"] == "2:0"
    assert f"s0 is running already: job {first}" in (user.folder / f"tdro-{copy}.out").read_text()
    for name in ("s0", "s1"):
        made = files_of(user.file("hand", name))
        assert made and made == files_of(user.file("door", name))
    assert {user.cluster.state(job) for job in (first, second)} == {"COMPLETED"}
    # What was begun by hand the front door finds done.
    assert "Nothing to do" in user.type(*words, "stage=s1", "name=hand").stdout


@pytest.mark.slow
def test_what_is_cancelled_saves_first_and_goes_on_where_it_was(user: User) -> None:
    line = ["stage=s0,s1,s2", "s0.steps=240", *ONE_RANK]
    user.count(*line)
    jobs = [user.job("count", stage) for stage in ("s0", "s1", "s2-curr")]
    user.wait(lambda: user.steps("count", "s0") >= 3)
    told = user.type("cancel", "name=count").stdout
    order = [f"s2-curr: took job {jobs[2]}", f"s1: took job {jobs[1]}", f"s0: asked job {jobs[0]} to save"]
    assert [told.find(words) for words in order] == sorted(told.find(words) for words in order) and order[0] in told
    assert not user.cluster.squeue()
    assert not user.rows("count", "s1", "start") and not user.rows("count", "s2-curr", "start")
    stopped = user.rows("count", "s0", "stopped")[-1]
    assert stopped["then"].startswith("cancelled.") and 3 <= stopped["step"] < 240
    assert user.file("count", "s0", "checkpoints", f"step-{stopped['step']:08d}", "state.json").exists()

    # scancel by hand of the one that runs: Slurm's SIGTERM is obeyed in the same way.
    line[0] = "stage=s0,s1"
    user.count(*line)
    job = user.job("count", "s0")
    user.wait(lambda: user.steps("count", "s0") > stopped["step"] + 3)
    user.cluster.run("scancel", job)
    user.wait_gone(job, user.job("count", "s1"), seconds=30)
    again = user.rows("count", "s0", "stopped")[-1]
    assert again["job"] == job and stopped["step"] < again["step"] < 240 and "cancelled" in again["then"]
    assert not user.rows("count", "s1", "start")
    told = user.type("status", "name=count").stdout
    assert f"the same line continues after step {again['step']}" in told, told

    user.count(*line)
    told = user.type("logs", "stage=s0", "follow=true", "name=count", seconds=PATIENCE_SECONDS).stdout
    begun = [0, stopped["step"], again["step"]]
    assert re.findall(r"s0 begins after step (\d+)", told) == [str(step) for step in begun], told
    assert "s0 step 240/240" in told and told.count("--- job ") == 3
    assert user.file("count", "s0", "out", "model", "total.txt").read_text() == str(240 * 241 // 2)
