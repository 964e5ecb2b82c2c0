"""The plan as a table of cases over plain data: s0 -> s1 -> s2-curr, s2-top70 -> eval."""

import itertools
from dataclasses import replace

import pytest

from tdro_hpc.config.schema import Config, S2Config
from tdro_hpc.launch.plan import build_plan, stages_named
from tdro_hpc.launch.record import StageState
from tdro_hpc.stages.graph import stage_graph

CONFIG = Config(s2=S2Config(weights="curr,top70"))
GRAPH = stage_graph(CONFIG)
NEW = StageState(keys_now={"steps": 10})
RUNS = StageState("running", {"steps": 10}, {"steps": 10}, job="812", pid=77, host="node1", attempt=1)
FAILED = StageState("failed", {"steps": 10}, {"steps": 10}, problem="at step 4: NaN", attempt=1)
STOPPED = StageState("stopped", {"steps": 10}, {"steps": 10}, step=5, attempt=1)
STALE = StageState("stale", {"steps": 10}, {"steps": 10}, problem="out/model is missing", attempt=1)


def done(name: str, **inputs: str) -> StageState:
    """A done stage whose DONE.json is called <name>-1, made from the -1 of all its needs unless said otherwise."""
    made_from = {need: f"{need}-1" for need in GRAPH[name].needs} | {k.replace("_", "-"): v for k, v in inputs.items()}
    return StageState("done", {"steps": 10}, {"steps": 10}, inputs=made_from, identity=f"{name}-1", attempt=1)


def states_of(**given: StageState | str) -> dict[str, StageState]:
    states = {name: NEW for name in GRAPH}
    for key, state in given.items():
        name = key.replace("_", "-")
        states[name] = done(name) if isinstance(state, str) else state
    return states


def told(plan) -> str:
    """`name:action` of each step, `!` for one that begins anew although something is there, `<` for what it awaits."""
    words = []
    for step in plan.steps:
        anew = "!" if step.fresh and step.state.status != "new" else ""
        after = f"<{','.join(step.after)}" if step.after else ""
        words.append(f"{step.stage.name}:{step.action}{anew}{after}")
    return " ".join(words)


