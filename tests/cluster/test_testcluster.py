"""slurm/testcluster brings up a Slurm that schedules, isolates host names, counts GPUs, heals and leaves nothing."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import SCRIPT, Cluster, needs_root, running_cluster

CONNECT = r"""
import os, socket, time
gpus = os.environ["CUDA_VISIBLE_DEVICES"]
print("rank", os.environ["SLURM_PROCID"], "on", socket.gethostname(), "GPUs", gpus, flush=True)
port = int(os.environ["TEST_PORT"])
if os.environ["SLURM_PROCID"] == "0":
    with socket.create_server((socket.gethostbyname("node1"), port)) as server:
        connection, _ = server.accept()
        print("node1 heard", connection.recv(100).decode())
elif os.environ["SLURM_PROCID"] == "3":
    for _ in range(100):
        try:
            connection = socket.create_connection(("node1", port))
            break
        except ConnectionRefusedError:
            time.sleep(0.1)
    connection.sendall(socket.gethostname().encode())
"""


def processes_that_name(directory: Path) -> list[str]:
    """Command lines and start directories of live processes that have to do with a cluster's directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes() + os.readlink(entry / "cwd").encode()
                words += (entry / "environ").read_bytes()
            except OSError:
                continue
            if str(directory).encode() in words:
                found.append(f"{entry.name} {words[:200]!r}")
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster(nodes=3, gpus=2) as cluster:
        yield cluster
        directory = cluster.directory
        cluster.sbatch("sleep 600 & srun -N2 sleep 600", "-N2")
        cluster.wait_until(lambda: "RUNNING" in cluster.squeue().values())
        assert "processes of jobs" in cluster.testcluster("down").stdout
        assert not directory.exists() and processes_that_name(directory) == []
        assert "nothing to stop" in cluster.testcluster("down").stdout


@needs_root
def test_up_again_and_status(cluster: Cluster) -> None:
    before = cluster.testcluster("status").stdout
    assert before.count("runs, process") == 5 and before.count("idle") == 6
    assert cluster.testcluster("up").stdout.startswith("already up")
    assert cluster.testcluster("up", "nodes=3", f"port={cluster.port}").stdout.startswith("already up")
    assert cluster.testcluster("status").stdout == before
    told = cluster.testcluster("up", "nodes=2", status=2).stderr
    assert "nodes=2" in told and "nodes=3" in told and "down" in told
    shell = 'eval "$("$1" env dir="$2")" && scontrol ping'
    assert "UP" in subprocess.check_output(["sh", "-c", shell, "sh", str(SCRIPT), str(cluster.directory)], text=True)


