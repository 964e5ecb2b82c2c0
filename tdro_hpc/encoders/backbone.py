"""Tokens in, one vector a text out: a Hugging Face backbone, pooled and normalised.

Loads backbones by AutoModel under the names that sources.py explains. Knows nothing of texts, losses or ranks.
"""

import dataclasses
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdro_hpc.config.schema import ModelConfig
from tdro_hpc.data.tokens import Tokens
from tdro_hpc.encoders.attention import PACKABLE, PADDING_FREE, attention_name, register_padding_free
from tdro_hpc.encoders.lora import add_lora, load_lora, parameter_counts
from tdro_hpc.encoders.norms import fuse_norms
from tdro_hpc.encoders.packing import build_packing
from tdro_hpc.encoders.pooling import pool, pool_packed, require_real_tokens
from tdro_hpc.encoders.saving import save_encoder, saved_model_config
from tdro_hpc.encoders.sources import WEIGHT_FILES, downloaded_copy, model_location, tiny_architecture
from tdro_hpc.encoders.tiny import tiny_backbone

__all__ = ["Encoder", "load_encoder", "parameter_counts", "save_encoder", "saved_model_config"]


class Encoder(nn.Module):
    """A backbone with the rule that makes one vector of its hidden states."""

    def __init__(self, backbone: nn.Module, config: ModelConfig) -> None:
        """
        backbone  a transformers model without head, or peft's wrapper of one
        config    pooling, similarity and autocast are read here; the rest describes how the backbone was made
        """
        super().__init__()
        self.backbone, self.config = backbone, config
        inner: Any = getattr(backbone, "get_base_model", lambda: backbone)()
        self.width: int = inner.config.hidden_size
        self.packs = inner.config._attn_implementation == PADDING_FREE
        self._takes_positions = "position_ids" in inspect.signature(inner.forward).parameters
        # RoBERTa and its kin count positions from the one after the padding id, BERT and decoders from 0.
        table: Any = getattr(getattr(inner, "embeddings", None), "position_embeddings", None)
        self._first_position = 0 if getattr(table, "padding_idx", None) is None else table.padding_idx + 1

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, tokens: Tokens) -> Tensor:
        """Embeddings of the texts, float32 [rows, width], of unit length under cosine.

        Tokens may be on the CPU or on the encoder's device; from the CPU a packed forward needs no wait for the GPU.
        raises  ValueError  if a row has no real token (checked on CPU tokens only, see pooling.py)
        """
        require_real_tokens(tokens.attention_mask)
        vectors = self._packed_vectors(tokens) if self.packs else self._padded_vectors(tokens)
        if self.config.similarity == "cosine":
            vectors = nn.functional.normalize(vectors, dim=-1)
        return vectors

    def _padded_vectors(self, tokens: Tokens) -> Tensor:
        tokens = tokens.to(self.device)
        mask = tokens.attention_mask
        positions = {}
        if self._takes_positions:
            # Counted over real tokens, so that a text gets the same vector whichever side the padding is on.
            positions["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0) + self._first_position
        hidden = self._hidden(input_ids=tokens.input_ids, attention_mask=mask, **positions)
        return pool(hidden, mask, self.config.pooling)

    def _packed_vectors(self, tokens: Tokens) -> Tensor:
        packing = build_packing(tokens.attention_mask)
        input_ids = packing.pack(tokens.input_ids).to(self.device, non_blocking=True)
        packing = packing.to(self.device)
        hidden = self._hidden(
            input_ids=input_ids.unsqueeze(0),
            position_ids=packing.position_ids.unsqueeze(0) + self._first_position,
            packing=packing,
        )
        return pool_packed(hidden.squeeze(0), packing, self.config.pooling)

    def _hidden(self, **inputs: Any) -> Tensor:
        """Last hidden states; the only place that runs under autocast."""
        autocast = self.config.autocast
        dtype = torch.bfloat16 if autocast == "float32" else getattr(torch, autocast)
        with torch.autocast(self.device.type, dtype=dtype, enabled=autocast != "float32"):
            return self.backbone(**inputs).last_hidden_state


def load_encoder(config: ModelConfig, *, folder: Path | None = None, device: torch.device | str, seed: int) -> Encoder:
    """Encoder on `device`, in evaluation mode.

    config  names the backbone and says how it runs
    folder  a model folder written by save_encoder: its weights, pooling, similarity, padding side and LoRA shape are
            used; an adapter is put on config.name
    seed    of a new LoRA adapter; a tiny backbone always has the same weights, as a downloaded one has
    raises  ValueError  when the model is not there, not whole, or cannot do what the config asks of it
    """
    device = torch.device(device)
    if folder is not None:
        config = config_of_saved(config, folder)
    saved_weights = folder if folder is not None and not config.lora.enabled else None
    with torch.random.fork_rng(devices=[]), _quiet_loading():
        torch.default_generator.manual_seed(seed)  # manual_seed of torch itself would touch the GPUs' generators too
        backbone = _load_backbone(config, saved_weights, attention_name(config, device))
        fuse_norms(backbone, device)
        if config.lora.enabled:
            backbone = add_lora(backbone, config, seed=seed) if folder is None else load_lora(backbone, str(folder))
        if config.gradient_checkpointing:
            enable_checkpointing(backbone)
    return Encoder(backbone, config).to(device).eval()


def enable_checkpointing(backbone: Any) -> None:
    """Let a backbone recompute activations in the backward pass.

    Non-reentrant, so gradients reach adapters behind frozen layers.
    """
    if hasattr(backbone, "activation_checkpointing_enable"):
        backbone.activation_checkpointing_enable({"use_reentrant": False})
    else:  # its name before transformers 5.23
        backbone.gradient_checkpointing_enable({"use_reentrant": False})


def config_of_saved(config: ModelConfig, folder: Path) -> ModelConfig:
    """What a saved model says of itself, with the rest of `config`; raises ValueError for another model's adapter."""
    saved = saved_model_config(config, folder)
    # The last part only: folders get moved, and one machine has the download that another names by its hub id.
    if saved.lora.enabled and Path(saved.name).name != Path(config.name).name:
        raise ValueError(
            f"The adapter in {folder} was trained on {saved.name!r}, but model.name is {config.name!r}. "
            f"Set model.name={saved.name}, or to a folder of that name."
        )
    return dataclasses.replace(saved, name=config.name)


def _load_backbone(config: ModelConfig, saved_weights: Path | None, attention: str) -> Any:
    """transformers model on the CPU, with the attention and masks that the config asks for."""
    register_padding_free()
    dtype = getattr(torch, config.weights_dtype)
    architecture = tiny_architecture(config.name)
    if saved_weights is None and architecture:
        backbone: Any = tiny_backbone(architecture).to(dtype)
        backbone.set_attn_implementation(attention)
    else:
        source = str(saved_weights) if saved_weights is not None else model_location(config.name)
        backbone = _from_pretrained(source, config, dtype=dtype, attn_implementation=attention)
    _require_capable(backbone, config, attention)
    # The tanh layer over [CLS] is not part of any pooling here; its parameters would never get a gradient.
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None
    backbone.config.use_cache = False
    backbone.name_or_path = config.name  # peft writes it into adapter_config.json
    if config.bidirectional:
        backbone.config.is_causal = False
    return backbone


def _from_pretrained(source: str, config: ModelConfig, **options: Any) -> Any:
    """AutoModel.from_pretrained, from a download that is already on this machine where there is one."""
    from transformers import AutoModel

    options = options | {"trust_remote_code": config.trust_remote_code, "output_loading_info": True}
    on_hub = not Path(source).is_dir()
    copy = downloaded_copy(source, config.revision, needs=WEIGHT_FILES) if on_hub else None
    revision = {"revision": config.revision} if on_hub and config.revision else {}
    try:
        try:
            backbone, report = AutoModel.from_pretrained(copy or source, **options, **({} if copy else revision))
        except OSError:
            if copy is None:
                raise
            # An interrupted download: the hub has the rest.
            backbone, report = AutoModel.from_pretrained(source, **options, **revision)
    except (OSError, ValueError) as error:
        raise ValueError(_not_loaded(source, config, error)) from error
    missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)
    if missing:
        raise ValueError(
            f"The weights at {source} lack {len(missing)} parameters of a {type(backbone).__name__}, such as "
            f"{missing[0]}: they would be random. Set model.name to a model that is whole."
        )
    return backbone


