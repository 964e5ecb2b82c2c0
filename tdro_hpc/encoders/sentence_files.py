"""A written model in, the files beside it out that let sentence-transformers give the same vectors.

modules.json  sentence_bert_config.json  config_sentence_transformers.json  1_Pooling/  2_Normalize/
tokenizer.json, which appends the end token itself: elsewhere TextTokenizer does
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from tdro_hpc.config.schema import ModelConfig
from tdro_hpc.data.tokens import with_instruction
from tdro_hpc.encoders.skeleton import has_pooler
from tdro_hpc.encoders.tokenization import TextTokenizer

_POOLING = {"last": "pooling_mode_lasttoken", "mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}
_MODULES = "sentence_transformers.models."  # the names that every release reads, new ones too
# Left in the settings by whatever the tokenizer did last, or on the way to it.
_OF_THE_PROCESS = ("max_length", "stride", "truncation_strategy", "is_local", "local_files_only")
_OF_A_FRAME = ("add_bos_token", "add_eos_token")
# What a tokenizer has to treat as TextTokenizer does. The last is cut at any usual limit.
_SAMPLES = (
    "",
    "a",
    "Two words",
    " blanks  around ",
    "line\nbreak\tand tab",
    "Zo\u00eb, \u5927\u5b66 \U0001f600",
    "end " * 9000,
)


def write_sentence_files(
    config: ModelConfig, folder: Path, *, width: int, max_tokens: int, prompts: Mapping[str, str]
) -> None:
    """Write what sentence-transformers reads beside a Hugging Face model.

    width       numbers of a vector
    max_tokens  a longer text is cut, special tokens included
    prompts     name -> text put before a text; `query` and `document` are what encode_query and encode_document use
    """
    modules = ["Transformer", "Pooling"] + (["Normalize"] if config.similarity == "cosine" else [])
    places = [""] + [f"{number}_{name}" for number, name in enumerate(modules) if number]
    for place in places[1:]:
        (folder / place).mkdir(exist_ok=True)
    listed = [
        {"idx": number, "name": str(number), "path": place, "type": _MODULES + name}
        for number, (name, place) in enumerate(zip(modules, places, strict=True))
    ]
    pooling = {"word_embedding_dimension": width, **{key: key == _POOLING[config.pooling] for key in _POOLING.values()}}
    transformer: dict[str, Any] = {"max_seq_length": max_tokens, "do_lower_case": False}
    if has_pooler(config):
        transformer["model_args"] = {"add_pooling_layer": False}  # it would be made at random, with a warning
    _write(folder / "modules.json", listed)
    _write(folder / "sentence_bert_config.json", transformer)
    _write(folder / "1_Pooling" / "config.json", {**pooling, "include_prompt": True})
    _write(
        folder / "config_sentence_transformers.json",
        {"prompts": dict(prompts), "default_prompt_name": None, "similarity_fn_name": config.similarity},
    )


def prompts_of(instruction: str, tasks: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Texts to put before a text, by name: query, document, and each task's instructions (<task>, <task>-2 ...).

    instruction  before queries of no task in particular; empty = nothing
    tasks        name -> instructions, one of which was drawn each time in training
    """
    prompts = {"query": with_instruction("", instruction), "document": ""}
    for name, instructions in tasks.items():
        for number, text in enumerate(instructions, start=1):
            prompts[name if number == 1 else f"{name}-{number}"] = with_instruction("", text)
    return prompts


def write_tokenizer(tokenizer: TextTokenizer, folder: Path) -> None:
    """Write a tokenizer that by itself gives the tokens that `tokenizer` gives.

    raises  ValueError  where its end token cannot be put into its file, or another reader would get other tokens
    """
    tokenizer.save(folder)
    if tokenizer.append_eos:
        _require_file(tokenizer, folder)
    if (folder / "tokenizer.json").is_file():
        _adapt_file(tokenizer, folder / "tokenizer.json")
    _adapt_settings(tokenizer, folder)
    _require_same(tokenizer, folder)


def _require_file(tokenizer: TextTokenizer, folder: Path) -> None:
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"The tokenizer of this model ({type(tokenizer.hf_tokenizer).__name__}) has no tokenizer.json, so the end "
            "token of model.append_eos cannot be written into it. Use out/model of the stage with this project."
        )


def _adapt_file(tokenizer: TextTokenizer, path: Path) -> None:
    """Change tokenizer.json so that it cuts and pads nothing by itself, and appends the end token where we do."""
    written = Tokenizer.from_file(str(path))
    written.no_truncation()
    written.no_padding()
    framed = written.encode("").ids
    if tokenizer.append_eos and framed[-1:] != [tokenizer.eos_id]:
        before = [str(written.id_to_token(number)) for number in framed]
        end = tokenizer.hf_tokenizer.convert_ids_to_tokens(tokenizer.eos_id)
        single = " ".join([*before, "$A", end])
        special = dict([*zip(before, framed, strict=True), (end, tokenizer.eos_id)])
        written.post_processor = processors.TemplateProcessing(
            single=single, pair=f"{single} $B:1 {end}:1", special_tokens=list(special.items())
        )
    written.save(str(path))


def _adapt_settings(tokenizer: TextTokenizer, folder: Path) -> None:
    """Change tokenizer_config.json so that tokenizer.json is taken as it is, and texts are padded as they may be."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    left_out: tuple[str, ...] = _OF_THE_PROCESS
    if (folder / "tokenizer.json").is_file():
        # A model's own class would build the frame of special tokens anew. This one has its name in every release.
        left_out += _OF_A_FRAME
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    # Positions are then counted from the text's first token whoever counts them; vectors do not depend on the side.
    settings["padding_side"], settings["truncation_side"] = "right", "right"
    if tokenizer.hf_tokenizer.pad_token is None:
        settings["pad_token"] = tokenizer.hf_tokenizer.convert_ids_to_tokens(tokenizer.pad_id)
    _write(path, {key: settings[key] for key in sorted(settings.keys() - set(left_out))})


def _require_same(tokenizer: TextTokenizer, folder: Path) -> None:
    """Nothing, or a ValueError where the written tokenizer gives other tokens than ours."""
    from transformers import AutoTokenizer

    written = AutoTokenizer.from_pretrained(str(folder))
    for text in _SAMPLES:
        for limit in (16, 512):
            found = written(text, truncation=True, max_length=limit)["input_ids"]
            ours = tokenizer.encode([text], max_tokens=limit)
            expected = ours.input_ids[0][ours.attention_mask[0].bool()].tolist()
            # An empty text without any special token has no vector in sentence-transformers; ours is of the padding.
            if found != expected and (found or text):
                shown = text if len(text) < 40 else f"{text[:40]}..."
                raise ValueError(
                    f"The tokenizer cannot be exported: of {shown!r} it makes {found[-8:]} at its end, and in training "
                    f"{expected[-8:]}. Use out/model of the stage with this project, or train with "
                    "model.append_eos=false where the tokenizer frames texts itself."
                )


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
