"""What an encoder eats: token arrays, the prompt format, and what batches need to know of a tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass
class Tokens:
    """Token ids of some texts with the mask of their padding."""

    input_ids: Tensor  # int64 [rows, tokens]
    attention_mask: Tensor  # int64 [rows, tokens], 1 = real token; padding may be left or right

    def to(self, device: torch.device | str) -> "Tokens":
        """The same tokens on another device; the copy may still be under way on a CUDA stream."""
        return Tokens(
            self.input_ids.to(device, non_blocking=True),
            self.attention_mask.to(device, non_blocking=True),
        )

    def rows(self, index: slice | Tensor) -> "Tokens":
        """Some of the rows, as wide as before: a slice shares memory, an int64 index copies."""
        return Tokens(self.input_ids[index], self.attention_mask[index])


class Tokenizer(Protocol):
    """Whatever turns texts into tokens; encoders/tokenization.py has the real one."""

    def encode(self, texts: list[str], *, max_tokens: int | Sequence[int]) -> Tokens:
        """Tokens of the texts, each cut to max_tokens (one limit, or one a text) and padded to the longest."""


def with_instruction(text: str, instruction: str) -> str:
    """The text behind its instruction, in the form of E5-Mistral; the text alone where the instruction is empty."""
    if not instruction:
        return text
    return f"Instruct: {instruction}\nQuery: {text}"
