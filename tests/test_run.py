"""One rank by hand, and what it does before and after its stage."""

import json
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tdro_hpc.config.load import save_config
from tdro_hpc.config.schema import Config, LoggingConfig, TrainingConfig
from tdro_hpc.run import main, place_by_hand, read_stage, stage_function
from tdro_hpc.stages.graph import stage_graph
from tests.launch.counting import counting_graph
from tests.launch.front_door import ROOT, job_rows, line, steps_done, wait_for

CONFIG = Config(
    name="demo", s0=TrainingConfig(steps=30, warmup_steps=3, save_every_steps=5), logging=LoggingConfig(plots=False)
)


def planned(runs_dir: Path, stage: str, config: Config = CONFIG) -> Path:
    folder = runs_dir / "demo" / stage
    save_config(config, folder / "config.yaml")
    return folder


def by_hand(folder: Path) -> "subprocess.Popen[str]":
    command = [*line(folder, program="run")[:4], str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_by_hand_stops_continues_and_knows_when_it_is_done(tmp_path):
    folder = planned(tmp_path, "s0")
    first = by_hand(folder)
    wait_for(lambda: steps_done(tmp_path, "s0") >= 2)
    first.send_signal(signal.SIGINT)
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 3 and "s0 stopped at step" in said
    second = by_hand(folder)
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 0 and "s0 done after" in said
    assert (folder / "out" / "model" / "total.txt").read_text() == str(sum(range(31)))
    assert [row["exit_codes"] for row in job_rows(tmp_path, "s0", "end")] == [[3], [0]]
    third = by_hand(folder)
    said, _ = third.communicate(timeout=60)
    assert third.returncode == 0 and "s0 is done" in said and len(job_rows(tmp_path, "s0")) == 2


def test_by_hand_failure_is_noted(tmp_path):
    folder = planned(tmp_path, "s0", replace(CONFIG, logging=LoggingConfig(plots=True)))
    orders = {"stage": "s0", "rank": 0, "step": 2, "how": "raise"}
    (tmp_path / "demo" / "orders.json").write_text(json.dumps(orders))
    process = by_hand(folder)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "rank 0 failed: the loss is not finite" in said
    assert json.loads((folder / "FAILED.json").read_text())["step"] == 1
    assert job_rows(tmp_path, "s0", "end")[0]["exit_codes"] == [1]
    assert 'class="failed"' in (tmp_path / "demo" / "report.html").read_text()


def test_a_stage_looks_for_its_inputs_before_it_loads_anything(tmp_path, capsys):
    folder = planned(tmp_path, "s1")
    assert main([str(folder)], graph_of=counting_graph) == 2
    assert "s1 needs s0, but" in capsys.readouterr().err
    assert not (folder / "FAILED.json").exists()


def test_folder_without_config_and_of_no_stage(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "config.yaml is missing" in capsys.readouterr().err
    with pytest.raises(ValueError, match="knows no stage s9; it has s0, s1"):
        read_stage(planned(tmp_path, "s9"), "", stage_graph)


def test_call_without_a_folder_explains_itself(capsys):
    assert main([]) == 2 and main(["--help"]) == 0
    assert "python -m tdro_hpc.run runs/demo/s0" in capsys.readouterr().out


def test_saved_config_is_the_one_that_is_read(tmp_path):
    config = replace(CONFIG, seed=7)
    assert read_stage(planned(tmp_path, "s0", config), "s0", stage_graph)[0] == config


def test_place_by_hand():
    assert (place_by_hand({}).rank, place_by_hand({}).world) == (0, 1)
    place = place_by_hand({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "5"})
    assert (place.rank, place.world, place.local_rank, place.rendezvous) == (3, 4, 1, "tcp://n1:5")
    with pytest.raises(ValueError, match="WORLD_SIZE is 4, but RANK and MASTER_PORT is not set"):
        place_by_hand({"WORLD_SIZE": "4", "MASTER_ADDR": "n1"})


@pytest.mark.parametrize("kind", ["s0", "s1", "s2", "eval"])
def test_every_kind_has_a_function(kind):
    assert callable(stage_function(kind))
