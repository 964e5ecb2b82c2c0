"""Say which stage you want; what it needs is run first, and what is done is skipped.

    python -m tdro_hpc.submit stage=all config=demo cluster=local     the whole of tDRO on this machine
    python -m tdro_hpc.submit stage=s1 data.dir=mytasks dry_run=true  the plan and the job scripts, nothing is started
    python -m tdro_hpc.submit status                                  what became of it

Every key of the configuration can be given as key=value: configs/ and tdro_hpc/config/schema.py list them. Several
values of a number, as in s1.eta=0.01,0.02, make a run for each. cluster=slurm submits jobs and returns at once.
  stage=    all, s2, s0,s2, s2-top70 (default all)      force=s1       make a stage again although it is done
  dry_run=true   show the plan only                     check=true     look at the data and the model first
  strict=true    changed keys of a done stage are an error
Words: status [watch=true], logs [stage=s1] [follow=true], cancel, report; name=<run> says which run is meant.
Exit codes: 0 done, 1 a stage failed, 2 a mistake in the call, 3 stopped and saved, 130 the same by Ctrl-C.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tdro_hpc.config.derived import ranks_of
from tdro_hpc.config.fitting import memory_text
from tdro_hpc.config.load import ConfigError, save_config
from tdro_hpc.launch.call import PROGRAM, Call, read_call
from tdro_hpc.launch.cancel import cancel
from tdro_hpc.launch.chain import Chain, run_chain, save_plan
from tdro_hpc.launch.local.executor import JobOf
from tdro_hpc.launch.look.logs import print_log
from tdro_hpc.launch.look.printout import answers_of_sbatch, plan_text, scripts_text
from tdro_hpc.launch.look.status import at_work, planned_stages, queue_of, runs_in, see_run, status_text
from tdro_hpc.launch.look.watch import watch
from tdro_hpc.launch.plan import Plan, build_plan, stages_named
from tdro_hpc.launch.queue import Queue, ask_queue
from tdro_hpc.launch.record import read_states
from tdro_hpc.launch.slurm_chain import mixed_problems, newest_submissions, submit_chains
from tdro_hpc.run import GraphOf, StageJob
from tdro_hpc.stages.graph import Stage, stage_graph
from tdro_hpc.stages.inputs import input_notes, input_problems

DONE_CODE, MISTAKE_CODE, INTERRUPTED_CODE = 0, 2, 130


@dataclass(frozen=True)
class Planned:
    """The plan of one run, and what it was made from."""

    call: Call
    plan: Plan
    ranks: Mapping[str, int]  # processes of each stage
    known: Mapping[str, str]  # newest submission of each stage when the plan was made
    looked_at: Sequence[Stage] = ()  # stages that are to run; with check=true all of the plan

    @property
    def is_slurm(self) -> bool:
        """Whether its stages become jobs of Slurm."""
        return self.call.config.cluster.executor == "slurm"


def parse_call(words: list[str], *, graph_of: GraphOf = stage_graph) -> Call:
    """The call that the words after `submit` make.

    raises ConfigError with every mistake of the call
    """
    return read_call(words, graph_of=graph_of)


def make_plan(call: Call, graph_of: GraphOf, queue: Queue | None) -> Planned:
    """The plan of the call against what is on disk and in Slurm's queue.

    raises ConfigError with the reasons why nothing may be started
    """
    config = call.config
    graph = graph_of(config)
    ranks = {name: ranks_of(config, stage.ranks) for name, stage in graph.items()}
    forced = call.options.get("force", "")
    wanted = call.options.get("stage", "" if forced else "all")
    known = newest_submissions(graph, call.run_dir)
    plan = build_plan(config, graph, wanted, forced, read_states(config, graph, call.run_dir, ranks, queue))
    if plan.problems:
        stages = [graph[name] for name in stages_named(f"{wanted},{forced}", graph, config.stages)[0]]
    else:
        stages = [step.stage for step in (plan.steps if call.is_on("check") else plan.to_run)]
    problems = [
        *plan.problems,
        *mixed_problems(plan, config),
        *(plan.drift if call.is_on("strict") else ()),
        *input_problems(config, stages),
    ]
    if problems:
        raise ConfigError(problems)
    return Planned(call, plan, ranks, known, stages)


def make_plans(call: Call, graph_of: GraphOf) -> list[Planned]:
    """The plans of all runs of the call, after one look at Slurm's queue for all of them.

    raises ConfigError with every reason, of each run of a sweep, why nothing may be started
    """
    queue = queue_of([run.run_dir for run in call.runs])
    if queue is None and call.config.cluster.executor == "slurm":
        queue = ask_queue()
    found, problems = [], []
    for run in call.runs:
        try:
            found.append(make_plan(run, graph_of, queue))
        except ConfigError as error:
            problems += [f"{' '.join(run.values)}: {text}" if run.values else text for text in error.problems]
    if problems:
        raise ConfigError(problems)
    return found


def run_stages(call: Call, *, graph_of: GraphOf, job_of: JobOf) -> int:
    """Plan, print the plans, and bring them about unless the call only wants to look; the exit code."""
    plans = make_plans(call, graph_of)
    for planned in plans:
        one = planned.call
        if one.values:
            print(f"---- {' '.join(one.values)}")
        print(plan_text(planned.plan, one.config, one.run_dir, planned.ranks), flush=True)
        print(_more_of_plan(planned), end="", flush=True)
        if call.is_on("dry_run"):
            print(f"\n{scripts_text(planned.plan, one.config, one.run_dir, planned.ranks)}".rstrip())
        if one.values:
            print(flush=True)
    if call.is_on("dry_run"):
        return DONE_CODE
    if call.is_on("check"):
        return _check(plans)
    chains = [_chain_of(planned, graph_of, job_of) for planned in plans]
    if not call.values:
        print(flush=True)
    if plans[0].is_slurm:
        return submit_chains([(chain, planned.known) for chain, planned in zip(chains, plans, strict=True)])
    return _run_chains(chains, plans)


def _more_of_plan(planned: Planned) -> str:
    """What was chosen and what could go wrong; before a dry run or a check also the memory of the stages."""
    call, stages = planned.call, planned.looked_at
    blocks = ["\n".join([*call.notes, *input_notes(call.config, stages)])]
    if call.is_on("dry_run") or call.is_on("check"):
        blocks.append(memory_text(call.config, [stage.kind for stage in stages]))
    return "".join(f"\n{block}\n" for block in blocks if block)


def _run_chains(chains: Sequence[Chain], plans: Sequence[Planned]) -> int:
    """Run the chains on this machine, one after the other; the exit code of the first that is not done."""
    for index, (chain, planned) in enumerate(zip(chains, plans, strict=True)):
        if planned.call.values:
            print(f"---- {' '.join(planned.call.values)}", flush=True)
        code = run_chain(chain)
        if code == DONE_CODE:
            continue
        if index + 1 < len(plans):
            rest = [other.call.line for other in plans[index + 1 :]]
            print("\n".join(["The other runs of the sweep were not started. Type for them:", *rest]))
        return code
    return DONE_CODE


def _check(plans: Sequence[Planned]) -> int:
    """Ask sbatch what it would say to each job, then look at the data and the model; the exit code."""
    refused = False
    for planned in plans:
        call = planned.call
        if planned.is_slurm and planned.plan.to_run:
            answers, ok = answers_of_sbatch(planned.plan, call.config, call.run_dir, planned.ranks)
            print(f"\n{answers}", flush=True)
            refused = refused or not ok
        # The only road from here to torch.
        from tdro_hpc.stages.check import check_inputs

        check_inputs(call.config, call.run_dir, call.line)
    return MISTAKE_CODE if refused else DONE_CODE


def _chain_of(planned: Planned, graph_of: GraphOf, job_of: JobOf) -> Chain:
    """The chain of a plan, which is noted in the run directory."""
    call = planned.call
    save_config(call.config, call.run_dir / "config.yaml")
    save_plan(planned.plan, graph_of(call.config), call.run_dir, call.line)
    return Chain(planned.plan, call.config, call.run_dir.resolve(), planned.ranks, job_of, call.line)


def _runs_meant(call: Call) -> list[Path]:
    """The runs that the call names, or every run in runs/."""
    if call.names_run or call.sweep:
        return [run.run_dir for run in call.runs]
    found = runs_in(Path(call.config.runs_dir))
    if not found:
        raise ValueError(f"There is no run in {call.config.runs_dir}/ yet. Type: {PROGRAM} stage=all config=demo")
    return found


def _one_run(call: Call, runs: list[Path]) -> Path:
    """The run that a word is about: the only one, or the only one that is at work."""
    if len(runs) > 1:
        queue = queue_of(runs)
        runs = [run_dir for run_dir in runs if at_work(see_run(run_dir, queue))] or runs
    if len(runs) == 1:
        return runs[0]
    names = ", ".join(path.name for path in runs)
    raise ValueError(f"Which run is meant? There are {names}. Type: {PROGRAM} {call.word} name={runs[-1].name}")


def look(call: Call) -> int:
    """status, logs, cancel and report; the exit code."""
    runs = _runs_meant(call)
    if call.word == "status":
        if call.is_on("watch"):
            watch(runs, sys.stdout)
        else:
            print(status_text(runs))
        return DONE_CODE
    run_dir = _one_run(call, runs)
    planned_stages(run_dir)  # raises where there is no such run
    if call.word == "logs":
        print_log(run_dir, call.options.get("stage", ""), follow=call.is_on("follow"))
    elif call.word == "cancel":
        print(cancel(run_dir))
    else:
        from tdro_hpc.report.html import write_report

        write_report(run_dir)
        print(f"report  {run_dir / 'report.html'}")
    return DONE_CODE


def main(words: list[str], *, graph_of: GraphOf = stage_graph, job_of: JobOf = StageJob) -> int:
    """Do what the words after `submit` say; the exit code. Mistakes are printed together, without a traceback."""
    try:
        call = parse_call(words, graph_of=graph_of)
        if call.word == "help":
            print(__doc__.strip())
            return DONE_CODE
        if call.word == "run":
            return run_stages(call, graph_of=graph_of, job_of=job_of)
        return look(call)
    except ConfigError as error:
        print("\n".join(error.problems), file=sys.stderr)
        return MISTAKE_CODE
    except ValueError as error:
        print(error, file=sys.stderr)
        return MISTAKE_CODE
    except BrokenPipeError:
        # The reader of our output, such as `head`, has seen enough.
        sys.stderr.close()
        return DONE_CODE
    except OSError as error:
        place = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"{place}. Set runs_dir=<folder you may write>.", file=sys.stderr)
        return MISTAKE_CODE
    except KeyboardInterrupt:
        return INTERRUPTED_CODE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
