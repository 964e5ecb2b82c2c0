"""The compiled library of kernels/, loaded once, and what it serves; or why there is none. Builds nothing."""

import platform
import re
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

import tdro_hpc

PATH = Path(__file__).with_name("libtdro_kernels.so")
OPERATORS = tuple(
    f"infonce_{name}"
    for name in (
        *("forward", "backward", "forward_backward", "losses", "losses_backward", "gradients", "cpu_path"),
        *("plain_losses", "plain_losses_backward", "plain_weighted"),
    )
)
CUDA_OPERATOR = "tile_row_statistics"  # there when nvcc was
_MACHINES = {3: "i386", 21: "ppc64le", 62: "x86_64", 183: "aarch64", 243: "riscv64"}  # e_machine of ELF
_ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")


@dataclass(frozen=True)
class Library:
    """What the compiled library serves in this process."""

    path: Path | None  # None = it cannot be used
    cpu: bool = False  # has kernels for tensors of the CPU
    cuda: bool = False  # has kernels for tensors of CUDA; whether there is a GPU is another question
    reason: str = ""  # why it cannot be used, and what to type


@cache
def load() -> Library:
    """The library beside this file. Never raises; the first call loads it, the others give the same."""
    return load_from(PATH)


def load_from(path: Path) -> Library:
    """The library in a file. Never raises. A process can hold one: another one stops it."""
    try:
        problem = _problem_of_file(path) or _problem_of_loading(path)
    except OSError as error:
        problem = f"{path} cannot be read: {error.strerror}"
    if problem:
        return Library(None, reason=f"{problem}. {_what_to_type()}.")
    return Library(path, cpu=True, cuda=hasattr(torch.ops.tdro_hpc, CUDA_OPERATOR))


def _problem_of_file(path: Path) -> str:
    """What is wrong with a file before it is loaded: the loader of the system would end the process over some of it."""
    if not path.exists():
        return f"{path.name} is not built"
    with path.open("rb") as file:
        start = file.read(_ELF_HEADER.size)
    if len(start) < _ELF_HEADER.size or start[:4] != b"\x7fELF":
        return f"{path} is damaged: {path.stat().st_size} bytes that are no library"
    fields = _ELF_HEADER.unpack(start)
    machine, table, entry_bytes, entries = fields[2], fields[6], fields[11], fields[12]
    if _MACHINES.get(machine) != platform.machine():
        return f"{path} is for {_MACHINES.get(machine, f'machine {machine}')}, and this is {platform.machine()}"
    if table + entry_bytes * entries > path.stat().st_size:  # the table is what a linker writes last
        return f"{path} is damaged: it was cut off at {path.stat().st_size} bytes"
    return ""


def _problem_of_loading(path: Path) -> str:
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return _in_words(path, str(error.__cause__ or error))
    lacking = [name for name in OPERATORS if not hasattr(torch.ops.tdro_hpc, name)]
    return f"{path} lacks {', '.join(lacking)}: it was built from other sources" if lacking else ""


def _in_words(path: Path, said: str) -> str:
    """What the loader of the system said, for people who use torch."""
    if symbol := re.search(r"undefined symbol: (\w+)", said):
        if symbol[1].startswith(("torch_", "aoti_torch_")):
            return f"{path} is built for a newer torch: torch {torch.__version__} has no {symbol[1]}"
        return f"{path} is built for other libraries: nothing here has {symbol[1]}"
    if version := re.search(r"version `([\w.]+)' not found", said):
        return f"{path} is built on a newer system: this one has no {version[1]}"
    return f"{path} does not load: {said.removeprefix(f'{path}: ')}"


def _what_to_type() -> str:
    root = Path(tdro_hpc.__file__).parents[1]
    if (root / "kernels").is_dir() and (root / "setup.py").is_file():
        return f"Type `make build` in {root}"
    return "Type `make build` in the checkout of tdro_hpc, or install a wheel that was built where a compiler is"
