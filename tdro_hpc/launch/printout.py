"""A plan in, the text that a person reads before anything happens."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tdro_hpc.config.derived import plan_lines
from tdro_hpc.config.schema import Config
from tdro_hpc.launch.executor import job_script
from tdro_hpc.launch.plan import RUN, RUNNING, Plan, PlannedStage
from tdro_hpc.launch.record import code_version


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
        if step.action not in (RUN, RUNNING):
            continue
        for line in plan_lines(config, step.stage.kind):
            # s0 and s2 often have the same figures, and the number of ranks is that of the whole run.
            if line not in said:
                lines.append(f"{step.stage.kind:<8}{line}")
                said.add(line)
    lines += ["", *plan.drift, *plan.notes] if plan.drift or plan.notes else []
    return "\n".join(lines).rstrip()


def _row(step: PlannedStage, ranks: int) -> list[str]:
    if step.action in (RUN, RUNNING):
        counted = f"{ranks} rank" + ("s" if ranks > 1 else "")
        after = f"after {','.join(step.after) or '-'}"
        return [step.stage.name, step.action, counted, after, step.reason]
    state = step.state
    return [step.stage.name, step.action, short_duration(state.seconds), f"code {state.code}", _outputs(step)]


def _outputs(step: PlannedStage) -> str:
    return " ".join(f"{step.stage.name}/out/{name}" for name in step.stage.makes)


def scripts_text(plan: Plan, config: Config, run_dir: Path, ranks: Mapping[str, int]) -> str:
    """The job script of every stage that the plan starts, in order."""
    parts = []
    for step in plan.to_run:
        script = job_script(
            run_dir / step.stage.name,
            ranks=ranks[step.stage.name],
            threads=config.parallel.threads_per_rank,
        )
        parts.append(f"# ---- {step.stage.name}: after {', '.join(step.after) or 'nothing'}\n{script}")
    return "\n\n".join(parts)
