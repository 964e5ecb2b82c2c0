"""A real Slurm for a test: slurm/testcluster in a directory and on ports of its own. Knows nothing of tdro_hpc."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "slurm" / "testcluster"
FIRST_PORT, NUM_BASES = 17000, 30  # below the ports that jobs take, which begin at 20000

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can bring up a Slurm: sudo python -m pytest")


@dataclass
class Cluster:
    directory: Path
    port: int = FIRST_PORT  # base port
    keys: dict[str, object] = field(default_factory=dict)  # key=value words of `up`

    @property
    def environment(self) -> dict[str, str]:
        """Environment in which Slurm's commands talk to this cluster; nothing else of Slurm's is set."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        conf = str(self.directory / "etc" / "slurm.conf")
        return {**kept, "SLURM_CONF": conf, "PATH": f"{kept.get('PATH', '')}:/usr/sbin:/usr/bin:/sbin:/bin"}

    def testcluster(self, verb: str, *words: str, status: int | None = 0) -> subprocess.CompletedProcess[str]:
        """slurm/testcluster VERB WORDS dir=...; its exit status must be `status` (None: any)."""
        done = self.run(str(SCRIPT), verb, *words, f"dir={self.directory}", status=None)
        if status is not None:
            assert done.returncode == status, f"{verb} {words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def run(self, *command: str, status: int | None = 0, timeout_seconds: float = 120, **options: object):
        """A command in this cluster's environment; its exit status must be `status` (None: any)."""
        done = subprocess.run(  # type: ignore[call-overload]
            command,
            **{
                "env": self.environment,
                "capture_output": True,
                "text": True,
                "timeout": timeout_seconds,
                "cwd": "/tmp",
                "stdin": subprocess.DEVNULL,
                **options,
            },
        )
        if status is not None:
            assert done.returncode == status, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def up(self) -> None:
        """Everything runs; a port that somebody else has taken is exchanged for another."""
        for attempt in range(NUM_BASES):
            self.port = FIRST_PORT + 100 * ((os.getpid() + attempt) % NUM_BASES)
            words = [f"{name}={str(value).lower()}" for name, value in {**self.keys, "port": self.port}.items()]
            done = self.testcluster("up", *words, status=None)
            if done.returncode != 2 or "is in use" not in done.stderr:
                break
        assert done.returncode == 0, f"{done.stdout}{done.stderr}"

    def down(self) -> None:
        self.testcluster("down")

    def wait_until_ready(self) -> None:
        """All daemons run and all nodes take jobs: some seconds after slurmctld or a slurmd was started again."""
        self.wait_until(lambda: self.testcluster("status", status=None).returncode == 0)

    def kill_slurmd(self, node: str) -> None:
        """slurmd dies without a word; the steps on the node live on."""
        self.testcluster("stop", node, "signal=KILL")

    def start_slurmd(self, node: str) -> None:
        self.testcluster("start", node)

    def kill_slurmctld(self) -> None:
        """slurmctld dies without saving its state: what happened in the last 5 s or so may be forgotten."""
        self.testcluster("stop", "slurmctld", "signal=KILL")

    def start_slurmctld(self) -> None:
        self.testcluster("start", "slurmctld")

    def power_off(self, node: str) -> None:
        """Every process of the node dies at once: slurmd, the steps and what they have started."""
        self.testcluster("poweroff", node)

    def sbatch(self, script: str, *options: str, **run_options: object) -> str:
        """Job id of a batch script given as text; its output goes to <directory>/out/<job id>.txt."""
        out = self.directory / "out"
        out.mkdir(exist_ok=True)
        out.chmod(0o1777)
        command = ["sbatch", "--parsable", "-o", f"{out}/%j.txt", "--open-mode=append", *options]
        run_options = {"input": f"#!/bin/bash\n{script}\n", "stdin": None, **run_options}
        return self.run(*command, **run_options).stdout.strip()

    def output(self, job: str) -> str:
        """What a job of sbatch() has printed so far."""
        path = self.directory / "out" / f"{job}.txt"
        return path.read_text() if path.exists() else ""

    def squeue(self) -> dict[str, str]:
        """State of every job that is not over, by its id."""
        told = self.run("squeue", "-h", "-r", "-o", "%i %T").stdout
        return dict(line.split() for line in told.splitlines())

    def job(self, job: str) -> dict[str, str]:
        """Fields of scontrol show job, for example JobState, Reason, Restarts, NodeList, ExitCode."""
        told = self.run("scontrol", "show", "job", "-o", job).stdout
        return dict(word.split("=", 1) for word in told.split() if "=" in word)

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def wait_until(self, predicate: Callable[[], object], *, timeout_seconds: float = 60) -> None:
        """Asks up to ten times a second.  raises AssertionError with queue and nodes when it takes too long."""
        limit = time.monotonic() + timeout_seconds
        while True:
            asked = time.monotonic()
            if predicate():
                return
            if time.monotonic() > limit:
                queue = self.run("squeue", "-o", "%i %j %T %r %N", status=None)
                nodes = self.run("sinfo", "-N", "-o", "%N %T %E", status=None)
                raise AssertionError(f"not after {timeout_seconds} s:\n{queue.stdout}{queue.stderr}{nodes.stdout}")
            # What starts a program to find out leaves most of the time to those it asks about.
            time.sleep(max(0.1, 5 * (time.monotonic() - asked)))

    def wait_for_state(self, job: str, *states: str, timeout_seconds: float = 60) -> None:
        self.wait_until(lambda: self.state(job) in states, timeout_seconds=timeout_seconds)


@contextmanager
def running_cluster(**keys: object) -> Iterator[Cluster]:
    """A cluster made with the keys of `slurm/testcluster up`; stopped and removed at the end."""
    # Not pytest's tmp_path: other users must be able to reach it, and sockets want short names.
    parent = Path(tempfile.mkdtemp(prefix="tdro-", dir="/var/tmp"))
    parent.chmod(0o755)
    cluster = Cluster(parent / "slurm", keys=keys)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()
        shutil.rmtree(parent, ignore_errors=True)
