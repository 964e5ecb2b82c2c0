"""Tensors by name in, safetensors files in the Hugging Face layout out, and back. Nothing is ever unpickled.

Both ways one tensor is in memory at a time, whatever the size of the model.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # of one file: a size that every tool and file system copes with
_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class TensorPlan:
    """What a tensor will be in the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorFiles(Mapping[str, Tensor]):
    """Tensors of safetensors files by name, each read when it is asked for and in memory while it is held."""

    def __init__(self, places: Mapping[str, Path]) -> None:
        """places  name -> file that holds the tensor"""
        self._places = dict(places)

    def __getitem__(self, name: str) -> Tensor:
        # Opened anew each time: the pages of a mapped file stay in memory for as long as it is open.
        with safe_open(self._places[name], framework="pt") as file:
            return file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._places  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def open_tensors(folder: Path, *, single: str = WEIGHTS) -> TensorFiles:
    """The tensors of a model folder: the files of its index, else the file `single`.

    raises  ValueError  where there is none, only pickled ones (.bin), or one that is damaged (names the file)
    """
    index = folder / INDEX
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        places = {name: folder / file for name, file in names.items()}
        for file in sorted(set(places.values())):
            _names_in(file)
        return TensorFiles(places)
    if not (folder / single).is_file():
        raise ValueError(_no_weights(folder, single))
    return TensorFiles({name: folder / single for name in _names_in(folder / single)})


def write_shards(
    tensors: Mapping[str, Tensor],
    plans: Mapping[str, TensorPlan],
    folder: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    before_each: Callable[[], None] = lambda: None,
) -> list[Path]:
    """The files written: model.safetensors, or several of at most `shard_bytes` with their index.

    tensors      read one after the other, in the order of `plans`, and cast to the type planned
    plans        name -> shape and type; a single tensor may be larger than `shard_bytes`
    before_each  called before every tensor; what it raises ends the writing
    raises       ValueError  for a tensor of another shape than planned
    """
    shards = _shards_of(plans, shard_bytes)
    if len(shards) == 1:
        files = [folder / WEIGHTS]
    else:
        files = [
            folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
        ]
    for file, names in zip(files, shards, strict=True):
        _write_file(tensors, {name: plans[name] for name in names}, file, before_each)
    if len(shards) > 1:
        places = {name: file.name for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(plan.num_bytes for plan in plans.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Nothing, or a ValueError where a stored tensor is not of the shape that the model has."""
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} is stored with the shape {list(tensor.shape)}; in the model it has {list(shape)}. Use the model.* "
            "keys that it was trained with: they are in config.yaml of the stage."
        )


def _shards_of(plans: Mapping[str, TensorPlan], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, plan in plans.items():
        if shards[-1] and filled + plan.num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += plan.num_bytes
    return shards


def _write_file(
    tensors: Mapping[str, Tensor], plans: Mapping[str, TensorPlan], path: Path, before_each: Callable[[], None]
) -> None:
    """One safetensors file. The library's own writer wants all tensors at once, and copies them."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, plan in plans.items():
        start, end = end, end + plan.num_bytes
        header[name] = {"dtype": _NAMES[plan.dtype], "shape": list(plan.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values begin at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, plan in plans.items():
            before_each()
            file.write(_bytes_of(tensors[name], plan, name).data)


def _bytes_of(tensor: Tensor, plan: TensorPlan, name: str) -> np.ndarray:
    require_shape(name, tensor, plan.shape)
    values = tensor.detach().to("cpu", plan.dtype).contiguous().reshape(-1)
    return values.view(torch.uint8).numpy()  # numpy knows no bfloat16, but bytes


def _names_in(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read ({error}). Download or make it again.") from error


def _no_weights(folder: Path, single: str) -> str:
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if not pickled:
        return f"{folder} holds no {single}, and no {INDEX} with its parts. Expected the files of a whole model."
    return (
        f"{folder} holds weights only as {pickled[0]}, which is a pickle: reading one can run any code, so it is not "
        f"opened. Set model.name to a model with {single}; most on the hub have one under the same name."
    )
