import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tdro_hpc.data.draws import draw_words
from tdro_hpc.data.mixture import Mixture, weights_of
from tests.reference import mixture as reference

SKEWED = [0.5, 0.3, 0.15, 0.05]


def build_mixture(sizes, weights, *, rows=8, micro_steps=2, batching="mixed", stratified=False, seed=5) -> Mixture:
    return Mixture(
        sizes,
        weights,
        rows_per_micro_step=rows,
        micro_steps=micro_steps,
        batching=batching,
        stratified=stratified,
        seed=seed,
    )


def draws_of(mixture: Mixture, steps: range) -> tuple[np.ndarray, np.ndarray]:
    """Tasks and rows of all positions of some steps, in order."""
    drawn = [mixture.draw(step, micro_step) for step in steps for micro_step in range(mixture.micro_steps)]
    return np.concatenate([tasks for tasks, _ in drawn]), np.concatenate([rows for _, rows in drawn])


KINDS = [("homogeneous", False), ("mixed", False), ("mixed", True)]


@pytest.mark.parametrize(("batching", "stratified"), KINDS)
def test_rows_equal_those_of_one_slow_loop_from_step_0(batching: str, stratified: bool):
    sizes = [5, 7, 11, 40]
    mixture = build_mixture(sizes, SKEWED, rows=12, batching=batching, stratified=stratified)
    tasks, rows = draws_of(mixture, range(12))
    keys = {(t, e): int(draw_words(5, "order of rows", t, e)) for t in range(4) for e in range(100)}
    assert rows.tolist() == reference.rows_in_order(tasks.tolist(), sizes, keys)


@pytest.mark.parametrize(("batching", "stratified"), KINDS)
def test_every_epoch_has_every_row_once_in_an_order_of_its_own(batching: str, stratified: bool):
    sizes = [9, 13, 20]
    tasks, rows = draws_of(build_mixture(sizes, [1, 1, 1], batching=batching, stratified=stratified), range(40))
    for task, size in enumerate(sizes):
        drawn = rows[tasks == task]
        epochs = [tuple(drawn[k : k + size].tolist()) for k in range(0, len(drawn) - size + 1, size)]
        assert len(epochs) >= 5
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len(set(epochs)) == len(epochs)


def test_tasks_of_one_epoch_have_orders_of_their_own():
    tasks, rows = draws_of(build_mixture([30, 30], [1, 1]), range(10))
    assert rows[tasks == 0][:30].tolist() != rows[tasks == 1][:30].tolist()


def test_homogeneous_batch_has_one_task_and_wraps_into_the_next_epoch():
    mixture = build_mixture([5, 5], [1, 1], rows=12, batching="homogeneous")
    for step in range(20):
        tasks, rows = mixture.draw(step, 1)
        assert len(set(tasks.tolist())) == 1
        assert set(rows.tolist()) == set(range(5)) and max(Counter(rows.tolist()).values()) <= 4


def test_consecutive_homogeneous_batches_do_not_repeat_their_task_in_runs():
    # The released loader: with 4 workers, batches 4j .. 4j + 3 have the same task.
    mixture = build_mixture([100] * 25, [1] * 25, micro_steps=1, batching="homogeneous")
    tasks = np.asarray([mixture.draw(step, 0)[0][0] for step in range(1500)])
    repeats = int((tasks[1:] == tasks[:-1]).sum())
    assert abs(repeats - 60) < 5 * math.sqrt(60)  # 1500 / 25 by chance; 1125 there


@pytest.mark.parametrize("weights", [[1, 1, 1, 1], SKEWED, [0.7, 0.0, 0.3, 0.0]])
@pytest.mark.parametrize("batching", ["homogeneous", "mixed"])
def test_realised_shares_lie_within_sampling_error(batching: str, weights: list[float]):
    rows = 1 if batching == "homogeneous" else 64
    mixture = build_mixture([50] * 4, weights, rows=rows, micro_steps=1, batching=batching)
    tasks, _ = draws_of(mixture, range(1500 if rows == 1 else 80))
    shares = np.asarray(weights) / sum(weights)
    counts = np.bincount(tasks, minlength=4)
    deviation = np.sqrt(len(tasks) * shares * (1 - shares))
    assert (np.abs(counts - len(tasks) * shares) <= 4.5 * deviation).all()
    used = shares > 0
    chi_square = ((counts - len(tasks) * shares)[used] ** 2 / (len(tasks) * shares[used])).sum()
    assert chi_square < 20  # 3 degrees of freedom: passed by chance once in 6000


