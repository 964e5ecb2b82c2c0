"""The contrastive step on a toy encoder: loss reweighting is a factor on each row, and uniform weights are none."""

import copy
from unittest import mock

import pytest
import torch

from tdro_hpc.config.schema import LossConfig, TrainingConfig
from tdro_hpc.data.batches import Batch
from tdro_hpc.losses import torch_core
from tdro_hpc.parallel.process import Process
from tdro_hpc.parallel.torch_engine import TorchEngine
from tdro_hpc.training.finite import FiniteWatch
from tdro_hpc.training.step import ContrastiveStep, row_losses
from tests.reference.toy import ToyEncoder, toy_tokens

ALONE = Process(data_rank=0, data_size=1, local_rank=0, device=torch.device("cpu"))
TRAINING = TrainingConfig(steps=9, temperature=0.5, max_grad_norm=0.0, passages_per_query=3)


def toy_batch(seed, task_ids):
    rows = len(task_ids)
    return Batch(
        query_tokens=toy_tokens(seed, rows),
        passage_tokens=toy_tokens(seed + 100, 3 * rows),
        task_ids=torch.tensor(task_ids),
        rows=torch.arange(rows),
        document_ids=torch.arange(3 * rows) + 1000 * seed,
        known_positive_ids=torch.full((rows, 1), -1),
        own_negatives_only=torch.zeros(rows, dtype=torch.bool),
        draw_ids=torch.arange(rows),
        global_task_counts=torch.bincount(torch.tensor(task_ids), minlength=2),
    )


BATCHES = [toy_batch(1, [0, 1, 1, 0]), toy_batch(2, [1, 1, 1, 0])]


def stepped(factors, monkeypatch, implementation="auto"):
    """Gradients of one step, by name, caught before the optimiser takes them."""
    engine = TorchEngine(ToyEncoder(), ALONE, TRAINING)
    caught = {}

    def catch():
        named = engine.encoder.named_parameters()
        caught.update({name: copy.deepcopy(p.grad) for name, p in named if p.grad is not None})
        return torch.ones(())

    monkeypatch.setattr(engine, "step", catch)
    watch = FiniteWatch(["a", "b"], ALONE.device)
    loss = LossConfig(implementation=implementation)
    ContrastiveStep(engine, TRAINING, loss, watch, num_tasks=2, task_factors=factors)(0, BATCHES)
    return caught


def test_reweighted_gradients_are_those_of_the_weighted_mean(monkeypatch):
    alpha = torch.tensor([0.8, 0.2])
    found = stepped(2 * alpha, monkeypatch)
    encoder = ToyEncoder().train()
    total = torch.zeros(())
    for batch in BATCHES:
        losses = row_losses([encoder(batch.query_tokens), encoder(batch.passage_tokens)], batch, TRAINING, LossConfig())
        total = total + (2 * alpha[batch.task_ids] * losses).mean() / len(BATCHES)
    total.backward()
    for name, parameter in encoder.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-7, msg=name)
    plain = stepped(None, monkeypatch)
    assert not torch.allclose(found["dense.weight"], plain["dense.weight"], rtol=0.01)


def test_gradient_is_formed_with_the_loss_because_the_weights_are_known(monkeypatch):
    spies = {name: mock.Mock(wraps=getattr(torch_core, name)) for name in ("forward", "backward", "forward_backward")}
    for name, spy in spies.items():
        monkeypatch.setattr(torch_core, name, spy)
    stepped(None, monkeypatch, implementation="torch")
    assert {name: spy.call_count for name, spy in spies.items()} == {
        "forward": 0,
        "backward": 0,
        "forward_backward": len(BATCHES),
    }


@pytest.mark.parametrize("tasks", [2, 25])
def test_uniform_weights_change_no_bit(tasks, monkeypatch):
    uniform = torch.tensor([tasks * (1 / tasks)] * tasks, dtype=torch.float32)  # as s2 makes them
    found, plain = stepped(uniform, monkeypatch), stepped(None, monkeypatch)
    assert found.keys() == plain.keys() and len(found) > 2
    for name, gradient in plain.items():
        assert torch.equal(found[name], gradient), name
