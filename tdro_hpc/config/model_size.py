"""A model's name in, the shapes of its parameters out, without torch and without reading a weight.

They come from the headers of safetensors files, or are worked out from config.json or from what is published of it. A
model that is not on this machine and not in configs/model has none.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from safetensors import safe_open

from tdro_hpc.config.figures import ENCODERS, SPREADABLE, document_of, folder_of
from tdro_hpc.config.schema import ModelConfig

Shapes = dict[str, tuple[int, ...]]

_HEADS = ("lm_head.", "cls.", "classifier.", "score.")  # trained for other ends; AutoModel leaves them out
_EMBEDDINGS = ("embed", "wte", "wpe")  # matrices with such a name are tables: LoRA's all-linear does not touch them


def trained_parameters(model: ModelConfig) -> int | None:
    """Number of parameters that training changes; None where the model is not known."""
    shapes = parameter_shapes(model.name, model.revision)
    if shapes is None:
        return None
    sizes = {name: _product(shape) for name, shape in shapes.items()}
    if not model.lora.enabled:
        return sum(sizes.values())
    # A low-rank update of a [out, in] matrix is [out, rank] times [rank, in].
    return sum(model.lora.rank * sum(shapes[name]) for name in shapes if _is_target(name, shapes[name], model))


@cache
def parameter_shapes(name: str, revision: str) -> Shapes | None:
    """Shape of every parameter of a model by its name; None where it is not known."""
    folder = folder_of(name, revision)
    files = sorted(folder.glob("model*.safetensors")) if folder else []
    if files:
        return dict(pair for file in files for pair in _shapes_in(file))
    config = document_of(name, revision) or {}
    if config.get("model_type") in SPREADABLE:
        return _decoder_shapes(config)
    if config.get("model_type") in ENCODERS:
        return _encoder_shapes(config)
    return None


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _is_target(name: str, shape: tuple[int, ...], model: ModelConfig) -> bool:
    module = name.removesuffix(".weight")
    if len(shape) != 2 or any(word in name for word in _EMBEDDINGS):
        return False
    wanted = [target.strip() for target in model.lora.targets.split(",")]
    return wanted == ["all-linear"] or any(module == target or module.endswith(f".{target}") for target in wanted)


def _shapes_in(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    with safe_open(file, framework="numpy") as tensors:
        for name in tensors.keys():
            part = tensors.get_slice(name)
            # Integers are buffers, such as position ids, not parameters.
            if part.get_dtype().startswith(("F", "BF")) and not name.startswith(_HEADS):
                yield name, tuple(part.get_shape())


def _decoder_shapes(config: dict) -> Shapes:
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_width = config.get("head_dim") or width // heads
    queries, keys = heads * head_width, (config.get("num_key_value_heads") or heads) * head_width
    layer: Shapes = {
        "self_attn.q_proj.weight": (queries, width),
        "self_attn.k_proj.weight": (keys, width),
        "self_attn.v_proj.weight": (keys, width),
        "self_attn.o_proj.weight": (width, queries),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    if config["model_type"] == "qwen2":
        layer |= {f"self_attn.{part}_proj.bias": (size,) for part, size in (("q", queries), ("k", keys), ("v", keys))}
    if config["model_type"] == "qwen3":
        layer |= {"self_attn.q_norm.weight": (head_width,), "self_attn.k_norm.weight": (head_width,)}
    shapes: Shapes = {"embed_tokens.weight": (config["vocab_size"], width), "norm.weight": (width,)}
    return shapes | _repeated("layers", layer, config["num_hidden_layers"])


def _encoder_shapes(config: dict) -> Shapes:
    width, inner = config["hidden_size"], config["intermediate_size"]
    matrices = {
        "attention.self.query": (width, width),
        "attention.self.key": (width, width),
        "attention.self.value": (width, width),
        "attention.output.dense": (width, width),
        "intermediate.dense": (inner, width),
        "output.dense": (width, inner),
    }
    layer: Shapes = {f"{name}.weight": shape for name, shape in matrices.items()}
    layer |= {f"{name}.bias": shape[:1] for name, shape in matrices.items()}
    for norm in ("attention.output.LayerNorm", "output.LayerNorm"):
        layer |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    shapes: Shapes = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], width),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], width),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], width),
        "embeddings.LayerNorm.weight": (width,),
        "embeddings.LayerNorm.bias": (width,),
        "pooler.dense.weight": (width, width),
        "pooler.dense.bias": (width,),
    }
    return shapes | _repeated("encoder.layer", layer, config["num_hidden_layers"])


def _repeated(prefix: str, layer: Shapes, count: int) -> Shapes:
    return {f"{prefix}.{number}.{name}": shape for number in range(count) for name, shape in layer.items()}
