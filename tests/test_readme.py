"""README and docs: the tree equals the disk, and every command in them parses."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from tdro_hpc.submit import main, parse_call

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks_of(page: Path) -> list[str]:
    return re.findall(r"```(?:bash|sh|console)?\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def submit_lines() -> list[str]:
    lines = [line.split("#")[0].strip() for page in PAGES for block in blocks_of(page) for line in block.splitlines()]
    return sorted({line.removeprefix("$ ") for line in lines if "python -m tdro_hpc.submit" in line})


def test_tree_of_readme_equals_the_disk():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"<!-- tree -->\n```\n(.*?)```", text, flags=re.DOTALL)
    assert tree, "README.md has no tree between <!-- tree --> and the next fence"
    named: set[str] = set()
    folder = ""
    for line in tree.group(1).splitlines():
        entry = line.split("  ")[0] if not line.startswith(" ") else line.strip().split("  ")[0]
        if line.startswith("  "):
            named.add(folder + entry.rstrip("/"))
        else:
            folder = entry
            named.add(entry.rstrip("/"))
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    tops = {path.split("/")[0] for path in tracked if not path.startswith(".")}
    rooms = {"/".join(path.split("/")[:2]) for path in tracked if path.startswith("tdro_hpc/")}
    rooms -= {"tdro_hpc/__init__.py"}
    assert named == tops | rooms


@pytest.mark.parametrize("line", submit_lines())
def test_command_parses(line: str):
    words = shlex.split(line)
    parse_call(words[words.index("tdro_hpc.submit") + 1 :])


def test_readme_has_commands():
    assert len(submit_lines()) >= 3


@pytest.mark.parametrize("line", [line for line in submit_lines() if "config=demo" in line and "stage=" in line])
def test_line_of_the_demo_makes_a_plan(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_weights.json").write_text("{}")  # a page names it
    words = shlex.split(line)[3:]
    words = [word for word in words if not word.startswith(("dry_run=", "check="))]
    assert main([*words, "dry_run=true", f"runs_dir={tmp_path}/runs"]) == 0
    assert "run   " in capsys.readouterr().out
    assert not (tmp_path / "runs").exists(), "a dry run writes nothing"


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "s1.md"], ids=["README.md", "s1.md"])
def test_python_in_the_docs_runs(page: Path):
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    given = {
        "task_names": ["msmarco", "nq"],
        "losses": torch.tensor([2.0, 1.0]),
        "reference_losses": torch.tensor([1.0, 1.0]),
        "task_ids": torch.tensor([0, 1]),
    }
    exec(code, given)
    assert given["weights"].current["msmarco"] > 0.5


def test_every_event_of_the_cluster_guide_has_its_test():
    text = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    named = re.findall(r"\| `([\w/]+\.py)::(\w+)` \|$", text, flags=re.MULTILINE)
    rows = [line for line in text.split("## What happens when")[1].split("\n## ")[0].splitlines() if line[:1] == "|"]
    assert len(named) == len(rows) - 2 >= 20
    for file, test in named:
        path = ROOT / file if "/" in file else ROOT / "tests" / "cluster" / file
        assert f"def {test}(" in path.read_text(encoding="utf-8"), f"{file}::{test}"
