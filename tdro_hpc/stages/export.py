"""A trained model of the run as a folder for transformers, peft and sentence-transformers, with a model card.

One process, no GPU, no process group. Weights go through memory one tensor at a time.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tdro_hpc.atomic import new_folder
from tdro_hpc.config.checks import exported_stage
from tdro_hpc.config.schema import Config, ModelConfig
from tdro_hpc.encoders.export import open_saved, write_adapter, write_merged
from tdro_hpc.encoders.saving import saved_model_config, write_manifest
from tdro_hpc.encoders.sentence_files import prompts_of, write_sentence_files, write_tokenizer
from tdro_hpc.encoders.skeleton import base_on_this_machine
from tdro_hpc.encoders.tokenization import TextTokenizer, load_tokenizer
from tdro_hpc.launch.record import DONE
from tdro_hpc.parallel.process import Process
from tdro_hpc.report.card import ModelFacts, write_card
from tdro_hpc.report.hub import push_folder
from tdro_hpc.report.licences import licence_of
from tdro_hpc.stages.card_facts import describe_data, licence_of_data, longest_text, task_facts
from tdro_hpc.stages.export_inputs import config_of_stage, model_problems, no_checkpoint, saved_steps
from tdro_hpc.stages.export_kept import MODEL, forget, is_kept, keep, source_of
from tdro_hpc.stages.graph import Stage
from tdro_hpc.training.checkpoint import ENGINE, Checkpoint, checkpoint_folder, open_checkpoint
from tdro_hpc.training.stop import Stopped, stop_flag

_STORED = ("parameter.", "buffer.")  # before the names of an encoder's tensors in a checkpoint


@dataclass(frozen=True)
class Trained:
    """The model that is exported, as its stage left it."""

    stage: str
    config: Config  # of its training
    model: ModelConfig
    tensors: Mapping[str, Tensor]  # names of an encoder
    tokenizer: TextTokenizer
    origin: str  # out/model or checkpoints/step-00000100


def run(config: Config, stage: Stage, run_dir: Path, process: Process) -> None:
    """Make out/model from the model that config.export names, then push it where export.push says so.

    A folder whose push failed is pushed as it is when nothing has changed that it was made from.
    """
    assert process.data_size == 1, "stage export runs in one process"
    stage_dir, origin = run_dir / stage.name, origin_of(config, run_dir)
    source, out = source_of(config, run_dir, origin), run_dir / stage.name / MODEL
    if is_kept(stage_dir, source):
        print(f"{stage.name} {out} is whole, from an earlier call: what is left is the push", flush=True)
    else:
        forget(stage_dir)
        _export(config, run_dir, out)
    if config.export.push:
        keep(stage_dir, source)
        push, private = config.export.push, config.export.private
        message = f"{exported_stage(config)}/{origin} of run {run_dir.name}"
        stop = partial(leave_if_asked, step=1)
        push_folder(out, push, private=private, message=message, before_each=stop)


def _export(config: Config, run_dir: Path, out: Path) -> None:
    """Make the folder."""
    trained = open_trained(config, run_dir)
    problems = model_problems(trained.model, config.export)
    if problems:
        raise ValueError("\n".join(problems))
    print(f"export {trained.stage}/{trained.origin} -> {out}", flush=True)
    with new_folder(out) as folder:
        _fill(folder, trained, config, run_dir)
    sizes = [path.stat().st_size for path in out.rglob("*") if path.is_file()]
    print(f"export {out}: {len(sizes)} files, {sum(sizes):,} bytes", flush=True)


def origin_of(config: Config, run_dir: Path) -> str:
    """Where the weights lie under their stage: out/model, or a checkpoint such as checkpoints/step-00000100.

    raises  ValueError  where there is no such checkpoint
    """
    wanted, stage_dir = config.export.checkpoint, run_dir / exported_stage(config)
    if wanted == 0:
        return "out/model"
    steps = saved_steps(stage_dir)
    step = wanted if wanted > 0 else max(steps, default=0)
    if step not in steps:
        raise ValueError(no_checkpoint(stage_dir, wanted, steps))
    return checkpoint_folder(Path("checkpoints"), step).as_posix()


def open_trained(config: Config, run_dir: Path) -> Trained:
    """The model that config.export names; its tensors are read when they are asked for.

    raises  ValueError  where it is not there, or its files are not those that were written
    """
    name, origin = exported_stage(config), origin_of(config, run_dir)
    stage_dir = run_dir / name
    trained = config_of_stage(stage_dir)
    if config.export.checkpoint == 0:
        folder = stage_dir / origin
        model = saved_model_config(trained.model, folder)
        return Trained(name, trained, model, open_saved(folder), load_tokenizer(model, folder), origin)
    tensors = CheckpointTensors(_open_whole(stage_dir, origin))
    return Trained(name, trained, trained.model, tensors, load_tokenizer(trained.model), origin)


def _open_whole(stage_dir: Path, origin: str) -> Checkpoint:
    """The checkpoint after a look at its checksums; a ValueError names one to export in its place."""
    try:
        return open_checkpoint(stage_dir / origin)
    except ValueError as error:
        steps = saved_steps(stage_dir)
        earlier = [step for step in steps if checkpoint_folder(Path("checkpoints"), step).as_posix() < origin]
        if not earlier:
            raise
        raise ValueError(f"{error} Or type export.checkpoint={earlier[-1]}, which leaves it there.") from error


def _fill(folder: Path, trained: Trained, config: Config, run_dir: Path) -> None:
    """Write everything into the folder: weights, tokenizer, sentence-transformers' files, model card."""
    model, export = trained.model, config.export
    dtype = getattr(torch, model.weights_dtype if export.dtype == "auto" else export.dtype)
    if export.lora == "adapter":
        width = write_adapter(model, trained.tensors, folder)
        write_manifest(model, width, folder)
        weights = f"LoRA adapter of rank {model.lora.rank}, float32, on the base model"
    else:
        size = int(export.max_shard_gb * 1e9)
        width = write_merged(model, trained.tensors, folder, dtype=dtype, shard_bytes=size, before_each=leave_if_asked)
        merged = f", with LoRA of rank {model.lora.rank} merged" if model.lora.enabled else ""
        weights = f"{str(dtype).removeprefix('torch.')}{merged}"
    write_tokenizer(trained.tokenizer, folder)
    tasks = describe_data(trained.config, run_dir)
    max_tokens = longest_text(trained.config, tasks)
    prompts = prompts_of(_instruction(trained, run_dir), {name: task.instructions for name, task in tasks.items()})
    write_sentence_files(model, folder, width=width, max_tokens=max_tokens, prompts=prompts)
    facts = ModelFacts(
        title=export.push.split("/")[-1] or f"{run_dir.name}-{trained.stage}",
        address=export.push or str(Path(config.runs_dir, config.name, "export", "out", "model")),
        stage=trained.stage,
        origin=trained.origin,
        config=trained.config,
        weights=weights,
        width=width,
        max_tokens=max_tokens,
        prompts=prompts,
        base_licence=licence_of(base_on_this_machine(model)),
        data_licence=licence_of_data(trained.config, run_dir),
        tasks=task_facts(trained.config, trained.stage, run_dir, tasks),
    )
    write_card(facts, run_dir, folder)


def _instruction(trained: Trained, run_dir: Path) -> str:
    """The instruction of queries of no task in particular: that of the evaluation, where there was one."""
    evaluated = run_dir / "eval"
    config = config_of_stage(evaluated) if (evaluated / DONE).is_file() else trained.config
    return config.eval.instruction


def leave_if_asked(step: int = 0) -> None:
    """Raise Stopped where this process has been asked to stop; the next call goes on after `step`.

    step  0 = the folder is not whole, 1 = it is, and being pushed
    """
    flag = stop_flag()
    if flag.requested:
        raise Stopped("export", step, step + 1, flag.reason)


class CheckpointTensors(Mapping[str, Tensor]):
    """The trained tensors of a checkpoint under their names in an encoder, each read when it is asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        stored = checkpoint.tensors(ENGINE).keys()
        self._names = {name.removeprefix(p): name for p in _STORED for name in stored if name.startswith(p)}

    def __getitem__(self, name: str) -> Tensor:
        # Opened anew each time: the pages of a mapped file stay in memory for as long as it is open.
        return self._checkpoint.tensors(ENGINE)[self._names[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
