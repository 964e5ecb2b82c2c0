import json

import pytest
import torch

from tdro_hpc.training.metrics import Metrics, StepValues, duration_of, keep_rows_until, read_rows


def make(folder, lines=None, **more):
    settings = {"stage": "s1", "steps": 6, "task_names": ["a", "b"], "queries_per_step": 4, "first_rank": True}
    say = (lines if lines is not None else []).append
    return Metrics(folder, tensorboard=False, say=say, **(settings | more))


def values_of(step):
    sums = torch.tensor([[2.0 * step, 3.0], [1.0, 1.0], [0.0, 0.0], [2.0, 1.0]], dtype=torch.float64)
    alpha = torch.tensor([0.25, 0.75]) + 0.01 * step
    return StepValues(task_sums=sums, grad_norm=torch.tensor(float(step)), alpha=alpha, gradient=alpha * 10)


def test_row_holds_means_over_the_rows_of_the_interval(tmp_path):
    lines = []
    metrics = make(tmp_path, lines)
    metrics.add(values_of(1))
    metrics.add(values_of(2))
    metrics.write(2, learning_rate=1e-4)
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert row["loss"] == pytest.approx((2 + 3 + 4 + 3) / 6)
    assert row["task_loss"] == {"a": pytest.approx(6 / 4), "b": pytest.approx(3.0)}
    assert row["task_reference_loss"] == {"a": pytest.approx(0.5), "b": pytest.approx(1.0)}
    assert row["task_rows"] == {"a": 4, "b": 2}
    assert row["grad_norm"] == pytest.approx(1.5)
    assert row["alpha"]["b"] == pytest.approx(0.77)
    assert lines[0].startswith("s1 step 2/6 33% | loss 2.0000 | grad 1.50 | lr 1.0e-04")
    assert "alpha max b 0.770 min a 0.270" in lines[0]


def test_trajectory_has_a_row_for_every_step(tmp_path):
    metrics = make(tmp_path)
    for step in (1, 2, 3):
        metrics.add(values_of(step))
    metrics.write(3, learning_rate=1.0)
    rows = read_rows(tmp_path / "trajectory.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["alpha"]["a"] for row in rows] == pytest.approx([0.26, 0.27, 0.28])
    assert rows[1]["measurement"]["b"] == pytest.approx(7.7)


def test_interval_cut_by_a_checkpoint_gives_the_unbroken_rows(tmp_path):
    (tmp_path / "unbroken").mkdir()
    (tmp_path / "broken").mkdir()
    unbroken, first = make(tmp_path / "unbroken"), make(tmp_path / "broken")
    for step in range(1, 7):
        unbroken.add(values_of(step))
        if step % 4 == 0 or step == 6:
            unbroken.write(step, learning_rate=1.0)
    for step in range(1, 4):
        first.add(values_of(step))
    state = first.state_dict()
    first.add(values_of(4))
    first.write(4, learning_rate=1.0)  # written after the checkpoint, then the process was killed
    second = make(tmp_path / "broken")
    second.load_state_dict(state)
    second.resume(3)
    for step in range(4, 7):
        second.add(values_of(step))
        if step % 4 == 0 or step == 6:
            second.write(step, learning_rate=1.0)
    for name in ("metrics.jsonl", "trajectory.jsonl"):
        rows = [read_rows(tmp_path / kind / name) for kind in ("unbroken", "broken")]
        for row in rows[0] + rows[1]:
            row.pop("clock", None)
        assert rows[0] == rows[1]


def test_rows_after_a_step_are_dropped_and_half_a_line_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    keep_rows_until(path, 2)
    assert [row["step"] for row in read_rows(path)] == [1, 2]


def test_other_ranks_write_nothing(tmp_path):
    metrics = make(tmp_path, first_rank=False)
    metrics.add(values_of(1))
    metrics.write(1, learning_rate=1.0)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_events_are_written(tmp_path):
    pytest.importorskip("tensorboard")
    metrics = make(tmp_path)
    metrics = Metrics(
        tmp_path,
        stage="s1",
        steps=6,
        task_names=["a", "b"],
        queries_per_step=4,
        first_rank=True,
        tensorboard=True,
        say=lambda line: None,
    )
    metrics.add(values_of(1))
    metrics.write(1, learning_rate=1.0)
    assert list((tmp_path / "tensorboard").glob("events*"))


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0s"), (59.4, "59s"), (61, "1m01s"), (3661, "1h01m")])
def test_durations_are_short(seconds, words):
    assert duration_of(seconds) == words


def test_loaded_interval_moves_to_the_device_of_the_new_values(tmp_path):
    first, second = make(tmp_path), make(tmp_path)
    first.add(values_of(1))
    first.add(values_of(2))
    second.load_state_dict(first.state_dict())
    new = values_of(3)
    # `meta` stands for a GPU: like it, it takes no tensor of the host into a stack.
    second.add(StepValues(new.task_sums, new.grad_norm.to("meta"), new.alpha.to("meta"), new.gradient.to("meta")))
    state = second.state_dict()["tensors"]
    assert [state[name].device.type for name in ("grad_norms", "alphas", "gradients")] == ["meta"] * 3
    kept = [*second._grad_norms, *second._alphas, *second._gradients]
    assert {value.device.type for value in kept} == {"meta"} and len(kept) == 9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_interval_continues_on_a_gpu(tmp_path):
    first, second = make(tmp_path), make(tmp_path)
    first.add(values_of(1))
    second.load_state_dict(first.state_dict())
    new = values_of(2)
    second.add(StepValues(*(value.cuda() for value in (new.task_sums, new.grad_norm, new.alpha, new.gradient))))
    second.write(2, learning_rate=1.0)
    assert [row["step"] for row in read_rows(tmp_path / "trajectory.jsonl")] == [1, 2]
