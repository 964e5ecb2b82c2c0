"""Stages that are to run in, what they lack on this machine out, in words. Opens no rows and never imports torch."""

import importlib.util
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path

from tdro_hpc.config.fitting import fit_notes, fit_problems
from tdro_hpc.config.layouts import layout_problems, unchecked_line
from tdro_hpc.config.schema import Config
from tdro_hpc.launch.stage import Stage
from tdro_hpc.stages.export_inputs import export_problems

_INSTALL_DEEPSPEED = "pip install 'deepspeed>=0.19,<0.20'"


def input_problems(config: Config, stages: Sequence[Stage]) -> list[str]:
    """A sentence or more for every input of these stages that is not there, each once.

    A stage is asked for what its sections speak of: data, eval, s1, and its own files.
    """
    sections = {section for stage in stages for section in stage.sections}
    problems: list[str] = []
    tasks = _asked(lambda: _number_of_tasks(config), "data.dir", problems) if "data" in sections else 0
    if "s1" in sections and tasks:
        problems += _top_problems(config, tasks)
    for stage in stages:
        problems += [_missing_file(stage.kind, name) for name in stage.files if not Path(name).is_file()]
    if any(stage.trains for stage in stages):
        problems += layout_problems(config) or fit_problems(config, [stage.kind for stage in stages])
        problems += _engine_problems(config)
    if "eval" in sections:
        problems += _evaluation_problems(config)
    if "export" in sections:
        problems += export_problems(config)
    return list(dict.fromkeys(problems))


def _engine_problems(config: Config) -> list[str]:
    """Whether the engine is installed; of Slurm's nodes nothing is known here."""
    missing = config.parallel.engine == "deepspeed" and importlib.util.find_spec("deepspeed") is None
    if not missing or config.cluster.executor == "slurm":
        return []
    return [f"parallel.engine is 'deepspeed', which is not installed here. Type {_INSTALL_DEEPSPEED}, or parallel=ddp."]


def input_notes(config: Config, stages: Sequence[Stage]) -> list[str]:
    """What these stages need and cannot be seen from this machine, in words."""
    if not any(stage.trains for stage in stages):
        return []
    notes = [unchecked_line(config), *fit_notes(config, [stage.kind for stage in stages])]
    if config.parallel.engine == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        notes.append(f"deepspeed is not installed here; the jobs need it on their nodes: {_INSTALL_DEEPSPEED}")
    return [note for note in notes if note]


def _asked(look: Callable[[], int], key: str, problems: list[str]) -> int:
    """What `look` says; 0 after its refusal has been put into the problems."""
    try:
        return look()
    except ValueError as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(f"{error.filename}: {error.strerror}. Set {key}=<folder you may read>.")
    return 0


def _number_of_tasks(config: Config) -> int:
    """Number of tasks, 0 while it is not known; ValueError where the data is not there."""
    # Brings numpy: a plan that needs no data does without.
    from tdro_hpc.data.tasks import find_tasks

    return len(find_tasks(config.data))


def _top_problems(config: Config, tasks: int) -> list[str]:
    """A share of the tasks that holds none of them cannot become a weights file. Rounded down as dro.artefacts does."""
    percents = [int(part) for part in config.s1.top_percents.split(",") if part.strip()]
    empty = [percent for percent in percents if tasks * percent // 100 == 0]
    if not empty:
        return []
    least = -(-100 // tasks)
    kept = [percent for percent in percents if percent not in empty] or [least]
    cure = f"s1.top_percents={','.join(map(str, kept))}"
    choices = [choice.strip() for choice in config.s2.weights.split(",") if choice.strip()]
    trained = [choice for choice in choices if choice not in [f"top{percent}" for percent in empty]]
    if trained != choices:
        cure += f" s2.weights={','.join(trained) or 'curr'}"
    number = "1 task" if tasks == 1 else f"{tasks} tasks"
    return [
        f"s1.top_percents holds {', '.join(map(str, empty))}, and that share of {number} is no task; "
        f"{least} is the least. Type {cure}."
    ]


def _missing_file(kind: str, name: str) -> str:
    path = Path(name)
    there = [file.name for file in sorted(path.parent.glob("*.json"))]
    near = get_close_matches(path.name, there, n=1)
    hint = f" Did you mean {path.parent / near[0]}?" if near else ""
    cure = "s2.weights=curr" if kind == "s2" else f"{kind}.weights=uniform"
    return f"{kind}.weights names {name}, and there is no such file.{hint} Type {kind}.weights=<its path> or {cure}."


def _evaluation_problems(config: Config) -> list[str]:
    problems: list[str] = []
    if config.eval.dir:
        _asked(lambda: _number_of_sets(config), "eval.dir", problems)
    elif not config.data.builder:
        problems.append(
            "Stage eval has no test sets: eval.dir is empty. Type eval.dir=<folder of test sets in BEIR layout>, or "
            "leave the stage out: stage=s0,s1,s2."
        )
    for model in (name.strip() for name in config.eval.models.split(",")):
        if "/" in model and not Path(model).expanduser().is_dir():
            problems.append(f"eval.models names {model}, which is no folder. Type eval.models=base,s0,s2 or its path.")
    return problems


def _number_of_sets(config: Config) -> int:
    from tdro_hpc.evaluation.beir import find_collections

    return len(find_collections(Path(config.eval.dir).expanduser(), config.eval.sets))
