"""What one rank of a stage job executes: its place among the ranks, its log, its signals, the stage, DONE.json.

    python -m tdro_hpc.run runs/demo/s0

runs a stage by hand, with the config.yaml that submit left in its folder. Several ranks: start it once a rank, with
RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set. Ends with 0 = done, 1 = failed, 2 = a mistake in the
call, 3 = stopped and saved, the same line continues.
"""

import contextlib
import ctypes
import importlib
import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tdro_hpc.config.load import load_config
from tdro_hpc.config.schema import Config
from tdro_hpc.launch.drawing import draw_plots, draw_report
from tdro_hpc.launch.executor import rendezvous_file
from tdro_hpc.launch.jobs import (
    append_event,
    append_start,
    last_row,
    read_jsonl,
    rows_of_this_making,
    running_job,
    seconds_spent,
    stage_lock,
)
from tdro_hpc.launch.keys import result_keys
from tdro_hpc.launch.record import code_version, inputs_of, read_state, write_done, write_failed
from tdro_hpc.launch.stage import Stage
from tdro_hpc.stages.graph import stage_graph

DONE_CODE, FAILED_CODE, MISTAKE_CODE, STOPPED_CODE = 0, 1, 2, 3
GraphOf = Callable[[Config], dict[str, Stage]]
StageFunction = Callable[..., None]  # run(config, stage, run_dir, process)
FunctionOf = Callable[[str], StageFunction]

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_DEATH_OF_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
# What a rank says when it failed because another one did. It waits before it claims to be the first cause.
_SECOND_HAND = ("another rank", "connection closed", "connection reset", "broken pipe", "nccl", "gloo", "timed out")
_SECOND_HAND_SECONDS = 1.5


@dataclass(frozen=True)
class Place:
    """Where this process stands among those of its job."""

    job: str
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    rendezvous: str = ""  # file:// or tcp://, the same on all ranks; empty for one rank


@dataclass(frozen=True)
class StageJob:
    """What submitit pickles for each rank: a folder and a kind. Everything else is read from the folder."""

    folder: Path
    kind: str

    def __call__(self) -> str:
        """Run the stage on this rank; `done` or `stopped`."""
        return run_as_job(self.folder, self.kind, graph_of=stage_graph, function_of=stage_function)


def stage_function(kind: str) -> StageFunction:
    """The `run` of tdro_hpc.stages.<kind>; imports torch."""
    function: StageFunction = importlib.import_module(f"tdro_hpc.stages.{kind}").run
    return function


def run_as_job(stage_dir: Path, kind: str, *, graph_of: GraphOf, function_of: FunctionOf) -> str:
    """Run one rank of a job that submitit started; `done` or `stopped`. A failure ends this process."""
    early = _note_signals()
    from submitit import JobEnvironment

    environment = JobEnvironment()
    if environment.cluster == "local":
        _die_with(int(environment.job_id))
    place = Place(
        job=environment.job_id,
        rank=environment.global_rank,
        world=environment.num_tasks,
        local_rank=environment.local_rank,
        local_world=environment.num_tasks // environment.num_nodes,
        rendezvous=_rendezvous_of(environment),
    )
    _write_to(stage_dir / "log" / f"rank{place.rank}.log")
    when = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"--- job {place.job} rank {place.rank} of {place.world} on {socket.gethostname()} {when}")
    try:
        return run_rank(stage_dir, kind, place, early=early, graph_of=graph_of, function_of=function_of)
    except BaseException as error:
        _fail(stage_dir, place, error)


