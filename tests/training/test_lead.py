"""The warning that a stop cannot be obeyed before the time limit: once, with both figures and the value to type."""

import pytest

from tdro_hpc.training import lead
from tdro_hpc.training.lead import LeadWatch


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(lead.time, "monotonic", lambda: now[0])
    return now


def steps(watch: LeadWatch, clock: list[float], *seconds: float) -> None:
    for number, duration in enumerate(seconds, start=1):
        clock[0] += duration
        watch.end_step(number)


def test_warns_once_when_twice_a_step_and_a_save_do_not_fit(clock):
    said: list[str] = []
    watch = LeadWatch(10.0, said.append)
    steps(watch, clock, 50.0, 2.0, 3.0)  # the first one compiles: no measure of a later one
    assert said == [] and watch.longest_step == 3.0
    watch.end_save(2.1)
    watch.end_save(4.0)
    assert len(said) == 1
    assert "step took 3.0 s and a save 2.1 s" in said[0] and "cluster.stop_lead_seconds=11" in said[0]
    watch.summarise("s0")
    assert said[1] == "s0 longest step 3.0 s, longest save 4.0 s (cluster.stop_lead_seconds=10, needed 14)"


def test_enough_time_and_no_limit_are_silent(clock):
    said: list[str] = []
    watch = LeadWatch(10.0, said.append)
    steps(watch, clock, 1.0, 2.0)
    watch.end_save(3.0)
    assert said == []
    without = LeadWatch(0.0, said.append)
    steps(without, clock, 1.0, 99.0)
    without.summarise("s0")
    assert said == []


def test_steps_that_are_looked_at_together_share_their_time_and_saves_are_not_part_of_it(clock):
    watch = LeadWatch(10.0, None)
    watch.end_step(10)
    clock[0] += 20.0
    watch.end_step(20)
    clock[0] += 30.0
    watch.end_save(30.0)
    clock[0] += 1.0
    watch.end_step(21)
    assert watch.longest_step == 2.0 and watch.needed_seconds == 64
