"""Runs of the counting stages on a real Slurm: what a rank is to do, what status says, what comes out."""

import json
import subprocess

from tests.cluster.user import User

CHAIN = ["stage=s0,s1", "s0.steps=12", "s0.save_every_steps=4"]
ALONE = ["cluster=testcluster", "cluster.nodes=1", "cluster.ranks_per_node=1"]


def count_alone(user: User, name: str, *words: str, status: int | None = 0) -> subprocess.CompletedProcess:
    """The front door over the counting stages with one rank."""
    keys = [f"name={name}", "s0.warmup_steps=0", *CHAIN[1:], "logging.plots=false", "eval.models=base"]
    return user.type("submit", *words, *ALONE, *keys, module="tests.launch.counting", status=status)


def order(user: User, name: str, **words: object) -> None:
    """What one rank is to do: see tests/launch/counting.py."""
    user.file(name).mkdir(parents=True, exist_ok=True)
    part = user.file(name, "orders.part")
    part.write_text(json.dumps(words))
    part.rename(part.with_name("orders.json"))


def told_of(user: User, name: str, stage: str) -> str:
    """The line of a stage in what `submit status` prints."""
    told = user.type("status", f"name={name}").stdout
    return next(line for line in told.splitlines() if line.startswith(f"{stage} "))


def log_of(user: User, name: str, stage: str) -> str:
    """What rank 0 has said."""
    path = user.file(name, stage, "log", "rank0.log")
    return path.read_text() if path.exists() else ""


def total(user: User, name: str, stage: str) -> int:
    """What the stages make: the sum of the numbers of all steps."""
    return int(user.file(name, stage, "out", "model", "total.txt").read_text())
