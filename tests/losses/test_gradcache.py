"""The cache against one graph over the same embeddings, and the defects of its peers."""

import itertools
import weakref

import pytest
import torch

from tdro_hpc.config.schema import LoraConfig, LossConfig, ModelConfig, TrainingConfig
from tdro_hpc.data.tokens import Tokens
from tdro_hpc.encoders.backbone import load_encoder
from tdro_hpc.losses.gradcache import cached_backward, split_by_length, split_parts
from tdro_hpc.losses.score_block import build_score_block
from tdro_hpc.parallel.process import Process
from tdro_hpc.parallel.torch_engine import TorchEngine
from tests.reference.toy import ToyEncoder, toy_batch, toy_tokens

ALONE = Process(data_rank=0, data_size=1, local_rank=0, device=torch.device("cpu"))
ROWS = 16
CLOSE = {"rtol": 1e-4, "atol": 1e-6}  # float32 sums in another order, divided by the temperature


def engine_of(dropout=0.0):
    return TorchEngine(ToyEncoder(dropout=dropout), ALONE, TrainingConfig())


def loss_function(batch, temperature=0.05):
    def loss_of(embeddings):
        block = build_score_block(
            *embeddings, batch, negatives="batch", temperature=temperature, loss=LossConfig(false_negative_margin=-0.2)
        )
        return block.row_losses().mean()

    return loss_of


def gradients(engine):
    return {name: p.grad for name, p in engine.encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk_tokens", [1, 30, 144, 10_000])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_loss_and_gradients_are_those_of_the_uncached_step(chunk_tokens, temperature):
    batch = toy_batch(1, ROWS)
    parts = [batch.query_tokens, batch.passage_tokens]
    plain, cached = engine_of(), engine_of()
    plain_loss = loss_function(batch, temperature)(plain.embed(parts))
    plain.backward(plain_loss, synchronise=True)
    loss = cached_backward(cached, parts, chunk_tokens, loss_function(batch, temperature), synchronise=True)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain_loss.detach(), **CLOSE)
    torch.testing.assert_close(gradients(cached), gradients(plain), **CLOSE)


def chunked_backward(engine, parts, chunk_tokens, loss_of, *, synchronise):
    """What cached_backward promises, with the graphs of all chunks in memory at once."""
    pieces = [(chunk, engine.embed([chunk.tokens])[0]) for chunk in split_parts(parts, chunk_tokens)]
    embeddings = []
    for part in range(len(parts)):
        order = torch.cat([chunk.rows for chunk, _ in pieces if chunk.part == part])
        embeddings.append(torch.cat([piece for chunk, piece in pieces if chunk.part == part])[order.argsort()])
    loss = loss_of(embeddings)
    engine.backward(loss, synchronise=synchronise)
    return loss.detach()


def test_gradients_are_exact_under_dropout():
    batch = toy_batch(2, ROWS)
    parts = [batch.query_tokens, batch.passage_tokens]
    cached, plain = engine_of(dropout=0.5), engine_of(dropout=0.5)
    torch.manual_seed(3)
    loss = cached_backward(cached, parts, 30, loss_function(batch), synchronise=True)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    plain_loss = chunked_backward(plain, parts, 30, loss_function(batch), synchronise=True)
    torch.testing.assert_close(loss, plain_loss, **CLOSE)
    torch.testing.assert_close(gradients(cached), gradients(plain), **CLOSE)
    assert torch.equal(after, torch.get_rng_state())


def test_gradients_of_a_real_backbone_are_exact_with_lora_dropout_autocast_and_checkpointing():
    config = ModelConfig(name="tiny:qwen2", attention="sdpa", lora=LoraConfig(dropout=0.3))
    assert config.gradient_checkpointing and config.autocast == "bfloat16"
    batch = toy_batch(8, 6)
    parts = [batch.query_tokens, batch.passage_tokens]
    found = []
    for backward in (cached_backward, chunked_backward):
        encoder = load_encoder(config, device="cpu", seed=0)
        with torch.no_grad():
            for parameter in encoder.parameters():  # a fresh adapter is zero and lets no gradient through one side
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        engine = TorchEngine(encoder, ALONE, TrainingConfig())
        torch.manual_seed(3)
        loss = backward(engine, parts, 30, loss_function(batch), synchronise=True)
        found.append((loss, gradients(engine)))
    assert len(found[0][1]) > 0 and all(gradient.abs().max() > 0 for gradient in found[0][1].values())
    torch.testing.assert_close(found[0], found[1], **CLOSE)