def run_rank(
    stage_dir: Path, kind: str, place: Place, *, early: list[int], graph_of: GraphOf, function_of: FunctionOf
) -> str:
    """Run the stage in `stage_dir` as this rank: `done`, or `stopped` when it was asked to stop and has saved.

    early   signals that came before the stop flag was there
    raises  whatever the stage raises
    """
    began = time.time()
    config, stage = read_stage(stage_dir, kind, graph_of)
    run_dir = stage_dir.parent
    inputs = inputs_of(stage, run_dir)
    # The keys as they are before the work: a data file that changes meanwhile must show up as drift.
    keys = result_keys(config, stage, place.world)
    code = code_version()
    _set_environment(config, place)
    _set_logging(place)
    # torch is imported here at the earliest, after its environment is set.
    from tdro_hpc.parallel.process import end_process, start_process, wait_for_all
    from tdro_hpc.training.stop import Stopped, install_stop_handlers

    flag = install_stop_handlers()
    for number in early:
        flag.request(number)
    run = function_of(stage.kind)
    try:
        process = start_process(
            config.parallel,
            rank=place.rank,
            world=place.world,
            local_rank=place.local_rank,
            rendezvous=place.rendezvous,
            local_world=place.local_world,
        )
        run(config, stage, run_dir, process)
        if place.rank == 0:
            _finish(config, stage, stage_dir, place, keys=keys, inputs=inputs, code=code, began=began)
        # DONE.json is written before any rank leaves: what goes wrong while the group is taken down costs nothing.
        wait_for_all()
        end_process()
    except Stopped as stop:
        if place.rank == 0:
            append_event(stage_dir, "stopped", job=place.job, step=stop.step, steps=stop.steps, reason=stop.reason)
            print(stop)
        end_process()
        return "stopped"
    return "done"


def read_stage(stage_dir: Path, kind: str, graph_of: GraphOf) -> tuple[Config, Stage]:
    """The config in the folder of a stage, and the stage. kind = empty: whatever the folder is for.

    raises ValueError when the folder is not one of a stage
    """
    path = stage_dir / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"{path} is missing. Give the folder of a stage that was planned before, such as runs/demo/s0; "
            "python -m tdro_hpc.submit makes it."
        )
    config = load_config([f"config={path}"]).config
    graph = graph_of(config)
    if stage_dir.name not in graph:
        raise ValueError(f"{path} knows no stage {stage_dir.name}; it has {', '.join(graph)}.")
    stage = graph[stage_dir.name]
    assert kind in ("", stage.kind), f"{stage.name} is of kind {stage.kind}, not {kind}"
    return config, stage


def _finish(
    config: Config,
    stage: Stage,
    stage_dir: Path,
    place: Place,
    *,
    keys: Mapping[str, Any],
    inputs: Mapping[str, str],
    code: str,
    began: float,
) -> None:
    """Rank 0, when all ranks are through: plots, DONE.json, the report of the run."""
    if config.logging.plots:
        draw_plots(stage_dir)
    seconds = seconds_spent(rows_of_this_making(read_jsonl(stage_dir / "jobs.jsonl"))) + time.time() - began
    write_done(stage_dir, stage, keys=keys, inputs=inputs, code=code, ranks=place.world, seconds=seconds)
    print(f"{stage.name} done after {seconds:.0f} s")
    if config.logging.plots:
        # After DONE.json: the report tells that the stage is done.
        draw_report(stage_dir.parent)


def _fail(stage_dir: Path, place: Place, error: BaseException, *, draw: bool = False) -> NoReturn:
    """Note the first cause in FAILED.json, the traceback in a file beside the log, and end this process now.

    draw  write the report of the run anew; of a job the front door does that, when the job is over
    """
    # Not in the log itself: that of rank 0 is shown to a person, who is told the first cause in words.
    trace = stage_dir / "log" / f"rank{place.rank}-error.txt"
    trace.parent.mkdir(parents=True, exist_ok=True)
    trace.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    words = str(error) if isinstance(error, ValueError) and str(error) else f"{type(error).__name__}: {error}"
    if place.world > 1 and any(sign in words.lower() for sign in _SECOND_HAND):
        time.sleep(_SECOND_HAND_SECONDS)
    write_failed(stage_dir, rank=place.rank, error=words, log=trace)
    print(f"rank {place.rank} failed: {words.splitlines()[0]} (traceback in {trace})")
    if draw:
        draw_report(stage_dir.parent)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: that waits for threads which may hang in a collective with ranks that are gone.
    os._exit(FAILED_CODE)


def _note_signals() -> list[int]:
    """Keep stop signals in the list returned until the stop flag is there: importing torch takes seconds."""
    early: list[int] = []
    for number in _STOP_SIGNALS:
        # Also takes the place of submitit's handler, which would raise in the middle of a collective or a save.
        signal.signal(number, lambda number, frame: early.append(number))
    return early


