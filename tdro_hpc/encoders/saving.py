"""An encoder in, a folder of Hugging Face files out; and what such a folder says about its encoder.

The folder holds config.json and model.safetensors, or under LoRA only the adapter; the tokenizer; and encoder.json,
which says how the vectors are made. No file is a pickle.
"""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from tdro_hpc.config.schema import LoraConfig, ModelConfig
from tdro_hpc.data.tokens import with_instruction
from tdro_hpc.encoders.lora import save_lora

if TYPE_CHECKING:
    from tdro_hpc.encoders.backbone import Encoder

MANIFEST = "encoder.json"
FORMAT_VERSION = 1
# What belongs to the trained model and not to the run that uses it.
_IDENTITY = ("name", "revision", "pooling", "similarity", "append_eos", "padding_side", "bidirectional")


class SavableTokenizer(Protocol):
    """What save_encoder asks of a tokenizer."""

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into the folder."""


def save_encoder(encoder: "Encoder", tokenizer: SavableTokenizer, folder: Path) -> None:
    """Fill `folder` with everything that load_encoder and load_tokenizer need.

    Writes straight into the folder: the caller hands over one that is renamed into place when it is whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = encoder.config
    if config.lora.enabled:
        save_lora(encoder.backbone, str(folder))
        (folder / "README.md").unlink(missing_ok=True)  # peft's blank model card
    else:
        encoder.backbone.save_pretrained(str(folder))  # type: ignore[operator]
    tokenizer.save(folder)
    write_manifest(config, encoder.width, folder)


def write_manifest(config: ModelConfig, width: int, folder: Path) -> None:
    """Write encoder.json for the weights in `folder`: an adapter where config.lora is enabled, else all of them.

    width  numbers of a vector
    """
    manifest = {
        "format_version": FORMAT_VERSION,
        "weights": "adapter" if config.lora.enabled else "full",
        **{key: getattr(config, key) for key in _IDENTITY},
        "lora": dataclasses.asdict(config.lora) if config.lora.enabled else None,
        "query_format": with_instruction("{text}", "{instruction}"),
        "width": width,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def saved_model_config(config: ModelConfig, folder: Path) -> ModelConfig:
    """`config` with what encoder.json in `folder` says about the model: base name, pooling, similarity, LoRA and so on.

    How to run it (attention, autocast, weights_dtype, checkpointing) stays as in `config`.
    raises  ValueError  when the folder holds no saved encoder, or one of a newer format
    """
    manifest = read_manifest(folder)
    lora = manifest["lora"]
    return dataclasses.replace(
        config,
        **{key: manifest[key] for key in _IDENTITY},
        lora=LoraConfig(**lora) if lora else dataclasses.replace(config.lora, enabled=False),
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Content of encoder.json, checked to be complete together with its weights; ValueError otherwise."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no saved encoder: {MANIFEST} is missing. Expected a model folder of a finished stage, "
            f"such as runs/default/s0/out/model. To start from a plain Hugging Face folder set model.name to it."
        )
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {manifest.get('format_version')!r}; this version of tdro_hpc reads "
            f"{FORMAT_VERSION}. Load it with the version that wrote it, or train it again."
        )
    pattern = "adapter_model.safetensors" if manifest["weights"] == "adapter" else "model*.safetensors"
    if not any(folder.glob(pattern)):
        raise ValueError(f"{folder} is not complete: {pattern} is missing. Run the stage that made it again.")
    return manifest


def trainable_state(encoder: nn.Module) -> dict[str, Tensor]:
    """Every trainable parameter by name, sharing memory with the model: save or clone before the next step."""
    return {name: parameter.detach() for name, parameter in encoder.named_parameters() if parameter.requires_grad}


def load_trainable_state(encoder: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy the values of `state` into the trainable parameters of the same names.

    raises  ValueError  when names or shapes differ, before anything is changed
    """
    own = trainable_state(encoder)
    problems = [f"{name}: in the model, not in the state" for name in own if name not in state]
    problems += [f"{name}: in the state, not trainable in the model" for name in state if name not in own]
    problems += [
        f"{name}: shape {list(own[name].shape)} in the model, {list(state[name].shape)} in the state"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    if problems:
        shown = "\n  ".join(problems[:5])
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"The saved parameters do not fit the model ({len(problems)} differences):\n  {shown}{more}\n"
            f"Use the model.* keys that the state was saved with (model.name and model.lora.*), or start anew."
        )
    for name, parameter in own.items():
        parameter.copy_(state[name])
