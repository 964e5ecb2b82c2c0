"""The scripts that sbatch gets equal stored ones, can be read by bash, and differ only by what the config says.

TDRO_WRITE_GOLDEN=1 writes the stored ones anew; look at the difference before it is committed.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tdro_hpc.config.derived import ranks_of
from tdro_hpc.config.load import load_config
from tdro_hpc.launch.slurm import sbatch
from tdro_hpc.launch.slurm.sbatch import sbatch_command, sbatch_script, slurm_folder
from tdro_hpc.stages.graph import stage_graph

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
BY_HAND = sorted((ROOT / "slurm").glob("*.sh")) + sorted((ROOT / "slurm").glob("*.sbatch"))
BY_HAND += sorted((ROOT / "slurm" / "env").glob("*.sh"))
HOME = Path("/home/me/tdro")
CASES = {
    "slurm-s0": ("s0", "cluster=slurm"),
    "slurm-s1-code_as_it_is": ("s1", "cluster=slurm", "cluster.snapshot=false", "parallel.threads_per_rank=4"),
    "testcluster-s1": ("s1", "cluster=testcluster"),
    "gpu_type-prepare": ("prepare", "config=demo", "cluster=gpu_type"),
    "gpu_type-s1": ("s1", "cluster=gpu_type", "cluster.nodes=2"),
    "gpu_gres-s2-curr": ("s2-curr", "s2.weights=curr", "cluster=gpu_gres"),
    "conda_modules-s1": ("s1", "cluster=conda_modules"),
    "apptainer-eval": ("eval", "cluster=apptainer"),
    "pyxis-s1": ("s1", "cluster=pyxis"),
    "no_requeue-s1": ("s1", "cluster=no_requeue"),
}


@pytest.fixture(autouse=True)
def somebody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same folder and the same Python on every machine."""
    monkeypatch.setattr(sbatch.os, "getcwd", lambda: str(HOME))
    monkeypatch.setattr(sys, "executable", str(HOME / ".venv/bin/python"))
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "USR1")  # must not reach the script


def script_of(stage: str, *words: str, run_dir: Path = HOME / "runs/demo", link: int = 1) -> str:
    config = load_config([*words, "name=demo"], configs_dirs=[ROOT / "configs"]).config
    node = stage_graph(config)[stage]
    code = run_dir / "code" / "0123456789" if config.cluster.snapshot else None
    ranks = ranks_of(config, node.ranks)
    return sbatch_script(config, node, run_dir / stage, ranks=ranks, code=code, link=link)


def directives_of(*words: str, stage: str = "s1") -> dict[str, str]:
    lines = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script_of(stage, *words), flags=re.MULTILINE)
    assert len(dict(lines)) == len(lines), "a directive stands twice"
    return dict(lines)


@pytest.mark.parametrize("name", CASES)
def test_script_equals_the_stored_one(name):
    stage, *words = CASES[name]
    script, stored = script_of(stage, *words) + "\n", GOLDEN / f"{name}.sbatch"
    if os.environ.get("TDRO_WRITE_GOLDEN"):
        stored.write_text(script, encoding="utf-8")
    assert script == stored.read_text(encoding="utf-8")
    assert script == script_of(stage, *words) + "\n", "the same each time: a dry run shows what is submitted"


def test_every_stored_script_has_its_case():
    assert {path.stem for path in GOLDEN.iterdir()} == set(CASES)


