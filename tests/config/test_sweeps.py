"""Sweeps: which arguments are swept, the runs that they make, and their names."""

import re

import pytest

from tdro_hpc.config.load import load_config
from tdro_hpc.config.sweeps import is_swept, variations


def labels_of(*arguments: str) -> list[str]:
    return [variation.label for variation in variations(arguments)]


@pytest.mark.parametrize(
    "argument", ["s1.eta=0.01,0.02", "seed=1,2", "s0.stratified=true,false", " s0.steps = 10, 20", "s0.eta=1,2"]
)
def test_commas_sweep_numbers_and_switches(argument):
    # s0 has no eta: the unknown key is not swept, and is reported as unknown.
    assert is_swept(argument) == (not argument.startswith("s0.eta"))


@pytest.mark.parametrize(
    "argument",
    ["s2.weights=curr,mean", "data.only=a,b", "stages=[s0,s1]", "stages=s0,s1", "seed=[1,2]", "seed=1", "name=a,b",
     "config=a,b", "s1.top_percents=20,30", "stage", "cluster={nodes: 1, executor: slurm}"],
)  # fmt: skip
def test_commas_inside_texts_and_lists_are_no_sweep(argument):
    assert not is_swept(argument)
    (only,) = variations([argument])
    assert only.arguments == (argument,) and only.label == ""


def test_each_value_makes_one_run_with_its_single_value():
    first, second = variations(["stage=s1", "s1.eta=0.01,0.02", "data.only=a,b"])
    assert first.arguments == ("stage=s1", "s1.eta=0.01", "data.only=a,b")
    assert second.arguments == ("stage=s1", "s1.eta=0.02", "data.only=a,b")
    assert (first.label, second.label) == ("eta0.01", "eta0.02") and first.values == ("s1.eta=0.01",)
    assert load_config(list(second.arguments[1:2])).config.s1.eta == 0.02


def test_several_keys_make_every_combination_in_order():
    assert labels_of("s1.eta=0.01,0.02", "seed=1,2") == [
        "eta0.01-seed1",
        "eta0.01-seed2",
        "eta0.02-seed1",
        "eta0.02-seed2",
    ]


def test_name_of_a_run_does_not_depend_on_the_spelling_or_on_the_other_values():
    assert labels_of("s1.eta=1e-2,.02") == labels_of("s1.eta=0.010,0.02") == ["eta0.01", "eta0.02"]
    assert labels_of("s1.eta=5,0.02")[1] == "eta0.02"
    assert labels_of("seed=1,2", "s1.eta=0.02,0.03")[0] == "seed1-eta0.02"


def test_key_whose_last_name_is_shared_is_named_in_full():
    assert labels_of("s0.steps=10,20") == ["s0.steps10", "s0.steps20"]
    assert labels_of("s0.stratified=True,false") == ["s0.stratified-true", "s0.stratified-false"]


def test_names_are_safe_for_files():
    odd = labels_of("data.tasks.a b/c.rows=1,2", "loss.false_negative_margin=null,-0.1", "s0.stratified=true,false")
    assert len(set(odd)) == 8
    for label in odd:
        assert load_config([f"name=x-{label}"]).config.name == f"x-{label}" and not re.search(r"[/\s]", label)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("s1.eta=0.01,", "empty value between its commas. Type s1.eta=0.01."),
        ("s1.eta=0.01,0.010", "gives 0.01 twice. Type s1.eta=0.01."),
        ("s0.steps=1,000", "is read as several values. Type s0.steps=1000 for one number."),
    ],
)
def test_mistakes_of_a_sweep_say_what_to_type(argument, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        variations([argument])


def test_value_that_is_none_stays_as_it_is_for_the_report():
    assert [variation.arguments for variation in variations(["s1.eta=0.01,fast"])] == [
        ("s1.eta=0.01",),
        ("s1.eta=fast",),
    ]
