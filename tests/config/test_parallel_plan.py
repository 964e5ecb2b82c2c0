"""What the front door prints of layout and memory, and which mistakes it stops at."""

import importlib.util

import pytest

from tdro_hpc.config.load import load_config, save_config
from tdro_hpc.submit import main

BIG = ["model=llama3-8b", "loss.gradient_cache=true", "cluster.gpu_memory_gb=80"]


def dry_run(tmp_path, capsys, *words: str) -> tuple[int, str, str]:
    code = main([*words, "config=demo", "dry_run=true", f"runs_dir={tmp_path}"])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_dry_run_prints_choice_layout_and_memory(tmp_path, capsys):
    code, shown, _ = dry_run(tmp_path, capsys, "stage=s0", *BIG, "cluster.gpus_per_node=8", "parallel=auto")
    assert code == 0 and "parallel=auto takes ddp: " in shown
    assert "s0      memory a GPU about " in shown and "memory of s0 a GPU, about: the fullest rank" in shown
    assert "memory of s1" not in shown  # it is not in this plan


def test_dry_run_warns_of_a_batch_that_will_not_fit(tmp_path, capsys):
    words = [BIG[0], BIG[2], "cluster.gpus_per_node=1", "s0.queries_per_rank=512"]
    code, shown, _ = dry_run(tmp_path, capsys, "stage=s0", *words)
    assert code == 0 and "it may run out of memory. Type loss.gradient_cache=true." in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cluster.gpus_per_node=6", "parallel=pp2_tp2", "model.lora.dropout=0"], "6 ranks (1 node x 6 gpus_per_node)"),
        (["cluster.gpus_per_node=1", "model.lora.enabled=false"], "s0 holds about 90.1 GB"),
        (["cluster.gpus_per_node=2", "parallel=pp2"], "model.lora.dropout is 0.1"),
    ],
)
def test_stage_that_cannot_work_is_not_started_and_others_are(tmp_path, capsys, words, said):
    code, shown, problem = dry_run(tmp_path, capsys, "stage=s0", *BIG, *words)
    assert (code, shown) == (2, "") and problem.startswith(said)
    assert dry_run(tmp_path, capsys, "stage=prepare", *BIG, *words)[0] == 0


def test_missing_deepspeed_stops_this_machine_and_is_a_note_for_slurm(tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find(name))
    words = ["stage=s0", *BIG, "parallel=zero2", "cluster.gpus_per_node=2"]
    code, _, problem = dry_run(tmp_path, capsys, *words)
    assert code == 2 and "not installed here. Type pip install 'deepspeed" in problem
    code, shown, _ = dry_run(tmp_path, capsys, *words, "cluster=slurm")
    assert code == 0 and "the jobs need it on their nodes: pip install 'deepspeed" in shown


def test_model_that_is_not_here_is_said_to_be_checked_in_the_job(tmp_path, capsys):
    words = ["stage=s0", "model.name=someone/unheard-of", "parallel=pp2", "model.lora.dropout=0"]
    code, shown, _ = dry_run(tmp_path, capsys, *words, "cluster.ranks_per_node=2")
    assert code == 0 and "is checked when the job starts" in shown and "memory a rank" not in shown


def test_saved_config_holds_the_layout_that_was_chosen(tmp_path):
    keys = [*BIG, "parallel=auto", "cluster.gpus_per_node=2", "model.lora.enabled=false", "model=qwen1.5-4b"]
    config = load_config([key for key in keys if key != "model=llama3-8b"]).config
    assert config.parallel.engine in ("torch", "deepspeed")
    save_config(config, tmp_path / "config.yaml")
    assert load_config([f"config={tmp_path / 'config.yaml'}"]).config == config
