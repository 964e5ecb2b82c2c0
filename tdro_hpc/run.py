"""What one rank of a stage job executes: its place among the ranks, its log, its signals, the stage, DONE.json.

    python -m tdro_hpc.run runs/demo/s0                          a stage with the config.yaml that lies in its folder
    python -m tdro_hpc.run stage=s0 config=demo name=mine        the same with keys as submit takes them
    srun --kill-on-bad-exit=1 python -m tdro_hpc.run stage=s0    on all ranks of a Slurm job

Several ranks without srun: start it once a rank, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set.
Ends with 0 = done, 1 = failed, 2 = a mistake in the call, 3 = stopped and saved, the same line continues. Under Slurm a
stopped job ends with 0 when it is back in the queue, else with 75.
"""

import contextlib
import ctypes
import importlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from tdro_hpc.config.load import load_config
from tdro_hpc.config.schema import Config
from tdro_hpc.launch.chain import save_plan_by_hand
from tdro_hpc.launch.drawing import draw_plots, draw_report
from tdro_hpc.launch.job.begin import begin_by_hand, begin_in_slurm
from tdro_hpc.launch.job.first_cause import is_second_hand, wait_for_another
from tdro_hpc.launch.job.hold import TakenOver, check_hold, join_hold, taken_over
from tdro_hpc.launch.job.last_words import leave_trace
from tdro_hpc.launch.job.place import SLURM, Place, is_rank_of_slurm, place_by_hand, place_in_slurm
from tdro_hpc.launch.job.rank_log import mark_attempt, set_logging, write_to
from tdro_hpc.launch.job.requeue import STOPPED_CODE as SLURM_STOPPED_CODE
from tdro_hpc.launch.job.requeue import after_stop
from tdro_hpc.launch.jobs import append_event, read_jsonl, rows_of_this_making, seconds_spent
from tdro_hpc.launch.keys import result_keys
from tdro_hpc.launch.local.executor import rendezvous_file
from tdro_hpc.launch.record import FAILED, code_version, inputs_of, write_done, write_failed
from tdro_hpc.launch.stage import Stage
from tdro_hpc.stages.graph import stage_graph

DONE_CODE, FAILED_CODE, MISTAKE_CODE, STOPPED_CODE = 0, 1, 2, 3
GraphOf = Callable[[Config], dict[str, Stage]]
StageFunction = Callable[..., None]  # run(config, stage, run_dir, process)
FunctionOf = Callable[[str], StageFunction]
Begin = Callable[[], int | None]  # on rank 0, before any rank looks at the stage's files; a number = leave with it

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_DEATH_OF_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
_SECOND_HAND_SECONDS = 1.5  # that a rank which only noticed a failure leaves to the one that has it
# Under Slurm the others may be gone because their node is. Slurm notices that after its SlurmdTimeout, ends this rank
# and puts the job back; a rank that leaves with a failure before would end the job for good.
_NODE_SECONDS = 600.0


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
    if environment.cluster == SLURM:
        place = place_in_slurm(os.environ)
        mark_attempt(place)
    else:
        _die_with(int(environment.job_id))
        place = Place(
            job=environment.job_id,
            rank=environment.global_rank,
            world=environment.num_tasks,
            local_rank=environment.local_rank,
            local_world=environment.num_tasks // environment.num_nodes,
            rendezvous=_rendezvous_of(environment),
        )
    write_to(stage_dir / "log" / f"rank{place.rank}.log")
    when = time.strftime("%Y-%m-%d %H:%M:%S")
    again = f" restart {place.restart}" if place.restart else ""
    print(f"--- job {place.job}{again} rank {place.rank} of {place.world} on {socket.gethostname()} {when}")
    try:
        config, stage = read_stage(stage_dir, kind, graph_of)
        begin = partial(_begin_submitted, stage_dir, config, stage, place) if place.executor == SLURM else None
        code = run_rank(stage_dir, config, stage, place, early=early, begin=begin, function_of=function_of)
    except BaseException as error:
        _fail(stage_dir, place, error)
    if place.executor == SLURM and code:
        sys.exit(code)
    return "stopped" if code == STOPPED_CODE else "done"


