"""A model's name in, the sizes of its backbone out, without torch and without a weight: from config.json, or published.

The models of configs/model are known before they are downloaded; for another one `hf download <id> config.json` is
enough.
"""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdro_hpc.config.schema import ModelConfig

# Families whose layers can be spread over ranks.
SPREADABLE = ("qwen2", "qwen3", "mistral", "llama")
ENCODERS = ("bert", "roberta", "xlm-roberta")


def _decoder(kind: str, layers: int, width: int, inner: int, heads: tuple[int, int], vocabulary: int) -> dict[str, Any]:
    """The part of a config.json that is read here; heads = (of queries, of keys and values)."""
    return {
        "model_type": kind,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocabulary,
    }


# The hub's config.json of the models in configs/model, and those of the tiny backbones (encoders/tiny.py).
_PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen1.5-0.5B": _decoder("qwen2", 24, 1024, 2816, (16, 16), 151936),
    "Qwen/Qwen1.5-1.8B": _decoder("qwen2", 24, 2048, 5504, (16, 16), 151936),
    "Qwen/Qwen1.5-4B": _decoder("qwen2", 40, 2560, 6912, (20, 20), 151936),
    "Qwen/Qwen1.5-7B": _decoder("qwen2", 32, 4096, 11008, (32, 32), 151936),
    "Qwen/Qwen2.5-0.5B": _decoder("qwen2", 24, 896, 4864, (14, 2), 151936),
    "Qwen/Qwen3-0.6B-Base": _decoder("qwen3", 28, 1024, 3072, (16, 8), 151936) | {"head_dim": 128},
    "mistralai/Mistral-7B-v0.1": _decoder("mistral", 32, 4096, 14336, (32, 8), 32000),
    "meta-llama/Meta-Llama-3-8B": _decoder("llama", 32, 4096, 14336, (32, 8), 128256),
    "tiny:qwen2": _decoder("qwen2", 4, 128, 512, (4, 2), 260),
    "tiny:qwen3": _decoder("qwen3", 4, 128, 512, (4, 2), 260) | {"head_dim": 32},
    "tiny:mistral": _decoder("mistral", 4, 128, 512, (4, 2), 260) | {"head_dim": 32},
    "tiny:llama": _decoder("llama", 4, 128, 512, (4, 2), 260) | {"head_dim": 32},
    "tiny:bert": _decoder("bert", 4, 128, 512, (4, 4), 260) | {"max_position_embeddings": 2048, "type_vocab_size": 2},
}


@dataclass(frozen=True)
class ModelFigures:
    """Sizes of a backbone, in the words of its layers."""

    kind: str  # model_type of config.json
    layers: int
    width: int  # of the hidden states
    inner: int  # of the MLP
    heads: int  # of queries
    key_value_heads: int
    head_width: int
    vocabulary: int
    attention_dropout: float = 0.0

    @property
    def is_encoder(self) -> bool:
        """Whether it is of BERT's kind: no gated MLP, layer norms with bias."""
        return self.kind in ENCODERS

    @property
    def query_width(self) -> int:
        """Width of all queries of a token."""
        return self.heads * self.head_width

    @property
    def key_width(self) -> int:
        """Width of all keys of a token; as many are values."""
        return self.key_value_heads * self.head_width

    def words(self) -> str:
        """Kind and sizes, for a table."""
        heads = f"{self.heads} heads"
        if self.key_value_heads != self.heads:
            heads += f" ({self.key_value_heads} of keys)"
        return f"{self.kind}, {self.layers} layers of width {self.width:,}, {heads}, MLP {self.inner:,}"


def figures_of(model: ModelConfig) -> ModelFigures | None:
    """Figures of a model; None where it is not known here, or its config.json speaks of none of them."""
    document = document_of(model.name, model.revision)
    try:
        return None if document is None else _figures(document)
    except (KeyError, TypeError):
        return None


def _figures(document: dict[str, Any]) -> ModelFigures:
    heads = document["num_attention_heads"]
    return ModelFigures(
        kind=document["model_type"],
        layers=document["num_hidden_layers"],
        width=document["hidden_size"],
        inner=document["intermediate_size"],
        heads=heads,
        key_value_heads=document.get("num_key_value_heads") or heads,
        head_width=document.get("head_dim") or document["hidden_size"] // heads,
        vocabulary=document["vocab_size"],
        attention_dropout=document.get("attention_dropout") or 0.0,
    )


def document_of(name: str, revision: str) -> dict[str, Any] | None:
    """config.json of a model by its hub id, folder or package, or what is published of it; None where neither is."""
    folder = folder_of(name, revision)
    if folder is None:
        return _PUBLISHED.get(name)
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def folder_of(name: str, revision: str) -> Path | None:
    """Folder on this machine that holds config.json, whatever kind of name it is."""
    kind, _, rest = name.partition(":")
    if kind == "package":
        module = rest.replace("-", "_")
        spec = importlib.util.find_spec(module) if module.isidentifier() else None
        roots = list(spec.submodule_search_locations or []) if spec else []
        found = [file.parent for root in roots for file in Path(root).rglob("config.json")]
        return min(found, key=lambda folder: len(folder.parts), default=None)
    if kind == "tiny":
        return None
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    return _downloaded(name, revision)


def _downloaded(name: str, revision: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(name, "config.json", revision=revision or None)
    except HFValidationError:  # a path that does not exist: the encoder room says so when it is loaded
        return None
    return Path(file).parent if isinstance(file, str) else None
