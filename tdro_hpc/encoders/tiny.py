"""The name of an architecture in, a small random backbone with a byte tokenizer out. Needs no files and no network.

They are real Hugging Face models, only small: whatever loads and trains one loads and trains the big one.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

ARCHITECTURES = ("qwen2", "qwen3", "mistral", "llama", "bert")
MAX_TOKENS = 2048  # positions that a tiny backbone knows
SPECIAL_TOKENS = ("<pad>", "<eos>", "[CLS]", "[SEP]")  # token ids 0 to 3; the 256 bytes follow
_DECODER_SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def tiny_tokenizer(architecture: str) -> PreTrainedTokenizerFast:
    """Tokenizer with one token a byte of UTF-8, so no text is unknown to it and nothing was trained.

    As in the big families, a decoder's tokenizer adds no end token of its own; bert's puts [CLS] and [SEP] around.
    """
    _require_known(architecture)
    symbols = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    roles = {"pad_token": "<pad>", "eos_token": "<eos>"}
    if architecture == "bert":
        roles = {"pad_token": "<pad>", "eos_token": "[SEP]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(token, symbols.index(token)) for token in ("[CLS]", "[SEP]")],
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_TOKENS, **roles)


def tiny_config(architecture: str) -> PreTrainedConfig:
    """Configuration of the tiny backbone: about 1M parameters, grouped key-value heads in the decoders."""
    _require_known(architecture)
    shared: dict[str, Any] = {
        "vocab_size": len(SPECIAL_TOKENS) + 256,
        "max_position_embeddings": MAX_TOKENS,
        # 1 / sqrt(width). The usual 0.02 is for wide models: here the last token would hardly see the text before it,
        # all texts would get nearly the same vector, and training would take far longer to start.
        "initializer_range": 0.09,
        "pad_token_id": 0,
    }
    decoder: dict[str, Any] = {**shared, **_DECODER_SHAPE, "bos_token_id": None, "eos_token_id": 1}
    if architecture == "qwen2":
        return Qwen2Config(**{key: value for key, value in decoder.items() if key != "head_dim"})
    if architecture == "qwen3":
        return Qwen3Config(**decoder)
    if architecture == "mistral":
        return MistralConfig(**decoder, sliding_window=64)  # short enough that ordinary texts reach beyond it
    if architecture == "llama":
        return LlamaConfig(**decoder)
    return BertConfig(
        **shared, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, eos_token_id=3
    )


def tiny_backbone(architecture: str, *, seed: int = 0) -> PreTrainedModel:
    """The tiny backbone in memory, float32, in evaluation mode; the same weights whenever the seed is the same."""
    from transformers import AutoModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(tiny_config(architecture), dtype=torch.float32)
    return model.eval()


def build_tiny(architecture: str, folder: Path, *, seed: int = 0) -> Path:
    """`folder`, now holding the tiny backbone as Hugging Face files: config.json, model.safetensors, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_backbone(architecture, seed=seed).save_pretrained(folder)
    tiny_tokenizer(architecture).save_pretrained(folder)
    return folder


def _require_known(architecture: str) -> None:
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"model.name is 'tiny:{architecture}'; tiny backbones are made for {', '.join(ARCHITECTURES)}. "
            f"Set model.name=tiny:qwen2."
        )
