"""What a process measures: an object that checks itself on a small case and can then be run again and again."""

from typing import Any, Protocol

import torch
from torch import Tensor

from infonce_lib.cases import Case, Inputs, Shape, build_inputs, exact_losses, keywords_of
from infonce_lib.implementations import IMPLEMENTATIONS, Implementation

CHECKED = Shape(rows=48, negatives=3, width=64)
ERRORS = "loss error", "query gradient error", "document gradient error"
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # relative, of loss and gradients; a wrong loss is off by much more


class Workload(Protocol):
    """Built in the process that measures it."""

    gradient_bytes: int  # what a run returns beside its workspace

    def check(self) -> dict[str, float]:
        """Figures that are no times; raises ValueError when what it computes is wrong. Loads all libraries."""

    def run(self) -> Any:
        """The work that is timed."""


class LossWorkload:
    """Loss and gradients of one implementation at one shape."""

    def __init__(self, name: str, case: Case) -> None:
        self.name, self.case, self.implementation = name, case, IMPLEMENTATIONS[name]
        self.gradient_bytes = case.shape.gradient_bytes(case.dtype)
        self.run = self.implementation.build(build_inputs(case))

    def check(self) -> dict[str, float]:
        """Relative errors of loss and gradients against float64 on the same inputs, at a small shape."""
        small = Case(CHECKED, self.case.dtype, self.case.temperature, self.case.implementation)
        errors = errors_of(self.implementation, build_inputs(small, seed=1))
        worst = max(errors, key=errors.__getitem__)
        if not errors[worst] <= TOLERANCE[self.case.dtype]:
            raise ValueError(f"wrong: {worst} is {errors[worst]:.1e} against float64")
        return errors


def errors_of(implementation: Implementation, inputs: Inputs) -> dict[str, float]:
    """Relative errors of loss and both gradients against the definition in float64 on the same inputs."""
    exact = exact_outcome(inputs, implementation.variant)
    inputs64 = inputs.queries.detach().double(), inputs.documents.detach().double()
    got = implementation.build(inputs)()
    pairs = []
    documents = torch.stack(got.documents, dim=1).flatten(0, 1)
    for gradient, expected, at in zip((got.queries, documents), exact[1:], inputs64, strict=True):
        both = gradient.double(), expected
        pairs.append([_tangential(each, at) for each in both] if implementation.tangential else both)
    values = _error(got.loss.double(), exact[0]), _error(*pairs[0]), _error(*pairs[1])
    return dict(zip(ERRORS, values, strict=True))


def exact_outcome(inputs: Inputs, variant: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss and gradients of queries and documents in float64."""
    queries = inputs.queries.detach().double().requires_grad_()
    documents = inputs.documents.detach().double().requires_grad_()
    loss = exact_losses(inputs, keywords_of(variant, inputs.case.shape), queries, documents).mean()
    return loss.detach(), *torch.autograd.grad(loss, (queries, documents))


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def _tangential(gradient: Tensor, at: Tensor) -> Tensor:
    """Without the part along the embedding itself."""
    unit = torch.nn.functional.normalize(at, dim=1)
    return gradient - (gradient * unit).sum(dim=1, keepdim=True) * unit
