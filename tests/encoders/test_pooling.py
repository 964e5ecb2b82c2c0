import pytest
import torch
from torch.testing import assert_close

from tdro_hpc.encoders.packing import build_packing
from tdro_hpc.encoders.pooling import pool, pool_packed

HIDDEN = torch.arange(2 * 4 * 2, dtype=torch.float32).view(2, 4, 2)  # row 0 holds 0..7, row 1 holds 8..15
RIGHT = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
LEFT = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("pooling", "mask", "expected"),
    [
        ("last", RIGHT, [[4, 5], [14, 15]]),
        ("last", LEFT, [[6, 7], [14, 15]]),
        ("cls", RIGHT, [[0, 1], [8, 9]]),
        ("cls", LEFT, [[2, 3], [8, 9]]),
        ("mean", RIGHT, [[2, 3], [11, 12]]),
        ("mean", LEFT, [[4, 5], [11, 12]]),
    ],
)
def test_pooling_takes_real_tokens_on_either_side(pooling, mask, expected):
    assert pool(HIDDEN, mask, pooling).tolist() == expected
    assert pool_packed(HIDDEN[mask.bool()], build_packing(mask), pooling).tolist() == expected


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_what_stands_at_padding_changes_neither_vectors_nor_gradients(pooling):
    hidden = HIDDEN.clone()
    hidden[0, 3] = float("nan")
    hidden.requires_grad_()
    vectors = pool(hidden, RIGHT, pooling)
    assert_close(vectors, pool(HIDDEN, RIGHT, pooling), rtol=0, atol=0)
    vectors.sum().backward()
    assert hidden.grad is not None and hidden.grad[0, 3].tolist() == [0, 0]


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_pooled_vectors_of_16_bit_states_are_float32(pooling):
    vectors = pool(HIDDEN.bfloat16(), RIGHT, pooling)
    assert vectors.dtype == torch.float32


def test_mean_of_many_16_bit_states_is_summed_in_float32():
    hidden = torch.full((1, 4096, 1), 1.0, dtype=torch.bfloat16)  # a bfloat16 sum of ones would stop at 256
    assert pool(hidden, torch.ones(1, 4096), "mean").item() == 1.0


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_row_without_real_token_is_named(pooling):
    with pytest.raises(ValueError, match="Row 1 of 2 has no real token"):
        pool(HIDDEN, torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]), pooling)