@needs_root
def test_two_nodes_reach_each_other_by_name_and_number_their_gpus(cluster: Cluster) -> None:
    script = cluster.directory / "connect.py"
    script.write_text(CONNECT)
    words = ["-N2", "--ntasks-per-node=2", "--gpus-per-node=2", f"--export=ALL,TEST_PORT={cluster.port + 90}"]
    told = cluster.run("srun", *words, "python3", str(script)).stdout.splitlines()
    assert sorted(line for line in told if line.startswith("rank")) == [
        f"rank {rank} on node{1 + rank // 2} GPUs 0,1" for rank in range(4)
    ]
    assert "node1 heard node2" in told
    one_each = cluster.run("srun", "-n2", "--gpus-per-task=1", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES").stdout
    assert sorted(one_each.split()) == ["0", "1"]


@needs_root
def test_gpus_are_counted_and_refused(cluster: Cluster) -> None:
    refused = cluster.run("sbatch", "--gpus-per-node=3", "--wrap=true", status=1)
    assert "Requested node configuration is not available" in refused.stderr
    assert "invalid partition" in cluster.run("sbatch", "-p", "nowhere", "--wrap=true", status=1).stderr
    holders = [cluster.sbatch("sleep 600", "--gpus-per-node=2") for _ in range(3)]
    cluster.wait_until(lambda: all(cluster.squeue()[job] == "RUNNING" for job in holders))
    waiting = cluster.sbatch("echo $CUDA_VISIBLE_DEVICES", "--gpus-per-node=1")
    cluster.wait_until(lambda: cluster.job(waiting)["Reason"] in ("Resources", "Priority"))
    cluster.run("scancel", *holders)
    cluster.wait_until(lambda: cluster.output(waiting).strip() == "0")


@needs_root
def test_another_user_submits_and_reads_no_secret(cluster: Cluster) -> None:
    script = "id -u; env -u SLURM_CONF srun /usr/bin/id -u; sleep 2"
    job = cluster.sbatch(script, "--export=NONE", user=65534, group=65534, extra_groups=[])
    cluster.wait_until(lambda: job in cluster.run("squeue", "-h", "-u", "nobody", "-o", "%i").stdout)
    cluster.wait_for_state(job, "COMPLETED")
    assert cluster.output(job).split() == ["65534", "65534"]
    secrets = [cluster.directory / name for name in ("munge/munge.key", "etc/password")]
    assert [path.stat().st_mode & 0o777 for path in secrets] == [0o600, 0o600]


@needs_root
@pytest.mark.slow
def test_preemption_requeues(cluster: Cluster) -> None:
    pushed = cluster.sbatch("sleep 20", "-N3", "--exclusive")
    cluster.wait_for_state(pushed, "RUNNING")
    high = cluster.sbatch("true", "-N3", "--exclusive", "-p", "high")
    cluster.wait_for_state(high, "COMPLETED")
    cluster.wait_until(lambda: cluster.job(pushed)["Restarts"] == "1" and cluster.state(pushed) == "RUNNING")
    cluster.run("scancel", pushed)
    cluster.wait_until(lambda: not cluster.squeue())


@needs_root
@pytest.mark.slow
def test_daemons_stop_start_and_lose_power(cluster: Cluster) -> None:
    job = cluster.sbatch("trap '' TERM; echo $SLURM_JOB_NODELIST $$; sleep 600", "-w", "node2")
    cluster.wait_until(lambda: "node2" in cluster.output(job))
    process = Path("/proc") / cluster.output(job).split()[1]
    saved = cluster.directory / "state" / "job_state"
    changed = saved.stat().st_mtime
    cluster.wait_until(lambda: saved.stat().st_mtime > changed)
    cluster.kill_slurmctld()
    assert cluster.run("squeue", status=None).returncode != 0
    assert "slurmctld  does not run" in cluster.testcluster("status", status=1).stdout
    cluster.start_slurmctld()
    cluster.kill_slurmd("node2")
    assert (process / "stat").exists(), "a step lives on when slurmd dies"
    cluster.start_slurmd("node2")
    cluster.wait_for_state(job, "RUNNING")
    cluster.power_off("node2")
    assert not (process / "stat").exists() or " Z " in (process / "stat").read_text()
    cluster.wait_until(lambda: cluster.squeue().get(job) != "RUNNING", timeout_seconds=90)
    # up heals: what is dead is started, what Slurm has set aside is taken back.
    cluster.kill_slurmctld()
    cluster.testcluster("up")
    cluster.testcluster("status")
    cluster.run("scancel", job)
    cluster.wait_until(lambda: not cluster.squeue())


@needs_root
def test_two_clusters_side_by_side(cluster: Cluster) -> None:
    told = cluster.run(str(SCRIPT), "up", f"dir={cluster.directory}-b", f"port={cluster.port}", status=2).stderr
    assert "is in use" in told and "type:" in told
    assert not Path(f"{cluster.directory}-b").exists()
    with running_cluster(nodes=1, gpus=0, preempt="cancel", requeue=False, user_signal=False) as other:
        assert other.port != cluster.port
        settings = other.run("scontrol", "show", "config").stdout
        assert "CANCEL" in settings and "JobRequeue              = 0" in settings
        assert other.run("srun", "hostname").stdout == "node1\n"
        assert "processes" in other.testcluster("down").stdout
        cluster.testcluster("status")


@needs_root
def test_without_accounting_sacct_fails(cluster: Cluster) -> None:
    assert "disabled" in cluster.run("sacct", status=1).stderr


@needs_root
@pytest.mark.slow
def test_accounting_and_its_limits() -> None:
    with running_cluster(nodes=2, accounting=True, enforce=True) as cluster:
        job = cluster.sbatch("srun -N2 true", "-N2")
        cluster.wait_for_state(job, "COMPLETED")
        told = ["sacct", "-n", "-X", "-P", "-j", job, "-o", "State,User,Account,NNodes"]
        cluster.wait_until(lambda: cluster.run(*told).stdout.strip() == "COMPLETED|root|project|2")
        held = cluster.sbatch("true", "-A", "small", "-N2")
        cluster.wait_until(lambda: cluster.job(held)["Reason"] == "AssocGrpNodeLimit")
        cluster.sbatch("true", "-A", "small", "-H")
        refused = cluster.run("sbatch", "-A", "small", "--wrap=true", status=1).stderr
        assert "policy" in refused or "limit" in refused
        cluster.testcluster("stop", "slurmdbd")
        assert cluster.run("sacct", status=None).returncode != 0
        cluster.testcluster("start", "slurmdbd")
        cluster.run(*told)


@needs_root
def test_a_daemon_that_dies_is_named_with_its_last_words(cluster: Cluster, tmp_path: Path) -> None:
    fake = tmp_path / "slurmctld"
    fake.write_text("#!/bin/sh\necho slurmctld: fatal: no such luck\nexit 1\n")
    fake.chmod(0o755)
    folder = f"{cluster.directory}-c"
    environment = {**cluster.environment, "PATH": f"{tmp_path}:{cluster.environment['PATH']}"}
    words = ["up", f"dir={folder}", f"port={cluster.port + 50}", "nodes=1"]
    done = subprocess.run([str(SCRIPT), *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "slurmctld ended by itself" in done.stderr and "no such luck" in done.stderr
    assert processes_that_name(Path(folder)) == []
    cluster.run(str(SCRIPT), "down", f"dir={folder}")
    assert not Path(folder).exists()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["upp"], ["unknown word", "nearest is up", "slurm/testcluster up"]),
        (["up", "node=4"], ["unknown key", "nearest is nodes", "slurm/testcluster up nodes=4"]),
        (["up", "nodes=0"], ["nodes=0", "1 to 64", "nodes=3"]),
        (["up", "nodes=many"], ["nodes=many", "whole number"]),
        (["up", "accounting=yes"], ["accounting=yes", "true or false"]),
        (["up", "preempt=suspend"], ["requeue or cancel"]),
        (["up", "enforce=true"], ["accounting=true"]),
        (["up", "dir="], ["dir does not fit"]),
        (["up", "nodes=2", "nodes=3"], ["twice"]),
        (["up", "node1"], ["takes no name"]),
        (["stop", "node1", "dir=/var/tmp/tdro-no-such-cluster"], ["there is no cluster", "slurm/testcluster up dir="]),
        (["env", "dir=/var/tmp/tdro-no-such-cluster"], ["there is no cluster"]),
        (["down", "dir=/usr"], ["not made by this script"]),
    ],
)
def test_mistakes_are_told_without_a_traceback(words: list[str], parts: list[str]) -> None:
    done = subprocess.run([str(SCRIPT), *words], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and "got:" in done.stderr and "type:" in done.stderr
    assert [part for part in parts if part not in done.stderr] == []


@needs_root
def test_without_root_it_says_what_is_needed() -> None:
    done = subprocess.run(
        ["python3", "-I", "-S", str(SCRIPT), "up", "dir=/var/tmp/tdro-nobody"],
        capture_output=True,
        text=True,
        user=65534,
        group=65534,
        extra_groups=[],
    )
    assert done.returncode == 2 and "sudo" in done.stderr, done.stderr


def test_help_names_every_key() -> None:
    told = subprocess.run([str(SCRIPT), "help"], capture_output=True, text=True)
    assert told.returncode == 0 and "nodes=3" in told.stdout and "poweroff" in told.stdout
