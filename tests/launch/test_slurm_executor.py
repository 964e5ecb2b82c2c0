"""What is handed to sbatch, what is left on disk, and what a person reads when it is refused. sbatch is a stand-in."""

import dataclasses
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tdro_hpc.config.schema import ClusterConfig, Config
from tdro_hpc.launch.slurm import executor as slurm_executor
from tdro_hpc.launch.slurm.executor import FailedSubmission, cancel_jobs, hint_for, run_submitted, submit_job
from tdro_hpc.launch.slurm.sbatch import sbatch_script
from tdro_hpc.launch.stage import Stage

STAGE = Stage("s1", "s1", (), (), ())
CONFIG = Config(name="demo", cluster=ClusterConfig(executor="slurm", nodes=2, ranks_per_node=2, partition="main"))


@dataclasses.dataclass(frozen=True)
class Work:
    """What a rank calls: a folder and a kind."""

    folder: Path
    kind: str

    def __call__(self) -> str:
        (self.folder / "ran").write_text(self.kind)
        return "done"


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    """Programs first on PATH that note what they were called with in <folder>/<name>.calls."""
    (folder / "bin").mkdir()
    for name, body in programs.items():
        path = folder / "bin" / name
        path.write_text(f'#!/bin/bash\necho "$*" >> {folder}/{name}.calls\n{body}\n')
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")


def submit(tmp_path: Path, **changes: object) -> str:
    given: dict = {"code": tmp_path / "code", "after": [], "link_before": "", "link": 1} | changes
    return submit_job(CONFIG, STAGE, tmp_path / "run" / "s1", ranks=4, job_of=Work, **given)


@pytest.mark.parametrize("answer", ["Submitted batch job 812", "Submitted batch job 812 on cluster west"])
def test_a_submission_gives_the_id_and_leaves_script_and_pickle(answer, tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, sbatch=f'cp "${{@: -1}}" {tmp_path}/got; echo {answer}')
    assert submit(tmp_path, after=["7", "9"]) == "812"
    stage_dir = tmp_path / "run" / "s1"
    folder = stage_dir / "log" / "slurm"
    (call,) = (tmp_path / "sbatch.calls").read_text().splitlines()
    assert call.startswith(f"--dependency=afterok:7:9 --kill-on-invalid-dep=yes {folder}/")
    script = sbatch_script(CONFIG, STAGE, stage_dir, ranks=4, code=tmp_path / "code")
    assert (tmp_path / "got").read_text() == (stage_dir / "job.sbatch").read_text() == script
    assert (folder / "812_submission.sh").read_text() == script
    pickled = pickle.loads((folder / "812_submitted.pkl").read_bytes())
    assert vars(pickled.function) == {"folder": stage_dir, "kind": "s1"}, "a path and a kind, nothing else"


def test_links_wait_for_any_end_and_keep_the_script_of_the_first(tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, sbatch="echo Submitted batch job 813")
    submit(tmp_path)
    submit(tmp_path, after=["811"], link_before="812", link=2)
    assert "--dependency=afterok:811,afterany:812" in (tmp_path / "sbatch.calls").read_text().splitlines()[1]
    assert "--job-name=tdro-demo-s1\n" in (tmp_path / "run/s1/job.sbatch").read_text()


