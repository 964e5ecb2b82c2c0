"""Runs a plan in the foreground: start a stage, follow it, and the next when DONE.json is there."""

import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from tdro_hpc.atomic import write_json
from tdro_hpc.config.load import save_config
from tdro_hpc.config.schema import Config
from tdro_hpc.launch.call import PROGRAM
from tdro_hpc.launch.drawing import draw_report
from tdro_hpc.launch.jobs import end_orphans, last_row, read_jsonl, running_job, stage_lock
from tdro_hpc.launch.local.executor import JobOf, ask_to_stop, submit_stage
from tdro_hpc.launch.look.progress import View, view_for
from tdro_hpc.launch.plan import SKIP, Plan, PlannedStage
from tdro_hpc.launch.record import (
    FAILED,
    StageState,
    clear_stage,
    inputs_of,
    mark_stale,
    read_json,
    read_state,
)
from tdro_hpc.launch.stage import Stage

DONE_CODE, FAILED_CODE, STOPPED_CODE, INTERRUPTED_CODE = 0, 1, 3, 130
_POLL_SECONDS = 0.1


@dataclass
class Signals:
    """Signals that this front door has had."""

    numbers: list[int] = field(default_factory=list)

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """Signal handler."""
        self.numbers.append(number)


@dataclass(frozen=True)
class Chain:
    """One run of a plan."""

    plan: Plan
    config: Config
    run_dir: Path  # absolute
    ranks: Mapping[str, int]  # processes of each stage
    job_of: JobOf
    line: str  # what to type to continue


def save_plan(plan: Plan, graph: Mapping[str, Stage], run_dir: Path, line: str) -> None:
    """Write plan.json: the stages of the run, which of them were asked for, and the line that did."""
    planned = {step.stage.name: step.action for step in plan.steps}
    stages = [
        {"name": stage.name, "kind": stage.kind, "needs": list(stage.needs), "action": planned.get(stage.name, "")}
        for stage in graph.values()
    ]
    write_json(run_dir / "plan.json", {"line": line, "time": time.time(), "stages": stages})


def save_plan_by_hand(graph: Mapping[str, Stage], stage_dir: Path) -> None:
    """Let status know a run in which a stage was started by hand: write plan.json, unless it is there."""
    if not (stage_dir.parent / "plan.json").exists():
        line = f"{PROGRAM} config={stage_dir / 'config.yaml'} stage={stage_dir.name}"
        save_plan(Plan(steps=()), graph, stage_dir.parent, line)


def run_chain(chain: Chain) -> int:
    """Bring all stages of the plan about, one after the other; the exit code."""
    for step in chain.plan.to_run:
        if step.fresh:
            # From here on nothing counts as done that is made from something older, also when this is interrupted.
            mark_stale(chain.run_dir / step.stage.name)
    with noted_signals() as signals, view_for(sys.stdout) as view:
        for step in chain.plan.steps:
            code = DONE_CODE if step.action == SKIP else _bring_about(chain, step, signals, view)
            if code != DONE_CODE:
                return code
    _close(chain)
    return DONE_CODE


def _bring_about(chain: Chain, step: PlannedStage, signals: Signals, view: View) -> int:
    stage_dir = chain.run_dir / step.stage.name
    name = step.stage.name
    if signals.numbers:
        view.say(f"{name} was not started. Continue with: {chain.line}")
        return _stop_code(signals)
    with stage_lock(stage_dir):
        running = running_job(stage_dir)
        if running is None and read_state(stage_dir).status == "done":
            view.say(f"{name} was done meanwhile")  # by another front door
            return DONE_CODE
        # Where it lies before its job says anything: the log is appended to across attempts.
        view.begin(stage_dir, name)
        job = None if running else _start(chain, step, stage_dir)
    if running:
        view.say(f"{name} is running already (job {running['job']}, pid {running['pid']}): it is followed")
    left = _follow(stage_dir, job, signals, view)
    view.end()
    if left:
        view.say(
            f"{name} goes on without this terminal. Stop it with: python -m tdro_hpc.submit cancel "
            f"name={chain.config.name}. Continue with: {chain.line}"
        )
        return _stop_code(signals)
    code = _outcome(chain, stage_dir, signals, view)
    if code != DONE_CODE and chain.config.logging.plots:
        # A stage that is done has done it itself. Another one counts as running until its job is over.
        draw_report(chain.run_dir)
    return code


