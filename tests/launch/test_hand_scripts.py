"""slurm/chain.sh and slurm/stage.sbatch, as a person calls them. sbatch, scancel, srun and python are stand-ins."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHAIN, STAGE = "slurm/chain.sh", "slurm/stage.sbatch"
# Answers 101, 102 ... with the name of a cluster behind some; refuses the stage s2.
SBATCH = """\
case " $* " in *" s2 "*) echo "sbatch: error: Invalid qos specification" >&2; exit 1 ;; esac
number=$((100 + $(wc -l < CALLS)))
echo "$number;west"
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what sbatch and the others were called with, one file a program."""
    programs = tmp_path / "bin"
    programs.mkdir()
    python = f'if [ "$1" = - ]; then exec {sys.executable} "$@"; fi\nexit ${{AFTERMATH_CODE:-7}}'
    for name, body in (("sbatch", SBATCH), ("scancel", ""), ("srun", "exit ${SRUN_CODE:-0}"), ("python", python)):
        log = tmp_path / name
        text = f'#!/bin/bash\nprintf "%s\\n" "$*" >> {log}\n{body}\n'.replace("CALLS", str(log))
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return tmp_path


def run(*words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | variables
    return subprocess.run(["bash", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_each_stage_waits_for_the_one_before_it(calls):
    done = run(CHAIN, "s0", "config=demo", "s1", "name=mine", "eval")
    assert done.returncode == 0 and done.stderr == ""
    script, keys, kill = "slurm/stage.sbatch", "config=demo name=mine", "--kill-on-invalid-dep=yes"
    assert lines_of(calls / "sbatch") == [
        f"--parsable --job-name=tdro-mine-s0 {script} s0 {keys}",
        f"--parsable --job-name=tdro-mine-s1 --dependency=afterok:101 {kill} {script} s1 {keys}",
        f"--parsable --job-name=tdro-mine-eval --dependency=afterok:102 {kill} {script} eval {keys}",
    ]
    said = done.stdout.splitlines()
    assert said[:3] == ["s0  job 101", "s1  job 102  after 101", "eval  job 103  after 102"]
    assert "look    squeue --jobs=101,102,103" in said and "cancel  scancel 101 102 103" in said


def test_options_behind_two_dashes_go_to_sbatch(calls):
    assert run(CHAIN, "s0", "x.y=a b", "--", "--partition=main", "--nodes=2").returncode == 0
    expected = "--parsable --job-name=tdro-default-s0 --partition=main --nodes=2 slurm/stage.sbatch s0 x.y=a b"
    assert lines_of(calls / "sbatch") == [expected]


def test_the_name_of_the_run_may_come_from_a_file(calls):
    done = run(CHAIN, "s0", "config=demo")
    assert done.returncode == 0 and "status name=demo\n" in done.stdout, done.stderr
    assert "--job-name=tdro-demo-s0 " in lines_of(calls / "sbatch")[0]
    refused = run(CHAIN, "s0", "config=demo", "s0.step=3")
    assert refused.returncode == 2 and "s0.steps" in refused.stderr and len(lines_of(calls / "sbatch")) == 1


def test_a_refused_stage_takes_the_jobs_before_it_back(calls):
    refused = run(CHAIN, "s0", "s1", "s2", "eval", "name=mine")
    assert refused.returncode == 2
    assert len(lines_of(calls / "sbatch")) == 3 and lines_of(calls / "scancel") == ["101 102"]
    assert "sbatch: error: Invalid qos specification" in refused.stderr
    command = "sbatch --parsable --job-name=tdro-mine-s2 --dependency=afterok:102 --kill-on-invalid-dep=yes"
    assert f" {command} slurm/stage.sbatch s2 name=mine\n" in refused.stderr
    assert "The jobs before it are cancelled: 101 102" in refused.stderr


def test_nothing_is_cancelled_when_the_first_is_refused(calls):
    assert run(CHAIN, "s2", "eval").returncode == 2
    assert lines_of(calls / "scancel") == []


@pytest.mark.parametrize("words", [(), ("config=demo",), ("--", "--nodes=2")])
def test_a_chain_without_stages_shows_how_it_is_called(words, calls):
    shown = run(CHAIN, *words)
    assert shown.returncode == 2 and shown.stderr.startswith("usage: slurm/chain.sh <stage> ...")
    assert lines_of(calls / "sbatch") == []


def test_an_option_in_the_wrong_place_is_refused(calls):
    refused = run(CHAIN, "s0", "--nodes=2")
    assert refused.returncode == 2 and "slurm/chain.sh s0 s1 -- --nodes=2" in refused.stderr
    assert lines_of(calls / "sbatch") == []


JOB = {"SLURM_JOB_ID": "5", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "8", "SLURM_GPUS_ON_NODE": "4"}


def test_a_stage_runs_under_srun_with_the_machines_of_its_job(calls, tmp_path):
    words = ("s1", "config=demo", "name=mine", f"runs_dir={tmp_path}")
    ended = run(STAGE, *words, **JOB, SRUN_CODE="3", SLURM_CPUS_PER_TASK="6")
    keys = f"config=demo name=mine runs_dir={tmp_path} cluster.executor=slurm cluster.nodes=2"
    keys += " cluster.ranks_per_node=4 cluster.gpus_per_node=4"
    (call,) = lines_of(calls / "srun")
    options = "--kill-on-bad-exit=1 --unbuffered --cpus-per-task=6"
    assert call == f"{options} python -m tdro_hpc.run stage=s1 {keys}"
    assert lines_of(calls / "python")[-1] == f"-m tdro_hpc.launch.job.aftermath {tmp_path}/mine/s1 3 5 0"
    assert ended.returncode == 7, "the code of the aftermath is that of the job"


def test_a_kind_with_several_stages_runs_one_after_the_other(calls, tmp_path):
    words = ("s2", "s2.weights=curr,top70", f"runs_dir={tmp_path}", "name=mine")
    first, second = tmp_path / "mine" / "s2-curr", tmp_path / "mine" / "s2-top70"
    first.mkdir(parents=True)
    # Code 0 without DONE.json: Slurm has taken the job back, and the rest is for its next start.
    assert run(STAGE, *words, **JOB, AFTERMATH_CODE="0").returncode == 0
    assert [call.split("stage=")[1].split()[0] for call in lines_of(calls / "srun")] == ["s2-curr"]
    (first / "DONE.json").touch()
    assert run(STAGE, *words, **JOB, AFTERMATH_CODE="0").returncode == 0
    assert [call.split("stage=")[1].split()[0] for call in lines_of(calls / "srun")[1:]] == ["s2-curr", "s2-top70"]
    assert lines_of(calls / "python")[-1] == f"-m tdro_hpc.launch.job.aftermath {second} 0 5 0"


def test_a_stage_of_one_process_runs_on_one_node(calls, tmp_path):
    run(STAGE, "prepare", "config=demo", f"runs_dir={tmp_path}", **JOB)
    (call,) = lines_of(calls / "srun")
    assert " --nodes=1 --ntasks=1 python -m tdro_hpc.run stage=prepare " in call


def test_an_unknown_stage_names_those_there_are(calls):
    ended = run(STAGE, "s9", **JOB)
    assert ended.returncode == 2 and ended.stderr == "There is no stage s9; there are s0, s1, s2-curr, eval, export.\n"


def test_what_a_person_typed_of_the_machines_wins(calls, tmp_path):
    run(STAGE, "s1", f"runs_dir={tmp_path}", "cluster.nodes=1", **(JOB | {"SLURM_GPUS_ON_NODE": ""}))
    (call,) = lines_of(calls / "srun")
    assert call.count("cluster.nodes=") == 1 and "cluster.nodes=1 " in call and call.endswith("cluster.gpus_per_node=0")
    assert "--cpus-per-task" not in call


def test_a_mistake_in_a_key_is_said_before_the_ranks_start(calls):
    ended = run(STAGE, "s1", "s1.stepz=3", **JOB)
    assert ended.returncode == 2 and "s1.steps" in ended.stderr and lines_of(calls / "srun") == []


@pytest.mark.parametrize(("words", "variables"), [((), JOB), (("config=demo",), JOB), (("s1",), {})])
def test_a_call_that_is_no_job_of_a_stage_shows_how_it_is_called(words, variables, calls):
    shown = run(STAGE, *words, **variables)
    assert shown.returncode == 2 and shown.stderr.startswith("usage: sbatch slurm/stage.sbatch <stage>")
    assert lines_of(calls / "srun") == []
