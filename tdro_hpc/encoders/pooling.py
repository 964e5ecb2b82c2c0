"""Hidden states of tokens in, one vector a text out. Knows nothing of models; never normalises.

`pool` takes padded rows, `pool_packed` takes rows laid end to end without padding. Both give float32.
"""

import torch
from torch import Tensor

from tdro_hpc.encoders.packing import Packing


def require_real_tokens(mask: Tensor) -> None:
    """Nothing, or a ValueError that names the first row without a real token.

    Only a mask on the CPU is looked at: asking a GPU for the answer would make the host wait for it in every step. The
    encoder asks before it moves tokens, and a tokenizer that appends the end token makes no empty row.
    """
    if mask.device.type != "cpu":
        return
    has_token = mask.bool().any(dim=1)
    if not bool(has_token.all()):
        row = int(has_token.int().argmin())
        raise ValueError(
            f"Row {row} of {len(mask)} has no real token (its attention mask is all 0), so it has no vector. Expected "
            f"at least one token a text. Leave empty texts out, or set model.append_eos=true."
        )


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Embedding of each row by the rule `pooling`: last, mean or cls.

    hidden  [rows, tokens, width]  any float type
    mask    [rows, tokens]         1 = real token; padding may be left or right
    returns [rows, width]          float32, not normalised
    raises  ValueError             if a row has no real token (masks on the CPU only)
    """
    require_real_tokens(mask)
    return {"last": pool_last, "mean": pool_mean, "cls": pool_first}[pooling](hidden, mask)


def pool_last(hidden: Tensor, mask: Tensor) -> Tensor:
    """Hidden state of the last real token of each row; shapes as in `pool`."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * positions).amax(dim=1)  # [rows]
    return hidden[torch.arange(len(hidden), device=hidden.device), last].float()


def pool_first(hidden: Tensor, mask: Tensor) -> Tensor:
    """Hidden state of the first real token of each row ([CLS] in encoders); shapes as in `pool`."""
    first = mask.int().argmax(dim=1)  # the first of equal maxima
    return hidden[torch.arange(len(hidden), device=hidden.device), first].float()


def pool_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens of each row, summed in float32; shapes as in `pool`."""
    real = mask.bool().unsqueeze(-1)
    # Chosen, not multiplied: what stands at padding may be anything, NaN included.
    total = torch.where(real, hidden, 0).sum(dim=1, dtype=torch.float32)  # bf16 sums of 512 tokens lose digits
    return total / mask.sum(dim=1, keepdim=True)


def pool_packed(hidden: Tensor, packing: Packing, pooling: str) -> Tensor:
    """As `pool`, for rows laid end to end.

    hidden  [real tokens, width]   returns [rows, width] float32
    """
    if pooling == "last":
        return hidden[packing.starts + packing.lengths - 1].float()
    if pooling == "cls":
        return hidden[packing.starts].float()
    # Back into padded rows: a plain sum over a dim has a fixed order on every device, scattered additions have not.
    return pool_mean(packing.unpack(hidden), packing.mask)
