"""A model's name and a place in the mesh in, this rank's part of the encoder out, read without the rest of the model.

The part is transformers' own model, made on the device `meta` with this rank's layers only, and then filled.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdro_hpc.config.figures import SPREADABLE
from tdro_hpc.config.schema import ModelConfig
from tdro_hpc.encoders.attention import attention_name, register_padding_free
from tdro_hpc.encoders.backbone import config_of_saved, enable_checkpointing
from tdro_hpc.encoders.lora import ALL_LINEAR, first_factor, linear_names
from tdro_hpc.encoders.norms import fuse_norms
from tdro_hpc.encoders.sources import tiny_architecture
from tdro_hpc.encoders.tiny import tiny_config
from tdro_hpc.parallel.pipeline.layers import EncoderPart
from tdro_hpc.parallel.pipeline.tensor import LowRank, TensorAxis, split_layer
from tdro_hpc.parallel.pipeline.weights import FolderTensors, backbone_folder, backbone_tensors, fill
from tdro_hpc.parallel.process import Process, tensor_group


def load_part(config: ModelConfig, process: Process, *, folder: Path | None, seed: int) -> EncoderPart:
    """This rank's part of an encoder, on its device, in evaluation mode.

    folder  a model folder written by save_encoder: its weights, pooling, similarity, padding side and LoRA shape are
            used; an adapter is put on config.name
    seed    of a new LoRA adapter
    raises  ValueError when the model is not there, not whole, or cannot be spread as the process asks
    """
    if folder is not None:
        config = config_of_saved(config, folder)
    whole_in = folder if folder is not None and not config.lora.enabled else backbone_folder(config)
    shape = _whole_config(config, whole_in)
    require_spreadable(config, shape, pipeline_size=process.pipeline_size, tensor_size=process.tensor_size)
    part = _empty_part(config, shape, process)
    _fill_part(part, whole_in, folder, seed)
    fuse_norms(part.backbone, process.device)
    if config.gradient_checkpointing:
        enable_checkpointing(part.backbone)
    return part.eval()


def layers_of_part(num_layers: int, pipeline_size: int) -> list[int]:
    """First layer of each part, and the number of layers: as even as can be, the last parts taking what is over.

    The first part has the embedding table and, in training, the most chunks under way.
    """
    few, over = divmod(num_layers, pipeline_size)
    sizes = [few + (number >= pipeline_size - over) for number in range(pipeline_size)]
    return [sum(sizes[:number]) for number in range(pipeline_size + 1)]


def require_spreadable(config: ModelConfig, shape: Any, *, pipeline_size: int, tensor_size: int) -> None:
    """Nothing, or a ValueError that says why this backbone cannot be spread so.

    shape  transformers' config of the backbone
    """
    if shape.model_type not in SPREADABLE:
        raise ValueError(
            f"model.name is {config.name!r}, a {shape.model_type}: parallel.pp and parallel.tp are for "
            f"{', '.join(SPREADABLE)}. Set parallel.pp=1 parallel.tp=1, and parallel.zero=2 or 3 to share memory."
        )
    if config.trust_remote_code and getattr(shape, "auto_map", None):
        raise ValueError(
            f"model.name is {config.name!r}, a model with code of its own, which parallel.pp and parallel.tp cannot "
            "spread. Set parallel.pp=1 parallel.tp=1, or model.trust_remote_code=false to use transformers' own code."
        )
    if shape.num_hidden_layers < pipeline_size:
        raise ValueError(
            f"parallel.pp is {pipeline_size}, but {config.name!r} has {shape.num_hidden_layers} layers. "
            f"Set parallel.pp to at most {shape.num_hidden_layers}."
        )
    sizes = {
        "attention heads": shape.num_attention_heads,
        "key-value heads": shape.num_key_value_heads,
        "columns in its feed-forward": shape.intermediate_size,
    }
    for what, number in sizes.items():
        if number % tensor_size:
            fitting = [str(n) for n in range(1, number + 1) if all(size % n == 0 for size in sizes.values())]
            raise ValueError(
                f"parallel.tp is {tensor_size}, but {config.name!r} has {number} {what}: they cannot be shared evenly. "
                f"Set parallel.tp to one of {', '.join(fitting)}."
            )


def require_no_dropout(part: EncoderPart) -> None:
    """Nothing, or a ValueError where training would draw random numbers: ranks that share a layer would draw others."""
    lora = part.config.lora
    dropout = {"model.lora.dropout": lora.dropout if lora.enabled else 0.0}
    dropout |= {"attention_dropout in the model's config.json": getattr(part.backbone.config, "attention_dropout", 0.0)}
    for key, share in dropout.items():
        if share > 0:
            raise ValueError(
                f"{key} is {share}, but a model that is spread by parallel.pp or parallel.tp is trained without "
                "dropout. Set it to 0, or parallel.pp=1 parallel.tp=1."
            )


def _whole_config(config: ModelConfig, folder: Path | None) -> Any:
    """transformers' config of the whole backbone."""
    if folder is None:
        return tiny_config(tiny_architecture(config.name))
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.name is {config.name!r}: {folder} has no config.json that transformers understands "
            f"({str(error).strip().splitlines()[0]}). Set model.name to a Hugging Face model."
        ) from error


