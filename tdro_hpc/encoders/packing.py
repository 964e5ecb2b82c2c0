"""Padded token arrays in, the same tokens laid end to end out, with what is needed to find each text again.

Only index arrays are made here; attention.py and pooling.py use them.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Texts share a bucket while the longest exceeds the shortest by at most this: a few kernel calls for a whole batch
# (about 12 for texts of 10 to 120 tokens, however many), and little computed in vain.
BUCKET_SLACK_TOKENS = 8
BUCKET_SLACK_SHARE = 8  # or 1 / 8 of the shortest


@dataclass(frozen=True)
class Bucket:
    """Texts of nearly the same length, as padded rows over the packed tokens."""

    slots: Tensor  # int64 [texts, longest], index of each token among the packed ones; padding repeats the text's first
    real: Tensor | None  # bool [texts, longest]; None where all texts of the bucket have the same length


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a padded batch went when the padding was left out."""

    mask: Tensor  # [rows, tokens], 1 = real token
    token_index: Tensor  # int64 [real tokens], place of each in the flattened padded batch, row by row
    lengths: Tensor  # int64 [rows]
    host_lengths: tuple[int, ...]  # the same numbers, known without asking the device

    @cached_property
    def starts(self) -> Tensor:
        """First packed token of each row, int64 [rows]."""
        return self.lengths.cumsum(0) - self.lengths

    @cached_property
    def bounds(self) -> Tensor:
        """First packed token of each row and the end of the last row, int32 [rows + 1]: what flash kernels take."""
        return torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0)).to(torch.int32)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.host_lengths)

    @cached_property
    def position_ids(self) -> Tensor:
        """Position of each packed token in its own text, int64 [real tokens]."""
        total = torch.arange(len(self.token_index), device=self.lengths.device)
        return total - self.starts.repeat_interleave(self.lengths, output_size=len(self.token_index))

    def pack(self, padded: Tensor) -> Tensor:
        """[rows, tokens, ...] -> [real tokens, ...]."""
        return padded.flatten(0, 1)[self.token_index]

    def unpack(self, packed: Tensor) -> Tensor:
        """[real tokens, width] -> [rows, tokens, width], zero at padding."""
        rows, tokens = self.mask.shape
        padded = packed.new_zeros(rows * tokens, packed.shape[-1]).index_copy(0, self.token_index, packed)
        return padded.view(rows, tokens, -1)

    def to(self, device: torch.device | str) -> "Packing":
        """The same packing with its tensors on another device."""
        mask, token_index, lengths = (
            tensor.to(device, non_blocking=True) for tensor in (self.mask, self.token_index, self.lengths)
        )
        return Packing(mask, token_index, lengths, self.host_lengths)

    @cached_property
    def buckets(self) -> tuple[list[Bucket], Tensor]:
        """Buckets by length, and for each packed token its place among the buckets' slots (flattened, in order).

        Built on the host from the lengths, once a forward pass and used by all layers.
        """
        lengths = torch.tensor(self.host_lengths)
        starts = lengths.cumsum(0) - lengths
        device = self.lengths.device
        places = torch.empty(sum(self.host_lengths), dtype=torch.int64)
        buckets, slots_before = [], 0
        for rows in _rows_by_length(self.host_lengths):
            columns = torch.arange(self.host_lengths[rows[-1]])
            real = columns < lengths[rows].unsqueeze(1)  # [texts, longest]
            slots = starts[rows].unsqueeze(1) + torch.where(real, columns, 0)
            places[slots[real]] = slots_before + torch.arange(real.numel()).view_as(real)[real]
            slots_before += real.numel()
            all_real = self.host_lengths[rows[0]] == len(columns)
            buckets.append(Bucket(slots.to(device), None if all_real else real.to(device)))
        return buckets, places.to(device)


def build_packing(mask: Tensor) -> Packing:
    """Packing of a padded batch with the attention mask [rows, tokens].

    A mask on a GPU makes the host wait once for the lengths; a mask on the CPU costs nothing there, so pack first and
    move afterwards.
    """
    lengths = mask.sum(dim=1)
    return Packing(mask, mask.flatten().nonzero().squeeze(1), lengths, tuple(lengths.tolist()))


def _rows_by_length(lengths: tuple[int, ...]) -> list[list[int]]:
    """Row numbers in groups of nearly equal length, shortest first within and between groups."""
    groups: list[list[int]] = []
    limit = -1
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if lengths[row] > limit:
            groups.append([])
            limit = lengths[row] + max(BUCKET_SLACK_TOKENS, lengths[row] // BUCKET_SLACK_SHARE)
        groups[-1].append(row)
    return groups
