import dataclasses
import subprocess
import sys
import tempfile
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tdro_hpc.config.load import ConfigError, load_config, save_config
from tdro_hpc.config.schema import Config, LoraConfig, ModelConfig, S2Config, TaskConfig


def write(folder: Path, **files: str) -> Path:
    """A folder of configs; `model__small` is the file model/small.yaml."""
    for name, text in files.items():
        path = folder / "configs" / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "configs"


def test_no_arguments_give_the_defaults():
    loaded = load_config([])
    assert loaded.config == Config() and loaded.sources == {}


def test_command_line_goes_before_yaml_and_yaml_before_defaults(tmp_path, monkeypatch):
    write(tmp_path, mine="s0:\n  steps: 7\n  log_every_steps: 3\n")
    monkeypatch.chdir(tmp_path)
    loaded = load_config(["s0.steps=900", "config=mine"])
    assert (loaded.config.s0.steps, loaded.config.s0.log_every_steps, loaded.config.s0.warmup_steps) == (900, 3, 100)
    assert loaded.sources == {"s0.steps": "command line", "s0.log_every_steps": "configs/mine.yaml:3"}


def test_layers_of_a_config_file_come_in_order(tmp_path):
    folder = write(
        tmp_path,
        recipe__short="stages: [s0]\nseed: 1\nmodel:\n  pooling: cls\n  revision: r\n",
        model__small="pooling: mean\nname: tiny:bert\n",
        mine="use: {model: small, recipe: short}\nmodel: {name: tiny:qwen2}\nname: mine\n",
    )
    config = load_config(["config=mine"], configs_dirs=[folder]).config
    # recipe: seed, stages, revision; then the pick: pooling; then the file itself: name.
    assert (config.seed, config.stages, config.recipe) == (1, ["s0"], "short")
    assert config.model == ModelConfig(name="tiny:qwen2", pooling="mean", revision="r")


def test_pick_on_the_command_line_replaces_the_whole_section(tmp_path):
    folder = write(
        tmp_path,
        model__small="pooling: mean\n",
        model__other="name: tiny:bert\n",
        mine="use: {model: small}\nmodel: {revision: abc}\ndata: {tasks: {old: {rows: 3}}}\n",
        data__new="tasks: {new: {rows: 4}}\n",
    )
    loaded = load_config(["config=mine", "model=other", "data=new", "model.padding_side=left"], configs_dirs=[folder])
    assert loaded.config.model == ModelConfig(name="tiny:bert", padding_side="left")
    assert loaded.config.data.tasks == {"new": TaskConfig(rows=4)}
    assert loaded.sources["model.name"].endswith("model/other.yaml:1") and "model.revision" not in loaded.sources


def test_recipe_of_the_command_line_is_read_and_goes_before_the_config_file(tmp_path):
    folder = write(
        tmp_path,
        recipe__a="stages: [s0]\ns0: {steps: 500}\n",
        recipe__b="stages: [s1]\n",
        mine="recipe: b\nseed: 3\nstages: [eval]\n",
    )
    loaded = load_config(["config=mine", "recipe=a"], configs_dirs=[folder])
    assert (loaded.config.recipe, loaded.config.stages, loaded.config.s0.steps) == ("a", ["s0"], 500)
    assert loaded.sources["recipe"] == "command line"
    assert load_config(["config=mine"], configs_dirs=[folder]).config.stages == ["eval"]


def test_first_folder_that_has_the_name_wins_and_paths_are_taken_as_they_are(tmp_path):
    first = write(tmp_path / "first", model__small="pooling: mean\n")
    second = write(tmp_path / "second", model__small="pooling: cls\n", model__big="pooling: cls\n")
    folders = [first, second]
    assert load_config(["model=small"], configs_dirs=folders).config.model.pooling == "mean"
    assert load_config(["model=big"], configs_dirs=folders).config.model.pooling == "cls"
    assert load_config([f"model={second}/model/small.yaml"], configs_dirs=folders).config.model.pooling == "cls"


def test_current_directory_goes_before_the_repository_which_is_there_from_anywhere(tmp_path, monkeypatch):
    write(tmp_path, cluster__local="ranks_per_node: 5\n")
    monkeypatch.chdir(tmp_path)
    loaded = load_config(["cluster=local", "model=minilm"])
    assert loaded.config.cluster.ranks_per_node == 5
    assert loaded.config.model.pooling == "mean"


