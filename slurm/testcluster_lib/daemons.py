"""Processes of one cluster: start, find, signal. A process is known by its id AND start time, never by a name.

A second mark finds what was started by others on a node (steps, jobs): every host of the cluster sees its own file as
/etc/hosts, so a process belongs to a host if the /etc/hosts it sees is that file.
"""

import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from testcluster_lib.settings import Settings

SEARCH_PATH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
BOOT = Path("/proc/sys/kernel/random/boot_id")


class Failure(Exception):
    """Something that was typed right could not be done; the text says why."""


def start_ticks(pid: int) -> int | None:
    """Start time of a live process in clock ticks since boot; None if there is no such process, or only its zombie."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return None
    return None if after_name[0] in "ZX" else int(after_name[19])


def log_of(settings: Settings, daemon: str) -> Path:
    return settings.path / "log" / f"{daemon}.log"


def record_of(settings: Settings, daemon: str) -> Path:
    return settings.path / "run" / f"{daemon}.json"


def hosts_file(settings: Settings, host: str) -> Path:
    return settings.path / "hosts" / host


def pid_of(settings: Settings, daemon: str) -> int | None:
    """Process id of a daemon that this cluster started and that still runs."""
    try:
        record = json.loads(record_of(settings, daemon).read_text())
    except (OSError, ValueError):
        return None
    same = record["boot"] == BOOT.read_text().strip() and record["start_ticks"] == start_ticks(record["pid"])
    return record["pid"] if same else None


def environment_of(settings: Settings) -> dict[str, str]:
    """Environment of daemons and of Slurm's commands: nothing of a Slurm around this script leaks in."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SQUEUE"))}
    return {**kept, "PATH": SEARCH_PATH, "SLURM_CONF": str(settings.path / "etc" / "slurm.conf")}


def start(settings: Settings, daemon: str, command: list[str], *, host: str) -> int:
    """Starts a daemon in its own session and in new namespaces in which this machine is called `host`; its process id.

    /etc/slurm is the cluster's too, for jobs that clear all SLURM_ variables before they submit others.
    """
    hosts, etc = shlex.quote(str(hosts_file(settings, host))), shlex.quote(str(settings.path / "etc"))
    script = (
        f"mount --bind {hosts} /etc/hosts && hostname {host} && "
        f"{{ [ ! -d /etc/slurm ] || mount --bind {etc} /etc/slurm; }} && exec {shlex.join(command)}"
    )
    with open(log_of(settings, daemon), "ab") as log:
        process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "slave", "--uts", "sh", "-c", script],
            cwd=settings.path,
            env=environment_of(settings),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    record = {"pid": process.pid, "start_ticks": start_ticks(process.pid), "boot": BOOT.read_text().strip()}
    part = record_of(settings, daemon).with_suffix(".part")
    part.write_text(json.dumps(record))
    part.replace(record_of(settings, daemon))
    return process.pid


def members_of(settings: Settings, hosts: Iterable[str]) -> set[int]:
    """Ids of all processes on the hosts: daemons, steps and whatever jobs have started."""
    marks = set()
    for host in hosts:
        if hosts_file(settings, host).exists():
            status = hosts_file(settings, host).stat()
            marks.add((status.st_dev, status.st_ino))
    found = set()
    for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdigit()):
        if pid == os.getpid():
            continue
        try:
            status = os.stat(f"/proc/{pid}/root/etc/hosts")
        except OSError:
            continue
        if (status.st_dev, status.st_ino) in marks:
            found.add(pid)
    return found


def send(pid: int, number: int, *, started: int | None) -> None:
    """Signals a process if it is still the one that started then: a number that was given away again is left alone."""
    if started is None:
        return
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return
    try:
        if start_ticks(pid) == started:
            signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        pass
    finally:
        os.close(descriptor)


def stop(pid: int, number: int, *, timeout_seconds: float) -> bool:
    """Signals a process and waits for its end; whether it ended."""
    started = start_ticks(pid)
    send(pid, number, started=started)
    limit = time.monotonic() + timeout_seconds
    while started is not None and start_ticks(pid) == started:
        if time.monotonic() > limit:
            return False
        time.sleep(0.02)
    return True


def kill_members(settings: Settings, hosts: list[str], *, timeout_seconds: float = 10.0) -> int:
    """Kills every process of the hosts; how many there were.  raises Failure if some do not end."""
    killed: set[int] = set()
    limit = time.monotonic() + timeout_seconds
    while members := members_of(settings, hosts):
        known = {pid: start_ticks(pid) for pid in members}
        # First all stand still: nobody may report the death of another, as nothing reports when a node loses power.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid, started in known.items():
                send(pid, number, started=started)
        killed |= members
        if time.monotonic() > limit:
            raise Failure(f"these processes do not end: {' '.join(map(str, sorted(members)))}")
        time.sleep(0.05)
    return len(killed)


def tail(path: Path, *, num_lines: int = 15) -> str:
    """Last lines of a log file."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-num_lines:])
    except OSError as error:
        return f"(no log: {error})"
