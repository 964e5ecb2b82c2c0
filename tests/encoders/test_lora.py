import json

import pytest
import torch
from torch.testing import assert_close

from tdro_hpc.config.schema import LoraConfig, ModelConfig
from tdro_hpc.encoders.backbone import load_encoder
from tdro_hpc.encoders.lora import linear_names, parameter_counts
from tdro_hpc.encoders.tiny import ARCHITECTURES


def encoder_of(name: str, *, seed: int = 1, **lora):
    config = ModelConfig(name=name, autocast="float32", pooling="mean", lora=LoraConfig(**lora))
    return load_encoder(config, device="cpu", seed=seed)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_linear_layer_and_nothing_else_gets_an_adapter(architecture):
    plain = encoder_of(f"tiny:{architecture}", enabled=False)
    linear = [module for module in plain.backbone.modules() if isinstance(module, torch.nn.Linear)]
    rank = 4
    expected = sum(rank * (layer.in_features + layer.out_features) for layer in linear)
    encoder = encoder_of(f"tiny:{architecture}", rank=rank)
    total, trainable = parameter_counts(encoder)
    assert trainable == expected and total == expected + parameter_counts(plain)[0]
    assert all("lora_" in name for name, parameter in encoder.named_parameters() if parameter.requires_grad)
    assert parameter_counts(plain)[0] == parameter_counts(plain)[1]


def test_qwen_adapter_has_the_size_of_the_released_ones():
    # rank 8 on the 7 projections of Qwen1.5-0.5B: 24 layers of 4 x (8 x 2048) + 3 x 8 x (1024 + 2816)
    assert 24 * (4 * 8 * 2048 + 3 * 8 * (1024 + 2816)) == 3_784_704  # x 2 bytes = 7.57 MB, as released
    names = linear_names(encoder_of("tiny:qwen2", enabled=False).backbone)
    assert names == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_new_adapter_leaves_vectors_unchanged_and_then_learns(sequences, padded):
    tokens = padded(sequences, "right")
    plain, encoder = encoder_of("tiny:llama", enabled=False), encoder_of("tiny:llama", dropout=0.0)
    assert_close(encoder(tokens), plain(tokens), rtol=0, atol=0)
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=0.01)
    encoder.train()
    for _ in range(2):  # the first step moves only B, the second A too
        optimizer.zero_grad()
        encoder(tokens)[:, 0].sum().backward()
        optimizer.step()
    gradients = [p.grad for p in encoder.parameters() if p.requires_grad]
    assert all(gradient is not None and gradient.norm() > 0 for gradient in gradients)
    assert encoder(tokens)[:, 0].sum() < plain(tokens)[:, 0].sum()


def test_seed_decides_the_adapter():
    first, again, other = (encoder_of("tiny:qwen2", seed=seed) for seed in (1, 1, 2))
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


def test_adapter_is_float32_on_16_bit_weights():
    config = ModelConfig(name="tiny:qwen2", weights_dtype="bfloat16", autocast="bfloat16")
    encoder = load_encoder(config, device="cpu", seed=1)
    types = {parameter.requires_grad: parameter.dtype for parameter in encoder.parameters()}
    assert types == {True: torch.float32, False: torch.bfloat16}


def test_named_targets_are_used_and_unknown_ones_are_listed():
    encoder = encoder_of("tiny:qwen2", targets="q_proj, v_proj")
    targets = {name.split(".")[-4] for name, p in encoder.named_parameters() if p.requires_grad}
    assert targets == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match="no linear layer query.*It has q_proj, k_proj"):
        encoder_of("tiny:qwen2", targets="q_proj,query")


def test_adapter_config_names_the_backbone(tmp_path):
    from tdro_hpc.encoders.lora import save_lora

    save_lora(encoder_of("tiny:qwen2", rank=4, alpha=16).backbone, str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["r"], saved["lora_alpha"]) == ("tiny:qwen2", 4, 16)
