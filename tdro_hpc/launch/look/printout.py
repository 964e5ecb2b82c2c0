"""A plan in, the text that a person reads before anything happens."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from tdro_hpc.config.derived import plan_lines
from tdro_hpc.config.schema import Config
from tdro_hpc.launch.local.executor import job_script
from tdro_hpc.launch.plan import SKIP, Plan, PlannedStage
from tdro_hpc.launch.record import code_version
from tdro_hpc.launch.slurm.executor import JOB_SCRIPT, hint_for, test_submission
from tdro_hpc.launch.slurm.sbatch import sbatch_command, sbatch_script
from tdro_hpc.launch.snapshot import snapshot_folder


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned text, two blanks between columns, none at the end of a line."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in padded)


def short_duration(seconds: float) -> str:
    """45 s, 12 m 05 s, 3 h 05 m."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} m"


def plan_text(plan: Plan, config: Config, run_dir: Path, ranks: Mapping[str, int]) -> str:
    """The table of stages, each derived figure once, and what the plan leaves out of date."""
    lines = [f"run   {run_dir}", f"code  {code_version()}", ""]
    if plan.steps:
        lines += [columns([_row(step, ranks[step.stage.name]) for step in plan.steps]), ""]
    said: set[str] = set()
    for step in plan.steps:
        if step.action == SKIP:
            continue
        for line in plan_lines(config, step.stage.kind):
            # s0 and s2 often have the same figures, and the number of ranks is that of the whole run.
            if line not in said:
                lines.append(f"{step.stage.kind:<8}{line}")
                said.add(line)
    lines += slurm_lines(config) if said else []
    lines += ["", *plan.drift, *plan.notes] if plan.drift or plan.notes else []
    return "\n".join(lines).rstrip()


def _row(step: PlannedStage, ranks: int) -> list[str]:
    if step.action != SKIP:
        counted = f"{ranks} rank" + ("s" if ranks > 1 else "")
        after = f"after {','.join(step.after) or '-'}"
        return [step.stage.name, step.action, counted, after, step.reason]
    state = step.state
    return [step.stage.name, step.action, short_duration(state.seconds), f"code {state.code}", _outputs(step)]


def _outputs(step: PlannedStage) -> str:
    return " ".join(f"{step.stage.name}/out/{name}" for name in step.stage.makes)


def slurm_lines(config: Config) -> list[str]:
    """What a job of the run asks of Slurm beside CPUs and memory; none on this machine."""
    cluster = config.cluster
    if cluster.executor != "slurm":
        return []
    places = [f"{key} {getattr(cluster, key)}" for key in ("partition", "account", "qos", "constraint", "exclude")]
    given = [words for words in places if not words.endswith(" ")]
    how = "puts itself back" if cluster.requeue == "self" else "is followed by the next link"
    goes_on = f"a job that is stopped {how}, at most {cluster.max_restarts:,} times"
    return [f"{'slurm':<8}{', '.join([*given, f'time limit {cluster.time_limit}', goes_on])}"]


def scripts_text(plan: Plan, config: Config, run_dir: Path, ranks: Mapping[str, int]) -> str:
    """The job script of every stage that the plan starts, in order; with Slurm, the command that submits it too."""
    parts = []
    code = _code(config, run_dir)
    for step in plan.to_run:
        name = step.stage.name
        title = f"# ---- {name}: after {', '.join(step.after) or 'nothing'}"
        if config.cluster.executor == "slurm":
            commands = "\n".join(_submissions(step, plan, config, run_dir))
            script = sbatch_script(config, step.stage, run_dir.resolve() / name, ranks=ranks[name], code=code)
            parts.append(f"{title}\n{commands}\n{script.strip()}")
        else:
            script = job_script(run_dir / name, ranks=ranks[name], threads=config.parallel.threads_per_rank)
            parts.append(f"{title}\n{script}")
    return "\n\n".join(parts)


def _code(config: Config, run_dir: Path) -> Path | None:
    """Where the job finds its code: the copy that a submission would make."""
    uses_copy = config.cluster.executor == "slurm" and config.cluster.snapshot
    return snapshot_folder(run_dir.resolve()) if uses_copy else None


def _submissions(step: PlannedStage, plan: Plan, config: Config, run_dir: Path) -> list[str]:
    """The lines, as comments, that submit the job of a stage, or its links in a row."""
    script = run_dir / step.stage.name / JOB_SCRIPT
    states = {other.stage.name: other for other in plan.steps}
    after = []
    for need in step.after:
        waiting = states[need].state.jobs
        after.append(waiting[-1] if states[need] not in plan.to_run and waiting else f"<job of {need}>")
    lines = [f"# {_line(sbatch_command(script, after=after))}"]
    links = config.cluster.max_restarts + 1 if config.cluster.requeue == "links" else 1
    if links > 1:
        next_link = _line(sbatch_command(script, after=after, link_before="<job of the link before>"))
        lines.append(f"# {next_link}    (links 2 to {links})")
    return lines


def _line(command: Sequence[str]) -> str:
    """A command as a person reads it: what stands between < and > is to be filled in."""
    return " ".join(word if "<" in word else shlex.quote(word) for word in command)


def answers_of_sbatch(plan: Plan, config: Config, run_dir: Path, ranks: Mapping[str, int]) -> tuple[str, bool]:
    """(what `sbatch --test-only` says to the job of every stage that the plan starts, whether all would be taken)."""
    lines, ok = [], True
    code = _code(config, run_dir)
    for step in plan.to_run:
        name = step.stage.name
        answer = test_submission(config, step.stage, run_dir.resolve() / name, ranks=ranks[name], code=code)
        # Slurm prints its estimate on standard error too.
        words = " ".join(f"{answer.out} {answer.err}".split()).removeprefix("sbatch: ")
        hint = hint_for(answer.err) if answer.code else ""
        lines.append(f"{name:<8}{'refused: ' if answer.code else ''}{words}{hint and f' {hint}'}")
        ok = ok and answer.code == 0
    return "\n".join(lines), ok