def _start(chain: Chain, step: PlannedStage, stage_dir: Path) -> Any:
    inputs = inputs_of(step.stage, chain.run_dir)
    end_orphans(stage_dir)
    if step.fresh:
        clear_stage(stage_dir)
    (stage_dir / FAILED).unlink(missing_ok=True)
    save_config(chain.config, stage_dir / "config.yaml")
    return submit_stage(
        stage_dir,
        step.stage.kind,
        ranks=chain.ranks[step.stage.name],
        job_of=chain.job_of,
        keys=step.state.keys_now,
        inputs=inputs,
        fresh=step.fresh,
    )


def _follow(stage_dir: Path, job: Any, signals: Signals, view: View) -> bool:
    """Show the job until it is over; True when a person left it to go on alone.

    job   submitit's, None for a job that somebody else started: a Ctrl-C here only stops watching it
    """
    heard = 0
    while True:
        if job is not None:
            job.done()  # takes the exit code, so that no zombie stays
        row = running_job(stage_dir)
        if row is None:
            end_orphans(stage_dir)
            view.update()
            return False
        if len(signals.numbers) > heard:
            heard = len(signals.numbers)
            if job is None or heard > 1:
                return True
            view.say("stopping: the ranks save at the next step boundary. Ctrl-C again leaves them to it.")
            ask_to_stop(row)
        view.update()
        time.sleep(_POLL_SECONDS)


def _outcome(chain: Chain, stage_dir: Path, signals: Signals, view: View) -> int:
    """Exit code of a stage whose job is over, with words where it is not done."""
    state = read_state(stage_dir)
    name = stage_dir.name
    if state.status == "done":
        return DONE_CODE
    if state.status == "failed":
        failed = read_json(stage_dir / FAILED) or {}
        at = f" at step {failed.get('step')}" if failed.get("step") else ""
        view.say(f"{name} FAILED{at}: rank {failed.get('rank')} on {failed.get('host')}: {failed.get('error')}")
        view.say(f"log {failed.get('log')}")
        return FAILED_CODE
    view.say(f"{_stopped_words(name, state, stage_dir)} Continue with: {chain.line}")
    return _stop_code(signals)


def _stopped_words(name: str, state: StageState, stage_dir: Path) -> str:
    stopped = last_row(read_jsonl(stage_dir / "jobs.jsonl"), "stopped")
    if stopped is not None and stopped["job"] == state.job:
        return f"{name} stopped at step {stopped['step']} of {stopped['steps']} ({stopped['reason']})."
    if state.step:
        return f"{name} was interrupted; step {state.step} is saved."
    return f"{name} was interrupted before anything was saved."


def _stop_code(signals: Signals) -> int:
    return INTERRUPTED_CODE if signal.SIGINT in signals.numbers else STOPPED_CODE


@contextmanager
def noted_signals() -> Iterator[Signals]:
    """The signals of this process from now on, noted and not acted upon; SIGHUP stays ignored under nohup."""
    signals = Signals()
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, signals.note) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _close(chain: Chain) -> None:
    """What there is to look at when all is done."""
    kinds = {step.stage.kind: chain.run_dir / step.stage.name for step in chain.plan.steps}
    for kind, file, title in (("eval", "table.txt", ""), ("s1", "summary.txt", "what the weights say")):
        path = kinds[kind] / "out" / file if kind in kinds else None
        if path is not None and path.is_file():
            print("\n".join(filter(None, ["", title, path.read_text(encoding="utf-8").rstrip()])))
    made = [step.stage.name for step in chain.plan.steps if step.action != SKIP]
    print(f"\ndone  {', '.join(made)}" if made else "\nNothing to do: all stages are done.")
    report = chain.run_dir / "report.html"
    if report.is_file():
        print(f"report  {report}")
