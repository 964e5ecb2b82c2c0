"""Slurm's programs, installed by apt where they are missing. Starts no service and never touches one that runs."""

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

from testcluster_lib.daemons import SEARCH_PATH, Failure
from testcluster_lib.settings import COMMAND, Mistake

# program -> package; the newest mariadb-server-core-X.Y stands in where there is no package without a number.
PROGRAMS = {
    "sbatch": "slurm-client",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "munged": "munge",
    "unshare": "util-linux",
}
ACCOUNTING_PROGRAMS = {
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server-core",
    "mariadb-install-db": "mariadb-server-core",
    "my_print_defaults": "mariadb-client-core",
}
LOCK = Path("/run/lock/tdro-testcluster-install")
POLICY = Path("/usr/sbin/policy-rc.d")


def missing_packages(*, accounting: bool) -> list[str]:
    """Packages whose programs are not on this machine."""
    programs = {**PROGRAMS, **(ACCOUNTING_PROGRAMS if accounting else {})}
    return sorted({package for name, package in programs.items() if not shutil.which(name, path=SEARCH_PATH)})


def install(*, accounting: bool) -> None:
    """Installs what is missing.  raises Mistake if this user or machine cannot, Failure if apt fails."""
    packages = missing_packages(accounting=accounting)
    by_hand = f"sudo apt-get install --no-install-recommends {' '.join(packages)}"
    if packages and (os.geteuid() != 0 or not shutil.which("apt-get")):
        raise Mistake(
            "Slurm is missing and cannot be installed by this user on this machine",
            got=f"user id {os.geteuid()}, {'' if shutil.which('apt-get') else 'no '}apt-get",
            expected=f"root and apt-get, or these packages installed: {' '.join(packages)}",
            typed=f"{by_hand}; then sudo {COMMAND} up",
        )
    if os.geteuid() != 0:
        raise Mistake(
            "only root can give every node its own host name",
            got=f"user id {os.geteuid()}",
            expected="root; jobs may be submitted by anybody afterwards",
            typed=f"sudo {COMMAND} up",
        )
    check_namespaces()
    if not packages:
        return
    LOCK.mkdir(parents=True, exist_ok=True)
    # A lock on a directory of root's: two clusters that come up at once install one after the other.
    descriptor = os.open(LOCK, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        packages = missing_packages(accounting=accounting)
        if packages:
            print(f"installing {' '.join(packages)}", flush=True)
            install_without_services(packages)
    finally:
        os.close(descriptor)
    left = missing_packages(accounting=accounting)
    if left:
        raise Failure(f"apt-get ended well, but programs of these packages are still missing: {' '.join(left)}")


def check_namespaces() -> None:
    """raises Mistake if this machine does not let root make mount and UTS namespaces, as in a plain container."""
    tried = subprocess.run(
        ["unshare", "--mount", "--propagation", "slave", "--uts", "true"], capture_output=True, text=True
    )
    if tried.returncode != 0:
        raise Mistake(
            "nodes cannot get their own host names here",
            got=f"unshare --mount --uts: {tried.stderr.strip()}",
            expected="a machine or a container with CAP_SYS_ADMIN",
            typed=f"docker run --privileged ..., and in it {COMMAND} up",
        )


def install_without_services(packages: list[str]) -> None:
    """Runs apt-get while a policy-rc.d forbids to start services; an existing policy is left alone."""
    ours = not POLICY.exists()
    if ours:
        POLICY.write_text("#!/bin/sh\n# slurm/testcluster, for the time of one apt-get\nexit 101\n")
        POLICY.chmod(0o755)
    try:
        apt_get("update", "-qq")
        apt_get("install", "-y", "-qq", "--no-install-recommends", *[available_package(name) for name in packages])
    finally:
        if ours:
            POLICY.unlink(missing_ok=True)


def available_package(name: str) -> str:
    """The package itself, or name-X.Y with the highest number where only numbered ones exist (Ubuntu 22.04)."""
    if subprocess.run(["apt-cache", "show", name], capture_output=True).returncode == 0:
        return name
    found = subprocess.run(["apt-cache", "search", "--names-only", f"^{name}-[0-9.]+$"], capture_output=True, text=True)
    numbered = [line.split()[0] for line in found.stdout.splitlines()]
    numbers = {package: [int(part) for part in package.rsplit("-", 1)[1].split(".")] for package in numbered}
    return max(numbered, key=lambda package: numbers[package], default=name)


def apt_get(*words: str) -> None:
    """Runs apt-get quietly.  raises Failure with its last lines."""
    command = ["apt-get", "-o", "DPkg::Lock::Timeout=300", "-o", "Acquire::Retries=3", *words]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-15:])
        raise Failure(f"{' '.join(command)} failed (exit status {done.returncode}):\n{tail}")
