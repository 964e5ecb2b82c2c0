"""The cache against one graph over the same embeddings, and the defects of its peers."""

import pytest
import torch

from tdro_hpc.config.schema import LoraConfig, LossConfig, ModelConfig, TrainingConfig
from tdro_hpc.data.tokens import Tokens
from tdro_hpc.encoders.backbone import load_encoder
from tdro_hpc.losses.gradcache import cached_backward, split_by_length
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


@pytest.mark.parametrize("chunk_rows", [[1, 1], [5, 7], [16, 48], [100, 100]])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_loss_and_gradients_are_those_of_the_uncached_step(chunk_rows, temperature):
    batch = toy_batch(1, ROWS)
    parts = [batch.query_tokens, batch.passage_tokens]
    plain, cached = engine_of(), engine_of()
    plain_loss = loss_function(batch, temperature)(plain.embed(parts))
    plain.backward(plain_loss, synchronise=True)
    loss = cached_backward(cached, parts, chunk_rows, loss_function(batch, temperature), synchronise=True)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain_loss.detach(), **CLOSE)
    torch.testing.assert_close(gradients(cached), gradients(plain), **CLOSE)


def chunked_backward(engine, parts, chunk_rows, loss_of, *, synchronise):
    """What cached_backward promises, with the graphs of all chunks in memory at once."""
    embeddings = []
    for part, (tokens, rows) in enumerate(zip(parts, chunk_rows, strict=True)):
        chunks = split_by_length(tokens, part, rows)
        order = torch.cat([chunk.rows for chunk in chunks])
        embeddings.append(torch.cat([engine.embed([chunk.tokens])[0] for chunk in chunks])[order.argsort()])
    loss = loss_of(embeddings)
    engine.backward(loss, synchronise=synchronise)
    return loss.detach()


def test_gradients_are_exact_under_dropout():
    batch = toy_batch(2, ROWS)
    parts = [batch.query_tokens, batch.passage_tokens]
    cached, plain = engine_of(dropout=0.5), engine_of(dropout=0.5)
    torch.manual_seed(3)
    loss = cached_backward(cached, parts, [3, 5], loss_function(batch), synchronise=True)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    plain_loss = chunked_backward(plain, parts, [3, 5], loss_function(batch), synchronise=True)
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
        loss = backward(engine, parts, [2, 5], loss_function(batch), synchronise=True)
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

    loss = cached_backward(engine_of(), [batch.query_tokens, batch.passage_tokens], [4, 4], loss_of, synchronise=True)
    assert len(kept) == 1 and kept[0].shape == (ROWS,)
    assert torch.equal(kept[0].mean().detach(), loss)


def test_part_that_the_loss_does_not_read_gets_no_gradient():
    batch = toy_batch(5, ROWS)
    parts = [batch.query_tokens, batch.passage_tokens]
    both, first = engine_of(), engine_of()
    cached_backward(both, parts, [4, 4], lambda embeddings: embeddings[0][:, 0].sum(), synchronise=True)
    cached_backward(first, parts[:1], [4], lambda embeddings: embeddings[0][:, 0].sum(), synchronise=True)
    torch.testing.assert_close(gradients(both), gradients(first), **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_chunks_hold_rows_of_like_length_without_needless_padding(side):
    tokens = toy_tokens(6, 13, width=20, side=side)
    lengths = tokens.attention_mask.sum(1)
    chunks = split_by_length(tokens, 0, 4)
    assert [len(chunk.rows) for chunk in chunks] == [4, 4, 4, 1]
    assert sorted(row for chunk in chunks for row in chunk.rows.tolist()) == list(range(13))
    assert [chunk.tokens.input_ids.shape[1] for chunk in chunks] == sorted(lengths.tolist(), reverse=True)[::4]
    for chunk in chunks:
        for row, ids, mask in zip(chunk.rows, chunk.tokens.input_ids, chunk.tokens.attention_mask, strict=True):
            assert torch.equal(ids[mask == 1], tokens.input_ids[row][tokens.attention_mask[row] == 1])


def test_both_passes_embed_each_chunk_once():
    batch = toy_batch(7, ROWS)
    engine = engine_of()
    cached_backward(engine, [batch.query_tokens], [5], lambda embeddings: embeddings[0].sum(), synchronise=True)
    widths = engine.encoder.widths
    assert len(widths) == 8 and widths[:4] == widths[4:] and widths[3] < widths[0]


def test_rows_of_one_length_keep_their_order():
    ids = torch.arange(1, 7).unsqueeze(1)
    chunks = split_by_length(Tokens(ids, torch.ones_like(ids)), 0, 2)
    assert [chunk.rows.tolist() for chunk in chunks] == [[0, 1], [2, 3], [4, 5]]
