"""Vectors of texts the slow and obvious way: one text at a time, no padding, eager attention, pooled by hand."""

from typing import Any

import torch
from torch import Tensor


def one_by_one(model: Any, sequences: list[list[int]], *, pooling: str) -> Tensor:
    """Unit vectors [texts, width] of token id lists, by the Hugging Face model alone."""
    model.set_attn_implementation("eager")
    vectors = []
    for sequence in sequences:
        hidden = model(input_ids=torch.tensor([sequence])).last_hidden_state[0]  # [tokens, width]
        vector = {"last": hidden[-1], "cls": hidden[0], "mean": hidden.mean(dim=0)}[pooling]
        vectors.append(vector / vector.norm())
    return torch.stack(vectors)
