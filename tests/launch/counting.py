"""A real stage that counts steps, for tests of launching: checkpoints, metrics, agreed stops, and crashes to order.

    python -m tests.launch.counting submit ...      the front door with these stages instead of the package's
    python -m tests.launch.counting run <folder>    one rank by hand

<run>/orders.json = {"stage", "rank", "step", "how"} lets a rank raise, exit, be killed, fill the disk, or wait for the
file {"until"} of the run at a step, once.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdro_hpc.atomic import new_folder, write_text
from tdro_hpc.config.schema import Config
from tdro_hpc.launch.stage import Stage

_SECTIONS = ("seed", "s0")
STEP_SECONDS = 0.05


def counting_graph(config: Config) -> dict[str, Stage]:
    """s0 -> s1 -> s2-curr -> eval, each of config.s0.steps steps; eval on one rank."""
    return {
        "s0": Stage("s0", "s0", (), ("model",), _SECTIONS),
        "s1": Stage("s1", "s1", ("s0",), ("model",), _SECTIONS),
        "s2-curr": Stage("s2-curr", "s2", ("s1",), ("model",), _SECTIONS),
        "eval": Stage("eval", "eval", ("s0", "s2-curr"), ("model",), _SECTIONS, ranks="one"),
    }


def function_of(kind: str) -> Callable[..., None]:
    """The explicit mapping of kinds."""
    return {"s0": run, "s1": run, "s2": run, "eval": run}[kind]


@dataclass(frozen=True)
class CountingJob:
    """As tdro_hpc.run.StageJob, over the graph above."""

    folder: Path
    kind: str

    def __call__(self) -> str:
        from tdro_hpc.run import run_as_job

        return run_as_job(self.folder, self.kind, graph_of=counting_graph, function_of=function_of)


def run(config: Config, stage: Stage, run_dir: Path, process: Any) -> None:
    """Count to config.s0.steps, adding up step numbers; rank 0 writes checkpoints and the result."""
    from tdro_hpc.parallel.process import wait_for_all
    from tdro_hpc.training.stop import Stopped, stop_flag

    stage_dir = run_dir / stage.name
    saved = sorted(stage_dir.glob("checkpoints/step-*/state.json"))
    state = json.loads(saved[-1].read_text()) if saved else {"step": 0, "total": 0}
    first = process.data_rank == 0
    if first:
        print(f"{stage.name} begins after step {state['step']}", flush=True)
    for step in range(state["step"] + 1, config.s0.steps + 1):
        time.sleep(STEP_SECONDS)
        _obey(run_dir, stage.name, process.data_rank, step)
        state = {"step": step, "total": state["total"] + step}
        if first:
            clock = {"time": time.time(), "queries_per_second": 1.0, "eta_seconds": 90.0}
            row = {"stage": stage.name, "step": step, "steps": config.s0.steps, "loss": 1 / step, "clock": clock}
            with open(stage_dir / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{stage.name} step {step}/{config.s0.steps}", flush=True)
        stopping = stop_flag().agreed()
        if first and (stopping or step % config.s0.save_every_steps == 0):
            with new_folder(stage_dir / "checkpoints" / f"step-{step:08d}") as folder:
                (folder / "state.json").write_text(json.dumps(state))
        wait_for_all()
        if stopping and step < config.s0.steps:
            raise Stopped(stage.name, step, config.s0.steps, stop_flag().reason or "another rank was asked to stop")
    if first:
        write_text(stage_dir / "out" / "model" / "total.txt", str(state["total"]))
    wait_for_all()


def _obey(run_dir: Path, stage: str, rank: int, step: int) -> None:
    path = run_dir / "orders.json"
    try:
        orders = json.loads(path.read_text())
    except FileNotFoundError:  # also when another rank has just taken its own
        return
    if (orders.get("stage"), orders.get("rank"), orders.get("step")) != (stage, rank, step):
        return
    path.unlink()
    if orders["how"] == "raise":
        raise ValueError("the loss is not finite\nat row 7")
    if orders["how"] == "exit":
        os._exit(9)
    if orders["how"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if orders["how"] == "fill":
        _fill_disk(run_dir / "of-somebody-else.bin")
    while orders["how"] == "wait" and not (run_dir / orders["until"]).exists():
        time.sleep(0.05)


def _fill_disk(path: Path) -> None:
    with suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


if __name__ == "__main__":
    from tdro_hpc import run as run_module
    from tdro_hpc import submit as submit_module

    # Under its own name: what submitit pickles must not be a class of __main__.
    from tests.launch import counting

    program, *words = sys.argv[1:]
    if program == "submit":
        sys.exit(submit_module.main(words, graph_of=counting.counting_graph, job_of=counting.CountingJob))
    sys.exit(run_module.main(words, graph_of=counting.counting_graph, function_of=counting.function_of))