def run_rank(
    stage_dir: Path,
    config: Config,
    stage: Stage,
    place: Place,
    *,
    early: list[int],
    begin: Begin | None,
    function_of: FunctionOf,
) -> int:
    """Run the stage in `stage_dir` as this rank, after rank 0 has begun it; the exit code.

    early   signals that came before the stop flag was there
    begin   None = the stage has been begun by whoever started this job
    raises  whatever the stage raises
    """
    began = time.time()
    verdict = begin() if begin is not None and place.rank == 0 else None
    if verdict is not None and place.world == 1:
        return verdict
    _set_environment(config, place)
    set_logging(place)
    # torch is imported here at the earliest, after its environment is set.
    from tdro_hpc.parallel.process import end_process, start_process, wait_for_all
    from tdro_hpc.training.stop import Stopped, install_stop_handlers

    flag = install_stop_handlers(early)
    finish = partial(_finish, config, stage, stage_dir, place, began) if verdict is None and place.rank == 0 else None
    facts = _facts_of(config, stage, stage_dir.parent, place) if finish else {}
    run = function_of(stage.kind)
    try:
        process = start_process(
            config.parallel,
            rank=place.rank,
            world=place.world,
            local_rank=place.local_rank,
            rendezvous=place.rendezvous,
            local_world=place.local_world,
            meshed=stage.trains,
        )
        verdict = _verdict_for_all(verdict) if begin is not None else None
        if verdict is not None:
            end_process()
            return verdict
        if place.executor == SLURM:
            join_hold(stage_dir, place.job, place.restart)
        run(config, stage, stage_dir.parent, process)
        if finish is not None:
            finish(**facts)
        # DONE.json is written before any rank leaves: what goes wrong while the group is taken down costs nothing.
        wait_for_all()
        end_process()
    except Stopped as stop:
        print(stop) if place.rank == 0 else None
        reason = flag.reason if flag.requested else stop.reason
        code = _leave_stopped(config, stage_dir, place, stop.step, stop.steps, reason)
        end_process()
        return code
    return DONE_CODE


def _verdict_for_all(verdict: int | None) -> int | None:
    """What rank 0 has found, on all ranks. They come here when rank 0 has begun the stage, not before."""
    import torch

    from tdro_hpc.parallel.process import broadcast_from_first

    number = int(broadcast_from_first(torch.tensor(-1 if verdict is None else verdict)))
    return None if number < 0 else number


def _facts_of(config: Config, stage: Stage, run_dir: Path, place: Place) -> dict[str, Any]:
    # The keys as they are before the work: a data file that changes meanwhile must show up as drift.
    return {
        "inputs": inputs_of(stage, run_dir),
        "keys": result_keys(config, stage, place.world),
        "code": code_version(),
    }


def _leave_stopped(config: Config, stage_dir: Path, place: Place, step: int, steps: int, reason: str) -> int:
    """Exit code of a rank that was stopped; rank 0 notes it, and decides under Slurm what follows."""
    if place.executor != SLURM:
        if place.rank == 0:
            append_event(stage_dir, "stopped", job=place.job, step=step, steps=steps, reason=reason)
        return STOPPED_CODE
    if place.rank != 0:
        # Any other code would let srun end rank 0 while it talks to Slurm.
        return DONE_CODE
    code, then = after_stop(stage_dir, config.cluster, place, step=step, steps=steps, reason=reason)
    print(then)
    return code


def read_stage(stage_dir: Path, kind: str, graph_of: GraphOf) -> tuple[Config, Stage]:
    """The config in the folder of a stage, and the stage. kind = empty: whatever the folder is for.

    raises ValueError when the folder is not one of a stage
    """
    path = stage_dir / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"{path} is missing. Give the folder of a stage that was planned before, such as runs/demo/s0; "
            "python -m tdro_hpc.submit makes it. Or type stage=s0 and keys."
        )
    config = load_config([f"config={path}"]).config
    stage = _stage_of(config, stage_dir.name, graph_of, where=str(path))
    assert kind in ("", stage.kind), f"{stage.name} is of kind {stage.kind}, not {kind}"
    return config, stage


def _stage_of(config: Config, name: str, graph_of: GraphOf, *, where: str) -> Stage:
    graph = graph_of(config)
    if name not in graph:
        raise ValueError(f"{where} knows no stage {name}; it has {', '.join(graph)}.")
    return graph[name]


def _begin_submitted(stage_dir: Path, config: Config, stage: Stage, place: Place) -> int | None:
    inputs = inputs_of(stage, stage_dir.parent)
    return begin_in_slurm(stage_dir, place, keys=result_keys(config, stage, place.world), inputs=inputs)


def _begin_by_hand(stage_dir: Path, config: Config, stage: Stage, place: Place, *, save: bool) -> int | None:
    try:
        made = {"keys": result_keys(config, stage, place.world), "inputs": inputs_of(stage, stage_dir.parent)}
        return begin_by_hand(stage_dir, config, stage, place, **made, save=save)
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return MISTAKE_CODE


def _finish(
    config: Config,
    stage: Stage,
    stage_dir: Path,
    place: Place,
    began: float,
    *,
    keys: Mapping[str, Any],
    inputs: Mapping[str, str],
    code: str,
) -> None:
    """Rank 0, when all ranks are through: plots, DONE.json, the report of the run."""
    if config.logging.plots:
        draw_plots(stage_dir)
    seconds = seconds_spent(rows_of_this_making(read_jsonl(stage_dir / "jobs.jsonl"))) + time.time() - began
    check_hold()
    write_done(stage_dir, stage, keys=keys, inputs=inputs, code=code, ranks=place.world, seconds=seconds)
    print(f"{stage.name} done after {seconds:.0f} s")
    if config.logging.plots:
        # After DONE.json: the report tells that the stage is done.
        draw_report(stage_dir.parent)


