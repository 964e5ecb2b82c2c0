import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModel, AutoTokenizer

from tdro_hpc.config.schema import LoraConfig, ModelConfig
from tdro_hpc.encoders.backbone import Encoder, load_encoder
from tdro_hpc.encoders.saving import load_trainable_state, save_encoder, saved_model_config, trainable_state
from tdro_hpc.encoders.tokenization import load_tokenizer

TEXTS = ["one", "another text, a longer one", ""]


def trained(config: ModelConfig) -> Encoder:
    """Encoder whose trainable parameters are no longer those it was loaded with."""
    encoder = load_encoder(config, device="cpu", seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in trainable_state(encoder).values():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return encoder


def saved(config: ModelConfig, folder: Path) -> Encoder:
    encoder = trained(config)
    save_encoder(encoder, load_tokenizer(config), folder)
    return encoder


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("name", ["tiny:qwen2", "tiny:mistral", "tiny:bert"])
def test_saved_encoder_gives_the_same_bits(name, lora, tmp_path):
    shape = LoraConfig(enabled=lora, rank=4)
    config = ModelConfig(name=name, pooling="mean", similarity="dot", append_eos=name != "tiny:bert", lora=shape)
    encoder = saved(config, tmp_path)
    tokens = load_tokenizer(config).encode(TEXTS, max_tokens=32)
    restored_tokens = load_tokenizer(config, tmp_path).encode(TEXTS, max_tokens=32)
    assert torch.equal(restored_tokens.input_ids, tokens.input_ids)
    restored = load_encoder(config, folder=tmp_path, device="cpu", seed=99)
    untrained = load_encoder(config, device="cpu", seed=1)
    assert torch.equal(restored(tokens), encoder(tokens))
    assert not torch.equal(untrained(tokens), encoder(tokens))
    assert set(trainable_state(restored)) == set(trainable_state(encoder))
    assert not [file.name for file in tmp_path.rglob("*") if file.suffix in (".bin", ".pt", ".pkl", ".md")]
    weights = {file.name for file in tmp_path.glob("*.safetensors")}
    assert weights == ({"adapter_model.safetensors"} if lora else {"model.safetensors"})


def test_saved_folder_says_how_its_vectors_are_made(tmp_path):
    config = ModelConfig(
        name="tiny:qwen2", pooling="mean", padding_side="left", bidirectional=True, lora=LoraConfig(rank=4, alpha=8.0)
    )
    encoder = saved(config, tmp_path)
    manifest = json.loads((tmp_path / "encoder.json").read_text())
    assert manifest["query_format"] == "Instruct: {instruction}\nQuery: {text}"
    assert (manifest["pooling"], manifest["similarity"], manifest["append_eos"]) == ("mean", "cosine", True)
    other = ModelConfig(name="tiny:bert", pooling="cls", similarity="dot", lora=LoraConfig(enabled=False))
    found = saved_model_config(other, tmp_path)
    assert found == dataclasses.replace(config, attention=other.attention)
    restored = load_encoder(found, folder=tmp_path, device="cpu", seed=0)
    tokens = load_tokenizer(config).encode(TEXTS, max_tokens=32)
    assert torch.equal(restored(tokens), encoder(tokens))


def test_fully_trained_folder_is_an_ordinary_hugging_face_model(tmp_path):
    config = ModelConfig(name="tiny:qwen3", autocast="float32", similarity="dot", lora=LoraConfig(enabled=False))
    encoder = saved(config, tmp_path)
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)
    ids = torch.tensor([[*tokenizer("one").input_ids, tokenizer.eos_token_id]])
    expected = encoder(load_tokenizer(config).encode(["one"], max_tokens=32))
    assert_close(model(ids).last_hidden_state[:, -1], expected, rtol=1e-5, atol=1e-5)


def test_adapter_on_another_backbone_is_refused(tmp_path):
    config = ModelConfig(name="tiny:qwen2")
    saved(config, tmp_path)
    with pytest.raises(ValueError, match="trained on 'tiny:qwen2', but model.name is 'tiny:llama'.*Set model"):
        load_encoder(dataclasses.replace(config, name="tiny:llama"), folder=tmp_path, device="cpu", seed=1)


def test_folders_that_are_no_saved_encoder_say_so(tmp_path):
    with pytest.raises(ValueError, match="encoder.json is missing"):
        load_encoder(ModelConfig(name="tiny:qwen2"), folder=tmp_path, device="cpu", seed=1)
    saved(ModelConfig(name="tiny:qwen2"), tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="adapter_model.safetensors is missing"):
        load_encoder(ModelConfig(name="tiny:qwen2"), folder=tmp_path, device="cpu", seed=1)
    manifest = json.loads((tmp_path / "encoder.json").read_text())
    (tmp_path / "encoder.json").write_text(json.dumps({**manifest, "format_version": 2}))
    with pytest.raises(ValueError, match="format_version 2"):
        load_encoder(ModelConfig(name="tiny:qwen2"), folder=tmp_path, device="cpu", seed=1)


@pytest.mark.parametrize("lora", [True, False])
def test_trainable_state_carries_the_training_over(lora):
    config = ModelConfig(name="tiny:qwen2", lora=LoraConfig(enabled=lora))
    encoder, fresh = trained(config), load_encoder(config, device="cpu", seed=1)
    state = {name: tensor.clone() for name, tensor in trainable_state(encoder).items()}
    load_trainable_state(fresh, state)
    tokens = load_tokenizer(config).encode(TEXTS, max_tokens=32)
    assert torch.equal(fresh(tokens), encoder(tokens))
    assert all(parameter.requires_grad == (name in state) for name, parameter in fresh.named_parameters())


def test_state_that_does_not_fit_names_the_differences_and_changes_nothing():
    encoder = trained(ModelConfig(name="tiny:qwen2", lora=LoraConfig(rank=4)))
    before = {name: tensor.clone() for name, tensor in trainable_state(encoder).items()}
    wider = trainable_state(trained(ModelConfig(name="tiny:qwen2", lora=LoraConfig(rank=8))))
    with pytest.raises(ValueError, match=r"56 differences.*\n.*lora_A.*shape \[4, 128\] in the model, \[8, 128\]"):
        load_trainable_state(encoder, wider)
    first = next(iter(before))
    other = {name: tensor * 2 for name, tensor in before.items() if name != first} | {"stranger": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"(?s)in the model, not in the state.*stranger: in the state, not trainable"):
        load_trainable_state(encoder, other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainable_state(encoder).items())
