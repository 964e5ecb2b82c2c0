"""A plan in, its jobs in Slurm's queue out, each waiting for those before it. All of them, or none."""

import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tdro_hpc.config.load import save_config
from tdro_hpc.config.schema import Config
from tdro_hpc.launch.call import PROGRAM
from tdro_hpc.launch.cancel import mark_cancelled, slurm_jobs
from tdro_hpc.launch.chain import DONE_CODE, INTERRUPTED_CODE, STOPPED_CODE, Chain, Signals, noted_signals
from tdro_hpc.launch.jobs import JOBS, append_event, append_submit, last_row, local_job, read_jsonl, stage_lock
from tdro_hpc.launch.look.printout import columns
from tdro_hpc.launch.plan import SKIP, Plan, PlannedStage
from tdro_hpc.launch.queue import ask_queue
from tdro_hpc.launch.record import DONE, FAILED, STALE, mark_stale
from tdro_hpc.launch.slurm.executor import FailedSubmission, cancel_jobs, submit_job
from tdro_hpc.launch.slurm_rows import slurm_work
from tdro_hpc.launch.snapshot import take_snapshot

MISTAKE_CODE = 2
_SAVED = (FAILED, "config.yaml", "job.sbatch")  # files of a stage that a submission replaces


@dataclass
class _Submitted:
    """What one call has done so far, so that it can be taken back."""

    jobs: dict[str, list[str]] = field(default_factory=dict)  # ids by stage, links in order
    noted: list[tuple[Path, str]] = field(default_factory=list)  # (stage folder, id) in the order of submission
    put_aside: list[Path] = field(default_factory=list)  # stages whose DONE.json this call has made a STALE.json
    files: dict[Path, bytes | None] = field(default_factory=dict)  # content before this call; None = was not there


class _Interrupted(Exception):
    """A person pressed Ctrl-C, or the machine goes down."""


def newest_submissions(stages: Iterable[str], run_dir: Path) -> dict[str, str]:
    """Id of the newest job that was submitted for each stage; empty where there was none. Read before the plan."""
    rows = {name: last_row(read_jsonl(run_dir / name / JOBS), "submit") for name in stages}
    return {name: row["job"] if row else "" for name, row in rows.items()}


def mixed_problems(plan: Plan, config: Config) -> list[str]:
    """Why this plan cannot wait for what is at work elsewhere: Slurm for processes, or processes for Slurm's jobs."""
    slurm = config.cluster.executor == "slurm"
    waited = (
        {need for step in plan.to_run for need in step.after} if slurm else {step.stage.name for step in plan.steps}
    )
    problems = []
    for step in plan.steps:
        elsewhere = (step.state.executor == "slurm") != slurm
        if step in plan.to_run or step.action == SKIP or step.stage.name not in waited or not elsewhere:
            continue
        where, cure = (
            ("on a machine without Slurm", "cluster=local") if slurm else ("as a job of Slurm", "cluster=slurm")
        )
        problems.append(
            f"{step.stage.name} is {step.action} {where} (job {step.state.job}), and this call cannot wait for it. "
            f"Type the same line with {cure}, or: {PROGRAM} cancel name={config.name}, then this line again."
        )
    return problems


def submit_chains(runs: Sequence[tuple[Chain, Mapping[str, str]]]) -> int:
    """Submit the stages that plans start, in order, and say what waits for what; the exit code.

    runs    the chain of each run, and newest_submissions from before its plan was made: a newer one than that is the
            work of another front door
    A submission that Slurm refuses, or a Ctrl-C, takes back all that this call has submitted.
    """
    done = _Submitted()
    said: list[str] = []
    with noted_signals() as signals:
        try:
            for chain, known in runs:
                said.append(_submit_run(chain, known, done, signals))
        except _Interrupted:
            _take_back(done)
            print("Interrupted: what this call had submitted is cancelled, all is as before.", file=sys.stderr)
            return _stop_code(signals)
        except FailedSubmission as error:
            _take_back(done)
            print(error, file=sys.stderr)
            if done.noted:
                ids = ", ".join(job for _, job in done.noted)
                print(f"Submitted before it and cancelled again: {ids}. All is as before.", file=sys.stderr)
            return _stop_code(signals) if signals.numbers else MISTAKE_CODE
        except BaseException:
            # A full disk in the middle of a chain must not leave half of it in the queue.
            _take_back(done)
            raise
    print("\n\n".join(said))
    return DONE_CODE


