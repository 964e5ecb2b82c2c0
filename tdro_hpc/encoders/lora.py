"""A backbone in, the same backbone with a trainable low-rank update in each of its linear layers out. By peft."""

import hashlib
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tdro_hpc.config.schema import ModelConfig

if TYPE_CHECKING:
    from peft import LoraConfig as PeftLoraConfig

ALL_LINEAR = "all-linear"


def add_lora(backbone: nn.Module, config: ModelConfig, *, seed: int) -> nn.Module:
    """`backbone` wrapped by peft, with only the adapter trainable; the adapter is float32 whatever the backbone is.

    The update starts at zero: the output is that of the backbone. `first_factor` draws the other factor.
    seed    of the first factors
    raises  ValueError  when model.lora.targets names no linear layer (lists those there are)
    """
    from peft import get_peft_model

    _require_targets(backbone, config.lora.targets)
    wrapped = _float32_adapter(get_peft_model(backbone, _peft_config(config)))
    for name, parameter in wrapped.named_parameters():
        if ".lora_A." in name:
            parameter.data.copy_(first_factor(name, tuple(parameter.shape), seed))
    return wrapped


def first_factor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Initial values [rank, inputs], float32, of the factor of an update that does not start at zero.

    name    of the parameter in peft's model. Each is drawn for itself, so a rank that holds a part of the model draws
            the same values as one that holds it all
    Uniform within 1/sqrt(inputs), as peft draws it (arXiv 2106.09685 leaves the scale open).
    """
    digest = hashlib.blake2b(f"{seed}/lora/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)


def load_lora(backbone: nn.Module, folder: str) -> nn.Module:
    """`backbone` with the adapter saved in `folder`, trainable."""
    from peft import PeftModel

    return _float32_adapter(PeftModel.from_pretrained(backbone, folder, is_trainable=True))


def save_lora(backbone: nn.Module, folder: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors, nothing of the backbone."""
    # "auto" would ask the hub whether the vocabulary has grown; this package never changes one.
    backbone.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)  # type: ignore[operator]


def linear_names(backbone: nn.Module) -> list[str]:
    """Last parts of the names of all linear layers, such as q_proj, each once, in the order of the model."""
    names = [name.rsplit(".", 1)[-1] for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    return list(dict.fromkeys(names))


def parameter_counts(encoder: nn.Module) -> tuple[int, int]:
    """Number of parameters of a model: (total, trainable)."""
    total = sum(parameter.numel() for parameter in encoder.parameters())
    return total, sum(parameter.numel() for parameter in encoder.parameters() if parameter.requires_grad)


def _peft_config(config: ModelConfig) -> "PeftLoraConfig":
    from peft import LoraConfig as PeftLoraConfig
    from peft import TaskType

    targets: Any = ALL_LINEAR if config.lora.targets == ALL_LINEAR else _target_names(config.lora.targets)
    return PeftLoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora.dropout,
        target_modules=targets,
        task_type=TaskType.FEATURE_EXTRACTION,
        base_model_name_or_path=config.name,
        revision=config.revision or None,
    )


def _target_names(targets: str) -> list[str]:
    return [name.strip() for name in targets.split(",") if name.strip()]


def _require_targets(backbone: nn.Module, targets: str) -> None:
    if targets == ALL_LINEAR:
        return
    names, known = _target_names(targets), linear_names(backbone)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(
            f"model.lora.targets is {targets!r}: this backbone has no linear layer {', '.join(unknown) or '(none)'}. "
            f"It has {', '.join(known)}. Set model.lora.targets=all-linear, or name some of these, separated by commas."
        )


def _float32_adapter(backbone: nn.Module) -> nn.Module:
    """The same model with trainable parameters in float32: 16-bit weights swallow small updates."""
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    return backbone
