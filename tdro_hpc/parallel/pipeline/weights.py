"""Names of a backbone's weights in, tensors or parts of them out: from a folder of safetensors files, or from memory.

Only what is asked for is read, so no rank ever holds more of a model than its own part. Loads no pickles.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tdro_hpc.config.schema import ModelConfig
from tdro_hpc.encoders.skeleton import folder_of_base
from tdro_hpc.encoders.sources import tiny_architecture
from tdro_hpc.encoders.tiny import tiny_backbone
from tdro_hpc.parallel.pipeline.placement import Placement
from tdro_hpc.parallel.slices import StoredTensors, WholeTensors

PATTERN = "*.safetensors"
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"


class FolderTensors:
    """Tensors of the safetensors files of a folder, as StoredTensors.

    Files of a whole language model name its backbone `model.`; that prefix is left out of the names here.
    """

    def __init__(self, folder: Path, *, adapter: bool = False) -> None:
        """
        adapter  the weights of a LoRA adapter instead of those of a backbone
        raises   ValueError where the folder has no such file
        """
        self._folder = folder
        self._files: dict[str, tuple[Path, str]] = {}  # our name -> file, its name there
        self._open: dict[Path, Any] = {}
        files = [folder / ADAPTER] if adapter else _weight_files(folder)
        for file in files:
            for name in self._opened(file, adapter=adapter).keys():
                self._files[name.removeprefix("model.")] = (file, name)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def keys(self) -> list[str]:
        """Names of all tensors."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor; raises ValueError where there is none of that name."""
        return tuple(self._slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        file, stored = self._place(name)
        return self._open[file].get_tensor(stored)

    def part(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Rows start .. stop along `dim`; the rest is not read."""
        index = tuple(slice(start, stop) if at == dim else slice(None) for at in range(len(self.shape(name))))
        return self._slice(name)[index]

    def _slice(self, name: str) -> Any:
        file, stored = self._place(name)
        return self._open[file].get_slice(stored)

    def _place(self, name: str) -> tuple[Path, str]:
        if name not in self._files:
            raise ValueError(
                f"The weights in {self._folder} lack {name}: it would be random. Set model.name to a model that is "
                "whole."
            )
        return self._files[name]

    def _opened(self, file: Path, *, adapter: bool) -> Any:
        if not file.is_file():
            what = "LoRA adapter" if adapter else "weights file"
            raise ValueError(f"There is no {what} {file}. Make the model folder anew, or set model.name to another.")
        self._open[file] = safe_open(file, framework="pt", device="cpu")
        return self._open[file]


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        document = json.loads(index.read_text(encoding="utf-8"))
        return [folder / name for name in sorted(set(document["weight_map"].values()))]
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    files = [file for file in sorted(folder.glob(PATTERN)) if file.name != ADAPTER]
    if not files:
        raise ValueError(
            f"There are no *.safetensors files in {folder}, and parallel.pp and parallel.tp read no other weights. "
            "Convert the model once: AutoModel.from_pretrained(<model>).save_pretrained(<new folder>), and set "
            "model.name to the new folder."
        )
    return files


def backbone_folder(config: ModelConfig) -> Path | None:
    """Folder with config.json and weights of config.name, downloaded where need be; None for a tiny backbone.

    raises ValueError where there is no such model, or the hub does not hand it out
    """
    return None if tiny_architecture(config.name) else folder_of_base(config)


def backbone_tensors(config: ModelConfig, folder: Path | None) -> StoredTensors:
    """Weights of the backbone of config.name; `folder` is what backbone_folder or a saved model gives."""
    if folder is None:
        return WholeTensors(tiny_backbone(tiny_architecture(config.name)).state_dict())
    return FolderTensors(folder)


def fill(target: Tensor, source: StoredTensors, name: str, place: Placement) -> None:
    """Copy the part of a stored tensor that `place` says into `target`, converted to its type.

    raises ValueError where the source has none of that name, or one of another shape
    """
    if name not in source:
        raise ValueError(f"The weights lack {name}: it would be random. Set model.name to a model that is whole.")
    if tuple(source.shape(name)) != place.shape:
        raise ValueError(
            f"{name} is of shape {list(source.shape(name))} in the weights, but config.json makes it "
            f"{list(place.shape)}. Set model.name to a folder whose config.json belongs to its weights."
        )
    with torch.no_grad():
        target.copy_(place.part_of(source, name))