def _empty_part(config: ModelConfig, shape: Any, process: Process) -> EncoderPart:
    """The part with memory but without values, the frozen parameters of it marked as such."""
    from transformers import AutoModel

    first_layer, stop = layers_of_part(shape.num_hidden_layers, process.pipeline_size)[process.pipeline_rank :][:2]
    first, last = process.pipeline_rank == 0, process.pipeline_rank == process.pipeline_size - 1
    own = copy.deepcopy(shape)
    own.num_hidden_layers = stop - first_layer
    if getattr(own, "layer_types", None):
        own.layer_types = shape.layer_types[first_layer:stop]
    own.use_cache = False
    register_padding_free()
    with torch.device("meta"):
        backbone: Any = AutoModel.from_config(
            own,
            dtype=getattr(torch, config.weights_dtype),
            attn_implementation=attention_name(config, process.device),
        )
        _split(backbone, config, process)
    if config.bidirectional:
        backbone.config.is_causal = False
    if not first:
        backbone.embed_tokens = None
    if not last:
        backbone.norm = nn.Identity()
    backbone.to_empty(device=process.device)
    # Its angles are computed when it is made, so the one made without memory has none.
    backbone.rotary_emb = type(backbone.rotary_emb)(config=backbone.config).to(process.device)
    return EncoderPart(backbone, config, first_layer=first_layer, first=first, last=last)


def _split(backbone: Any, config: ModelConfig, process: Process) -> None:
    axis = TensorAxis(process.tensor_rank, process.tensor_size, tensor_group())
    low_rank_of = _low_rank_of(backbone, config)
    for layer in backbone.layers:
        split_layer(layer, axis, low_rank_of)
    if config.lora.enabled:
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(name.endswith(("lora_A", "lora_B")))


def _low_rank_of(backbone: nn.Module, config: ModelConfig) -> dict[str, LowRank]:
    """Update of each linear that has one, by the last part of its name."""
    if not config.lora.enabled:
        return {}
    known = linear_names(backbone)
    targets = [name.strip() for name in config.lora.targets.split(",") if name.strip()]
    targets = known if config.lora.targets == ALL_LINEAR else targets
    unknown = [name for name in targets if name not in known]
    if unknown or not targets:
        raise ValueError(
            f"model.lora.targets is {config.lora.targets!r}: this backbone has no linear layer "
            f"{', '.join(unknown) or '(none)'}. It has {', '.join(known)}. Set model.lora.targets=all-linear, or name "
            "some of these, separated by commas."
        )
    return dict.fromkeys(targets, LowRank(config.lora.rank, config.lora.alpha / config.lora.rank))


def _fill_part(part: EncoderPart, whole_in: Path | None, folder: Path | None, seed: int) -> None:
    """Values of all parameters: of the backbone from its weights, of the adapter from `folder` or drawn."""
    weights = backbone_tensors(part.config, whole_in)
    adapter = FolderTensors(folder, adapter=True) if folder is not None and part.config.lora.enabled else None
    parameters = dict(part.named_parameters())
    for own, place in part.placements().items():
        target = parameters[own].detach()
        if not place.adapter:
            fill(target, weights, place.weight, place)
        elif adapter is not None:
            fill(target, adapter, place.weight, place)
        elif own.endswith("lora_B"):
            target.zero_()
        else:
            target.copy_(place.cut(first_factor(place.name.removeprefix("backbone."), place.shape, seed)))
