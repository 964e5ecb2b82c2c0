from collections.abc import Callable

import pytest
import torch

from tdro_hpc.data.tokens import Tokens


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny matrices gain nothing from more threads, and test machines are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def padded() -> Callable[[list[list[int]], str], Tokens]:
    """Function that pads lists of token ids on a side, with token 0."""

    def pad(sequences: list[list[int]], side: str) -> Tokens:
        longest = max(len(sequence) for sequence in sequences)
        ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            place = slice(0, len(sequence)) if side == "right" else slice(longest - len(sequence), longest)
            ids[row, place], mask[row, place] = torch.tensor(sequence), 1
        return Tokens(ids, mask)

    return pad


@pytest.fixture
def sequences() -> list[list[int]]:
    """Token ids of texts of 2 to 105 tokens in no order, two of equal length, in the tiny backbones' vocabulary."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(4, 260, (n,), generator=generator).tolist() for n in (105, 6, 71, 2, 72, 6, 41)]
