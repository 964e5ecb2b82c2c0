"""The watch names the cause: the kind of loss, task, rows and step; on a rank without fault, that it was another."""

from types import SimpleNamespace

import pytest
import torch

from tdro_hpc.training import finite
from tdro_hpc.training.finite import FiniteWatch, NotFiniteError

NAN = float("nan")
FINE = torch.ones(2)
BATCHES = [SimpleNamespace(task_ids=torch.tensor([0, 1]), rows=torch.tensor([7, 9]))]


def watch_of(*steps):
    watch = FiniteWatch(["a", "b"], torch.device("cpu"))
    for number, (losses, norm, references) in enumerate(steps, start=1):
        watch.add(number, losses, BATCHES, torch.tensor(norm), reference_losses=references)
    return watch


def words_of(watch):
    with pytest.raises(NotFiniteError) as caught:
        watch.check(lambda task, row: f"{task}.jsonl row {row}")
    return str(caught.value)


def test_finite_values_pass():
    watch_of((FINE, 1.0, None), (FINE, 2.0, FINE)).check(lambda task, row: "")


def test_own_loss_is_named_with_task_row_and_step():
    words = words_of(watch_of((FINE, 1.0, None), (torch.tensor([1.0, NAN]), NAN, None)))
    assert "The loss is not finite at step 2 for 1 of 2 rows" in words and "b.jsonl row 9" in words


def test_reference_loss_is_named_as_such():
    words = words_of(watch_of((FINE, 1.0, torch.tensor([float("inf"), 1.0]))))
    assert "The reference loss is not finite at step 1" in words and "task a: reference loss inf" in words


def test_gradient_is_the_cause_only_if_no_rank_has_a_bad_loss():
    assert "gradient norm is nan at step 1" in words_of(watch_of((FINE, NAN, None)))


def test_fine_rank_says_that_another_one_met_it(monkeypatch):
    # The other rank had a bad loss at step 2, and its gradient made everything here bad from then on.
    monkeypatch.setattr(finite, "sum_over_ranks", lambda own: own + torch.tensor([0.0, 1.0, 1.0]))
    words = words_of(watch_of((FINE, 1.0, None), (FINE, NAN, None), (torch.full((2,), NAN), NAN, None)))
    assert words.startswith("Another rank met a loss that is not finite at step 2")
