"""The variables of a launcher in, the place of this process among the ranks of its job out. Reads no environment."""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

LOCAL, SLURM = "local", "slurm"
_FIRST_PORT, _PORTS = 20000, 10000  # below Linux's ephemeral ports, which begin at 32768
# Steps with numbers from here on are Slurm's own: the batch script, the shell of salloc.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class Place:
    """Where this process stands among those of its job."""

    job: str
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    rendezvous: str = ""  # file:// or tcp://, the same on all ranks; empty for one rank
    executor: str = LOCAL  # local or slurm
    restart: int = 0  # times that Slurm has started this job again


def is_rank_of_slurm(environment: Mapping[str, str], *, terminal: bool) -> bool:
    """Whether srun started this process as a rank.

    A batch script that calls Python directly has SLURM_PROCID=0 too, but no step. A person's shell in an allocation
    may be a step; it has a terminal, as no rank has. RANK and WORLD_SIZE are the word of a person.

    terminal  standard input is a terminal
    """
    step = environment.get("SLURM_STEP_ID", "")
    by_hand = "RANK" in environment and "WORLD_SIZE" in environment
    return (
        step.isdigit()
        and int(step) < _FIRST_SPECIAL_STEP
        and {"SLURM_JOB_ID", "SLURM_PROCID"} <= set(environment)
        and not terminal
        and not by_hand
    )


def place_in_slurm(environment: Mapping[str, str]) -> Place:
    """The place that Slurm's variables give a task of srun, under submitit or by hand."""
    job = environment["SLURM_JOB_ID"]
    restart = int(environment.get("SLURM_RESTART_COUNT", "0"))
    world = int(environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1"))
    nodes = _first_of(environment, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")
    hosts = hosts_of(nodes) if nodes else [socket.gethostname()]
    port = _FIRST_PORT + (int(job) + restart) % _PORTS
    host = hosts[0] if len(hosts) > 1 else "127.0.0.1"
    return Place(
        job=job,
        rank=int(environment["SLURM_PROCID"]),
        world=world,
        local_rank=int(environment.get("SLURM_LOCALID", "0")),
        local_world=_tasks_here(environment, world=world, nodes=len(hosts)),
        rendezvous=f"tcp://{host}:{port}" if world > 1 else "",
        executor=SLURM,
        restart=restart,
    )


def hosts_of(nodes: str) -> list[str]:
    """Names in a node list of Slurm: gpu[01-03],cpu1 -> gpu01, gpu02, gpu03, cpu1."""
    # submitit takes a sixth of a second to import: only where it is needed.
    from submitit.slurm.slurm import _parse_node_list

    hosts: list[str] = _parse_node_list(nodes)
    return hosts


def _tasks_here(environment: Mapping[str, str], *, world: int, nodes: int) -> int:
    """Tasks of this step on this node; Slurm writes 2(x3),1 for three nodes with two tasks and one with one."""
    text = _first_of(environment, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    counts: list[int] = []
    for part in text.split(",") if text else []:
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match:
            counts += [int(match[1])] * int(match[2] or 1)
    node = int(environment.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else -(-world // nodes)


def _first_of(environment: Mapping[str, str], *names: str) -> str:
    return next((environment[name] for name in names if environment.get(name)), "")


def place_by_hand(environment: Mapping[str, str]) -> Place:
    """The place that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT give; without them the only rank."""
    world = int(environment.get("WORLD_SIZE", "1"))
    job = f"hand-{socket.gethostname()}-{os.getpid()}"
    if world == 1:
        return Place(job=job)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ValueError(f"WORLD_SIZE is {world}, but {' and '.join(missing)} is not set. Set it, or unset WORLD_SIZE.")
    return Place(
        job=job,
        rank=int(environment["RANK"]),
        world=world,
        local_rank=int(environment.get("LOCAL_RANK", environment["RANK"])),
        local_world=int(environment.get("LOCAL_WORLD_SIZE", world)),
        rendezvous=f"tcp://{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}",
    )