def _die_with(parent: int) -> None:
    """End this rank when its supervisor ends: nobody would notice it any more, and a second copy could be started."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_DEATH_OF_PARENT, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(FAILED_CODE)


def _rendezvous_of(environment: Any) -> str:
    """Where the ranks of this job find each other: a file on one machine, a port of the first of several."""
    if environment.num_tasks == 1:
        return ""
    if environment.num_nodes > 1:
        return f"tcp://{environment.hostnames[0]}:{20000 + int(environment.raw_job_id) % 10000}"
    return f"file://{rendezvous_file(environment.paths.submitted_pickle)}"


def _write_to(log: Path) -> None:
    """Append everything that this process and its children say to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _set_environment(config: Config, place: Place) -> None:
    """CPU threads and GPUs of this rank; has to come before torch is imported."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = config.parallel.threads_per_rank or max(1, cores // place.local_world)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["PYTHONUNBUFFERED"] = "1"
    if not sys.stdout.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # bars of other packages fill a log with carriage returns
    if config.cluster.gpus_per_node == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _set_logging(place: Place) -> None:
    """Our own notes in the log of rank 0, warnings in all; of other packages, warnings only."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    # submitit tells on every rank that its job began and ended, twice.
    logging.getLogger("submitit").setLevel(logging.ERROR)
    logging.getLogger("tdro_hpc").setLevel(logging.INFO if place.rank == 0 else logging.WARNING)


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


def _begin_by_hand(stage_dir: Path, place: Place, graph_of: GraphOf) -> bool:
    """Note this process as the job of the stage; False when the stage is done already.

    raises ValueError when it runs, or is to be made again, which submit prepares
    """
    config, stage = read_stage(stage_dir, "", graph_of)
    inputs = inputs_of(stage, stage_dir.parent)
    with stage_lock(stage_dir):
        state = read_state(stage_dir)
        row = running_job(stage_dir)
        if row is not None:
            raise ValueError(f"{stage.name} is running already: job {row['job']}, pid {row['pid']} on {row['host']}.")
        if state.status == "done":
            return False
        if state.status == "stale":
            raise ValueError(
                f"{stage.name} has to be made again ({state.problem}), which submit prepares. "
                f"Type: python -m tdro_hpc.submit stage={stage.name} name={stage_dir.parent.name}"
            )
        (stage_dir / "FAILED.json").unlink(missing_ok=True)
        append_start(
            stage_dir,
            job=place.job,
            pid=os.getpid(),
            ranks=place.world,
            keys=result_keys(config, stage, place.world),
            inputs=inputs,
            fresh=last_row(read_jsonl(stage_dir / "jobs.jsonl"), "start") is None,
        )
    return True


def main(arguments: list[str], *, graph_of: GraphOf = stage_graph, function_of: FunctionOf = stage_function) -> int:
    """Run one stage by hand; the exit code."""
    if len(arguments) != 1 or arguments[0] in ("help", "-h", "--help"):
        print(__doc__)
        return DONE_CODE if arguments[:1] in (["help"], ["-h"], ["--help"]) else MISTAKE_CODE
    early = _note_signals()
    stage_dir = Path(arguments[0]).resolve()
    try:
        place = place_by_hand(os.environ)
        # Every rank looks, or the others would wait for rank 0.
        done = read_state(stage_dir).status == "done"
        if done or (place.rank == 0 and not _begin_by_hand(stage_dir, place, graph_of)):
            print(f"{stage_dir.name} is done: {stage_dir / 'DONE.json'}")
            return DONE_CODE
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return MISTAKE_CODE
    code = FAILED_CODE
    try:
        outcome = run_rank(stage_dir, "", place, early=early, graph_of=graph_of, function_of=function_of)
        code = DONE_CODE if outcome == "done" else STOPPED_CODE
    except BaseException as error:
        _note_end(stage_dir, place, FAILED_CODE)
        _fail(stage_dir, place, error, draw=place.rank == 0 and _draws(stage_dir, graph_of))
    _note_end(stage_dir, place, code)
    if code == STOPPED_CODE and place.rank == 0 and _draws(stage_dir, graph_of):
        draw_report(stage_dir.parent)
    return code


def _draws(stage_dir: Path, graph_of: GraphOf) -> bool:
    return read_stage(stage_dir, "", graph_of)[0].logging.plots


def _note_end(stage_dir: Path, place: Place, code: int) -> None:
    if place.rank == 0:
        with contextlib.suppress(OSError):
            append_event(stage_dir, "end", job=place.job, exit_codes=[code])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
