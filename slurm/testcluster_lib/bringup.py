"""A cluster's files in, its daemons out: each is started in its turn and waited for."""

import errno
import os
import socket
import subprocess
import time
from collections.abc import Callable

from testcluster_lib import daemons
from testcluster_lib.daemons import Failure, environment_of, log_of, pid_of
from testcluster_lib.files import CLUSTER_NAME
from testcluster_lib.settings import COMMAND, Mistake, Settings

READY = {"idle", "mixed", "allocated", "completing"}


def run(settings: Settings, *command: str) -> subprocess.CompletedProcess[str]:
    """A Slurm command on this cluster."""
    try:
        return subprocess.run(
            command, env=environment_of(settings), capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"there is no {command[0]}")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"{command[0]} did not answer")


def node_states(settings: Settings) -> dict[str, str]:
    """State of every node as sinfo says it (a star: it does not answer); empty if slurmctld does not run."""
    if pid_of(settings, "slurmctld") is None:
        return {}
    told = run(settings, "sinfo", "-h", "-N", "-p", "main", "-o", "%N %T")
    return dict(line.split() for line in told.stdout.splitlines() if len(line.split()) == 2)


def is_up(settings: Settings) -> bool:
    """Whether all daemons run and all nodes are ready for jobs."""
    if any(pid_of(settings, name) is None for name in settings.daemon_names):
        return False
    states = node_states(settings)
    return len(states) == settings.nodes and all(state in READY for state in states.values())


def summary(settings: Settings) -> str:
    """The cluster in half a line."""
    states = ", ".join(f"{name} {state}" for name, state in node_states(settings).items())
    return f"{states}; port {settings.port}, {settings.dir}"


def check_ports(settings: Settings, names: list[str] | None = None) -> None:
    """raises Mistake if somebody else listens where one of the daemons (all that do not run) would."""
    for name in names or settings.daemon_names:
        port = settings.port_of(name)
        if port is not None and pid_of(settings, name) is None and not is_free(port):
            bases = range(16800, 32000, 100)
            free = next((base for base in bases if all(is_free(base + number) for number in range(90))), 0)
            raise Mistake(
                f"the port of {name} is in use",
                got=f"port={settings.port}; {name} needs {port}, and another program listens there",
                expected=f"free ports from {settings.port} to {settings.port_of(settings.node_names[-1])}",
                typed=f"{COMMAND} up dir={settings.dir} port={free}",
            )


def is_free(port: int) -> bool:
    """Whether a daemon could listen on a port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError as error:
            return error.errno != errno.EADDRINUSE
    return True


def answers(port: int) -> bool:
    """Whether somebody listens on a port of this machine."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True


def start_all(settings: Settings) -> None:
    """Starts what does not run and waits for the nodes.  raises Failure after stopping what this call started."""
    deadline = time.monotonic() + settings.up_seconds
    started = [name for name in settings.daemon_names if pid_of(settings, name) is None]
    try:
        for name in started:
            start_one(settings, name, deadline=deadline)
        resume(settings)
        wait_for(settings, settings.daemon_names, lambda: is_up(settings), deadline=deadline)
    except BaseException:
        for name in reversed(started):
            pid = pid_of(settings, name)
            if pid is not None:
                daemons.stop(pid, 9, timeout_seconds=10.0)
        raise


def resume(settings: Settings) -> None:
    """Nodes that Slurm has set aside, after a crash for example, take jobs again."""
    aside = [name for name, state in node_states(settings).items() if state.startswith(("drain", "down", "fail"))]
    for name in aside:
        run(settings, "scontrol", "update", f"nodename={name}", "state=resume")


def start_one(settings: Settings, name: str, *, deadline: float) -> None:
    """Starts one daemon and waits until it answers."""
    if name == "munged":
        start_munged(settings, deadline)
    elif name == "mariadbd":
        start_mariadbd(settings, deadline)
    elif name == "slurmdbd":
        start_slurmdbd(settings, deadline)
    elif name == "slurmctld":
        # -i would ignore a state that cannot be read; without it a broken state is seen in the log.
        daemons.start(settings, name, ["slurmctld", "-D"], host="controller")
        wait_for(settings, [name], lambda: run(settings, "scontrol", "ping").returncode == 0, deadline=deadline)
    else:
        daemons.start(settings, name, ["slurmd", "-D", "-N", name], host=name)
        port = settings.port_of(name)
        wait_for(settings, [name], lambda: port is not None and answers(port), deadline=deadline)


