"""Linear layers of which each tensor rank holds a part, and their low-rank updates (the scheme of arXiv 1909.08053).

The linears of attention and of the feed-forward come in pairs: the first is split by its outputs (q, k, v, gate, up:
whole heads and whole columns of the inner width), the second by its inputs (o, down), so that between the two nothing
is exchanged. What enters a pair is whole on every rank and its gradient is summed; what leaves it is summed.

A parameter that is whole on every rank but sees only a rank's part of the work has the rank's share of its gradient:
PARTIAL names them, and the engine sums them once a step. They are the norms over the head width, the first factor of an
update that is split by outputs, and the second of one that is split by inputs.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

OUTPUT_SPLIT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
INPUT_SPLIT = ("o_proj", "down_proj")
ENTRANCES = ("input_layernorm", "post_attention_layernorm")  # whose outputs go into the pairs and nowhere else
HEAD_NORMS = ("q_norm", "k_norm")


@dataclass(frozen=True)
class TensorAxis:
    """The place of this rank among those that share each matrix."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None  # None for one rank

    def share(self, size: int) -> int:
        """What one rank holds of `size` rows; raises AssertionError where they cannot be shared evenly."""
        assert size % self.size == 0, f"{size} cannot be split over {self.size} tensor ranks"
        return size // self.size


@dataclass(frozen=True)
class LowRank:
    """Shape of a low-rank update."""

    rank: int
    scale: float  # factor on the update


class SplitLinear(nn.Module):
    """The part of a linear layer that one tensor rank holds; without tensor parallelism the whole layer.

    Takes and gives what the layer would: by outputs, [..., inputs] -> [..., outputs / ranks]; by inputs,
    [..., inputs / ranks] -> [..., outputs], the same on all ranks.
    """

    def __init__(self, linear: nn.Linear, axis: TensorAxis, *, by_outputs: bool, low_rank: LowRank | None) -> None:
        """
        linear    gives the shapes, the type and the device; its values are not looked at
        low_rank  shape of the update, where the layer has one; its factors are float32
        """
        super().__init__()
        self.axis, self.by_outputs, self.low_rank = axis, by_outputs, low_rank
        outputs, inputs = linear.weight.shape
        if by_outputs:
            outputs = axis.share(outputs)
        else:
            inputs = axis.share(inputs)
        self.weight = nn.Parameter(linear.weight.new_empty(outputs, inputs))
        # By inputs the bias belongs to the sum, so every rank has all of it.
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.new_empty(outputs))
        if low_rank is not None:
            self.lora_A = nn.Parameter(self.weight.new_empty(low_rank.rank, inputs, dtype=torch.float32))
            self.lora_B = nn.Parameter(self.weight.new_empty(outputs, low_rank.rank, dtype=torch.float32))

    def forward(self, entering: Tensor) -> Tensor:
        summed_later = not self.by_outputs and self.axis.size > 1
        leaving = nn.functional.linear(entering, self.weight, None if summed_later else self.bias)
        if self.low_rank is not None:
            narrow = nn.functional.linear(entering.to(self.lora_A.dtype), self.lora_A)
            update = nn.functional.linear(narrow, self.lora_B) * self.low_rank.scale
            leaving = (leaving + update).to(leaving.dtype)
        if not summed_later:
            return leaving
        whole = sum_of_parts(leaving, self.axis)
        return whole if self.bias is None else whole + self.bias.to(whole.dtype)

    def split_dim(self, parameter: str) -> int | None:
        """Along which dim a parameter of this layer is split over the tensor ranks; None = every rank has all of it."""
        by_outputs = {"weight": 0, "bias": 0, "lora_B": 0}
        return (by_outputs if self.by_outputs else {"weight": 1, "lora_A": 1}).get(parameter)

    def is_partial(self, parameter: str) -> bool:
        """Whether this rank's gradient of a parameter is a share of a sum over the tensor ranks."""
        return parameter == ("lora_A" if self.by_outputs else "lora_B")


def split_layer(layer: nn.Module, axis: TensorAxis, low_rank_of: dict[str, LowRank]) -> None:
    """Put SplitLinear in the place of each linear of a decoder layer (Qwen2, Qwen3, Mistral, Llama).

    low_rank_of  last part of a linear's name -> its update; names that are missing have none
    """
    for name, module in list(layer.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, last = name.rpartition(".")
            assert last in OUTPUT_SPLIT + INPUT_SPLIT, f"no rule says how {name} is split"
            split = SplitLinear(module, axis, by_outputs=last in OUTPUT_SPLIT, low_rank=low_rank_of.get(last))
            setattr(layer.get_submodule(parent), last, split)
    if axis.size > 1:
        for name in ENTRANCES:
            # One sum of gradients for all linears behind the norm instead of one for each.
            layer.get_submodule(name).register_forward_hook(lambda module, args, output: enter_parts(output, axis))


def is_head_norm(name: str) -> bool:
    """Whether a parameter is the weight of a norm over the head width, which sees only the heads of its rank."""
    return any(part in HEAD_NORMS for part in name.split("."))


def enter_parts(whole: Tensor, axis: TensorAxis) -> Tensor:
    """The same tensor; its gradient is the sum of the ranks' gradients."""
    return _EnterParts.apply(whole, axis)


def sum_of_parts(part: Tensor, axis: TensorAxis) -> Tensor:
    """Sum over tensor ranks; the gradient of the sum is that of each part."""
    return _SumOfParts.apply(part, axis)


class _EnterParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, axis: TensorAxis) -> Tensor:
        ctx.axis = axis
        return whole.view_as(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, ctx.axis), None


class _SumOfParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, axis: TensorAxis) -> Tensor:
        return _summed(part, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _summed(part: Tensor, axis: TensorAxis) -> Tensor:
    total = part.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=axis.group)
    return total
