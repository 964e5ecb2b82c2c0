"""Words of the command line in, frozen Settings out. Starts nothing and reads no process."""

import difflib
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

COMMAND = "slurm/testcluster"
FIRST_NODE_PORT = 11  # added to the base port: node1; below it slurmctld, slurmdbd and mariadbd


class Mistake(Exception):
    """What was typed, or this machine, does not fit; the text says what, got, expected and what to type."""

    def __init__(self, what: str, *, got: str, expected: str, typed: str):
        super().__init__(f"{what}\n  got:      {got}\n  expected: {expected}\n  type:     {typed}")


def key(default: Any, meaning: str) -> Any:
    """A field of Settings: its default, and what the help says about it."""
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Settings:
    dir: str = key(f"/var/tmp/tdro-testcluster-{os.getuid()}", "everything of this cluster lies here")
    port: int = key(16800, "base port; another cluster on this machine takes one 100 away")
    nodes: int = key(3, "node1 ... nodeN, 1 to 64")
    cpus: int = key(16, "of a node, claimed, whatever this machine has")
    memory_mb: int = key(64000, "of a node, claimed")
    gpus: int = key(4, "of a node, fake: counted and numbered, links to /dev/null")
    accounting: bool = key(False, "slurmdbd and mariadbd too, so that sacct answers")
    enforce: bool = key(False, "limits of accounts hold; needs accounting=true")
    preempt: str = key("requeue", "requeue or cancel: what partition high does to jobs of partition main")
    user_signal: bool = key(True, "preempted jobs get the signal of --signal")
    requeue: bool = key(True, "false: jobs are requeued only if they ask for it")
    grace_seconds: int = key(10, "between the warning of a preemption and the end")
    max_minutes: int = key(240, "longest and default time limit of a job")
    cred_expire_seconds: int = key(10, "a requeued job waits this long before it starts again")
    kill_wait_seconds: int = key(5, "between SIGTERM and SIGKILL")
    node_timeout_seconds: int = key(20, "a silent node is DOWN after this")
    up_seconds: int = key(60, "up gives up after this")

    @property
    def path(self) -> Path:
        return Path(self.dir)

    @property
    def node_names(self) -> list[str]:
        return [f"node{number}" for number in range(1, self.nodes + 1)]

    @property
    def daemon_names(self) -> list[str]:
        """Names of all daemons in the order in which they are started."""
        accounting = ["mariadbd", "slurmdbd"] if self.accounting else []
        return ["munged", *accounting, "slurmctld", *self.node_names]

    def port_of(self, daemon: str) -> int | None:
        """TCP port on which a daemon listens; munged has none."""
        fixed = {"munged": None, "slurmctld": self.port, "slurmdbd": self.port + 1, "mariadbd": self.port + 2}
        return fixed[daemon] if daemon in fixed else self.port + FIRST_NODE_PORT - 1 + int(daemon.removeprefix("node"))

    def address_of(self, host: str) -> str:
        """Loopback address of a host; clusters with different base ports get different ones."""
        number = 254 if host == "controller" else int(host.removeprefix("node"))
        return f"127.1.{self.port // 100 % 256}.{number}"


_RANGES = {
    "port": (1024, 65000),
    "nodes": (1, 64),
    "cpus": (1, 256),
    "memory_mb": (100, 10**7),
    "gpus": (0, 16),
    "grace_seconds": (0, 3600),
    "max_minutes": (1, 10**5),
    "cred_expire_seconds": (5, 3600),
    "kill_wait_seconds": (1, 600),
    "node_timeout_seconds": (5, 3600),
    "up_seconds": (5, 3600),
}


def describe_keys() -> str:
    """One line a key: its name, its default and what it means."""
    defaults = {each.name: text_of(each.default) for each in fields(Settings)}
    meanings = {each.name: each.metadata["meaning"] for each in fields(Settings)}
    return "\n".join(f"  {f'{name}={default}':<42} {meanings[name]}" for name, default in defaults.items())