def _not_loaded(source: str, config: ModelConfig, error: Exception) -> str:
    """What to say when there is no model to load."""
    return (
        f"model.name is {config.name!r}: no model could be loaded from {source}. transformers says: "
        f"{str(error).strip().splitlines()[0]}\n"
        f"Expected a hub id, a folder with config.json and weights, package:<package> or tiny:<architecture>. "
        f"Where the hub cannot be reached, type `hf download {config.name} --local-dir models/backbone` on a machine "
        f"that reaches it and set model.name=models/backbone. A model with code of its own needs "
        f"model.trust_remote_code=true."
    )


def _require_capable(backbone: Any, config: ModelConfig, attention: str) -> None:
    """Nothing, or a ValueError where this backbone cannot do what the config asks."""
    kind = backbone.config.model_type
    if getattr(backbone.config, "is_encoder_decoder", False):
        raise ValueError(
            f"model.name is {config.name!r}, an encoder-decoder ({kind}). Expected a decoder or an encoder alone, such "
            f"as Qwen/Qwen1.5-0.5B or BAAI/bge-base-en-v1.5. Set model.name to one."
        )
    if attention == PADDING_FREE and kind not in PACKABLE:
        raise ValueError(
            f"model.attention is 'padding_free', which is tested for {', '.join(PACKABLE)}; {config.name!r} is a "
            f"{kind}. Set model.attention=auto."
        )
    takes_positions = "position_ids" in inspect.signature(backbone.forward).parameters
    if config.padding_side == "left" and not takes_positions:
        raise ValueError(
            f"model.padding_side is 'left', but {config.name!r} ({kind}) cannot be told the positions of its tokens, "
            f"so padding would change its vectors. Set model.padding_side=right."
        )


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """transformers without progress bars and load reports; what matters of the latter is checked and raised here.

    Also without its notes on names that peft still calls by their old form.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
