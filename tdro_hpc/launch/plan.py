"""What is to be done for a wish like stage=s1: a pure function over plain data, which touches no disk."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tdro_hpc.config.schema import Config
from tdro_hpc.launch.keys import change_words, changed_keys
from tdro_hpc.launch.record import StageState
from tdro_hpc.launch.stage import Stage

SKIP, RUN, RUNNING, QUEUED = "done", "run", "running", "queued"
_CANCEL = "Type: python -m tdro_hpc.submit cancel, then again."


@dataclass(frozen=True)
class PlannedStage:
    """One line of the plan."""

    stage: Stage
    action: str  # done = nothing to do; run; running, queued = its job is waited for
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

    What is done is skipped, what runs or is queued is waited for, prerequisites that are not done come before. A stage
    is made again when it is forced or when a stage that it is made from is made again in this plan.
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
    problems += _refusals(steps, set(forced_names)) + _outside_refusals(graph, steps, states)
    if config.cluster.executor == "slurm":
        problems += _unasked_failures(steps, names, set(forced_names))
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
        first = dict.fromkeys((*stage.needs, *stage.follows))
        before = [other for other in first if other in steps and steps[other].action != SKIP]
        made_first = tuple(need for need in stage.needs if need in before)
        action, fresh, reason = _action(stage, states, made_first, forced=name in forced)
        after = tuple(before) if action != SKIP else ()
        steps[name] = PlannedStage(stage, action, states[name], fresh=fresh, after=after, reason=reason)
    return steps


def _action(
    stage: Stage, states: Mapping[str, StageState], after: tuple[str, ...], *, forced: bool
) -> tuple[str, bool, str]:
    """(action, begin anew, reason in words) of one stage."""
    state = states[stage.name]
    if state.status == "running":
        return RUNNING, False, f"running ({_job_words(state)})"
    if state.status in ("queued", "unknown"):  # with an unknown one in it, nothing of the plan is started
        waiting = [need for need in stage.needs if states[need].status != "done"]
        return QUEUED, False, f"queued ({_queue_words(state, waiting)})"
    if forced and state.status != "new":
        return RUN, True, "made again: forced"
    if state.status == "new":
        return RUN, True, f"not made yet: {state.problem}" if state.problem else "not made yet"
    if after and state.status in ("done", "stale"):
        return RUN, True, f"made again: {' and '.join(after)} will be another"
    if state.status == "done":
        return SKIP, False, ""
    if state.status == "stale":
        return RUN, True, f"made again: {state.problem}"
    words = f"failed {state.problem}" if state.status == "failed" else _stopped_words(state)
    if after or _older_inputs(stage, state, states):
        return RUN, True, f"{words}; begins anew: what it is made from has changed"
    if not state.step:
        return RUN, True, f"{words}; begins anew: nothing was saved"
    return RUN, False, f"{words}; continues after step {state.step}"


def _job_words(state: StageState) -> str:
    if state.pid:
        return f"job {state.job}, pid {state.pid} on {state.host}"
    return f"job {state.job} on {state.nodes}" if state.nodes else f"job {state.job}"


def _queue_words(state: StageState, waiting: Sequence[str]) -> str:
    if waiting and state.queue_reason in ("", "Dependency"):
        return f"job {state.job}, waiting for {' and '.join(waiting)}"
    return f"job {state.job}: {state.queue_reason}" if state.queue_reason else f"job {state.job}"


def _stopped_words(state: StageState) -> str:
    words = f"stopped after step {state.step}" if state.step else "stopped"
    if state.max_restarts and state.restarts >= state.max_restarts:
        words += f" with all {state.max_restarts} restarts used up"
    return f"{words}; {state.problem}" if state.problem else words


def _older_inputs(stage: Stage, state: StageState, states: Mapping[str, StageState]) -> list[str]:
    """Needs that were made again after this stage was made or begun from them."""
    if state.status == "queued" and not state.inputs:
        return []  # it takes what is there when it begins
    return [
        need
        for need in stage.needs
        if states[need].status == "done" and state.inputs.get(need) != states[need].identity
    ]


def _missing(
    graph: Mapping[str, Stage], steps: Mapping[str, PlannedStage], states: Mapping[str, StageState]
) -> set[str]:
    """Stages that the plan lacks: needs that are not done of what is to begin, and needs between two of its stages."""
    redone = {name for name, step in steps.items() if step.action != SKIP}
    missing: set[str] = set()
    for name, step in steps.items():
        for need in graph[name].needs:
            if need in steps:
                continue
            not_done = step.action in (RUN, QUEUED) and states[need].status != "done"
            if not_done or _ancestors(graph, need) & redone:
                missing.add(need)
    return missing


def _ancestors(graph: Mapping[str, Stage], name: str) -> set[str]:
    found: set[str] = set()
    for need in graph[name].needs:
        found |= {need} | _ancestors(graph, need)
    return found


def _refusals(steps: Mapping[str, PlannedStage], forced: set[str]) -> list[str]:
    """Why stages of the plan cannot be dealt with as they are."""
    problems = []
    for name, step in steps.items():
        if step.state.status == "unknown":
            problems.append(
                f"{name} may be in Slurm's queue (job {step.state.job}), but squeue did not answer: "
                f"{step.state.problem}. A second copy could be started; type the same line again when it answers."
            )
            continue
        is_busy = step.action in (RUNNING, QUEUED)
        if is_busy and name in forced:
            problems.append(f"{name} cannot be forced while it is {step.reason}. {_CANCEL}")
        # What is queued behind a job in the queue is an ordinary chain.
        made_first = [need for need in step.after if need in step.stage.needs]
        below = [need for need in made_first if step.action == RUNNING or steps[need].action == RUN]
        if is_busy and below:
            problems.append(_made_again_below(name, step.reason, below))
        changes = changed_keys(step.state.keys, step.state.keys_now)
        if step.action == RUN and not step.fresh and changes:
            was, now = change_words(changes)
            problems.append(
                f"{name} stopped after step {step.state.step}; it was begun with {was}, and the config says {now}. "
                f"Put that back to continue, or type force={name} to begin anew."
            )
    return problems


def _made_again_below(name: str, reason: str, needs: Sequence[str]) -> str:
    return f"{name} is {reason}, but {' and '.join(needs)}, which it is made from, would be made again. {_CANCEL}"


def _outside_refusals(
    graph: Mapping[str, Stage], steps: Mapping[str, PlannedStage], states: Mapping[str, StageState]
) -> list[str]:
    """Slurm jobs of stages outside the plan that would find what they are made from gone when they begin."""
    problems = []
    for name, stage in graph.items():
        state = states[name]
        below = [need for need in stage.needs if need in steps and steps[need].action == RUN]
        is_busy = state.executor == "slurm" and state.status in ("queued", "running")
        if name not in steps and below and is_busy:
            problems.append(_made_again_below(name, f"{state.status} ({_job_words(state)})", below))
    return problems


def _unasked_failures(steps: Mapping[str, PlannedStage], names: Sequence[str], forced: set[str]) -> list[str]:
    """Failed stages that nobody asked for: they would fail again, hours later, and all that waits for them too."""
    wanted = {*names, *forced}
    failed = [
        name
        for name, step in steps.items()
        if step.state.status == "failed" and step.action == RUN and name not in wanted
    ]
    line = ",".join(name for name in steps if name in failed or name in wanted)
    return [
        f"{name} failed {steps[name].state.problem}. It is not tried again unasked. Type stage={line} to do that."
        for name in failed
    ]


def _drift(step: PlannedStage, states: Mapping[str, StageState]) -> str:
    """What has changed since a stage that is kept was made; empty when nothing has."""
    name, state = step.stage.name, step.state
    if step.action == RUN:
        return ""
    sentences = []
    # A job that was submitted by hand is not known before it starts.
    changes = changed_keys(state.keys, state.keys_now) if state.keys or state.status != "queued" else []
    if changes:
        was, now = change_words(changes)
        sentences.append(f"was made with {was}; the config says {now}")
    older = _older_inputs(step.stage, state, states)
    if older:
        sentences.append(f"was made from an earlier {' and '.join(older)}")
    if not sentences:
        return ""
    if step.action in (RUNNING, QUEUED):
        doing = "is being made" if step.action == RUNNING else "is queued to be made"
        words = " and ".join(sentences).replace("was made", doing)
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
