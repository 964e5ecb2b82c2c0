"""Chunks embedded twice with the same random draws: without gradient, and again when their gradients are known.

The chunk that the first pass embeds last keeps its graph, so the second pass has it already.
"""

from typing import Protocol

import torch
from torch import Tensor

from tdro_hpc.data.tokens import Tokens

RandomState = list[Tensor]  # of the CPU's generator, and of the GPU's where the encoder is on one


class Embedding(Protocol):
    """What the two passes ask of an engine that holds the whole encoder; see parallel/engine.py."""

    def embed(self, parts: list[Tokens]) -> list[Tensor]: ...

    def embed_frozen(self, tokens: Tokens) -> Tensor: ...

    def backward(self, loss: Tensor, *, synchronise: bool) -> None: ...


class Replay:
    """The two passes of gradient caching over an engine."""

    def __init__(self, engine: Embedding, device: torch.device) -> None:
        self._engine, self._device = engine, device
        self._states: list[RandomState] = []  # before pass 1 embedded each chunk
        self._kept: Tensor | None = None  # embeddings of the last chunk, with their graph

    def embed_chunks(self, chunks: list[Tokens]) -> list[Tensor]:
        """Pass 1: embeddings [rows, width] of each chunk, detached."""
        self._states, embeddings = [], []
        for chunk in chunks[:-1]:
            self._states.append(captured(self._device))
            embeddings.append(self._engine.embed_frozen(chunk))
        self._states.append(captured(self._device))
        (self._kept,) = self._engine.embed([chunks[-1]])
        return [*embeddings, self._kept.detach()]

    def backward_chunks(self, chunks: list[Tokens], gradients: list[Tensor], *, synchronise: bool) -> None:
        """Pass 2, from the last chunk to the first; the random state is afterwards what it was before."""
        after = captured(self._device)
        kept, self._kept = self._kept, None
        for number in reversed(range(len(chunks))):
            if kept is None:
                restore(self._states[number], self._device)
                (kept,) = self._engine.embed([chunks[number]])
            surrogate = (kept * gradients[number]).sum()
            kept = None  # the graph goes with the backward, before the next chunk makes one
            self._engine.backward(surrogate, synchronise=synchronise and number == 0)
        restore(after, self._device)


def captured(device: torch.device) -> RandomState:
    """The random state of the CPU, and of `device` where that is a GPU."""
    on_gpu = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_gpu]


def restore(state: RandomState, device: torch.device) -> None:
    """Go on from a captured random state."""
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
