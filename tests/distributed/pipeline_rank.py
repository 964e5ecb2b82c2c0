"""One rank of the pipeline checks: python pipeline_rank.py <folder> <rank> <world> <rendezvous>; writes <rank>.pt.

The process group is started once and laid out anew for each case: a launch costs more than a case. <folder>/inputs has
what the test made beforehand: model folders, and the state of one process.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tdro_hpc.config.schema import LoraConfig, LossConfig, ModelConfig, ParallelConfig, TrainingConfig
from tdro_hpc.encoders.backbone import load_encoder
from tdro_hpc.losses.gradcache import cached_backward, split_parts
from tdro_hpc.losses.score_block import build_score_block
from tdro_hpc.parallel import process as processes
from tdro_hpc.parallel.mesh import Mesh, build_groups
from tdro_hpc.parallel.objects import gather_objects
from tdro_hpc.parallel.pipeline.engine import PipelineEngine
from tdro_hpc.parallel.pipeline.forward import FrozenPipeline
from tdro_hpc.parallel.process import Process, end_process, start_process, wait_for_all
from tdro_hpc.parallel.slices import Slice
from tdro_hpc.parallel.torch_engine import TorchEngine
from tests.reference.toy import rows_of_batch, toy_batch, toy_tokens

ROWS = 4  # of the batch of all ranks
STEPS = 3
CHUNK_TOKENS = 130
# Adam divides by the root of the second moment, which makes rounding of tiny gradients large: a large epsilon does not.
TRAINING = TrainingConfig(learning_rate=0.01, warmup_steps=0, steps=10, max_grad_norm=0.5, adam_epsilon=1e-3)
LORA = LoraConfig(rank=3, alpha=6.0, dropout=0.0)
FULL = replace(LORA, enabled=False)
PLAIN = ModelConfig(autocast="float32", gradient_checkpointing=False, lora=FULL)
BFLOAT16 = {"weights_dtype": "bfloat16", "autocast": "bfloat16"}


def models(inputs):
    """What is trained, by the name that cases use."""
    return {
        "qwen2": replace(PLAIN, name="tiny:qwen2"),
        "qwen3": replace(PLAIN, name="tiny:qwen3", pooling="mean", gradient_checkpointing=True),
        "mistral": replace(
            PLAIN, name="tiny:mistral", attention="padding_free", pooling="cls", bidirectional=True, similarity="dot"
        ),
        "llama": replace(PLAIN, name="tiny:llama", gradient_checkpointing=True, attention="padding_free"),
        "qwen2 lora": replace(PLAIN, name="tiny:qwen2", lora=LORA, gradient_checkpointing=True),
        "qwen3 lora": replace(PLAIN, name="tiny:qwen3", lora=LORA, attention="padding_free"),
        "llama lora": replace(PLAIN, name="tiny:llama", lora=replace(LORA, targets="q_proj,o_proj,down_proj")),
        "qwen3 bf16": replace(PLAIN, name=str(inputs / "sharded"), **BFLOAT16),
        "qwen3 lora bf16": replace(PLAIN, name=str(inputs / "sharded"), lora=LORA, **BFLOAT16),
        "qwen3 autocast": replace(PLAIN, name=str(inputs / "sharded"), autocast="bfloat16"),
    }


@dataclass(frozen=True)
class Case:
    model: str
    pp: int
    tp: int
    dp: int = 1
    zero: int = 0
    resume: bool = False  # also stop before the last step and go on in a new engine
    unclipped: bool = False

    @property
    def world(self):
        return self.pp * self.tp * self.dp

    @property
    def training(self):
        return replace(TRAINING, max_grad_norm=0.0) if self.unclipped else TRAINING

    def __str__(self):
        return f"{self.model}, pp{self.pp} tp{self.tp} dp{self.dp} zero{self.zero}"


CASES = [
    Case("qwen2", 2, 1, unclipped=True),
    Case("llama", 1, 2),
    Case("qwen3", 2, 2, resume=True),
    Case("qwen2", 2, 2, zero=1),
    Case("mistral", 2, 1, 2, zero=1, resume=True),
    Case("llama", 1, 2, 2),
    Case("qwen2 lora", 2, 2, resume=True),
    Case("qwen3 lora", 1, 2, 2, zero=1, unclipped=True),
    Case("llama lora", 4, 1),
    Case("qwen3 bf16", 2, 2, resume=True),
    Case("qwen3 lora bf16", 2, 1, 2),
    Case("qwen3 autocast", 1, 2, 2, zero=1),
    Case("qwen3", 2, 2, 2, zero=1),
    Case("qwen3 lora", 2, 2, 2),
]


def lay_out(rank, pp, tp, dp):
    """The process of a rank in a layout; its groups are made, too. All ranks call it together."""
    mesh = Mesh(pp, dp, tp)
    processes._groups = build_groups(mesh, rank)
    pipeline_rank, data_rank, tensor_rank = mesh.place(rank)
    return Process(data_rank, dp, rank, torch.device("cpu"), pipeline_rank, pp, tensor_rank, tp)


def batch_of(process, seed):
    """This rank's rows of a batch, with texts long enough for a window of 64 tokens."""
    batch = toy_batch(seed, ROWS)
    batch.passage_tokens = toy_tokens(seed + 1, len(batch.document_ids), width=80, side="left")
    first, stop = (ROWS * number // process.data_size for number in (process.data_rank, process.data_rank + 1))
    return rows_of_batch(batch, slice(first, stop))


def micro_step(engine, seed, *, last, share=1.0):
    """Gradients of one micro-batch; its embeddings, row losses and number of chunks."""
    batch, found = batch_of(engine.process, seed), {}
    parts = [batch.query_tokens, batch.passage_tokens]

    def loss_of(embeddings):
        scale = 1.0 if embeddings[0].detach().norm(dim=1).max() < 1.1 else 100.0  # dot products are larger
        block = build_score_block(*embeddings, batch, negatives="world", temperature=0.5 * scale, loss=LossConfig())
        losses = block.row_losses()
        found.update(losses=losses.detach(), embeddings=[embedding.detach().clone() for embedding in embeddings])
        return losses.mean() * share

    cached_backward(engine, parts, CHUNK_TOKENS, loss_of, synchronise=last)
    return found | {"chunks": len(split_parts(parts, CHUNK_TOKENS))}


def one_step(engine, step):
    """One optimiser step, of two micro-steps where it is the second; what the last micro-step gave, and the norm."""
    if step == 1:
        micro_step(engine, 50, last=False, share=0.5)
    seen = micro_step(engine, step, last=True, share=0.5 if step == 1 else 1.0)
    return seen | {"norm": engine.step()}


def written(engine):
    """A copy of what this rank writes; slices as (tensor, shape, dim, start)."""
    state = engine.state_dict()
    tensors = {
        name: (value.tensor.clone(), value.shape, value.dim, value.start) if isinstance(value, Slice) else value.clone()
        for name, value in state["tensors"].items()
    }
    return {"tensors": tensors, "values": state["values"]}


def put_together(states):
    """The whole state from what all ranks wrote, each row of it once."""
    whole, rows = {}, {}
    for name, value in (item for state in states for item in state["tensors"].items()):
        tensor, shape, dim, start = value if isinstance(value, tuple) else (value, value.shape, 0, 0)
        if not shape:
            assert name not in whole, f"{name} is written twice"
            whole[name] = tensor
            continue
        target = whole.setdefault(name, torch.zeros(shape, dtype=tensor.dtype))
        target.narrow(dim, start, tensor.shape[dim]).copy_(tensor)
        rows.setdefault(name, []).extend(range(start, start + tensor.shape[dim]))
        assert len(rows[name]) <= shape[dim], f"{name} is written twice"
    assert all(len(set(rows[name])) in whole[name].shape for name in rows), "a slice is missing"
    return {"tensors": whole, "values": states[0]["values"]}


def train(engine):
    """All steps; what they gave, and what this rank writes after the first, before the last and at the end."""
    steps, states = [], {}
    for step in range(STEPS):
        if step == STEPS - 1:
            states["before"] = written(engine)
        steps.append(one_step(engine, step))
        if step == 0:
            states["first"] = written(engine)
    return {"steps": steps, "states": states | {"last": written(engine)}, "counts": engine.parameter_counts}


def alone(model, training=TRAINING):
    """The same in one process by the torch engine."""
    return train(torch_engine(model, training))


def torch_engine(model, training=TRAINING):
    encoder = load_encoder(model, device="cpu", seed=5)
    return TorchEngine(encoder, Process(0, 1, 0, torch.device("cpu")), training)


def build_engine(inputs, process, case, *, seed=5):
    parallel = ParallelConfig(engine="deepspeed", zero=case.zero, pp=case.pp, tp=case.tp)
    return PipelineEngine(models(inputs)[case.model], process, case.training, parallel, seed=seed)


def run_case(inputs, rank, case):
    process = lay_out(rank, case.pp, case.tp, case.dp)
    engine = build_engine(inputs, process, case)
    found = train(engine) | {"place": (process.pipeline_rank, process.data_rank, process.tensor_rank)}
    if case.resume:
        whole = put_together(gather_objects(found["states"]["before"]))
        resumed = build_engine(inputs, process, case, seed=6)
        resumed.load_state_dict(whole)
        one_step(resumed, STEPS - 1)
        found["resumed"] = written(resumed)
    return found


def check_other_layout(inputs, rank):
    """The last step in this layout, of a run whose steps before it were done in one process."""
    case = next(case for case in CASES if case.model == "qwen3" and case.world == 4)
    engine = build_engine(inputs, lay_out(rank, case.pp, case.tp, case.dp), case)
    engine.load_state_dict(torch.load(inputs / "alone.pt", weights_only=True))
    one_step(engine, STEPS - 1)
    try:
        engine.load_state_dict({"tensors": {"parameter.other": torch.zeros(2)}, "values": {}})
    except ValueError as error:
        return written(engine), str(error)
    raise AssertionError("a state of another model is refused")


def check_frozen(inputs, rank):
    """Embeddings by saved models, of all weights and of an adapter on a tiny backbone."""
    process = lay_out(rank, 2, 2, 1)
    chunks = [toy_tokens(seed, 3, width=30) for seed in (1, 2, 3)]
    found = {}
    for name in ("saved", "adapter"):
        frozen = FrozenPipeline(replace(PLAIN, name="tiny:qwen2"), process, folder=inputs / name, seed=7)
        found[name] = [embedding.clone() for embedding in frozen.embed_chunks(chunks)]
    return found


def main(folder, rank, world, rendezvous):
    config = ParallelConfig(backend="gloo", threads_per_rank=1, timeout_seconds=120)
    start_process(config, rank=rank, world=world, local_rank=rank, rendezvous=rendezvous)
    inputs = Path(folder) / "inputs"
    found = {str(case): run_case(inputs, rank, case) for case in CASES if case.world == world}
    if world == 4:
        found |= {"other layout": check_other_layout(inputs, rank), "frozen": check_frozen(inputs, rank)}
    torch.save(found, Path(folder) / f"{rank}.pt")
    wait_for_all()
    end_process()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
