"""Which columns a row is compared with under each policy, spelt out row by row."""

import dataclasses

import pytest
import torch

from tdro_hpc.config.schema import LossConfig
from tdro_hpc.losses.score_block import build_score_block
from tests.reference.infonce import slow_infonce
from tests.reference.toy import toy_batch

ROWS, PER_QUERY = 6, 3
BARE = LossConfig(mask_duplicates=False, mask_known_positives=False)


def embeddings():
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(n, 4, generator=generator) for n in (ROWS, ROWS * PER_QUERY)]
    return [torch.nn.functional.normalize(vectors, dim=1) for vectors in draw]


def losses_by_hand(queries, passages, batch, sees, keeps):
    """sees(row, other row): whether row is compared with the passages of the other; keeps(row, column)."""
    losses = []
    for row in range(ROWS):
        columns = [c for c in range(len(passages)) if c // PER_QUERY == row or sees(row, c // PER_QUERY)]
        columns = [c for c in columns if c == row * PER_QUERY or keeps(row, c)]
        positive = torch.tensor([columns.index(row * PER_QUERY)])
        losses.append(slow_infonce(queries[row : row + 1], passages[columns], positive, temperature=0.1))
    return torch.cat(losses).float()


def check(batch, negatives, loss, sees, keeps=lambda row, column: True):
    queries, passages = embeddings()
    block = build_score_block(queries, passages, batch, negatives=negatives, temperature=0.1, loss=loss)
    wanted = losses_by_hand(queries, passages, batch, sees, keeps)
    torch.testing.assert_close(block.row_losses(), wanted, rtol=1e-4, atol=1e-6)  # float32 scores


SEES = {
    "group": lambda batch, row, other: False,
    "task": lambda batch, row, other: bool(batch.task_ids[row] == batch.task_ids[other]),
    "batch": lambda batch, row, other: True,
    "world": lambda batch, row, other: True,
}


@pytest.mark.parametrize("own_task", [None, 0])
@pytest.mark.parametrize("negatives", SEES)
def test_policy_decides_which_passages_a_row_sees(negatives, own_task):
    batch = toy_batch(3, ROWS, per_query=PER_QUERY, own_task=own_task)
    own = batch.own_negatives_only.tolist()
    assert any(own) == (own_task is not None) and not all(own)

    def sees(row, other):
        return not own[row] and not own[other] and SEES[negatives](batch, row, other)

    check(batch, negatives, BARE, sees)


@pytest.mark.parametrize("duplicates", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_masks_can_be_switched_one_by_one(duplicates, known):
    batch = toy_batch(4, ROWS, per_query=PER_QUERY)
    batch.document_ids = torch.arange(ROWS * PER_QUERY) % 7  # every text occurs two or three times
    batch.known_positive_ids = torch.tensor([[1, -1], [2, 3], [-1, -1], [5, 6], [0, 1], [6, -1]])
    ids = batch.document_ids.tolist()

    def keeps(row, column):
        same = duplicates and ids[column] == ids[row * PER_QUERY]
        return not same and not (known and ids[column] in batch.known_positive_ids[row].tolist())

    config = LossConfig(mask_duplicates=duplicates, mask_known_positives=known)
    check(batch, "batch", config, lambda row, other: True, keeps)


def test_margin_drops_what_scores_near_the_positive_or_above():
    batch = toy_batch(5, ROWS, per_query=PER_QUERY)
    queries, passages = embeddings()
    scores = queries @ passages.T

    def keeps(row, column):
        return bool(scores[row, column] <= scores[row, row * PER_QUERY] - 0.1)

    check(batch, "batch", dataclasses.replace(BARE, false_negative_margin=0.1), lambda row, other: True, keeps)


def test_block_describes_columns_of_this_process_alone():
    batch = toy_batch(6, ROWS, per_query=PER_QUERY, own_task=0)
    queries, passages = embeddings()
    loss = LossConfig()
    block = build_score_block(queries, passages, batch, negatives="world", temperature=0.1, loss=loss)
    assert block.documents is passages and block.positives.tolist() == [0, 3, 6, 9, 12, 15]
    assert torch.equal(block.document_ids, batch.document_ids)
    own = {int(group) for group, alone in zip(block.query_group, batch.own_negatives_only, strict=True) if alone}
    assert len(own) == int(batch.own_negatives_only.sum()) and max(own) < 0


def test_one_passage_a_query_without_others_costs_nothing():
    batch = toy_batch(7, ROWS, per_query=1)
    queries, passages = embeddings()
    block = build_score_block(queries, passages[:ROWS], batch, negatives="group", temperature=0.1, loss=LossConfig())
    assert block.row_losses().tolist() == [0.0] * ROWS


def test_unknown_policy_and_odd_passages_are_named():
    queries, passages = embeddings()
    batch = toy_batch(8, ROWS, per_query=PER_QUERY)
    keys = {"temperature": 0.1, "loss": BARE}
    with pytest.raises(ValueError, match="policy is 'all'; it must be one of group, task, batch, world"):
        build_score_block(queries, passages, batch, negatives="all", **keys)
    with pytest.raises(ValueError, match="17 passages do not divide into 6 rows"):
        build_score_block(queries, passages[:-1], batch, negatives="batch", **keys)