def test_independent_draws_vary_as_a_binomial_does():
    mixture = build_mixture([50] * 4, SKEWED, rows=64, micro_steps=1)
    counts = np.stack([np.bincount(mixture.draw(step, 0)[0], minlength=4) for step in range(400)])
    expected = 64 * np.asarray(SKEWED) * (1 - np.asarray(SKEWED))
    assert counts.var(axis=0) == pytest.approx(expected, rel=0.35)  # a variance of 400 draws is known to 7 %


def test_stratified_steps_have_every_task_and_counts_next_to_their_expectation():
    mixture = build_mixture([50] * 4, SKEWED, rows=14, micro_steps=2, stratified=True)
    expected = 28 * np.asarray(SKEWED)  # 14, 8.4, 4.2, 1.4
    counts = np.stack([np.bincount(draws_of(mixture, range(s, s + 1))[0], minlength=4) for s in range(250)])
    assert (counts.sum(axis=1) == 28).all() and (counts >= 1).all()
    assert (np.abs(counts - expected) < 1).all()
    assert counts.mean(axis=0) == pytest.approx(expected, abs=4.5 * 0.5 / math.sqrt(250))  # a 0-or-1 draw: s.d. <= 0.5


def test_stratified_order_is_shuffled_over_the_whole_step():
    mixture = build_mixture([50] * 4, [1, 1, 1, 1], rows=8, micro_steps=2, stratified=True)
    first = np.stack([np.bincount(mixture.draw(step, 0)[0], minlength=4) for step in range(400)])
    assert first.mean(axis=0) == pytest.approx([2.0] * 4, abs=0.3)
    assert first.std() > 0.5  # a step's 4 rows of a task fall on its two micro-steps by chance
    places = np.stack([mixture.draw(step, 0)[0] for step in range(400)])
    assert all(abs(int((places[:, k] == 0).sum()) - 100) < 45 for k in range(8))  # 5 s.d. of a binomial


def test_stratified_gives_rare_tasks_one_row_a_step_and_skips_weight_0():
    mixture = build_mixture([50] * 5, [0.9, 0.07, 0.02, 0.01, 0.0], rows=10, micro_steps=1, stratified=True)
    counts = np.stack([np.bincount(mixture.draw(step, 0)[0], minlength=5) for step in range(200)])
    # 10 rows: the three rare ones take a row each, 7 are left for the first.
    assert (counts == [7, 1, 1, 1, 0]).all()


def test_stratified_holds_for_shares_that_are_not_exact_in_binary():
    for num_tasks in (3, 7, 10, 25, 49):
        mixture = build_mixture([50] * num_tasks, [0.1] * num_tasks, rows=num_tasks, micro_steps=3, stratified=True)
        for step in range(20):
            tasks, _ = draws_of(mixture, range(step, step + 1))
            assert np.bincount(tasks, minlength=num_tasks).tolist() == [3] * num_tasks


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rows": 3, "micro_steps": 1, "stratified": True}, "3 rows, too few for 4 tasks.*accumulation_steps"),
        ({"batching": "homogeneous", "stratified": True}, "stratified=false"),
        ({"sizes": [5, 0, 5, 5]}, "Task number 1 .* no rows"),
        ({"weights": [0, 0, 0, 0]}, "sum > 0"),
        ({"weights": [1, -1, 1, 1]}, ">= 0"),
        ({"weights": [1, math.nan, 1, 1]}, "nan"),
    ],
)
def test_settings_that_no_batch_can_be_drawn_from_are_named(arguments: dict, words: str):
    arguments = {"sizes": [5] * 4, "weights": [1] * 4, **arguments}
    with pytest.raises(ValueError, match=words):
        build_mixture(arguments.pop("sizes"), arguments.pop("weights"), **arguments)


