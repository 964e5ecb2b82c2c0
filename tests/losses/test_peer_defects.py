"""One test for each defect that other training codes had in this loss. None of them raised an error there."""

import pytest
import torch

from tdro_hpc.config.schema import TrainingConfig
from tdro_hpc.losses import grouped_infonce, weighted_infonce
from tdro_hpc.losses.gradcache import cached_backward
from tdro_hpc.parallel.process import Process
from tdro_hpc.parallel.torch_engine import TorchEngine
from tests.reference.infonce import slow_infonce
from tests.reference.loss_cases import IMPLEMENTATIONS, distance, embeddings, values_and_gradients, with_hard_negatives
from tests.reference.toy import ToyEncoder, toy_batch

both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
ROWS = 16


def cached_and_plain(loss_of):
    """(loss, gradients) of a step through the cache, and of the reference in one graph."""
    batch = toy_batch(1, ROWS)
    parts = [batch.query_tokens, batch.passage_tokens]
    alone = Process(data_rank=0, data_size=1, local_rank=0, device=torch.device("cpu"))
    engine, encoder = TorchEngine(ToyEncoder(), alone, TrainingConfig()), ToyEncoder()
    loss = cached_backward(
        engine, parts, 30, lambda embeddings: loss_of(grouped_infonce, *embeddings), synchronise=True
    )
    plain = loss_of(slow_infonce, *(encoder(part) for part in parts))
    plain.backward()
    found, wanted = (
        {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        for model in (engine.encoder, encoder)
    )
    return loss.item(), found, plain.item(), wanted


@both
def test_gradient_under_caching_is_not_b_times_too_large(implementation):
    def mean_loss(infonce, queries, documents):
        options = {} if infonce is slow_infonce else {"implementation": implementation}
        return infonce(queries, documents, 3 * torch.arange(ROWS), temperature=0.05, **options).mean()

    loss, found, plain, wanted = cached_and_plain(mean_loss)
    assert loss == pytest.approx(plain, rel=1e-5)
    assert found.keys() == wanted.keys()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)  # a factor of 16 rows would be plain to see


@both
@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_temperature_is_not_dropped_under_caching(implementation, temperature):
    def weighted_loss(infonce, queries, documents):
        weights, positives = torch.linspace(0.5, 2, ROWS), 3 * torch.arange(ROWS)
        if infonce is slow_infonce:
            return (infonce(queries, documents, positives, temperature=temperature) * weights).sum()
        options = {"temperature": temperature, "row_weights": weights, "implementation": implementation}
        return weighted_infonce(queries, documents, positives, **options)[0]

    loss, found, plain, wanted = cached_and_plain(weighted_loss)
    assert loss == pytest.approx(plain, rel=1e-5)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@both
@pytest.mark.parametrize("score", [89.0, 500.0, 5000.0])
@pytest.mark.parametrize("symmetric", [False, True])
def test_scores_past_88_do_not_overflow(implementation, score, symmetric):
    queries, documents = torch.eye(3), torch.eye(3)[[0, 1, 2, 0]]  # row 0 has the positive 1, and equals 0 and 3
    options = {"temperature": 1 / score, "symmetric": symmetric, "implementation": implementation}
    inputs = queries, documents, torch.tensor([1, 1, 2]), torch.ones(3)
    losses, *gradients = values_and_gradients(grouped_infonce, *inputs, **options)
    forth = torch.tensor([score + 0.6931472, 0.0, 0.0])
    back = torch.tensor([0.6931472, 0.0, 0.0])  # row 2 is a negative of column 1, at 0 as row 0 is
    torch.testing.assert_close(losses, (forth + back) / 2 if symmetric else forth)
    assert all(gradient.isfinite().all() and (gradient != 0).any() for gradient in gradients)
    sides = queries.requires_grad_(), documents.requires_grad_()
    total, again = weighted_infonce(*sides, inputs[2], row_weights=inputs[3], **options)
    total.backward()
    torch.testing.assert_close(again, losses)
    torch.testing.assert_close([side.grad for side in sides], gradients)


