"""apex is built from source for a GPU and is not here: its function is replaced by torch's of the same mathematics."""

import sys
from types import ModuleType

import pytest
import torch

from tdro_hpc.encoders.norms import FusedRMSNorm, fuse_norms
from tdro_hpc.encoders.tiny import tiny_backbone

CUDA = torch.device("cuda")


def kernel(hidden, weight, shape, eps):
    assert not torch.is_autocast_enabled("cpu")
    return torch.nn.functional.rms_norm(hidden.float(), shape, weight.float(), eps).to(weight.dtype)


@pytest.fixture
def apex(monkeypatch):
    modules = {name: ModuleType(name) for name in ("apex", "apex.normalization", "apex.normalization.fused_layer_norm")}
    modules["apex.normalization.fused_layer_norm"].mixed_dtype_fused_rms_norm_affine = kernel
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "mistral", "llama"])
def test_every_norm_of_a_decoder_is_fused_and_nothing_changes(architecture, apex, capsys):
    plain, fused = tiny_backbone(architecture), tiny_backbone(architecture)
    norms = [name for name, _ in plain.named_parameters() if "norm" in name]
    assert fuse_norms(fused, CUDA) == len(norms) > 8
    assert capsys.readouterr().out == f"norms: {len(norms)} by the fused kernel of apex\n"
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in plain.named_parameters()]
    ids = torch.arange(4, 24).view(2, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        vectors = [model(input_ids=ids).last_hidden_state for model in (plain, fused)]
    torch.testing.assert_close(*vectors, rtol=1e-5, atol=1e-5)
    for vector in vectors:
        vector.square().sum().backward()
    for (name, found), wanted in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_types_under_autocast_are_those_of_the_norm_it_replaces(apex):
    norm = tiny_backbone("qwen2").norm
    hidden = torch.randn(3, 128).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = FusedRMSNorm(norm, kernel)(hidden), norm(hidden)
    assert found.dtype == wanted.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)  # the norm rounds to bfloat16 on the way


def test_without_a_gpu_or_with_another_package_of_that_name_the_norms_stay(apex, monkeypatch):
    assert fuse_norms(tiny_backbone("qwen2"), torch.device("cpu")) == 0
    monkeypatch.delitem(sys.modules, "apex.normalization.fused_layer_norm")
    assert fuse_norms(tiny_backbone("qwen2"), CUDA) == 0
