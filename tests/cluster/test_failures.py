"""What fails on a real Slurm is told in words with its first cause, takes its dependents along, and can be mended."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import needs_root, running_cluster
from tests.cluster.counted import ALONE, CHAIN, count_alone, log_of, order, told_of, total
from tests.cluster.user import User, training_words


def wait_dead(user: User, name: str, *stages: str) -> None:
    """Return when no job of the stages is in the queue; every one was started at most once."""
    jobs = [user.job(name, stage) for stage in stages]
    user.wait_gone(*jobs)
    for stage, job in zip(stages, jobs, strict=True):
        assert user.cluster.job(job)["Restarts"] == "0", stage
        assert not user.file(name, stage, "DONE.json").exists(), stage
        starts = [row for row in user.rows(name, stage, "start") if row["job"] == job]
        assert len(starts) <= (1 if stage == stages[0] else 0), starts
    for job in jobs[1:]:
        assert user.cluster.state(job) == "CANCELLED"


@pytest.mark.slow
def test_exception_and_killed_rank(user: User) -> None:
    """An exception, then a rank that the kernel kills: first cause, dependents, and the same line twice more."""
    order(user, "count", stage="s0", rank=3, step=6, how="raise")
    user.count(*CHAIN, ranks_per_node=2)
    wait_dead(user, "count", "s0", "s1")
    failed = user.failed("count", "s0")
    assert (failed["rank"], failed["host"]) == (3, "node2"), failed
    assert failed["step"] in (5, 6), "rank 0 is at most one step ahead"
    assert failed["error"] == "the loss is not finite\nat row 7"
    assert 'raise ValueError("the loss is not finite' in Path(failed["log"]).read_text()
    words = f"dead: s0 failed at step {failed['step']}: rank 3 on node2: the loss is not finite (log {failed['log']})"
    assert [words in told_of(user, "count", stage) for stage in ("s0", "s1")] == [True, True]
    told = user.count("stage=s1", *CHAIN[1:], ranks_per_node=2, status=2)
    assert "Type stage=s0,s1" in told.stderr and not user.cluster.squeue()

    order(user, "count", stage="s1", rank=2, step=7, how="kill")
    user.count(*CHAIN, ranks_per_node=2)
    wait_dead(user, "count", "s1")
    assert "s0 begins after step 4" in log_of(user, "count", "s0")
    assert total(user, "count", "s0") == sum(range(13))
    failed = user.failed("count", "s1")
    assert (failed["rank"], failed["host"]) == (2, "node2"), failed
    assert failed["error"] == "ended by SIGKILL (the kernel does that when memory runs out)"
    assert Path(failed["log"]) == user.file("count", "s1", "log", "rank2.log")
    words = f"dead: s1 failed at step {failed['step']}: rank 2 on node2: ended by SIGKILL"
    assert words in told_of(user, "count", "s1")
    batch = user.file("count", "s1", "log", "slurm", f"{user.job('count', 's1')}_0_log.err").read_text()
    assert "srun: error: node2: task 2: Killed" in batch and "losed by peer" not in failed["error"]

    user.count(*CHAIN, ranks_per_node=2)
    user.wait_done("count", "s0", "s1")
    assert "s1 begins after step 4" in log_of(user, "count", "s1")
    assert total(user, "count", "s1") == sum(range(13))
    assert len(user.rows("count", "s0", "submit")) == 2, "what is done was submitted again"


@pytest.mark.slow
def test_what_is_gone_before_the_job_starts(user: User) -> None:
    """Data, an input, a module and Python are missing when four jobs start: each says so, and is mended."""
    user.make_data()
    held = "cluster.sbatch_options=[--hold]"
    count_alone(user, "input", "stage=s0")
    user.wait_done("input", "s0")
    count_alone(user, "input", "stage=s1", held)
    count_alone(user, "setup", "stage=s0,s1", "cluster.setup=[echo welcome, module load cuda/99, echo never]")
    count_alone(user, "python", "stage=s0,s1", "cluster.python=/nonexistent/python")
    real = [*training_words(2), *ALONE[1:], "name=data", "stage=s0"]
    user.type(*real, held)
    done = user.file("input", "s0", "DONE.json")
    done.rename(done.with_name("kept.json"))
    (user.folder / "data").rename(user.folder / "scratch")
    user.cluster.run("scontrol", "release", user.job("input", "s1"), user.job("data", "s0"))
    wait_dead(user, "setup", "s0", "s1")
    wait_dead(user, "python", "s0", "s1")
    wait_dead(user, "input", "s1")
    wait_dead(user, "data", "s0")
    setup = "dead: s0 failed: rank 0 on node1: a line of cluster.setup failed with exit code 127: module load cuda/99"
    assert [setup in told_of(user, "setup", stage) for stage in ("s0", "s1")] == [True, True]
    assert "module: command not found" in user.type("logs", "name=setup").stdout
    assert "No such file or directory" in told_of(user, "python", "s0")
    assert "execve(): /nonexistent/python" in user.type("logs", "name=python").stdout
    assert "dead: s0 failed: rank 0 on " in told_of(user, "data", "s0")
    assert "data.dir is data, which is not a folder" in told_of(user, "data", "s0")
    missing = f"s1 needs s0, but {done} is missing or does not count. Type: python -m tdro_hpc.submit stage=s0,s1"
    assert missing in user.failed("input", "s1")["error"] and missing in told_of(user, "input", "s1")
    log = log_of(user, "input", "s1")
    assert "s1 begins" not in log and not user.rows("input", "s1", "start"), "it began before it looked"

    done.with_name("kept.json").rename(done)
    (user.folder / "scratch").rename(user.folder / "data")
    count_alone(user, "input", "stage=s1")
    count_alone(user, "python", "stage=s0")
    user.type(*real)
    user.wait_done("input", "s1")
    user.wait_done("python", "s0")
    user.wait_done("data", "s0")


@pytest.mark.slow
def test_a_loss_that_is_not_a_number(user: User) -> None:
    """Real training with a learning rate that breaks the weights: step and task are named, the checkpoint is kept."""
    user.make_data()
    line = [word for word in training_words(6) if word not in ("s0.warmup_steps=1", "s0.save_every_steps=500")]
    line += ["stage=s1", "name=nan", "s0.warmup_steps=0", "s0.save_every_steps=1", "cluster.nodes=1"]
    breaks = "s0.learning_rate=1e38"
    user.type(*line, breaks)
    wait_dead(user, "nan", "s0", "s1")
    failed = user.failed("nan", "s0")
    assert "is not finite at step" in failed["error"] and "Another rank" not in failed["error"], failed
    assert "The last good checkpoint is kept" in failed["error"] and "learning rate" in failed["error"]
    assert "task " in failed["error"]
    words = f"rank {failed['rank']} on {failed['host']}: {failed['error'].splitlines()[0]}"
    assert [words in told_of(user, "nan", stage) for stage in ("s0", "s1")] == [True, True]
    kept = max(user.file("nan", "s0", "checkpoints").iterdir()).name
    assert kept == f"step-{failed['step']:08d}"
    told = user.type(*line, breaks, status=2).stderr
    assert "It is not tried again unasked" in told and not user.cluster.squeue()
    told = user.type(*line, "force=s0", "s0.learning_rate=1e-4", "dry_run=true").stdout
    assert "made again: forced" in told


@pytest.fixture
def small_disk() -> Iterator[User]:
    """A person whose home is a disk of 24 MB, on a cluster of one node that sees it."""
    folder = Path(tempfile.mkdtemp(prefix="tdro-disk-", dir="/var/tmp"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m,mode=755", "tmpfs", str(folder)], check=True)
    try:
        with running_cluster(nodes=1) as cluster:
            yield User(cluster, folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        shutil.rmtree(folder, ignore_errors=True)


@needs_root
@pytest.mark.slow
def test_disk_full(small_disk: User) -> None:
    """Somebody else fills the disk at step 6: the cause is told, and the same line goes on when there is room."""
    user = small_disk
    order(user, "full", stage="s0", rank=0, step=6, how="fill")
    count_alone(user, "full", "stage=s0,s1")
    wait_dead(user, "full", "s0", "s1")
    told = told_of(user, "full", "s0"), told_of(user, "full", "s1")
    assert all("No space left on device" in line and str(user.file("full", "s0")) in line for line in told), told
    assert json.loads(user.file("full", "s0", "checkpoints", "step-00000004", "state.json").read_text())["total"] == 10

    user.file("full", "of-somebody-else.bin").unlink()
    count_alone(user, "full", "stage=s0,s1")
    user.wait_done("full", "s0", "s1")
    assert "s0 begins after step 4" in log_of(user, "full", "s0")
    assert total(user, "full", "s0") == total(user, "full", "s1") == sum(range(13))
