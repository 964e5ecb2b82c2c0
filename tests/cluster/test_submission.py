"""Submissions to a real Slurm: what it refuses, what it would do, what it holds, and whose jobs are whose."""

import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import running_cluster
from tests.cluster.user import User, training_words

NOBODY = 65534
HELD = "cluster.sbatch_options=[--hold]"  # the jobs wait in the queue, and nothing has to run
ALL = ["s0", "s1", "s2-curr", "eval"]


@pytest.fixture
def nobody(user: User) -> Iterator[User]:
    """Another person on the same cluster, with a Python that may lie where only root can look."""
    home, programs = (Path(tempfile.mkdtemp(prefix=f"tdro-{name}-", dir="/var/tmp")) for name in ("nobody", "python"))
    shutil.chown(home, NOBODY, NOBODY)
    programs.chmod(0o755)
    try:
        python = python_for_all(programs)
        yield User(user.cluster, home, uid=NOBODY, python=python, packages=sysconfig.get_path("purelib"))
    finally:
        user.cancel_everything()
        shutil.rmtree(home, ignore_errors=True)
        shutil.rmtree(programs, ignore_errors=True)


def python_for_all(folder: Path) -> str:
    """This Python if everybody can call it, else a copy of its installation in the folder, without packages."""
    own = Path(sys.executable).resolve()
    if all(path.stat().st_mode & 0o001 for path in (own, *own.parents)):
        return sys.executable
    base = Path(sys.base_prefix)
    left_out = shutil.ignore_patterns("site-packages", "test", "__pycache__", "share", "*.a")
    shutil.copytree(base, folder / "python", ignore=left_out, symlinks=True)
    return str(folder / "python" / own.relative_to(base.resolve()))


def is_refused(user: User, *words: str) -> str:
    """What a line says that leaves with exit code 2, no job in the queue, and no trace of one in the run."""
    told = user.count("stage=all", *words, status=2).stderr
    assert not user.cluster.squeue(), told
    assert not [row for stage in ALL for row in user.rows("count", stage) if row["event"] == "start"]
    return told


@pytest.mark.slow
def test_what_slurm_refuses_is_told_in_its_words_and_leaves_nothing(user: User) -> None:
    told = is_refused(user, "cluster.partition=nope")
    assert "invalid partition specified: nope" in told and "Change cluster.partition" in told, told
    assert "s0 was not submitted." in told and "The command was: sbatch " in told, told
    told = is_refused(user, "cluster.gpus_per_node=9")
    assert "Requested node configuration is not available" in told and "cluster.gpus_per_node" in told, told

    user.make_data()
    told = user.type(*training_words(), "stage=s0,s1", "check=true").stdout
    assert len(re.findall(r"^s[01] +Job \d+ to start at \d{4}-\d\d-\d\dT", told, re.MULTILINE)) == 2, told
    words = [*training_words(), "stage=s0", "check=true", "cluster.partition=nope"]
    told = user.type(*words, status=2).stdout
    assert re.search(
        r"^s0 +refused: .*invalid partition specified: nope.* Change cluster.partition", told, re.MULTILINE
    )
    assert not user.cluster.squeue() and not user.file("default", "s0").exists()


@pytest.mark.slow
def test_jobs_in_the_queue_are_as_they_were_printed_and_can_be_taken_back(user: User) -> None:
    line = ["stage=s0,s1,s2", HELD]
    printed = user.count(*line, "dry_run=true").stdout
    assert not user.cluster.squeue() and not user.file("count").exists()
    user.count(*line)
    jobs = {stage: user.job("count", stage) for stage in ALL[:3]}
    for stage, job in jobs.items():
        script = user.file("count", stage, "job.sbatch").read_text()
        assert f"\n{script.strip()}\n" in printed
        assert user.cluster.run("scontrol", "write", "batch_script", job, "-").stdout.rstrip("\n") == script.rstrip(
            "\n"
        )
    assert "queued: JobHeldUser" in user.type("status", "name=count").stdout
    assert f"s0 is queued (job {jobs['s0']})" in user.count(*line).stdout

    # One in the middle is taken away by hand: what waits for it goes too, and the same line puts both back.
    user.cluster.run("scancel", jobs["s1"])
    # Slurm looks at what held jobs wait for once a minute only.
    user.cluster.run("scontrol", "release", jobs["s2-curr"])
    user.wait(lambda: set(user.cluster.squeue()) == {jobs["s0"]})
    told = user.type("status", "name=count").stdout
    assert f"job {jobs['s1']} left the queue before it began" in told, told
    user.count(*line)
    assert len(user.cluster.squeue()) == 3 and user.job("count", "s0") == jobs["s0"]
    assert user.rows("count", "s1", "submit")[-1]["after"] == [jobs["s0"]]

    told = user.type("cancel", "name=count").stdout
    assert re.findall(r"^(\S+): took job", told, re.MULTILINE) == ["s2-curr", "s1", "s0"], told
    assert not user.cluster.squeue()
    assert user.type("status", "name=count").stdout.count("cancelled by submit cancel before it began") == 3


