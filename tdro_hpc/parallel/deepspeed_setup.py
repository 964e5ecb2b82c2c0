"""DeepSpeed, imported and told of this process. Only this room imports it, and only when a run asks for its engines.

No operator of DeepSpeed is compiled when a run starts: the one that it would build for the CPU is switched off here,
and the engines bring torch's optimiser instead of DeepSpeed's.
"""

import contextlib
import io
import logging
import os
import warnings
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tdro_hpc.parallel.process import Process


def import_deepspeed(device_type: str = "") -> ModuleType:
    """The package, quiet and ready.

    device_type  cpu or cuda: where it shall work; empty = CUDA where there is one
    raises       ValueError if it is not installed, or was imported for another device before
    """
    # DeepSpeed guesses and says so in a warning where it is not told.
    wanted = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("DS_ACCELERATOR", wanted)
    try:
        deepspeed = import_module("deepspeed")
    except ImportError as error:
        raise ValueError(
            f"parallel.engine is 'deepspeed', but the package cannot be imported ({error}). "
            "Type pip install 'deepspeed>=0.19,<0.20', or set parallel.engine=torch."
        ) from error
    # Else it is built at the first use on a CPU: half a minute, and a crash where there is no ninja.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It calls collectives of torch by their old names, a line of the log each time.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # warns of what is meant, such as torch's AdamW
    found = deepspeed.accelerator.get_accelerator().device_name()
    if found.split(":")[0] != wanted:
        raise ValueError(
            f"DeepSpeed works on {found} in this process, but the encoder is on {wanted}. "
            f"Set DS_ACCELERATOR={wanted} in the environment, or leave it away."
        )
    return deepspeed


def start_deepspeed(process: Process) -> ModuleType:
    """DeepSpeed in the process group of this run. All ranks call it together, after start_process."""
    deepspeed = import_deepspeed(process.device.type)
    if not dist.is_initialized():  # one rank alone: its collectives need a group of one
        on_gpu = process.device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=dist.HashStore(),
            rank=0,
            world_size=1,
            device_id=process.device if on_gpu else None,
        )
    os.environ["LOCAL_RANK"] = str(process.local_rank)  # the only way to tell it
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    return deepspeed


def initialised(
    deepspeed: ModuleType, model: nn.Module, optimizer: torch.optim.Optimizer | None, settings: dict[str, Any]
) -> Any:
    """DeepSpeedEngine of a model that every data rank has whole. All ranks call it together.

    settings  numbers, words and truth values only: DeepSpeed writes them as JSON
    """
    with contextlib.redirect_stdout(io.StringIO()):  # tables of memory, printed where its log is silent
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine


def shared_settings() -> dict[str, Any]:
    """What the DeepSpeed settings of every engine have in common.

    One micro-batch a step, as DeepSpeed sees it: the engines say themselves which backward is the last of a step, so
    DeepSpeed divides no gradient by a number of micro-batches.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 1 << 31,  # never: the loop writes the log
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW steps offloaded states too
    }
