"""Trained tensors by name in, a folder that load_encoder, transformers and peft read out; LoRA merged where asked for.

The tensors come from wherever they are stored, one at a time: a model need not fit into memory to be written. Their
names are those of Encoder.named_parameters(), as in a checkpoint behind `parameter.`.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tdro_hpc.config.schema import ModelConfig
from tdro_hpc.encoders.lora import add_lora
from tdro_hpc.encoders.saving import SavableTokenizer, read_manifest, write_manifest
from tdro_hpc.encoders.shards import SHARD_BYTES, TensorPlan, open_tensors, require_shape, write_shards
from tdro_hpc.encoders.skeleton import build_skeleton, folder_of_base, write_config
from tdro_hpc.encoders.sources import tiny_architecture

ADAPTER = "adapter_model.safetensors"
_OF_BACKBONE = "backbone."  # before the names of the backbone in those of an encoder
_OF_PEFT = "base_model.model."  # before the names of the backbone in those of peft's wrapper
# transformers reads the names on the right, which files of the first BERT models have, for those on the left.
_OLD_ENDS = ((".LayerNorm.weight", ".LayerNorm.gamma"), (".LayerNorm.bias", ".LayerNorm.beta"))


class ReadableTensors(Protocol):
    """Whatever gives a tensor by its name: a dict, the tensors of a checkpoint."""

    def __getitem__(self, name: str, /) -> Tensor: ...


class RenamedTensors(Mapping[str, Tensor]):
    """Some tensors under other names, read when they are asked for."""

    def __init__(self, tensors: ReadableTensors, names: Mapping[str, str]) -> None:
        """names  new name -> name in `tensors`"""
        self._tensors, self._names = tensors, dict(names)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class MergedTensors(Mapping[str, Tensor]):
    """A backbone's tensors with the update of an adapter added, each computed when it is asked for."""

    def __init__(self, base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], config: ModelConfig) -> None:
        """
        base     names of the backbone
        adapter  names of an encoder with LoRA
        config   scale of the update, and the type in which the backbone was held in training
        """
        self._base, self._adapter = base, adapter
        self._scale, self._held = config.lora.alpha / config.lora.rank, getattr(torch, config.weights_dtype)

    def __getitem__(self, name: str) -> Tensor:
        # What the update was trained on is the cast weight, not the one in the file.
        weight = self._base[name].to(self._held)
        first, second = _factors_of(name)
        if first not in self._adapter:
            return weight
        # float32: in 16 bits a small update would be lost in the sum.
        update = self._adapter[second].float() @ self._adapter[first].float()  # [out, rank] @ [rank, in]
        return update.mul_(self._scale).add_(weight)

    def __contains__(self, name: object) -> bool:
        return name in self._base  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


