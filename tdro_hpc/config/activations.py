"""Sizes of a layer in, bytes that a pass keeps for its backward out. Pure arithmetic.

It counts what torch's autograd saves for the layers of transformers: `benchmarks/memory_estimate.py` compares the sums
with what is allocated. Only decoders are counted layer by layer; encoders of BERT's kind by the same rules of thumb.
"""

from dataclasses import dataclass

from tdro_hpc.config.figures import ModelFigures
from tdro_hpc.config.schema import LoraConfig, ModelConfig

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_FLOAT32 = 4
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Pass:
    """What a rank embeds at once, and how."""

    tokens: int  # of all rows, with padding where there is any
    row_tokens: int  # of the longest row
    masked: bool  # a mask [rows, tokens, tokens] goes to each attention: sdpa of padded rows
    on_gpu: bool
    tensor_size: int = 1  # ranks that share each layer


@dataclass(frozen=True)
class LayerBytes:
    """Memory of one decoder layer in one pass (bytes)."""

    entering: int  # the hidden states between layers: all that is kept of a layer that is computed again
    saved: int  # for its backward
    working: int  # at most beside them, in its backward


@dataclass(frozen=True)
class _Types:
    """Bytes of a number in each place."""

    residual: int  # hidden states between layers
    product: int  # results of matrix products
    casts: bool  # inputs and weights of every product are copied to the type of autocast
    autocast: bool


def types_of(model: ModelConfig) -> _Types:
    """Types of the tensors of a pass."""
    residual, autocast = BYTES[model.weights_dtype], model.autocast != "float32"
    casts = autocast and residual == _FLOAT32
    return _Types(residual, BYTES[model.autocast] if casts else residual, casts, autocast)


def layer_bytes(figures: ModelFigures, model: ModelConfig, at: Pass) -> LayerBytes:
    """Memory of one layer; under tensor parallelism, of this rank's part of it."""
    types, width = types_of(model), figures.width
    inner, queries = figures.inner // at.tensor_size, figures.query_width // at.tensor_size
    token = _attention(figures, types, at) + _norms(figures, model, types, at)
    # A gated MLP keeps gate, its activation and up; that of BERT's kind what enters its activation, and dropout masks.
    token += inner * types.product * (1 if figures.is_encoder else 3)
    token += 2 * width * (1 if at.on_gpu else _FLOAT32) if figures.is_encoder else 0
    if model.lora.enabled:
        token += _adapter_inputs(figures, model.lora, types, at)
    else:
        # Products of 32-bit weights save a copy of their input each, others share it; that of down is the MLP's own.
        copies = 5 * width if types.casts else 2 * width
        token += (copies + inner) * types.product
    weights = types.product * layer_matrices(figures) // at.tensor_size if types.casts else 0
    working = 3 * width * types.residual + 2 * inner * types.product + queries * types.product
    working += inner * _FLOAT32 if model.lora.enabled and types.autocast else 0  # adapters take float32
    return LayerBytes(types.residual * width * at.tokens, token * at.tokens + weights, working * at.tokens)


def _attention(figures: ModelFigures, types: _Types, at: Pass) -> int:
    """Queries, keys, values, output, normaliser and mask, of a token."""
    queries, keys = figures.query_width // at.tensor_size, figures.key_width // at.tensor_size
    shared = queries if at.masked else keys  # under a mask keys and values are repeated for each head of queries
    saved = (2 * queries + 2 * shared) * types.product + figures.heads // at.tensor_size * _FLOAT32
    return saved + (at.row_tokens * types.product if at.masked else 0)


def _norms(figures: ModelFigures, model: ModelConfig, types: _Types, at: Pass) -> int:
    """Norms of a layer, of a token: the input in float32, what the weight is multiplied with if it is trained."""
    widths = [figures.width, figures.width]
    trained = 0 if model.lora.enabled else sum(widths) * types.residual
    if figures.kind == "qwen3":
        heads = (figures.query_width + figures.key_width) // at.tensor_size
        widths.append(heads)
        trained += 0 if model.lora.enabled else heads * types.product
    return sum(widths) * _FLOAT32 + trained


def _adapter_inputs(figures: ModelFigures, lora: LoraConfig, types: _Types, at: Pass) -> int:
    """What low-rank updates save of their inputs, of a token."""
    inner, queries = figures.inner // at.tensor_size, figures.query_width // at.tensor_size
    widths = dict.fromkeys(ALL_LINEAR, figures.width) | {"o_proj": queries, "down_proj": inner}
    names = [name for name in ALL_LINEAR if is_target(name, lora)]
    rank = lora.rank * len(names) * (types.product if types.autocast else _FLOAT32)
    total = sum(widths[name] for name in names)
    if lora.dropout > 0:
        mask = 1 if at.on_gpu else _FLOAT32
        return rank + total * (mask + (types.product if types.autocast else _FLOAT32))
    if types.autocast or types.residual < _FLOAT32:
        return rank + total * (types.product if types.autocast else _FLOAT32)
    # In float32 throughout, linear layers share the input that is there.
    groups = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj",)]
    return rank + _FLOAT32 * sum(widths[group[0]] for group in groups if set(group) & set(names))


def is_target(module: str, lora: LoraConfig) -> bool:
    """Whether a linear layer gets a low-rank update."""
    wanted = [target.strip() for target in lora.targets.split(",")]
    return wanted == ["all-linear"] or any(module == target or module.endswith(f".{target}") for target in wanted)


def layer_matrices(figures: ModelFigures) -> int:
    """Numbers in the matrices of one layer."""
    of_mlp = 2 if figures.is_encoder else 3
    return figures.width * (2 * figures.query_width + 2 * figures.key_width + of_mlp * figures.inner)