@pytest.mark.parametrize(
    ("argument", "section", "key", "value"),
    [
        ("model.name=a/b", "model", "name", "a/b"),
        ("data.only=a,b", "data", "only", "a,b"),
        ("s2.weights=curr,top70", "s2", "weights", "curr,top70"),
        ("eval.dir=/x y", "eval", "dir", "/x y"),
        ("data.hub=", "data", "hub", ""),
        ("data.hub=null", "data", "hub", ""),
        ("model.revision=1234567", "model", "revision", "1234567"),
        ("model.revision=0x10", "model", "revision", "0x10"),
        ("model.revision=1e5", "model", "revision", "1e5"),
        ("eval.instruction=Find: it # now=1", "eval", "instruction", "Find: it # now=1"),
        ("eval.instruction='[QUERY]'", "eval", "instruction", "[QUERY]"),
        ("s0.learning_rate=1e-4", "s0", "learning_rate", 0.0001),
        ("s0.learning_rate=1E-4", "s0", "learning_rate", 0.0001),
        ("s0.learning_rate=.5", "s0", "learning_rate", 0.5),
        ("s0.learning_rate=1", "s0", "learning_rate", 1.0),
        ("s0.steps=001200", "s0", "steps", 1200),
        ("loss.false_negative_margin=null", "loss", "false_negative_margin", None),
        ("loss.false_negative_margin=", "loss", "false_negative_margin", None),
        ("loss.false_negative_margin=0.1", "loss", "false_negative_margin", 0.1),
        ("loss.gradient_cache=true", "loss", "gradient_cache", True),
        ("logging.plots=off", "logging", "plots", False),
    ],
)
def test_values_of_the_command_line(argument, section, key, value):
    found = getattr(getattr(load_config([argument]).config, section), key)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "1E-4", "'1e-4'", "0.0001", "1e-04"])
def test_yaml_floats_in_every_form(tmp_path, text):
    folder = write(tmp_path, mine=f"s0:\n  learning_rate: {text}\n")
    assert load_config(["config=mine"], configs_dirs=[folder]).config.s0.learning_rate == 0.0001


def test_text_keys_of_yaml_keep_their_characters(tmp_path):
    text = (
        "data:\n  only: no\n  tasks:\n    no: {language: no, instructions: [yes, 12, 'a: b']}\n    1.5: {}\n    x:\n"
        "model: {revision: 0123, lora: {targets: null}}\n"
    )
    config = load_config(["config=mine"], configs_dirs=[write(tmp_path, mine=text)]).config
    assert config.data.only == "no"
    assert config.data.tasks == {
        "no": TaskConfig(language="no", instructions=["yes", "12", "a: b"]),
        "1.5": TaskConfig(),
        "x": TaskConfig(),
    }
    assert config.model.revision == "0123" and config.model.lora.targets == ""


def test_lists_and_tasks_on_the_command_line():
    arguments = ["stages=[s0,'s1']", "data.tasks.v1.5.format=beir", "data.tasks.v1.5.instructions=[Find it, Seek it]"]
    config = load_config([*arguments, "data.tasks={b: {rows: 2}}"]).config
    assert config.stages == ["s0", "s1"]
    assert config.data.tasks == {
        "v1.5": TaskConfig(format="beir", instructions=["Find it", "Seek it"]),
        "b": TaskConfig(rows=2),
    }