def write_model(config: ModelConfig, tokenizer: SavableTokenizer, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fill `folder` with the files that save_encoder writes, without an encoder: of LoRA the adapter only.

    tensors  every trained parameter by its name in an encoder, whole; others in it are not read
    raises   ValueError  when one is missing or has another shape than in the model of the config
    """
    folder.mkdir(parents=True, exist_ok=True)
    if config.lora.enabled:
        width = write_adapter(config, tensors, folder)
    else:
        width = write_weights(config, tensors, folder, dtype=getattr(torch, config.weights_dtype))
    tokenizer.save(folder)
    write_manifest(config, width, folder)


def write_merged(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    folder: Path,
    *,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
    before_each: Callable[[], None] = lambda: None,
) -> int:
    """Write all weights of a model, its adapter's update added where it has one; returns the width of its vectors.

    Beside config.json and the weights it writes encoder.json: load_encoder(folder=...) then needs no other model.
    Parameters as in write_weights.
    """
    if config.lora.enabled:
        adapter = {name: tensors[name] for name in _adapter_names(config, tensors)}
        merged = MergedTensors(open_base(config), adapter, config)
        tensors = RenamedTensors(merged, {_OF_BACKBONE + name: name for name in merged})
        config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, enabled=False))
    width = write_weights(config, tensors, folder, dtype=dtype, shard_bytes=shard_bytes, before_each=before_each)
    write_manifest(config, width, folder)
    return width


def write_weights(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    folder: Path,
    *,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
    before_each: Callable[[], None] = lambda: None,
) -> int:
    """Write config.json and every weight of the backbone; returns the width of its vectors.

    tensors      names of an encoder
    dtype        type of the floating-point weights in the files
    shard_bytes  a file ends before it grows beyond; before_each is called before every tensor
    raises       ValueError  for tensors that are missing or have another shape than the model's
    """
    backbone = build_skeleton(config)
    expected = backbone.state_dict()
    _require_all({_OF_BACKBONE + name for name in expected}, tensors, config)
    plans = {
        name: TensorPlan(tuple(value.shape), dtype if value.is_floating_point() else value.dtype)
        for name, value in expected.items()
    }
    stored = RenamedTensors(tensors, {name: _OF_BACKBONE + name for name in expected})
    write_config(backbone, dtype, folder)
    write_shards(stored, plans, folder, shard_bytes=shard_bytes, before_each=before_each)
    return int(backbone.config.hidden_size)


def write_adapter(config: ModelConfig, tensors: Mapping[str, Tensor], folder: Path) -> int:
    """Write adapter_config.json and adapter_model.safetensors as peft does; returns the width of the vectors."""
    wrapped = _wrapped_skeleton(config)
    expected = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    _require_all({_OF_BACKBONE + name for name in expected}, tensors, config)
    state = {name: tensors[_OF_BACKBONE + name].float() for name in expected}
    for name, parameter in expected.items():
        require_shape(name, state[name], tuple(parameter.shape))
    wrapped.save_pretrained(str(folder), state_dict=state, safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's blank model card
    return int(wrapped.get_base_model().config.hidden_size)


def open_saved(folder: Path) -> Mapping[str, Tensor]:
    """The trained tensors of a folder that save_encoder or write_model made, under their names in an encoder.

    raises  ValueError  where the folder holds no saved encoder, or weights that cannot be read
    """
    manifest = read_manifest(folder)
    if manifest["weights"] == "full":
        stored = open_tensors(folder)
        return RenamedTensors(stored, {_OF_BACKBONE + name: name for name in stored})
    stored = open_tensors(folder, single=ADAPTER)
    # peft leaves the adapter's own name out: it is `default` here, always.
    names = {
        name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."): name for name in stored
    }
    return RenamedTensors(stored, {_OF_BACKBONE + name: old for name, old in names.items()})


def open_base(config: ModelConfig) -> Mapping[str, Tensor]:
    """The tensors of config.name under the names that they have in its backbone.

    raises  ValueError  where the model is not there, holds pickled weights only, or lacks some
    """
    architecture = tiny_architecture(config.name)
    if architecture:
        from tdro_hpc.encoders.tiny import tiny_backbone

        return dict(tiny_backbone(architecture).state_dict())
    folder = folder_of_base(config)
    stored = open_tensors(folder)
    backbone = build_skeleton(config)
    prefix = f"{backbone.base_model_prefix}."
    places = {name: _place_of(name, prefix, stored) for name in backbone.state_dict()}
    missing = [name for name, place in places.items() if not place]
    if missing:
        raise ValueError(
            f"The weights in {folder} lack {len(missing)} of {len(places)} parameters of a {type(backbone).__name__}, "
            f"such as {missing[0]}. Set model.name to a model that is whole."
        )
    return RenamedTensors(stored, places)


def _place_of(name: str, prefix: str, stored: Mapping[str, Tensor]) -> str:
    """Name in the files of a parameter of the backbone; empty where there is none."""
    old = [name.removesuffix(new) + end for new, end in _OLD_ENDS if name.endswith(new)]
    choices = [before + each for each in (name, *old) for before in ("", prefix)]
    return next((choice for choice in choices if choice in stored), "")


def _factors_of(name: str) -> tuple[str, str]:
    """Names in an encoder of the two factors of the update of a backbone's weight."""
    module = f"{_OF_BACKBONE}{_OF_PEFT}{name.removesuffix('.weight')}"
    return f"{module}.lora_A.default.weight", f"{module}.lora_B.default.weight"


def _adapter_names(config: ModelConfig, tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the adapter's factors in an encoder, after a look that all are there."""
    wrapped = _wrapped_skeleton(config)
    names = [_OF_BACKBONE + name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    _require_all(set(names), tensors, config)
    return names


def _wrapped_skeleton(config: ModelConfig) -> Any:
    """peft's wrapper around a backbone, both without memory for their weights."""
    with warnings.catch_warnings():
        # peft still calls some of transformers' names by their old form.
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        return add_lora(build_skeleton(config), config, seed=0)


def _require_all(names: set[str], tensors: Mapping[str, Any], config: ModelConfig) -> None:
    missing = sorted(name for name in names if name not in tensors)
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(names)} trained tensors of {config.name!r} are missing, such as {missing[0]}. "
            "Use the model.* keys that they were trained with: they are in config.yaml of the stage."
        )
