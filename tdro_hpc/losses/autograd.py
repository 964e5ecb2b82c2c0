"""What the autograd functions of the loss share: which gradients are asked for, and how they are handed over."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """once_differentiable, which takes its time, where a graph of the backward itself is asked for."""
    with_graph = once_differentiable(backward)

    @wraps(backward)
    def chosen(ctx: Any, *upstream: Tensor) -> Any:
        return with_graph(ctx, *upstream) if torch.is_grad_enabled() else backward(ctx, *upstream)

    return chosen


def multiplied(gradients: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """The gradients by a factor, in place. The loss itself is what most callers differentiate: then it is 1."""
    if upstream.is_cpu and not torch.compiler.is_compiling() and float(upstream) == 1:
        return gradients
    return [gradient.mul_(upstream) for gradient in gradients]


def of_sides(ctx: Any, gradients: list[Tensor], dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """What is asked of the gradients [of queries, of documents], in a type.

    Empties the list: whoever is given a gradient must find itself its only holder, or it makes a copy.
    """
    wanted = ctx.needs_input_grad
    of_documents, of_queries = gradients.pop(), gradients.pop()
    if of_queries.dtype != dtype:
        of_documents = of_documents.to(dtype)
        of_queries = of_queries.to(dtype)
    return of_queries if wanted[0] else None, of_documents if wanted[1] else None
