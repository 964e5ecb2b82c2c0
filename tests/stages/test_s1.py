"""s1 in one process on tiny tasks: what it writes, and that cached reference losses make the model unnecessary."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tdro_hpc.dro import TaskWeights
from tdro_hpc.parallel.process import start_process
from tdro_hpc.stages import assembly, s0, s1, s2
from tdro_hpc.stages.graph import stage_graph
from tdro_hpc.training.finite import NotFiniteError
from tdro_hpc.training.stop import Stopped
from tests.distributed.training_run import config_of, write_tasks
from tests.reference.infonce import slow_infonce


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run directory with s0 and an s1 that cached its reference losses."""
    folder = tmp_path_factory.mktemp("s1")
    write_tasks(folder / "data")
    return folder, run(folder, "s0") and run(folder, "s1", "s1.reference_losses=cached")


def run(folder: Path, stage: str, *more: str, name: str = "run"):
    config = config_of(folder, 1, ["data.loader_workers=0", *more])
    process = start_process(config.parallel, rank=0, world=1, local_rank=0, rendezvous="")
    (folder / name / stage).mkdir(parents=True, exist_ok=True)
    kind = {"s0": s0, "s1": s1}.get(stage, s2)
    kind.run(config, stage_graph(config)[stage], folder / name, process)
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

    monkeypatch.setattr(s1, "build_frozen", refuse)
    run(folder, "s1", "s1.reference_losses=cached", "s1.eta=0.1")  # another eta reads the same losses
    after = (folder / "run" / "s1" / "trajectory.jsonl").read_text()
    assert after != before
    first = [json.loads(text.splitlines()[0])["measurement"] for text in (before, after)]
    assert first[0] == first[1]  # the first step is measured on the same proxy and the same reference losses


def test_loss_reweighting_trains_on_uniform_draws_with_factors(trained):
    folder, _ = trained
    run(folder, "s2-curr", "s2.transfer=loss")
    assert list((folder / "run" / "s2-curr" / "out" / "model").glob("*.safetensors"))


def test_percent_that_keeps_no_task_is_refused_before_the_model_is_loaded(trained, monkeypatch):
    monkeypatch.setattr(assembly, "build_engine", None)
    with pytest.raises(ValueError, match="top20 of 3 tasks.*s1.top_percents=50,70"):
        run(trained[0], "s1", "s1.top_percents=20,50,70")


def test_summary_without_reference_losses_has_dashes(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "task_loss": {"a": 0.5, "b": 0.25}}) + "\n")
    training = SimpleNamespace(stage_dir=tmp_path, training=SimpleNamespace(config=None))
    training.training.config = training.config = SimpleNamespace(s1=SimpleNamespace(measurement="loss"))
    lines = s1._summary(training, TaskWeights(["a", "b"])).splitlines()
    assert lines[2].split() == ["a", "0.500", "1.00", "0.5000", "-"]


def training_of(folder, *more):
    config = config_of(folder, 1, ["data.loader_workers=0", *more])
    process = start_process(config.parallel, rank=0, world=1, local_rank=0, rendezvous="")
    return assembly.assemble(config, stage_graph(config)["s1"], config.s1, folder / "run", process, weights="uniform")


def test_reference_in_chunks_gives_the_same_losses_and_never_more_tokens(trained):
    chunked = ["loss.gradient_cache=true", "loss.chunk_tokens=100"]
    whole, pieces = (training_of(trained[0], *more) for more in (["loss.gradient_cache=false"], chunked))
    model, sizes = s1._ReferenceModel(pieces), []
    model.model.encoder.register_forward_hook(lambda module, inputs, output: sizes.append(inputs[0].input_ids.numel()))
    batch = whole.batches.batch(0, 0)
    found = model(batch)
    torch.testing.assert_close(found, s1._ReferenceModel(whole)(batch), rtol=1e-4, atol=1e-5)
    assert not found.requires_grad and len(sizes) > 8 and max(sizes) <= 100


def losses_by_hand(encoder, batch, temperature):
    """Row losses of a batch, in float64, over the passages of the rows of the same task."""
    with torch.no_grad():
        queries, passages = (encoder(tokens) for tokens in (batch.query_tokens, batch.passage_tokens))
    per_query = len(passages) // len(queries)
    return slow_infonce(
        queries,
        passages,
        per_query * torch.arange(len(queries)),
        temperature=temperature,
        query_group=batch.task_ids,
        document_group=batch.task_ids.repeat_interleave(per_query),
        document_ids=batch.document_ids,
        known_positive_ids=batch.known_positive_ids,
    )


