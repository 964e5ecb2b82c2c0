"""Say which stage you want; what it needs is run first, and what is done is skipped.

    python -m tdro_hpc.submit stage=all config=demo cluster=local     the whole of tDRO on this machine
    python -m tdro_hpc.submit stage=s1 data.dir=mytasks dry_run=true  the plan and the job scripts, nothing is started
    python -m tdro_hpc.submit status                                  what became of it

Every key of the configuration can be given as key=value: configs/ and tdro_hpc/config/schema.py list them.
  stage=    all, s2, s0,s2, s2-top70 (default all)      force=s1       make a stage again although it is done
  dry_run=true   show the plan only                     check=true     look at the data and the model first
  strict=true    changed keys of a done stage are an error
Words: status, logs [stage=s1] [follow=true], cancel, report; name=<run> says which run is meant.
Exit codes: 0 done, 1 a stage failed, 2 a mistake in the call, 3 stopped and saved, 130 the same by Ctrl-C.
"""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tdro_hpc.config.derived import ranks_of
from tdro_hpc.config.load import ConfigError, load_config, save_config
from tdro_hpc.config.schema import Config
from tdro_hpc.launch.chain import Chain, run_chain, save_plan
from tdro_hpc.launch.executor import JobOf
from tdro_hpc.launch.plan import Plan, build_plan, stages_named
from tdro_hpc.launch.printout import plan_text, scripts_text
from tdro_hpc.launch.record import read_states
from tdro_hpc.launch.status import cancel, planned_stages, print_log, running_stages, runs_in, status_text
from tdro_hpc.run import GraphOf, StageJob
from tdro_hpc.stages.graph import stage_graph
from tdro_hpc.stages.inputs import input_problems

MISTAKE_CODE, INTERRUPTED_CODE = 2, 130
_PROGRAM = "python -m tdro_hpc.submit"
# Options of the call by word; everything else is a key of the configuration.
_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "run": ("stage", "force", "dry_run", "check", "strict"),
    "status": (),
    "logs": ("stage", "follow"),
    "cancel": (),
    "report": (),
}
_SWITCHES = ("dry_run", "check", "strict", "follow")
_ALL_OPTIONS = tuple(dict.fromkeys(option for options in _OPTIONS.values() for option in options))


@dataclass(frozen=True)
class Call:
    """One line after `submit`, understood."""

    word: str  # run, status, logs, cancel, report, help
    config: Config = field(default_factory=Config)
    names_run: bool = False  # name= or config= says which run is meant
    options: Mapping[str, str] = field(default_factory=dict)
    line: str = ""  # what to type to do the same again, without force=, which would throw away what it has made

    def is_on(self, switch: str) -> bool:
        """Whether dry_run, check, strict or follow was given as true."""
        return self.options.get(switch) == "true"

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.config.runs_dir) / self.config.name


def parse_call(words: list[str], *, graph_of: GraphOf = stage_graph) -> Call:
    """The call that the words after `submit` make.

    raises ConfigError with every mistake of the call
    """
    if not words or words[0] == "help" or {"-h", "--help"} & set(words):
        return Call("help")
    word = words[0] if words[0] in _OPTIONS else "run"
    problems: list[str] = []
    options: dict[str, str] = {}
    keys: list[str] = []
    for argument in words[word != "run" :]:
        name, equals, value = argument.partition("=")
        if name not in _ALL_OPTIONS or not equals:
            keys.append(argument)
            continue
        problems += _option_problems(word, name, value, options)
        options[name] = value
    problems += _given_twice(keys)
    config = Config()
    try:
        config = load_config(keys, call_options=_OPTIONS[word]).config
        graph = graph_of(config)
    except ConfigError as error:
        problems += [_with_words(problem, words) for problem in error.problems]
    except ValueError as error:
        problems.append(str(error))
    else:
        if word == "run":
            problems += [
                problem
                for option in ("stage", "force")
                for problem in stages_named(options.get(option, ""), graph, config.stages)[1]
            ]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    again = [argument for argument in words if not argument.startswith("force=")]
    if "stage" not in options and "force" in options:
        again.append(f"stage={options['force']}")
    names_run = any(key.startswith(("name=", "config=")) for key in keys)
    return Call(word, config, names_run, options, shlex.join([*_PROGRAM.split(), *again]))


def _option_problems(word: str, name: str, value: str, options: Mapping[str, str]) -> list[str]:
    """What is wrong with one option of the call."""
    problems = []
    if name not in _OPTIONS[word]:
        owners = [owner for owner, allowed in _OPTIONS.items() if name in allowed]
        line = " or ".join(_PROGRAM if owner == "run" else f"{_PROGRAM} {owner}" for owner in owners)
        problems.append(f"{name}= means nothing here; it belongs to: {line}. Leave it out.")
    if name in options:
        problems.append(f"{name} is given twice: {name}={options[name]} and {name}={value}. Leave one out.")
    if name in _SWITCHES and value not in ("true", "false"):
        problems.append(f"{name} is {value!r}; it must be true or false. Type {name}=true.")
    if name not in _SWITCHES and not value:
        problems.append(f"{name}= is empty. Type {name}=s1, or leave it out.")
    return problems


