from pathlib import Path

import pytest

from tdro_hpc.config.keys import KEYS, SECTIONS, TASK_KEYS
from tdro_hpc.config.load import ConfigError, load_config


def problems_of(arguments: list[str], folder: Path | None = None, **options) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(arguments, configs_dirs=[folder / "configs"] if folder else None, **options)
    return caught.value.problems


def in_folder(folder: Path, monkeypatch, **files: str) -> Path:
    for name, text in files.items():
        path = folder / "configs" / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.chdir(folder)
    return folder


S1 = """\
seed: many
s1:
  temprature: 0.1
  steps: 0
  learning_rate: 1e-4
  steps: 500
loss:
  temperature: 0.1
model:
  lora:
    rank: 0
data:
  tasks:
    news:
      format: json
      rows: 12
      symetric: true
"""


def test_all_mistakes_of_one_call_come_together_each_with_its_place(tmp_path, monkeypatch):
    folder = in_folder(tmp_path, monkeypatch, s1=S1, model__big="poling: last\npadding_side: up\n")
    arguments = ["config=s1", "s0.steps=1e3", "model.name", "eval.topk=5", "cluster=moon", "s2.weights=best", "s2=1"]
    assert problems_of(arguments, folder) == [
        "'model.name' on the command line is not of the form key=value. Type model.name=<value>.",
        "s1.steps is given twice: in configs/s1.yaml:4 and in configs/s1.yaml:6. Delete one of the two.",
        "cluster=moon on the command line: there is no file moon.yaml in configs/cluster. "
        "Type cluster=<path of a YAML file>.",
        "seed in configs/s1.yaml:1 is 'many'; it must be a whole number. Type seed=42.",
        "Unknown key s1.temprature in configs/s1.yaml:3. Did you mean s1.temperature (default 0.002)? "
        "Write temperature: 0.1 in its place.",
        "Unknown key loss.temperature in configs/s1.yaml:8. Did you mean s0.temperature, s1.temperature or "
        "s2.temperature (default 0.002)? Delete the line and type s0.temperature=0.1.",
        "Unknown key data.tasks.news.symetric in configs/s1.yaml:17. Did you mean data.tasks.news.symmetric "
        "(default false)? Write symmetric: true in its place.",
        "s0.steps on the command line is '1e3'; it must be a whole number. Type s0.steps=1000.",
        "Unknown key eval.topk on the command line. Did you mean eval.top_k (default 1000)? Type eval.top_k=5.",
        "s2 on the command line is '1', but s2 is a section of keys. Type s2.steps=<value>.",
        "model.lora.rank in configs/s1.yaml:11 is 0; it must be >= 1 (usual: 8 to 64). Type model.lora.rank=8.",
        "data.tasks.news.format in configs/s1.yaml:15 is 'json'; it must be one of tdro, llm_embedder, pairs, beir, "
        "msmarco. Type data.tasks.news.format=tdro.",
    ]


def test_mistakes_in_a_picked_file_name_that_file(tmp_path, monkeypatch):
    folder = in_folder(tmp_path, monkeypatch, model__big="poling: last\npadding_side: up\n")
    assert problems_of(["model=big"], folder) == [
        "Unknown key model.poling in configs/model/big.yaml:1. Did you mean model.pooling (default last)? "
        "Write pooling: last in its place.",
        "model.padding_side in configs/model/big.yaml:2 is 'up'; it must be one of right, left. "
        "Type model.padding_side=right.",
    ]


def test_every_refusal_of_a_range_is_there_and_says_what_to_type():
    assert problems_of(["s0.temperature=-1", "s1.eta=0", "cluster.nodes=2", "s0.adam_beta2=1"]) == [
        "cluster.nodes on the command line is 2; cluster=local has one node. Set cluster.nodes=1.",
        "s0.temperature on the command line is -1.0; it must be > 0 (usual: 0.002 to 0.05). Type s0.temperature=0.002.",
        "s0.adam_beta2 on the command line is 1.0; it must lie between 0 and 0.999999 (usual: 0.999). "
        "Type s0.adam_beta2=0.999.",
        "s1.eta on the command line is 0.0; it must be > 0 (usual: 0.02). Type s1.eta=0.02.",
    ]


