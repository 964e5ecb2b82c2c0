"""One rank of the ring checks: python ring_rank.py <folder> <rank> <world> <rendezvous>. Writes <folder>/<rank>.pt."""

import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tdro_hpc.config.schema import LossConfig, ParallelConfig, TrainingConfig
from tdro_hpc.losses import torch_core
from tdro_hpc.losses.gradcache import cached_backward
from tdro_hpc.losses.infonce import grouped_infonce
from tdro_hpc.losses.library import load
from tdro_hpc.losses.ring import _GRADIENTS_TAG, ring_infonce
from tdro_hpc.losses.score_block import build_score_block
from tdro_hpc.parallel.gather import gather_rows, rows_of_ranks
from tdro_hpc.parallel.process import end_process, start_process, wait_for_all
from tdro_hpc.parallel.torch_engine import TorchEngine
from tests.reference.toy import ToyEncoder, rows_of_batch, toy_batch

PER_QUERY, WIDTH = 3, 16
CASES = {
    "plain": {},
    "groups": {"query_group": True},
    "duplicates": {"document_ids": True},
    "all": {"query_group": True, "document_ids": True, "known_positive_ids": True, "false_negative_margin": -0.2},
    "kept": {"document_ids": True, "known_positive_ids": True, "keep_duplicates": True},
    "learned temperature": {"document_ids": True},
}
TYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TRAINING = TrainingConfig(learning_rate=0.01, warmup_steps=0, steps=10)
ROWS = 11  # of the batch of all ranks: the ranks have different numbers
RING, GATHER = (LossConfig(false_negative_margin=-0.2, ring_above_mb=limit) for limit in (0, 2048))


def rows_of(world):
    """Rows of each rank, no two the same."""
    return [2 + 3 * rank for rank in range(world)]


def problem(rank, world, dtype):
    """What a rank brings: queries, documents, positives, and every option of the loss."""
    generator = torch.Generator().manual_seed(7 * rank)
    rows = rows_of(world)[rank]
    vectors = [torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) for n in (rows, rows * PER_QUERY)]
    queries, documents = (torch.nn.functional.normalize(part, dim=1).to(dtype).requires_grad_() for part in vectors)
    groups = torch.randint(0, 2, (rows,), generator=generator)
    options = {
        "query_group": groups,
        "document_group": groups.repeat_interleave(PER_QUERY),
        "document_ids": torch.randint(0, 25, (rows * PER_QUERY,), generator=generator),
        "known_positive_ids": torch.randint(-1, 25, (rows, 2), generator=generator),
        "false_negative_margin": -0.2,
        "keep_duplicates": True,
    }
    weights = torch.rand(rows, generator=generator, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32))
    return queries, documents, PER_QUERY * torch.arange(rows), options, weights


def chosen(options, case):
    names = [*CASES[case], *(["document_group"] if "query_group" in CASES[case] else [])]
    return {name: options[name] for name in names}


def temperature_of(case):
    return torch.tensor(0.05, dtype=torch.float64, requires_grad=case == "learned temperature")


def check_exactness(process, case, dtype, implementation):
    """Losses, and gradients of their weighted sum over all ranks."""
    queries, documents, positives, options, weights = problem(process.data_rank, process.data_size, dtype)
    temperature = temperature_of(case)
    losses = ring_infonce(
        queries,
        documents,
        positives,
        sizes=rows_of_ranks(len(documents)),
        temperature=temperature,
        implementation=implementation,
        **chosen(options, case),
    )
    (weights * losses).sum().backward()
    found = {"losses": losses.detach(), "queries": queries.grad, "documents": documents.grad}
    return found | ({} if temperature.grad is None else {"temperature": temperature.grad})