def _submit_run(chain: Chain, known: Mapping[str, str], done: _Submitted, signals: Signals) -> str:
    """Submit the stages of one run; what to tell of it."""
    if not chain.plan.to_run:
        return _nothing_words(chain)
    done.jobs = {}
    code = take_snapshot(chain.run_dir) if chain.config.cluster.snapshot else None
    for step in chain.plan.to_run:
        if step.fresh:
            # First all of them: from here on nothing counts as done that is made from something older.
            _put_aside(chain.run_dir / step.stage.name, done)
    rows = [
        _submit_stage(chain, step, known.get(step.stage.name, ""), code, done, signals) for step in chain.plan.to_run
    ]
    return f"{columns(rows)}\n\n{next_words(chain.config)}"


def _stop_code(signals: Signals) -> int:
    return INTERRUPTED_CODE if signal.SIGINT in signals.numbers else STOPPED_CODE


def next_words(config: Config) -> str:
    """What to type to look at a run in the queue, to follow it, and to take it back."""
    folder = "" if config.runs_dir == "runs" else f" runs_dir={config.runs_dir}"
    lines = [("look", "status"), ("follow", "logs follow=true"), ("cancel", "cancel")]
    return columns([[word, f"{PROGRAM} {words} name={config.name}{folder}"] for word, words in lines])


def _nothing_words(chain: Chain) -> str:
    """Why nothing is submitted."""
    busy = [
        f"{step.stage.name} is {step.action} (job {step.state.job})" for step in chain.plan.steps if step.action != SKIP
    ]
    if not busy:
        return "Nothing to do: all stages are done."
    return f"Nothing to submit: {', '.join(busy)}.\n\n{next_words(chain.config)}"


def _submit_stage(
    chain: Chain, step: PlannedStage, known: str, code: Path | None, done: _Submitted, signals: Signals
) -> list[str]:
    """Submit the jobs of one stage; the row that tells of it."""
    name, stage_dir = step.stage.name, chain.run_dir / step.stage.name
    after = _jobs_before(step, chain, done.jobs)
    with stage_lock(stage_dir):
        meanwhile = _submitted_meanwhile(stage_dir, known)
        if meanwhile:
            done.jobs[name] = meanwhile
            return [name, f"job {meanwhile[-1]}", "submitted meanwhile by another call"]
        _clear_dead(stage_dir, step)
        for file in _SAVED:
            path = stage_dir / file
            done.files.setdefault(path, path.read_bytes() if path.is_file() else None)
        (stage_dir / FAILED).unlink(missing_ok=True)
        save_config(chain.config, stage_dir / "config.yaml")
        _submit_links(chain, step, stage_dir, after, code, done, signals)
    return _row(name, done.jobs[name], after)


def _submit_links(
    chain: Chain,
    step: PlannedStage,
    stage_dir: Path,
    after: Sequence[str],
    code: Path | None,
    done: _Submitted,
    signals: Signals,
) -> None:
    """Submit the one job of a stage, or its links in a row; the caller holds the stage."""
    cluster = chain.config.cluster
    links = cluster.max_restarts + 1 if cluster.requeue == "links" else 1
    ids = done.jobs.setdefault(step.stage.name, [])
    for link in range(1, links + 1):
        if signals.numbers:
            raise _Interrupted
        try:
            job = submit_job(
                chain.config,
                step.stage,
                stage_dir,
                ranks=chain.ranks[step.stage.name],
                code=code,
                job_of=chain.job_of,
                after=after,
                link_before=ids[-1] if ids else "",
                link=link,
            )
        except FailedSubmission:
            # sbatch may have lost its answer and not the job: it was interrupted, or the controller was slow.
            _cancel_unnoted(stage_dir, ids)
            raise
        ids.append(job)
        done.noted.append((stage_dir, job))
        append_submit(
            stage_dir,
            job=job,
            keys=step.state.keys_now,
            fresh=step.fresh and link == 1,
            after=[*after, *ids[:-1][-1:]],
            link=link,
            links=links,
            max_restarts=cluster.max_restarts,
            code=str(code) if code else "",
        )
    if signals.numbers:
        raise _Interrupted