def text_of(value: Any) -> str:
    """A value as it is typed."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def unknown(kind: str, got: str, known: list[str], *, typed: str) -> Mistake:
    """The mistake of a name that does not exist; `typed` holds %s where the nearest name belongs."""
    near = difflib.get_close_matches(got, known, n=1, cutoff=0.4)
    hint = f"; the nearest is {near[0]}" if near else ""
    return Mistake(
        f"unknown {kind}", got=got, expected=", ".join(known) + hint, typed=typed % (near[0] if near else known[0])
    )


def split_words(verb: str, words: list[str], *, keys: list[str]) -> tuple[list[str], dict[str, str]]:
    """Plain words, and key=value words as a dict.  raises Mistake for a key that is not in `keys` or comes twice."""
    plain = [word for word in words if "=" not in word]
    values: dict[str, str] = {}
    for word in (word for word in words if "=" in word):
        name, _, value = word.partition("=")
        if name not in keys:
            raise unknown(f"key of {verb}", name, keys, typed=f"{COMMAND} {verb} %s={value}")
        if name in values:
            raise Mistake(
                f"the key {name} was given twice",
                got=f"{name}={values[name]} and {word}",
                expected="each key once",
                typed=f"{COMMAND} {verb} {word}",
            )
        values[name] = value
    return plain, values


def value_of(name: str, text: str, *, verb: str) -> Any:
    """The value of a key, in the type of its default.  raises Mistake if the text does not fit."""
    default = {each.name: each.default for each in fields(Settings)}.get(name, False)
    typed = f"{COMMAND} {verb} {name}={text_of(default)}"
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise Mistake(f"{name} is a switch", got=f"{name}={text}", expected="true or false", typed=typed)
        return text == "true"
    if isinstance(default, int):
        low, high = _RANGES[name]
        if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
            expected = f"a whole number from {low} to {high}"
            raise Mistake(f"{name} does not fit", got=f"{name}={text}", expected=expected, typed=typed)
        return int(text)
    if name == "preempt" and text not in ("requeue", "cancel"):
        raise Mistake("preempt does not fit", got=f"preempt={text}", expected="requeue or cancel", typed=typed)
    return directory_of(text, verb=verb) if name == "dir" else text


def directory_of(text: str, *, verb: str) -> str:
    """An absolute path that fits into Slurm's and munge's files: no blanks, and short enough for a socket's name."""
    path = os.path.abspath(os.path.expanduser(text)) if text else ""
    plain = path.replace("/", "").replace("-", "").replace("_", "").replace(".", "")
    if not plain.isascii() or not plain.isalnum() or len(path) > 80:
        expected = "a path of at most 80 letters, digits and . - _ /, not the root directory"
        raise Mistake(
            "dir does not fit", got=f"dir={text}", expected=expected, typed=f"{COMMAND} {verb} dir={Settings.dir}"
        )
    return path


def settings_of(values: dict[str, str]) -> Settings:
    """Settings of `up`: what the cluster in that directory was made with, or the defaults and what was typed.

    raises Mistake  if a value does not fit, or differs from the cluster that is already there
    """
    typed = {name: value_of(name, text, verb="up") for name, text in values.items()}
    saved = saved_settings(Path(typed.get("dir", Settings.dir)))
    if saved is None:
        settings = Settings(**typed)
    else:
        settings = saved
        differing = [name for name, value in typed.items() if value != getattr(saved, name)]
        if differing:
            raise Mistake(
                f"the cluster in {saved.dir} was made with other values",
                got=" ".join(f"{name}={text_of(typed[name])}" for name in differing),
                expected=" ".join(f"{name}={text_of(getattr(saved, name))}" for name in differing),
                typed=f"{COMMAND} down dir={saved.dir}, then up again; or up with another dir= and port=",
            )
    if settings.enforce and not settings.accounting:
        raise Mistake(
            "limits are kept by the accounting",
            got="enforce=true accounting=false",
            expected="accounting=true with enforce=true",
            typed=f"{COMMAND} up enforce=true accounting=true",
        )
    return settings


def saved_settings(directory: Path) -> Settings | None:
    """Settings with which the cluster in a directory was made; None if there is none."""
    try:
        return Settings(**json.loads((directory / "settings.json").read_text()))
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise Mistake(
            "this cluster cannot be read",
            got=str(error),
            expected="a directory made by this script",
            typed=f"sudo {COMMAND} status dir={directory}",
        ) from None
    except (ValueError, TypeError) as error:
        raise Mistake(
            "settings.json cannot be read",
            got=f"{directory}/settings.json: {error}",
            expected="the file that this version of the script wrote",
            typed=f"{COMMAND} up with another dir=, and remove {directory} when nothing of it runs",
        ) from None


def save_settings(settings: Settings) -> None:
    """Writes settings.json, whole or not at all."""
    part = settings.path / "settings.json.part"
    part.write_text(json.dumps(asdict(settings), indent=1) + "\n")
    part.replace(settings.path / "settings.json")
