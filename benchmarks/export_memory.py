"""Peak memory of stage export on a model of 1 to 2 billion parameters with random weights, against the model's size.

    python benchmarks/export_memory.py [--layers 28] [--max-shard-gb 1] [--trained lora] [--folder DIR]

A base model in bfloat16 (the shape of a Qwen2 of 1.5B) is written into a temporary folder, tensor by tensor, with a
checkpoint of one rank: a LoRA adapter, or all weights in float32 as a full fine-tune keeps them. Nothing is trained.
Stage export then runs in a process of its own, and its peak is read from the kernel: VmHWM, the largest resident set
so far, pages of mapped files included; beside it VmRSS after the imports. The bound is the size of the written weights
plus one shard; above it the exit code is 1.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen2Config

from tdro_hpc.config.load import load_config, save_config
from tdro_hpc.config.schema import Config, ModelConfig
from tdro_hpc.encoders.lora import add_lora
from tdro_hpc.encoders.shards import TensorPlan, write_shards
from tdro_hpc.encoders.skeleton import build_skeleton
from tdro_hpc.encoders.tiny import tiny_tokenizer
from tdro_hpc.training.checkpoint import save_checkpoint

GIGA = 1e9
_CHILD = """
import sys, torch
from pathlib import Path
from tdro_hpc.config.load import load_config
from tdro_hpc.parallel.process import Process
from tdro_hpc.stages import export
from tdro_hpc.stages.graph import stage_graph
import transformers, peft

def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

config = load_config(sys.argv[1:]).config
run_dir = Path(config.runs_dir, config.name)
before = kilobytes("VmRSS")
export.run(config, stage_graph(config)["export"], run_dir, Process(0, 1, 0, torch.device("cpu")))
print("MEMORY", before, kilobytes("VmHWM"))
"""


class RandomTensors(Mapping[str, Tensor]):
    """Tensors of given shapes, drawn when they are asked for."""

    def __init__(self, plans: Mapping[str, TensorPlan]) -> None:
        self.plans = plans

    def __getitem__(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(len(name))
        return torch.empty(self.plans[name].shape).normal_(0, 0.02, generator=generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self.plans)

    def __len__(self) -> int:
        return len(self.plans)


@dataclasses.dataclass
class RandomPart:
    """The engine of a checkpoint, with random values."""

    plans: dict[str, TensorPlan]

    def state_dict(self) -> dict:
        """All tensors at once: they are the trained ones only."""
        drawn = RandomTensors(self.plans)
        return {"tensors": {f"parameter.{name}": drawn[name] for name in drawn}, "values": {}}

    def load_state_dict(self, state: dict) -> None:
        raise AssertionError("nothing is loaded here")


def write_base(folder: Path, layers: int) -> None:
    """A decoder of the shape of Qwen2-1.5B with random bfloat16 weights."""
    shape = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2}
    config = Qwen2Config(**shape, num_hidden_layers=layers, vocab_size=151_936, max_position_embeddings=4096)
    folder.mkdir()
    config.architectures = ["Qwen2Model"]
    config.save_pretrained(folder)
    tiny_tokenizer("qwen2").save_pretrained(folder)
    plans = {
        name: TensorPlan(tuple(value.shape), torch.bfloat16)
        for name, value in build_skeleton(ModelConfig(name=str(folder))).state_dict().items()
    }
    write_shards(RandomTensors(plans), plans, folder)


def write_run(config: Config, layers: int) -> None:
    """The base, and a stage s0 of the run with one checkpoint."""
    write_base(Path(config.model.name), layers)
    model = build_skeleton(config.model)
    if config.model.lora.enabled:
        model = add_lora(model, config.model, seed=0)
    plans = {
        f"backbone.{name}": TensorPlan(tuple(parameter.shape), torch.float32)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    stage_dir = Path(config.runs_dir, config.name, "s0")
    save_config(config, stage_dir / "config.yaml")
    save_checkpoint(stage_dir / "checkpoints", 1, {"engine": RandomPart(plans)}, keep=1)


def main() -> None:
    """Make the model, export it, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28, help="28 = 1.5B parameters")
    parser.add_argument("--max-shard-gb", type=float, default=1.0)
    parser.add_argument("--trained", choices=("lora", "all"), default="lora")
    parser.add_argument("--folder", help="where the temporary folder is made; empty = the system's")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        words = [
            f"runs_dir={name}/runs",
            "name=big",
            f"model.name={name}/base",
            "model.weights_dtype=bfloat16",
            f"model.lora.enabled={str(options.trained == 'lora').lower()}",
            "export.stage=s0",
            "export.checkpoint=1",
            f"export.max_shard_gb={options.max_shard_gb}",
        ]
        write_run(load_config(words).config, options.layers)
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", _CHILD, *words], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        seconds = time.perf_counter() - began
        before, peak = (int(word) * 1024 / GIGA for word in done.stdout.split("MEMORY")[1].split())
        files = sorted(Path(name, "runs", "big", "export", "out", "model").glob("*.safetensors"))
        sizes = [file.stat().st_size / GIGA for file in files]
        figures = {
            "trained": options.trained,
            "model_gb": round(sum(sizes), 3),
            "files": len(files),
            "largest_file_gb": round(max(sizes), 3),
            "bound_gb": round(sum(sizes) + max(sizes), 3),
            "peak_gb": round(peak, 3),
            "after_imports_gb": round(before, 3),
            "seconds": round(seconds, 1),
        }
        print(json.dumps(figures))
        if peak > figures["bound_gb"]:
            raise SystemExit("the peak is above the bound")


if __name__ == "__main__":
    main()
