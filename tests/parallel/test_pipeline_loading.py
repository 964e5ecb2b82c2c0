"""Parts of encoders one after the other in one process, against the encoder of load_encoder; what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from tdro_hpc.config.schema import LoraConfig, ModelConfig
from tdro_hpc.encoders.backbone import load_encoder, save_encoder
from tdro_hpc.encoders.tiny import tiny_backbone, tiny_config
from tdro_hpc.encoders.tokenization import load_tokenizer
from tdro_hpc.parallel.pipeline.loading import layers_of_part, load_part, require_no_dropout, require_spreadable
from tdro_hpc.parallel.pipeline.placement import Placement
from tdro_hpc.parallel.pipeline.weights import FolderTensors, fill
from tdro_hpc.parallel.process import Process
from tdro_hpc.parallel.slices import Slice, WholeTensors
from tests.reference.toy import toy_tokens

NO_LORA = LoraConfig(enabled=False)
MODEL = ModelConfig(name="tiny:qwen2", autocast="float32", gradient_checkpointing=False, lora=NO_LORA)


def parts_of(config, num_parts, folder=None):
    device = torch.device("cpu")
    places = [Process(0, 1, 0, device, pipeline_rank=rank, pipeline_size=num_parts) for rank in range(num_parts)]
    return [load_part(config, process, folder=folder, seed=3) for process in places]


def through(parts, tokens):
    hidden = torch.empty(0)
    for part in parts:
        hidden = part(hidden, part.inputs(tokens))
    return hidden


@pytest.mark.parametrize("attention", ["sdpa", "padding_free"])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "mistral", "llama"])
def test_parts_in_a_row_are_the_encoder(architecture, attention):
    tokens = toy_tokens(1, 4, width=80, side="left")
    config = replace(MODEL, name=f"tiny:{architecture}", attention=attention)
    with torch.no_grad():
        assert torch.equal(through(parts_of(config, 3), tokens), load_encoder(config, device="cpu", seed=3)(tokens))


def test_parts_have_the_names_of_the_trained_parameters_of_the_encoder_and_its_first_factors():
    for lora in (NO_LORA, LoraConfig(rank=2, dropout=0.0), LoraConfig(rank=2, dropout=0.0, targets="v_proj, up_proj")):
        config = replace(MODEL, lora=lora)
        wanted = {n: p for n, p in load_encoder(config, device="cpu", seed=3).named_parameters() if p.requires_grad}
        found = {}
        for part in parts_of(config, 2):
            places = part.placements()
            found |= {places[name].name: p for name, p in part.named_parameters() if p.requires_grad}
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_weights_of_a_language_model_in_several_files_are_read_without_its_head(tmp_path):
    whole = AutoModelForCausalLM.from_config(tiny_config("qwen2"))
    whole.save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokens, config = toy_tokens(1, 4), replace(MODEL, name=str(tmp_path))
    with torch.no_grad():
        assert torch.equal(through(parts_of(config, 2), tokens), load_encoder(config, device="cpu", seed=3)(tokens))


def test_every_layer_keeps_its_own_window_in_whatever_part_it_is(tmp_path):
    shape = tiny_config("qwen2")
    shape.layer_types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    shape.use_sliding_window, shape.sliding_window = True, 16
    AutoModel.from_config(shape).save_pretrained(tmp_path)
    tokens, config = toy_tokens(1, 4, width=80), replace(MODEL, name=str(tmp_path))
    with torch.no_grad():
        assert torch.equal(through(parts_of(config, 3), tokens), load_encoder(config, device="cpu", seed=3)(tokens))
    assert load_encoder(config, device="cpu", seed=3).backbone.layers[1].self_attn.sliding_window == 16


def test_only_the_rows_that_are_asked_for_come_from_a_folder(tmp_path):
    backbone = tiny_backbone("llama")
    backbone.save_pretrained(tmp_path)
    tensors, name = FolderTensors(tmp_path), "layers.1.mlp.down_proj.weight"
    wanted = backbone.get_parameter(name)
    assert tensors.shape(name) == (128, 512) and name in tensors and name in tensors.keys()
    assert torch.equal(tensors[name], wanted)
    assert torch.equal(tensors.part(name, 1, 128, 256), wanted[:, 128:256])
    assert torch.equal(tensors.part(name, 0, 5, 7), wanted[5:7])
    with pytest.raises(ValueError, match=r"lack layers.9.norm"):
        tensors.shape("layers.9.norm")


def test_folders_that_hold_no_model_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no \*.safetensors files"):
        FolderTensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(ValueError, match="no weights file .*gone.safetensors"):
        FolderTensors(tmp_path)
    with pytest.raises(ValueError, match="no LoRA adapter"):
        FolderTensors(tmp_path, adapter=True)


def test_weights_that_are_missing_or_of_another_shape_are_named():
    source, place = WholeTensors({"a": torch.zeros(4, 6)}), Placement("b", "b", (4, 6))
    with pytest.raises(ValueError, match="lack b"):
        fill(torch.zeros(4, 6), source, "b", place)
    with pytest.raises(ValueError, match=r"a is of shape \[4, 6\] in the weights, but config.json makes it \[4, 8\]"):
        fill(torch.zeros(4, 8), source, "a", replace(place, shape=(4, 8)))


def test_a_split_parameter_is_cut_and_labelled_as_its_rows():
    place, whole = Placement("a", "a", (2, 6), dim=1, start=2, size=2), torch.arange(12).view(2, 6)
    assert place.cut(whole).tolist() == [[2, 3], [8, 9]]
    assert torch.equal(place.part_of(WholeTensors({"a": whole}), "a"), place.cut(whole))
    label = place.labelled(place.cut(whole))
    assert isinstance(label, Slice) and (label.shape, label.dim, label.start, label.stop) == ((2, 6), 1, 2, 4)


def test_layers_are_shared_evenly_and_the_last_parts_take_what_is_over():
    assert layers_of_part(28, 4) == [0, 7, 14, 21, 28]
    assert layers_of_part(30, 4) == [0, 7, 14, 22, 30]
    assert layers_of_part(4, 4) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("architecture", "sizes", "words"),
    [
        ("bert", (2, 1), "a bert: parallel.pp and parallel.tp are for qwen2, qwen3, mistral, llama"),
        ("qwen2", (5, 1), "has 4 layers. Set parallel.pp to at most 4"),
        ("qwen2", (1, 4), r"has 2 key-value heads.* Set parallel.tp to one of 1, 2\."),
        ("qwen2", (1, 3), r"has 4 attention heads.* Set parallel.tp to one of 1, 2\."),
    ],
)
def test_what_cannot_be_spread_is_refused_in_words(architecture, sizes, words):
    config = replace(MODEL, name=f"tiny:{architecture}")
    with pytest.raises(ValueError, match=words):
        require_spreadable(config, tiny_config(architecture), pipeline_size=sizes[0], tensor_size=sizes[1])


def test_a_model_with_code_of_its_own_is_refused():
    shape = tiny_config("qwen2")
    shape.auto_map = {"AutoModel": "modeling_own.OwnModel"}
    require_spreadable(MODEL, shape, pipeline_size=2, tensor_size=1)
    with pytest.raises(ValueError, match=r"code of its own.* model.trust_remote_code=false"):
        require_spreadable(replace(MODEL, trust_remote_code=True), shape, pipeline_size=2, tensor_size=1)


def test_dropout_is_refused_in_training():
    (part,) = parts_of(replace(MODEL, lora=LoraConfig(dropout=0.1)), 1)
    with pytest.raises(ValueError, match=r"model.lora.dropout is 0.1.* Set it to 0"):
        require_no_dropout(part)
    (part,) = parts_of(MODEL, 1)
    require_no_dropout(part)
    part.backbone.config.attention_dropout = 0.2
    with pytest.raises(ValueError, match=r"attention_dropout in the model's config.json is 0.2"):
        require_no_dropout(part)


def test_unknown_targets_are_refused():
    config = replace(MODEL, lora=LoraConfig(dropout=0.0, targets="wrong_proj"))
    with pytest.raises(ValueError, match="no linear layer wrong_proj. It has q_proj, k_proj"):
        parts_of(config, 2)


def test_adapter_of_another_model_is_refused(tmp_path):
    config = replace(MODEL, lora=LoraConfig(rank=2))
    save_encoder(load_encoder(config, device="cpu", seed=3), load_tokenizer(config), tmp_path)
    tokens = toy_tokens(1, 4)
    with torch.no_grad():
        assert torch.equal(
            through(parts_of(MODEL, 2, tmp_path), tokens), load_encoder(config, device="cpu", seed=3)(tokens)
        )
    with pytest.raises(ValueError, match="was trained on 'tiny:qwen2', but model.name is 'tiny:llama'"):
        parts_of(replace(MODEL, name="tiny:llama"), 2, tmp_path)
