"""Parts of linear layers against the whole layer, without ranks; tests/distributed/test_pipeline.py has ranks."""

import pytest
import torch
from torch import nn

from tdro_hpc.parallel.pipeline import tensor
from tdro_hpc.parallel.pipeline.tensor import LowRank, SplitLinear, TensorAxis

LOW_RANK = LowRank(rank=3, scale=2.0)


def whole_layer():
    """A linear layer [8 -> 12] with bias, and the factors of its update."""
    torch.manual_seed(0)
    return nn.Linear(8, 12), torch.randn(3, 8), torch.randn(12, 3)


def part_of(linear, first, second, axis, *, by_outputs):
    """The part of one rank, with its values."""
    part = SplitLinear(linear, axis, by_outputs=by_outputs, low_rank=LOW_RANK)
    values = {"weight": linear.weight, "bias": linear.bias, "lora_A": first, "lora_B": second}
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            dim = part.split_dim(name)
            value = values[name]
            if dim is not None:
                value = value.narrow(dim, axis.rank * parameter.shape[dim], parameter.shape[dim])
            parameter.copy_(value)
    return part


def test_parts_by_outputs_give_the_outputs_of_the_whole_layer():
    linear, first, second = whole_layer()
    entering = torch.randn(5, 8)
    parts = [part_of(linear, first, second, TensorAxis(rank, 4), by_outputs=True) for rank in range(4)]
    wanted = linear(entering) + 2.0 * entering @ first.T @ second.T
    torch.testing.assert_close(torch.cat([part(entering) for part in parts], dim=1), wanted)
    assert parts[0].weight.shape == (3, 8) and parts[0].lora_A.shape == (3, 8) and parts[0].lora_B.shape == (3, 3)


def test_parts_by_inputs_sum_to_the_whole_layer_with_its_bias_once(monkeypatch):
    linear, first, second = whole_layer()
    entering = torch.randn(5, 8)
    monkeypatch.setattr(tensor, "sum_of_parts", lambda part, axis: part)
    parts = [part_of(linear, first, second, TensorAxis(rank, 2), by_outputs=False) for rank in range(2)]
    leaving = [part(half) for part, half in zip(parts, entering.chunk(2, dim=1), strict=True)]
    wanted = linear(entering) + 2.0 * entering @ first.T @ second.T
    torch.testing.assert_close(leaving[0] + leaving[1] - linear.bias, wanted)
    assert parts[0].weight.shape == (12, 4) and parts[0].lora_A.shape == (3, 4) and parts[0].lora_B.shape == (12, 3)


def test_shares_of_gradients_sum_to_the_gradient_of_the_whole_factor():
    linear, first, second = whole_layer()
    entering, asked = torch.randn(5, 8), torch.randn(5, 12)
    whole = first.clone().requires_grad_()
    (2.0 * entering @ whole.T @ second.T * asked).sum().backward()
    shares = []
    for rank in range(2):
        part = part_of(linear, first, second, TensorAxis(rank, 2), by_outputs=True)
        (part(entering) * asked.chunk(2, dim=1)[rank]).sum().backward()
        assert [name for name, _ in part.named_parameters() if part.is_partial(name)] == ["lora_A"]
        shares.append(part.lora_A.grad)
    torch.testing.assert_close(shares[0] + shares[1], whole.grad)


def test_one_rank_has_the_whole_layer_in_both_ways():
    linear, first, second = whole_layer()
    entering = torch.randn(5, 8)
    outputs = [part_of(linear, first, second, TensorAxis(), by_outputs=way)(entering) for way in (True, False)]
    assert torch.equal(*outputs)


def test_rows_that_cannot_be_shared_are_named():
    with pytest.raises(AssertionError, match="12 cannot be split over 5"):
        TensorAxis(0, 5).share(12)