def start_munged(settings: Settings, deadline: float) -> None:
    """Own key, own socket; --force because root runs it and the directory may lie where root's files seldom lie."""
    folder = settings.path / "munge"
    command = ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/socket"]
    files = [f"--pid-file={folder}/pid", f"--log-file={folder}/log", f"--seed-file={folder}/seed"]
    daemons.start(settings, "munged", [*command, *files], host="controller")
    works = ["munge", f"--socket={folder}/socket", "--no-input"]
    wait_for(settings, ["munged"], lambda: run(settings, *works).returncode == 0, deadline=deadline)


def start_mariadbd(settings: Settings, deadline: float) -> None:
    """A database that only this machine reaches, small, with its data in the cluster's directory."""
    data = settings.path / "mysql"
    common = ["--no-defaults", f"--datadir={data}/data", "--user=root"]
    if not (data / "made").exists():
        quiet = ["--skip-test-db", "--auth-root-authentication-method=normal"]
        made = run(settings, "mariadb-install-db", *common, *quiet)
        if made.returncode != 0:
            raise Failure(f"mariadb-install-db failed:\n{made.stdout}{made.stderr}")
        (data / "made").touch()
    port = settings.port_of("mariadbd")
    network = ["--bind-address=127.0.0.1", f"--port={port}", f"--socket={data}/socket", "--skip-name-resolve"]
    small = ["--innodb-buffer-pool-size=32M", "--innodb-log-file-size=16M", f"--pid-file={data}/pid"]
    init = f"--init-file={settings.path}/etc/grants.sql"
    daemons.start(settings, "mariadbd", ["mariadbd", *common, *network, *small, init], host="controller")
    wait_for(settings, ["mariadbd"], lambda: port is not None and answers(port), deadline=deadline)


def start_slurmdbd(settings: Settings, deadline: float) -> None:
    """slurmdbd, and in it this cluster, its accounts and users.  Adding what is there changes nothing."""
    daemons.start(settings, "slurmdbd", ["slurmdbd", "-D"], host="controller")
    listed = ["sacctmgr", "-n", "list", "cluster"]
    wait_for(settings, ["slurmdbd"], lambda: run(settings, *listed).returncode == 0, deadline=deadline)
    users = sorted({"root", "nobody", os.environ.get("SUDO_USER") or "root"})
    for words in (
        ["cluster", CLUSTER_NAME],
        ["account", "project", "Description=all", "Organization=test"],
        ["account", "small", "Description=limited", "Organization=test", "GrpTRES=node=1", "MaxSubmitJobs=2"],
        ["user", ",".join(users), "Account=project,small", "DefaultAccount=project"],
    ):
        added = run(settings, "sacctmgr", "-i", "add", *words)
        text = (added.stdout + added.stderr).strip()
        if added.returncode != 0 and "lready exist" not in text and "othing new" not in text:
            raise Failure(f"sacctmgr add {' '.join(words)} failed:\n{text}")


def wait_for(settings: Settings, names: list[str], ready: Callable[[], bool], *, deadline: float) -> None:
    """Waits until `ready`.  raises Failure, with the end of its log if a daemon dies, with all states when late."""
    while not ready():
        for name in names:
            if pid_of(settings, name) is None:
                log = log_of(settings, name)
                raise Failure(f"{name} ended by itself. The end of {log}:\n{daemons.tail(log)}")
        if time.monotonic() > deadline:
            states = node_states(settings) or "slurmctld does not answer"
            files = [log_of(settings, name) for name in names[-2:]]
            logs = "\n".join(f"{file}:\n{daemons.tail(file)}" for file in files)
            raise Failure(f"not up after {settings.up_seconds} s; nodes: {states}. The ends of the logs:\n{logs}")
        time.sleep(0.1)
