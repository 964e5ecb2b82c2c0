import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from tdro_hpc.atomic import new_folder, write_json
from tdro_hpc.config.load import ConfigError, load_config, save_config
from tdro_hpc.config.schema import Config, DataConfig, EvalConfig, LoraConfig, ModelConfig, TrainingConfig
from tdro_hpc.encoders.backbone import Encoder, load_encoder, save_encoder
from tdro_hpc.encoders.saving import trainable_state
from tdro_hpc.encoders.tiny import build_tiny
from tdro_hpc.encoders.tokenization import load_tokenizer
from tdro_hpc.evaluation.metrics import score_run
from tdro_hpc.launch.call import read_call
from tdro_hpc.parallel.process import Process
from tdro_hpc.parallel.torch_engine import TorchEngine
from tdro_hpc.stages import eval as stage_eval
from tdro_hpc.stages import export
from tdro_hpc.stages.graph import stage_graph
from tdro_hpc.stages.inputs import input_problems
from tdro_hpc.submit import main
from tdro_hpc.training.checkpoint import save_checkpoint
from tdro_hpc.training.stop import StopFlag, Stopped

ONE = Process(0, 1, 0, torch.device("cpu"))
TEXTS = ["one", "another text, a longer one", "", "long " * 100]
WORDS = ["apple", "river", "stone", "cloud", "violin", "pepper", "engine", "harbor"]


