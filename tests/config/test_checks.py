import pytest

from tdro_hpc.config.load import ConfigError, load_config


def problems_of(*arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(list(arguments))
    return caught.value.problems


@pytest.mark.parametrize(
    ("arguments", "start", "cure"),  # @ stands for: on the command line
    [
        (["name=a/b"], "name @ is 'a/b'; it names a folder", "name=my-run"),
        (["name="], "name @ is ''", "name=my-run"),
        (["stages=[s0,s9]"], "stages @ holds 's9'", "stages=[s0,s1,s2,eval]"),
        (["stages=[]"], "stages @ is empty", "stages=[s0,s1,s2,eval]"),
        (["stages=[prepare,s0]"], "stages @ holds 'prepare', but data.builder is empty", "data.builder=embedded"),
        (["model.name="], "model.name @ is ''; it must name a model", "model.name=Qwen/Qwen1.5-0.5B"),
        (["model.name=package:"], "model.name @ is 'package:'", "model.name=Qwen/Qwen1.5-0.5B"),
        (["model.attention=flash_attention_2", "model.autocast=float32"], "model.attention @", "model.attention=sdpa"),
        (
            ["cluster.ranks_per_node=4", "cluster.gpus_per_node=2"],
            "cluster.ranks_per_node @ is 4",
            "cluster.ranks_per_node=2",
        ),
        (["parallel.backend=nccl"], "parallel.backend @ is 'nccl'", "parallel.backend=auto"),
        (["s1.batching=homogeneous"], "s1.stratified is true", "s1.stratified=false"),
        (["s0.stratified=true"], "s0.stratified @ is true", "s0.batching=mixed"),
        (
            ["s1.passages_per_query=1"],
            "s1.passages_per_query @ is 1 with s1.negatives=group",
            "s1.passages_per_query=8",
        ),
        (["s0.steps=50"], "s0.warmup_steps is 100, more than s0.steps=50", "s0.warmup_steps=5"),
        (["s2.warmup_steps=2000"], "s2.warmup_steps @ is 2000, more than s2.steps=1000", "s2.warmup_steps=100"),
        (
            ["s1.reference_losses=cached", "s1.negatives=world"],
            "s1.reference_losses @ is 'cached', but s1.negatives is 'world'",
            "s1.reference_losses=online",
        ),
        (["s0.weights=even"], "s0.weights @ is 'even'; it must be uniform, size", "s0.weights=uniform"),
        (["s0.weights=temperature:hot"], "s0.weights @ is 'temperature:hot'", "s0.weights=uniform"),
        (["s1.top_percents=20,x"], "s1.top_percents @ holds 'x'", "s1.top_percents=20,50,70"),
        (["s2.weights=best"], "s2.weights @ holds 'best'", "s2.weights=curr"),
        (["s2.weights= , "], "s2.weights @ is empty", "s2.weights=curr"),
        (
            ["s2.weights=top65"],
            "s2.weights @ holds 'top65', but s1 makes only",
            "s1.top_percents=20,30,40,50,60,70,80,90,65",
        ),
        (["eval.models=base,s3"], "eval.models @ holds 's3'", "eval.models=./s3"),
        (
            ["eval.models=base,s2-ema"],
            "eval.models @ holds 's2-ema'; it may hold base, bm25, s0, s1, s2, s2-curr",
            "s2.weights=curr,ema",
        ),
        (["eval.models="], "eval.models @ is empty", "eval.models=base,s0,s2"),
        (
            ["data.tasks.a.negatives=group", "s0.passages_per_query=1"],
            "s0.passages_per_query @ is 1, but task a",
            "s0.passages_per_query=2",
        ),
    ],
)
def test_contradiction_names_its_key_and_a_cure_that_helps(arguments, start, cure):
    (problem,) = problems_of(*arguments)
    assert problem.startswith(start.replace(" @", " on the command line"))
    assert f"{cure}" in problem.partition("Type ")[2]
    load_config([*arguments, cure])


@pytest.mark.parametrize(
    "push", ["model", "a/b/c", "lab/a..b", "lab/a--b", "-lab/model", "lab/model.git", "lab/mo del"]
)
def test_repository_that_the_hub_cannot_have_is_refused(push):
    (problem,) = problems_of(f"export.push={push}")
    assert problem.startswith("export.push on the command line is") and "Type export.push=my-org/my-" in problem
    load_config(["export.push=Lab-1/Model_2.0"])


def test_token_of_the_hub_in_a_value_is_refused_without_being_repeated():
    token = "hf_AbCdEfGhIjKlMnOpQrStUvWx"
    (problem,) = problems_of("cluster=slurm", f"cluster.setup=[module load cuda,export HF_TOKEN={token}]")
    assert problem.startswith("cluster.setup") and "type: hf auth login" in problem and token not in problem
    load_config(["cluster=slurm", "cluster.setup=[export HF_XET_HIGH_PERFORMANCE=1,source hf_env.sh]"])


def test_values_that_only_look_odd_are_accepted():
    load_config(
        [
            "name=run-1.5_a+b",
            "s0.weights=temperature:.5",
            "s1.weights=runs/x/curr.json",
            "s2.weights=my.json,top20,ema",
            "eval.models=base,bm25,s2-ema,s2-my,/some/folder,runs/x/s0",
            "model.name=tiny:bert",
            "stages=[s2-curr,eval]",
            "cluster.ranks_per_node=4",
        ]
    )


def test_nothing_is_said_about_a_section_that_is_wrong_in_itself():
    # cluster falls back to its defaults, without GPUs: that nccl needs some would be a false alarm.
    (problem,) = problems_of("parallel.backend=nccl", "cluster.gpus_per_node=eight")
    assert problem.startswith("cluster.gpus_per_node on the command line is 'eight'")