def misspelt(name: str) -> str:
    section, dot, last = name.rpartition(".")
    return f"{section}{dot}{last[:-2] + last[-1] if len(last) > 3 else last + 'x'}"


def test_misspelt_key_of_every_section_is_rejected_and_the_right_one_named():
    problems = problems_of([f"{misspelt(name)}=1" for name in KEYS])
    assert len(problems) == len(KEYS)
    for name in KEYS:
        default = "?" if name == "recipe" else " (default "  # recipe is also a pick
        start = f"Unknown key {misspelt(name)} on the command line. Did you mean {name}{default}"
        (problem,) = (problem for problem in problems if problem.startswith(start))
        assert problem.endswith(f" Type {name}=1.")


@pytest.mark.parametrize("section", [*SECTIONS, "data.tasks.news"])
def test_key_that_resembles_none_lists_those_of_its_section(section):
    (problem,) = problems_of([f"{section}.zzzzzz=1"])
    known = [f"data.tasks.news.{key}" for key in TASK_KEYS] if "tasks" in section else KEYS
    inside = [key for key in known if key.startswith(f"{section}.") and "." not in key[len(section) + 1 :]]
    assert problem.startswith(
        f"Unknown key {section}.zzzzzz on the command line. Type one of these instead: {inside[0]}"
    )
    assert all(key in problem for key in inside)


def test_words_of_the_caller_and_picks_are_offered_too():
    assert problems_of(["dryrun=true", "modle=minilm"], call_options=("stage", "dry_run")) == [
        "Unknown key dryrun on the command line. Did you mean dry_run? Type dry_run=true.",
        "Unknown key modle on the command line. Did you mean model? Type model=minilm.",
    ]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("s0.steps=", "s0.steps on the command line is empty; it must be a whole number. Type s0.steps=1000."),
        (
            "s0.steps=[1,2]",
            "s0.steps on the command line is ['1', '2']; it must be a whole number. Type s0.steps=1000.",
        ),
        (
            "s0.temperature=low",
            "s0.temperature on the command line is 'low'; it must be a number. Type s0.temperature=0.002.",
        ),
        (
            "loss.false_negative_margin=x",
            "loss.false_negative_margin on the command line is 'x'; it must be a number or null. "
            "Type loss.false_negative_margin=null.",
        ),
        (
            "logging.plots=maybe",
            "logging.plots on the command line is 'maybe'; it must be true or false. Type logging.plots=true.",
        ),
        ("stages=s0,s1", "stages on the command line is 's0,s1'; it must be a list of texts. Type stages=[s0,s1]."),
        ("data.only=[a,b]", "data.only on the command line is ['a', 'b']; it must be text. Type data.only=a,b."),
        (
            "runs_dir=${HOME}/runs",
            "runs_dir on the command line is '${HOME}/runs'; values are taken as they stand, ${...} and ??? stand for "
            "nothing. Type runs_dir=<the value itself>.",
        ),
        (
            "data.tasks.news=beir",
            "data.tasks.news on the command line is 'beir', but data.tasks.news is a section of keys. "
            "Type data.tasks.news.file=<value>.",
        ),
    ],
)
def test_wrong_type_says_got_expected_and_what_to_type(argument, expected):
    assert problems_of([argument]) == [expected]


