"""Models that only embed, such as the reference of s1: whole on every rank, or split over the data ranks like ZeRO-3.

Neither has gradients or an optimiser.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tdro_hpc.config.schema import ParallelConfig
from tdro_hpc.data.tokens import Tokens
from tdro_hpc.parallel.deepspeed_setup import initialised, shared_settings, start_deepspeed
from tdro_hpc.parallel.engine import FrozenModel
from tdro_hpc.parallel.gather import rows_of_ranks
from tdro_hpc.parallel.process import Process

if TYPE_CHECKING:
    from tdro_hpc.encoders.backbone import Encoder


def freeze(encoder: "Encoder", process: Process, parallel: ParallelConfig) -> FrozenModel:
    """The encoder in evaluation mode, held as parallel.zero says: split under ZeRO-3, else whole on every data rank."""
    if parallel.engine == "deepspeed" and parallel.zero == 3:
        return SplitEncoder(encoder, process)
    return WholeEncoder(encoder)


class WholeEncoder:
    """A frozen model that every rank has whole; ranks embed without one another."""

    def __init__(self, encoder: nn.Module) -> None:
        self.encoder = encoder.eval().requires_grad_(False)

    @torch.no_grad()
    def embed_chunks(self, chunks: list[Tokens]) -> list[Tensor]:
        """Embeddings [rows, width] of each chunk."""
        return [self.encoder(tokens) for tokens in chunks]


class SplitEncoder:
    """A frozen model whose weights are split over the data ranks, which put each layer together when they need it.

    The encoder's parameters are empty afterwards but in a pass; small ones, such as norms, are whole as well.
    """

    def __init__(self, encoder: nn.Module, process: Process) -> None:
        deepspeed = start_deepspeed(process)
        settings = shared_settings() | {"zero_optimization": {"stage": 3}, "gradient_clipping": 0.0}
        self._engine = initialised(deepspeed, encoder.eval().requires_grad_(False), None, settings)

    @torch.no_grad()
    def embed_chunks(self, chunks: list[Tokens]) -> list[Tensor]:
        """Embeddings [rows, width] of each chunk. All data ranks call it together; numbers of chunks may differ."""
        # Every pass gathers weights from all ranks: who has fewer chunks embeds the first once more.
        missing = max(rows_of_ranks(len(chunks))) - len(chunks)
        return [self._engine(tokens) for tokens in [chunks[0]] * missing + chunks][missing:]
