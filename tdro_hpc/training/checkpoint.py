"""Everything with state in, one folder a checkpoint out, and back. safetensors and JSON only: nothing is unpickled.

`checkpoints/step-00000100/` holds state.safetensors (tensors, named <part>/<key>) and state.json (the rest).
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, Protocol

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tdro_hpc.atomic import new_folder

State = dict[str, Any]


class Part(Protocol):
    """Something whose state a checkpoint keeps, as {"tensors": {name: Tensor}, "values": JSON-able}."""

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in `folder`, rising; unfinished ones have other names and do not count."""
    if not folder.is_dir():
        return []
    names = [entry.name for entry in folder.iterdir() if (entry / "state.json").is_file()]
    return sorted(int(name.removeprefix("step-")) for name in names if name.startswith("step-"))


def save_checkpoint(folder: Path, step: int, parts: dict[str, Part], *, keep: int) -> None:
    """Write the state after `step` optimiser steps, then delete all but the newest `keep` checkpoints.

    Called by one rank: the state of a data-parallel run is the same on all.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name, part in parts.items():
        state = part.state_dict()
        # A copy on the host: safetensors refuses views that share memory.
        tensors |= {f"{name}/{key}": value.detach().to("cpu").clone() for key, value in state["tensors"].items()}
        values[name] = state["values"]
    with new_folder(folder / f"step-{step:08d}") as target:
        save_file(tensors, target / "state.safetensors")
        (target / "state.json").write_text(json.dumps({"step": step, "values": values}), encoding="utf-8")
    for old in checkpoint_steps(folder)[:-keep]:
        shutil.rmtree(folder / f"step-{old:08d}")
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def load_checkpoint(folder: Path, parts: dict[str, Part]) -> int:
    """Put the newest checkpoint into `parts`; returns its step, 0 when there is none.

    raises ValueError if its parts are others than those of this run
    """
    steps = checkpoint_steps(folder)
    if not steps:
        return 0
    source = folder / f"step-{steps[-1]:08d}"
    document = json.loads((source / "state.json").read_text(encoding="utf-8"))
    if set(document["values"]) != set(parts):
        raise ValueError(
            f"{source} holds the state of {', '.join(sorted(document['values']))}; this run needs "
            f"{', '.join(sorted(parts))}. Was it made by another version? Remove {os.fspath(folder)} to start anew."
        )
    tensors: dict[str, dict[str, Tensor]] = {name: {} for name in parts}
    with safe_open(source / "state.safetensors", framework="pt", device="cpu") as file:
        for full in file.keys():
            name, key = full.split("/", 1)
            tensors[name][key] = file.get_tensor(full)
    for name, part in parts.items():
        part.load_state_dict({"tensors": tensors[name], "values": document["values"][name]})
    return int(document["step"])
