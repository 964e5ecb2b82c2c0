"""AdamW over the trained parameters, and its state by parameter whatever implementation steps them."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from tdro_hpc.config.schema import TrainingConfig

MOMENTS = ("exp_avg", "exp_avg_sq")  # of the gradient, in the shape of the parameter


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of those that are trained, in the order of the model."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def build_optimizer(model: nn.Module, training: TrainingConfig, *, apex: bool = True) -> torch.optim.Optimizer:
    """Fused AdamW over the trained parameters; weight decay on matrices only, not on biases and norm weights.

    apex    whether FusedAdam of NVIDIA's apex may be used: where it is installed and the parameters are on a GPU
    raises  ValueError if no parameter is trained
    """
    trained = [parameter for _, parameter in trained_parameters(model)]
    if not trained:
        raise ValueError("No parameter of the encoder is trained. Set model.lora.enabled=false to train all of them.")
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    settings: dict[str, Any] = {
        "lr": training.learning_rate,
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_epsilon,
    }
    fused_adam = _apex_fused_adam() if apex and on_gpu(trained) else None
    if fused_adam is not None:
        return fused_adam(groups, adam_w_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)


def on_gpu(parameters: list[nn.Parameter]) -> bool:
    """Whether all of them are on a GPU."""
    return all(parameter.is_cuda for parameter in parameters)


def describe_optimizer(optimizer: torch.optim.Optimizer) -> str:
    """Which implementation it is, for the log."""
    return "FusedAdam of apex" if type(optimizer).__module__.startswith("apex") else "fused AdamW of torch"


def adam_state(optimizer: torch.optim.Optimizer) -> dict[Tensor, dict[str, Tensor]]:
    """{"step" [], "exp_avg", "exp_avg_sq"} of each parameter that has been updated; the live tensors."""
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            fields = optimizer.state.get(parameter)
            if fields:
                # apex counts the steps of a group, torch those of a parameter.
                step = fields["step"] if "step" in fields else torch.tensor(float(group["step"]))
                found[parameter] = {"step": step} | {name: fields[name] for name in MOMENTS}
    return found


def set_adam_state(optimizer: torch.optim.Optimizer, state: dict[Tensor, dict[str, Tensor]]) -> None:
    """Take over what `adam_state` gives, bit for bit; parameters that are not in `state` begin anew.

    state  parameter -> {"step" [], "exp_avg", "exp_avg_sq"}, on any device, copied
    """
    counts_groups = type(optimizer).__module__.startswith("apex")
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group.pop("step", None)
        for parameter in group["params"]:
            fields = state.get(parameter)
            if fields is None:
                continue
            kept = {name: torch.empty_like(parameter).copy_(fields[name]) for name in MOMENTS}
            if counts_groups:
                group["step"] = max(group.get("step", 0), int(fields["step"]))
            else:
                kept["step"] = fields["step"].to(parameter.device, torch.float32, copy=True)
            optimizer.state[parameter] = kept


def _apex_fused_adam() -> Any:
    """FusedAdam of NVIDIA's apex, None where it is not installed: a package of that name with no such class exists."""
    try:
        return import_module("apex.optimizers").FusedAdam
    except Exception:  # built for another torch, or for none: any error may come out of its import
        return None
