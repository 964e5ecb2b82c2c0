"""What each verb of slurm/testcluster does, from the words behind it to the exit status."""

import fcntl
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from testcluster_lib import bringup, daemons
from testcluster_lib.daemons import Failure
from testcluster_lib.files import write_files
from testcluster_lib.install import install
from testcluster_lib.settings import (
    COMMAND,
    Mistake,
    Settings,
    directory_of,
    saved_settings,
    settings_of,
    split_words,
    unknown,
    value_of,
)

SIGNALS = ("TERM", "KILL", "INT", "STOP")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One verb at a time changes a cluster: the others wait here."""
    while True:
        descriptor = os.open(directory, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # The directory may have been removed, and made anew, while this one waited.
        if directory.exists() and os.path.samestat(os.fstat(descriptor), directory.stat()):
            break
        os.close(descriptor)
        directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        os.close(descriptor)


def there(values: dict[str, str], *, verb: str) -> Settings:
    """Settings of the cluster that is meant.  raises Mistake if there is none."""
    directory = directory_of(values.get("dir", Settings.dir), verb=verb)
    settings = saved_settings(Path(directory))
    if settings is None:
        raise Mistake(
            "there is no cluster", got=f"dir={directory}", expected="a cluster that is up", typed=up_words(directory)
        )
    return settings


def up_words(directory: str) -> str:
    """How the cluster in a directory is brought up."""
    return f"{COMMAND} up" + (f" dir={directory}" if directory != Settings.dir else "")


def no_words(verb: str, plain: list[str]) -> None:
    """raises Mistake if plain words follow a verb that takes none."""
    if plain:
        raise Mistake(
            f"{verb} takes no name", got=" ".join(plain), expected="key=value words", typed=f"{COMMAND} {verb}"
        )


def need_root(verb: str) -> None:
    """raises Mistake for any other user."""
    if os.geteuid() != 0:
        raise Mistake(
            f"only root may {verb}", got=f"user id {os.geteuid()}", expected="root", typed=f"sudo {COMMAND} {verb}"
        )


def up(words: list[str]) -> int:
    """Everything runs and every node is ready."""
    began = time.monotonic()
    plain, values = split_words("up", words, keys=[field.name for field in fields(Settings)])
    no_words("up", plain)
    settings = settings_of(values)
    if bringup.is_up(settings):
        print(f"already up: {bringup.summary(settings)}")
        return 0
    install(accounting=settings.accounting)
    bringup.check_ports(settings)
    settings.path.mkdir(parents=True, exist_ok=True)
    with locked(settings.path):
        # Another `up` may have been at work while this one waited.
        settings = settings_of(values)
        bringup.check_ports(settings)
        write_files(settings)
        try:
            bringup.start_all(settings)
        except Failure as failure:
            raise Failure(f"{failure}\nType: {COMMAND} down{dir_word(settings)} to clear it away.") from None
    print(f"up after {time.monotonic() - began:.1f} s: {bringup.summary(settings)}")
    print(f'use it:  eval "$({COMMAND} env{dir_word(settings)})"')
    return 0


def dir_word(settings: Settings) -> str:
    return f" dir={settings.dir}" if settings.dir != Settings.dir else ""


def down(words: list[str]) -> int:
    """Nothing of the cluster runs; its directory is gone unless keep=true."""
    plain, values = split_words("down", words, keys=["dir", "keep"])
    no_words("down", plain)
    keep = value_of("keep", values.get("keep", "false"), verb="down")
    directory = Path(directory_of(values.get("dir", Settings.dir), verb="down"))
    if not directory.exists():
        print(f"nothing to stop: there is no {directory}")
        return 0
    need_root("down")
    settings = saved_settings(directory)
    if settings is None:
        if any(directory.iterdir()):
            raise Mistake(
                "this directory was not made by this script",
                got=f"{directory} without settings.json",
                expected="the directory of a cluster",
                typed=f"{COMMAND} down dir={Settings.dir}",
            )
        directory.rmdir()
        return 0
    with locked(directory):
        stopped = [name for name in reversed(settings.daemon_names) if stop_daemon(settings, name, signal.SIGTERM)]
        rest = daemons.kill_members(settings, ["controller", *settings.node_names])
        if not keep:
            shutil.rmtree(directory)
    print(f"stopped {len(stopped)} daemons and {rest} processes of jobs{'' if keep else f'; removed {directory}'}")
    return 0


def stop_daemon(settings: Settings, name: str, number: int) -> bool:
    """Stops a daemon, by force if it does not obey; whether it ran."""
    pid = daemons.pid_of(settings, name)
    if pid is not None and not daemons.stop(pid, number, timeout_seconds=10.0):
        daemons.stop(pid, signal.SIGKILL, timeout_seconds=10.0)
    return pid is not None


def status(words: list[str]) -> int:
    """Prints daemons and nodes; 0 if all run and every node is ready."""
    plain, values = split_words("status", words, keys=["dir"])
    no_words("status", plain)
    directory = directory_of(values.get("dir", Settings.dir), verb="status")
    settings = saved_settings(Path(directory))
    if settings is None:
        print(f"down: there is no cluster in {directory}\ntype: {up_words(directory)}")
        return 1
    for name in settings.daemon_names:
        pid, port = daemons.pid_of(settings, name), settings.port_of(name)
        print(f"{name:<10} {f'runs, process {pid}' if pid else 'does not run'}{f', port {port}' if port else ''}")
    for node, state in bringup.node_states(settings).items():
        print(f"{node:<10} {state}")
    complete = bringup.is_up(settings)
    print(bringup.summary(settings) if complete else f"not complete; type: {up_words(directory)}")
    return 0 if complete else 1


def env(words: list[str]) -> int:
    """Prints the shell lines that make Slurm's commands talk to this cluster."""
    plain, values = split_words("env", words, keys=["dir"])
    no_words("env", plain)
    settings = there(values, verb="env")
    print(f"export SLURM_CONF={settings.path}/etc/slurm.conf")
    return 0


