"""The house rules that a reader relies on: import order, sizes, where heavy packages may be, README's tree."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tdro_hpc"
# In the order of the data flow: a file imports only from rooms before its own, or from its own.
ROOMS = [
    "atomic",
    "config",
    "launch",
    "data",
    "encoders",
    "parallel",
    "losses",
    "dro",
    "training",
    "retrieval",
    "embedded",
    "evaluation",
    "report",
    "stages",
    "run",
    "submit",
    "info",
]
LOGIN_NODE = ["atomic.py", "submit.py", "config", "launch", "data/tasks.py"]
SOURCES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py")) + sorted((ROOT / "benchmarks").rglob("*.py")) + [ROOT / "setup.py"]
KERNELS = sorted(path for path in (ROOT / "kernels").rglob("*") if path.suffix in (".cpp", ".cu", ".h"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[tuple[str, ast.stmt]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{name_of(path)}: relative import"
            found.append((node.module, node))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_file_imports_only_from_rooms_before_its_own(path: Path):
    room = room_of(path)
    if room == "__init__":
        return
    for module, _ in imports_of(path):
        parts = module.split(".")
        if parts[0] == "tdro_hpc" and len(parts) > 1:
            assert ROOMS.index(parts[1]) <= ROOMS.index(room), f"{name_of(path)} imports {module}"


def test_launch_imports_only_from_its_rooms_before():
    order = ["", "local", "slurm", "job", "look", "chain", "cancel", "slurm_chain"]  # "" = the files it begins with

    def place(parts: list[str]) -> int:
        return order.index(parts[0] if parts and parts[0] in order else "")

    for path in SOURCES:
        if room_of(path) != "launch":
            continue
        mine = place(list(path.relative_to(PACKAGE / "launch").with_suffix("").parts))
        for module, _ in imports_of(path):
            if module.startswith("tdro_hpc.launch."):
                assert place(module.split(".")[2:]) <= mine, f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=name_of)
def test_file_and_function_lengths(path: Path):
    text = path.read_text(encoding="utf-8")
    assert text.isascii(), f"{name_of(path)} has characters other than ASCII"
    assert text.count("\n") <= 400, f"{name_of(path)} has more than 400 lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{name_of(path)}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", KERNELS, ids=name_of)
def test_kernel_is_no_longer_than_other_files(path: Path):
    assert path.read_text(encoding="ascii").count("\n") <= 400


def test_no_file_has_a_name_that_says_nothing():
    vague = re.compile(r"utils?|base|manager|helpers?|common|misc")
    assert [name_of(path) for path in SOURCES if vague.fullmatch(path.stem)] == []


def test_only_parallel_imports_deepspeed():
    rooms = {room_of(path) for path in SOURCES for module, _ in imports_of(path) if module.startswith("deepspeed")}
    assert rooms <= {"parallel"}


def test_only_one_file_imports_subprocess_and_only_launch_imports_submitit():
    starters = [name_of(path) for path in SOURCES for module, _ in imports_of(path) if module == "subprocess"]
    assert len(set(starters)) <= 1, starters
    rooms = {room_of(path) for path in SOURCES for module, _ in imports_of(path) if module.startswith("submitit")}
    assert rooms <= {"launch", "run"}


def test_environment_is_read_in_run_and_stop_only():
    readers = [name_of(path) for path in SOURCES if re.search(r"os\.environ|os\.getenv", path.read_text("utf-8"))]
    tells_deepspeed = "tdro_hpc/parallel/deepspeed_setup.py"  # which takes its rank from there only
    assert set(readers) <= {"tdro_hpc/run.py", "tdro_hpc/training/stop.py", tells_deepspeed}, readers


def test_submit_path_never_imports_torch():
    modules = [
        name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for entry in LOGIN_NODE
        for path in ([PACKAGE / entry] if entry.endswith(".py") else sorted((PACKAGE / entry).rglob("*.py")))
    ]
    code = f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
    code += "print([name for name in ('torch', 'transformers', 'peft', 'faiss') if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_every_public_function_says_what_it_returns():
    silent = []
    for path in SOURCES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            named = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if named and not ast.get_docstring(node):
                silent.append(f"{name_of(path)}: {node.name}")
    assert silent == []


def test_values_are_cast_to_the_host_only_where_they_are_looked_at():
    found = [
        f"{name_of(path)}: {line.strip()}"
        for path in SOURCES
        if room_of(path) in ("losses", "parallel")
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"\.item\(\)|\.cpu\(\)", line)
    ]
    assert found == []