def changed(config: ModelConfig, seed: int) -> Encoder:
    encoder = load_encoder(config, device="cpu", seed=1)
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainable_state(encoder).values():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return encoder


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Two tasks and a config of a run in the working directory."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "rows"
    data.mkdir()
    for task, rows in (("news", 3), ("mails", 1)):
        row = {"query": "a", "positive_passages": [{"text": "b"}], "negative_passages": [{"text": "c"}]}
        (data / f"{task}.jsonl").write_text((json.dumps(row) + "\n") * rows)
    (data / "tasks.yaml").write_text("news:\n  instructions: [Find the news]\n  language: en\nmails: {}\n")
    (data / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    return tmp_path


def config_of(place: Path, *, lora: bool = True, **model) -> Config:
    values = {"name": "tiny:qwen2", "autocast": "float32", "lora": LoraConfig(enabled=lora, rank=4)} | model
    return Config(
        name="exp",
        model=ModelConfig(**values),
        data=DataConfig(
            dir=str(place / "rows"), cache_dir=str(place / "cache"), passage_max_tokens=24, query_max_tokens=16
        ),
        s0=TrainingConfig(steps=4, warmup_steps=0, weights="size"),
        eval=EvalConfig(dir=str(place / "sets"), instruction="Find it", passage_max_tokens=24, query_max_tokens=24),
    )


def train(config: Config, *, done: bool = True) -> Encoder:
    """What stage s0 leaves: config, two checkpoints of which the last is the model, out/model."""
    stage_dir = Path(config.runs_dir, config.name, "s0")
    save_config(config, stage_dir / "config.yaml")
    for step in (2, 4):
        encoder = changed(config.model, seed=step)
        engine = TorchEngine(encoder, ONE, config.s0)
        save_checkpoint(stage_dir / "checkpoints", step, {"engine": engine}, keep=2)
    encoder.eval()
    tokenizer = load_tokenizer(config.model)
    tokenizer.encode(["what it did last"], max_tokens=3)
    with new_folder(stage_dir / "out" / "model") as folder:
        save_encoder(encoder, tokenizer, folder)
    if done:
        write_json(stage_dir / "DONE.json", {"code": "abc123"})
    return encoder


def make(config: Config, **settings) -> Path:
    """The folder that the stage makes."""
    config = dataclasses.replace(config, export=dataclasses.replace(config.export, **({"stage": "s0"} | settings)))
    export.run(config, stage_graph(config)["export"], Path(config.runs_dir, config.name), ONE)
    return Path(config.runs_dir, config.name, "export", "out", "model")


def vectors(encoder: Encoder, tokenizer, texts=TEXTS) -> torch.Tensor:
    with torch.no_grad():
        return encoder(tokenizer.encode(list(texts), max_tokens=24))


@pytest.mark.parametrize("checkpoint", [0, -1])
@pytest.mark.parametrize("lora", [True, False])
def test_exported_folder_gives_the_vectors_of_the_stage(lora, checkpoint, place):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    config = config_of(place, lora=lora)
    encoder, tokenizer = train(config), load_tokenizer(config.model)
    if checkpoint:
        shutil.rmtree(place / "runs/exp/s0/out")  # a stage that is not done has none
    folder = make(config, checkpoint=checkpoint)
    expected = vectors(encoder, tokenizer)
    again = load_encoder(config.model, folder=folder, device="cpu", seed=9)
    assert not again.config.lora.enabled
    assert_close(vectors(again, load_tokenizer(again.config, folder)), expected, rtol=0, atol=1e-5)
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    assert_close(model.encode(TEXTS, convert_to_tensor=True), expected, rtol=0, atol=1e-5)
    assert model.prompts["query"] == "Instruct: Find it\nQuery: " and model.max_seq_length == 24
    assert model.prompts["news"] == "Instruct: Find the news\nQuery: " and "mails" not in model.prompts
    pickles = [file.name for file in folder.rglob("*") if file.suffix in (".bin", ".pt", ".pkl")]
    assert not pickles and not list(folder.parent.glob(".*"))


def test_named_checkpoint_and_newest_one_are_those_of_their_steps(place):
    config = config_of(place)
    train(config, done=False)
    for step in (2, 4):
        folder = make(config, checkpoint=step)
        expected = vectors(changed(config.model, seed=step), load_tokenizer(config.model))
        found = vectors(load_encoder(config.model, folder=folder, device="cpu", seed=9), load_tokenizer(config.model))
        assert_close(found, expected, rtol=0, atol=1e-5)
        assert f"checkpoints/step-0000000{step}" in (folder / "README.md").read_text()


@pytest.mark.parametrize("lora", [True, False])
def test_checkpoint_and_model_of_its_step_make_the_same_files(lora, place):
    config = config_of(place, lora=lora, name="tiny:llama")
    train(config)
    of_model = {path.name: path.read_bytes() for path in make(config).rglob("*") if path.is_file()}
    of_checkpoint = {path.name: path.read_bytes() for path in make(config, checkpoint=4).rglob("*") if path.is_file()}
    assert of_model.keys() == of_checkpoint.keys()
    differ = [name for name, content in of_model.items() if of_checkpoint[name] != content]
    assert differ == ["README.md"]  # it says which of the two it is


def test_type_and_size_of_the_files_are_those_asked_for(place):
    config = config_of(place)
    train(config)
    folder = make(config, dtype="bfloat16", max_shard_gb=0.0005)
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 3 and (folder / "model.safetensors.index.json").is_file()
    assert all(file.stat().st_size < 510_000 for file in files)
    assert {value.dtype for file in files for value in load_file(file).values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert "| weights | bfloat16, with LoRA of rank 4 merged |" in (folder / "README.md").read_text()


def test_adapter_is_written_for_peft_and_sentence_transformers(place):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    base = build_tiny("llama", place / "base")
    config = config_of(place, name=str(base))
    encoder, tokenizer = train(config), load_tokenizer(config.model)
    folder = make(config, lora="adapter")
    assert {file.name for file in folder.glob("*.safetensors")} == {"adapter_model.safetensors"}
    again = load_encoder(config.model, folder=folder, device="cpu", seed=9)
    assert torch.equal(vectors(again, tokenizer), vectors(encoder, tokenizer))
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    assert_close(model.encode(TEXTS, convert_to_tensor=True), vectors(encoder, tokenizer), rtol=0, atol=1e-5)


def write_set(folder: Path) -> dict[str, dict[str, int]]:
    """A test set whose queries share a word with their document; its judgements."""
    (folder / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{row}", "title": word, "text": f"about the {word}"} for row, word in enumerate(WORDS)]
    queries = [{"_id": f"q{row}", "text": f"what is a {word}"} for row, word in enumerate(WORDS)]
    for name, rows in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = "".join(f"q{row}\td{row}\t1\n" for row in range(len(WORDS)))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    return {f"q{row}": {f"d{row}": 1} for row in range(len(WORDS))}


def test_exported_folder_scores_as_the_stage_does_in_eval_and_in_sentence_transformers(place):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    judgements = write_set(place / "sets" / "fruit")
    config = config_of(place)
    train(config)
    folder = make(config)
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, models=f"s0,{folder}", top_k=100))
    stage_eval.run(config, stage_graph(config)["eval"], place / "runs/exp", ONE)
    scores = json.loads((place / "runs/exp/eval/out/scores/scores.json").read_text())
    of_models = scores["sets"]["fruit"]["scores"]
    assert list(of_models) == ["s0", "exp-export"] and of_models["s0"] == of_models["exp-export"]
    assert 0 < of_models["s0"]["nDCG@10"] < 1
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    queries = model.encode_query([f"what is a {word}" for word in WORDS])
    documents = model.encode_document([f"{word} about the {word}" for word in WORDS])
    table = model.similarity(queries, documents)
    run = {f"q{row}": [(f"d{column}", float(table[row, column])) for column in range(8)] for row in range(8)}
    ranked = {name: sorted(ranking, key=lambda pair: -pair[1]) for name, ranking in run.items()}
    assert score_run(ranked, judgements).means["nDCG@10"] == pytest.approx(of_models["s0"]["nDCG@10"], abs=1e-9)


def test_card_is_written_from_the_run(place):
    config = config_of(place)
    train(config)
    (place / "runs/exp/s0/plots").mkdir()
    (place / "runs/exp/s0/plots/loss.png").write_bytes(b"png")
    card = (make(config) / "README.md").read_text()
    assert "| `news` | 3 | 0.7500 | 0.7500 | - |" in card and "| `mails` | 1 | 0.2500 | 0.2500 | - |" in card
    assert "language:\n- en" in card and "| data of the 2 tasks | cc-by-4.0 |" in card
    assert "| `tiny:qwen2` | not stated |" in card and "license:" not in card
    assert "| code that trained it | `abc123` |" in card and "  learning_rate: 0.0001" in card
    assert "(plots/s0-loss.png)" in card and (place / "runs/exp/export/out/model/plots/s0-loss.png").is_file()
    assert "## Evaluation" not in card


def test_lines_of_the_card_load_the_model(place):
    pytest.importorskip("sentence_transformers")
    config = config_of(place)
    train(config)
    card = (make(config) / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL).group(1)
    assert len(code.strip().splitlines()) == 3
    names = {}
    exec(code, names)
    assert names["scores"].shape == (1, 2)


def test_data_that_is_gone_leaves_the_card_without_rows(place, caplog):
    config = config_of(place)
    train(config)
    shutil.rmtree(place / "rows")
    card = (make(config) / "README.md").read_text()
    assert "the model card has only the tasks that the config names" in caplog.text
    assert "## Tasks" not in card and "| data of the 0 tasks | not stated |" in card


def test_damaged_checkpoint_is_named_and_the_one_before_it_offered(place):
    config = config_of(place)
    train(config)
    (state,) = (place / "runs/exp/s0/checkpoints/step-00000004").glob("*.safetensors")
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    with pytest.raises(ValueError, match=r"step-00000004 is damaged.*after step 2.*Or type export.checkpoint=2"):
        make(config, checkpoint=-1)
    assert not (place / "runs/exp/export/out/model").exists()
    make(config, checkpoint=2)


def test_stop_between_tensors_leaves_nothing(place, monkeypatch):
    config = config_of(place)
    train(config)
    flag = StopFlag()
    flag.request(15)
    monkeypatch.setattr(export, "stop_flag", lambda: flag)
    with pytest.raises(Stopped):
        make(config)
    assert list((place / "runs/exp/export/out").iterdir()) == []


def problems(place: Path, *words: str) -> list[str]:
    config = load_config(["name=exp", *words]).config
    return input_problems(config, [stage_graph(config)["export"]])


def test_mistakes_are_said_before_anything_runs(place):
    assert problems(place, "export.stage=s0") == []  # s0 is run first
    (words,) = problems(place, "export.stage=s0", "export.checkpoint=-1")
    assert "runs/exp/s0 has no checkpoint yet. Type export.checkpoint=0" in words
    train(config_of(place, lora=False))
    (words,) = problems(place, "export.stage=s0", "export.checkpoint=3")
    assert "has those after step 2, 4. Type export.checkpoint=4" in words
    (words,) = problems(place, "export.stage=s0", "export.lora=adapter")
    assert "all weights were trained" in words and words.endswith("Type export.lora=merge.")
    for key, value, cure in (
        ("export.stage", "s2-top30", "s2.weights=curr,top30"),
        ("export.stage", "s3", "Type export.stage=s2."),
        ("export.checkpoint", "-2", "Type export.checkpoint=0"),
        ("export.dtype", "int8", "auto, float32, bfloat16, float16"),
        ("export.lora", "both", "merge, adapter"),
        ("export.max_shard_gb", "0", "must be > 0"),
        ("export.push", "retriever", "Type export.push=my-org/my-retriever."),
        ("export.push", "a/b--c", "without --"),
    ):
        with pytest.raises(ConfigError, match=re.escape(cure)):
            load_config([f"{key}={value}"])
    with pytest.raises(ConfigError, match="an adapter is written as it was trained"):
        load_config(["export.lora=adapter", "export.dtype=bfloat16"])


def test_adapters_that_others_could_not_load_are_refused(place):
    words = {"name=tiny:qwen2": "cannot find the model 'tiny:qwen2'", f"name={place}/base": "bidirectional=true"}
    build_tiny("qwen2", place / "base")
    for name, expected in words.items():
        (found,) = problems(place, "export.lora=adapter", f"model.{name}", "model.bidirectional=true")
        assert expected in found and found.endswith("Type export.lora=merge.")


def test_pickled_base_is_refused_before_anything_runs(place):
    base = build_tiny("llama", place / "base")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    (words,) = problems(place, f"model.name={base}")
    assert "no safetensors file" in words and "Type export.lora=adapter" in words
    assert problems(place, f"model.name={base}", "export.lora=adapter") == []


def test_mistakes_end_with_2_and_no_folder_is_made(place, capsys):
    assert main(["stage=export", "name=exp", "export.checkpoint=7"]) == 2
    assert "has no checkpoint yet" in capsys.readouterr().err
    assert main(["stage=export", "export.dtype=int4"]) == 2
    assert not (place / "runs").exists()


def test_place_of_the_stage_in_the_chain():
    call = read_call(["stage=all,export", "s2.weights=curr,top70"], graph_of=stage_graph)
    stage = stage_graph(call.config)["export"]
    assert (stage.needs, stage.follows, stage.ranks) == (("s2-curr",), ("s2-curr", "eval"), "one")
    of_checkpoint = read_call(["export.checkpoint=-1", "export.stage=s1"], graph_of=stage_graph).config
    assert stage_graph(of_checkpoint)["export"].needs == ()