@both
@pytest.mark.parametrize("gap", [3.0, 16.0, 40.0, 80.0])
def test_loss_is_right_where_the_positive_dominates(implementation, gap):
    queries, documents = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    inputs, options = (queries, documents, torch.tensor([0])), {"temperature": 1 / gap}
    found = values_and_gradients(grouped_infonce, *inputs, torch.ones(1), implementation=implementation, **options)
    wanted = values_and_gradients(
        slow_infonce, *(side.double() for side in inputs[:2]), inputs[2], torch.ones(1), **options
    )
    assert found[0].item() == pytest.approx(wanted[0].item(), rel=1e-5)  # 1.1e-7 at 16: lost in 1 + 1.1e-7 of float32
    assert all(distance(got, want) <= 1e-5 for got, want in zip(found[1:], wanted[1:], strict=True))


@both
def test_gathered_passages_keep_positives_apart_from_hard_negatives(implementation):
    """The columns of two ranks, each with its positives and hard negatives side by side, one rank after the other."""
    queries, documents, positives = with_hard_negatives(2, 8, 24)
    queries, documents = queries.float(), documents.float()
    options = {"temperature": 0.05, "implementation": implementation}
    whole = grouped_infonce(queries, documents, positives, **options)
    shards = documents.split(12)
    for rank in range(2):
        rows = slice(4 * rank, 4 * rank + 4)
        first_column = sum(len(shard) for shard in shards[:rank])
        mine = first_column + 3 * torch.arange(4)
        losses = grouped_infonce(queries[rows], torch.cat(shards), mine, **options)
        torch.testing.assert_close(losses, whole[rows], rtol=1e-5, atol=1e-6)
    wanted = slow_infonce(queries, documents, positives, temperature=0.05)
    torch.testing.assert_close(whole.double(), wanted, rtol=1e-5, atol=1e-5)


@both
def test_scores_are_not_rounded_to_half_precision(implementation):
    """At T = 0.002 a cosine of bfloat16 is a logit in steps of 2 nats."""
    queries, documents, positives = with_hard_negatives(3, 32, 128)
    queries, documents = queries.bfloat16(), documents.bfloat16()
    wanted = slow_infonce(queries, documents, positives, temperature=0.002)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = grouped_infonce(queries, documents, positives, temperature=0.002, implementation=implementation)
        scores = queries @ documents.T / 0.002
    rounded = torch.nn.functional.cross_entropy(scores.float(), positives, reduction="none")
    assert distance(found, wanted) <= 1e-4
    assert distance(rounded, wanted) >= 0.01  # what the rounding would do here


@both
def test_a_batch_of_one_passage_has_loss_zero_and_stays_trainable(implementation):
    queries, documents = (vectors.float() for vectors in embeddings(4, 1, 1))
    losses, *gradients = values_and_gradients(
        grouped_infonce,
        queries,
        documents,
        torch.tensor([0]),
        torch.ones(1),
        temperature=0.02,
        implementation=implementation,
    )
    assert losses.item() == 0 and all((gradient == 0).all() for gradient in gradients)


@both
def test_duplicates_are_told_by_id_and_not_by_score(implementation):
    """Dropout makes two embeddings of one text differ, so equal scores do not find them."""
    queries, documents = (vectors.float() for vectors in embeddings(5, 2, 3))
    twin = documents[:1] + 1e-3
    options = {"temperature": 0.05, "implementation": implementation}
    ids = torch.tensor([7, 8, 9, 7])
    found = grouped_infonce(queries[:1], torch.cat([documents, twin]), torch.tensor([0]), document_ids=ids, **options)
    torch.testing.assert_close(found, grouped_infonce(queries[:1], documents, torch.tensor([0]), **options))
