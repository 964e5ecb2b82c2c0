import dataclasses

import pytest
import yaml

from tdro_hpc.atomic import write_json
from tdro_hpc.config.schema import Config, ModelConfig, S2Config
from tdro_hpc.evaluation.tables import SetFacts, SetScores, build_scores
from tdro_hpc.report.card import ModelFacts, TaskFacts, loading_lines, write_card
from tdro_hpc.report.licences import licence_of

FACTS = ModelFacts(
    title="retriever",
    address="my-org/retriever",
    stage="s2-curr",
    origin="out/model",
    config=Config(model=ModelConfig(name="Qwen/Qwen1.5-0.5B", revision="main"), s2=S2Config(learning_rate=3e-4)),
    weights="bfloat16, with LoRA of rank 8 merged",
    width=1024,
    max_tokens=512,
    prompts={"query": "Instruct: a | b\nQuery: ", "document": ""},
    base_licence="apache-2.0",
    data_licence="not stated",
    tasks=(
        TaskFacts("nq", rows=3000, share=0.4, alpha=0.25, language="en"),
        TaskFacts("mmarco", rows=1000, share=0.6, alpha=0.75, language="zh, en"),
    ),
)


def card_of(tmp_path, facts=FACTS):
    folder = tmp_path / "folder"
    folder.mkdir(exist_ok=True)
    write_card(facts, tmp_path / "run", folder)
    return (folder / "README.md").read_text()


def test_front_matter_is_what_the_hub_reads(tmp_path):
    head = yaml.safe_load(card_of(tmp_path).split("---\n")[1])
    assert head["base_model"] == "Qwen/Qwen1.5-0.5B" and head["license"] == "apache-2.0"
    assert head["language"] == ["en", "zh"] and head["library_name"] == "sentence-transformers"
    words = dataclasses.replace(FACTS, base_licence="LICENSE: Tongyi Qianwen", tasks=())
    head = yaml.safe_load(card_of(tmp_path, words).split("---\n")[1])
    assert "license" not in head and "language" not in head
    local = dataclasses.replace(FACTS, config=Config(model=ModelConfig(name="/models/mine")))
    assert "base_model" not in card_of(tmp_path, local)


def test_tasks_have_rows_shares_and_alpha(tmp_path):
    card = card_of(tmp_path)
    assert "| `nq` | 3,000 | 0.7500 | 0.4000 | 0.2500 |" in card
    assert "alpha is the weight that tDRO learnt" in card
    unknown = dataclasses.replace(FACTS, tasks=(TaskFacts("nq"),))
    card = card_of(tmp_path, unknown)
    assert "| `nq` | not known | not known | - | - |" in card and "alpha is the weight" not in card


def test_cells_cannot_break_the_table(tmp_path):
    assert r"| `query` | `'Instruct: a \| b\nQuery: '` |" in card_of(tmp_path)


def test_loading_lines_name_the_repository(tmp_path):
    lines = loading_lines("my-org/retriever")
    assert len(lines) == 3 and "SentenceTransformer('my-org/retriever')" in lines[1]
    assert "\n".join(["```python", *lines, "```"]) in card_of(tmp_path)


def test_config_is_every_key_of_the_stage(tmp_path):
    text = card_of(tmp_path).split("```yaml\n")[1].split("\n```")[0]
    shown = yaml.safe_load(text)
    assert set(shown) == {"seed", "model", "data", "loss", "parallel", "s2"}
    assert shown["s2"] == dataclasses.asdict(FACTS.config.s2) and shown["s2"]["learning_rate"] == 3e-4


def test_evaluation_stands_in_the_card_when_it_is_done(tmp_path):
    scores = {
        model: {"fruit": SetScores({"q1": dict.fromkeys(metrics, value)}, dict.fromkeys(metrics, value))}
        for metrics in [("nDCG@10", "Recall@100", "MRR@10")]
        for model, value in (("s0", 0.5), ("s2-curr", 0.625))
    }
    table = build_scores(scores, {"fruit": SetFacts(1, 8, ("1 query has no text",))}, baseline="s0", seed=1)
    write_json(tmp_path / "run/eval/out/scores/scores.json", table)
    assert "## Evaluation" not in card_of(tmp_path)
    write_json(tmp_path / "run/eval/DONE.json", {})
    card = card_of(tmp_path)
    assert "| nDCG@10 | queries | s0 | s2-curr |" in card and "| fruit | 1 | 0.5000 | 0.6250 |" in card
    assert "fruit: 1 query has no text" in card


def test_pictures_of_the_stage_and_of_its_weights_are_copied(tmp_path):
    for stage, name in (("s1", "alpha"), ("s2-curr", "loss"), ("s0", "loss")):
        (tmp_path / "run" / stage / "plots").mkdir(parents=True)
        (tmp_path / "run" / stage / "plots" / f"{name}.png").write_bytes(b"png")
    card = card_of(tmp_path)
    copied = sorted(path.name for path in (tmp_path / "folder/plots").iterdir())
    assert copied == ["s1-alpha.png", "s2-curr-loss.png"]
    assert card.index("(plots/s1-alpha.png)") < card.index("(plots/s2-curr-loss.png)")


def test_code_of_the_stage_is_named(tmp_path):
    assert "not recorded: the stage is not done" in card_of(tmp_path)
    write_json(tmp_path / "run/s2-curr/DONE.json", {"code": "0123abc"})
    card = card_of(tmp_path)
    assert "| code that trained it | `0123abc` |" in card and "| torch | " in card


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, "not stated"),
        ({"README.md": "---\nlicense: mit\n---\n# x"}, "mit"),
        ({"README.md": "---\nlicense: other\nlicense_name: tongyi-qianwen\n---\n"}, "tongyi-qianwen"),
        ({"README.md": "---\nlicense: [mit, cc-by-4.0]\n---\n"}, "mit, cc-by-4.0"),
        (
            {"README.md": "---\nlicense: other\n---\n", "LICENSE": "\n  LLAMA 3 LICENSE\nmore"},
            "LICENSE: LLAMA 3 LICENSE",
        ),
        ({"README.md": "# no head\nlicense: mit\n---\n"}, "not stated"),
        ({"README.md": "---\nlicense: [mit\n---\n", "COPYING": "GPL"}, "COPYING: GPL"),
        ({"README.md": "---\nlicense: mit\n"}, "not stated"),
        ({"LICENSE.txt": ""}, "not stated"),
    ],
)
def test_licence_is_what_the_files_state(files, expected, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert licence_of(tmp_path) == expected


def test_licence_of_what_is_not_here_is_not_stated(tmp_path):
    assert licence_of(None) == licence_of(tmp_path / "gone") == "not stated"
