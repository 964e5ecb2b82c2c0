import dataclasses
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModel

from tdro_hpc.config.schema import LoraConfig, ModelConfig
from tdro_hpc.encoders.backbone import Encoder, load_encoder
from tdro_hpc.encoders.export import open_base, open_saved, write_merged, write_model
from tdro_hpc.encoders.saving import save_encoder, trainable_state
from tdro_hpc.encoders.tiny import build_tiny
from tdro_hpc.encoders.tokenization import load_tokenizer

TEXTS = ["one", "another text, a longer one", ""]


def trained(config: ModelConfig) -> Encoder:
    """Encoder whose trainable parameters are no longer those it was loaded with."""
    encoder = load_encoder(config, device="cpu", seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in trainable_state(encoder).values():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return encoder


def config_of(name: str, *, lora: bool, **settings) -> ModelConfig:
    values = {"autocast": "float32", "append_eos": name != "tiny:bert", "pooling": "mean", "similarity": "dot"}
    return ModelConfig(name=name, lora=LoraConfig(enabled=lora, rank=4, alpha=8.0), **(values | settings))


def vectors(encoder: Encoder) -> torch.Tensor:
    with torch.no_grad():
        return encoder(load_tokenizer(encoder.config).encode(TEXTS, max_tokens=32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("name", ["tiny:qwen2", "tiny:qwen3", "tiny:bert"])
def test_written_model_equals_the_saved_encoder(name, lora, dtype, tmp_path):
    config = config_of(name, lora=lora, weights_dtype=dtype, bidirectional=name == "tiny:qwen2")
    encoder, tokenizer = trained(config), load_tokenizer(config)
    save_encoder(encoder, tokenizer, tmp_path / "saved")
    # A checkpoint has float32 masters whatever the type of the weights.
    masters = {name: value.float() for name, value in encoder.state_dict().items()}
    write_model(config, tokenizer, masters, tmp_path / "written")
    names = {file.name for file in (tmp_path / "saved").iterdir()}
    assert {file.name for file in (tmp_path / "written").iterdir()} == names
    for file in sorted(name for name in names if name.endswith(".json")):
        assert (tmp_path / "written" / file).read_bytes() == (tmp_path / "saved" / file).read_bytes(), file
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    expected, found = (load_file(tmp_path / folder / weights) for folder in ("saved", "written"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    restored = [load_encoder(config, folder=tmp_path / name, device="cpu", seed=99) for name in ("saved", "written")]
    assert torch.equal(vectors(restored[0]), vectors(restored[1]))


def test_weights_that_do_not_fit_the_model_are_named(tmp_path):
    config = config_of("tiny:qwen2", lora=True)
    tokenizer, tensors = load_tokenizer(config), dict(trained(config).state_dict())
    name = "backbone.base_model.model.layers.0.mlp.up_proj.lora_A.default.weight"
    other = {**tensors, name: tensors[name][:2]}
    with pytest.raises(
        ValueError, match=r"up_proj.lora_A.default.weight is stored with the shape \[2, 128\].*\[4, 128\]"
    ):
        write_model(config, tokenizer, other, tmp_path)
    with pytest.raises(ValueError, match=r"1 of 56 trained tensors .* missing, such as .*up_proj.lora_A.*config.yaml"):
        write_model(config, tokenizer, {key: value for key, value in tensors.items() if key != name}, tmp_path)
    plain = config_of("tiny:qwen2", lora=False)
    with pytest.raises(ValueError, match="trained tensors of 'tiny:qwen2' are missing"):
        write_model(plain, tokenizer, tensors, tmp_path)
    whole = dict(trained(plain).state_dict())
    whole["backbone.norm.weight"] = torch.zeros(5)
    with pytest.raises(ValueError, match=r"norm.weight is stored with the shape \[5\]; in the model it has \[128\]"):
        write_model(plain, tokenizer, whole, tmp_path)


@pytest.mark.parametrize("name", ["tiny:qwen2", "tiny:qwen3", "tiny:llama", "tiny:mistral", "tiny:bert"])
def test_merged_adapter_gives_the_vectors_of_the_wrapped_model(name, tmp_path):
    config = config_of(name, lora=True)
    encoder = trained(config)
    save_encoder(encoder, load_tokenizer(config), tmp_path / "saved")
    write_merged(config, open_saved(tmp_path / "saved"), tmp_path / "merged", dtype=torch.float32)
    plain = dataclasses.replace(config, name="tiny:qwen2", pooling="cls", lora=LoraConfig(enabled=False))
    merged = load_encoder(plain, folder=tmp_path / "merged", device="cpu", seed=99)
    assert merged.config.pooling == "mean" and not merged.config.lora.enabled
    tokens = load_tokenizer(config).encode(TEXTS, max_tokens=32)
    with torch.no_grad():
        assert_close(merged(tokens), encoder(tokens), rtol=1e-5, atol=1e-5)  # float32, sums in another order


def test_merge_equals_that_of_peft(tmp_path):
    config = config_of("tiny:llama", lora=True)
    encoder = trained(config)
    write_merged(config, dict(encoder.state_dict()), tmp_path, dtype=torch.float32, shard_bytes=700_000)
    by_peft = encoder.backbone.merge_and_unload().state_dict()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    written = {name: load_file(tmp_path / file)[name] for name, file in index["weight_map"].items()}
    assert written.keys() == by_peft.keys()
    for name, value in by_peft.items():
        assert_close(written[name], value, rtol=1e-6, atol=1e-6)  # one rounding of the update


def test_an_adapter_on_16_bit_weights_is_added_to_the_cast_weights(tmp_path):
    config = config_of("tiny:qwen2", lora=True, weights_dtype="bfloat16")
    encoder = trained(config)
    write_merged(config, dict(encoder.state_dict()), tmp_path, dtype=torch.float32)
    name = "layers.1.mlp.up_proj"
    found = load_file(tmp_path / "model.safetensors")[f"{name}.weight"]
    layer = encoder.backbone.base_model.model.get_submodule(name)
    update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 2.0
    assert layer.base_layer.weight.dtype == torch.bfloat16
    assert_close(found, layer.base_layer.weight.float() + update.detach(), rtol=1e-6, atol=1e-6)


def test_shards_are_no_larger_than_asked_and_a_larger_tensor_is_alone(tmp_path):
    config = config_of("tiny:qwen2", lora=False)
    encoder = trained(config)
    seen = []
    limit = 200_000  # the largest matrices of the tiny model have 262,144 bytes
    write_merged(
        config,
        dict(encoder.state_dict()),
        tmp_path,
        dtype=torch.float32,
        shard_bytes=limit,
        before_each=lambda: seen.append(1),
    )
    files = sorted(tmp_path.glob("model-*.safetensors"))
    contents = [load_file(file) for file in files]
    assert len(seen) == sum(map(len, contents)) == len(encoder.backbone.state_dict())
    for tensors in contents:
        size = sum(value.nbytes for value in tensors.values())
        assert size <= limit or len(tensors) == 1
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for each in contents for value in each.values())
    model = AutoModel.from_pretrained(tmp_path)
    for name, value in encoder.backbone.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_written_adapter_loads_with_peft(tmp_path):
    config = config_of("tiny:llama", lora=True)
    base = build_tiny("llama", tmp_path / "base")
    config = dataclasses.replace(config, name=str(base))
    encoder = trained(config)
    write_model(config, load_tokenizer(config), dict(encoder.state_dict()), tmp_path / "adapter")
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), str(tmp_path / "adapter"))
    ids = torch.tensor([[70, 71, 72]])
    with torch.no_grad():
        expected = encoder.backbone(input_ids=ids).last_hidden_state
        assert_close(model(input_ids=ids).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


def with_other_names(folder: Path, rename) -> None:
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    save_file({rename(name): value for name, value in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("name", ["qwen2", "bert"])
def test_base_is_found_under_the_names_of_a_whole_language_model(name, tmp_path):
    folder = build_tiny(name, tmp_path / "base")
    config = config_of(str(folder), lora=True)
    plain = {key: value.clone() for key, value in open_base(config).items()}
    prefix = {"qwen2": "model.", "bert": "bert."}[name]

    def rename(key: str) -> str:
        old = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        return prefix + old

    with_other_names(folder, rename)
    found = open_base(config)
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[key], value) for key, value in plain.items())
    with_other_names(folder, lambda key: key.replace("layers.0", "layers.9").replace("layer.0", "layer.9"))
    with pytest.raises(ValueError, match=r"lack \d+ of \d+ parameters.*Set model.name"):
        open_base(config)


def test_pickled_weights_are_refused_and_never_opened(tmp_path):
    folder = build_tiny("qwen2", tmp_path / "base")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    with pytest.raises(ValueError, match=r"only as pytorch_model.bin, which is a pickle.*Set model.name"):
        open_base(config_of(str(folder), lora=True))
    assert not (tmp_path / "ran").exists()


def test_damaged_file_is_named(tmp_path):
    folder = build_tiny("qwen2", tmp_path / "base")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read .*again"):
        open_base(config_of(str(folder), lora=True))


def test_model_that_is_nowhere_says_what_to_type(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    config = config_of("nobody-x/none-y", lora=True)
    with pytest.raises(ValueError, match=r"(?s)'nobody-x/none-y', which is not on this machine.*Type `hf download"):
        open_base(config)


def test_model_with_code_of_its_own_is_refused(tmp_path):
    folder = build_tiny("qwen2", tmp_path / "base")
    values = json.loads((folder / "config.json").read_text()) | {"model_type": "mine"}
    (folder / "config.json").write_text(json.dumps(values | {"auto_map": {"AutoConfig": "mine.Config"}}))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match=r"(?s)config.json describes no model.*cannot be exported"):
        open_base(config_of(str(folder), lora=True))
    assert not (tmp_path / "ran").exists()
