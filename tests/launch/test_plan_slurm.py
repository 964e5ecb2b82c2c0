"""The plan with Slurm as a table of cases over plain data: s0 -> s1 -> s2-curr, s2-top70 -> eval."""

import itertools
from dataclasses import replace

import pytest

from tdro_hpc.config.cluster import ClusterConfig
from tdro_hpc.config.schema import Config, S2Config
from tdro_hpc.launch.plan import build_plan
from tdro_hpc.launch.record import StageState
from tdro_hpc.stages.graph import stage_graph

CONFIG = Config(s2=S2Config(weights="curr,top70"), cluster=ClusterConfig(executor="slurm"))
LOCAL = Config(s2=S2Config(weights="curr,top70"))
GRAPH = stage_graph(CONFIG)
KEYS = {"steps": 10}
OLD = {"steps": 9}
NEW = StageState(keys_now=KEYS)


def state(status: str, **values) -> StageState:
    """A state of a stage that was begun, or submitted, with the keys of today."""
    return StageState(status, KEYS, **{"keys": KEYS, "executor": "slurm", "max_restarts": 20, **values})


def queued(job: str, reason: str = "Dependency", **values) -> StageState:
    return state("queued", **{"job": job, "jobs": (job,), "queue_reason": reason, **values})


def running(job: str, **values) -> StageState:
    return state("running", **{"job": job, "jobs": (job,), "nodes": "node1,node2", "attempt": 1, **values})


def done(name: str) -> StageState:
    inputs = {need: f"{need}-1" for need in GRAPH[name].needs}
    return state("done", identity=f"{name}-1", inputs=inputs, attempt=1)


FAILED = state("failed", problem="at step 4: rank 3 on node2: NaN", job="811", attempt=1)
STOPPED = state("stopped", job="811", step=5, attempt=21, restarts=20)
UNKNOWN = state("unknown", job="811", problem="Unable to contact slurm controller")
LOST = StageState(keys_now=KEYS, executor="slurm", job="811", problem="job 811 left the queue before it began")
DEAD = replace(LOST, job="813", dead_jobs=("813",), problem="job 813 could never start: what it waited for has failed")
STALE = state("stale", problem="it was to be made again", inputs={"s0": "s0-0"})
CHAIN = {"s0": running("811"), "s1": queued("812"), "s2_curr": queued("813"), "s2_top70": queued("814")}
ALL_QUEUED = {**CHAIN, "s0": queued("811", "Resources"), "eval": queued("815")}


def states_of(**given: StageState | str) -> dict[str, StageState]:
    """NEW for all but those that are given; "" = done."""
    states = {name: NEW for name in GRAPH}
    for key, value in given.items():
        name = key.replace("_", "-")
        states[name] = done(name) if isinstance(value, str) else value
    return states


def told(plan) -> str:
    """`name:action` of each step, `!` for one that begins anew although something is there, `<` for what it awaits."""
    words = []
    for step in plan.steps:
        anew = "!" if step.fresh and step.state.status != "new" else ""
        after = f"<{','.join(step.after)}" if step.after else ""
        words.append(f"{step.stage.name}:{step.action}{anew}{after}")
    return " ".join(words)


