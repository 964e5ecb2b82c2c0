"""s1 in one process on tiny tasks: what it writes, and that cached reference losses make the model unnecessary."""

import json
from pathlib import Path

import pytest

from tdro_hpc.parallel.process import start_process
from tdro_hpc.stages import s0, s1, s2
from tdro_hpc.stages.graph import stage_graph
from tdro_hpc.training.finite import NotFiniteError
from tests.distributed.training_run import config_of, write_tasks


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run directory with s0 and an s1 that cached its reference losses."""
    folder = tmp_path_factory.mktemp("s1")
    write_tasks(folder / "data")
    return folder, run(folder, "s0") and run(folder, "s1", "s1.reference_losses=cached")


def run(folder: Path, stage: str, *more: str):
    config = config_of(folder, 1, ["data.loader_workers=0", *more])
    process = start_process(config.parallel, rank=0, world=1, local_rank=0, rendezvous="")
    (folder / "run" / stage).mkdir(parents=True, exist_ok=True)
    kind = {"s0": s0, "s1": s1}.get(stage, s2)
    kind.run(config, stage_graph(config)[stage], folder / "run", process)
    return config


def test_weights_files_have_the_released_structure(trained):
    folder, _ = trained
    weights = folder / "run" / "s1" / "out" / "weights"
    names = sorted(path.name for path in weights.iterdir())
    assert names == ["curr_weights.json", "ema_weights.json", "mean_weights.json", "top70_weights.json"]
    document = json.loads((weights / "curr_weights.json").read_text())
    assert list(document) == ["domain_ids", "domain_weights", "size", "epoch"]
    assert document["size"] == {"colours": 30, "places": 24, "tools": 17}
    assert sum(document["domain_weights"].values()) == pytest.approx(1.0)


def test_summary_names_every_task(trained):
    words = (trained[0] / "run" / "s1" / "out" / "summary.txt").read_text()
    assert all(task in words for task in ("colours", "places", "tools"))
    assert "uniform would be 0.333" in words


def test_cached_losses_make_the_reference_model_unnecessary(trained, monkeypatch):
    folder, _ = trained
    before = (folder / "run" / "s1" / "trajectory.jsonl").read_text()
    for path in (folder / "run" / "s1").iterdir():
        path.rename(folder / f"first-{path.name}")

    def refuse(*words, **more):
        raise AssertionError("the reference model was loaded")

    monkeypatch.setattr(s1, "load_encoder", refuse)
    run(folder, "s1", "s1.reference_losses=cached", "s1.eta=0.1")  # another eta reads the same losses
    after = (folder / "run" / "s1" / "trajectory.jsonl").read_text()
    assert after != before
    first = [json.loads(text.splitlines()[0])["measurement"] for text in (before, after)]
    assert first[0] == first[1]  # the first step is measured on the same proxy and the same reference losses


def test_loss_reweighting_trains_on_uniform_draws_with_factors(trained):
    folder, _ = trained
    run(folder, "s2-curr", "s2.transfer=loss")
    assert list((folder / "run" / "s2-curr" / "out" / "model").glob("*.safetensors"))


def test_percent_that_keeps_no_task_is_refused_before_training(trained, tmp_path):
    folder, _ = trained
    with pytest.raises(ValueError, match="top20 of 3 tasks"):
        run(folder, "s1", "s1.top_percents=20")


def test_infinite_loss_names_task_row_and_step(trained, monkeypatch):
    folder, _ = trained
    config = config_of(folder, 1, ["data.loader_workers=0"])
    process = start_process(config.parallel, rank=0, world=1, local_rank=0, rendezvous="")
    run_dir = folder / "broken"
    (run_dir / "s0").mkdir(parents=True)
    original = s0.ContrastiveStep.__call__

    def poisoned(self, number, batches):
        if number == 4:
            parameter = next(p for p in self.engine.encoder.parameters() if p.requires_grad)
            parameter.data.fill_(float("nan"))
        return original(self, number, batches)

    monkeypatch.setattr(s0.ContrastiveStep, "__call__", poisoned)
    with pytest.raises(NotFiniteError, match=r"not finite at step 4 for 8 of 8 rows(.|\n)*task (colours|places|tools)"):
        s0.run(config, stage_graph(config)["s0"], run_dir, process)
    kept = sorted(path.name for path in (run_dir / "s0" / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000004"]
