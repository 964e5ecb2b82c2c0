"""Everything with state in, one folder a checkpoint out, and back. safetensors and JSON only: nothing is unpickled.

`checkpoints/step-00000100/` holds state.safetensors (tensors, named <part>/<key>) and state.json (the rest).
"""

import json
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tdro_hpc.atomic import new_folder
from tdro_hpc.parallel.process import broadcast_from_first, group_rank

State = dict[str, Any]
_PATIENCE_SECONDS = 60.0  # attributes of a network disk are looked up again after a minute at the latest


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


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint that rank 0 sees, on all ranks; 0 when there is none. All ranks call it.

    A network disk may show the newest folder late on other nodes: ranks that looked for themselves would disagree.
    """
    steps = checkpoint_steps(folder) if group_rank() == 0 else []
    return int(broadcast_from_first(torch.tensor(steps[-1] if steps else 0)))


def load_checkpoint(
    folder: Path, parts: dict[str, Part], *, step: int | None = None, patience_seconds: float = _PATIENCE_SECONDS
) -> int:
    """Put a checkpoint into `parts`; returns its step, 0 when there is none.

    step              that of newest_step; None = the newest that this process sees
    patience_seconds  a network disk may need to show it
    raises            ValueError if its parts are others than those of this run, or it does not appear
    """
    if step is None:
        step = max(checkpoint_steps(folder), default=0)
    if step == 0:
        return 0
    source = folder / f"step-{step:08d}"
    _wait_for(source, patience_seconds)
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


def _wait_for(source: Path, seconds: float) -> None:
    """Return when both files of a checkpoint are there."""
    deadline = time.monotonic() + seconds
    while not all((source / name).is_file() for name in ("state.json", "state.safetensors")):
        if time.monotonic() > deadline:
            raise ValueError(
                f"Rank 0 sees the checkpoint {source}, but {socket.gethostname()} did not within {seconds:.0f} s. "
                "Set runs_dir to a folder that all nodes share, then type the same line again."
            )
        # Listing the folder makes a network disk look again for names that it has noted as missing.
        os.listdir(source.parent if source.parent.is_dir() else ".")
        time.sleep(min(1.0, seconds / 10))
