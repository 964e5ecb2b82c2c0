"""Texts in, token arrays out. Wraps any Hugging Face tokenizer; never changes a vocabulary or an embedding table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tdro_hpc.config.schema import ModelConfig
from tdro_hpc.data.tokens import Tokens, with_instruction
from tdro_hpc.encoders.sources import model_location, tiny_architecture

__all__ = ["TextTokenizer", "Tokens", "load_tokenizer", "with_instruction"]


class TextTokenizer:
    """Encodes texts so that each ends in exactly one end token, whether or not the wrapped tokenizer adds one.

    Last-token pooling reads the vector of that token, so it must be there for every text, however long or empty.
    """

    def __init__(self, hf_tokenizer: Any, append_eos: bool, padding_side: str) -> None:
        """
        hf_tokenizer  a PreTrainedTokenizer(Fast)
        append_eos    end token by id after truncation; false = the tokenizer's own frame, as [CLS] ... [SEP]
        padding_side  right or left
        raises        ValueError under append_eos when the tokenizer has no end token
        """
        assert padding_side in ("right", "left"), f"padding side {padding_side!r}"
        if append_eos and hf_tokenizer.eos_token_id is None:
            raise ValueError(
                "model.append_eos is true, but this tokenizer has no end token (encoders of the BERT kind have none). "
                "Set model.append_eos=false."
            )
        self.hf_tokenizer = hf_tokenizer
        # Texts are cut at their end even where a tokenizer's file asks for the other side.
        self.hf_tokenizer.truncation_side = "right"
        self.append_eos, self.padding_side = append_eos, padding_side
        self.eos_id: int | None = hf_tokenizer.eos_token_id if append_eos else None
        # A tokenizer without a padding token pads with one that the mask hides: a new one would need a new embedding.
        candidates = (hf_tokenizer.pad_token_id, hf_tokenizer.eos_token_id, hf_tokenizer.unk_token_id, 0)
        self.pad_id: int = next(token for token in candidates if token is not None)

    def encode(self, texts: list[str], *, max_tokens: int | Sequence[int]) -> Tokens:
        """Tokens of the texts, padded to the longest.

        texts       any length, empty ones too: an empty text has its special tokens, or one masked-in padding token
                    where the tokenizer has no special tokens
        max_tokens  the longest a text may be, special tokens included; one limit, or one a text
        returns     int64 [texts, tokens]
        """
        limits = [max_tokens] * len(texts) if isinstance(max_tokens, int) else list(max_tokens)
        assert len(limits) == len(texts), f"{len(limits)} limits for {len(texts)} texts"
        sequences: list[list[int]] = [[]] * len(texts)
        for limit in sorted(set(limits)):
            rows = [row for row, of_row in enumerate(limits) if of_row == limit]
            for row, ids in zip(rows, self._sequences([texts[row] for row in rows], limit), strict=True):
                sequences[row] = ids
        return self._padded(sequences)

    def decode_marked(self, tokens: Tokens) -> list[str]:
        """Each row as the encoder sees it: special tokens written out, then [tokens, padding]."""
        marked = []
        for ids, mask in zip(tokens.input_ids.tolist(), tokens.attention_mask.tolist(), strict=True):
            real = [token for token, is_real in zip(ids, mask, strict=True) if is_real]
            text = self.hf_tokenizer.decode(real, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            marked.append(f"{text} [{len(real)} tokens, {len(ids) - len(real)} padding {self.padding_side}]")
        return marked

    def save(self, folder: Path) -> None:
        """Write the wrapped tokenizer's files into the folder."""
        self.hf_tokenizer.save_pretrained(str(folder))

    def _sequences(self, texts: list[str], limit: int) -> list[list[int]]:
        encoded = self.hf_tokenizer(
            [_without_surrogates(text) for text in texts],
            truncation=True,
            max_length=limit,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        if self.eos_id is None:
            return [ids or [self.pad_id] for ids in encoded]
        return [self._with_end(ids, limit) for ids in encoded]

    def _with_end(self, ids: list[int], limit: int) -> list[int]:
        # Where the tokenizer adds the end token itself it has left room for it: taking it off loses nothing.
        length = len(ids)
        while length and ids[length - 1] == self.eos_id:
            length -= 1
        return [*ids[: min(length, limit - 1)], self.eos_id]  # type: ignore[list-item]

    def _padded(self, sequences: list[list[int]]) -> Tokens:
        lengths = np.asarray([len(ids) for ids in sequences], dtype=np.int64)
        columns = np.arange(lengths.max(initial=0))
        if self.padding_side == "right":
            mask = columns < lengths[:, None]
        else:
            mask = columns >= len(columns) - lengths[:, None]
        input_ids = np.full(mask.shape, self.pad_id, dtype=np.int64)
        input_ids[mask] = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in sequences] or [lengths])
        return Tokens(torch.from_numpy(input_ids), torch.from_numpy(mask.astype(np.int64)))


def _without_surrogates(text: str) -> str:
    """The text as valid Unicode. Half a surrogate pair, which JSON can spell and scraped pages hold, becomes U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def load_tokenizer(config: ModelConfig, folder: Path | None = None) -> TextTokenizer:
    """The tokenizer of config.name, or of a folder with a saved model.

    raises ValueError when there is none under that name (says what to type), or when it does not fit the config
    """
    architecture = tiny_architecture(config.name)
    if folder is None and architecture:
        from tdro_hpc.encoders.tiny import tiny_tokenizer

        return TextTokenizer(tiny_tokenizer(architecture), config.append_eos, config.padding_side)
    from transformers import AutoTokenizer

    source = str(folder) if folder is not None else model_location(config.name)
    revision = {"revision": config.revision} if config.revision and not Path(source).is_dir() else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code, **revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No tokenizer at {source}: {str(error).strip()}\n"
            "model.name is a hub id (Qwen/Qwen1.5-0.5B), a folder with tokenizer.json and config.json, "
            "package:<python package that carries a model>, or tiny:<architecture>. Where the hub cannot be reached, "
            "download the model elsewhere and type model.name=/path/to/folder. A tokenizer that comes with its own "
            "code needs model.trust_remote_code=true."
        ) from error
    return TextTokenizer(tokenizer, config.append_eos, config.padding_side)
