"""Settings in, the cluster's directory out: key, host names, fake GPUs, slurm.conf and what belongs to it."""

import os
import secrets
import subprocess
from pathlib import Path

from testcluster_lib.daemons import SEARCH_PATH, hosts_file
from testcluster_lib.settings import Settings, save_settings

CLUSTER_NAME = "testcluster"
FOLDERS = ("dev", "etc", "hosts", "log", "munge", "mysql", "run", "spool", "state")


def write_files(settings: Settings) -> None:
    """Writes every file that daemons read; keys and passwords that are already there are kept."""
    for folder in FOLDERS:
        (settings.path / folder).mkdir(parents=True, exist_ok=True)
        (settings.path / folder).chmod(0o700 if folder == "mysql" else 0o755)
    settings.path.chmod(0o755)
    write_secret(settings.path / "munge" / "munge.key", secrets.token_bytes(128))
    write_secret(settings.path / "etc" / "password", secrets.token_hex(16).encode())
    for number in range(settings.gpus):
        device = settings.path / "dev" / f"gpu{number}"
        device.unlink(missing_ok=True)
        device.symlink_to("/dev/null")
    write_hosts(settings)
    etc = settings.path / "etc"
    (etc / "slurm.conf").write_text(slurm_conf(settings))
    (etc / "gres.conf").write_text(gres_conf(settings))
    (etc / "cgroup.conf").write_text(cgroup_conf())
    if settings.accounting:
        # slurmdbd reads it only if nobody else can.
        write_secret(etc / "slurmdbd.conf", slurmdbd_conf(settings).encode(), replace=True)
        write_secret(etc / "grants.sql", grants_sql(settings).encode(), replace=True)
    save_settings(settings)


def write_secret(path: Path, content: bytes, *, replace: bool = False) -> None:
    """Writes a file that only its owner can read, unless it is there."""
    if path.exists() and path.stat().st_size and not replace:
        return
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


def write_hosts(settings: Settings) -> None:
    """One /etc/hosts for every host: all hosts of the cluster, then what this machine's file says.

    Written in place when it exists: hosts that run have the file itself bound to /etc/hosts.
    """
    hosts = ["controller", *settings.node_names]
    lines = ["127.0.0.1 localhost", *(f"{settings.address_of(host)} {host}" for host in hosts)]
    own = Path("/etc/hosts").read_text().splitlines()
    others = [line for line in own if line.strip() and not set(line.split()[1:]) & set(hosts)]
    content = "\n".join([*lines, *others]) + "\n"
    for host in hosts:
        if not hosts_file(settings, host).exists() or hosts_file(settings, host).read_text() != content:
            hosts_file(settings, host).write_text(content)


def slurm_conf(settings: Settings) -> str:
    """Text of slurm.conf."""
    path, munge = settings.path, f"socket={settings.path}/munge/socket"
    lines = [
        f"ClusterName={CLUSTER_NAME}",
        f"SlurmctldHost=controller({settings.address_of('controller')})",
        f"SlurmctldPort={settings.port}",
        "SlurmUser=root",
        "SlurmdUser=root",
        "AuthType=auth/munge",
        f"AuthInfo={munge},cred_expire={settings.cred_expire_seconds}",
        f"StateSaveLocation={path}/state",
        f"SlurmdSpoolDir={path}/spool/%n",
        f"SlurmctldPidFile={path}/run/slurmctld.pid",
        f"SlurmdPidFile={path}/run/%n.pid",
        # Jobs make a port of the last four digits of their id. Thirty clusters in a row share none of the first 333.
        f"FirstJobId={settings.port // 100 * 333 + 1}",
        # Processes only: neither cgroups nor the true size of this machine matter.
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/none",
        "MpiDefault=none",
        "MailProg=/bin/true",
        "SlurmdParameters=config_overrides",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core_Memory",
        "DefMemPerCPU=100",
        "SchedulerType=sched/backfill",
        "SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0",
        f"SlurmdTimeout={settings.node_timeout_seconds}",
        f"KillWait={settings.kill_wait_seconds}",
        "ReturnToService=2",
        "MinJobAge=3600",
        "InactiveLimit=0",
        "CompleteWait=0",
        f"JobRequeue={int(settings.requeue)}",
        "PreemptType=preempt/partition_prio",
        f"PreemptMode={settings.preempt.upper()}",
        *(["SlurmctldParameters=preempt_send_user_signal"] if settings.user_signal else []),
        *accounting_lines(settings),
        *node_lines(settings),
        *partition_lines(settings),
    ]
    return "\n".join(lines) + "\n"


