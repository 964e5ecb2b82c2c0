"""What training asks of an encoder on several devices. Losses see embeddings; engines never see a loss's inside."""

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from tdro_hpc.data.tokens import Tokens
from tdro_hpc.parallel.process import Process

if TYPE_CHECKING:
    from tdro_hpc.encoders.backbone import Encoder


class Engine(Protocol):
    """Four verbs: embed, backward, step, state. One optimiser step = embed and backward, once or more, then step."""

    process: Process
    encoder: "Encoder"

    def embed(self, parts: list[Tokens]) -> list[Tensor]:
        """Embeddings [rows, width] of each part, with gradient; one call before each backward."""
        ...

    def embed_frozen(self, tokens: Tokens) -> Tensor:
        """Embeddings [rows, width] without gradient; draws what `embed` would draw from the same generator state."""
        ...

    def backward(self, loss: Tensor, *, synchronise: bool) -> None:
        """Add the gradients of `loss` []; with `synchronise` also average them over ranks.

        synchronise  true for the last backward of an optimiser step, on all ranks at the same one
        """
        ...

    def step(self) -> Tensor:
        """Clip, update, zero the gradients; returns their global L2 norm [] before clipping."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """{"tensors": {name: Tensor}, "values": JSON-able}, what a resumed run needs; the live tensors, no copies."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, bit for bit."""
        ...