CASES = {
    "nothing is there": ("s1", "", {}, "s0:run s1:run<s0"),
    "done: no dependency": ("s1", "", {"s0": ""}, "s1:run"),
    "done and wanted": ("s0,s1", "", {"s0": ""}, "s0:done s1:run"),
    "parent is queued: its job is waited for": ("s1", "", {"s0": queued("811")}, "s0:queued s1:run<s0"),
    "parent runs: its job is waited for": ("s1", "", {"s0": running("811")}, "s0:running s1:run<s0"),
    "queued and wanted": ("s0", "", {"s0": queued("811", "Resources")}, "s0:queued"),
    "a requeued job is queued": ("s0", "", {"s0": queued("811", "BeginTime", step=5)}, "s0:queued"),
    "the same line while the chain is queued": (
        "all",
        "",
        ALL_QUEUED,
        "s0:queued s1:queued<s0 s2-curr:queued<s1 s2-top70:queued<s1 eval:queued<s0,s2-curr,s2-top70",
    ),
    "the same line while the first of the chain runs": ("s1", "", CHAIN, "s0:running s1:queued<s0"),
    "the same line in the middle of the chain": (
        "s2-curr",
        "",
        {**CHAIN, "s0": "", "s1": running("812")},
        "s1:running s2-curr:queued<s1",
    ),
    "the same line when the chain is done": ("s0,s1", "", {"s0": "", "s1": ""}, "s0:done s1:done"),
    "more behind a queued chain": (
        "s1,s2",
        "",
        {"s0": running("811"), "s1": queued("812")},
        "s0:running s1:queued<s0 s2-curr:run<s1 s2-top70:run<s1",
    ),
    "failed and asked for by name": ("s0", "", {"s0": replace(FAILED, step=3)}, "s0:run"),
    "failed with nothing saved, by name": ("s0", "", {"s0": FAILED}, "s0:run!"),
    "failed and asked for with its dependant": ("s0,s1", "", {"s0": FAILED}, "s0:run! s1:run<s0"),
    "failed and asked for by its kind": (
        "s2",
        "",
        {"s0": "", "s1": "", "s2_curr": FAILED},
        "s2-curr:run! s2-top70:run",
    ),
    "failed and forced": ("s1", "s0", {"s0": FAILED}, "s0:run! s1:run<s0"),
    "failed, all": (
        "all",
        "",
        {"s0": FAILED},
        "s0:run! s1:run<s0 s2-curr:run<s1 s2-top70:run<s1 eval:run<s0,s2-curr,s2-top70",
    ),
    "failed beside what is asked for": ("s2-top70", "", {"s0": "", "s1": "", "s2_curr": FAILED}, "s2-top70:run"),
    "lost before it began": ("s1", "", {"s0": LOST}, "s0:run s1:run<s0"),
    "lost although something was saved": (
        "s0",
        "",
        {"s0": replace(STOPPED, problem="job 820 left the queue before it began")},
        "s0:run",
    ),
    "dependants that can never start": (
        "s0,s1,s2-curr",
        "",
        {"s0": FAILED, "s1": DEAD, "s2_curr": replace(DEAD, job="814", dead_jobs=("814",))},
        "s0:run! s1:run<s0 s2-curr:run<s1",
    ),
    "stopped with restarts used up": ("s0", "", {"s0": STOPPED}, "s0:run"),
    "a stopped prerequisite continues unasked": ("s1", "", {"s0": STOPPED}, "s0:run s1:run<s0"),
    "stopped, and its input is made again": (
        "s1",
        "",
        {"s0": running("811"), "s1": replace(STOPPED, inputs={"s0": "s0-1"})},
        "s0:running s1:run!<s0",
    ),
    "put aside by a submission that was lost": ("s0,s1", "", {"s0": LOST, "s1": STALE}, "s0:run s1:run!<s0"),
    "links in the queue": ("s1", "", {"s0": running("811", jobs=("811", "812", "813"))}, "s0:running s1:run<s0"),
    "links left when the stage is done": (
        "s1",
        "",
        {"s0": replace(done("s0"), dead_jobs=("812", "813"))},
        "s1:run",
    ),
    "links left of a stage that failed": (
        "s0",
        "",
        {"s0": replace(FAILED, dead_jobs=("812", "813"))},
        "s0:run!",
    ),
    "forced beside a queue of others": ("s2-curr", "s2-curr", {"s1": "", "s2_top70": queued("814")}, "s2-curr:run"),
    "done dependant of a queued stage is made again": (
        "s0,s1",
        "",
        {"s0": queued("811"), "s1": ""},
        "s0:queued s1:run!<s0",
    ),
    "unknown stages that nobody needs": ("s0", "", {"eval": UNKNOWN}, "s0:run"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_plan_of_case(case):
    wanted, forced, given, expected = case
    plan = build_plan(CONFIG, GRAPH, wanted, forced, states_of(**given))
    assert plan.problems == ()
    assert told(plan) == expected


CANCEL = "Type: python -m tdro_hpc.submit cancel, then again."
REFUSED = {
    "unknown": (
        "s0",
        "",
        {"s0": UNKNOWN},
        [
            "s0 may be in Slurm's queue (job 811), but squeue did not answer: Unable to contact slurm controller. "
            "A second copy could be started; type the same line again when it answers."
        ],
    ),
    "unknown prerequisite": ("s1", "", {"s0": UNKNOWN}, ["s0 may be in Slurm's queue"]),
    "unknown and forced": ("s0", "s0", {"s0": UNKNOWN}, ["s0 may be in Slurm's queue"]),
    "every unknown stage": ("s0,s1", "", {"s0": UNKNOWN, "s1": UNKNOWN}, ["s0 may be", "s1 may be"]),
    "failed prerequisite that nobody asked for": (
        "s1",
        "",
        {"s0": FAILED},
        [
            "s0 failed at step 4: rank 3 on node2: NaN. It is not tried again unasked. Type stage=s0,s1 to do that.",
        ],
    ),
    "failed prerequisite of a forced stage": ("", "s1", {"s0": FAILED}, ["s0 failed at step 4"]),
    "two failed prerequisites": (
        "eval",
        "",
        {"s0": "", "s1": "", "s2_curr": FAILED, "s2_top70": FAILED},
        ["s2-curr failed", "s2-top70 failed"],
    ),
    "forced while queued": (
        "s0",
        "s0",
        {"s0": queued("811", "Resources")},
        [f"s0 cannot be forced while it is queued (job 811: Resources). {CANCEL}"],
    ),
    "forced while running": (
        "s0",
        "s0",
        {"s0": running("811")},
        [f"s0 cannot be forced while it is running (job 811 on node1,node2). {CANCEL}"],
    ),
    "parent made again while its child is queued": (
        "s1",
        "s0",
        {"s0": "", "s1": queued("812", "Priority")},
        [
            "s1 is queued (job 812: Priority), but s0, which it is made from, would be made again. " + CANCEL,
        ],
    ),
    "parent made again while a child outside the plan is queued": (
        "s0",
        "s0",
        {"s0": "", "s1": queued("812")},
        [f"s1 is queued (job 812), but s0, which it is made from, would be made again. {CANCEL}"],
    ),
    "parent lost while its child is queued": ("s1", "", {"s0": LOST, "s1": queued("812")}, ["s1 is queued (job 812"]),
    "parent made again while its child runs": ("s1", "s0", {"s0": "", "s1": running("812")}, ["s1 is running"]),
    "changed keys of what would continue": (
        "s0",
        "",
        {"s0": replace(STOPPED, keys=OLD)},
        [
            "s0 stopped after step 5; it was begun with steps=9, and the config says 10. "
            "Put that back to continue, or type force=s0 to begin anew.",
        ],
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_refusal_of_case(case):
    wanted, forced, given, expected = case
    plan = build_plan(CONFIG, GRAPH, wanted, forced, states_of(**given))
    assert plan.steps == ()
    assert len(plan.problems) == len(expected), plan.problems
    for problem, words in zip(plan.problems, expected, strict=True):
        assert problem.startswith(words)


WORDS = {
    "waiting for another stage": (queued("812"), "queued (job 812, waiting for s0)"),
    "no reason given yet": (queued("812", ""), "queued (job 812, waiting for s0)"),
    "waiting for room": (queued("812", "Resources"), "queued (job 812: Resources)"),
    "running": (running("812"), "running (job 812 on node1,node2)"),
    "running, nodes not known": (running("812", nodes=""), "running (job 812)"),
    "lost": (LOST, "not made yet: job 811 left the queue before it began"),
    "dead": (DEAD, "not made yet: job 813 could never start: what it waited for has failed"),
    "restarts used up": (STOPPED, "stopped after step 5 with all 20 restarts used up; continues after step 5"),
    "restarts left": (replace(STOPPED, restarts=3), "stopped after step 5; continues after step 5"),
    "stopped, then lost": (
        replace(STOPPED, restarts=0, problem="job 9 left the queue before it began"),
        "stopped after step 5; job 9 left the queue before it began; continues after step 5",
    ),
}


@pytest.mark.parametrize("case", WORDS.values(), ids=WORDS.keys())
def test_reason_of_case(case):
    given, expected = case
    (step,) = [
        step
        for step in build_plan(CONFIG, GRAPH, "s1", "", states_of(s0=running("811"), s1=given)).steps
        if step.stage.name == "s1"
    ]
    if given.status == "stopped":  # its input would be another: looked at with one that is done
        states = states_of(s0="", s1=replace(given, inputs={"s0": "s0-1"}))
        (step,) = build_plan(CONFIG, GRAPH, "s1", "", states).steps
    assert step.reason == expected


def test_waiting_for_the_link_before_is_slurms_word():
    given = states_of(s0="", s1=queued("813", jobs=("813", "814")))
    (step,) = build_plan(CONFIG, GRAPH, "s1", "", given).steps
    assert step.reason == "queued (job 813: Dependency)"


def test_failed_prerequisite_is_tried_again_on_this_machine():
    plan = build_plan(LOCAL, GRAPH, "s1", "", states_of(s0=FAILED))
    assert plan.problems == () and told(plan) == "s0:run! s1:run<s0"


def test_drift_of_a_queued_stage_is_named_and_it_goes_on():
    plan = build_plan(CONFIG, GRAPH, "s0", "", states_of(s0=queued("811", "Resources", keys=OLD)))
    assert told(plan) == "s0:queued"
    assert plan.drift == (
        "s0 is queued to be made with steps=9; the config says 10: it goes on as it is. "
        "Type: python -m tdro_hpc.submit cancel, then force=s0.",
    )


def test_a_queued_stage_that_has_not_begun_takes_its_inputs_as_they_are_then():
    states = states_of(s0="", s1=queued("812", "Resources"))
    assert build_plan(CONFIG, GRAPH, "s1", "", states).drift == ()
    unnoted = states_of(s0="", s1=queued("812", "Resources", keys={}))
    assert build_plan(CONFIG, GRAPH, "s1", "", unnoted).drift == ()
    begun = states_of(s0="", s1=queued("812", "BeginTime", inputs={"s0": "s0-0"}))
    assert "made from an earlier s0" in build_plan(CONFIG, GRAPH, "s1", "", begun).drift[0]


def test_nothing_in_the_queue_is_ever_submitted_twice():
    """All 6^4 combinations of states of four stages: whatever is busy or unknown never gets another job."""
    choices = [NEW, "", queued("1"), running("1"), UNKNOWN, FAILED]
    for mix in itertools.product(choices, repeat=4):
        states = states_of(**dict(zip(("s0", "s1", "s2_curr", "s2_top70"), mix, strict=True)))
        for wanted, forced in (("s2", ""), ("s1", "s0")):
            plan = build_plan(CONFIG, GRAPH, wanted, forced, states)
            assert all(step.state.status in ("new", "done", "failed") for step in plan.to_run), told(plan)
            for step in plan.to_run:
                # What it needs is done, or has a job that it can wait for.
                assert all(states[need].status == "done" or need in step.after for need in step.stage.needs)