def test_row_losses_reach_the_caller_and_the_loss_runs_once():
    batch = toy_batch(4, ROWS)
    kept = []

    def loss_of(embeddings):
        block = build_score_block(*embeddings, batch, negatives="group", temperature=0.05, loss=LossConfig())
        kept.append(block.row_losses())
        return kept[-1].mean()

    loss = cached_backward(engine_of(), [batch.query_tokens, batch.passage_tokens], 30, loss_of, synchronise=True)
    assert len(kept) == 1 and kept[0].shape == (ROWS,)
    assert torch.equal(kept[0].mean().detach(), loss)


def test_part_that_the_loss_does_not_read_gets_no_gradient():
    batch = toy_batch(5, ROWS)
    parts = [batch.query_tokens, batch.passage_tokens]
    both, first = engine_of(), engine_of()
    cached_backward(both, parts, 30, lambda embeddings: embeddings[0][:, 0].sum(), synchronise=True)
    cached_backward(first, parts[:1], 30, lambda embeddings: embeddings[0][:, 0].sum(), synchronise=True)
    torch.testing.assert_close(gradients(both), gradients(first), **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chunk_tokens", [1, 19, 40, 1000])
def test_chunks_fill_their_tokens_with_rows_of_like_length_and_little_padding(side, chunk_tokens):
    tokens = toy_tokens(6, 13, width=20, side=side)
    lengths = tokens.attention_mask.sum(1)
    chunks = split_by_length(tokens, 0, chunk_tokens)
    assert sorted(row for chunk in chunks for row in chunk.rows.tolist()) == list(range(13))
    assert torch.cat([lengths[chunk.rows] for chunk in chunks]).tolist() == sorted(lengths.tolist(), reverse=True)
    for chunk, following in itertools.zip_longest(chunks, chunks[1:]):
        rows, width = chunk.tokens.input_ids.shape
        assert width == int(lengths[chunk.rows].max())
        assert rows == 1 or rows * width <= chunk_tokens
        assert following is None or (rows + 1) * width > chunk_tokens, "one row more would not have fitted"
        for row, ids, mask in zip(chunk.rows, chunk.tokens.input_ids, chunk.tokens.attention_mask, strict=True):
            assert torch.equal(ids[mask == 1], tokens.input_ids[row][tokens.attention_mask[row] == 1])


def test_padding_on_both_sides_counts():
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0]])
    chunks = split_by_length(Tokens(mask * 7, mask), 0, 12)
    assert [chunk.rows.tolist() for chunk in chunks] == [[0, 1], [2]]
    assert [list(chunk.tokens.input_ids.shape) for chunk in chunks] == [[2, 6], [1, 2]]


def test_every_chunk_is_embedded_twice_but_the_largest_whose_graph_is_kept():
    batch = toy_batch(7, ROWS)
    engine = engine_of()
    parts = [batch.query_tokens, batch.passage_tokens]
    cached_backward(engine, parts, 30, lambda embeddings: embeddings[0].sum() + embeddings[1].sum(), synchronise=True)
    chunks = split_parts(parts, 30)
    sizes = [chunk.tokens.input_ids.numel() for chunk in chunks]
    widths = [chunk.tokens.input_ids.shape[1] for chunk in chunks]
    assert len(chunks) > 6 and sizes == sorted(sizes) and {chunk.part for chunk in chunks} == {0, 1}
    assert engine.encoder.widths == widths + widths[-2::-1]


def test_what_fits_one_chunk_is_embedded_once():
    engine = engine_of()
    cached_backward(engine, [toy_tokens(1, 5)], 100, lambda embeddings: embeddings[0].sum(), synchronise=True)
    assert len(engine.encoder.widths) == 1 and len(gradients(engine)) > 2


def test_activations_of_one_chunk_at_a_time_are_alive():
    batch = toy_batch(9, ROWS)

    def most_alive(backward):
        engine, seen, alive = engine_of(), [], []

        def note(module, inputs, output):  # the norm saves its input for the backward
            if output.requires_grad:
                seen.append(weakref.ref(inputs[0]))
                alive.append(sum(activation() is not None for activation in seen))

        engine.encoder.norm.register_forward_hook(note)
        backward(engine, [batch.query_tokens], 20, lambda embeddings: embeddings[0].sum(), synchronise=True)
        return max(alive), len(alive)

    one, chunks = most_alive(cached_backward)
    assert one == 1 and chunks > 3
    assert most_alive(chunked_backward) == (chunks, chunks)


def test_rows_of_one_length_keep_their_order():
    ids = torch.arange(1, 7).unsqueeze(1)
    chunks = split_by_length(Tokens(ids, torch.ones_like(ids)), 0, 2)
    assert [chunk.rows.tolist() for chunk in chunks] == [[0, 1], [2, 3], [4, 5]]
