"""What training asks of an encoder on several devices. Losses see embeddings; engines never see a loss's inside."""

from typing import Any, Protocol

from torch import Tensor

from tdro_hpc.data.tokens import Tokens
from tdro_hpc.parallel.process import Process


class FrozenModel(Protocol):
    """A model that is not trained: no gradients, no optimiser, evaluation mode."""

    def embed_chunks(self, chunks: list[Tokens]) -> list[Tensor]:
        """Embeddings [rows, width] float32 of each chunk, without gradient; bit-equal on the ranks of a replica."""
        ...


class Engine(Protocol):
    """Embed, backward, step, state. One optimiser step = embed and backward, once or more, then step.

    Embedding and backward come in two forms: whole, and in chunks for gradient caching. An engine whose model is spread
    over ranks has the second form only (`chunked`).
    """

    process: Process
    steps_done: int
    chunked: bool

    @property
    def learning_rate(self) -> float:
        """Rate of the newest optimiser step; before the first one, that of the first."""
        ...

    @property
    def parameter_counts(self) -> tuple[int, int]:
        """(total, trained) parameters of the whole model."""
        ...

    def embed(self, parts: list[Tokens]) -> list[Tensor]:
        """Embeddings [rows, width] of each part, with gradient; one call before each backward."""
        ...

    def backward(self, loss: Tensor, *, synchronise: bool) -> None:
        """Add the gradients of `loss` []; with `synchronise` also average them over data ranks.

        synchronise  true for the last backward of an optimiser step, on all ranks at the same one
        """
        ...

    def embed_chunks(self, chunks: list[Tokens]) -> list[Tensor]:
        """Embeddings [rows, width] float32 of each chunk, without gradient; bit-equal on the ranks of a replica."""
        ...

    def backward_chunks(self, chunks: list[Tokens], gradients: list[Tensor], *, synchronise: bool) -> None:
        """Add the gradients of the sum over chunks of (embedding * gradient).sum(), with the draws of `embed_chunks`.

        chunks     those of the embed_chunks before it
        gradients  [rows, width] of each
        """
        ...

    def step(self) -> Tensor:
        """Clip, update, zero the gradients; returns their global L2 norm [] before clipping."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """{"tensors": {name: Tensor or Slice}, "values": JSON-able}: the part of the state that this rank writes."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` of any engine gave on all its ranks; bit for bit in the same layout."""
        ...