def test_home_folder_is_filled_in_where_the_shell_does_not(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert load_config(["data.dir=~/rows"]).config.data.dir == "/home/me/rows"


def test_dotted_names_anchors_and_merges_work_in_yaml(tmp_path):
    text = (
        "s0.steps: 500\nmodel.lora.rank: 4\ndata:\n  tasks:\n    a: &same {format: beir, rows: 3}\n"
        "    b: {<<: *same, rows: 4}\n"
    )
    config = load_config(["config=mine"], configs_dirs=[write(tmp_path, mine=text)]).config
    assert config.s0.steps == 500 and config.model.lora.rank == 4
    assert config.data.tasks == {"a": TaskConfig(format="beir", rows=3), "b": TaskConfig(format="beir", rows=4)}


def odd_config() -> Config:
    tasks = {
        "no": TaskConfig(instructions=["a: b # c", "'q'", "null", "1e-4", "two\nlines", "umlaut \u00e4"], rows=3),
        "1.5": TaskConfig(format="pairs"),
    }
    default = Config()
    return dataclasses.replace(
        default,
        name="odd",
        recipe="gone",
        stages=["eval"],
        model=ModelConfig(name="0123", revision="1e5", lora=LoraConfig(alpha=1e-7)),
        data=dataclasses.replace(default.data, tasks=tasks, only="true"),
        loss=dataclasses.replace(default.loss, false_negative_margin=0.1 + 0.2),
        s2=S2Config(weights="curr,top70", learning_rate=1e-5),
    )


@pytest.mark.parametrize("config", [Config(), odd_config()], ids=["default", "odd"])
def test_saved_config_loads_to_an_equal_one_without_any_other_file(tmp_path, config):
    path = tmp_path / "run" / "s1" / "config.yaml"
    save_config(config, path)
    assert load_config([f"config={path}"], configs_dirs=[]).config == config
    assert [file.name for file in path.parent.iterdir()] == ["config.yaml"]
    for field in dataclasses.fields(Config):
        assert f"\n{field.name}:" in path.read_text()


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1),
        st.lists(st.text(st.characters(codec="utf-8"))),
        max_size=3,
    )
)
@settings(max_examples=30, deadline=None)
def test_any_task_name_and_any_text_survives_saving(texts):
    assume(not any("${" in text or text == "???" or text.startswith("~/") for text in chain(texts, *texts.values())))
    tasks = {name: TaskConfig(instructions=values) for name, values in texts.items()}
    config = dataclasses.replace(Config(), data=dataclasses.replace(Config().data, tasks=tasks))
    with tempfile.TemporaryDirectory() as folder:
        save_config(config, Path(folder) / "c.yaml")
        assert load_config([f"config={folder}/c.yaml"], configs_dirs=[]).config == config


def test_saved_config_takes_changes_and_picks(tmp_path):
    save_config(odd_config(), tmp_path / "config.yaml")
    config = load_config([f"config={tmp_path}/config.yaml", "model=tiny_decoder", "s2.weights=ema"]).config
    assert config.model.name == "tiny:qwen2" and config.model.revision == ""
    assert config.s2.weights == "ema" and config.data == odd_config().data


def test_loading_is_quick_and_free_of_torch(tmp_path):
    tasks = {f"task{number}": TaskConfig(instructions=["one", "two"]) for number in range(25)}
    save_config(
        dataclasses.replace(Config(), data=dataclasses.replace(Config().data, tasks=tasks)), tmp_path / "c.yaml"
    )
    code = (
        "import sys, time; from tdro_hpc.config.load import load_config\n"
        f"start = time.process_time(); load_config(['config={tmp_path}/c.yaml'])\n"
        "print(time.process_time() - start); print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    seconds, modules = subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True).split("\n")[:2]
    assert modules == "set()"
    assert float(seconds) < 0.3


def test_error_is_a_value_error_with_its_problems_apart():
    with pytest.raises(ValueError) as caught:
        load_config(["a", "s0.steps=x"])
    assert isinstance(caught.value, ConfigError)
    assert len(caught.value.problems) == 2 and str(caught.value) == "\n".join(caught.value.problems)


@pytest.mark.parametrize("given", ["data.dir=rows", "data.hub=a/b"])
def test_data_of_the_command_line_bring_their_own_tasks(tmp_path, given):
    folder = write(
        tmp_path,
        data__made="builder: embedded\nquery_max_tokens: 64\ntasks: {made: {}}\n",
        data__named="hub: x/y\ntasks: {named: {}}\n",
        mine="use: {data: made}\ndata: {loader_workers: 1}\n",
        other="use: {data: named}\n",
    )
    data = load_config(["config=mine", given], configs_dirs=[folder]).config.data
    assert (data.builder, data.tasks, data.query_max_tokens, data.loader_workers) == ("", {}, 64, 1)
    # Built data that the line itself asks for, and tasks that are only described, stay.
    assert load_config(["config=mine", "data=made", given], configs_dirs=[folder]).config.data.builder == "embedded"
    assert list(load_config(["config=other", given], configs_dirs=[folder]).config.data.tasks) == ["named"]
    assert load_config(["config=mine", "data.dir="], configs_dirs=[folder]).config.data.builder == "embedded"