@pytest.mark.parametrize("path", [*sorted(GOLDEN.glob("*.sbatch")), *BY_HAND], ids=lambda path: path.name)
def test_bash_and_shellcheck_find_nothing(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    beside = Path(sys.prefix, "bin", "shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck:
        # SC1091: files of a site that are not here.
        said = subprocess.run([shellcheck, "--exclude=SC1091", str(path)], capture_output=True, text=True)
        assert said.stdout + said.stderr == ""


def test_shares_of_a_node_are_asked_for_and_handed_on_to_srun():
    given = directives_of("cluster=gpu_type")
    assert (given["gpus-per-node"], given["cpus-per-task"], given["mem"]) == ("a100:4", "16", "480G")
    assert (given["nodes"], given["ntasks-per-node"]) == ("1", "4")
    assert " --cpus-per-task=16 " in script_of("s1", "cluster=gpu_type")
    one = directives_of("config=demo", "cluster=gpu_type", "cluster.nodes=2", stage="prepare")
    assert (one["gpus-per-node"], one["cpus-per-task"], one["mem"]) == ("a100:1", "16", "120G")
    assert (one["nodes"], one["ntasks-per-node"]) == ("1", "1")


def test_what_nobody_gave_is_left_to_the_site():
    given = directives_of("cluster=slurm", "cluster.gpus_per_node=0")
    left_out = {"partition", "account", "qos", "constraint", "exclude", "mem", "cpus-per-task", "gpus-per-node", "gres"}
    assert not (left_out | {"mail-user", "mail-type", "wckey"}) & set(given)
    assert "--cpus-per-task" not in script_of("s1", "cluster=slurm")


@pytest.mark.parametrize(
    ("word", "directive"),
    [
        ("cluster.partition=long", ("partition", "long")),
        ("cluster.account=us", ("account", "us")),
        ("cluster.qos=low", ("qos", "low")),
        ("cluster.constraint=a100&nvlink", ("constraint", "'a100&nvlink'")),
        ("cluster.exclude=n[1-2]", ("exclude", "'n[1-2]'")),
        ("cluster.gpu_request=gres", ("gres", "gpu:4")),
        ("cluster.gpu_type=h100", ("gpus-per-node", "h100:4")),
        ("cluster.time_limit=2-01:00:00", ("time", "2-01:00:00")),
        ("cluster.stop_lead_seconds=77", ("signal", "USR2@77")),
        ("cluster.requeue=links", ("no-requeue", "")),
        ("cluster.requeue=self", ("requeue", "")),
        ("cluster.mail_user=a@b.org", ("mail-type", "FAIL,INVALID_DEPEND")),
        ("cluster.sbatch_options=[--exclusive]", ("exclusive", "")),
        ("cluster.sbatch_options=[--licenses=scratch:2]", ("licenses", "scratch:2")),
        # An option of a person takes the place of ours.
        ("cluster.sbatch_options=[--gpus-per-node=2]", ("gpus-per-node", "2")),
        ("cluster.sbatch_options=[--open-mode=truncate]", ("open-mode", "truncate")),
        ("cluster.sbatch_options=[--job-name=mine]", ("job-name", "mine")),
    ],
)
def test_each_key_becomes_its_directive(word, directive):
    name, value = directive
    assert directives_of("cluster=slurm", word)[name] == value


def test_paths_of_a_job_are_absolute_and_its_logs_are_appended_to():
    given = directives_of("cluster=slurm")
    assert given["output"] == f"{HOME}/runs/demo/s1/log/slurm/%j_0_log.out"
    assert given["error"] == f"{HOME}/runs/demo/s1/log/slurm/%j_0_log.err"
    assert (given["open-mode"], given["chdir"], given["job-name"]) == ("append", str(HOME), "tdro-demo-s1")
    script = script_of("s1", "cluster=slurm")
    assert " --open-mode=append " in script and " --kill-on-bad-exit=1 " in script
    with pytest.raises(AssertionError):
        script_of("s1", "cluster=slurm", run_dir=Path("runs/demo"))


def test_links_differ_by_name_only():
    first, third = (script_of("s1", "cluster=no_requeue", link=link) for link in (1, 3))
    assert first.replace("tdro-demo-s1\n", "tdro-demo-s1-3\n") == third != first


def test_a_folder_with_blanks_is_one_word(tmp_path):
    script = script_of("s1", "cluster=slurm", run_dir=tmp_path / "it's my run")
    (line,) = [line for line in script.splitlines() if line.startswith("srun ")]
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True).stdout.split("\n")
    folder = tmp_path / "it's my run"
    assert words[-4:-1] == ["-u", f"{folder}/code/0123456789/job.py", str(slurm_folder(folder / "s1"))]


@pytest.mark.parametrize(
    ("after", "link_before", "expected"),
    [
        ([], "", ["sbatch", "x.sh"]),
        (["7"], "", ["sbatch", "--dependency=afterok:7", "--kill-on-invalid-dep=yes", "x.sh"]),
        (["7", "9"], "", ["sbatch", "--dependency=afterok:7:9", "--kill-on-invalid-dep=yes", "x.sh"]),
        ([], "8", ["sbatch", "--dependency=afterany:8", "--kill-on-invalid-dep=yes", "x.sh"]),
        (["7"], "8", ["sbatch", "--dependency=afterok:7,afterany:8", "--kill-on-invalid-dep=yes", "x.sh"]),
    ],
)
def test_the_dependency_stands_on_the_command_line(after, link_before, expected):
    assert sbatch_command("x.sh", after=after, link_before=link_before) == expected


def run_script(folder: Path, *words: str, srun: str) -> "subprocess.CompletedProcess[str]":
    """The script under bash, with a stand-in for srun and for Python, which tell what they were called with."""
    programs = folder / "bin"
    programs.mkdir()
    for name, body in (("srun", srun), ("python", 'echo "python $*"; exit 9')):
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    script = script_of("s1", "cluster=slurm", f"cluster.python={programs}/python", *words, run_dir=folder / "run")
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": "/site", "SLURM_JOB_ID": "7"}
    return subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=30)


def test_the_job_ends_with_the_code_of_its_aftermath_whatever_srun_does(tmp_path):
    ended = run_script(tmp_path, srun='echo "path $PYTHONPATH"; exit 3')
    job = tmp_path / "run/code/0123456789/job.py"
    assert ended.stdout.splitlines() == [
        f"path {tmp_path}/run/code/0123456789:/site",
        f"python {job} -m tdro_hpc.launch.job.aftermath {tmp_path}/run/s1 3 7 0",
    ]
    assert ended.returncode == 9


def test_a_signal_to_the_batch_shell_waits_for_the_ranks(tmp_path):
    ended = run_script(tmp_path, srun="kill -TERM $PPID; sleep 0.5; echo saved; exit 0")
    assert ended.stdout.splitlines()[0] == "saved" and ended.stdout.endswith("run/s1 0 7 0\n")


@pytest.mark.parametrize("line", ["false", '"f() { false; true; }", f', '"exit 5"'])
def test_a_setup_line_that_fails_stops_the_job_with_words(line, tmp_path):
    ended = run_script(tmp_path, f"cluster.setup=[echo before,{line},echo not reached]", srun="echo not reached")
    assert "before" in ended.stdout and "not reached" not in ended.stdout and ended.returncode != 0
    assert re.search(r"^a line of cluster.setup failed with exit code [15]: ", ended.stderr, flags=re.MULTILINE)
    assert re.search(r"-m tdro_hpc.launch.job.aftermath \S+/run/s1 [15] 7 0$", ended.stdout, flags=re.MULTILINE)


def test_setup_lines_may_use_variables_that_are_not_set_and_set_what_the_ranks_see(tmp_path):
    line = '"export FOUND=yes$NOT_THERE"'
    ended = run_script(tmp_path, f"cluster.setup=[{line}]", srun='echo "found $FOUND"')
    assert ended.stdout.startswith("found yes\n")
