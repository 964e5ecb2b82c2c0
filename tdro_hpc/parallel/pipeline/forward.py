"""Chunks of texts through the parts of a pipeline, forward only: the first pass of gradient caching; frozen models."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from tdro_hpc.config.schema import ModelConfig
from tdro_hpc.data.tokens import Tokens
from tdro_hpc.parallel.mesh import Mesh
from tdro_hpc.parallel.pipeline.layers import EncoderPart
from tdro_hpc.parallel.pipeline.loading import load_part
from tdro_hpc.parallel.process import Process, replica_group


class FrozenPipeline:
    """A model spread over the ranks of a replica that only embeds: no gradients, no optimiser."""

    def __init__(self, config: ModelConfig, process: Process, *, folder: Path | None, seed: int) -> None:
        """
        folder  saved model whose weights are used; None = those of config.name
        raises  ValueError when the model is not there, not whole, or cannot be spread as the process asks
        """
        self.process = process
        self._part = load_part(config, process, folder=folder, seed=seed).requires_grad_(False)

    def embed_chunks(self, chunks: list[Tokens]) -> list[Tensor]:
        """Embeddings [rows, width] float32 of each chunk, the same bits on all ranks of the replica."""
        return embed_through(self._part, self.process, chunks)


@torch.no_grad()
def embed_through(part: EncoderPart, process: Process, chunks: list[Tokens]) -> list[Tensor]:
    """Embeddings [rows, width] float32 of each chunk, bit-equal on all ranks of the replica, which call it together.

    A part takes the next chunk as soon as it has sent the one before, so all parts are at work at once.
    """
    embeddings, entering = [], torch.empty(0, device=part.device)
    for chunk in chunks:
        inputs = part.inputs(chunk)
        if not part.first:
            entering = torch.empty(
                *inputs.input_ids.shape, part.width, dtype=part.hidden_dtype, device=inputs.input_ids.device
            )
            dist.recv(entering, src=_neighbour(process, -1))
        leaving = part(entering, inputs)
        if part.last:
            embeddings.append(leaving)
        else:
            dist.send(leaving.contiguous(), dst=_neighbour(process, 1))
    return _on_all_ranks(part, process, embeddings, [len(chunk.input_ids) for chunk in chunks])


def _on_all_ranks(part: EncoderPart, process: Process, embeddings: list[Tensor], rows: list[int]) -> list[Tensor]:
    """What the last part has, on every rank of the replica."""
    if part.last:
        everything = torch.cat(embeddings)
    else:
        everything = torch.empty(sum(rows), part.width, device=part.device)
    source = _mesh(process).rank(process.pipeline_size - 1, process.data_rank, 0)
    dist.broadcast(everything, src=source, group=replica_group())
    return list(everything.split(rows))


def _neighbour(process: Process, step: int) -> int:
    """World rank that holds the same part of the matrices of the layers before (-1) or behind (1)."""
    return _mesh(process).rank(process.pipeline_rank + step, process.data_rank, process.tensor_rank)


def _mesh(process: Process) -> Mesh:
    return Mesh(process.pipeline_size, process.data_size, process.tensor_size)
