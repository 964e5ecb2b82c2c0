"""A chain of jobs that wait for each other: it makes what one machine makes, stops where it fails, and is mended."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.cluster.user import User, training_words

CHAIN = ["s0", "s1", "s2-curr", "eval"]
# One rank, which imports torch only once: for chains of which only the order counts.
SMALL = ["cluster.nodes=1", "s0.save_every_steps=100"]


def on_this_machine(words: list[str]) -> list[str]:
    """The same keys for four processes of this machine."""
    others = [word for word in words if word not in ("cluster=testcluster", "name=slurm")]
    return ["cluster=local", "cluster.ranks_per_node=4", "name=local", *others]


def tensors(stage_dir: Path) -> dict[str, bytes]:
    """Bytes of every tensor below out/, by file and name."""
    files = sorted((stage_dir / "out").rglob("*.safetensors"))
    found = {(file.name, name): tensor for file in files for name, tensor in load_file(file).items()}
    return {f"{file} {name}": tensor.numpy().tobytes() for (file, name), tensor in found.items()}


def texts(stage_dir: Path, pattern: str) -> dict[str, str]:
    """Text of the files below out/ that fit a pattern, by path."""
    out = stage_dir / "out"
    return {str(path.relative_to(out)): path.read_text() for path in sorted(out.rglob(pattern))}


def finished(user: User, run: str, stage: str) -> float:
    """Time at which DONE.json was written."""
    return float(json.loads(user.file(run, stage, "DONE.json").read_text())["finished"])


def refuses_a_second_copy(user: User, line: list[str]) -> None:
    """The same line again submits nothing while its chain is in the queue."""
    before = user.cluster.squeue()
    told = user.type(*line).stdout
    assert "Nothing to submit" in told and set(user.cluster.squeue()) <= set(before), told


@pytest.mark.slow
def test_a_chain_of_jobs_makes_what_one_machine_makes(user: User) -> None:
    user.make_data()
    line = [*training_words(), "stage=all", "name=slurm"]
    told = user.type(*line).stdout
    jobs = [user.job("slurm", stage) for stage in CHAIN]
    assert set(user.cluster.squeue()) == set(jobs)
    assert [user.rows("slurm", stage, "submit")[0]["after"] for stage in CHAIN[:3]] == [[], jobs[:1], jobs[1:2]]
    assert f"after {jobs[1]}" in told
    refuses_a_second_copy(user, line)
    user.wait(lambda: user.cluster.state(jobs[0]) == "RUNNING")
    refuses_a_second_copy(user, line)

    user.type(*on_this_machine(line), seconds=400)
    user.wait_done("slurm", *CHAIN)
    user.wait_gone(*jobs)
    assert "Nothing to do: all stages are done." in user.type(*line).stdout
    assert not user.cluster.squeue()

    slurm, local = user.file("slurm"), user.file("local")
    for stage in ("s0", "s1", "s2-curr"):
        assert tensors(slurm / stage) and tensors(slurm / stage) == tensors(local / stage), stage
    weights = texts(slurm / "s1", "weights/*.json")
    assert weights and weights == texts(local / "s1", "weights/*.json")
    scores = texts(slurm / "eval", "scores/scores.json")
    assert scores and scores == texts(local / "eval", "scores/scores.json")
    for stage in CHAIN:
        done, beside = (json.loads((run / stage / "DONE.json").read_text()) for run in (slurm, local))
        assert done["keys"] == beside["keys"] and done["ranks"] == 4
        snapshot = Path(user.rows("slurm", stage, "submit")[0]["code"])
        assert snapshot == slurm / "code" / done["code"] and (snapshot / "tdro_hpc" / "run.py").is_file()


@pytest.mark.slow
def test_a_failure_stops_what_waits_and_the_same_line_mends_it(user: User) -> None:
    stages = ["s0", "s1", "s2-curr"]
    line = ["stage=s0,s1,s2", "s0.steps=4", *SMALL]
    user.file("count").mkdir(parents=True)
    user.file("count", "orders.json").write_text('{"stage": "s1", "rank": 0, "step": 2, "how": "raise"}')
    user.count(*line)
    jobs = {stage: user.job("count", stage) for stage in stages}
    user.wait(user.file("count", "s1", "FAILED.json").exists)
    user.wait_gone(*jobs.values(), seconds=20)
    assert user.failed("count", "s1")["error"] == "the loss is not finite\nat row 7"
    assert user.rows("count", "s1", "end")[-1]["exit_codes"] == [1]
    assert not user.rows("count", "s2-curr", "start")
    told = user.type("status", "name=count").stdout
    dead = "dead: s1 failed at step 1: rank 0 on "
    assert told.count(dead) == 2 and told.count("the loss is not finite") == 2, told
    assert [told.splitlines()[row].split()[:2] for row in (3, 4)] == [["s1", "failed"], ["s2-curr", "dead"]], told
    assert "To continue type: " in told

    first = finished(user, "count", "s0")
    user.count(*line)
    user.wait_done("count", *stages)
    assert finished(user, "count", "s0") == first and len(user.rows("count", "s1", "submit")) == 2
    user.wait_gone(*(user.job("count", stage) for stage in stages))

    # An output that is lost is made again, with what was made from it.
    user.file("count", "s1", "out", "model", "total.txt").unlink()
    assert "out/model/total.txt is missing" in user.type("status", "name=count").stdout
    told = user.count(*line).stdout
    assert "s1 will be another" in told and len(user.cluster.squeue()) == 2, told
    assert not user.file("count", "s2-curr", "DONE.json").exists(), "a result of something older counts no more"
    user.wait_done("count", *stages)
    assert user.file("count", "s1", "out", "model", "total.txt").read_text() == "10"
    assert finished(user, "count", "s0") == first
    assert [len(user.rows("count", stage, "start")) for stage in stages] == [1, 3, 2]
    assert "Nothing to do" in user.count(*line).stdout
