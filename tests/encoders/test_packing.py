import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from tdro_hpc.config.schema import ModelConfig
from tdro_hpc.encoders import attention
from tdro_hpc.encoders.attention import attention_name
from tdro_hpc.encoders.packing import build_packing

LENGTHS = (9, 1, 30, 9, 17, 31, 4)
MASK = (torch.arange(33) < torch.tensor(LENGTHS).unsqueeze(1)).long()  # two columns are padding in every row


def random_states(heads: int) -> torch.Tensor:
    return torch.randn(sum(LENGTHS), heads, 8, dtype=torch.float64)


def seen(queries: int, *, causal: bool, window: int | None) -> torch.Tensor:
    """Which keys each query of one text sees, cell by cell."""
    grid = torch.zeros(queries, queries, dtype=torch.bool)
    for query in range(queries):
        for key in range(queries):
            if causal:
                grid[query, key] = key <= query and (window is None or query - key < window)
            else:
                grid[query, key] = window is None or abs(query - key) <= window
    return grid


def attention_text_by_text(query, key, value, *, causal: bool, window: int | None) -> torch.Tensor:
    outputs = []
    for q, k, v in zip(query.split(LENGTHS), key.split(LENGTHS), value.split(LENGTHS), strict=True):
        groups = q.shape[1] // k.shape[1]
        k, v = (states.repeat_interleave(groups, dim=1) for states in (k, v))
        mask = seen(len(q), causal=causal, window=window)
        outputs.append(
            scaled_dot_product_attention(
                q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), attn_mask=mask, scale=0.3
            ).transpose(0, 1)
        )
    return torch.cat(outputs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 5, 30, 100])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_bucketed_attention_equals_text_by_text_with_gradients(causal, window, key_heads):
    torch.manual_seed(0)
    states = [random_states(4), random_states(key_heads), random_states(key_heads)]
    probe = random_states(4)
    results = []
    for function in ("bucketed", "text by text"):
        leaves = [state.clone().requires_grad_() for state in states]
        if function == "bucketed":
            query, key, value = (leaf.transpose(0, 1).unsqueeze(0) for leaf in leaves)
            output, _ = attention.packed_attention(
                torch.nn.Module(),
                query,
                key,
                value,
                None,
                packing=build_packing(MASK),
                scaling=0.3,
                sliding_window=window,
                is_causal=causal,
            )
            output = output.squeeze(0)
        else:
            output = attention_text_by_text(*leaves, causal=causal, window=window)
        results.append([output, *torch.autograd.grad((output * probe).sum(), leaves)])
    for bucketed, expected in zip(*results, strict=True):
        assert_close(bucketed, expected, rtol=1e-10, atol=1e-12)  # float64, sums in another order


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 5])
def test_flash_kernel_is_asked_for_the_same_attention(monkeypatch, causal, window):
    def slow_varlen(query, key, value, bounds_q, bounds_k, max_q, max_k, *, scale, window_size, enable_gqa):
        """torch's variable-length attention as its documentation describes it, for a machine without CUDA."""
        assert bounds_q.dtype == torch.int32 and bounds_q.tolist() == bounds_k.tolist() and enable_gqa
        assert max_q == max_k == max(LENGTHS)
        left, right = (10_000 if side == -1 else side for side in window_size)
        outputs = []
        for start, end in zip(bounds_q[:-1].tolist(), bounds_q[1:].tolist(), strict=True):
            place = torch.arange(end - start)
            ahead = place - place.unsqueeze(1)
            q, k, v = (states[start:end].transpose(0, 1) for states in (query, key, value))
            mask = (ahead <= right) & (-ahead <= left)
            outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True))
        return torch.cat(outputs, dim=1).transpose(0, 1)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", slow_varlen)
    torch.manual_seed(0)
    query, key, value = random_states(4), random_states(2), random_states(2)
    options = {"causal": causal, "window": window, "scale": 0.3}
    flash = attention._flash_attention(query, key, value, build_packing(MASK), **options)
    bucketed = attention._bucketed_attention(query, key, value, build_packing(MASK), dropout=0.0, **options)
    assert_close(flash, bucketed, rtol=1e-10, atol=1e-12)


def test_packing_restarts_positions_and_unpacks_to_where_tokens_were():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]])
    values = torch.arange(12).view(3, 4)
    packing = build_packing(mask)
    packed = packing.pack(values)
    assert packed.tolist() == [2, 3, 4, 5, 6, 7, 11]
    assert packing.position_ids.tolist() == [0, 1, 0, 1, 2, 3, 0]
    assert packing.bounds.tolist() == [0, 2, 6, 7]
    assert packing.unpack(packed.unsqueeze(1)).squeeze(2).tolist() == (values * mask).tolist()


def test_bucket_count_does_not_grow_with_rows():
    lengths = torch.arange(1000) % 111 + 10  # 10 to 120 tokens
    buckets, places = build_packing((torch.arange(120) < lengths.unsqueeze(1)).long()).buckets
    slots = torch.cat([bucket.slots.flatten() for bucket in buckets])
    assert len(buckets) <= 12
    assert slots[places].tolist() == list(range(int(lengths.sum())))  # every token is found again
    assert len(slots) < 1.12 * lengths.sum()  # and little is computed in vain


def test_auto_attention_without_cuda_is_sdpa_and_flash_says_what_it_needs():
    assert attention_name(ModelConfig(), torch.device("cpu")) == "sdpa"
    with pytest.raises(ValueError, match="needs a CUDA device.*padding_free"):
        attention_name(ModelConfig(attention="flash_attention_2"), torch.device("cpu"))