def _given_twice(keys: list[str]) -> list[str]:
    """What is wrong where a key stands twice on the line."""
    first: dict[str, str] = {}
    problems = []
    for argument in keys:
        name = argument.partition("=")[0].strip()
        if "=" in argument and name in first:
            problems.append(f"{name} is given twice: {first[name]} and {argument}. Leave one out.")
        first.setdefault(name, argument)
    return problems


def _with_words(problem: str, words: list[str]) -> str:
    """A word that is no key=value may be one of ours in the wrong place."""
    misplaced = [word for word in _OPTIONS if word != "run" and word in words[1:] and f"'{word}'" in problem]
    if misplaced:
        return f"{misplaced[0]} has to be the first word after submit. Type: {_PROGRAM} {misplaced[0]} [key=value ...]"
    if "=" not in words[0] and f"'{words[0]}'" in problem:
        return f"Unknown word {words[0]}. Type one of {', '.join(list(_OPTIONS)[1:])}, or key=value."
    return problem


def make_plan(call: Call, graph_of: GraphOf) -> tuple[Plan, dict[str, int]]:
    """The plan of the call against what is on disk, and the number of ranks of every stage.

    raises ConfigError with the reasons why nothing may be started
    """
    config = call.config
    graph = graph_of(config)
    ranks = {name: ranks_of(config, stage.ranks) for name, stage in graph.items()}
    forced = call.options.get("force", "")
    wanted = call.options.get("stage", "" if forced else "all")
    plan = build_plan(config, graph, wanted, forced, read_states(config, graph, call.run_dir, ranks))
    if plan.problems:
        stages = [graph[name] for name in stages_named(f"{wanted},{forced}", graph, config.stages)[0]]
    else:
        stages = [step.stage for step in (plan.steps if call.is_on("check") else plan.to_run)]
    problems = [*plan.problems, *(plan.drift if call.is_on("strict") else ()), *input_problems(config, stages)]
    if problems:
        raise ConfigError(problems)
    return plan, ranks


def run_stages(call: Call, *, graph_of: GraphOf, job_of: JobOf) -> int:
    """Plan, print the plan, and bring it about unless the call only wants to look; the exit code."""
    config, run_dir = call.config, call.run_dir
    plan, ranks = make_plan(call, graph_of)
    print(plan_text(plan, config, run_dir, ranks), flush=True)
    if call.is_on("dry_run"):
        print(f"\n{scripts_text(plan, config, run_dir, ranks)}".rstrip())
        return 0
    if call.is_on("check"):
        # The only road from here to torch.
        from tdro_hpc.stages.check import check_inputs

        check_inputs(config, run_dir, call.line)
        return 0
    print(flush=True)
    save_config(config, run_dir / "config.yaml")
    save_plan(plan, graph_of(config), run_dir, call.line)
    return run_chain(Chain(plan, config, run_dir.resolve(), ranks, job_of, call.line))


def _runs_meant(call: Call) -> list[Path]:
    """The run that the call names, or every run in runs/."""
    if call.names_run:
        return [call.run_dir]
    found = runs_in(Path(call.config.runs_dir))
    if not found:
        raise ValueError(f"There is no run in {call.config.runs_dir}/ yet. Type: {_PROGRAM} stage=all config=demo")
    return found


def _one_run(call: Call, runs: list[Path]) -> Path:
    if len(runs) == 1:
        return runs[0]
    names = ", ".join(path.name for path in runs)
    raise ValueError(f"Which run is meant? There are {names}. Type: {_PROGRAM} {call.word} name={runs[-1].name}")


def look(call: Call) -> int:
    """status, logs, cancel and report; the exit code."""
    runs = _runs_meant(call)
    if call.word == "status":
        print("\n\n".join(status_text(run_dir) for run_dir in runs))
        return 0
    busy = [] if call.names_run else [run_dir for run_dir in runs if running_stages(run_dir)]
    run_dir = _one_run(call, busy or runs)
    planned_stages(run_dir)  # raises where there is no such run
    if call.word == "logs":
        print_log(run_dir, call.options.get("stage", ""), follow=call.is_on("follow"))
    elif call.word == "cancel":
        print(cancel(run_dir))
    else:
        from tdro_hpc.report.html import write_report

        write_report(run_dir)
        print(f"report  {run_dir / 'report.html'}")
    return 0


def main(words: list[str], *, graph_of: GraphOf = stage_graph, job_of: JobOf = StageJob) -> int:
    """Do what the words after `submit` say; the exit code. Mistakes are printed together, without a traceback."""
    try:
        call = parse_call(words, graph_of=graph_of)
        if call.word == "help":
            print(__doc__.strip())
            return 0
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
        return 0
    except OSError as error:
        place = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"{place}. Set runs_dir=<folder you may write>.", file=sys.stderr)
        return MISTAKE_CODE
    except KeyboardInterrupt:
        return INTERRUPTED_CODE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
