"""The CUDA kernels and their operators, compiled for the CPU: what a GPU would run, thread by thread."""

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch

from tdro_hpc.losses.cuda_tiles import TileOps
from tests.reference.torch_tiles import TorchTiles

ROOT = Path(__file__).parents[2]
# Orders in which the threads of a block run. AHEAD = each to its next barrier at once; the others = part by part.
RISING, FALLING, RANDOM, AHEAD, AHEAD_FALLING = range(5)
SOURCES = "kernels/cuda_ops.cpp", "tests/losses/emulated_tiles.cpp"
OPTIONS = [
    *("-O1", "-std=c++20", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-fno-strict-aliasing"),
    *("-DWITH_CUDA", "-DTDRO_TILE_NAMESPACE=tdro_emulated", "-DTDRO_TILE_DEVICE=CPU"),
    *("-DTORCH_TARGET_VERSION=0x020a000000000000", "-Ikernels"),
]


class EmulatedTiles(TileOps):
    """The operators on tensors of the CPU. Matrix products with float32 results are those of torch."""

    def __init__(self, library, *, groups_in_tiles=False):
        super().__init__(torch.ops.tdro_emulated)
        self.library, self.groups_in_tiles = library, groups_in_tiles

    def order_threads(self, order):
        self.library.order_threads(order)

    def compares_groups(self, group):
        return self.groups_in_tiles

    multiply = TorchTiles.multiply


def emulated_tiles(**options):
    return EmulatedTiles(_library(), **options)


@cache
def _library():
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    home = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "libemulated.so")
        command = [compiler, *OPTIONS, "-isystem", str(home / "include"), *SOURCES, "-o", str(path)]
        command += [f"-L{home / 'lib'}", "-Wl,--no-as-needed", "-ltorch"]
        subprocess.run(command, cwd=ROOT, check=True)
        torch.ops.load_library(path)
        return ctypes.CDLL(str(path))