def test_wrong_type_in_a_layer_below_is_found_although_a_layer_above_covers_it(tmp_path, monkeypatch):
    folder = in_folder(tmp_path, monkeypatch, mine="s0:\n  steps: many\n")
    assert problems_of(["config=mine", "s0.steps=400"], folder) == [
        "s0.steps in configs/mine.yaml:2 is 'many'; it must be a whole number. Type s0.steps=1000."
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s0:\n  steps: 1\n bad: 2\n", "configs/mine.yaml:3 is not YAML: "),
        ("s0: a: b\n", "configs/mine.yaml:1 is not YAML: mapping values are not allowed in this context"),
        ("- s0\n", "configs/mine.yaml:1 holds no keys. Write one `key: value` a line."),
        (
            "s0: {steps: 100}\nseed: 1\ns0: {log_every_steps: 2}\n",
            "s0 is given twice: in configs/mine.yaml:1 and in configs/mine.yaml:3",
        ),
        (
            "s0.steps: 100\ns0: {steps: 200}\n",
            "s0.steps is given twice: in configs/mine.yaml:1 and in configs/mine.yaml:2",
        ),
        (
            "seed: 1\nmodel: minilm\n",
            "model in configs/mine.yaml:2 is 'minilm', but model is a section of keys. "
            "To pick configs/model/minilm.yaml write use: {model: minilm}.",
        ),
        ("use: minilm\n", "use in configs/mine.yaml:1 is 'minilm'; it must pick by group. Write use: {model: <name>}"),
        ("use:\n  modle: x\n", "Unknown pick use.modle in configs/mine.yaml:2. Write model in its place."),
        (
            "use:\n  data: x\n  model: gone\n",
            "model=gone in configs/mine.yaml:3: there is no file gone.yaml in configs/model.",
        ),
    ],
)
def test_mistakes_of_form_in_a_file_name_its_line(tmp_path, monkeypatch, text, expected):
    folder = in_folder(tmp_path, monkeypatch, mine=text, data__x="hub: a/b\n")
    (problem,) = problems_of(["config=mine"], folder)
    assert problem.startswith(expected)


def test_file_that_is_not_text_is_refused(tmp_path, monkeypatch):
    folder = in_folder(tmp_path, monkeypatch, mine="")
    (folder / "configs" / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    (problem,) = problems_of(["config=mine"], folder)
    assert problem.startswith("configs/mine.yaml cannot be read: ") and "Save it as UTF-8" in problem


@pytest.mark.parametrize(
    "text", ["? [a]\n: 1\n", "? {a: 1}\n", "use: {? [a]: b}\n", "s0: {? [a]: b}\n", "<<: {? [a]: b}\n"]
)
def test_keys_that_are_no_names_are_unknown_keys(tmp_path, monkeypatch, text):
    (problem,) = problems_of(["config=mine"], in_folder(tmp_path, monkeypatch, mine=text))
    assert problem.startswith("Unknown ") and "in configs/mine.yaml:1" in problem


def test_arguments_that_no_file_system_or_terminal_knows_are_mistakes_too():
    pick, undecoded = problems_of([f"model={'9' * 400}", "name=\udcff"], None)[::-1]
    assert undecoded == "name=\\udcff on the command line is not UTF-8. Type it in UTF-8, or rename the file."
    assert pick.startswith("model=999")


def test_unknown_pick_lists_the_nearest_names_and_what_was_perhaps_meant(tmp_path, monkeypatch):
    folder = in_folder(tmp_path, monkeypatch, model__minilm="", model__mistral="", data__news="", demo="")
    (tmp_path / "rows").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "config.yaml").write_text("")
    endings = {
        "model=minilmm": "in configs/model. Type model=minilm.",
        "model=zzz": "in configs/model. Type model=minilm or model=mistral.",
        "model=Qwen/Qwen1.5-0.5B": "For a model by its hub id, folder or package type model.name=Qwen/Qwen1.5-0.5B.",
        "data=rows": "For a folder of task files type data.dir=rows.",
        "config=runs": "Type config=runs/config.yaml.",
        "config=/x/missing.yaml": "there is no file /x/missing.yaml. Type config=demo.",
        "config=dmo": "there is no file dmo.yaml in configs. Type config=demo.",
        "data=": "there is no file <name>.yaml in configs/data. Type data=news.",
    }
    for argument, ending in endings.items():
        (problem,) = problems_of([argument], folder)
        assert problem.startswith(f"{argument} on the command line: ") and problem.endswith(ending), problem