@pytest.mark.slow
def test_a_sweep_makes_a_chain_for_each_value(user: User) -> None:
    told = user.count("stage=s0,s1", "s0.learning_rate=0.01,0.02", HELD).stdout
    runs = sorted(path.parent.name for path in user.file().glob("*/plan.json"))
    assert len(runs) == 2 and len(user.cluster.squeue()) == 4, told
    for run, value in zip(runs, ("0.01", "0.02"), strict=True):
        assert run.endswith(value) and f"learning_rate: {value}" in user.file(run, "s0", "config.yaml").read_text()
        assert user.rows(run, "s1", "submit")[0]["after"] == [user.job(run, "s0")]
    user.type("cancel", f"name={runs[0]}")
    assert set(user.cluster.squeue()) == {user.job(runs[1], "s0"), user.job(runs[1], "s1")}


@pytest.mark.slow
def test_two_people_have_runs_of_their_own(user: User, nobody: User) -> None:
    small = ["cluster.nodes=1", "s0.steps=2"]
    user.count("stage=s0,s1", HELD)
    own = {user.job("count", "s0"), user.job("count", "s1")}
    nobody.count("stage=s0", *small)
    job = nobody.job("count", "s0")
    assert job not in user.type("status").stdout and not own & set(nobody.type("status").stdout.split())
    nobody.wait_done("count", "s0")
    nobody.wait_gone(job)
    paths = [*nobody.folder.rglob("*")]
    assert {path.lstat().st_uid for path in paths} == {NOBODY} and len(paths) > 10
    nobody.count("stage=s1", HELD, *small)
    told = user.type("cancel", "name=count").stdout
    assert told.count("took job") == 2 and set(user.cluster.squeue()) == {nobody.job("count", "s1")}
    user.count("stage=s0", HELD)
    nobody.type("cancel", "name=count")
    assert set(user.cluster.squeue()) == {user.job("count", "s0")}


@pytest.mark.slow
def test_limits_and_ends_that_only_the_accounting_knows() -> None:
    folder = Path(tempfile.mkdtemp(prefix="tdro-user-", dir="/var/tmp"))
    folder.chmod(0o755)
    try:
        with running_cluster(nodes=2, accounting=True, enforce=True) as cluster:
            limits_and_ends(User(cluster, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def limits_and_ends(user: User) -> None:
    """The third job is one too many for its account; two jobs end without a word of their own."""
    told = user.count("stage=all", "cluster.account=small", HELD, status=2).stderr
    jobs = [user.job("count", stage) for stage in ALL[:2]]
    assert "s2-curr was not submitted." in told and "Change cluster.qos" in told, told
    assert re.search("policy|limit", told) and f"cancelled again: {', '.join(jobs)}. All is as before." in told, told
    assert not user.cluster.squeue()
    assert {user.cluster.state(job) for job in jobs} == {"CANCELLED"}
    assert not user.file("count", "s0", "job.sbatch").exists()

    # Nothing was written by whoever took it out of the queue: only sacct knows.
    user.count("stage=s0", HELD)
    user.cluster.run("scancel", user.job("count", "s0"))
    words = f"job {user.job('count', 's0')} left the queue before it began: cancelled with scancel"
    user.wait(lambda: words in user.type("status", "name=count").stdout, seconds=30)
