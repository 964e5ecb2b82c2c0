"""What the states of engines have in common: their names, what is saved of an encoder, whether a checkpoint fits one.

A tensor of a state has the name and the shape that it has in the state of an engine of one process, in any layout.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tdro_hpc.parallel.optimizer import MOMENTS
from tdro_hpc.parallel.slices import StoredTensors, WholeTensors


def saved_buffers(encoder: nn.Module) -> list[tuple[str, Tensor]]:
    """(name, buffer) of those that are saved: not the ones that are rebuilt from the config."""
    saved = encoder.state_dict().keys()
    return [(name, buffer) for name, buffer in encoder.named_buffers() if name in saved]


def stored_tensors(state: dict[str, Any]) -> StoredTensors:
    """state["tensors"], which may also be a plain dict of whole tensors."""
    tensors = state["tensors"]
    return WholeTensors(tensors) if isinstance(tensors, Mapping) else tensors


def check_fit(wanted: Mapping[str, Iterable[int]], stored: StoredTensors) -> None:
    """Nothing, or a ValueError where a checkpoint has other parameters and buffers than the encoder.

    wanted  name in the state -> shape, of all of them
    """
    found = {name for name in stored.keys() if not name.startswith("optimizer.")}  # noqa: SIM118, it is no dict
    wrong = sorted(found ^ wanted.keys())
    wrong += [name for name in sorted(found & wanted.keys()) if tuple(stored.shape(name)) != tuple(wanted[name])]
    if wrong:
        raise ValueError(
            f"The checkpoint does not fit this encoder: {len(wrong)} tensors are missing, superfluous or of another "
            f"shape, among them {', '.join(wrong[:3])}. Was it made with other model.* values? Use those again, or "
            "remove the stage's checkpoints to start anew."
        )


def stored_adam_state(stored: StoredTensors, name: str) -> dict[str, Tensor] | None:
    """What `optimizer.adam_state` gave for the parameter of that name; None if it had never been updated."""
    if f"optimizer.step.{name}" not in stored:
        return None
    return {field: stored[f"optimizer.{field}.{name}"] for field in ("step", *MOMENTS)}


def stored_step(stored: StoredTensors, names: Iterable[str]) -> float | None:
    """Number of updates of the parameters of these names, as Adam counts them; None if there was none."""
    known = [f"optimizer.step.{name}" for name in names if f"optimizer.step.{name}" in stored]
    return float(torch.stack([stored[name].reshape(()) for name in known]).max()) if known else None
