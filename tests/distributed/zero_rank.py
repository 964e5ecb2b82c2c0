"""One rank of the tests of the ZeRO engine: python zero_rank.py <folder> <rank> <world> <rendezvous> <check> ...

Leaves figures-<rank>.json, {check: {name: number}}, for test_zero.py to judge.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from tdro_hpc.config.schema import ParallelConfig
from tdro_hpc.encoders import tiny
from tdro_hpc.parallel.frozen import freeze
from tdro_hpc.parallel.objects import gather_objects
from tdro_hpc.parallel.process import Process, end_process, start_process, sum_over_ranks
from tdro_hpc.parallel.torch_engine import TorchEngine
from tdro_hpc.parallel.zero import engine as zero_engine
from tdro_hpc.parallel.zero.engine import ZeroEngine
from tests.distributed.zero_cases import (
    STEPS,
    TRAINING,
    Trace,
    encoder_of,
    gap,
    gaps,
    layout,
    model,
    torch_gradients,
    train,
    zero_gradients,
)
from tests.reference.toy import toy_tokens

ALONE = Process(data_rank=0, data_size=1, local_rank=0, device=torch.device("cpu"))
UNEVEN = (90, 45)  # tokens of a chunk on each rank: they have different numbers of chunks
EQUAL = {  # name: (model, layout, in chunks)
    "zero0": (model(), layout(0), True),
    "zero1": (model(), layout(1), True),
    "zero2": (model(gradient_checkpointing=True), layout(2), True),
    "zero3": (model(), layout(3), True),
    "whole": (model(gradient_checkpointing=True), layout(3), False),
    "lora3": (model(lora=True, gradient_checkpointing=True), layout(3), True),
    "offload2": (model(lora=True), layout(2, offload=True), True),
    "offload3": (model(lora=True), layout(3, offload=True), True),
}
_references: dict[str, tuple[Trace, dict]] = {}


def reference(config) -> tuple[Trace, dict]:
    """Trace and state of one process in float32 with all rows."""
    config = replace(config, gradient_checkpointing=False, weights_dtype="float32")
    if str(config) not in _references:
        engine = TorchEngine(encoder_of(config), ALONE, TRAINING)
        trace = train(engine, steps=range(STEPS), chunk_tokens=None, gradients_of=torch_gradients)
        _references[str(config)] = trace, engine.state_dict()["tensors"]
    return _references[str(config)]


def whole_state(engine) -> dict:
    """What all ranks write, together; an assertion if one tensor is written twice."""
    parts = gather_objects(engine.state_dict())
    tensors = {name: tensor.clone() for part in parts for name, tensor in part["tensors"].items()}
    assert len(tensors) == sum(len(part["tensors"]) for part in parts)
    return {"tensors": tensors, "values": parts[0]["values"]}


def differing(found: dict, wanted: dict) -> float:
    """Number of tensors that are not bit-equal."""
    assert found.keys() == wanted.keys(), sorted(found.keys() ^ wanted.keys())[:5]
    return float(sum(not torch.equal(found[name], tensor) for name, tensor in wanted.items()))


def distance(found: dict, wanted: dict, kind: str = "parameter.") -> float:
    return max(gap(found[name], tensor) for name, tensor in wanted.items() if name.startswith(kind))


def check_equal(name: str, process: Process) -> dict[str, float]:
    config, parallel, chunked = EQUAL[name]
    wanted, wanted_state = reference(config)
    engine = ZeroEngine(encoder_of(config), process, TRAINING, parallel)
    chunk_tokens = UNEVEN[process.data_rank] if chunked else None
    found = train(engine, steps=range(STEPS), chunk_tokens=chunk_tokens, gradients_of=zero_gradients)
    losses = sum_over_ranks(torch.stack(found.losses)) / process.data_size
    figures = gaps(found, wanted, process) | {"loss": gap(losses, torch.stack(wanted.losses))}
    state = whole_state(engine)["tensors"]
    figures["names"] = float(len(state.keys() ^ wanted_state.keys()))
    figures["steps"] = max(float(t) for key, t in state.items() if key.startswith("optimizer.step")) - STEPS
    return figures | {
        "parameters": distance(state, wanted_state),
        "moments": distance(state, wanted_state, "optimizer.exp"),
    }


def check_bfloat16(process: Process) -> dict[str, float]:
    """Distances from float32 in bf16, for each stage, and that masters have more digits than the weights."""
    wanted, wanted_state = reference(model())
    figures: dict[str, float] = {}
    for zero, offload in ((1, False), (1, True), (2, False), (3, False)):
        engine = ZeroEngine(
            encoder_of(model(weights_dtype="bfloat16")), process, TRAINING, layout(zero, offload=offload)
        )
        found = train(engine, steps=range(STEPS), chunk_tokens=UNEVEN[process.data_rank], gradients_of=zero_gradients)
        label = f"{zero}{'-offload' if offload else ''}"
        figures |= {f"{key} {label}": figure for key, figure in gaps(found, wanted, process).items()}
        state = whole_state(engine)["tensors"]
        figures[f"parameters {label}"] = distance(state, wanted_state)
        masters = [tensor for name, tensor in state.items() if name.startswith("parameter.")]
        figures[f"rounded masters {label}"] = float(sum(torch.equal(m, m.bfloat16().float()) for m in masters))
        figures[f"wide weights {label}"] = float(sum(p.dtype != torch.bfloat16 for p in engine.encoder.parameters()))
        # One engine from another in the middle of training: masters and moments, not only weights.
        other = ZeroEngine(encoder_of(model(weights_dtype="bfloat16")), process, TRAINING, layout(3 if zero < 3 else 2))
        other.load_state_dict(whole_state(engine))
        figures[f"loaded {label}"] = differing(whole_state(other)["tensors"], state)
        more = [train(one, steps=range(3, 4), chunk_tokens=None).norms[0] for one in (engine, other)]
        figures[f"continued {label}"] = gap(*more)
    return figures


def check_resume(process: Process) -> dict[str, float]:
    """Bits after stop and resume in one layout; distances after a change of layout."""
    figures = {}
    config = model(lora=True, dropout=0.2)
    for zero in (0, 1, 2, 3):
        torch.manual_seed(5 + process.data_rank)
        unbroken = ZeroEngine(encoder_of(config), process, TRAINING, layout(zero))
        train(unbroken, steps=range(1), chunk_tokens=70)
        saved, draws = whole_state(unbroken), torch.get_rng_state()
        wanted = train(unbroken, steps=range(1, 2), chunk_tokens=70).norms
        resumed = ZeroEngine(encoder_of(config), process, TRAINING, layout(zero))
        train(resumed, steps=range(7, 8), chunk_tokens=70)  # moments and a step count of its own, to be replaced
        resumed.load_state_dict(saved)
        figures[f"loaded {zero}"] = differing(whole_state(resumed)["tensors"], saved["tensors"])
        torch.set_rng_state(draws)
        found = train(resumed, steps=range(1, 2), chunk_tokens=70).norms
        figures[f"norms {zero}"] = float(not torch.equal(torch.stack(found), torch.stack(wanted)))
        figures[f"state {zero}"] = differing(whole_state(resumed)["tensors"], whole_state(unbroken)["tensors"])
        figures[f"steps {zero}"] = float(resumed.steps_done - 2)
    return figures


def check_layouts(process: Process) -> dict[str, float]:
    """Saved under one layout, loaded into others: bits when loaded, distances two steps later."""
    config, figures = model(), {}
    alone = TorchEngine(encoder_of(config), ALONE, TRAINING)
    train(alone, steps=range(2), chunk_tokens=None)
    sources = {"torch": {"tensors": {k: t.clone() for k, t in alone.state_dict()["tensors"].items()}}}
    sources["torch"]["values"] = {"steps_done": 2, "scaler": {}}
    train(alone, steps=range(2, 4), chunk_tokens=None)
    wanted = alone.state_dict()["tensors"]
    saving = ZeroEngine(encoder_of(config), process, TRAINING, layout(2))
    train(saving, steps=range(2), chunk_tokens=70)
    sources["zero2"] = whole_state(saving)
    for source, target in (("zero2", "torch"), ("zero2", "1"), ("zero2", "3"), ("torch", "3"), ("torch", "0")):
        fresh = encoder_of(config)
        engine = (
            TorchEngine(fresh, ALONE, TRAINING)
            if target == "torch"
            else ZeroEngine(fresh, process, TRAINING, layout(int(target)))
        )
        engine.load_state_dict(sources[source])
        state = engine.state_dict() if target == "torch" else whole_state(engine)
        figures[f"loaded {source} {target}"] = differing(state["tensors"], sources[source]["tensors"])
        train(engine, steps=range(2, 4), chunk_tokens=None)
        state = engine.state_dict() if target == "torch" else whole_state(engine)
        figures[f"continued {source} {target}"] = distance(state["tensors"], wanted)
    return figures


def check_draws(process: Process) -> dict[str, float]:
    """Whether the second pass of gradient caching draws what the first drew, under ZeRO-3 with dropout."""
    engine = ZeroEngine(encoder_of(model(lora=True, dropout=0.3)), process, TRAINING, layout(3))
    replayed = []
    engine.encoder.register_forward_hook(
        lambda module, inputs, output: replayed.append(output.detach()) if torch.is_grad_enabled() else None
    )
    chunks = [toy_tokens(seed, 2) for seed in range(3 + process.data_rank)]
    first = engine.embed_chunks(chunks)
    engine.backward_chunks(chunks, [torch.ones_like(e) for e in first], synchronise=True)
    second = replayed[::-1][-len(chunks) :]  # the rank with fewer chunks embedded one that was added, before the others
    passes = len(replayed)
    again = engine.embed_chunks(chunks)
    return {
        "passes": float(passes - 4),
        "other": float(sum(not torch.equal(a, b) for a, b in zip(first, second, strict=True))),
        "same without replay": float(sum(torch.equal(a, b) for a, b in zip(first, again, strict=True))),
    }


def check_frozen(process: Process) -> dict[str, float]:
    """The frozen model split over ranks against the whole one, with adapters in float32 on bfloat16 weights too."""
    figures = {}
    chunks = [toy_tokens(seed, 3) for seed in range(2 + process.data_rank)]
    for config in (model(), model(lora=True, dropout=0.3), model(lora=True, weights_dtype="bfloat16")):
        wanted = freeze(encoder_of(config), process, ParallelConfig()).embed_chunks(chunks)
        split = freeze(encoder_of(config), process, layout(3))
        found = [split.embed_chunks(chunks) for _ in range(2)][-1]
        label = f"{config.weights_dtype} {config.lora.enabled}"
        figures[f"distance {label}"] = max(gap(a, b) for a, b in zip(found, wanted, strict=True))
        parameters = list(split._engine.module.parameters())
        figures[f"held {label}"] = sum(p.ds_tensor.numel() for p in parameters) / sum(p.ds_numel for p in parameters)
        figures[f"trained {label}"] = float(any(p.requires_grad for p in parameters))
    return figures


def check_broken(process: Process) -> dict[str, float]:
    """Whether a gradient that is not finite on one rank shows in the norm on all, whatever DeepSpeed does with it."""
    figures = {}
    for dtype, zero in (("float32", 1), ("float32", 3), ("bfloat16", 1), ("bfloat16", 2)):
        engine = ZeroEngine(encoder_of(model(lora=True, weights_dtype=dtype)), process, TRAINING, layout(zero))
        (embeddings,) = engine.embed([toy_tokens(1, 2)])
        scale = float("inf") if process.data_rank == process.data_size - 1 else 1.0
        engine.backward(embeddings.sum() * scale, synchronise=True)
        figures[f"{dtype} {zero}"] = float(engine.step().isfinite())
    return figures


def check_compiled(process: Process) -> dict[str, float]:
    """Number of files that were made for operators of DeepSpeed: this check comes last."""
    return {"files": float(len(list(Path(os.environ["TORCH_EXTENSIONS_DIR"]).rglob("*"))))}


def main() -> None:
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder / f"extensions-{rank}")
    zero_engine.PERSISTENT_ELEMENTS = 200  # so that matrices of the tiny models are split, too
    tiny._DECODER_SHAPE["num_hidden_layers"] = 2
    process = start_process(
        ParallelConfig(threads_per_rank=1), rank=rank, world=world, local_rank=rank, rendezvous=sys.argv[4]
    )
    figures = {}
    for check in sys.argv[5:]:
        figures[check] = check_equal(check, process) if check in EQUAL else globals()[f"check_{check}"](process)
        (folder / f"figures-{rank}.json").write_text(json.dumps(figures))
    end_process()


if __name__ == "__main__":
    main()
