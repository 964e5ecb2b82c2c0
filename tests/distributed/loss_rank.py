"""One rank of the loss checks: python loss_rank.py <folder> <rank> <world> <rendezvous>. Writes <folder>/<rank>.pt."""

import dataclasses
import sys
from pathlib import Path

import torch

from tdro_hpc.config.schema import LoraConfig, LossConfig, ModelConfig, ParallelConfig, TrainingConfig
from tdro_hpc.encoders.backbone import load_encoder
from tdro_hpc.losses.gradcache import cached_backward, split_parts
from tdro_hpc.losses.library import load
from tdro_hpc.losses.score_block import build_score_block
from tdro_hpc.parallel.gather import _reduce_scatter, gather_ids, gather_rows, gather_values
from tdro_hpc.parallel.process import (
    any_rank,
    broadcast_from_first,
    end_process,
    start_process,
    sum_over_ranks,
    wait_for_all,
)
from tdro_hpc.parallel.torch_engine import TorchEngine
from tests.reference.toy import ToyEncoder, rows_of_batch, toy_batch

ROWS = 8  # of the batch of all ranks
UNEVEN_ROWS = 11  # the same, where the ranks get different numbers of them
CHUNK_TOKENS = 20
POLICIES = ("group", "task", "batch", "world")
TRAINING = TrainingConfig(learning_rate=0.01, warmup_steps=0, steps=10, max_grad_norm=0.5)
LOSS = LossConfig(false_negative_margin=-0.2)  # columns that beat the positive by more do not count


def losses_of(embeddings, batch, negatives):
    block = build_score_block(*embeddings, batch, negatives=negatives, temperature=0.05, loss=LOSS)
    return block.row_losses()


def parts_of(batch):
    return [batch.query_tokens, batch.passage_tokens]


