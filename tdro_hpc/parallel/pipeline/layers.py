"""The layers of an encoder that one rank of a pipeline holds, with what belongs to the first and the last rank.

A part is transformers' own model with only its own layers in it, so masks, positions and layers are transformers' own;
loading.py makes it. Token ids enter the first part and embeddings leave the last; between them hidden states
travel and nothing else, because every rank of a replica has the tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdro_hpc.config.schema import ModelConfig
from tdro_hpc.data.tokens import Tokens
from tdro_hpc.encoders.attention import PADDING_FREE
from tdro_hpc.encoders.packing import Packing, build_packing
from tdro_hpc.encoders.pooling import pool, pool_packed, require_real_tokens
from tdro_hpc.parallel.pipeline.placement import Placement
from tdro_hpc.parallel.pipeline.tensor import SplitLinear, TensorAxis, is_head_norm


@dataclass(frozen=True)
class PartInputs:
    """One chunk of texts as a part of the encoder takes it."""

    input_ids: Tensor  # int64 [rows, tokens]; packed: [1, real tokens]
    position_ids: Tensor  # of the same shape
    mask: Tensor  # [rows, tokens], 1 = real token
    packing: Packing | None  # where there is no padding


class EncoderPart(nn.Module):
    """Some successive layers of an encoder."""

    def __init__(self, backbone: Any, config: ModelConfig, *, first_layer: int, first: bool, last: bool) -> None:
        """
        backbone     transformers model with the layers of this part only
        first_layer  number of its first layer in the whole model
        first, last  whether the embedding table and the final norm with the pooling belong to it
        """
        super().__init__()
        self.backbone, self.config = backbone, config
        self.first_layer, self.first, self.last = first_layer, first, last
        self.width: int = backbone.config.hidden_size
        self.packs = backbone.config._attn_implementation == PADDING_FREE

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Type of the hidden states between parts."""
        return getattr(torch, self.config.weights_dtype)

    def inputs(self, tokens: Tokens) -> PartInputs:
        """The chunk on the device of this part; raises ValueError if a row has no real token (CPU tokens only)."""
        require_real_tokens(tokens.attention_mask)
        if self.packs:
            packing = build_packing(tokens.attention_mask)
            input_ids = packing.pack(tokens.input_ids).to(self.device, non_blocking=True)
            packing = packing.to(self.device)
            return PartInputs(input_ids.unsqueeze(0), packing.position_ids.unsqueeze(0), packing.mask, packing)
        tokens = tokens.to(self.device)
        mask = tokens.attention_mask
        # Counted over real tokens, so that a text gets the same vector whichever side the padding is on.
        return PartInputs(tokens.input_ids, (mask.cumsum(dim=1) - 1).clamp(min=0), mask, None)

    def forward(self, entering: Tensor, inputs: PartInputs) -> Tensor:
        """Hidden states [rows, tokens, width] for the next part; of the last part the embeddings [rows, width].

        entering  hidden states of the part before, in one row where packed; the first part does not look at it
        """
        hidden = self._hidden(entering, inputs)
        if not self.last:
            return hidden
        if inputs.packing is not None:
            vectors = pool_packed(hidden.squeeze(0), inputs.packing, self.config.pooling)
        else:
            vectors = pool(hidden, inputs.mask, self.config.pooling)
        return nn.functional.normalize(vectors, dim=-1) if self.config.similarity == "cosine" else vectors

    def _hidden(self, entering: Tensor, inputs: PartInputs) -> Tensor:
        texts: dict[str, Any] = {"input_ids": inputs.input_ids} if self.first else {"inputs_embeds": entering}
        texts |= {"attention_mask": inputs.mask} if inputs.packing is None else {"packing": inputs.packing}
        autocast = self.config.autocast
        dtype = torch.bfloat16 if autocast == "float32" else getattr(torch, autocast)
        with torch.autocast(self.device.type, dtype=dtype, enabled=autocast != "float32"):
            return self.backbone(position_ids=inputs.position_ids, **texts).last_hidden_state

    def placements(self) -> dict[str, Placement]:
        """Place in the whole model of each parameter of this part, by its name in this module."""
        return {name: self._placement(name, parameter) for name, parameter in self.named_parameters()}

    def _placement(self, own: str, parameter: nn.Parameter) -> Placement:
        weight = own.removeprefix("backbone.")
        if weight.startswith("layers."):
            _, number, rest = weight.split(".", 2)
            weight = f"layers.{int(number) + self.first_layer}.{rest}"
        module_name, _, last = own.rpartition(".")
        module = self.get_submodule(module_name)
        partial, dim = is_head_norm(own), None
        axis = TensorAxis()
        if isinstance(module, SplitLinear):
            axis, partial = module.axis, module.is_partial(last)
            dim = module.split_dim(last) if axis.size > 1 else None
        shape, size = list(parameter.shape), 0
        if dim is not None:
            size = shape[dim]
            shape[dim] = size * axis.size
        adapter = last in ("lora_A", "lora_B")
        name = f"backbone.base_model.model.{weight}.default.weight" if adapter else f"backbone.{weight}"
        return Placement(
            weight=f"base_model.model.{weight}.weight" if adapter else weight,
            name=name,
            shape=tuple(shape),
            dim=dim,
            start=axis.rank * size,
            size=size,
            partial=partial,
            adapter=adapter,
        )