def _jobs_before(step: PlannedStage, chain: Chain, submitted: Mapping[str, list[str]]) -> list[str]:
    """The last job of every stage that has to be done before: submitted in this call, or in the queue already."""
    states = {other.stage.name: other.state for other in chain.plan.steps}
    found = []
    for need in step.after:
        waiting = submitted.get(need) or states[need].jobs or (states[need].job,)
        assert waiting[-1], f"{need} is neither done nor in the queue, and {step.stage.name} needs it"
        found.append(waiting[-1])
    return found


def _submitted_meanwhile(stage_dir: Path, known: str) -> list[str]:
    """Jobs that another front door has submitted since the plan was made; [] when there are none.

    raises ValueError when the stage was started on this machine meanwhile
    """
    rows = read_jsonl(stage_dir / JOBS)
    running = local_job(stage_dir, rows)
    if running is not None:
        raise ValueError(f"{stage_dir.name} was started meanwhile on {running['host']}: pid {running['pid']}.")
    newest, work = last_row(rows, "submit"), slurm_work(stage_dir, rows, None)
    return [] if newest is None or newest["job"] == known or work.cancelled else list(work.jobs)


def _clear_dead(stage_dir: Path, step: PlannedStage) -> None:
    """Take jobs out of the queue that wait for something that has failed."""
    dead = step.state.dead_jobs
    if dead:
        cancel_jobs(dead[::-1])
        for job in dead:
            append_event(stage_dir, "cancelled", job=job, reason="it could never start")


def _put_aside(stage_dir: Path, done: _Submitted) -> None:
    if (stage_dir / DONE).exists():
        mark_stale(stage_dir)
        done.put_aside.append(stage_dir)


def _cancel_unnoted(stage_dir: Path, noted: Sequence[str]) -> None:
    """Cancel a job of the stage that is in the queue although its submission failed."""
    strays = [job.job for job in slurm_jobs(stage_dir, ask_queue()) if job.job not in noted]
    if strays:
        cancel_jobs(strays)


def _take_back(done: _Submitted) -> None:
    """Cancel what this call has submitted, from the end of the chain, and put the files back."""
    ids = [job for _, job in reversed(done.noted)]
    for stage_dir, job in done.noted:
        mark_cancelled(stage_dir, job)
    answer = cancel_jobs(ids)
    if ids and answer.code:
        print(f"scancel {' '.join(ids)}: {answer.err.strip()}. Type it again.", file=sys.stderr)
    for stage_dir, job in reversed(done.noted):
        append_event(stage_dir, "cancelled", job=job, reason="another stage of its chain was not submitted")
    for path, content in done.files.items():
        if content is not None:
            path.write_bytes(content)
        else:
            path.unlink(missing_ok=True)
    for stage_dir in done.put_aside:
        with suppress(FileNotFoundError):  # a job that had begun already has cleared it
            (stage_dir / STALE).rename(stage_dir / DONE)


def _row(name: str, jobs: Sequence[str], after: Sequence[str]) -> list[str]:
    own = f"job {jobs[0]}" if len(jobs) == 1 else f"jobs {jobs[0]} to {jobs[-1]}, {len(jobs)} links"
    return [name, own, f"after {', '.join(after)}" if after else "starts as soon as there is room"]