def named(verb: str, words: list[str], *, keys: list[str]) -> tuple[Settings, str, dict[str, str]]:
    """The cluster, the daemon that is meant and the values.  raises Mistake for a name that it does not have."""
    plain, values = split_words(verb, words, keys=keys)
    settings = there(values, verb=verb)
    names = settings.node_names if verb == "poweroff" else settings.daemon_names
    if len(plain) != 1:
        expected = f"one of {', '.join(names)}"
        raise Mistake(
            f"{verb} takes one name", got=" ".join(plain) or "none", expected=expected, typed=f"{COMMAND} {verb} node1"
        )
    if plain[0] not in names:
        raise unknown("name", plain[0], names, typed=f"{COMMAND} {verb} %s")
    need_root(verb)
    return settings, plain[0], values


def stop(words: list[str]) -> int:
    """One daemon does not run; steps of a node live on."""
    settings, name, values = named("stop", words, keys=["dir", "signal"])
    typed = values.get("signal", "TERM")
    if typed not in SIGNALS:
        raise unknown("signal", typed, list(SIGNALS), typed=f"{COMMAND} stop {name} signal=%s")
    with locked(settings.path):
        ran = stop_daemon(settings, name, signal.Signals[f"SIG{typed}"])
    print(f"{name} {'stopped' if ran else 'did not run'}")
    return 0


def start(words: list[str]) -> int:
    """One daemon runs."""
    settings, name, _ = named("start", words, keys=["dir"])
    with locked(settings.path):
        if daemons.pid_of(settings, name) is not None:
            print(f"{name} runs already")
            return 0
        bringup.check_ports(settings, [name])
        bringup.start_one(settings, name, deadline=time.monotonic() + settings.up_seconds)
    print(f"{name} runs")
    return 0


def poweroff(words: list[str]) -> int:
    """No process of a node is left, and none of them could say goodbye to Slurm."""
    settings, name, _ = named("poweroff", words, keys=["dir"])
    with locked(settings.path):
        killed = daemons.kill_members(settings, [name])
    print(f"{name} is off: {killed} processes killed. Type: {COMMAND} start {name}")
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {
    "up": up,
    "status": status,
    "env": env,
    "stop": stop,
    "start": start,
    "poweroff": poweroff,
    "down": down,
}


def run_verb(verb: str, words: list[str]) -> int:
    """Runs one verb; its exit status.  raises Mistake, Failure."""
    if verb not in VERBS:
        raise unknown("word", verb, list(VERBS), typed=f"{COMMAND} %s")
    try:
        return VERBS[verb](words)
    except BrokenPipeError:
        # Whoever read the output has left, as in `status | head`: Python must not complain about it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except PermissionError as error:
        raise Failure(f"{error}. Type: sudo {COMMAND} {verb}") from error
    except OSError as error:
        raise Failure(str(error)) from error
