"""The float32 masters and Adam's moments that DeepSpeed's ZeRO optimisers split over ranks, by the name of a parameter.

Every optimiser of DeepSpeed lays the parameters of a group one after the other and gives each rank a part of that line.
Only this file knows where in it a parameter is. Saving gathers one parameter at a time; loading reads no more than the
rows that this rank holds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tdro_hpc.parallel.engine_state import stored_step
from tdro_hpc.parallel.optimizer import MOMENTS, adam_state, set_adam_state
from tdro_hpc.parallel.process import data_group, group_device, group_rank, group_size
from tdro_hpc.parallel.slices import StoredTensors


@dataclass(frozen=True)
class Fragment:
    """What this rank holds of one parameter: `numel` values, at `start` of a line of masters that it updates."""

    line: Tensor  # float32 [values of this rank], what the wrapped optimiser steps
    start: int  # in the line
    offset: int  # in the flattened parameter
    numel: int  # may be 0

    def of(self, line: Tensor) -> Tensor:
        """The values of this parameter in the masters, or in another line that is laid out like them."""
        return line.detach().narrow(0, self.start, self.numel)


def fragments(engine: Any, parameters: list[nn.Parameter]) -> list[Fragment]:
    """Where the values of each parameter are on this rank.

    engine  DeepSpeedEngine under ZeRO 1 to 3
    """
    if hasattr(parameters[0], "ds_id"):
        return [_fragment_of_stage3(engine.optimizer, parameter) for parameter in parameters]
    lines = [group["params"][0] for group in engine.basic_optimizer.param_groups]
    return [_fragment_of_stage1_and_2(lines, parameter) for parameter in parameters]


def _fragment_of_stage1_and_2(lines: list[Tensor], parameter: Any) -> Fragment:
    mapping = parameter._hp_mapping
    if mapping is None:  # all of it is on other ranks
        return Fragment(lines[0], start=0, offset=0, numel=0)
    held = mapping.get_hp_fragment_address()
    return Fragment(
        lines[mapping.param_group_index], held.start, offset=mapping.lp_fragment_address.start, numel=held.numel
    )


def _fragment_of_stage3(optimizer: Any, parameter: Any) -> Fragment:
    group, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    offset = size * group_rank()
    # The parts of all ranks are of one size: the last may reach beyond the end of the parameter, or be all beyond it.
    numel = min(size, max(0, parameter.ds_numel - offset))
    return Fragment(
        optimizer.fp32_partitioned_groups_flat[group], start, offset=min(offset, parameter.ds_numel), numel=numel
    )


def lines_of(engine: Any) -> list[Tensor]:
    """All lines of masters that this rank updates."""
    groups = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    return groups if groups is not None else [group["params"][0] for group in engine.basic_optimizer.param_groups]


def gathered(engine: Any, named: list[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, Tensor]]:
    """(name in the state, tensor) of the masters and moments that this rank writes. All ranks call it together.

    Parameter i is put together on data rank i % data_size, on the host, and is of the shape of the parameter.
    """
    adam = _adam_by_line(engine)
    updated = bool(adam)
    for number, ((name, parameter), held) in enumerate(
        zip(named, fragments(engine, [parameter for _, parameter in named]), strict=True)
    ):
        writer = number % group_size()
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        wanted = {f"parameter.{name}": held.line}
        if updated:
            fields = adam[held.line]
            wanted |= {f"optimizer.{field}.{name}": fields[field] for field in MOMENTS}
        for key, line in wanted.items():
            whole = _put_together(held, line, shape, writer)
            if group_rank() == writer:
                yield key, whole
        if updated and group_rank() == writer:
            yield f"optimizer.step.{name}", adam[held.line]["step"].to("cpu", torch.float32)


def _adam_by_line(engine: Any) -> dict[Tensor, dict[str, Tensor]]:
    """Adam's state of each line of this rank; empty before the first step."""
    optimizer = engine.basic_optimizer
    if not hasattr(engine.optimizer, "fp32_partitioned_groups_flat"):
        return adam_state(optimizer)
    # Under ZeRO-3 the groups hold their lines during a step only.
    return {line: optimizer.state[line] for line in lines_of(engine) if optimizer.state.get(line)}


def _put_together(held: Fragment, line: Tensor, shape: tuple[int, ...], writer: int) -> Tensor:
    """The whole tensor, float32 on the host of the data rank `writer`; of no use on the others."""
    numel = torch.Size(shape).numel()
    whole = torch.zeros(numel, dtype=torch.float32, device=group_device())
    whole.narrow(0, held.offset, held.numel).copy_(held.of(line))
    if group_size() > 1:
        # One rank has each value and the others have no bits there, so the sum of integers has its bits: that of
        # floats would lose the sign of a zero.
        group = data_group()
        target = writer if group is None else dist.get_global_rank(group, writer)
        dist.reduce(whole.view(torch.int32), dst=target, group=group)
    return whole.view(shape).to("cpu")


@torch.no_grad()
def take_over(engine: Any, named: list[tuple[str, nn.Parameter]], stored: StoredTensors) -> None:
    """Set masters, moments and weights to those of a checkpoint, bit for bit. All ranks call it together."""
    parts = fragments(engine, [parameter for _, parameter in named])
    step = stored_step(stored, [name for name, _ in named])
    adam: dict[Tensor, dict[str, Tensor]] = {}
    if step is not None:
        adam = {
            line: {"step": torch.tensor(step)} | {field: torch.zeros_like(line).detach() for field in MOMENTS}
            for line in lines_of(engine)
        }
    for (name, _), held in zip(named, parts, strict=True):
        if held.numel == 0:
            continue
        held.of(held.line).copy_(_stored_values(stored, f"parameter.{name}", held))
        for field in MOMENTS if f"optimizer.step.{name}" in stored else ():
            held.of(adam[held.line][field]).copy_(_stored_values(stored, f"optimizer.{field}.{name}", held))
    _set_adam(engine, adam)
    _copy_masters_to_weights(engine)


def _stored_values(stored: StoredTensors, name: str, held: Fragment) -> Tensor:
    """The values [numel] of a stored tensor that this rank holds; reads the rows that they are in."""
    shape = stored.shape(name)
    if len(shape) < 2:
        return stored[name].reshape(-1).narrow(0, held.offset, held.numel)
    width = torch.Size(shape[1:]).numel()
    first, last = held.offset // width, (held.offset + held.numel - 1) // width
    rows = stored.part(name, 0, first, last + 1)
    return rows.reshape(-1).narrow(0, held.offset - first * width, held.numel)


def _set_adam(engine: Any, adam: dict[Tensor, dict[str, Tensor]]) -> None:
    optimizer = engine.basic_optimizer
    if hasattr(engine.optimizer, "fp32_partitioned_groups_flat"):
        optimizer.state.clear()
        for line, fields in adam.items():
            optimizer.state[line] = fields | {"step": fields["step"].to(line.device)}
        return
    set_adam_state(optimizer, adam)
    engine.optimizer._hp_optimizer_states_linked = False  # it keeps views of the moments: made anew at the next step


def _copy_masters_to_weights(engine: Any) -> None:
    """Round the masters to the weights that the passes read, as a step of the optimiser does at its end."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.update_lp_params()
        return
    optimizer._partition_all_parameters()
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
