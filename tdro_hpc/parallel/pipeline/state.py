"""The state of a pipeline rank as layout-free tensors, and back.

Each rank has some parameters of the whole model, some of them in part. Without ZeRO it also has the state of the
optimiser for all of them; with ZeRO-1 masters and moments are split over the data ranks (zero/state.py).
"""

from typing import Any

import torch
from torch import Tensor, nn

from tdro_hpc.parallel.engine_state import stored_adam_state
from tdro_hpc.parallel.optimizer import adam_state, set_adam_state
from tdro_hpc.parallel.pipeline.placement import Placement
from tdro_hpc.parallel.process import Process
from tdro_hpc.parallel.slices import Slice, StoredTensors
from tdro_hpc.parallel.zero.state import gathered, take_over

Trained = list[tuple[nn.Parameter, Placement]]  # of one rank, in the order of its part


def tensors_to_write(
    trained: Trained, engine: Any, process: Process, *, masters_split: bool
) -> dict[str, Tensor | Slice]:
    """{name: Tensor or Slice} of what this rank writes; no other rank writes the same. All ranks call it together.

    engine         DeepSpeed's
    masters_split  whether masters and moments are split over the data ranks
    """
    # What is whole on all tensor ranks is written by the first of them.
    own = [(p, place) for p, place in trained if place.dim is not None or process.tensor_rank == 0]
    places = {place.name: place for _, place in own}
    if masters_split:
        tensors = dict(gathered(engine, [(place.name, parameter) for parameter, place in own]))
    else:
        adam, tensors = adam_state(engine.basic_optimizer), {}
        for number, (parameter, place) in enumerate(own):
            if number % process.data_size == process.data_rank:
                tensors[f"parameter.{place.name}"] = parameter.detach()
                fields = adam.get(parameter, {})
                tensors |= {f"optimizer.{field}.{place.name}": value for field, value in fields.items()}
    written: dict[str, Tensor | Slice] = {}
    for name, tensor in tensors.items():
        place = places[_parameter_of(name)]
        if tensor.ndim:
            written[name] = place.labelled(tensor)
        elif place.start == 0:  # the count of steps is the same for all parts of a parameter
            written[name] = tensor
    return written


def load_tensors(trained: Trained, engine: Any, stored: StoredTensors, *, masters_split: bool) -> None:
    """Take over this rank's part of what all ranks of any layout wrote; arguments as in `tensors_to_write`."""
    own = OwnParts(stored, {place.name: place for _, place in trained})
    if masters_split:
        take_over(engine, [(place.name, parameter) for parameter, place in trained], own)
        return
    states = {parameter: stored_adam_state(own, place.name) for parameter, place in trained}
    with torch.no_grad():
        for parameter, place in trained:
            parameter.copy_(own[f"parameter.{place.name}"])
    set_adam_state(engine.basic_optimizer, {parameter: state for parameter, state in states.items() if state})


class OwnParts:
    """A rank's parts of stored tensors, as if they were whole: a StoredTensors of the names of its parameters."""

    def __init__(self, stored: StoredTensors, places: dict[str, Placement]) -> None:
        """
        places  parameter's name -> what of it the rank has
        """
        self._stored, self._places = stored, places

    def __contains__(self, name: str) -> bool:
        return name in self._stored and _parameter_of(name) in self._places

    def keys(self) -> list[str]:
        """Names of all stored tensors of which this rank has a part."""
        return [name for name in self._stored.keys() if _parameter_of(name) in self._places]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of this rank's part."""
        place = self._place(name)
        shape = self._stored.shape(name)
        return shape if place is None else tuple(place.size if at == place.dim else n for at, n in enumerate(shape))

    def __getitem__(self, name: str) -> Tensor:
        place = self._place(name)
        return self._stored[name] if place is None else place.part_of(self._stored, name)

    def part(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Rows start .. stop along `dim` of this rank's part."""
        place = self._place(name)
        if place is None:
            return self._stored.part(name, dim, start, stop)
        if dim == place.dim:
            return self._stored.part(name, dim, place.start + start, place.start + stop)
        return place.part_of(self._stored, name).narrow(dim, start, stop - start)

    def _place(self, name: str) -> Placement | None:
        """Where the tensor is cut; None where this rank has all of it."""
        place = self._places[_parameter_of(name)]
        return None if place.dim is None or not self._stored.shape(name) else place


def _parameter_of(name: str) -> str:
    """Name of the parameter that a tensor of the state belongs to: `parameter.<name>` or `optimizer.<field>.<name>`."""
    kind, _, rest = name.partition(".")
    return rest if kind == "parameter" else rest.partition(".")[2]
