"""The user's line for real: prepare, s0, s1, s2 twice, eval and the report, on two ranks; then the same line again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = ["prepare", "s0", "s1", "s2-curr", "s2-top70", "eval"]
SMALL = [
    "stage=all",
    "config=demo",
    "model=tiny_decoder",
    "cluster=local",
    "cluster.ranks_per_node=2",
    "name=small",
    "embedded.max_rows_per_task=60",
    "embedded.test_queries=12",
    "embedded.test_documents=60",
    "data.loader_workers=0",
    "eval.models=base,s0,s2,bm25",
]
SMALL += [
    f"{stage}.{key}" for stage in ("s0", "s1", "s2") for key in ("steps=4", "warmup_steps=1", "log_every_steps=2")
]
SMALL += ["s0.queries_per_rank=6", "s1.queries_per_rank=6", "s2.queries_per_rank=6"]


def submit(folder: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tdro_hpc.submit", *SMALL, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=600)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    answer = submit(folder)
    assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr[-3000:]
    return folder, answer.stdout


def test_every_stage_is_done_and_lists_its_outputs(run):
    folder, _ = run
    for stage in STAGES:
        done = json.loads((folder / "runs/small" / stage / "DONE.json").read_text())
        assert done["outputs"], stage
        for path, size in done["outputs"].items():
            assert (folder / "runs/small" / stage / path).stat().st_size == size


def test_weights_moved_and_the_next_stage_trained_with_them(run):
    folder, words = run
    weights = json.loads((folder / "runs/small/s1/out/weights/curr_weights.json").read_text())["domain_weights"]
    assert len(weights) == 12
    assert max(weights.values()) > 1.05 / 12
    top = json.loads((folder / "runs/small/s1/out/weights/top70_weights.json").read_text())["domain_weights"]
    assert len(top) == 8
    drawn = set()
    for line in (folder / "runs/small/s2-top70/metrics.jsonl").read_text().splitlines():
        drawn |= set(json.loads(line)["task_rows"])
    assert drawn <= set(top)
    assert "x uniform" in words


def test_scores_of_all_models_stand_side_by_side(run):
    folder, words = run
    scores = json.loads((folder / "runs/small/eval/out/scores/scores.json").read_text())
    assert scores["models"] == ["base", "s0", "s2-curr", "s2-top70", "bm25"]
    assert len(scores["sets"]) >= 3
    assert "average" in words and (folder / "runs/small/report.html").is_file()
    assert 'class="running"' not in (folder / "runs/small/report.html").read_text()


def test_same_line_again_has_nothing_to_do(run):
    folder, _ = run
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs/small").glob("*/DONE.json")}
    answer = submit(folder)
    assert answer.returncode == 0 and "Nothing to do" in answer.stdout
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs/small").glob("*/DONE.json")} == before


def test_changed_key_is_named_and_strict_refuses_it(run):
    folder, _ = run
    answer = submit(folder, "s1.eta=0.3", "dry_run=true")
    assert answer.returncode == 0 and "s1.eta" in answer.stdout + answer.stderr
    refused = submit(folder, "s1.eta=0.3", "strict=true", "dry_run=true")
    assert refused.returncode == 2 and "s1.eta" in refused.stderr and "Traceback" not in refused.stderr


def test_resolved_config_of_a_stage_reproduces_its_plan(run):
    folder, _ = run
    command = [sys.executable, "-m", "tdro_hpc.submit", "config=runs/small/s1/config.yaml", "stage=s1", "strict=true"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=60)
    assert answer.returncode == 0 and "Nothing to do" in answer.stdout, answer.stdout + answer.stderr
