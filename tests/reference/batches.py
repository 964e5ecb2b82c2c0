"""A tokenizer that can be read back by eye: one token a character. For tests of what batches put together."""

from collections.abc import Sequence

import torch

from tdro_hpc.data.tokens import Tokens


class CharacterTokenizer:
    """Token = code point, 0 = padding, on the right; the text can be read back."""

    def encode(self, texts: list[str], *, max_tokens: int | Sequence[int]) -> Tokens:
        limits = [max_tokens] * len(texts) if isinstance(max_tokens, int) else max_tokens
        cut = [text[:limit] for text, limit in zip(texts, limits, strict=True)]
        width = max(map(len, cut), default=0)
        ids = torch.tensor([[ord(letter) for letter in text] + [0] * (width - len(text)) for text in cut])
        return Tokens(ids, (ids != 0).long())


def texts_of(tokens: Tokens) -> list[str]:
    return ["".join(chr(token) for token in row if token) for row in tokens.input_ids.tolist()]