ALL_DONE = {"s0": "", "s1": "", "s2_curr": "", "s2_top70": "", "eval": ""}
CASES = {
    "nothing is there": ("s0", "", {}, "s0:run"),
    "needs come before": ("s1", "", {}, "s0:run s1:run<s0"),
    "needs of needs": ("s2-curr", "", {}, "s0:run s1:run<s0 s2-curr:run<s1"),
    "a kind is all its variants": (
        "s2",
        "",
        {"s0": "", "s1": ""},
        "s2-curr:run s2-top70:run",
    ),
    "done needs are not even named": ("s1", "", {"s0": ""}, "s1:run"),
    "done and wanted is skipped": ("s0,s1", "", {"s0": ""}, "s0:done s1:run"),
    "all": (
        "all",
        "",
        {},
        "s0:run s1:run<s0 s2-curr:run<s1 s2-top70:run<s1 eval:run<s0,s2-curr,s2-top70",
    ),
    "all done": ("all", "", ALL_DONE, "s0:done s1:done s2-curr:done s2-top70:done eval:done"),
    "export comes after eval, whose table it shows": (
        "all,export",
        "",
        {"s0": "", "s1": ""},
        "s0:done s1:done s2-curr:run s2-top70:run eval:run<s2-curr,s2-top70 export:run<s2-curr,eval",
    ),
    "export of a done model needs no eval": ("export", "", {"s2_curr": ""}, "export:run"),
    "export brings its model along": ("export", "", {"s1": ""}, "s2-curr:run export:run<s2-curr"),
    "another model is exported again": (
        "export",
        "s2-curr",
        {**ALL_DONE, "export": ""},
        "s2-curr:run! export:run!<s2-curr",
    ),
    "another table is no reason to export again": (
        "eval,export",
        "eval",
        {**ALL_DONE, "export": ""},
        "eval:run! export:done",
    ),
    "export that is queued behind eval may be left there": (
        "eval,export",
        "",
        {**ALL_DONE, "eval": RUNS, "export": replace(RUNS, status="queued")},
        "eval:running export:queued<eval",
    ),
    "order of the call does not matter": ("s1,s0", "", {}, "s0:run s1:run<s0"),
    "needs of a done stage may be gone": ("s1", "", {"s1": ""}, "s1:done"),
    "running is waited for, not copied": ("s1", "", {"s0": RUNS}, "s0:running s1:run<s0"),
    "running and wanted": ("s0", "", {"s0": RUNS}, "s0:running"),
    "failed runs again from nothing": ("s0", "", {"s0": FAILED}, "s0:run!"),
    "failed continues from a checkpoint": ("s0", "", {"s0": replace(FAILED, step=3)}, "s0:run"),
    "failed need comes before": ("s1", "", {"s0": FAILED}, "s0:run! s1:run<s0"),
    "stopped continues": ("s0", "", {"s0": STOPPED}, "s0:run"),
    "stopped before a save begins anew": ("s0", "", {"s0": replace(STOPPED, step=0)}, "s0:run!"),
    "stopped with changed keys and nothing saved begins anew": (
        "s0",
        "",
        {"s0": replace(STOPPED, step=0, keys={"steps": 9})},
        "s0:run!",
    ),
    "outputs lost": ("s0", "", {"s0": STALE}, "s0:run!"),
    "lost outputs of a need": ("s1", "", {"s0": STALE}, "s0:run! s1:run<s0"),
    "forced although done": ("s0", "s0", {"s0": ""}, "s0:run!"),
    "forced needs nothing more": ("", "s0", {"s0": ""}, "s0:run!"),
    "forced without being there": ("s0", "s0", {}, "s0:run"),
    "forced: what is wanted of it is made again": ("s0,s1", "s0", {"s0": "", "s1": ""}, "s0:run! s1:run!<s0"),
    "forced: what lies between is made again too": (
        "s2-curr",
        "s0",
        {"s0": "", "s1": "", "s2_curr": ""},
        "s0:run! s1:run!<s0 s2-curr:run!<s1",
    ),
    "forced in the middle": (
        "s2-curr",
        "s1",
        {"s0": "", "s1": "", "s2_curr": ""},
        "s1:run! s2-curr:run!<s1",
    ),
    "stopped and its need was made again": (
        "s1",
        "",
        {"s0": "", "s1": replace(STOPPED, inputs={"s0": "old"})},
        "s1:run!",
    ),
    "stopped and its need is the same": ("s1", "", {"s0": "", "s1": replace(STOPPED, inputs={"s0": "s0-1"})}, "s1:run"),
    "a need that continues makes its dependant again": ("s0,s1", "", {"s0": STOPPED, "s1": ""}, "s0:run s1:run!<s0"),
    "a need that runs makes its dependant again": ("s1,s0", "", {"s0": RUNS, "s1": ""}, "s0:running s1:run!<s0"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_plan_of_case(case):
    wanted, forced, given, expected = case
    plan = build_plan(CONFIG, GRAPH, wanted, forced, states_of(**given))
    assert plan.problems == ()
    assert told(plan) == expected


def test_every_plan_runs_needs_first_and_starts_no_second_copy():
    """All 5^4 combinations of states of four stages: three properties that hold for every one of them."""
    choices = [NEW, "", RUNS, STOPPED, STALE]
    for mix in itertools.product(choices, repeat=4):
        states = states_of(**dict(zip(("s0", "s1", "s2_curr", "s2_top70"), mix, strict=True)))
        plan = build_plan(CONFIG, GRAPH, "s2", "", states)
        seen: set[str] = set()
        for step in plan.steps:
            assert (step.action == "running") == (step.state.status == "running")
            if step.action == "run":
                for need in step.stage.needs:
                    assert need in seen or states[need].status == "done", told(plan)
            seen.add(step.stage.name)


def test_drift_is_named_with_both_values_and_the_line_to_type():
    old = replace(done("s0"), keys={"s0.steps": 10, "seed": 1}, keys_now={"s0.steps": 20, "seed": 1})
    plan = build_plan(CONFIG, GRAPH, "s1", "", states_of(s0=old))
    assert plan.drift == () and told(plan) == "s1:run"  # not part of the wish
    plan = build_plan(CONFIG, GRAPH, "s0,s1", "", states_of(s0=old))
    assert plan.drift == (
        "s0 was made with s0.steps=10; the config says 20: it is kept. Type force=s0 to make it again.",
    )
    assert told(plan) == "s0:done s1:run"


def test_several_changed_keys_are_all_named():
    old = replace(done("s0"), keys={"a": 1, "b": "x", "c": 3}, keys_now={"a": 2, "b": "", "c": 3, "d": 4})
    (sentence,) = build_plan(CONFIG, GRAPH, "s0", "", states_of(s0=old)).drift
    assert 'a=1, b=x, d=(none); the config says a=2, b="", d=4' in sentence


def test_an_input_made_again_later_is_drift():
    states = states_of(s0="", s1=done("s1", s0="s0-0"))
    (sentence,) = build_plan(CONFIG, GRAPH, "s1", "", states).drift
    assert sentence == "s1 was made from an earlier s0: it is kept. Type force=s1 to make it again."


def test_running_with_other_keys_goes_on_and_says_so():
    plan = build_plan(CONFIG, GRAPH, "s0", "", states_of(s0=replace(RUNS, keys={"steps": 9})))
    assert told(plan) == "s0:running"
    assert plan.drift[0].startswith("s0 is being made with steps=9; the config says 10: it goes on as it is.")


def test_continuing_with_other_keys_is_refused():
    plan = build_plan(CONFIG, GRAPH, "s0", "", states_of(s0=replace(STOPPED, keys={"steps": 9})))
    assert plan.steps == ()
    assert plan.problems == (
        "s0 stopped after step 5; it was begun with steps=9, and the config says 10. "
        "Put that back to continue, or type force=s0 to begin anew.",
    )


def test_forcing_what_runs_is_refused():
    (problem,) = build_plan(CONFIG, GRAPH, "s0", "s0", states_of(s0=RUNS)).problems
    assert "cannot be forced while it is running (job 812, pid 77 on node1)" in problem and "cancel" in problem


def test_making_the_input_of_a_running_stage_again_is_refused():
    problems = build_plan(CONFIG, GRAPH, "s1", "s0", states_of(s0="", s1=RUNS)).problems
    assert any("s1 is running" in problem and "s0" in problem for problem in problems)


def test_stages_left_out_of_date_are_named():
    plan = build_plan(CONFIG, GRAPH, "s0", "s0", states_of(**ALL_DONE))
    assert told(plan) == "s0:run!"
    assert [note.split()[0] for note in plan.notes] == ["s1", "s2-curr", "s2-top70", "eval"]
    assert "force=s1" in plan.notes[0]


def test_unknown_stages_are_reported_together_with_the_nearest_name():
    plan = build_plan(CONFIG, GRAPH, "s0,s2-top7,evl", "prepar", states_of())
    assert len(plan.problems) == 3 and plan.steps == ()
    assert "Unknown stage s2-top7. Did you mean s2-top70?" in plan.problems[0]
    assert "Did you mean eval?" in plan.problems[1]


def test_all_means_the_stages_of_the_config():
    assert stages_named("all", GRAPH, ["s0", "eval"]) == (["s0", "eval"], [])
    assert stages_named("eval,s0", GRAPH, []) == (["s0", "eval"], [])
