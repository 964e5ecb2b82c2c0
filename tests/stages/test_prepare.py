import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tdro_hpc.config.schema import Config, DataConfig, EmbeddedConfig
from tdro_hpc.embedded import build, sources
from tdro_hpc.parallel.process import Process
from tdro_hpc.stages import prepare
from tdro_hpc.stages.graph import Stage, stage_graph
from tdro_hpc.training.stop import StopFlag, Stopped

ALONE = Process(data_rank=0, data_size=1, local_rank=0, device=torch.device("cpu"))
SMALL = EmbeddedConfig(max_rows_per_task=50, test_queries=10, test_documents=50, hard_negatives=2)
CONFIG = Config(data=DataConfig(builder="embedded"), embedded=SMALL)


def stage_of(config: Config) -> Stage:
    return stage_graph(config)["prepare"]


@pytest.fixture
def small_library(monkeypatch: pytest.MonkeyPatch) -> None:
    library = sources.read_library({"standard library": 500_000, "numpy": 400_000})
    monkeypatch.setattr(build, "read_library", lambda: library)


def test_prepare_makes_what_the_stage_graph_promises(tmp_path: Path, small_library: None):
    out = tmp_path / "prepare" / "out"
    (out / ".data.4711").mkdir(parents=True)  # of a build that was killed
    prepare.run(CONFIG, stage_of(CONFIG), tmp_path, ALONE)
    assert [path.name for path in out.iterdir()] == list(stage_of(CONFIG).makes)
    facts = json.loads((out / "data" / "facts.json").read_text("utf-8"))
    assert {path.stem for path in (out / "data" / "train").iterdir()} == set(facts["tasks"])
    assert {path.name for path in (out / "data" / "test").iterdir()} == set(facts["test_sets"])


def test_failed_build_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(folder: Path, config: EmbeddedConfig, **options: Any) -> None:
        (folder / "half").touch()
        raise ValueError("the machine is bare")

    monkeypatch.setattr(prepare, "build_embedded", fail)
    with pytest.raises(ValueError, match="bare"):
        prepare.run(CONFIG, stage_of(CONFIG), tmp_path, ALONE)
    assert list((tmp_path / "prepare" / "out").iterdir()) == []


def test_a_stop_takes_effect_between_tasks_and_leaves_nothing_behind(
    tmp_path: Path, small_library: None, monkeypatch: pytest.MonkeyPatch
):
    flag, begun = StopFlag(), []
    monkeypatch.setattr(prepare, "stop_flag", lambda: flag)
    plain = build._build_task

    def build_and_stop(path: Path, name: str, *rest: Any) -> dict[str, Any]:
        begun.append(name)
        if len(begun) == 2:
            flag.request(signal.SIGINT)
        return plain(path, name, *rest)

    monkeypatch.setattr(build, "_build_task", build_and_stop)
    with pytest.raises(Stopped, match=r"prepare stopped at step 2 of 12 \(SIGINT\)"):
        prepare.run(CONFIG, stage_of(CONFIG), tmp_path, ALONE)
    assert begun == list(build.TASKS)[:2]
    assert list((tmp_path / "prepare" / "out").iterdir()) == []


def test_seed_and_sizes_of_the_config_reach_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr(
        prepare, "build_embedded", lambda folder, config, *, seed, before_task: seen.append((config, seed))
    )
    prepare.run(dataclasses.replace(CONFIG, seed=5), stage_of(CONFIG), tmp_path, ALONE)
    assert seen == [(SMALL, 5)]


def test_config_without_a_builder_says_what_to_type(tmp_path: Path):
    with pytest.raises(ValueError, match="data=embedded"):
        prepare.run(Config(), stage_of(CONFIG), tmp_path, ALONE)