def test_variables_of_the_job_that_submit_is_typed_in_are_not_handed_on(tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, sbatch=f"env > {tmp_path}/seen; echo Submitted batch job 5")
    for name, value in (("SLURM_DISTRIBUTION", "cyclic"), ("SLURM_MEM_PER_CPU", "100"), ("SLURM_CONF", "/etc/s.conf")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SBATCH_RESERVATION", "course")
    submit(tmp_path)
    seen = [line.split("=")[0] for line in (tmp_path / "seen").read_text().splitlines()]
    assert {"SLURM_CONF", "SBATCH_RESERVATION"} <= set(seen)
    assert not {"SLURM_DISTRIBUTION", "SLURM_MEM_PER_CPU"} & set(seen)


def test_a_refusal_is_said_in_the_words_of_sbatch_with_the_command_and_the_key(tmp_path, monkeypatch, capsys):
    words = "sbatch: error: Batch job submission failed: Invalid partition name specified"
    stand_in(tmp_path, monkeypatch, sbatch=f"echo '{words}' >&2; exit 1")
    with pytest.raises(FailedSubmission) as refused:
        submit(tmp_path, after=["7"])
    script = tmp_path / "run" / "s1" / "job.sbatch"
    assert refused.value.words == words
    assert refused.value.command == f"sbatch --dependency=afterok:7 --kill-on-invalid-dep=yes {script}"
    assert str(refused.value).splitlines() == [
        "s1 was not submitted.",
        words,
        "Change cluster.partition (see: sinfo -s).",
        f"The command was: {refused.value.command}",
    ]
    assert list((tmp_path / "run" / "s1" / "log" / "slurm").iterdir()) == [], "nothing of a job that is not there"
    assert capsys.readouterr() == ("", ""), "said once, by whom it concerns"


def test_an_answer_that_names_no_job_is_shown_as_it_is(tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, sbatch="echo 'Have a nice day'")
    with pytest.raises(FailedSubmission) as refused:
        submit(tmp_path)
    assert refused.value.words == "Have a nice day"


def test_without_slurm_a_submission_says_where_to_go(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FailedSubmission, match="not installed here\nType the line on a login node.*cluster=local"):
        submit(tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("Batch job submission failed: Invalid partition name specified", "cluster.partition"),
        ("User's group not permitted to use this partition", "cluster.partition"),
        ("Invalid account or account/partition combination specified", "cluster.account"),
        ("Invalid qos specification", "cluster.qos"),
        ("Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)", "cluster.qos"),
        ("Requested time limit is invalid (missing or exceeds some limit)", "cluster.time_limit"),
        ("Requested node configuration is not available", "cluster.gpus_per_node"),
        ("Memory specification can not be satisfied", "cluster.node_memory_gb"),
        ("Node count specification invalid", "cluster.nodes"),
        ("Invalid generic resource (gres) specification", "cluster.gpu_type"),
        ("Invalid feature specification", "cluster.constraint"),
        ("Invalid node name specified", "cluster.exclude"),
        ("sbatch: unrecognized option '--foo=3'", "cluster.sbatch_options"),
        ("Unable to contact slurm controller (connect failure)", "controller does not answer"),
        ("something in progress", None),
    ],
)
def test_known_refusals_name_the_key_to_change(words, key):
    assert (hint_for(words) == "") if key is None else (key in hint_for(words))


def test_a_check_asks_sbatch_and_writes_nothing(tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, sbatch='cat "${@: -1}"; echo later >&2; exit 1')
    stage_dir = tmp_path / "run" / "s1"
    outcome = slurm_executor.test_submission(CONFIG, STAGE, stage_dir, ranks=4, code=None)
    assert (outcome.code, outcome.err.strip()) == (1, "later")
    assert outcome.out == sbatch_script(CONFIG, STAGE, stage_dir, ranks=4, code=None)
    assert (tmp_path / "sbatch.calls").read_text().startswith("--test-only ") and not (tmp_path / "run").exists()


def test_cancelling_names_all_jobs_in_one_call(tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, scancel="")
    assert cancel_jobs([]).code == 0 and not (tmp_path / "scancel.calls").exists()
    assert cancel_jobs(["9", "8"]).code == cancel_jobs(["8"], signal="USR2").code == 0
    assert (tmp_path / "scancel.calls").read_text().splitlines() == ["9 8", "--signal=USR2 8"]


@pytest.fixture
def rank_of_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Path]]:
    """Submits a stage as job 812 and makes this process its only rank."""
    numbers = (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}  # submitit puts its own in their place

    def submitted() -> Path:
        stand_in(tmp_path, monkeypatch, sbatch="echo Submitted batch job 812")
        submit(tmp_path)
        for name, value in (("SLURM_JOB_ID", "812"), ("SUBMITIT_EXECUTOR", "slurm"), ("SUBMITIT_FOLDER", "")):
            monkeypatch.setenv(name, value)
        return tmp_path / "run" / "s1"

    yield submitted
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_rank_runs_what_was_submitted(rank_of_job, monkeypatch):
    stage_dir = rank_of_job()
    monkeypatch.setattr("sys.argv", ["job.py", str(stage_dir / "log" / "slurm")])
    run_submitted(stage_dir / "log" / "slurm")
    assert (stage_dir / "ran").read_text() == "s1"


def test_a_script_that_a_person_gave_to_sbatch_runs_the_stage_by_its_folder(rank_of_job, monkeypatch):
    stage_dir = rank_of_job()
    monkeypatch.setenv("SLURM_JOB_ID", "813")  # of which submitit knows nothing
    monkeypatch.setattr(slurm_executor, "_PICKLE_SECONDS", 0.1)
    monkeypatch.setattr("sys.argv", ["job.py", str(stage_dir / "log" / "slurm")])
    ran: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(
        slurm_executor.runpy, "run_module", lambda name, **_: ran.append((name, slurm_executor.sys.argv))
    )
    run_submitted(stage_dir / "log" / "slurm")
    assert ran == [("tdro_hpc.run", ["tdro_hpc.run", str(stage_dir)])] and not (stage_dir / "ran").exists()
