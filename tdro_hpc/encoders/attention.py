"""Queries, keys and values of packed texts in, attention inside each text out: `attention=padding_free`.

Registered with transformers under the name PADDING_FREE, so its models call it in place of their own attention. On CUDA
in half precision it is torch's variable-length flash kernel; elsewhere texts of nearly equal length share one
scaled_dot_product_attention call. Both are exact.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from tdro_hpc.config.schema import ModelConfig
from tdro_hpc.encoders.packing import Bucket, Packing

PADDING_FREE = "padding_free"
# Model types whose packed output and gradients the tests compare with the padded ones. Another model may keep state
# between tokens that attention knows nothing of (convolutions, relative positions), so it is refused.
PACKABLE = ("qwen2", "qwen3", "mistral", "llama", "bert", "roberta", "xlm-roberta")


def register_padding_free() -> None:
    """Make PADDING_FREE known to transformers.

    No mask function is registered beside it: transformers then makes no mask at all, where a mask function that returns
    None would still have it look for packed texts first, and wait for the GPU to answer.
    """
    AttentionInterface.register(PADDING_FREE, packed_attention)


def attention_name(config: ModelConfig, device: torch.device) -> str:
    """Name of the attention in transformers: `auto` is flash_attention_2 where that can run, else sdpa.

    raises  ValueError  when flash_attention_2 is asked for where it cannot run
    """
    if config.attention not in ("auto", "flash_attention_2"):
        return config.attention
    from transformers.utils import is_flash_attn_2_available

    missing = []
    if device.type != "cuda":
        missing.append(f"a CUDA device (this is {device.type})")
    if config.autocast == "float32" and config.weights_dtype == "float32":
        missing.append("model.autocast=bfloat16 (it is float32)")
    if not is_flash_attn_2_available():
        missing.append("the package flash-attn (pip install flash-attn --no-build-isolation)")
    if not missing:
        return "flash_attention_2"
    if config.attention == "auto":
        return "sdpa"
    raise ValueError(
        f"model.attention is 'flash_attention_2', which needs {' and '.join(missing)}. "
        f"Set model.attention=auto, or padding_free, which needs no extra package."
    )


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """Attention of every token to the tokens of its own text; the signature is transformers'.

    query           [1, heads, real tokens, head width]; key and value have as many heads or a divisor of it
    packing         which token belongs to which text; handed through the model's forward
    sliding_window  causal: the token itself and the window - 1 before it; else: window on either side
    returns         [1, real tokens, heads, head width], None
    """
    assert packing is not None and attention_mask is None, "padding_free attention needs a packing and no mask"
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    window = sliding_window if sliding_window is not None and sliding_window < packing.longest else None
    query, key, value = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))  # [tokens, heads, width]
    half = _half_type(query, value)
    if query.device.type == "cuda" and half is not None and dropout == 0.0:
        output = _flash_attention(
            query.to(half), key.to(half), value.to(half), packing, causal=causal, window=window, scale=scaling
        )
    else:
        if query.device.type == "cuda":
            warnings.warn(
                "padding_free attention takes its slower path: torch's variable-length kernel needs bfloat16 or "
                "float16 (model.autocast) and no dropout on the attention weights (the model's config.json).",
                stacklevel=2,
            )
        output = _bucketed_attention(
            query, key, value, packing, causal=causal, window=window, scale=scaling, dropout=dropout
        )
    return output.unsqueeze(0), None


def _half_type(query: Tensor, value: Tensor) -> torch.dtype | None:
    """The 16-bit type in which the flash kernel may run here; None when float32 is what was asked for."""
    if torch.is_autocast_enabled(query.device.type):
        return torch.get_autocast_dtype(query.device.type)  # norms on queries and keys give float32 even then
    return value.dtype if value.dtype in (torch.bfloat16, torch.float16) else None


def _flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    *,
    causal: bool,
    window: int | None,
    scale: float | None,
) -> Tensor:
    """Attention by torch's variable-length flash kernel (CUDA, 16 bit); [tokens, heads, width] in and out."""
    from torch.nn.attention.varlen import varlen_attn

    behind = -1 if window is None else (window - 1 if causal else window)
    output = varlen_attn(
        query,
        key,
        value,
        packing.bounds,
        packing.bounds,
        packing.longest,
        packing.longest,
        scale=scale,
        window_size=(behind, 0 if causal else behind),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor), "no auxiliary output was asked for"
    return output


def _bucketed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    *,
    causal: bool,
    window: int | None,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """Attention by one scaled_dot_product_attention a bucket; [tokens, heads, width] in and out."""
    buckets, places = packing.buckets
    outputs = []
    for bucket in buckets:
        mask = _bucket_mask(bucket, causal=causal, window=window)
        output = scaled_dot_product_attention(
            _rows_of(query, bucket),
            _rows_of(key, bucket),
            _rows_of(value, bucket),
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal and mask is None,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # [texts, heads, longest, width]
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, places)


def _rows_of(states: Tensor, bucket: Bucket) -> Tensor:
    """[tokens, heads, width] -> [texts, heads, longest, width]."""
    rows = states.index_select(0, bucket.slots.flatten())
    return rows.view(*bucket.slots.shape, *states.shape[1:]).transpose(1, 2)


def _bucket_mask(bucket: Bucket, *, causal: bool, window: int | None) -> Tensor | None:
    """Which keys each query sees; None = all, or the plain causal triangle.

    returns bool [texts or 1, 1, longest or 1, longest]. Padding stands after the text, where a causal query never
    looks, so causal buckets need no mask for it.
    """
    longest = bucket.slots.shape[1]
    if window is None or longest <= window:
        return None if causal or bucket.real is None else bucket.real[:, None, None, :]
    positions = torch.arange(longest, device=bucket.slots.device)
    behind = positions.unsqueeze(1) - positions  # [queries, keys]
    if causal:
        return ((behind >= 0) & (behind < window))[None, None]
    seen = (behind.abs() <= window)[None, None]
    if bucket.real is None:
        return seen
    # A padding query far behind the text would see nothing, and softmax over nothing is NaN: it sees itself.
    return (seen & bucket.real[:, None, None, :]) | (behind == 0)