def _fail(stage_dir: Path, place: Place, error: BaseException, *, draw: bool = False) -> NoReturn:
    """Note the first cause in FAILED.json, the traceback in a file beside the log, and end this process now.

    draw  write the report of the run anew; of a job the front door does that, when the job is over
    """
    if isinstance(error, TakenOver):
        _end_now(str(error), SLURM_STOPPED_CODE)
    trace, words = leave_trace(stage_dir, place.rank, error)
    if place.world > 1 and is_second_hand(words):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Slurm knows better, and ends what is left
        several_nodes = place.executor == SLURM and place.local_world < place.world
        wait_for_another(stage_dir / FAILED, _NODE_SECONDS if several_nodes else _SECOND_HAND_SECONDS)
    owner = taken_over()  # looked up as late as possible: the others may have gone because Slurm gave this node up
    if owner:
        _end_now(owner, SLURM_STOPPED_CODE)
    with contextlib.suppress(OSError):  # launch/job/aftermath.py finds that a rank left without a word
        write_failed(stage_dir, rank=place.rank, error=words, log=trace)
    if draw:
        draw_report(stage_dir.parent)
    _end_now(f"rank {place.rank} failed: {words.splitlines()[0]} (traceback in {trace})", FAILED_CODE)


def _end_now(words: str, code: int) -> NoReturn:
    with contextlib.suppress(OSError):  # nobody reads it any more when srun is gone
        print(words)
        sys.stdout.flush()
        sys.stderr.flush()
    # Not sys.exit: that waits for threads which may hang in a collective with ranks that are gone.
    os._exit(code)


def _note_signals() -> list[int]:
    """Keep stop signals in the list returned until the stop flag is there: importing torch takes seconds."""
    early: list[int] = []
    for number in _STOP_SIGNALS:
        # Also takes the place of submitit's handler, which would raise in the middle of a collective or a save.
        signal.signal(number, lambda number, frame: early.append(number))
    # Before any thread or child of ours: they inherit it, and live on when Slurm tells every process of the step.
    # It waits until training/stop.py looks. Threads that numpy has started before may still take it: see the handler.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    return early


def _die_with(parent: int) -> None:
    """End this rank when its supervisor ends: nobody would notice it any more, and a second copy could be started."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_DEATH_OF_PARENT, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(FAILED_CODE)


def _rendezvous_of(environment: Any) -> str:
    """Where the ranks of a job on this machine find each other: a file."""
    if environment.num_tasks == 1:
        return ""
    return f"file://{rendezvous_file(environment.paths.submitted_pickle)}"


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


def read_call(arguments: list[str], graph_of: GraphOf) -> tuple[Path, Config, Stage, bool]:
    """(stage folder, config, stage, whether keys were typed) of <folder> or stage=s1 key=value ...

    raises ValueError with every mistake
    """
    named = [word.removeprefix("stage=") for word in arguments if word.startswith("stage=")]
    if len(arguments) == 1 and not named:
        stage_dir = Path(arguments[0]).resolve()
        return stage_dir, *read_stage(stage_dir, "", graph_of), False
    if len(named) != 1:
        raise ValueError(f"One stage at a time: got {len(named)} times stage=. Type stage=s1, then the keys.")
    keys = [word for word in arguments if not word.startswith("stage=")]
    config = load_config(keys, call_options=("stage",)).config
    stage = _stage_of(config, named[0], graph_of, where="This call")
    return Path(config.runs_dir, config.name, stage.name).resolve(), config, stage, True


def main(arguments: list[str], *, graph_of: GraphOf = stage_graph, function_of: FunctionOf = stage_function) -> int:
    """Run one stage by hand; the exit code."""
    if not arguments or arguments[0] in ("help", "-h", "--help"):
        print(__doc__)
        return DONE_CODE if arguments else MISTAKE_CODE
    early = _note_signals()
    try:
        in_slurm = is_rank_of_slurm(os.environ, terminal=sys.stdin is not None and sys.stdin.isatty())
        place = place_in_slurm(os.environ) if in_slurm else place_by_hand(os.environ)
        stage_dir, config, stage, typed = read_call(arguments, graph_of)
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return MISTAKE_CODE
    mark_attempt(place) if in_slurm else None
    begun: list[Path] = []  # filled when this process has made the stage its own

    def begin() -> int | None:
        verdict = _begin_by_hand(stage_dir, config, stage, place, save=typed)
        begun.extend([stage_dir] if verdict is None else [])
        save_plan_by_hand(graph_of(config), stage_dir) if begun else None
        return verdict

    draws = place.rank == 0 and not in_slurm and config.logging.plots  # in Slurm launch/job/aftermath.py does
    try:
        code = run_rank(stage_dir, config, stage, place, early=early, begin=begin, function_of=function_of)
    except BaseException as error:
        _note_end(begun, place, FAILED_CODE)
        _fail(stage_dir, place, error, draw=draws)
    _note_end(begun, place, code)
    if code == STOPPED_CODE and draws:
        draw_report(stage_dir.parent)
    return code


def _note_end(begun: list[Path], place: Place, code: int) -> None:
    """Rank 0 outside of Slurm, where nobody else sees it end."""
    for stage_dir in begun if place.executor != SLURM else []:
        with contextlib.suppress(OSError):
            append_event(stage_dir, "end", job=place.job, exit_codes=[code])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
