"""Builds tdro_hpc/losses/libtdro_kernels.so from kernels/; without a C++20 compiler, the package without it.

    python setup.py build_ext --inplace              into this checkout, what is out of date
    python setup.py build_ext --inplace --required   the same, and fail where it cannot be built (make build)
    pip wheel --no-deps .                            py3-none-<platform> with the library, py3-none-any without

The library knows no Python and only the stable ABI of torch: one file serves every Python, and torch 2.10 or newer.
CXX and NVCC name other compilers, CUDA_HOME another CUDA toolkit. Metadata is in setup.cfg.
"""

import functools
import importlib.util
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MACHINE = platform.machine()
OBJECTS = Path("build", f"kernels-{MACHINE}")  # kept between builds
LIBRARY = Path("tdro_hpc/losses/libtdro_kernels.so")
# The oldest torch that the library runs with. Newer ones keep the functions of its stable ABI.
TORCH_MINIMUM = (2, 10)
TORCH_TARGET = f"-DTORCH_TARGET_VERSION=0x{TORCH_MINIMUM[0]:02x}{TORCH_MINIMUM[1]:02x}{0:012x}"

CXX_FLAGS = [
    *("-O3", "-fPIC", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wextra"),
    # Not -ffast-math: masked scores are infinities. These alone let loops over exp and products be vectorised.
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mavx2", "-mf16c"]
# By the end of a source's name, on x86-64 only. The code asks the processor before it calls into one of these files.
X86_FLAGS = {
    "_avx512bf16": [*_AVX512, "-mavx512bf16"],
    "_avx512": _AVX512,
    "_avx2": ["-mavx2", "-mfma", "-mf16c"],
}
# Machine code for A100 and H100, and PTX that newer GPUs compile for themselves.
CUDA_TARGETS = [("compute_80", "sm_80"), ("compute_90", "sm_90"), ("compute_90", "compute_90")]
NVCC_FLAGS = [
    *("-O3", "-std=c++20", "-Xcompiler", "-fPIC,-fvisibility=hidden", f"--threads={len(CUDA_TARGETS)}"),
    *(f"-gencode=arch={arch},code={code}" for arch, code in CUDA_TARGETS),
]


class Unbuildable(Exception):
    """Why there is no library, in words."""


@dataclass(frozen=True)
class Toolchain:
    """What the library is built with here."""

    cxx: tuple[str, ...]  # the C++ compiler, as in ("/usr/bin/ccache", "g++")
    torch: Path  # torch's folder, with include/ and lib/
    nvcc: str = ""  # "" = without CUDA
    cudart: Path = Path()  # folder of libcudart_static.a
    no_cuda: str = ""  # why, in words


@dataclass(frozen=True)
class Step:
    """One call of a compiler that makes one file from `source`, or from `objects`; left out where it is newer."""

    target: Path  # beside it lie .command = how it was made, and .d = which sources and headers were read
    command: tuple[str, ...]  # without the words that name the outcome
    source: Path | None = None
    objects: tuple[Path, ...] = ()

    def is_current(self) -> bool:
        """Whether the file was made by this very command from what lies there now."""
        try:
            made = self.target.stat().st_mtime_ns
            if _beside(self.target, ".command").read_text() != self.record():
                return False
            return all((ROOT / path).stat().st_mtime_ns <= made for path in self.inputs())
        except FileNotFoundError:
            return False

    def record(self) -> str:
        """Command and version of the compiler, as text."""
        return shlex.join(self.command) + "\n" + version_of(*takewhile(lambda word: word[0] != "-", self.command))

    def inputs(self) -> list[str]:
        """Paths of what the file was made from."""
        if self.objects:
            return list(map(str, self.objects))
        rule = _beside(self.target, ".d").read_text().replace("\\\n", " ")
        return shlex.split(rule.partition(": ")[2])

    def run(self) -> None:
        """Make the file. raises Unbuildable; what the compiler says is printed."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        name = f"{Path(self.command[0]).name} {self.source or self.target.name}"
        started = time.time_ns()
        with tempfile.TemporaryDirectory(dir=self.target.parent) as scratch:
            made, read = Path(scratch, "made"), Path(scratch, "read")
            notes = [] if self.objects else ["-MD", "-MF", str(read)]
            done = subprocess.run([*self.command, "-o", str(made), *notes], cwd=ROOT, capture_output=True, text=True)
            print(f"{name}\n{done.stdout}{done.stderr}", end="", flush=True)
            if done.returncode:
                raise Unbuildable(f"it failed: {name} (its words are above)")
            # As of the start: a source that was edited meanwhile is newer than what came of it.
            os.utime(made, ns=(started, started))
            if notes:
                read.replace(_beside(self.target, ".d"))
            made.replace(self.target)
            _beside(self.target, ".command").write_text(self.record())  # last: without it the file is made again


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


@functools.cache
def version_of(*compiler: str) -> str:
    """What `compiler --version` says."""
    return subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout


@functools.cache
def find_toolchain() -> Toolchain | Unbuildable:
    """Compilers that were tried out, and torch; or why there is none."""
    try:
        if sys.platform != "linux":
            raise Unbuildable(f"this is {sys.platform}, and the kernels are for Linux")
        cxx, torch = find_cxx(), find_torch()
        try:
            nvcc, cudart = find_cuda()
        except Unbuildable as reason:
            return Toolchain(cxx, torch, no_cuda=str(reason))
        return Toolchain(cxx, torch, nvcc, cudart)
    except Unbuildable as reason:
        return reason


def find_cxx() -> tuple[str, ...]:
    """The C++ compiler, which makes C++20 with every set of options that sources need. raises Unbuildable"""
    wanted = shlex.split(os.environ.get("CXX", ""))
    names = [wanted[0]] if wanted else ["c++", "g++", "clang++"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise Unbuildable(f"no C++ compiler (looked for {', '.join(names)}; CXX names another)")
    cxx = (found, *wanted[1:])
    for name, flags in ({"": []} | (X86_FLAGS if MACHINE == "x86_64" else {})).items():
        _try_out(f"probe{name}.cpp", "#include <concepts>\n#include <span>\n", [*cxx, *CXX_FLAGS, *flags])
    return cxx


def find_torch() -> Path:
    """Folder of torch in the environment that this Python belongs to, also where pip hides it. raises Unbuildable"""
    spec = importlib.util.find_spec("torch")
    places = [] if spec is None or spec.origin is None else [Path(spec.origin).parent.parent]
    # A build in isolation sees nothing but what builds it; the folders are still where they were.
    places += [Path(sysconfig.get_path(name)) for name in ("platlib", "purelib")]
    places += map(Path, [site.getusersitepackages(), *site.getsitepackages([sys.prefix, sys.base_prefix])])
    folders = [place / "torch" for place in places if (place / "torch/version.py").is_file()]
    if not folders:
        raise Unbuildable(f"no torch for {sys.executable}, whose headers it takes (pip install torch comes first)")
    version = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", (folders[0] / "version.py").read_text())
    if version is None or (int(version[2]), int(version[3])) < TORCH_MINIMUM:
        raise Unbuildable(f"{folders[0]} is torch {version[1] if version else '?'}, and 2.10 or newer is needed")
    for name in ("include/torch/csrc/stable/library.h", "lib/libtorch.so"):
        if not (folders[0] / name).is_file():
            raise Unbuildable(f"{folders[0]} has no {name}")
    return folders[0]


def find_cuda() -> tuple[str, Path]:
    """nvcc, which makes every machine code that is wanted, and the folder of cudart. raises Unbuildable"""
    if not _sources("cuda/*.cu"):
        raise Unbuildable("kernels/cuda has no sources")
    home = os.environ.get("CUDA_HOME")
    names = [os.environ.get("NVCC") or (f"{home}/bin/nvcc" if home else "nvcc")]
    if names == ["nvcc"]:
        names += map(str, sorted(Path("/usr/local").glob("cuda*/bin/nvcc"), reverse=True))
    nvcc = next(filter(None, map(shutil.which, names)), None)
    if nvcc is None:
        raise Unbuildable(f"no nvcc (looked for {', '.join(names)}; CUDA_HOME names another toolkit)")
    probe = _try_out("probe.cu", "#include <cuda_bf16.h>\n", [nvcc, *NVCC_FLAGS])
    # nvcc knows where its libraries are, also where it is but a script that calls another one.
    plan = subprocess.run([nvcc, "--dryrun", str(probe)], cwd=ROOT, capture_output=True, text=True)
    folders = list(map(Path, re.findall(r'"-L([^"]+)"', plan.stderr)))
    cudart = next((folder for folder in folders if (folder / "libcudart_static.a").is_file()), None)
    if cudart is None:
        raise Unbuildable(f"{nvcc} has no libcudart_static.a (looked in {', '.join(map(str, folders))})")
    return nvcc, cudart


def _try_out(name: str, text: str, compiler: list[str]) -> Path:
    """Compile next to nothing and return its path: what fails is the compiler, not a source. raises Unbuildable"""
    source = OBJECTS / name
    if not (ROOT / source).is_file() or (ROOT / source).read_text() != text:
        (ROOT / source).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / source).write_text(text)
    step = Step(ROOT / OBJECTS / f"{name}.o", (*compiler, "-c", str(source)), source)
    if not step.is_current():
        try:
            step.run()
        except Unbuildable:
            raise Unbuildable(f"{shlex.join(compiler)} does not work (its words are above)") from None
    return source


def compile_steps(tools: Toolchain) -> list[Step]:
    """One step for each source that counts on this machine; those that take longest first."""
    for_x86 = ["-DTDRO_X86"] if MACHINE == "x86_64" else []
    cpu = [*tools.cxx, *CXX_FLAGS, *for_x86, "-Ikernels"]
    glue = [*cpu, TORCH_TARGET, *(["-DWITH_CUDA"] if tools.nvcc else []), "-isystem", str(tools.torch / "include")]
    commands = {path: [tools.nvcc, *NVCC_FLAGS, "-Ikernels"] for path in _sources("cuda/*.cu") if tools.nvcc}
    commands |= {path: glue for path in _sources("*.cpp")}
    for path in _sources("cpu/*.cpp"):
        ending = next((ending for ending in X86_FLAGS if path.stem.endswith(ending)), "")
        if for_x86 or not ending:
            commands[path] = [*cpu, *X86_FLAGS.get(ending, [])]
    return [
        Step(ROOT / OBJECTS / f"{source}.o", (*command, "-c", str(source)), source)
        for source, command in commands.items()
    ]


def _sources(pattern: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in (ROOT / "kernels").glob(pattern))


def link_step(tools: Toolchain, objects: list[Path]) -> Step:
    """The library from its objects.

    It asks for libtorch.so by name and no place: the one that Python has loaded is taken. That brings libtorch_cuda.so
    too, where there is one. Exported are the symbols that sources mark, and none of cudart's.
    """
    words = [*tools.cxx, "-shared", *map(str, objects), "-Wl,--exclude-libs,ALL"]
    words += [f"-L{tools.torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
    if tools.nvcc:
        words += [f"-L{tools.cudart}", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    return Step(ROOT / OBJECTS / LIBRARY.name, tuple(words), objects=tuple(objects))


def build_library(tools: Toolchain, *, jobs: int) -> Path:
    """The library as the sources are now; only what is out of date is made. raises Unbuildable"""
    steps = compile_steps(tools)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(Step.run, [step for step in steps if not step.is_current()]))
    link = link_step(tools, [step.target for step in steps])
    if not link.is_current():
        link.run()
    return link.target


class BuildKernels(build_ext):
    """`build_ext`, for a library that is no Python module."""

    user_options = [*build_ext.user_options, ("required", None, "fail where the library cannot be built")]
    boolean_options = [*build_ext.boolean_options, "required"]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.required = False

    def get_ext_filename(self, fullname: str) -> str:
        """Without the name of a Python: it is loaded by torch.ops.load_library."""
        return str(LIBRARY)

    def run(self) -> None:
        """Put the library, newly made where it is out of date, into the wheel or the checkout."""
        try:
            tools = find_toolchain()
            if isinstance(tools, Unbuildable):
                raise tools
            library = build_library(tools, jobs=int(self.parallel or len(os.sched_getaffinity(0))))
        except Unbuildable as reason:
            if self.required:
                raise SystemExit(f"{LIBRARY} cannot be built: {reason}.") from None
            say(f"tdro_hpc without {LIBRARY.name}: {reason}. Losses are computed in torch.")
            self.distribution.ext_modules, self.extensions = None, []
            Path(self.build_lib, LIBRARY).unlink(missing_ok=True)  # of an earlier wheel
            return
        target = ROOT / LIBRARY if self.inplace else Path(self.build_lib, LIBRARY)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Never written into: a process may have it loaded.
        shutil.copy2(library, _beside(target, ".new"))
        _beside(target, ".new").replace(target)
        say(f"{LIBRARY} is built " + ("with CUDA" if tools.nvcc else f"for CPUs only: {tools.no_cuda}"))


class BuildPackage(build_py):
    """`build_py`, with configs/ inside of the package, where it is looked for when there is no checkout."""

    def run(self) -> None:
        super().run()
        for path in [] if self.editable_mode else sorted(ROOT.glob("configs/**/*.yaml")):
            target = Path(self.build_lib, "tdro_hpc", path.relative_to(ROOT))
            self.mkpath(str(target.parent))
            self.copy_file(str(path), str(target))


class PlatformWheel(bdist_wheel):
    """`bdist_wheel`, for any Python on this platform; for any platform where there is no library to put in."""

    def run(self) -> None:
        """Build the library first: whether there is one decides what kind of wheel it is."""
        self.run_command("build_ext")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


@functools.cache
def say(text: str) -> None:
    """Print a line, once: a wheel takes several commands."""
    print(text, flush=True)


if __name__ == "__main__":
    setup(
        ext_modules=[Extension(str(LIBRARY.with_suffix("")).replace("/", "."), sources=[])],
        cmdclass={"build_py": BuildPackage, "build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
    )