def test_negatives_of_the_same_task_measure_proxy_against_reference_on_the_same_columns(trained):
    folder, more = trained[0], ["s1.negatives=task", "model.lora.dropout=0"]
    (folder / "task").mkdir()
    (folder / "task" / "s0").symlink_to(folder / "run" / "s0")
    run(folder, "s1", *more, name="task")
    training = training_of(folder, *more)
    batches = [training.batches.batch(0, micro_step) for micro_step in range(2)]
    sides = [training.engine.encoder, s1._ReferenceModel(training).model.encoder]
    proxy, reference = (
        torch.cat([losses_by_hand(encoder, batch, config_of(folder, 1, []).s1.temperature) for batch in batches])
        for encoder in sides
    )
    task_ids = torch.cat([batch.task_ids for batch in batches])
    assert set(torch.bincount(batches[0].task_ids).tolist()) > {2}, "tasks with several rows, not all as many"
    rows = [json.loads(line) for line in (folder / "task" / "s1" / "trajectory.jsonl").read_text().splitlines()]
    for number, task in enumerate(training.tasks):
        here = task_ids == number
        wanted = float(proxy[here].mean() / reference[here].mean())  # before the first update
        assert rows[0]["measurement"][task] == pytest.approx(wanted, rel=1e-3)  # float32 scores over 0.05
    assert len(rows) == 7
    own = s1._ReferenceModel(training_of(folder))(batches[0])
    assert bool((reference[: len(own)] >= own - 1e-3).all()) and reference[: len(own)].sum() > own.sum() + 1
    weights = folder / "task" / "s1" / "out" / "weights" / "curr_weights.json"
    assert sum(json.loads(weights.read_text())["domain_weights"].values()) == pytest.approx(1.0)


def test_losses_that_depend_on_the_rows_beside_them_are_not_cached(trained):
    with pytest.raises(ValueError, match="'task': the loss of a row then depends on the rows beside it") as caught:
        config_of(trained[0], 1, ["s1.negatives=task", "s1.reference_losses=cached"])
    assert "Type s1.negatives=group or s1.reference_losses=online." in str(caught.value)


def test_cached_losses_of_other_negatives_are_not_read(trained, monkeypatch):
    training = training_of(trained[0])
    name = s1._fingerprint(training)
    monkeypatch.setattr(s1, "_HASHED_BYTES", 1000)  # the size of the pieces does not show
    assert s1._fingerprint(training) == name
    assert s1._fingerprint(training_of(trained[0], "s1.negatives=task")) != name


def test_stop_in_the_cached_pass_is_agreed_at_a_file_boundary(trained, monkeypatch):
    asked = []
    flag = SimpleNamespace(reason="", requested=False, agreed=lambda: asked.append(1) or len(asked) == 2)
    monkeypatch.setattr(s1, "stop_flag", lambda: flag)
    with pytest.raises(Stopped, match="another rank"):
        s1._compute(training_of(trained[0]), trained[0] / "half")
    assert len(list((trained[0] / "half").iterdir())) == 2


def test_infinite_loss_names_task_row_and_step(trained, monkeypatch):
    folder, _ = trained
    config = config_of(folder, 1, ["data.loader_workers=0"])
    process = start_process(config.parallel, rank=0, world=1, local_rank=0, rendezvous="")
    run_dir = folder / "broken"
    (run_dir / "s0").mkdir(parents=True)
    original = s0.ContrastiveStep.__call__

    def poisoned(self, number, batches):
        if number == 4:  # counted from 0
            parameter = next(p for p in self.engine.encoder.parameters() if p.requires_grad)
            parameter.data.fill_(float("nan"))
        return original(self, number, batches)

    monkeypatch.setattr(s0.ContrastiveStep, "__call__", poisoned)
    with pytest.raises(NotFiniteError, match=r"not finite at step 5 for 8 of 8 rows(.|\n)*task (colours|places|tools)"):
        s0.run(config, stage_graph(config)["s0"], run_dir, process)
    kept = sorted(path.name for path in (run_dir / "s0" / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000004"]