def accounting_lines(settings: Settings) -> list[str]:
    """Lines of slurm.conf about accounting."""
    if not settings.accounting:
        return ["AccountingStorageType=accounting_storage/none"]
    return [
        "AccountingStorageType=accounting_storage/slurmdbd",
        "AccountingStorageHost=127.0.0.1",
        f"AccountingStoragePort={settings.port_of('slurmdbd')}",
        # Messages to slurmdbd do not follow AuthInfo: this is the path of munge's socket, no password.
        f"AccountingStoragePass={settings.path}/munge/socket",
        *(["AccountingStorageTRES=gres/gpu"] if settings.gpus else []),
        *(["AccountingStorageEnforce=limits"] if settings.enforce else []),
    ]


def node_lines(settings: Settings) -> list[str]:
    """Lines of slurm.conf about nodes."""
    size = f"Sockets=1 CoresPerSocket={settings.cpus} ThreadsPerCore=1 RealMemory={settings.memory_mb}"
    gpus = f" Gres=gpu:{settings.gpus}" if settings.gpus else ""
    return [
        *(["GresTypes=gpu"] if settings.gpus else []),
        *(
            f"NodeName={name} NodeHostname={name} NodeAddr={settings.address_of(name)} Port={settings.port_of(name)} "
            f"{size}{gpus} State=UNKNOWN"
            for name in settings.node_names
        ),
    ]


def partition_lines(settings: Settings) -> list[str]:
    """Lines of slurm.conf about partitions: jobs of `high` push those of `main` aside."""
    common = f"Nodes=ALL MaxTime={settings.max_minutes} DefaultTime={settings.max_minutes} State=UP"
    return [
        f"PartitionName=main Default=YES PriorityTier=1 GraceTime={settings.grace_seconds} {common}",
        f"PartitionName=high PriorityTier=10 PreemptMode=OFF {common}",
    ]


def gres_conf(settings: Settings) -> str:
    """Text of gres.conf: Slurm ignores a GPU without a character device, so each links to /dev/null."""
    if not settings.gpus:
        return ""
    last = f"[0-{settings.gpus - 1}]" if settings.gpus > 1 else "0"
    return "".join(f"NodeName={name} Name=gpu File={settings.path}/dev/gpu{last}\n" for name in settings.node_names)


def cgroup_conf() -> str:
    """Text of cgroup.conf: unused, but version 2 would ask for systemd; since 23.11 it can be disabled."""
    told = subprocess.run(
        ["slurmctld", "-V"], capture_output=True, text=True, env={**os.environ, "PATH": SEARCH_PATH}
    ).stdout
    digits = told.split()[-1].split(".")[:2] if told.strip() else []
    version = tuple(int(part) for part in digits if part.isdigit())
    return f"CgroupPlugin={'disabled' if version >= (23, 11) else 'cgroup/v1'}\n"


def slurmdbd_conf(settings: Settings) -> str:
    """Text of slurmdbd.conf."""
    password = (settings.path / "etc" / "password").read_text()
    lines = [
        "AuthType=auth/munge",
        f"AuthInfo=socket={settings.path}/munge/socket",
        "DbdHost=localhost",
        f"DbdPort={settings.port_of('slurmdbd')}",
        "SlurmUser=root",
        f"PidFile={settings.path}/run/slurmdbd.pid",
        "StorageType=accounting_storage/mysql",
        "StorageHost=127.0.0.1",
        f"StoragePort={settings.port_of('mariadbd')}",
        "StorageUser=slurm",
        f"StoragePass={password}",
        "StorageLoc=slurm",
    ]
    return "\n".join(lines) + "\n"


def grants_sql(settings: Settings) -> str:
    """What mariadbd does at every start: Slurm's database and user; one statement a line."""
    password = (settings.path / "etc" / "password").read_text()
    return (
        "CREATE DATABASE IF NOT EXISTS slurm;\n"
        f"CREATE OR REPLACE USER 'slurm'@'127.0.0.1' IDENTIFIED BY '{password}';\n"
        "GRANT ALL ON slurm.* TO 'slurm'@'127.0.0.1';\n"
    )
