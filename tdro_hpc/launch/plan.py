"""What is to be done for a wish like stage=s1: a pure function over plain data, which touches no disk."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tdro_hpc.config.schema import Config
from tdro_hpc.launch.keys import change_words, changed_keys
from tdro_hpc.launch.record import StageState
from tdro_hpc.launch.stage import Stage

SKIP, RUN, RUNNING = "done", "run", "running"


@dataclass(frozen=True)
class PlannedStage:
    """One line of the plan."""

    stage: Stage
    action: str  # done = nothing to do, run, running = a job is at work and is waited for
    state: StageState
    fresh: bool = False  # what an earlier making left is removed first
    after: tuple[str, ...] = ()  # stages of this plan that have to end before
    reason: str = ""  # in words


@dataclass(frozen=True)
class Plan:
    """Stages in the order in which they run, with everything that a person should know before."""

    steps: tuple[PlannedStage, ...]
    drift: tuple[str, ...] = ()  # results that are kept although the config or an input has changed since
    notes: tuple[str, ...] = ()  # stages that this plan leaves out of date
    problems: tuple[str, ...] = ()  # mistakes: nothing may be started

    @property
    def to_run(self) -> tuple[PlannedStage, ...]:
        """The steps that start a job."""
        return tuple(step for step in self.steps if step.action == RUN)


def stages_named(text: str, graph: Mapping[str, Stage], everything: Sequence[str]) -> tuple[list[str], list[str]]:
    """(names in the order of the graph, problems) for all | s2 | s0,s2 | s2-top70.

    everything  what `all` means; a kind such as s2 stands for all stages of that kind
    """
    names: set[str] = set()
    problems: list[str] = []
    typed = [word.strip() for word in text.split(",") if word.strip()]
    for word in [part for item in typed for part in (everything if item == "all" else [item])]:
        found = [word] if word in graph else [stage.name for stage in graph.values() if stage.kind == word]
        names.update(found)
        if not found:
            problems.append(_unknown_stage(word, graph))
    return [name for name in graph if name in names], problems


def _unknown_stage(word: str, graph: Mapping[str, Stage]) -> str:
    if word == "prepare":
        return "Stage prepare exists with data=embedded only: other data are there already. Type data=embedded."
    choices = list(dict.fromkeys(["all", *(stage.kind for stage in graph.values()), *graph]))
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.4)
    meant = f" Did you mean {near[0]}?" if near else ""
    return f"Unknown stage {word}.{meant} There are {', '.join(choices)}."


def build_plan(
    config: Config,
    graph: Mapping[str, Stage],
    wanted: str,
    forced: str,
    states: Mapping[str, StageState],
) -> Plan:
    """The plan for stage=`wanted` force=`forced`.

    What is done is skipped, what runs is waited for, prerequisites that are not done come before. A stage is made
    again when it is forced or when a stage that it is made from is made again in this plan.
    """
    names, problems = stages_named(wanted, graph, config.stages)
    forced_names, more_problems = stages_named(forced, graph, config.stages)
    problems += [problem for problem in more_problems if problem not in problems]
    included = {*names, *forced_names}
    while True:
        steps = _decide(graph, included, set(forced_names), states)
        missing = _missing(graph, steps, states)
        if not missing:
            break
        included |= missing
    problems += _refusals(steps, set(forced_names))
    plan = Plan(
        steps=tuple(steps.values()),
        drift=tuple(_drift(step, states) for step in steps.values() if _drift(step, states)),
        notes=tuple(_left_behind(graph, steps, states)),
        problems=tuple(problems),
    )
    return plan if not problems else replace(plan, steps=())


def _decide(
    graph: Mapping[str, Stage], included: set[str], forced: set[str], states: Mapping[str, StageState]
) -> dict[str, PlannedStage]:
    steps: dict[str, PlannedStage] = {}
    for name, stage in graph.items():
        if name not in included:
            continue
        after = tuple(need for need in stage.needs if need in steps and steps[need].action != SKIP)
        action, fresh, reason = _action(stage, states, after, forced=name in forced)
        steps[name] = PlannedStage(stage, action, states[name], fresh=fresh, after=after, reason=reason)
    return steps


def _action(
    stage: Stage, states: Mapping[str, StageState], after: tuple[str, ...], *, forced: bool
) -> tuple[str, bool, str]:
    """(action, begin anew, reason in words) of one stage."""
    state = states[stage.name]
    if state.status == "running":
        return RUNNING, False, f"running ({_job_words(state)})"
    if forced and state.status != "new":
        return RUN, True, "made again: forced"
    if state.status == "new":
        return RUN, True, "not made yet"
    if after and state.status in ("done", "stale"):
        return RUN, True, f"made again: {' and '.join(after)} will be another"
    if state.status == "done":
        return SKIP, False, ""
    if state.status == "stale":
        return RUN, True, f"made again: {state.problem}"
    words = f"failed {state.problem}" if state.status == "failed" else f"stopped after step {state.step}"
    if after or _older_inputs(stage, state, states):
        return RUN, True, f"{words}; begins anew: what it is made from has changed"
    if not state.step:
        return RUN, True, f"{words}; begins anew: nothing was saved"
    return RUN, False, f"{words}; continues after step {state.step}"


def _job_words(state: StageState) -> str:
    return f"job {state.job}, pid {state.pid} on {state.host}" if state.pid else f"job {state.job}"


def _older_inputs(stage: Stage, state: StageState, states: Mapping[str, StageState]) -> list[str]:
    """Needs that were made again after this stage was made or begun from them."""
    return [
        need
        for need in stage.needs
        if states[need].status == "done" and state.inputs.get(need) != states[need].identity
    ]


def _missing(
    graph: Mapping[str, Stage], steps: Mapping[str, PlannedStage], states: Mapping[str, StageState]
) -> set[str]:
    """Stages that the plan lacks: needs of what runs that are not done, and needs between two stages of the plan."""
    redone = {name for name, step in steps.items() if step.action != SKIP}
    missing: set[str] = set()
    for name, step in steps.items():
        for need in graph[name].needs:
            if need in steps:
                continue
            not_done = step.action == RUN and states[need].status != "done"
            if not_done or _ancestors(graph, need) & redone:
                missing.add(need)
    return missing


def _ancestors(graph: Mapping[str, Stage], name: str) -> set[str]:
    found: set[str] = set()
    for need in graph[name].needs:
        found |= {need} | _ancestors(graph, need)
    return found


def _refusals(steps: Mapping[str, PlannedStage], forced: set[str]) -> list[str]:
    problems = []
    for name, step in steps.items():
        if step.action == RUNNING and name in forced:
            problems.append(
                f"{name} cannot be forced while it is {step.reason}. "
                "Type: python -m tdro_hpc.submit cancel, then again."
            )
        if step.action == RUNNING and step.after:
            problems.append(
                f"{name} is {step.reason}, but {' and '.join(step.after)}, which it is made from, would be made again. "
                "Type: python -m tdro_hpc.submit cancel, then again."
            )
        changes = changed_keys(step.state.keys, step.state.keys_now)
        if step.action == RUN and not step.fresh and changes:
            was, now = change_words(changes)
            problems.append(
                f"{name} stopped after step {step.state.step}; it was begun with {was}, and the config says {now}. "
                f"Put that back to continue, or type force={name} to begin anew."
            )
    return problems


def _drift(step: PlannedStage, states: Mapping[str, StageState]) -> str:
    """What has changed since a stage that is kept was made; empty when nothing has."""
    name, state = step.stage.name, step.state
    if step.action == RUN:
        return ""
    sentences = []
    changes = changed_keys(state.keys, state.keys_now)
    if changes:
        was, now = change_words(changes)
        sentences.append(f"was made with {was}; the config says {now}")
    older = _older_inputs(step.stage, state, states)
    if older:
        sentences.append(f"was made from an earlier {' and '.join(older)}")
    if not sentences:
        return ""
    if step.action == RUNNING:
        words = " and ".join(sentences).replace("was made", "is being made")
        return f"{name} {words}: it goes on as it is. Type: python -m tdro_hpc.submit cancel, then force={name}."
    return f"{name} {' and '.join(sentences)}: it is kept. Type force={name} to make it again."


def _left_behind(
    graph: Mapping[str, Stage], steps: Mapping[str, PlannedStage], states: Mapping[str, StageState]
) -> list[str]:
    """Words for stages outside the plan that are done, and are made from something that it makes again."""
    redone = {name for name, step in steps.items() if step.action != SKIP}
    return [
        f"{name} was made from the {' and '.join(need for need in graph if need in _ancestors(graph, name) & redone)} "
        f"of before; it stays as it is. Type force={name} afterwards to make it again."
        for name in graph
        if name not in steps and states[name].status == "done" and _ancestors(graph, name) & redone
    ]
