"""Which AdamW steps the parameters, and its state by parameter whoever counts the steps."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tdro_hpc.config.schema import TrainingConfig
from tdro_hpc.parallel import optimizer as module
from tdro_hpc.parallel.optimizer import adam_state, build_optimizer, describe_optimizer, set_adam_state
from tests.reference.toy import ToyEncoder

TRAINING = TrainingConfig(steps=20, warmup_steps=0, learning_rate=0.01)


class CountingAdam(torch.optim.Optimizer):
    """Keeps its state as apex's FusedAdam does: moments by parameter, the number of steps by group."""

    def __init__(self, groups, *, lr, betas, eps, adam_w_mode):
        assert adam_w_mode
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            first, second = group["betas"]
            for parameter in group["params"]:
                fields = self.state[parameter]
                if not fields:
                    fields |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                fields["exp_avg"].lerp_(parameter.grad, 1 - first)
                fields["exp_avg_sq"].lerp_(parameter.grad.square(), 1 - second)
                mean = fields["exp_avg"] / (1 - first ** group["step"])
                scale = (fields["exp_avg_sq"] / (1 - second ** group["step"])).sqrt() + group["eps"]
                parameter -= group["lr"] * (mean / scale + group["weight_decay"] * parameter)


CountingAdam.__module__ = "apex.optimizers.fused_adam"


def install_apex(patch, contents):
    patch.setitem(sys.modules, "apex", ModuleType("apex"))
    patch.setitem(sys.modules, "apex.optimizers", SimpleNamespace(**contents))


def model_and_optimizer(patch, name):
    if name == "apex":
        install_apex(patch, {"FusedAdam": CountingAdam})
        patch.setattr(module, "on_gpu", lambda parameters: True)
    model = torch.nn.Linear(3, 2)
    return model, build_optimizer(model, TRAINING)


def take_steps(model, optimizer, seeds):
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize(
    ("before", "after"), [("apex", "apex"), ("torch", "torch"), ("apex", "torch"), ("torch", "apex")]
)
def test_state_goes_from_one_implementation_to_another(monkeypatch, before, after):
    with monkeypatch.context() as patch:
        model, optimizer = model_and_optimizer(patch, before)
    with monkeypatch.context() as patch:
        other, continued = model_and_optimizer(patch, after)
    assert before in describe_optimizer(optimizer)
    take_steps(model, optimizer, range(3))
    other.load_state_dict(model.state_dict())
    take_steps(other, continued, [9])  # a state to be replaced
    other.load_state_dict(model.state_dict())
    pairs = dict(zip(model.parameters(), other.parameters(), strict=True))
    set_adam_state(continued, {pairs[parameter]: fields for parameter, fields in adam_state(optimizer).items()})
    for one, two in zip(adam_state(optimizer).values(), adam_state(continued).values(), strict=True):
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
        assert one["step"] == 3 and one["exp_avg"] is not two["exp_avg"]
    take_steps(model, optimizer, [5])
    take_steps(other, continued, [5])
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)  # two implementations of the same formula


def test_parameter_that_was_never_updated_has_no_state_and_begins_anew():
    model = ToyEncoder()
    optimizer = build_optimizer(model, TRAINING)
    assert adam_state(optimizer) == {}
    model.dense.weight.grad = torch.ones_like(model.dense.weight)
    optimizer.step()
    assert list(adam_state(optimizer)) == [model.dense.weight]
    set_adam_state(optimizer, {})
    assert adam_state(optimizer) == {}


def test_apex_is_used_on_a_gpu_only_and_where_it_may(monkeypatch):
    install_apex(monkeypatch, {"FusedAdam": CountingAdam})
    assert describe_optimizer(build_optimizer(ToyEncoder(), TRAINING)) == "fused AdamW of torch"
    monkeypatch.setattr(module, "on_gpu", lambda parameters: True)
    assert describe_optimizer(build_optimizer(ToyEncoder(), TRAINING)) == "FusedAdam of apex"
    assert describe_optimizer(build_optimizer(ToyEncoder(), TRAINING, apex=False)) == "fused AdamW of torch"


def test_package_that_is_only_called_apex_is_left_alone(monkeypatch):
    install_apex(monkeypatch, {})
    monkeypatch.setattr(module, "on_gpu", lambda parameters: True)
    assert type(build_optimizer(ToyEncoder(), TRAINING)) is torch.optim.AdamW