def check_training(process, loss):
    """Row losses and averaged gradients of a data-parallel step: plain, and under gradient caching with row weights."""
    world, rank = process.data_size, process.data_rank
    rows = slice(ROWS * rank // world, ROWS * (rank + 1) // world)
    batch = rows_of_batch(toy_batch(1, ROWS, own_task=1), rows)
    parts, kept = [batch.query_tokens, batch.passage_tokens], []
    weights = torch.full((len(batch.task_ids),), world / ROWS)

    def block_of(embeddings):
        return build_score_block(*embeddings, batch, negatives="world", temperature=0.05, loss=loss)

    def of_rows(embeddings):
        kept.append(block_of(embeddings).row_losses())
        return (kept[-1] * weights).sum()

    def weighted(embeddings):
        total, losses = block_of(embeddings).weighted(weights)
        assert not losses.requires_grad
        kept.append(losses)
        return total

    plain, cached = TorchEngine(ToyEncoder(), process, TRAINING), TorchEngine(ToyEncoder(), process, TRAINING)
    plain.backward(of_rows(plain.embed(parts)), synchronise=True)
    cached_backward(cached, parts, 20, weighted, synchronise=True)
    found = [
        {name: p.grad.clone() for name, p in engine.encoder.named_parameters() if p.grad is not None}
        for engine in (plain, cached)
    ]
    return {"losses": [losses.detach() for losses in kept], "gradients": found}


def check_choice(process):
    """Whether the columns go round, and how many are here, around a limit of 1 MB; ranks bring different numbers."""
    found = []
    for columns in (970, 980):  # 1 MB is 976.56 columns of 1024 bytes for each of the ranks
        rows = columns + (1 - 2 * (process.data_rank % 2))
        batch = toy_batch(1, rows, per_query=1)
        vectors = torch.zeros(rows, 256 // process.data_size)
        loss = LossConfig(ring_above_mb=1)
        block = build_score_block(vectors, vectors, batch, negatives="world", temperature=0.05, loss=loss)
        found.append((block.ring_sizes, len(block.documents)))
    return found


class PeakBytes(TorchDispatchMode):
    """Most bytes that the tensors made under it had at one time."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return result


def counted(function, pairs):
    """The function, which also notes how many pairs of a row and a column it looks at."""

    def counting(queries, documents, *arguments):
        pairs.append(len(queries) * len(documents))
        return function(queries, documents, *arguments)

    return counting


def check_cost(process, *, ring):
    """Scores made for loss and gradients, and the most memory that each of the two takes, in shards of columns."""
    rows, columns, width = 4, 512, 256
    generator = torch.Generator().manual_seed(process.data_rank)
    queries, documents = (torch.randn(n, width, generator=generator).requires_grad_() for n in (rows, columns))
    sizes, positives = rows_of_ranks(columns), torch.arange(rows)
    pairs = []
    counting = {name: counted(getattr(torch_core, name), pairs) for name in ("forward", "backward")}
    with mock.patch.multiple(torch_core, **counting):
        with PeakBytes() as forward:
            if ring:
                options = {"sizes": sizes, "temperature": 9.0, "implementation": "torch"}
                losses = ring_infonce(queries, documents, positives, **options)
            else:
                everything = gather_rows(documents, sizes)
                first = sum(sizes[: process.data_rank])
                options = {"temperature": 9.0, "implementation": "torch"}
                losses = grouped_infonce(queries, everything, first + positives, **options)
        total = losses.sum()
        with PeakBytes() as backward:
            torch.autograd.grad(total, [queries, documents])
    shard = columns * width * 4
    return {"scores": sum(pairs), "forward": forward.most / shard, "backward": backward.most / shard}


class Noted:
    """A part of an exchange that is under way. When it is waited for is noted in `events`."""

    def __init__(self, work, exchange, events):
        self.work, self.exchange, self.events = work, exchange, events

    def wait(self):
        self.events.append(f"{self.exchange} waited for")
        return self.work.wait()


def check_order(process):
    """What forward and backward do, in order: exchanges begun and waited for, and computations; each is numbered."""
    queries, documents, positives, _, weights = problem(process.data_rank, process.data_size, torch.float32)
    events, begin = [], dist.batch_isend_irecv

    def numbered(what, state):
        return f"{what} {sum(event.startswith(what) and event.endswith(state) for event in events)}"

    def beginning(operations):
        exchange = numbered("gradients" if operations[0].tag >= _GRADIENTS_TAG else "columns", "begun")
        events.append(f"{exchange} begun")
        return [Noted(work, exchange, events) for work in begin(operations)]

    def computing(function):
        def compute(*arguments):
            turn = numbered("turn", "computed")
            events.append(f"{turn} computing")
            found = function(*arguments)
            events.append(f"{turn} computed")
            return found

        return compute

    cores = {name: computing(getattr(torch_core, name)) for name in ("forward", "backward")}
    sizes = rows_of_ranks(len(documents))
    with mock.patch.object(dist, "batch_isend_irecv", beginning), mock.patch.multiple(torch_core, **cores):
        losses = ring_infonce(queries, documents, positives, sizes=sizes, temperature=0.05, implementation="torch")
        forward = events.copy()
        events.clear()
        (weights * losses).sum().backward()
    return {"forward": forward, "backward": events}


def check_all(process):
    implementations = ["torch", *(["fused"] if load().cpu else [])]
    return {
        "exact": {
            (case, dtype, implementation): check_exactness(process, case, TYPES[dtype], implementation)
            for case in CASES
            for dtype in TYPES
            for implementation in implementations
            if (dtype, implementation) != ("float64", "fused")
        },
        "training": {"ring": check_training(process, RING), "gather": check_training(process, GATHER)},
        "order": check_order(process),
        "choice": check_choice(process),
        "cost": {"ring": check_cost(process, ring=True), "gather": check_cost(process, ring=False)},
    }


def main(folder, rank, world, rendezvous):
    config = ParallelConfig(backend="gloo", threads_per_rank=1, timeout_seconds=60)
    process = start_process(config, rank=rank, world=world, local_rank=rank, rendezvous=rendezvous)
    torch.save(check_all(process), Path(folder) / f"{rank}.pt")
    wait_for_all()
    end_process()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