def slices(world, rows=ROWS):
    return [slice(rows * rank // world, rows * (rank + 1) // world) for rank in range(world)]


def gradients(encoder):
    return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


def state_of(engine):
    """What the first rank would write, from this rank's own copies."""
    process = engine.process
    engine.process = dataclasses.replace(process, data_rank=0)
    state = engine.state_dict()
    engine.process = process
    return state


def check_policies(process, batch):
    """Row losses, averaged gradients, norm and the parameters after a step, for every policy."""
    found = {}
    for negatives in POLICIES:
        engine = TorchEngine(ToyEncoder(), process, TRAINING)
        losses = losses_of(engine.embed(parts_of(batch)), batch, negatives)
        engine.backward(losses.mean(), synchronise=True)
        found[negatives] = {"losses": losses.detach(), "gradients": gradients(engine.encoder), "norm": engine.step()}
        found[negatives]["parameters"] = state_of(engine)["tensors"]
    return found


def check_cache(process, batch, other):
    """Gradients of two cached micro-steps, synchronised at the last one only, and its number of chunks."""
    engine = TorchEngine(ToyEncoder(), process, TRAINING)
    for micro_batch, last in ((batch, False), (other, True)):

        def loss_of(embeddings, micro_batch=micro_batch):
            return losses_of(embeddings, micro_batch, "world").mean() / 2

        cached_backward(engine, parts_of(micro_batch), CHUNK_TOKENS, loss_of, synchronise=last)
    return gradients(engine.encoder), len(split_parts(parts_of(other), CHUNK_TOKENS))


def toy_with_dropout():
    return ToyEncoder(dropout=0.5)


def tiny_with_dropout():
    """A real backbone with an adapter that drops, checkpointing and autocast."""
    encoder = load_encoder(
        ModelConfig(name="tiny:qwen2", attention="sdpa", lora=LoraConfig(dropout=0.3)), device="cpu", seed=0
    )
    with torch.no_grad():
        for parameter in encoder.parameters():  # a fresh adapter is zero and lets no gradient through one side
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return encoder


def check_dropout_replay(process, batch, build):
    """Gradients of the cache under dropout, and of one graph over the same chunks, averaged by hand."""
    engine = TorchEngine(build(), process, TRAINING)
    torch.manual_seed(7 + process.data_rank)
    parts = parts_of(batch)
    loss = cached_backward(engine, parts, CHUNK_TOKENS, lambda e: losses_of(e, batch, "world").mean(), synchronise=True)
    state = torch.get_rng_state()
    plain = build().train()
    torch.manual_seed(7 + process.data_rank)
    pieces = [(chunk, plain(chunk.tokens)) for chunk in split_parts(parts, CHUNK_TOKENS)]
    embeddings = []
    for part in range(2):
        order = torch.cat([chunk.rows for chunk, _ in pieces if chunk.part == part])
        embeddings.append(torch.cat([piece for chunk, piece in pieces if chunk.part == part])[order.argsort()])
    plain_loss = losses_of(embeddings, batch, "world").mean()
    plain_loss.backward()
    after = torch.get_rng_state()
    averaged = {name: sum_over_ranks(g) / process.data_size for name, g in gradients(plain).items()}
    return {
        "loss": (loss, plain_loss.detach()),
        "gradients": (gradients(engine.encoder), averaged),
        "generators": (state, after),
        "drawn anew": [plain(pieces[0][0].tokens).detach() for _ in range(2)],
    }


def uneven_batch(own):
    """Ids, embeddings [rows, 16] and [columns, 16] float64, and weights of the rows, of all ranks."""
    batch = toy_batch(90, UNEVEN_ROWS)
    if own:  # of one rank only
        batch.own_negatives_only[0] = True
    generator = torch.Generator().manual_seed(5)
    sizes = UNEVEN_ROWS, len(batch.document_ids)
    vectors = [torch.randn(size, 16, generator=generator, dtype=torch.float64) for size in sizes]
    weights = torch.rand(UNEVEN_ROWS, generator=generator, dtype=torch.float64)
    return batch, [torch.nn.functional.normalize(part, dim=1) for part in vectors], weights


def check_columns(process, *, way, own, dtype, implementation, weighted):
    """Losses of this rank's rows over the columns of all, and gradients of the weighted sum of those of all ranks."""
    batch, (queries, documents), weights = uneven_batch(own)
    rows = slices(process.data_size, UNEVEN_ROWS)[process.data_rank]
    mine, per_query = rows_of_batch(batch, rows), len(documents) // len(queries)
    columns = slice(rows.start * per_query, rows.stop * per_query)
    queries, documents = (part.to(dtype).requires_grad_() for part in (queries[rows], documents[columns]))
    loss = dataclasses.replace(LOSS, implementation=implementation, ring_above_mb=0 if way == "ring" else 2048)
    block = build_score_block(queries, documents, mine, negatives="world", temperature=0.05, loss=loss)
    ring = way == "ring" and process.data_size > 1
    assert (block.ring_sizes is not None) == ring
    assert len(block.documents) == (len(documents) if ring else len(batch.document_ids))
    if weighted:
        total, losses = block.weighted(weights[rows].to(dtype))
    else:
        losses = block.row_losses()
        total = (losses * weights[rows].to(dtype)).sum()
    total.backward()
    return {"losses": losses.detach(), "queries": queries.grad, "documents": documents.grad}


def check_all_columns(process):
    ways = [(torch.float64, "torch"), (torch.float32, "torch"), *([(torch.float32, "fused")] if load().cpu else [])]
    return {
        (way, own, str(dtype), implementation, weighted): check_columns(
            process, way=way, own=own, dtype=dtype, implementation=implementation, weighted=weighted
        )
        for dtype, implementation in ways
        for way in ("gather", "ring")
        for own in (False, True)
        for weighted in (False, True)
    }


def check_gather(process):
    """Rank r brings r rows; every rank weighs all rows by its own number."""
    rank, world = process.data_rank, process.data_size
    mine = torch.full((rank, 2), float(rank), requires_grad=True)
    everything = gather_rows(mine)
    (everything * (rank + 1)).sum().backward()
    equal = torch.ones(3, 2, requires_grad=True)
    (gather_rows(equal) * (rank + 1)).sum().backward()
    return {
        "rows": everything.detach(),
        "gradient": mine.grad,
        "scattered": _reduce_scatter((rank + 1.0) * torch.ones(len(everything), 2), list(range(world))),
        "equal_gradient": equal.grad,
        "ids": gather_ids(torch.arange(rank) + 10 * rank),
        "values": gather_values(torch.tensor([0.5 * rank])),
        "none": any_rank(False),
        "last": any_rank(rank == world - 1),
        "sum": sum_over_ranks(torch.tensor([1.0, rank], dtype=torch.float64)),
        "first": broadcast_from_first(torch.tensor([float(rank + 5)])),
    }


def check_resume(process, batch):
    """States after 3 unbroken steps, and after 2 steps, a new engine, and 1 step."""

    def step(engine):
        engine.backward(losses_of(engine.embed(parts_of(batch)), batch, "world").mean(), synchronise=True)
        engine.step()

    unbroken = TorchEngine(ToyEncoder(), process, TRAINING)
    for number in range(3):
        if number == 2:
            state = state_of(unbroken)
            saved = {"tensors": {k: v.clone() for k, v in state["tensors"].items()}, "values": state["values"]}
        step(unbroken)
    resumed = TorchEngine(ToyEncoder(seed=1), process, TRAINING)
    resumed.encoder.frozen.load_state_dict(unbroken.encoder.frozen.state_dict())  # comes from the backbone's files
    resumed.load_state_dict(saved)
    step(resumed)
    return state_of(unbroken)["tensors"], state_of(resumed)["tensors"]


def check_all(process):
    world, rank = process.data_size, process.data_rank
    whole, other = toy_batch(1, ROWS, own_task=1), toy_batch(50, ROWS)
    mine, my_other = (rows_of_batch(batch, slices(world)[rank]) for batch in (whole, other))
    uneven = toy_batch(90, UNEVEN_ROWS, own_task=0)
    my_uneven = rows_of_batch(uneven, slices(world, UNEVEN_ROWS)[rank])
    encoder = ToyEncoder()
    return {
        "policies": check_policies(process, mine),
        "cache": check_cache(process, mine, my_other),
        "dropout": check_dropout_replay(process, mine, toy_with_dropout),
        "backbone": check_dropout_replay(process, mine, tiny_with_dropout) if world == 2 else None,  # it takes its time
        "resume": check_resume(process, mine),
        "uneven": losses_of([encoder(part) for part in parts_of(my_uneven)], my_uneven, "world").detach(),
        "columns": check_all_columns(process),
    }


def main(folder, rank, world, rendezvous):
    config = ParallelConfig(backend="gloo", threads_per_rank=1, timeout_seconds=60)
    process = start_process(config, rank=rank, world=world, local_rank=rank, rendezvous=rendezvous)
    results = check_all(process) | {"gather": check_gather(process)}
    torch.save(results, Path(folder) / f"{rank}.pt")
    wait_for_all()
    end_process()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