@pytest.mark.parametrize(("batching", "stratified"), KINDS)
def test_draws_out_of_order_and_after_resume_equal_those_in_order(batching: str, stratified: bool):
    def build() -> Mixture:
        return build_mixture([5, 7, 11, 40], SKEWED, batching=batching, stratified=stratified)

    in_order = build()
    wanted = {(s, m): in_order.draw(s, m) for s in range(30) for m in range(2)}
    out_of_order, resumed = build(), build()
    resumed.load_state(json.loads(json.dumps(build().state(20))))
    for step, micro_step in [(25, 1), (3, 0), (29, 0), (29, 1), (25, 1), (0, 1), (20, 0), (19, 1), (21, 0)]:
        for mixture in (out_of_order, resumed):
            got = mixture.draw(step, micro_step)
            assert all(np.array_equal(*pair) for pair in zip(got, wanted[step, micro_step], strict=True))
    assert in_order.state(20) == resumed.state(20) == out_of_order.state(20)


def test_resume_counts_nothing_before_the_loaded_step(monkeypatch: pytest.MonkeyPatch):
    resumed = build_mixture([50] * 4, SKEWED)
    resumed.load_state({"step": 10**9, "draws": [10**9] * 4, "sizes": [50] * 4})
    counted: list[int] = []
    count = resumed._counts_of

    def noted(steps: np.ndarray) -> np.ndarray:
        counted.extend(steps.tolist())
        return count(steps)

    monkeypatch.setattr(resumed, "_counts_of", noted)
    resumed.draw(10**9 + 2, 0)
    resumed.draw(10**9 + 5, 0)
    assert counted == [10**9 + k for k in range(5)]


def test_counting_from_step_0_is_done_in_pieces_with_the_same_result(monkeypatch: pytest.MonkeyPatch):
    whole = build_mixture([5, 7], [1, 2]).state(101)
    monkeypatch.setattr("tdro_hpc.data.mixture._COUNTED_POSITIONS", 100)  # 6 steps of 16 positions
    assert build_mixture([5, 7], [1, 2]).state(101) == whole
    assert sum(whole["draws"]) == 101 * 16


def test_state_of_other_task_sizes_is_refused():
    with pytest.raises(ValueError, match=r"\[5, 8\].*force"):
        build_mixture([5, 8], [1, 1]).load_state(build_mixture([5, 7], [1, 1]).state(3))


def test_weights_by_word_follow_the_sizes():
    names, sizes = ["a", "b", "c"], [100, 400, 1600]
    assert weights_of("uniform", names, sizes) == pytest.approx([1 / 3] * 3)
    assert weights_of("size", names, sizes) == pytest.approx([1 / 21, 4 / 21, 16 / 21])
    assert weights_of("temperature:0.5", names, sizes) == pytest.approx([1 / 7, 2 / 7, 4 / 7])


def test_weights_of_a_file_are_normalised_and_absent_tasks_get_0(tmp_path: Path):
    path = tmp_path / "top_weights.json"
    released = {
        "domain_ids": {"c": 0, "a": 1},
        "domain_weights": {"c": 3.0, "a": 1.0},
        "size": {"c": 1600, "a": 100},
        "epoch": {"c": 0.8, "a": 4.25},
    }
    path.write_text(json.dumps(released))
    assert weights_of(str(path), ["a", "b", "c"], [100, 400, 1600]).tolist() == [0.25, 0.0, 0.75]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"domain_weights": {"squat": 1.0}}, "squat.*nearest to squat: squad"),
        ({"domain_ids": {"squad": 0}}, "domain_weights"),
        ({"domain_weights": {"squad": -1.0}}, ">= 0"),
        ({"domain_weights": {"squad": "much"}}, "domain_weights"),
        ([1, 2], "no weights JSON"),
    ],
)
def test_a_wrong_weights_file_is_explained(tmp_path: Path, content: object, words: str):
    path = tmp_path / "weights.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words):
        weights_of(str(path), ["nq", "squad"], [10, 10])


@pytest.mark.parametrize("spec", ["unifrom", "temperature:", "temperature:warm", "missing.json", "size:2"])
def test_an_unknown_weights_word_says_what_to_type(spec: str):
    with pytest.raises(ValueError, match=r"temperature:"):
        weights_of(spec, ["a"], [1])
